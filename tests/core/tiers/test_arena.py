"""Host memory: where slots lie and what closing does."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from lmc.layout import ALIGN
from lmc.tiers.arena import FRAME_BYTES, Arena


def test_slots_are_aligned_and_do_not_overlap() -> None:
    arena = Arena(5, 5000)
    assert arena.slot_bytes == FRAME_BYTES + 2 * ALIGN
    assert arena.address(0) % (2 << 20) == FRAME_BYTES
    for slot in range(5):
        arena.view(slot)[:] = bytes([slot + 1]) * arena.slot_bytes
    for slot in range(5):
        assert bytes(arena.view(slot)) == bytes([slot + 1]) * arena.slot_bytes
    arena.close()


def test_payload_view_and_address_are_the_same_memory() -> None:
    arena = Arena(3, 100)
    arena.payload(1)[:] = bytes(range(100))
    assert len(arena.payload(1)) == 100
    assert arena.view(1)[FRAME_BYTES : FRAME_BYTES + 100] == bytes(range(100))
    assert ctypes.string_at(arena.address(1), 100) == bytes(range(100))
    assert arena.address(2) - arena.address(1) == arena.slot_bytes
    arena.close()


def test_an_arena_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="at least one chunk of 100 bytes"):
        Arena(0, 100)


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    arena = Arena(1, 100)
    view = arena.view(0)
    view[0] = 7
    arena.close()
    arena.close()
    assert view[0] == 7
    with pytest.raises(ValueError, match="released"):
        arena.view(0)


def test_kernel_without_huge_pages_is_only_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Plain)
    arena = Arena(1, 100)
    assert bytes(arena.payload(0)) == bytes(100)
    arena.close()
