"""Counters of one store. Owned by the store's thread: pool threads return what they saw, the owner
counts it.

Names are dotted; the last part of a miss is its cause ("disk.miss.checksum"). Times are seconds.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stats:
    """Counts, and seconds spent on the owner's thread with the longest single stay."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._longest: dict[str, float] = {}

    def add(self, name: str, n: int = 1) -> None:
        self._counts[name] += n

    def count(self, name: str) -> int:
        return self._counts[name]

    def spent(self, name: str, seconds: float) -> None:
        """One call took `seconds`."""
        self._counts[f"{name}.calls"] += 1
        self._seconds[name] += seconds
        if seconds > self._longest.get(name, 0.0):
            self._longest[name] = seconds

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent(name, time.perf_counter() - start)

    def snapshot(self) -> dict[str, float]:
        """Everything counted so far, as plain numbers."""
        out: dict[str, float] = dict(sorted(self._counts.items()))
        for name, seconds in sorted(self._seconds.items()):
            out[f"{name}.seconds"] = round(seconds, 9)
            out[f"{name}.longest_s"] = round(self._longest[name], 9)
        return out
