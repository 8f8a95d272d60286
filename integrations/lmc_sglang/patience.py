"""How long a request waits for chunks on their way up, while others go on: no longer than it takes
to compute them, and not at all where that is expected to be sooner.

Rates are measured as they come: of prefill by its batches, of the tiers by what requests had them
bring. Where nothing is known yet a request waits as long as chunks keep coming. Owned by the
scheduler thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from time import monotonic

_NEW = 0.3
"""Weight of the last measurement."""
MIN_PREFILL_TOKENS = 64
"""A smaller batch says more of its overhead than of the rate."""
PROBE_SHARE = 0.1
"""Part of the time to compute it all that a request waits to hear what the tiers hold."""


class Rate:
    """So much a second; 0 while unknown."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float, seconds: float) -> None:
        if amount > 0 and seconds > 0:
            last = amount / seconds
            self.value += (last - self.value) * (_NEW if self.value else 1.0)


@dataclass(slots=True)
class Wait:
    """One request's, since it arrived. `over` is final: what still comes is for others."""

    started: float = field(default_factory=monotonic)
    progress: int = 0
    since: float = 0.0
    over: bool = False


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a request waits for: bytes here of those that come, bytes read at a time at most, and
    the tokens to compute if they do not come. `unknown`: the tiers have not told what they hold.
    """

    arrived: int
    remaining: int
    at_once: int
    tokens: int
    all_tokens: int
    unknown: bool


class Patience:
    def __init__(self, longest_s: float) -> None:
        """Nobody waits longer than `longest_s` for the next chunk."""
        self._longest_s = longest_s
        self.prefill = Rate()  # tokens
        self.staging = Rate()  # bytes
        self._doubted = inf  # the tiers are taken for no faster until something comes

    def waits(self, wait: Wait, outlook: Outlook) -> bool:
        if not wait.over:
            now = monotonic()
            wait.over = not self._is_worth(wait, outlook, now)
            if wait.over and not (outlook.arrived or outlook.unknown):
                self._doubt(outlook, now - wait.started)
        return not wait.over

    def _is_worth(self, wait: Wait, outlook: Outlook, now: float) -> bool:
        if outlook.arrived > wait.progress or not wait.since:
            wait.progress, wait.since = outlook.arrived, now
        if now - wait.since >= self._longest_for(outlook):
            return False
        if not self.prefill.value:
            return True
        elapsed = now - wait.started
        compute_all_s = outlook.all_tokens / self.prefill.value
        if outlook.unknown and not outlook.arrived:
            return elapsed < compute_all_s * PROBE_SHARE
        if elapsed >= compute_all_s:
            return False
        if outlook.unknown:  # of what else the prefix needs that has come: all of it is at stake
            return True
        under_way = min(outlook.remaining, outlook.at_once)
        rate = (outlook.arrived + under_way / 2) / max(elapsed, 1e-6)
        if not outlook.arrived:
            rate = min(rate, self.staging.value or inf, self._doubted)
        return outlook.remaining * self.prefill.value < outlook.tokens * rate

    def _longest_for(self, outlook: Outlook) -> float:
        """Chunks that are read together come together: on a slow disk not so soon."""
        if not (self._longest_s and self.prefill.value and self.staging.value):
            return self._longest_s
        under_way = min(outlook.remaining, outlook.at_once)
        return max(self._longest_s, 1.5 * under_way / self.staging.value)

    def _doubt(self, outlook: Outlook, elapsed: float) -> None:
        """A request waited in vain: those that come before anything does need not do the same. Half
        of what would have been fast enough, so that it does not hang on a hair.
        """
        under_way = min(outlook.remaining, outlook.at_once)
        self._doubted = min(self._doubted, under_way / 4 / max(elapsed, 1e-6))

    def landed(self, wait: Wait, size: int, at: float) -> None:
        """So many bytes came for a request, whether it waited for them or not, the last of them at
        that time.
        """
        self.staging.add(size, at - wait.started)
        if size:
            self._doubted = inf
