"""Pins host memory in the background, slice by slice: the engine serves at once, and what is not
pinned yet is copied by way of the device's own memory.

Pinning costs about 0.1 s a GB, and fails for hundreds of GB at once on some systems: a slice should
be SLICE_BYTES at most. No chunk may straddle two slices, whose addresses on the device need not be
neighbours. The first slice that is refused ends it; the rest stays as it is.

To pin memory is to touch it, so just before is the time to say which node it had better come from.
"""

import logging
import threading
from collections.abc import Sequence

from lmc.kernels.driver import DriverError
from lmc.transfer.gpu import GpuBackend
from lmc.transfer.numa import node_of, prefer

__all__ = ["SLICE_BYTES", "Pinner"]

log = logging.getLogger("lmc")

SLICE_BYTES = 1 << 30


class Pinner:
    """Pins slices of memory, (address, bytes) each, from its creation on; until `close`."""

    def __init__(self, backend: GpuBackend, slices: Sequence[tuple[int, int]]) -> None:
        self._backend, self._slices = backend, slices
        self._pinned: list[tuple[int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="lmc-pin")
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether all that can be pinned is."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Let the memory go; nothing on the device uses it any more."""
        self._stop.set()
        self._thread.join()
        self._backend.driver.use(self._backend.device)
        for address, _ in self._pinned:
            self._backend.pins.remove(address)
            self._backend.driver.unpin(address)
        self._pinned.clear()

    def _run(self) -> None:
        driver = self._backend.driver
        driver.use(self._backend.device)
        node = self._node()
        for address, num_bytes in self._slices:
            if self._stop.is_set():
                return
            if node is not None:
                prefer(address, num_bytes, node)
            try:
                device = driver.pin(address, num_bytes)
            except DriverError as error:
                log.warning(
                    "lmc pinned %.1f of %.1f GB, the rest is copied more slowly: %s",
                    sum(size for _, size in self._pinned) / 1e9,
                    sum(size for _, size in self._slices) / 1e9,
                    error,
                )
                return
            self._pinned.append((address, num_bytes))
            self._backend.pins.add(address, num_bytes, device)

    def _node(self) -> int | None:
        """Which memory the device is near to."""
        try:
            return node_of(self._backend.driver.pci_address(self._backend.device))
        except DriverError:
            return None
