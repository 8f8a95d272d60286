"""The kernels as Triton makes them on the user's machine, where no image is for its GPU.

Triton comes with torch for GPUs; lmc does without it elsewhere. It is asked for machine code alone,
which is launched as images are: neither its driver nor a C compiler is needed.
"""

import subprocess
from typing import Any, NamedTuple

from lmc.kernels.args import GATHER, SCATTER, PagesArgs
from lmc.kernels.images import ImageError, Vendor

__all__ = ["Compiled", "compile_pages"]

_TYPES = {8: "*i64", 4: "i32"}
"""By the bytes of a field of PagesArgs: its type to Triton. Those of 8 are tables."""
_ASSEMBLY = {Vendor.CUDA: "ptx", Vendor.HIP: "amdgcn"}


class Compiled(NamedTuple):
    """Both ops for one GPU. Each field of PagesArgs is a parameter of its own."""

    images: dict[str, bytes]  # by op
    assembly: dict[str, str]  # by op: PTX, or AMD's; empty where Triton was told not to keep it
    threads: int  # of a block, which is one wave


def compile_pages(vendor: Vendor, arch: str) -> Compiled:
    """For a GPU that calls itself `arch`: sm_90, or gfx942:sramecc+:xnack-. Triton keeps on disk
    what it made. Raises ImageError where there is no Triton, or it does not know the GPU.
    """
    try:
        from triton import TritonError, __version__

        from lmc.kernels import pages_triton
    except ImportError as error:
        raise ImageError(f"no Triton: {error}") from error
    name = arch.partition(":")[0]
    sources = {GATHER: pages_triton.lmc_gather, SCATTER: pages_triton.lmc_scatter}
    try:
        made = {op: _compiled(source, vendor, name) for op, source in sources.items()}
    except (
        TritonError,
        subprocess.SubprocessError,  # of NVIDIA's assembler
        *(OSError, RuntimeError, ValueError),  # of its cache, its compiler, its targets
        *(AttributeError, TypeError),  # of a Triton whose API is another
    ) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ImageError(f"Triton {__version__} has none for {name}: {reason}") from error
    return Compiled(
        {op: one.kernel for op, one in made.items()},
        {op: one.asm.get(_ASSEMBLY[vendor], "") for op, one in made.items()},
        made[GATHER].metadata.warp_size,
    )


def _compiled(source: Any, vendor: Vendor, arch: str) -> Any:
    """What Triton calls a compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_for

    sizes = {name: getattr(PagesArgs, name).size for name, _ in PagesArgs._fields_}
    signature = {name: _TYPES[size] for name, size in sizes.items()}
    if vendor is Vendor.CUDA:
        target = GPUTarget(str(vendor), int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget(str(vendor), arch, 64 if arch.startswith("gfx9") else 32)
    # enable_fp_fusion: there is no float here, but newer versions warn where it is left open
    options = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}
    made = compile_for(ASTSource(source, signature), target, options)
    asked = ("shared", "global_scratch_size", "profile_scratch_size")
    if any(getattr(made.metadata, need, 0) for need in asked) or made.name != source.__name__:
        raise ValueError("it wants memory or a name that a launch here does not give it")
    return made
