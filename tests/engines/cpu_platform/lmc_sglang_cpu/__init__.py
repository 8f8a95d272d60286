"""A test-only SGLang platform for machines without a GPU.

SGLang asks every installed platform's `activate`; the answer None means "not my hardware". On a
machine with a GPU this package therefore changes nothing.
"""


def activate() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "lmc_sglang_cpu.platform.NativeCpuPlatform"
