"""GPU kernels: one source for both vendors (pages.h), what a launch is given (`args`), and the
images compiled from it (`images`).

Two ops, `lmc_gather` and `lmc_scatter`, of blocks of BLOCK threads. Knows no driver and no torch.
"""

from lmc.kernels.args import BLOCK, GATHER, SCATTER, PagesArgs, Tables, before, pages_args, starts
from lmc.kernels.images import ImageError, Vendor, check, choose, listed, load

__all__ = [
    "BLOCK",
    "GATHER",
    "SCATTER",
    "ImageError",
    "PagesArgs",
    "Tables",
    "Vendor",
    "before",
    "check",
    "choose",
    "listed",
    "load",
    "pages_args",
    "starts",
]
