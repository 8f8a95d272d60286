"""Host memory as equal slots, one chunk each.

    slot  | frame block, 4 KiB | payload, padded to 4 KiB |
          ^ view()             ^ payload(), address()

The frame block in front makes a slot one contiguous, aligned piece for direct disk I/O. The mapping
is private, anonymous and huge-page advised: memory is taken by first use, not at start. A slot is a
plain number and says nothing about who may touch it; leases do.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

from ..layout import ALIGN, aligned

FRAME_BYTES = ALIGN
_HUGE = 2 << 20


class Arena:
    """`num_slots` slots of `chunk_bytes` payload each."""

    def __init__(self, num_slots: int, chunk_bytes: int) -> None:
        if num_slots < 1:
            raise ValueError(f"an arena needs room for at least one chunk of {chunk_bytes} bytes")
        self.num_slots = num_slots
        self.chunk_bytes = chunk_bytes
        self.slot_bytes = self.slot_size(chunk_bytes)
        self._map = mmap.mmap(
            -1, num_slots * self.slot_bytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
            self._map.madvise(mmap.MADV_HUGEPAGE)
        anchor = ctypes.c_char.from_buffer(self._map)
        start = -ctypes.addressof(anchor) % _HUGE
        self._base = ctypes.addressof(anchor) + start
        del anchor
        self._view = memoryview(self._map)[start : start + num_slots * self.slot_bytes]

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

    def close(self) -> None:
        """Give the memory back. Views still held elsewhere keep it alive until they go."""
        self._view.release()
        with contextlib.suppress(BufferError):  # a view is still out: the mapping goes with it
            self._map.close()
