"""The torch backend: index ops, on any device torch knows. The oracle of every other backend."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lmc.transfer.pages import Transfer

__all__ = ["TorchBackend", "host_view"]


class TorchBackend:
    name = "torch"

    def gather(self, transfer: Transfer, planes: range) -> None:
        with _in_turn(transfer.pool.device):
            for plane, ids, chunk in _moves(transfer, planes):
                chunk.copy_(plane.index_select(0, ids))

    def scatter(self, transfer: Transfer, planes: range) -> None:
        with _in_turn(transfer.pool.device):
            for plane, ids, chunk in _moves(transfer, planes):
                plane.index_copy_(0, ids, chunk.to(plane.device))


def host_view(address: int, num_bytes: int) -> torch.Tensor:
    """Raw host memory as a uint8 tensor; it owns nothing."""
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


@contextmanager
def _in_turn(device: torch.device) -> Iterator[None]:
    """On a GPU: in a stream of its own, over when this is. For other streams than the caller's
    current one its owner waits (`streams.engine_work`).
    """
    if device.type != "cuda":  # torch's name for AMD's GPUs as well
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))  # a step that writes or reads the pages
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()  # what reads or reuses the pages or the chunks next


def _moves(
    transfer: Transfer, planes: range
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(plane of the pool, page ids, pages of the chunk) of each plane and piece."""
    pool = transfer.pool
    page_ids = transfer.page_ids.to(pool.device)
    for index in planes:
        row = pool.page_bytes[index]
        before = sum(pool.page_bytes[:index])
        start = 0
        for piece in transfer.pieces:
            if piece.pages == 0:
                continue
            address = piece.address + before * piece.chunk_pages + piece.first * row
            chunk = host_view(address, piece.pages * row).view(piece.pages, row)
            yield pool.planes[index], page_ids[start : start + piece.pages], chunk
            start += piece.pages
