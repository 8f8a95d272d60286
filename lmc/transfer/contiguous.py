"""What of a transfer is contiguous both in the pool and in its chunks: what copy engines are given.

Pages that follow one another in the pool and in a chunk are one piece of a plane, where nothing
lies between the pool's pages.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from lmc.kernels import before
from lmc.transfer.pages import PagedPool

__all__ = ["Contiguous", "Run"]

_ROW = 4


class Run(NamedTuple):
    """Pages of one piece of a transfer, in some planes."""

    planes: range
    address: int  # of the chunk, here
    chunk_pages: int
    first: int
    pages: int
    start: int  # the first of their page ids


class Contiguous:
    """The pieces of `runs`, of which none is empty and all have the same planes."""

    def __init__(self, pool: PagedPool, page_ids: torch.Tensor, runs: Sequence[Run]) -> None:
        self._planes = planes = runs[0].planes
        table = torch.tensor([run[1:] for run in runs])
        row = torch.repeat_interleave(torch.arange(len(runs)), table[:, 3])
        ends = table[:, 3].cumsum(0)
        within = torch.arange(len(row)) - (ends - table[:, 3])[row]
        ids = page_ids[table[row, 4] + within]
        rows = torch.tensor(pool.table).view(-1, _ROW)[planes.start : planes.stop]
        self._base, self._stride, self._bytes = (rows[:, n : n + 1] for n in (0, 2, 3))
        sums = torch.tensor(before(pool.table))
        self._before = sums[planes.start : planes.stop, None]
        begins = torch.ones(len(row), dtype=torch.bool)
        if torch.equal(self._stride, self._bytes):
            begins[1:] = (row[1:] != row[:-1]) | (ids[1:] != ids[:-1] + 1)
        at = begins.nonzero().flatten()
        self._pages = torch.diff(at, append=torch.tensor([len(row)]))
        self._ids, self._address, self._chunk_pages = ids[at], table[row[at], 0], table[row[at], 1]
        self._page = table[row[at], 2] + within[at]

    @property
    def mean_bytes(self) -> float:
        return float(self._bytes.sum() * self._pages.sum()) / (len(self._planes) * len(self._pages))

    def pieces(self, most: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Addresses in the chunks, addresses in the pool, bytes: of up to `most` pieces at a time,
        int64 each.
        """
        step = max(1, most // len(self._pages))  # few enough that torch needs no threads
        for first in range(0, len(self._planes), step):
            some = slice(first, first + step)
            pool = self._base[some] + self._ids * self._stride[some]
            skip = self._before[some] * self._chunk_pages + self._page * self._bytes[some]
            found = (self._address + skip, pool, self._pages * self._bytes[some])
            for at in range(0, len(self._pages) * len(pool), most):
                chunk, page, size = (part.flatten()[at : at + most] for part in found)
                yield chunk, page, size
