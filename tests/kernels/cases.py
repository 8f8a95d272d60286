"""What every executor of the kernels must move as the torch reference does: pools in the layouts of
both engines, and transfers of all kinds.
"""

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lmc.transfer.ops import Backend
from lmc.transfer.pages import PagedPool, Piece, Transfer

BF16 = torch.bfloat16
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on
TOKENS, HEADS, DIM, LAYERS = 48, 2, 64, 2
PAIRS = [layer for layer in range(LAYERS) for _ in "KV"]
RowOfPieces = tuple[tuple[int, int, int], ...]  # chunk_pages, first, pages


class Layout:
    """A pool and all the memory under it, filled with bytes that differ."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory: list[torch.Tensor] = []

    def tensor(self, *shape: int, dtype: torch.dtype = BF16, shift: int = 0) -> torch.Tensor:
        """Memory of a shape; `shift` bytes past where it would be aligned."""
        size = torch.Size(shape).numel() * dtype.itemsize
        memory = torch.randint(256, (size + shift,), dtype=torch.uint8).to(self.device)
        self.memory.append(memory)
        return memory[shift:].view(dtype).view(shape)


def sglang(layout: Layout, page: int) -> PagedPool:
    """[slots, heads, dim] of each layer's K and V."""
    slots = max(TOKENS, 3 * page)
    planes = [layout.tensor(slots, HEADS, DIM) for _ in range(2 * LAYERS)]
    return PagedPool.from_slots(planes, page, PAIRS)


def opaque(layout: Layout, *shape: int, dtype: torch.dtype = BF16) -> PagedPool:
    """[pages, ...] of each layer's K and V: whatever a page holds, it is one run of bytes."""
    planes = [layout.tensor(*shape, dtype=dtype) for _ in range(2 * LAYERS)]
    return PagedPool.from_slots(planes, 1, PAIRS)


def vllm_kv_first(layout: Layout) -> PagedPool:
    """[2, pages, page, heads, dim]."""
    layers = [layout.tensor(2, 6, 16, HEADS, DIM) for _ in range(LAYERS)]
    return PagedPool.from_slots([layer[kv] for layer in layers for kv in (0, 1)], 1, PAIRS)


def vllm_pages_first(layout: Layout) -> PagedPool:
    """[pages, 2, page, heads, dim]: pages of K lie a page of V apart."""
    layers = [layout.tensor(6, 2, 16, HEADS, DIM) for _ in range(LAYERS)]
    return PagedPool.from_slots([layer[:, kv] for layer in layers for kv in (0, 1)], 1, PAIRS)


def across_layers(layout: Layout) -> PagedPool:
    """[pages, layers, 2, page, heads, dim]: one block for all layers."""
    block = layout.tensor(6, LAYERS, 2, 16, HEADS, DIM)
    planes = [block[:, layer, kv] for layer in range(LAYERS) for kv in (0, 1)]
    return PagedPool.from_slots(planes, 1, PAIRS)


def rows(
    layout: Layout, *row_bytes: int, pages: int = 24, gap: int = 0, shift: int = 0
) -> PagedPool:
    """A plane of raw pages for each size."""
    planes = [
        layout.tensor(pages, row + gap, dtype=torch.uint8, shift=shift)[:, :row]
        for row in row_bytes
    ]
    return PagedPool(planes)


ONE: RowOfPieces = ((6, 0, 6),)
SOME: RowOfPieces = ((8, 2, 5), (8, 0, 0), (3, 0, 1), (4, 1, 3))
MANY: RowOfPieces = ((16, 2, 13), (16, 9, 4), (3, 0, 1))


@dataclass(frozen=True)
class Case:
    """A gather, and a scatter to other pages: called, it is all memory of both sides after each,
    with the pool on a device and chunks on the host.
    """

    pool: Callable[[Layout], PagedPool]
    pieces: RowOfPieces = ONE
    planes: range | None = None
    repeats: bool = False
    shift: int = 0  # of the chunks

    def __call__(self, backend: Backend, device: str | torch.device = "cpu") -> list[torch.Tensor]:
        torch.manual_seed(1)
        layout = Layout(torch.device(device))
        pool = self.pool(layout)
        planes = range(len(pool.planes)) if self.planes is None else self.planes
        sizes = [pool.chunk_bytes(chunk_pages) + 80 for chunk_pages, _, _ in self.pieces]
        chunks = [torch.full((size,), 0xEE, dtype=torch.uint8) for size in sizes]
        places = [chunk.data_ptr() + self.shift for chunk in chunks]
        pieces = [Piece(place, *piece) for place, piece in zip(places, self.pieces, strict=True)]
        count = sum(piece.pages for piece in pieces)
        page_ids, other_ids = (torch.randperm(pool.num_pages)[:count] for _ in range(2))
        if self.repeats:
            page_ids = torch.randint(pool.num_pages, (count,))
        backend.gather(Transfer(pool, page_ids, pieces), planes)
        seen = [memory.clone().cpu() for memory in (*layout.memory, *chunks)]
        backend.scatter(Transfer(pool, other_ids, pieces), planes)
        return [*seen, *(memory.cpu() for memory in layout.memory), *chunks]


def past_4_gib(backend: Backend) -> list[torch.Tensor]:
    """Pages 5 GiB apart, and the end of a chunk of planes of 8 GiB; hardly any of it is real."""
    row, stride, chunk_pages = 64, 5 << 30, (8 << 30) // 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    pool_memory, chunk = (
        torch.frombuffer(mmap.mmap(-1, size, flags), dtype=torch.uint8)
        for size in (3 * stride, 2 * chunk_pages * row)
    )
    planes = [pool_memory[at:].as_strided((3, row), (stride, 1)) for at in (0, 4096)]
    for seed, plane in enumerate(planes):
        plane.copy_(torch.arange(3 * row).view(3, row) + seed)
    pool = PagedPool(planes)
    pieces = [Piece(chunk.data_ptr(), chunk_pages, chunk_pages - 2, 2)]
    ends = [chunk[at - 2 * row : at] for at in (chunk_pages * row, 2 * chunk_pages * row)]
    backend.gather(Transfer(pool, torch.tensor([2, 0]), pieces), range(2))
    seen = [end.clone() for end in ends]
    backend.scatter(Transfer(pool, torch.tensor([1, 2]), pieces), range(2))
    return [*seen, *(plane.clone() for plane in planes)]


CASES: dict[str, Callable[[Backend], list[torch.Tensor]]] = {
    "sglang nhd page 1": Case(lambda at: sglang(at, 1), MANY),
    "sglang nhd page 16": Case(lambda at: sglang(at, 16), ((3, 0, 3),)),
    "sglang nhd page 64": Case(lambda at: sglang(at, 64), ((4, 1, 2),)),
    "sglang nhd page 256": Case(lambda at: sglang(at, 256), ((1, 0, 1),), range(1, 3)),
    "sglang hnd": Case(lambda at: opaque(at, 9, HEADS, 16, DIM), SOME),
    "sglang rocm vectorized": Case(lambda at: opaque(at, 9, HEADS, DIM // 8, 16, 8), SOME),
    "vllm [2, pages]": Case(vllm_kv_first),
    "vllm [pages, 2]": Case(vllm_pages_first),
    "vllm [pages, layers, 2]": Case(across_layers, planes=range(1, 4)),
    "mla bf16": Case(lambda at: rows(at, 1152, 1152), SOME),
    "mla fp8": Case(lambda at: rows(at, 576, 656), MANY),
    "mla and its indexer": Case(lambda at: rows(at, 1152, 132, 1152, 132), SOME),
    "k and v differ": Case(lambda at: rows(at, 384, 256, 384, 256), SOME, range(1, 4)),
    "recurrent states": Case(lambda at: rows(at, 17000, pages=9), ((9, 2, 6), (2, 1, 1))),
    "rows of 8": Case(lambda at: rows(at, 8, 40, 1000), MANY),
    "rows of 4": Case(lambda at: rows(at, 4, 132, 5000), SOME),
    "odd rows": Case(lambda at: rows(at, 1, 7, 577, 33), SOME),
    "odd row before even ones": Case(lambda at: rows(at, 3, 512, 512), SOME),
    "rows of 16 at 24": Case(lambda at: rows(at, 16, 256, gap=8), MANY),
    "pool at 4": Case(lambda at: rows(at, 512, 512, shift=4), SOME),
    "chunks at 8": Case(lambda at: rows(at, 512, 512), SOME, shift=8),
    "chunks at 1": Case(lambda at: rows(at, 512, 64), SOME, shift=1),
    "gaps between pages": Case(lambda at: rows(at, 512, 48, gap=64), SOME),
    "one page of a long chunk": Case(lambda at: rows(at, 64), ((200, 199, 1),)),
    "many short pieces": Case(lambda at: rows(at, 128, 128), ((2, 1, 1),) * 20),
    "repeated page ids": Case(lambda at: rows(at, 128, 36), MANY, repeats=True),
    "no pieces": Case(lambda at: rows(at, 128), ()),
    "empty pieces": Case(lambda at: rows(at, 128), ((4, 2, 0), (1, 0, 0))),
    "no planes": Case(lambda at: rows(at, 128, 128), SOME, range(1, 1)),
    "past 4 GiB": past_4_gib,
}
