"""Ranks agree whatever each one's memory and disk do: nobody hangs, SGLang counts alike, and no
byte is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integrations.harness import DIM, HEADS, LAYERS
from tests.integrations.ranks import Ranks, RanksFailed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHUNK_BYTES = 4096 + 2 * LAYERS * HEADS * DIM * 4 * 256
SIZE = 2
LIMIT_S = 120.0
"""Of a play: only a hang takes as long."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks"), SIZE) as ranks:
        yield ranks


def settings(folder: Path, *chunks: int, wait_ms: int = 20) -> list[dict[str, str]]:
    """For each rank room for so many chunks in RAM, and a tier in a folder that all share."""
    return [
        {
            "LMC_RAM_GB": str(SIZE * n * CHUNK_BYTES / 1e9),
            "LMC_TIERS": f"file://{folder}?gb=1",
            "LMC_STAGE_WAIT_MS": str(wait_ms),
        }
        for n in chunks
    ]


def test_ranks_agree_whatever_their_disks_do(ranks: Ranks, tmp_path: Path) -> None:
    """Some 200 requests that share beginnings, among aborts, evictions, flushes and new weights."""
    check(ranks, tmp_path, rooms=(64, 24), seed=1, passes=100, disks=("slow", "failing"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("rooms", [(64, 64), (64, 16), (8, 64)], ids=str)
@pytest.mark.parametrize("disks", [("well", "well"), ("slow", "failing"), ("failing", "slow")])
def test_ranks_agree_for_long(
    ranks: Ranks, tmp_path: Path, disks: tuple[str, str], rooms: tuple[int, int], seed: int
) -> None:
    check(ranks, tmp_path, rooms=rooms, seed=seed, passes=200, disks=disks)


def check(ranks: Ranks, folder: Path, *, rooms: tuple[int, int], **play: object) -> None:
    told = ranks.play("requests", settings(folder, *rooms, wait_ms=50), limit_s=LIMIT_S, **play)
    assert told[0]["host_tokens"] == told[1]["host_tokens"] > 0


def test_a_prompt_comes_back_as_far_as_all_ranks_have_room(ranks: Ranks, tmp_path: Path) -> None:
    less = settings(tmp_path, 64, 4)
    for rank in less:
        del rank["LMC_TIERS"]
    told = ranks.play("less_room", less, limit_s=LIMIT_S, num_tokens=4000)
    assert {rank["host_tokens"] for rank in told} == {1024}


def test_one_of_ranks_that_hold_the_same_writes_for_all(ranks: Ranks, tmp_path: Path) -> None:
    own = settings(tmp_path, 64, 8, wait_ms=20_000)
    same = {"replicated": True}
    writer, other = ranks.play("one_writes", own, limit_s=LIMIT_S, ranks=same, num_prompts=6)
    assert writer["stats"]["disk.written"] == 24
    assert "disk.written" not in other["stats"]
    assert other["stats"]["disk.hit"]


def test_groups_for_attention_share_what_lies_below_ram(ranks: Ranks, tmp_path: Path) -> None:
    """A rank each, as with as many groups as ranks: nobody agrees with anybody."""
    own = settings(tmp_path, 64, 64, wait_ms=20_000)
    first, second = ranks.play(
        "groups_share", own, limit_s=LIMIT_S, ranks={"attn_dp_size": 2}, num_prompts=3
    )
    assert first["stats"]["disk.written"] == 12
    assert "disk.written" not in second["stats"], "it was there"


@pytest.mark.slow
def test_equal_parts_of_groups_for_attention_are_one(tmp_path: Path) -> None:
    """Two groups of two: rank 2 reads what rank 0 wrote, and rank 3 what rank 1 wrote."""
    own = [one for one in settings(tmp_path, 64, wait_ms=20_000) for _ in range(4)]
    with Ranks(tmp_path, 4) as ranks:
        told = ranks.play(
            "groups_share", own, limit_s=LIMIT_S, ranks={"attn_dp_size": 2}, num_prompts=3
        )
    assert [rank["stats"].get("disk.written", 0) for rank in told] == [12, 12, 0, 0]


# --- of the harness itself


@pytest.mark.slow
def test_ranks_that_hang_are_told_with_their_threads(tmp_path: Path) -> None:
    with Ranks(tmp_path, SIZE) as ranks, pytest.raises(RanksFailed) as failure:
        ranks.play("stuck", settings(tmp_path, 64, 64), limit_s=5, who=1)
    assert "Timeout" in str(failure.value)
    assert "threading.py" in str(failure.value)


@pytest.mark.slow
def test_ranks_that_count_differently_are_told(tmp_path: Path) -> None:
    with Ranks(tmp_path, SIZE) as ranks, pytest.raises(RanksFailed, match="rank 0: "):
        ranks.play("divided", settings(tmp_path, 64, 8), limit_s=LIMIT_S, who=1)
