"""NVIDIA: device code of its own (device.h, pages.cu) and what launches go by. Calls of NVIDIA's
driver stand in this folder alone.
"""

from lmc.kernels.policy import Policy

__all__ = ["POLICY", "WAVE"]

WAVE = 32
POLICY = Policy(wave=WAVE, grid=8, batch_from=28 << 10, staged_from=None)
"""Others' figures, none measured by us. The grid: a link needs in flight what it moves in a round
trip, 64 GB/s x 1.3 us = 83 KB. A block has 16 KB (256 threads, 4 words of 16 bytes), so 8 of them
fill it and leave the GPU to the model; SGLang's own copies take as many threads (2 blocks of 1024).
Batches: on an H100 copy engines moved pieces of 24 KiB at 4-7 GB/s, of 28 KiB at 40-44
(vllm#42212), and they leave the GPU to the model.
"""
