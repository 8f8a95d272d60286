"""NVIDIA: device code of its own (device.h, pages.cu) and what launches go by. Calls of NVIDIA's
driver stand in this folder alone.
"""

from lmc.kernels.policy import Policy

__all__ = ["POLICY", "WAVE"]

WAVE = 32
POLICY = Policy(wave=WAVE, grid=8, staged_from=None)
"""A link needs in flight what it moves in a round trip: 64 GB/s x 1.3 us = 83 KB. A block has 16 KB
(256 threads, 4 words of 16 bytes), so 8 of them fill it and leave the GPU to the model. SGLang's
own copies take as many threads (2 blocks of 1024).
"""
