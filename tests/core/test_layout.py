"""The shape of a chunk, and every shape that is refused, with its reason."""

from __future__ import annotations

import pytest

from lmc.layout import ALIGN, MAX_CHUNK_STEPS, KVLayout, aligned
from lmc.tiers.frame import header
from tests.core.chunks import NAMESPACE, keys_of


def test_a_chunk_of_sixteen_token_pages() -> None:
    layout = KVLayout(16, 256, (3072,) * 60)
    assert (layout.step_tokens, layout.step_pages) == (16, 1)
    assert (layout.chunk_steps, layout.chunk_pages) == (16, 16)
    assert layout.page_bytes == 60 * 3072
    assert layout.chunk_bytes == 16 * 60 * 3072 == layout.payload_bytes(16)
    assert layout.payload_bytes(3) == 3 * 60 * 3072


@pytest.mark.parametrize(
    ("page", "chunk", "step", "pages_a_step", "steps"),
    [
        (1, 256, 16, 16, 16),
        (4, 64, 16, 4, 4),
        (16, 1536, 16, 1, 96),
        (64, 256, 64, 1, 4),
        (256, 256, 256, 1, 1),
        (24, 96, 24, 1, 4),
        (128, 128, 128, 1, 1),
    ],
)
def test_steps_are_pages_but_never_below_sixteen_tokens(
    page: int, chunk: int, step: int, pages_a_step: int, steps: int
) -> None:
    layout = KVLayout(page, chunk, (8, 8))
    assert layout.step_tokens == step
    assert layout.step_pages == pages_a_step
    assert layout.chunk_steps == steps
    assert layout.payload_bytes(steps) == layout.chunk_bytes == chunk // page * 16


def test_planes_follow_each_other() -> None:
    layout = KVLayout(16, 64, (96, 32, 8))
    assert [layout.plane_offset(plane, 4) for plane in range(3)] == [0, 384, 512]
    assert [layout.plane_offset(plane, 1) for plane in range(3)] == [0, 96, 128]
    assert layout.plane_offset(3, 4) == layout.chunk_bytes


@pytest.mark.parametrize(
    ("page", "chunk", "planes", "reason"),
    [
        (0, 256, (8,), "not a KV layout: 0 tokens a page"),
        (-16, 256, (8,), "not a KV layout: -16 tokens a page"),
        (16, 256, (), r"not a KV layout: .* planes of \(\) bytes"),
        (16, 256, (8, 0), r"not a KV layout: .* planes of \(8, 0\) bytes"),
        (16, 256, (8, -1), "not a KV layout"),
        (3, 192, (8,), "pages of 3 tokens are not supported: neither a divisor of 16"),
        (12, 192, (8,), "pages of 12 tokens are not supported"),
        (16, 0, (8,), "LMC_CHUNK_TOKENS=0: below 64 tokens a chunk costs more"),
        (16, 32, (8,), "LMC_CHUNK_TOKENS=32: below 64"),
        (16, 48, (8,), "LMC_CHUNK_TOKENS=48: below 64"),
        (
            64,
            96,
            (8,),
            "LMC_CHUNK_TOKENS=96: must be a multiple of 16 and of the engine's page, 64 tokens",
        ),
        (512, 256, (8,), "LMC_CHUNK_TOKENS=256: must be a multiple .* page, 512 tokens"),
        (1, 100, (8,), "LMC_CHUNK_TOKENS=100: must be a multiple of 16 and of the engine's page"),
        (16, 1552, (8,), "LMC_CHUNK_TOKENS=1552: at most 1536 tokens for pages of 16"),
        (1, 2048, (8,), "LMC_CHUNK_TOKENS=2048: at most 1536 tokens for pages of 1 "),
    ],
)
def test_layouts_that_are_refused(
    page: int, chunk: int, planes: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        KVLayout(page, chunk, planes)


def test_frame_block_has_room_for_the_keys_of_the_longest_chunk() -> None:
    block = header(memoryview(b"payload"), NAMESPACE, keys_of(1, MAX_CHUNK_STEPS))
    assert len(block) == ALIGN


def test_description_tells_layouts_apart() -> None:
    layouts = [
        KVLayout(16, 256, (8, 8, 4)),
        KVLayout(16, 256, (8, 4, 8)),
        KVLayout(16, 256, (8, 8, 4, 4)),
        KVLayout(16, 256, (88, 4)),
        KVLayout(16, 512, (8, 8, 4)),
        KVLayout(32, 256, (8, 8, 4)),
    ]
    assert layouts[0].describe()["plane_bytes"] == "2x8,1x4"
    assert len({str(sorted(layout.describe().items())) for layout in layouts}) == len(layouts)


def test_sizes_are_rounded_up_to_direct_io() -> None:
    assert [aligned(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
