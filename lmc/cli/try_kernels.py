"""Both ops on one device by what lmc would choose for it, against the torch reference on the CPU.

    python -m lmc.cli.try_kernels cuda:0      the last line of its output is a JSON object

For the doctor, in a process of its own: whatever goes wrong ends this process and no other.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from lmc.transfer.gpu import GpuBackend
from lmc.transfer.ops import Backend, gather, resolve, scatter
from lmc.transfer.pages import PagedPool, Piece
from lmc.transfer.reference import TorchBackend

if TYPE_CHECKING:
    from collections.abc import Iterator


PAGEABLE = "pageable"


class Shape(NamedTuple):
    """Bytes of a page in each plane, pages that are moved, bytes by which pages lie apart more."""

    page_bytes: tuple[int, ...]
    pages: int
    gap: int = 0


SHAPES = {
    "pages of 64 tokens, K and V": Shape((64 * 2048,) * 4, 6),
    "pages of one token, K and V": Shape((2048,) * 4, 200),
    "MLA and its indexer": Shape((1152, 132, 1152, 132), 64),
    "pages that lie apart": Shape((4096, 4096), 16, gap=4096),
    "odd rows": Shape((577, 33), 24),
}


def tried(device: torch.device) -> dict[str, object]:
    with _said() as words:
        backend = resolve("auto", device)
    differ, cases = [], 0
    for way in ways(backend):
        for name, shape in SHAPES.items():
            want = moved(TorchBackend(), shape, torch.device("cpu"))
            cases += 1
            if not all(map(torch.equal, moved(backend, shape, device, way), want)):
                differ.append(f"{name} ({way})")
    if isinstance(backend, GpuBackend):
        backend.close()
    return {
        "name": name_of(device),
        "backend": backend.name,
        "chosen": words[-1].removeprefix("lmc transfer backend: "),
        "cases": cases,
        "differ": differ,
        "gpus": [f"cuda:{index}" for index in range(torch.cuda.device_count())],
    }


def ways(backend: Backend) -> list[str]:
    """To and from ordinary memory, on a GPU also pinned memory: as its policy has it, and each of
    the two ways that any vendor has.
    """
    pinned = ["auto", "reach", "stage"] if isinstance(backend, GpuBackend) else []
    return [PAGEABLE, *pinned]


def name_of(device: torch.device) -> str:
    return "this machine" if device.type == "cpu" else torch.cuda.get_device_name(device)


@contextmanager
def _said() -> Iterator[list[str]]:
    """What lmc's log says meanwhile: the choice of a backend, and why."""
    words: list[str] = []
    log, handler = logging.getLogger("lmc"), logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    yield words
    log.removeHandler(handler)


def moved(
    backend: Backend, shape: Shape, device: torch.device, way: str = PAGEABLE
) -> list[torch.Tensor]:
    """The chunk after a gather, and the pool after a scatter of it to other pages."""
    random = torch.Generator().manual_seed(1)
    planes = [
        torch.randint(256, (2 * shape.pages, size + shape.gap), dtype=torch.uint8, generator=random)
        for size in shape.page_bytes
    ]
    memory = [plane.to(device) for plane in planes]  # which waits until it is there
    views = [held[:, :size] for held, size in zip(memory, shape.page_bytes, strict=True)]
    pool = PagedPool(views)
    ids = torch.randperm(2 * shape.pages, generator=random)
    chunk = torch.zeros(pool.chunk_bytes(shape.pages), dtype=torch.uint8)
    halves = shape.pages // 2, shape.pages - shape.pages // 2
    pieces = [
        Piece(chunk.data_ptr(), shape.pages, 0, halves[0]),
        Piece(chunk.data_ptr(), shape.pages, halves[0], halves[1]),
    ]
    with _pinned(backend, chunk, way):
        gather(pool, ids[: shape.pages], pieces, backend=backend)
        scatter(pool, ids[shape.pages :], pieces, backend=backend)
    return [chunk, *(held.cpu() for held in memory)]


@contextmanager
def _pinned(backend: Backend, chunk: torch.Tensor, way: str) -> Iterator[None]:
    """Its memory in reach of the device, as an arena of lmc's would be, and moved in this way."""
    if way == PAGEABLE or not isinstance(backend, GpuBackend):
        yield
        return
    policy, backend.policy = backend.policy, backend.policy.forced(way)
    host, size = chunk.data_ptr(), chunk.numel()
    backend.pins.add(host, size, backend.driver.pin(host, size))
    yield
    backend.pins.remove(host)
    backend.driver.unpin(host)
    backend.policy = policy


if __name__ == "__main__":
    print(json.dumps(tried(torch.device(sys.argv[1]))))
