"""A tier that goes wrong on request: errors, delays, hangs, lost writes, cut, flipped and swapped
bytes.

    faulty = FaultyTier(DiskTier(folder, 10**9))
    faulty.plan("read", Fault(error=OSError(errno.EIO, "injected")), times=3)
    faulty.plan("read", Fault(flip_bit=40_000))

Thread safe. Faults of a verb are used up in the order they were planned; after that it works.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..keys import Name
    from ..tiers.tier import Tier

VERBS = ("probe", "read", "write", "hottest", "forget", "close")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one call; what is not set goes well."""

    error: BaseException | None = None
    """Raised instead of the call."""
    delay_s: float = 0.0
    """Waited before the call."""
    hang: threading.Event | None = None
    """The call does not go on until this is set."""
    lose: bool = False
    """A write that is not kept; a blob that is not found."""
    cut: int | None = None
    """So many bytes are read, or kept."""
    flip_bit: int | None = None
    """This bit is wrong in what is read, or kept; counted on from the end where there are fewer."""
    swap: bool = False
    """A blob that was written under another name is read."""


class FaultyTier:
    """`tier`, with faults. `calls` counts the calls of each verb."""

    def __init__(self, tier: Tier) -> None:
        self.name, self.persistent = tier.name, tier.persistent
        self.calls: Counter[str] = Counter()
        self._tier = tier
        self._lock = threading.Lock()  # guards all below, and calls
        self._plans: dict[str, deque[tuple[Fault, int | None]]] = {v: deque() for v in VERBS}
        self._written: dict[Name, None] = {}

    def plan(self, verb: str, fault: Fault, *, times: int | None = 1) -> None:
        """Let the next `times` calls of `verb` go wrong; None: all, until `heal`."""
        if verb not in VERBS:
            raise ValueError(f"{verb!r} is not a verb of a tier; choices: {', '.join(VERBS)}")
        with self._lock:
            self._plans[verb].append((fault, times))

    def heal(self) -> None:
        """Forget all that was planned."""
        with self._lock:
            for plan in self._plans.values():
                plan.clear()

    def probe(self, names: Sequence[Name]) -> int:
        return 0 if self._suffer("probe").lose else self._tier.probe(names)

    def read(self, name: Name, into: memoryview) -> int:
        fault = self._suffer("read")
        if fault.lose:
            return 0
        if fault.swap:
            with self._lock:
                name = next((other for other in self._written if other != name), name)
        size = self._tier.read(name, into)
        if fault.cut is not None:
            size = min(size, fault.cut)
        if fault.flip_bit is not None:
            _flip(into[: min(size, len(into))], fault.flip_bit)
        return size

    def write(self, name: Name, blob: memoryview, shorter: Sequence[Name] = ()) -> None:
        fault = self._suffer("write")
        if fault.lose:
            return
        if fault.cut is not None or fault.flip_bit is not None:
            blob = memoryview(bytearray(blob[: fault.cut]))
        if fault.flip_bit is not None:
            _flip(blob, fault.flip_bit)
        self._tier.write(name, blob, shorter)
        with self._lock:
            self._written[name] = None

    def hottest(self, most: int) -> Sequence[Name]:
        return () if self._suffer("hottest").lose else self._tier.hottest(most)

    def forget(self, name: Name) -> None:
        if not self._suffer("forget").lose:
            self._tier.forget(name)

    def close(self) -> None:
        self._suffer("close")
        self._tier.close()

    def _suffer(self, verb: str) -> Fault:
        fault = self._next(verb)
        if fault.delay_s:
            threading.Event().wait(fault.delay_s)
        if fault.hang is not None:
            fault.hang.wait()
        if fault.error is not None:
            raise fault.error
        return fault

    def _next(self, verb: str) -> Fault:
        with self._lock:
            self.calls[verb] += 1
            plan = self._plans[verb]
            if not plan:
                return Fault()
            fault, times = plan[0]
            if times is not None:
                plan.popleft()
                if times > 1:
                    plan.appendleft((fault, times - 1))
            return fault


def _flip(data: memoryview, bit: int) -> None:
    if len(data):
        bit %= 8 * len(data)
        data[bit // 8] ^= 1 << bit % 8
