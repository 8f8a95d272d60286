"""One line of the benchmark: what lmc needs, and what the bare thing needs in the same minute.

Machines are shared and differ, so the ratio is the figure to trust: rounds alternate between lmc
and the bare thing, each round gives one ratio, the median counts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, slots=True)
class Row:
    """Speeds of lmc and of what it is compared with; `ratio` above 1 means lmc is faster."""

    part: str
    name: str
    value: float
    against: str
    baseline: float
    unit: str
    ratio: float

    @classmethod
    def rate(
        cls,
        part: str,
        name: str,
        num_bytes: int,
        ours_s: Sequence[float],
        against: str,
        base_s: Sequence[float],
    ) -> Self:
        """GB/s, from the seconds of each round."""
        rates = (num_bytes / median(seconds) / 1e9 for seconds in (ours_s, base_s))
        return cls(part, name, next(rates), against, next(rates), "GB/s", _ratio(ours_s, base_s))

    @classmethod
    def time(
        cls, part: str, name: str, ours_s: Sequence[float], against: str, base_s: Sequence[float]
    ) -> Self:
        """Milliseconds, from the seconds of each round."""
        ours, base = (median(seconds) * 1e3 for seconds in (ours_s, base_s))
        return cls(part, name, ours, against, base, "ms", _ratio(ours_s, base_s))


def _ratio(ours_s: Sequence[float], base_s: Sequence[float]) -> float:
    return median(base / ours for ours, base in zip(ours_s, base_s, strict=True))


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    call()
    return clock() - began


def rounds(num_rounds: int, *steps: Callable[[], float]) -> list[list[float]]:
    """Run all steps in turn, `num_rounds` times after one that does not count; the seconds of
    each step.
    """
    taken = [[step() for step in steps] for _ in range(num_rounds + 1)]
    return [list(of_step) for of_step in zip(*taken[1:], strict=True)]
