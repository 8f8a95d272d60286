"""Descriptors: what they accept, and what they refuse by name."""

import pytest
import torch

from lmc.transfer.pages import PagedPool, Piece, page_view


def plane(pages: int = 4, row: int = 8) -> torch.Tensor:
    return torch.zeros(pages, row, dtype=torch.uint8)


def test_pool_describes_its_planes() -> None:
    pool = PagedPool([plane(4, 8), plane(4, 3), plane(4, 8), plane(4, 3)], [0, 0, 2, 2])
    assert (pool.num_pages, pool.num_layers) == (4, 3)
    assert pool.page_bytes == (8, 3, 8, 3)
    assert pool.chunk_bytes(3) == 66
    assert [list(pool.layer_planes(layer)) for layer in range(4)] == [[0, 1], [], [2, 3], []]
    assert pool.table[4:8].tolist() == [pool.planes[1].data_ptr(), 4, 3, 3]


@pytest.mark.parametrize("page_tokens", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_page_view_is_the_same_memory(dtype: torch.dtype, page_tokens: int) -> None:
    slots = torch.arange(8 * 2 * 3).view(8, 2, 3).to(dtype)
    pages = page_view(slots, page_tokens)
    assert pages.shape == (8 // page_tokens, page_tokens * 6 * slots.element_size())
    assert pages.data_ptr() == slots.data_ptr()
    assert torch.equal(pages.reshape(-1), slots.view(torch.uint8).reshape(-1))


def test_page_view_keeps_a_slot_stride() -> None:
    interleaved = torch.arange(6 * 2 * 4, dtype=torch.int16).view(6, 2, 4)
    values = page_view(interleaved[:, 1])
    assert values.shape == (6, 8)
    assert values.stride() == (16, 1)
    assert torch.equal(values.contiguous().view(torch.int16), interleaved[:, 1])


@pytest.mark.parametrize(
    ("tensor", "page_tokens", "reason"),
    [
        (torch.zeros(6, 2), 4, "6 slots are not whole pages of 4"),
        (torch.zeros(6, 2), 0, "page_tokens is 0"),
        (torch.zeros(0, 2), 1, "no slots"),
        (torch.zeros(6, 4)[:, ::2], 1, "not one run of bytes"),
        (torch.zeros(6, 2, 4)[:, 1], 2, "slots are 32 bytes apart but hold 16"),
    ],
)
def test_page_view_refuses(tensor: torch.Tensor, page_tokens: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        page_view(tensor, page_tokens)


@pytest.mark.parametrize(
    ("planes", "layers", "reason"),
    [
        ([], [], "at least one plane"),
        ([plane(), plane(), plane()], [0, 0], "layers of 3 planes"),
        ([plane(), plane()], [1, 0], "layers of 2 planes must ascend"),
        ([plane(), plane().view(torch.int8)], [], "plane 1 is torch.int8"),
        ([plane()[0]], [], "must be 2-D"),
        ([plane(4, 0)], [], "plane 0 of shape .* holds no bytes"),
        ([plane(4, 8).T], [], "bytes of a page are 8 apart"),
        ([plane()[0].expand(4, 8)], [], "pages overlap"),
        ([plane(4), plane(5)], [], "plane 1 has 5 pages, plane 0 has 4"),
        ([plane(), plane().to("meta")], [], "plane 1 is on meta"),
    ],
)
def test_pool_refuses(planes: list[torch.Tensor], layers: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PagedPool(planes, layers)


@pytest.mark.parametrize("fields", [(0, 4, 0, 1), (64, 4, -1, 2), (64, 4, 3, 2), (64, 4, 0, -1)])
def test_piece_refuses(fields: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"address|outside a chunk of 4 pages"):
        Piece(*fields)
