"""AMD: device code of its own (device.h, pages.hip) and what launches go by. Calls of AMD's driver
stand in this folder alone.
"""

from lmc.kernels.policy import Policy

__all__ = ["POLICY", "WAVE"]

WAVE = 64
"""Right on RDNA too, where it is two waves."""
POLICY = Policy(wave=WAVE, grid=128, batch_from=None, staged_from=1 << 20)
"""Others' figures, none measured by us. SGLang saw 24 GB/s with 2 blocks of 1024 threads, 55 with
8, takes 32: 128 of ours (sglang#37635, #39036). From a MiB on the copy engines get one piece a
chunk: on MI300X it takes about that much a piece for them to be fast (vllm#40549). No batches:
hipMemcpyBatchAsync is a loop up to ROCm 7.2.3, and faults above 8192 entries (vllm#43018).
"""
