"""Host memory: where slots lie and what closing does."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import pytest

from lmc.layout import ALIGN
from lmc.tiers.arena import FRAME_BYTES, Arena, ArenaHandle


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


def test_another_process_maps_a_shared_arena() -> None:
    arena = Arena(3, 5000, shared=True)
    arena.payload(2)[:5] = b"to it"
    code = (
        "import sys; from lmc.tiers.arena import Arena, ArenaHandle\n"
        "arena = Arena.attach(ArenaHandle(*map(int, sys.argv[1:])))\n"
        "assert bytes(arena.payload(2)[:5]) == b'to it'\n"
        "arena.payload(1)[:4] = b'back'; arena.close(); arena.close()"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, arena.handle)], check=True)
    assert bytes(arena.payload(1)[:4]) == b"back"
    assert os.fstat(arena.handle.fd).st_mode & 0o777 == 0o600
    arena.close()


def test_its_own_process_attaches_the_very_same_arena() -> None:
    for shared in (False, True):
        arena = Arena(1, 100, shared=shared)
        assert Arena.attach(arena.handle) is arena
        arena.close()


def test_a_handle_of_something_else_is_refused() -> None:
    arena, other = Arena(3, 5000, shared=True), Arena(3, 5000, shared=True)
    reader, writer = os.pipe()
    if os.fork() == 0:  # a child that holds other memory under the number it was told
        attached = b"0"
        try:
            Arena.attach(arena.handle._replace(fd=other.handle.fd))
        except OSError:
            attached = b"1"
        os.write(writer, attached)
        os._exit(0)
    assert os.read(reader, 1) == b"1"
    for fd in (reader, writer):
        os.close(fd)
    arena.close()
    other.close()
    with pytest.raises(OSError, match=r"No such file|gone"):
        Arena.attach(ArenaHandle(2**22 + 1, 3, 0, 1, 100))


def test_an_arena_that_cannot_be_mapped_leaves_no_file_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        with pytest.raises(OSError, match="allocate"):
            Arena(1, 100, shared=True)
    assert len(os.listdir("/proc/self/fd")) == len(before)
