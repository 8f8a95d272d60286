"""Counters."""

from __future__ import annotations

import pytest

from lmc.stats import Stats


def test_counts_add_up_and_unknown_ones_are_zero() -> None:
    stats = Stats()
    stats.add("disk.hit")
    stats.add("disk.hit", 3)
    assert stats.count("disk.hit") == 4
    assert stats.count("never") == 0
    assert stats.snapshot() == {"disk.hit": 4}


def test_time_spent_knows_its_longest_stay() -> None:
    stats = Stats()
    for seconds in (0.25, 0.5, 0.125):
        stats.spent("step", seconds)
    assert stats.snapshot() == {"step.calls": 3, "step.seconds": 0.875, "step.longest_s": 0.5}


def test_timed_counts_also_what_raises() -> None:
    stats = Stats()
    with stats.timed("step"):
        pass
    with pytest.raises(KeyError), stats.timed("step"):
        raise KeyError
    assert stats.count("step.calls") == 2
    assert 0 <= stats.snapshot()["step.longest_s"] <= stats.snapshot()["step.seconds"]


def test_snapshot_is_a_copy() -> None:
    stats = Stats()
    stats.snapshot()["x"] = 1
    assert stats.snapshot() == {}
