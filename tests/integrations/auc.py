"""How well a number tells two kinds of things apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def auc(ones: Sequence[float], others: Sequence[float]) -> float:
    """The chance that one of `ones` is greater than one of `others`, ties counted as half: 0.5 says
    that it tells nothing.
    """
    at, seen, smaller = sorted([(x, 1) for x in ones] + [(x, 0) for x in others]), 0, 0.0
    i = 0
    while i < len(at):
        j = i
        while j < len(at) and at[j][0] == at[i][0]:
            j += 1
        equal_ones = sum(kind for _, kind in at[i:j])
        equal_others = j - i - equal_ones
        smaller += equal_ones * (seen + equal_others / 2)
        seen += equal_others
        i = j
    return smaller / (len(ones) * len(others))
