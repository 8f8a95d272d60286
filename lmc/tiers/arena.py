"""Host memory as equal slots, one chunk each.

    slot  | frame block, 4 KiB | payload, padded to 4 KiB |
          ^ view()             ^ payload(), address()

The frame block in front makes a slot one contiguous, aligned piece for direct disk I/O. Memory is
taken by first use, not at start, in huge pages where the kernel has them. A slot is a plain number
and says nothing about who may touch it; leases do.

The mapping is private to the process, or `shared`: then it lies in a memfd, which has no name in
any file system and goes with its last user; other processes of the same user map it by its handle.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from typing import NamedTuple

from ..layout import ALIGN, aligned

FRAME_BYTES = ALIGN
_HUGE = 2 << 20


class ArenaHandle(NamedTuple):
    """How another process of this machine finds a shared arena."""

    pid: int
    fd: int
    inode: int
    num_slots: int
    chunk_bytes: int


class Arena:
    """`num_slots` slots of `chunk_bytes` payload each."""

    def __init__(self, num_slots: int, chunk_bytes: int, *, shared: bool = False) -> None:
        if num_slots < 1:
            raise ValueError(f"an arena needs room for at least one chunk of {chunk_bytes} bytes")
        fd = -1
        with contextlib.ExitStack() as undo:
            if shared:
                fd = os.memfd_create("lmc", os.MFD_CLOEXEC)
                undo.callback(os.close, fd)
                os.fchmod(fd, 0o600)
                os.ftruncate(fd, num_slots * self.slot_size(chunk_bytes))
            self._map_slots(fd, num_slots, chunk_bytes)
            undo.pop_all()
        inode = os.fstat(fd).st_ino if shared else id(self)
        self.handle = ArenaHandle(os.getpid(), fd, inode, num_slots, chunk_bytes)
        _made_here[self.handle] = self

    @classmethod
    def attach(cls, handle: ArenaHandle) -> Arena:
        """The arena behind `handle`: the very same one in the process that made it, elsewhere a
        mapping of the same memory. Raises OSError if it cannot be reached from here.
        """
        if handle.pid == os.getpid():
            return _made_here[handle]
        fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            size = handle.num_slots * cls.slot_size(handle.chunk_bytes)
            if (status.st_ino, status.st_size) != (handle.inode, size):
                raise FileNotFoundError(f"the arena of process {handle.pid} is gone")
            arena = cls.__new__(cls)
            arena._map_slots(fd, handle.num_slots, handle.chunk_bytes)
        finally:
            os.close(fd)  # the mapping has its own
        arena.handle = handle._replace(fd=-1)
        return arena

    def _map_slots(self, fd: int, num_slots: int, chunk_bytes: int) -> None:
        self.num_slots = num_slots
        self.chunk_bytes = chunk_bytes
        self.slot_bytes = self.slot_size(chunk_bytes)
        size = num_slots * self.slot_bytes
        if fd < 0:
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._map = mmap.mmap(-1, size + _HUGE, flags=kind)
        else:
            self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
            self._map.madvise(mmap.MADV_HUGEPAGE)
        anchor = ctypes.c_char.from_buffer(self._map)
        start = -ctypes.addressof(anchor) % _HUGE if fd < 0 else 0  # a file is mapped as it is
        self._base = ctypes.addressof(anchor) + start
        del anchor
        self._view = memoryview(self._map)[start : start + size]

    @staticmethod
    def slot_size(chunk_bytes: int) -> int:
        """Bytes of memory one chunk of `chunk_bytes` takes."""
        return FRAME_BYTES + aligned(chunk_bytes)

    def view(self, slot: int) -> memoryview:
        """The whole slot, frame block first."""
        start = slot * self.slot_bytes
        return self._view[start : start + self.slot_bytes]

    def payload(self, slot: int) -> memoryview:
        """The chunk's bytes."""
        start = slot * self.slot_bytes + FRAME_BYTES
        return self._view[start : start + self.chunk_bytes]

    def address(self, slot: int) -> int:
        """Address of the chunk's first byte in this process."""
        return self._base + slot * self.slot_bytes + FRAME_BYTES

    def slices(self, max_bytes: int) -> list[tuple[int, int]]:
        """All of the memory as (address, bytes) of whole slots: `max_bytes`, or one slot if that is
        more.
        """
        most = max(1, max_bytes // self.slot_bytes)
        return [
            (self._base + at * self.slot_bytes, min(most, self.num_slots - at) * self.slot_bytes)
            for at in range(0, self.num_slots, most)
        ]

    def close(self) -> None:
        """Give the memory back. Views still held elsewhere keep it alive until they go."""
        self._view.release()
        if self.handle.fd >= 0:
            os.close(self.handle.fd)
            self.handle = self.handle._replace(fd=-1)
        with contextlib.suppress(BufferError):  # a view is still out: the mapping goes with it
            self._map.close()


_made_here: weakref.WeakValueDictionary[ArenaHandle, Arena] = weakref.WeakValueDictionary()
