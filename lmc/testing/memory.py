"""The smallest tier: a dict. Shows what the verbs ask for, and stands in for a remote one in
tests.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..keys import Name


class MemoryTier:
    """Blobs in a dict, unbounded."""

    name = "memory"
    persistent = False

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _blobs
        self._blobs: dict[Name, bytes] = {}

    def probe(self, names: Sequence[Name]) -> int:
        with self._lock:
            return next((n for n, name in enumerate(names) if name not in self._blobs), len(names))

    def read(self, name: Name, into: memoryview) -> int:
        with self._lock:
            blob = self._blobs.get(name, b"")
        fits = min(len(blob), len(into))
        into[:fits] = blob[:fits]
        return len(blob)

    def write(self, name: Name, blob: memoryview, shorter: Sequence[Name] = ()) -> None:
        kept = bytes(blob)
        with self._lock:
            kept = self._blobs.setdefault(name, kept)
            for alias in shorter:
                if alias in self._blobs:
                    self._blobs[alias] = kept

    def hottest(self, most: int) -> Sequence[Name]:
        return ()  # nothing outlives the process

    def forget(self, name: Name) -> None:
        with self._lock:
            self._blobs.pop(name, None)

    def close(self) -> None:
        self._blobs.clear()
