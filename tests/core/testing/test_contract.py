"""The contract bites: each way to get a tier wrong fails the test that is about it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from lmc.testing import MemoryTier, TierContract

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lmc.keys import Name
    from lmc.tiers.tier import Tier


class Overwrites(MemoryTier):
    def write(self, name: Name, blob: memoryview, shorter: Sequence[Name] = ()) -> None:
        self._blobs.pop(name, None)
        super().write(name, blob, shorter)


class KeepsTheCallersMemory(MemoryTier):
    def write(self, name: Name, blob: memoryview, shorter: Sequence[Name] = ()) -> None:
        self._blobs.setdefault(name, blob)  # type: ignore[arg-type]


class ProbesPastGaps(MemoryTier):
    def probe(self, names: Sequence[Name]) -> int:
        return sum(name in self._blobs for name in names)


class SaysWhatFits(MemoryTier):
    def read(self, name: Name, into: memoryview) -> int:
        return min(super().read(name, into), len(into))


class LosesTails(MemoryTier):
    def write(self, name: Name, blob: memoryview, shorter: Sequence[Name] = ()) -> None:
        super().write(name, blob, shorter)
        for alias in shorter:
            self._blobs.pop(alias, None)


class ForgetsNothing(MemoryTier):
    def forget(self, name: Name) -> None:
        pass


class ShortNames(MemoryTier):
    def probe(self, names: Sequence[Name]) -> int:
        with self._lock:
            short = {name[:16] for name in self._blobs}
        return next((n for n, name in enumerate(names) if name[:16] not in short), len(names))


class ShowsHalves(MemoryTier):
    def write(self, name: Name, blob: memoryview, shorter: Sequence[Name] = ()) -> None:
        if name not in self._blobs:
            self._blobs[name] = bytes(blob[: len(blob) // 2])
            time.sleep(0.02)
            self._blobs[name] = bytes(blob)


class MixesThreadsUp(MemoryTier):
    """One buffer for all: as a client that is not made for threads."""

    def read(self, name: Name, into: memoryview) -> int:
        self._between = self._blobs.get(name, b"")
        time.sleep(0.0005)
        into[: len(self._between)] = self._between
        return len(self._between)


class SaysNothing(MemoryTier):
    name = ""


class ClaimsToLast(MemoryTier):
    persistent = True


class InventsHottest(MemoryTier):
    def hottest(self, most: int) -> Sequence[Name]:
        return list(self._blobs)[:most]


class WritesWithoutABlob(MemoryTier):
    def read(self, name: Name, into: memoryview) -> int:
        into[:] = bytes(len(into))
        return super().read(name, into)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Overwrites, "test_first_write_wins"),
        (KeepsTheCallersMemory, "test_written_memory_may_be_used_again"),
        (ProbesPastGaps, "test_probe_answers_the_leading_run"),
        (SaysWhatFits, "test_read_into_less_room_is_cut_and_the_size_tells"),
        (LosesTails, "test_shorter_names_lead_to_the_longer_blob_or_stay"),
        (LosesTails, "test_shorter_of_a_name_that_is_here"),
        (ForgetsNothing, "test_forgotten_blob_is_gone_and_can_be_written_again"),
        (ForgetsNothing, "test_forgetting_a_longer_blob_leaves_its_shorter_names_right_or_gone"),
        (ShortNames, "test_names_are_told_apart_by_every_bit"),
        (ShowsHalves, "test_a_blob_is_seen_whole_or_not_at_all"),
        (MixesThreadsUp, "test_threads_see_right_bytes_or_none"),
        (SaysNothing, "test_says_what_it_is"),
        (InventsHottest, "test_hottest_are_the_ones_used_last_where_the_tier_can_tell"),
        (WritesWithoutABlob, "test_empty_tier_has_nothing"),
    ],
)
def test_broken_tier_is_seen(broken: type[MemoryTier], test: str) -> None:
    with pytest.raises(AssertionError):
        getattr(TierContract(), test)(broken())


def test_tier_that_does_not_outlive_the_process_is_seen(tmp_path: Path) -> None:
    class Contract(TierContract):
        def open(self, folder: Path) -> Tier:
            return ClaimsToLast()

    with pytest.raises(AssertionError):
        Contract().test_persistent_blobs_outlive_the_tier(tmp_path)


def test_contract_needs_open(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        TierContract().open(tmp_path)


def test_all_tests_pass_for_what_is_right() -> None:
    tests = [name for name in vars(TierContract) if name.startswith("test_")]
    before = threading.active_count()
    for name in tests:
        if "tmp_path" not in getattr(TierContract, name).__annotations__:
            getattr(TierContract(), name)(MemoryTier())
    assert len(tests) >= 15
    assert threading.active_count() == before
