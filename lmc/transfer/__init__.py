"""Moves pages between the engine's paged pool and chunks in host memory.

`pages` describes the two sides and checks a transfer, `ops` moves it with the chosen backend,
`copier` does so in the background, `streams` on a GPU. Knows torch and is given (address, bytes),
never a lease.
"""

from lmc.transfer.copier import Copier, Job, ThreadCopier
from lmc.transfer.ops import Backend, gather, resolve, scatter
from lmc.transfer.pages import PagedPool, Piece, Transfer, page_view
from lmc.transfer.streams import copier_of

__all__ = [
    "Backend",
    "Copier",
    "Job",
    "PagedPool",
    "Piece",
    "ThreadCopier",
    "Transfer",
    "copier_of",
    "gather",
    "page_view",
    "resolve",
    "scatter",
]
