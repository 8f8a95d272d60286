"""Descriptors of the two sides of a transfer: the engine's paged pool and pieces of chunks.

Pages are opaque runs of bytes, so one descriptor covers every KV layout. A pool is planes in the
order of the engine's layers, each with the same number of pages. A chunk is

    address -> [plane 0: chunk_pages x page_bytes[0]] [plane 1: chunk_pages x page_bytes[1]] ...

All are immutable; the tensors a pool was made from live as long as the pool. The tables of int64
rows are what device code reads.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

__all__ = ["PagedPool", "Piece", "Transfer", "page_view"]


def page_view(tensor: torch.Tensor, page_tokens: int = 1) -> torch.Tensor:
    """The uint8 view [num_pages, page_bytes] of a `[slots, ...]` tensor, without a copy."""
    if page_tokens < 1:
        raise ValueError(f"page_tokens is {page_tokens}, must be at least 1")
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise ValueError(f"a plane of shape {tuple(tensor.shape)} has no slots")
    slots = tensor.shape[0]
    if slots % page_tokens:
        raise ValueError(f"{slots} slots are not whole pages of {page_tokens} tokens")
    if not tensor[0].is_contiguous():
        raise ValueError(f"a slot is not one run of bytes: strides {tensor.stride()}")
    rows = tensor.view(slots, -1).view(torch.uint8)
    if page_tokens == 1:
        return rows
    if rows.stride(0) != rows.shape[1]:
        raise ValueError(
            f"slots are {rows.stride(0)} bytes apart but hold {rows.shape[1]}: "
            f"{page_tokens} of them are not one run of bytes"
        )
    return rows.view(slots // page_tokens, -1)


class PagedPool:
    """The engine's paged KV memory as uint8 planes [num_pages, page_bytes], any page stride."""

    def __init__(self, planes: Sequence[torch.Tensor], layers: Sequence[int] = ()) -> None:
        """`layers[i]` is the engine's layer that reads plane i, ascending; left out, each plane is
        a layer of its own.
        """
        if not planes:
            raise ValueError("a pool needs at least one plane")
        layers = tuple(layers) or tuple(range(len(planes)))
        if len(layers) != len(planes) or layers[0] < 0 or list(layers) != sorted(layers):
            raise ValueError(f"layers of {len(planes)} planes must ascend from 0 on: {layers}")
        for index, plane in enumerate(planes):
            _check_plane(index, plane, planes[0])
        self.planes = tuple(planes)
        self.layers = layers
        self.num_pages = planes[0].shape[0]
        self.page_bytes = tuple(plane.shape[1] for plane in planes)
        self.device = planes[0].device
        self.table = array("q")  # one row a plane: base, num_pages, page_stride, page_bytes
        for plane in planes:
            stride = plane.stride(0) if self.num_pages > 1 else plane.shape[1]
            self.table.extend((plane.data_ptr(), self.num_pages, stride, plane.shape[1]))

    @classmethod
    def from_slots(
        cls, tensors: Sequence[torch.Tensor], page_tokens: int, layers: Sequence[int] = ()
    ) -> Self:
        """A pool over `[slots, ...]` tensors; `page_tokens` consecutive slots are a page."""
        return cls([page_view(tensor, page_tokens) for tensor in tensors], layers)

    @property
    def num_layers(self) -> int:
        """Layers of the engine up to the last one that reads this pool."""
        return self.layers[-1] + 1

    def layer_planes(self, layer: int) -> range:
        """The planes of a layer; none where it reads another pool."""
        return range(bisect_left(self.layers, layer), bisect_right(self.layers, layer))

    def chunk_bytes(self, num_pages: int) -> int:
        """The payload size of a chunk of `num_pages` pages."""
        return num_pages * sum(self.page_bytes)


def _check_plane(index: int, plane: torch.Tensor, first: torch.Tensor) -> None:
    name = f"plane {index}"
    if plane.dtype != torch.uint8 or plane.dim() != 2:
        raise ValueError(f"{name} is {plane.dtype} {tuple(plane.shape)}, must be 2-D torch.uint8")
    if plane.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(plane.shape)} holds no bytes")
    if plane.shape[1] > 1 and plane.stride(1) != 1:
        raise ValueError(f"{name}: the bytes of a page are {plane.stride(1)} apart, must be 1")
    if plane.shape[0] > 1 and plane.stride(0) < plane.shape[1]:
        raise ValueError(
            f"{name}: pages overlap, {plane.shape[1]} bytes every {plane.stride(0)} bytes"
        )
    if plane.shape[0] != first.shape[0]:
        raise ValueError(f"{name} has {plane.shape[0]} pages, plane 0 has {first.shape[0]}")
    if plane.device != first.device:
        raise ValueError(f"{name} is on {plane.device}, plane 0 on {first.device}")


@dataclass(frozen=True, slots=True)
class Piece:
    """Pages `first .. first + pages` of a chunk of `chunk_pages` pages at a host address."""

    address: int
    chunk_pages: int
    first: int
    pages: int

    def __post_init__(self) -> None:
        if self.address <= 0:
            raise ValueError(f"address is {self.address}, must be positive")
        if self.first < 0 or self.pages < 0 or self.first + self.pages > self.chunk_pages:
            raise ValueError(
                f"pages {self.first}..{self.first + self.pages} "
                f"lie outside a chunk of {self.chunk_pages} pages"
            )


class Transfer:
    """Page ids and the pieces they name, in order: checked, so every byte of it is in bounds."""

    def __init__(self, pool: PagedPool, page_ids: torch.Tensor, pieces: Sequence[Piece]) -> None:
        _check_page_ids(pool, page_ids)
        num_pages = sum(piece.pages for piece in pieces)
        if num_pages != len(page_ids):
            raise ValueError(f"{len(page_ids)} page ids for pieces of {num_pages} pages")
        self.pool = pool
        # a copy: the caller's tensor may change before a worker reads it
        self.page_ids = page_ids.clone(memory_format=torch.contiguous_format)
        self.pieces = tuple(pieces)
        self.table = array("q")  # one row a piece: address, chunk_pages, first, pages
        for piece in pieces:
            self.table.extend((piece.address, piece.chunk_pages, piece.first, piece.pages))


def _check_page_ids(pool: PagedPool, page_ids: torch.Tensor) -> None:
    if page_ids.dtype != torch.int64 or page_ids.dim() != 1 or page_ids.device.type != "cpu":
        raise ValueError(
            f"page ids are {page_ids.dtype} {tuple(page_ids.shape)} on {page_ids.device}, "
            "must be 1-D torch.int64 on the cpu"
        )
    if len(page_ids) == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(page_ids))
    if low < 0 or high >= pool.num_pages:
        raise IndexError(f"page ids {low}..{high} lie outside a pool of {pool.num_pages} pages")
