"""The guard: whatever a tier does wrong is counted, costs nobody time, and leaves its threads
alive.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from lmc.stats import Stats
from lmc.testing import Fault, FaultyTier, MemoryTier
from lmc.tiers import guard as module
from lmc.tiers.guard import JOB_TIMEOUT_S, MAX_ERRORS, REST_S, Completions, Guard
from tests.core.chunks import EIO, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lmc.tiers.tier import Tier


class Bench:
    """A guard over a faulty tier, a clock that tests move, and what came back."""

    def __init__(self, threads: int = 2, max_write_bytes: int = 100) -> None:
        self.now = 0.0
        self.tier = FaultyTier(MemoryTier())
        self.stats = Stats()
        self.done = Completions()
        self.results: list[Any] = []
        self.gate = threading.Event()
        self.guard = Guard(
            self.tier, self.done, self.stats, threads, max_write_bytes, lambda: self.now
        )

    def read(self, work: Callable[[Tier], Any] = lambda _: "read") -> bool:
        return self.guard.read(work, self.results.append)

    def write(self, num_bytes: int = 10, work: Callable[[Tier], Any] = lambda _: "write") -> bool:
        return self.guard.write(num_bytes, work, self.results.append)

    def fail(self, error: BaseException = EIO) -> None:
        def work(_: Tier) -> None:
            raise error

        assert self.read(work)
        self.wait()

    def block(self, num_jobs: int) -> None:
        """Let so many reads run and hang until `gate` is set."""
        running = threading.Semaphore(0)

        def work(_: Tier) -> str:
            running.release()
            self.gate.wait()
            return "late"

        for _ in range(num_jobs):
            assert self.read(work)
        for _ in range(num_jobs):
            assert running.acquire(timeout=10)

    def wait(self) -> None:
        while self.guard.busy:
            assert self.done.run(10.0)

    def works(self) -> bool:
        self.results.clear()
        answered = self.read() and self.write()
        self.wait()
        return answered and sorted(self.results) == ["read", "write"]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.gate.set()
    bench.guard.close(0.0)
    wait_until(lambda: not any(thread.is_alive() for thread in bench.guard._threads))


def test_results_come_back_on_the_owners_thread(bench: Bench) -> None:
    threads: list[int] = []
    bench.guard.read(lambda _: threading.get_ident(), lambda result: threads.append(result))
    bench.guard.read(lambda _: 0, lambda _: threads.append(threading.get_ident()))
    bench.wait()
    assert threading.get_ident() in threads
    assert len({*threads}) == 2


def test_tier_is_handed_to_the_work(bench: Bench) -> None:
    assert bench.read(lambda tier: tier.probe([]))
    bench.wait()
    assert bench.results == [0]


def test_nothing_to_do_takes_no_time(bench: Bench) -> None:
    assert bench.done.run() == 0
    assert bench.done.run(-1.0) == 0
    assert not bench.guard.busy


def test_one_run_handles_no_more_than_was_there(bench: Bench) -> None:
    """What a completion starts may finish at once: the owner must get out of `run` again."""
    count = 0

    def again(_: Any) -> None:
        nonlocal count
        count += 1
        if count < 500:
            bench.guard.read(lambda _: None, again)
            wait_until(lambda: bench.done._done.qsize())

    bench.guard.read(lambda _: None, again)
    wait_until(lambda: bench.done._done.qsize())
    assert bench.done.run() == 1
    bench.wait()
    assert count == 500


def test_errors_are_counted_by_cause_and_answered_with_nothing(bench: Bench) -> None:
    errors = [OSError(errno.ENOSPC, "full"), OSError("no number"), KeyError("odd"), MemoryError()]
    for error in errors:
        bench.fail(error)
    assert bench.results == [None] * 4
    assert bench.stats.snapshot() == {
        "memory.error.ENOSPC": 1,
        "memory.error.KeyError": 1,
        "memory.error.MemoryError": 1,
        "memory.error.OSError": 1,
    }
    assert bench.works()


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_no_thread_dies_of_a_tier(bench: Bench, error: BaseException) -> None:
    for _ in range(4):
        bench.fail(error)
    assert all(thread.is_alive() for thread in bench.guard._threads)
    assert bench.stats.count(f"memory.error.{type(error).__name__}") == 4
    assert bench.works()


def test_several_errors_in_a_row_rest_the_tier(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, module.__name__):
        for _ in range(MAX_ERRORS):
            assert not bench.guard.resting()
            bench.fail()
    assert bench.guard.resting()
    assert "tier memory rests for 10 s" in caplog.text
    assert not bench.read()
    assert not bench.write()
    assert bench.stats.count("memory.rested.errors") == 1
    assert bench.stats.count("memory.skipped.resting") == 1
    assert bench.stats.count("memory.dropped.resting") == 1
    bench.now += REST_S
    assert not bench.guard.resting()
    assert bench.works()


def test_a_success_in_between_starts_the_count_again(bench: Bench) -> None:
    for _ in range(MAX_ERRORS - 1):
        bench.fail()
    assert bench.works()
    for _ in range(MAX_ERRORS - 1):
        bench.fail()
    assert not bench.guard.resting()
    bench.fail()
    assert bench.guard.resting()


def test_resting_drops_what_waits(bench: Bench) -> None:
    bench.block(2)
    assert bench.write()
    assert bench.read()
    assert bench.guard.write_bytes == 10
    bench.now += JOB_TIMEOUT_S + 1
    assert not bench.read()
    bench.done.run()
    assert bench.results == [None, None]
    assert bench.guard.write_bytes == 0
    assert bench.stats.count("memory.dropped.resting") == 2
    assert bench.stats.count("memory.rested.timeout") == 1
    assert bench.guard.busy


def test_job_that_outstays_its_time_rests_the_tier_until_it_is_back(bench: Bench) -> None:
    bench.block(1)
    bench.now += JOB_TIMEOUT_S
    assert not bench.guard.resting()
    bench.now += 0.1
    assert bench.guard.resting()
    bench.now += REST_S + 0.1
    assert bench.guard.resting()  # still out
    bench.gate.set()
    bench.wait()
    assert bench.results == ["late"]
    bench.now += REST_S + 0.1
    assert bench.works()


def test_jobs_that_wait_do_not_count_as_hanging(bench: Bench) -> None:
    bench.block(2)
    bench.now += JOB_TIMEOUT_S - 1
    assert bench.read()
    bench.gate.set()
    bench.wait()
    bench.now += 2
    assert not bench.guard.resting()


def test_dropped_jobs_are_no_success(bench: Bench) -> None:
    """A tier whose every call fails must be rested again after as many calls as the first time."""
    for _ in range(MAX_ERRORS - 1):
        bench.fail()
    bench.block(2)
    assert bench.read()
    bench.guard._drop_queued("test")
    bench.done.run()
    bench.gate.set()
    assert bench.guard._errors_in_a_row == MAX_ERRORS - 1


def test_reads_go_before_writes() -> None:
    bench = Bench(threads=1)
    bench.block(1)
    assert bench.write()
    assert bench.read()
    bench.gate.set()
    bench.wait()
    assert bench.results == ["late", "read", "write"]
    bench.guard.close(1.0)


def test_writes_are_bounded_in_bytes() -> None:
    bench = Bench(max_write_bytes=100)
    bench.block(2)
    assert bench.write(60)
    assert bench.write(40)
    assert not bench.write(1)
    assert bench.stats.count("memory.dropped.queue_full") == 1
    assert bench.guard.write_bytes == 100
    bench.gate.set()
    bench.wait()
    assert bench.guard.write_bytes == 0
    assert bench.write(100)
    assert not bench.write(101)
    bench.wait()
    bench.guard.close(1.0)


def test_write_that_failed_gives_its_room_back(bench: Bench) -> None:
    def work(_: Tier) -> None:
        raise EIO

    assert bench.write(100, work)
    bench.wait()
    assert bench.results == [None]
    assert bench.write(100)
    bench.wait()


# --- closing


class Closing(Bench):
    """With the real clock."""

    def __init__(self) -> None:
        super().__init__()
        self.guard._clock = time.monotonic


def test_closing_lets_writes_land_and_closes_the_tier() -> None:
    bench = Closing()
    for _ in range(10):
        assert bench.write()
    bench.guard.close(10.0)
    assert bench.results == ["write"] * 10
    assert bench.tier.calls["close"] == 1
    assert not any(thread.is_alive() for thread in bench.guard._threads)


def test_closing_drops_and_counts_what_does_not_land_in_time() -> None:
    bench = Closing()
    bench.block(2)
    for _ in range(3):
        assert bench.write()
    threading.Timer(0.1, bench.gate.set).start()
    bench.guard.close(0.0)
    assert bench.stats.count("memory.dropped.closing") == 3
    assert sorted(bench.results, key=str) == [None, None, None, "late", "late"]
    assert bench.tier.calls["close"] == 1


def test_closing_does_not_wait_for_a_hanging_job(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.05)
    bench = Closing()
    bench.block(1)
    with caplog.at_level(logging.WARNING, module.__name__):
        bench.guard.close(0.05)
    assert "tier memory: still busy at close" in caplog.text
    assert bench.stats.count("memory.error.close_timeout") == 1
    assert bench.tier.calls["close"] == 0  # no verb runs beside close
    bench.gate.set()
    wait_until(lambda: bench.tier.calls["close"])


def test_closing_does_not_wait_for_a_tier_that_hangs_in_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.05)
    bench = Closing()
    bench.tier.plan("close", Fault(hang=bench.gate))
    bench.guard.close(0.0)
    assert bench.stats.count("memory.error.close_timeout") == 1
    bench.gate.set()


def test_error_in_close_is_counted() -> None:
    bench = Closing()
    bench.tier.plan("close", Fault(error=EIO))
    bench.guard.close(1.0)
    assert bench.stats.count("memory.error.EIO") == 1


def test_closing_a_resting_tier_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.05)
    bench = Bench()
    bench.block(2)
    assert bench.write()
    bench.now += JOB_TIMEOUT_S + 1
    started = time.monotonic()
    bench.guard.close(60.0)
    assert time.monotonic() - started < 30
    assert bench.results == [None]
    bench.gate.set()
