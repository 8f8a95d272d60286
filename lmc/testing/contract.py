"""What every tier does, as a pytest class. `Tier` in lmc/tiers/tier.py says it in words.

A blob's bytes are a function of its name, so a reader can always tell right from wrong. A tier may
lose what it was given at any time; tests that need to find it again write it and read it at once.
"""

from __future__ import annotations

import hashlib
import mmap
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from ..keys import Name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..tiers.tier import Tier

_PAGE = 4096


def name_of(seed: object) -> Name:
    """A name."""
    return Name(hashlib.sha256(repr(seed).encode()).digest())


def blob_of(name: Name, num_bytes: int = 3 * _PAGE) -> memoryview:
    """The blob this name stands for, in memory as aligned as a slot is."""
    view = buffer(num_bytes)
    view[:] = random.Random(name).randbytes(num_bytes)
    return view


def buffer(num_bytes: int = 4 * _PAGE) -> memoryview:
    """Aligned memory full of ones, so that what was not read shows."""
    view = memoryview(mmap.mmap(-1, max(1, -(-num_bytes // _PAGE)) * _PAGE))[:num_bytes]
    view[:] = b"\xff" * num_bytes
    return view


class TierContract:
    """Subclass it in a test file and give `open`; `sizes` are the blob sizes to try."""

    sizes: tuple[int, ...] = (2 * _PAGE, 3 * _PAGE, 65 * _PAGE)

    def open(self, folder: Path) -> Tier:
        """A new tier on what `folder` holds (or on the server a test may use): twice with the same
        folder, where the tier is persistent, finds the same blobs.
        """
        raise NotImplementedError

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        tier = self.open(tmp_path)
        yield tier
        tier.close()

    def read(self, tier: Tier, name: Name, num_bytes: int = 4 * _PAGE) -> bytes:
        """What `tier` has under a name."""
        into = buffer(num_bytes)
        size = tier.read(name, into)
        assert 0 <= size <= num_bytes
        return bytes(into[:size])

    def test_says_what_it_is(self, tier: Tier) -> None:
        assert isinstance(tier.name, str)
        assert tier.name
        assert isinstance(tier.persistent, bool)

    def test_empty_tier_has_nothing(self, tier: Tier) -> None:
        assert tier.probe([]) == 0
        assert tier.probe([name_of(1)]) == 0
        into = buffer()
        assert tier.read(name_of(1), into) == 0
        assert bytes(into) == b"\xff" * len(into)
        tier.forget(name_of(1))

    def test_blob_comes_back_as_it_was(self, tier: Tier) -> None:
        for size in self.sizes:
            name = name_of(size)
            tier.write(name, blob_of(name, size))
            assert tier.probe([name]) == 1
            assert self.read(tier, name, size) == blob_of(name, size)
            assert self.read(tier, name, size + _PAGE) == blob_of(name, size)

    def test_read_into_less_room_is_cut_and_the_size_tells(self, tier: Tier) -> None:
        name = name_of(1)
        tier.write(name, blob_of(name))
        memory = buffer(4 * _PAGE)
        assert tier.read(name, memory[:_PAGE]) == 3 * _PAGE
        assert memory[:_PAGE] == blob_of(name)[:_PAGE]
        assert bytes(memory[_PAGE:]) == b"\xff" * 3 * _PAGE

    def test_probe_answers_the_leading_run(self, tier: Tier) -> None:
        names = [name_of(n) for n in range(5)]
        for n in (0, 1, 3):
            tier.write(names[n], blob_of(names[n]))
        assert tier.probe(names) == 2
        assert tier.probe(names[2:]) == 0
        assert tier.probe(names[3:]) == 1
        assert tier.probe([names[0], names[0]]) == 2

    def test_names_are_told_apart_by_every_bit(self, tier: Tier) -> None:
        name = name_of(1)
        tier.write(name, blob_of(name))
        for bit in range(256):
            other = bytearray(name)
            other[bit // 8] ^= 1 << bit % 8
            assert tier.probe([Name(bytes(other))]) == 0

    def test_first_write_wins(self, tier: Tier) -> None:
        name = name_of(1)
        tier.write(name, blob_of(name))
        tier.write(name, blob_of(name_of(2)))
        assert self.read(tier, name) == blob_of(name)

    def test_written_memory_may_be_used_again(self, tier: Tier) -> None:
        name = name_of(1)
        blob = blob_of(name)
        tier.write(name, blob)
        blob[:] = bytes(len(blob))
        assert self.read(tier, name) == blob_of(name)

    def test_shorter_names_lead_to_the_longer_blob_or_stay(self, tier: Tier) -> None:
        tail, unknown, name = name_of("tail"), name_of("unknown"), name_of("whole")
        short, whole = blob_of(tail, 2 * _PAGE), blob_of(name)
        tier.write(tail, short)
        tier.write(name, whole, [unknown, tail])
        assert tier.probe([tail, name]) == 2
        assert self.read(tier, tail) in (bytes(short), bytes(whole))
        assert self.read(tier, name) == whole
        assert self.read(tier, unknown) in (b"", bytes(whole))

    def test_shorter_of_a_name_that_is_here(self, tier: Tier) -> None:
        tail, name = name_of("tail"), name_of("whole")
        tier.write(name, blob_of(name))
        tier.write(tail, blob_of(tail, 2 * _PAGE))
        tier.write(name, blob_of(name), [tail, name])
        assert tier.probe([tail, name]) == 2
        assert self.read(tier, name) == blob_of(name)

    def test_hottest_are_the_ones_used_last_where_the_tier_can_tell(self, tier: Tier) -> None:
        names = [name_of(n) for n in range(4)]
        assert list(tier.hottest(10)) == []
        for name in names:
            tier.write(name, blob_of(name))
        tier.probe([names[1]])
        hottest = list(tier.hottest(3))
        if hottest:
            assert hottest[0] == names[1]
            assert len({*hottest}) == len(hottest) == 3
            assert {*hottest} < {*names}
        assert list(tier.hottest(0)) == []

    def test_forgotten_blob_is_gone_and_can_be_written_again(self, tier: Tier) -> None:
        name = name_of(1)
        tier.write(name, blob_of(name_of(2)))
        tier.forget(name)
        assert tier.probe([name]) == 0
        assert self.read(tier, name) == b""
        tier.write(name, blob_of(name))
        assert self.read(tier, name) == blob_of(name)

    def test_forgetting_a_longer_blob_leaves_its_shorter_names_right_or_gone(
        self, tier: Tier
    ) -> None:
        tail, name = name_of("tail"), name_of("whole")
        short, whole = blob_of(tail, 2 * _PAGE), blob_of(name)
        tier.write(tail, short)
        tier.write(name, whole, [tail])
        tier.forget(name)
        assert tier.probe([name]) == 0
        assert self.read(tier, tail) in (b"", bytes(short), bytes(whole))

    def test_unaligned_memory_is_read_and_written_right_or_refused(self, tier: Tier) -> None:
        name = name_of(1)
        blob, into = memoryview(bytearray(3 * _PAGE + 1))[1:], buffer(4 * _PAGE)[1:]
        blob[:] = blob_of(name)
        try:
            tier.write(name, blob)
            size = tier.read(name, into)
        except (OSError, ValueError):
            return
        assert size == len(blob)
        assert into[:size] == blob

    def test_threads_see_right_bytes_or_none(self, tier: Tier) -> None:
        names = [name_of(n) for n in range(8)]

        def live(seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(40):
                name = choose.choice(names)
                match choose.randrange(5):
                    case 0 | 1:
                        tier.write(name, blob_of(name))
                    case 2:
                        tier.forget(name)
                    case 3:
                        assert 0 <= tier.probe(names) <= len(names)
                    case _:
                        assert self.read(tier, name) in (b"", bytes(blob_of(name)))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(live, range(4)))
        for name in names:
            tier.write(name, blob_of(name))
            assert self.read(tier, name) == blob_of(name)

    def test_same_name_written_by_many_is_there_once_it_is_written(self, tier: Tier) -> None:
        name = name_of(1)
        start = threading.Barrier(4)

        def write(_: int) -> bytes:
            start.wait()
            tier.write(name, blob_of(name))
            return self.read(tier, name)

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(write, range(4))) == {bytes(blob_of(name))}

    def test_a_blob_is_seen_whole_or_not_at_all(self, tier: Tier) -> None:
        size = max(self.sizes)
        name = name_of(1)
        blob, written = blob_of(name, size), threading.Event()

        def watch() -> None:
            last = False
            while not last:
                last = written.is_set()
                assert self.read(tier, name, size) in (b"", bytes(blob))

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            tier.write(name, blob)
            written.set()
            watching.result()

    def test_persistent_blobs_outlive_the_tier(self, tmp_path: Path) -> None:
        name = name_of(1)
        first = self.open(tmp_path)
        first.write(name, blob_of(name))
        first.close()
        second = self.open(tmp_path)
        try:
            if second.persistent:
                assert second.probe([name]) == 1
                assert self.read(second, name) == blob_of(name)
        finally:
            second.close()
