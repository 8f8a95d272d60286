"""The memory an interpreted kernel may touch: buffers that were added to it, and no byte more."""

import ctypes
from collections.abc import Sequence

import numpy as np

U64 = np.uint64


class Fault(Exception):
    """What a GPU would not, or should not, do."""


class Memory:
    """Real memory of this process, by its real addresses."""

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._bases = self._ends = np.empty(0, U64)

    def add(self, buffer: np.ndarray) -> int:
        """Allow the bytes of a contiguous buffer; its address."""
        view = buffer.reshape(-1).view(np.uint8)
        self._buffers.append(view)
        self._buffers.sort(key=lambda known: known.ctypes.data)
        self._bases = np.array([known.ctypes.data for known in self._buffers], U64)
        self._ends = self._bases + np.array([len(known) for known in self._buffers], U64)
        return view.ctypes.data

    def add_address(self, address: int, size: int) -> int:
        return self.add(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))

    def add_table(self, table: Sequence[int]) -> int:
        """A copy of its own, so that a read past its end is a fault."""
        return self.add(np.array(table, np.int64))

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """uint8 [lanes, size] from one aligned access a lane."""
        data = np.empty((len(addresses), size), np.uint8)
        for lanes, buffer, offsets in self._places(addresses, size):
            data[lanes] = buffer[offsets]
        return data

    def store(self, addresses: np.ndarray, data: np.ndarray) -> None:
        for lanes, buffer, offsets in self._places(addresses, data.shape[1]):
            buffer[offsets] = data[lanes]

    def _places(self, addresses: np.ndarray, size: int):
        """(lanes, their buffer, their bytes in it) of each buffer that is touched."""
        if (odd := addresses % U64(size) != 0).any():
            raise Fault(f"misaligned access of {size} bytes at {int(addresses[odd][0]):#x}")
        found = np.searchsorted(self._bases, addresses, "right") - 1
        outside = (found < 0) | (addresses + U64(size) > self._ends[found])
        if outside.any():
            raise Fault(f"address {int(addresses[outside][0]):#x} lies outside of every buffer")
        for index in np.unique(found):
            lanes = np.nonzero(found == index)[0]
            offsets = (addresses[lanes] - self._bases[index]).astype(np.int64)
            yield lanes, self._buffers[index], offsets[:, None] + np.arange(size)
