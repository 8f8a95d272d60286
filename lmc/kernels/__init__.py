"""GPU kernels: one source for both vendors (pages.h), what a launch is given (`args`), the images
compiled from it (`images`), the same in Triton for GPUs without one (`jit`), and what was proved of
them (`proof`).

Two ops, `lmc_gather` and `lmc_scatter`, of blocks of BLOCK threads. Knows no driver and no torch.
"""

from lmc.kernels.args import BLOCK, GATHER, SCATTER, PagesArgs, Tables, before, pages_args, starts
from lmc.kernels.images import ImageError, Vendor, check, choose, listed, load, manifest
from lmc.kernels.jit import Compiled, compile_pages

__all__ = [
    "BLOCK",
    "GATHER",
    "SCATTER",
    "Compiled",
    "ImageError",
    "PagesArgs",
    "Tables",
    "Vendor",
    "before",
    "check",
    "choose",
    "compile_pages",
    "listed",
    "load",
    "manifest",
    "pages_args",
    "starts",
]
