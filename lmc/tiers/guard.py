"""The one place where a tier's failure becomes a miss, and where its work waits.

Every tier has its own threads and two lanes, reads before writes, so a tier that hangs holds up
nobody else. A job runs on a tier thread; what its end means runs on the owner's thread, in
`Completions.run`. An exception is counted by cause; several in a row, or a job that outstays its
time, rest the tier: nothing is sent to it for a while, and what waits for it is dropped. A thread
that hangs keeps the memory it was lent until it comes back.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..stats import Stats
    from .tier import Tier

log = logging.getLogger(__name__)

MAX_ERRORS = 5
REST_S = 10.0
JOB_TIMEOUT_S = 30.0
_GRACE_S = 1.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(slots=True, eq=False)
class _Job:
    work: Callable[[Tier], Any]
    then: Callable[[Any], None]
    num_bytes: int = 0
    started: float | None = None
    result: Any = None
    error: BaseException | None = None


class Completions:
    """Finished jobs of all tiers, on their way back to the owner."""

    def __init__(self) -> None:
        self._done: queue.SimpleQueue[tuple[Guard, _Job]] = queue.SimpleQueue()

    def put(self, guard: Guard, job: _Job) -> None:
        self._done.put((guard, job))

    def run(self, timeout_s: float = 0.0) -> int:
        """Run what finished jobs mean; with a timeout, wait for the first. Returns how many there
        were.

        No more than were there to begin with: what they start may finish as fast as we look.
        """
        count = 0
        for _ in range(max(1, self._done.qsize())):
            try:
                guard, job = self._done.get(timeout=0.0 if count else max(0.0, timeout_s))
            except queue.Empty:
                break
            count += 1
            guard.finish(job)
        return count


class Guard:
    """A tier that never raises and never makes anybody wait. Owned by the store's thread."""

    def __init__(
        self,
        tier: Tier,
        done: Completions,
        stats: Stats,
        threads: int = 4,
        max_write_bytes: int = 10**9,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.persistent = tier.name, tier.persistent
        self.write_bytes = 0  # queued and running
        self._tier, self._done, self._stats, self._clock = tier, done, stats, clock
        self._max_write_bytes = max_write_bytes
        self._reads: deque[_Job] = deque()
        self._writes: deque[_Job] = deque()
        self._wake = threading.Condition()  # guards both lanes and _closing
        self._closing = False
        self._running: set[_Job] = set()  # submitted and not finished
        self._on_thread: list[_Job | None] = [None] * threads  # each thread writes its own place
        self._errors_in_a_row, self._rest_until = 0, 0.0
        self._threads = [
            threading.Thread(target=self._work, args=(n,), daemon=True, name=f"lmc-{tier.name}-{n}")
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def resting(self) -> bool:
        """Whether to leave this tier alone for now."""
        now = self._clock()
        if now < self._rest_until:
            return True
        starts = [job.started for job in self._on_thread if job is not None]
        if any(start is not None and now - start > JOB_TIMEOUT_S for start in starts):
            self._rest(f"a job has been running for more than {JOB_TIMEOUT_S:.0f} s", "timeout")
            return True
        return False

    def read(self, work: Callable[[Tier], Any], then: Callable[[Any], None]) -> bool:
        """Queue a read; `then` gets what `work` returned, or None if it failed. False, and no
        `then`, while resting.
        """
        if self.resting():
            self._stats.add(f"{self.name}.skipped.resting")
            return False
        self._submit(self._reads, _Job(work, then))
        return True

    def write(
        self, num_bytes: int, work: Callable[[Tier], Any], then: Callable[[Any], None]
    ) -> bool:
        """Queue a write, or refuse it: a lost write is only a later miss."""
        if self.resting():
            self._stats.add(f"{self.name}.dropped.resting")
            return False
        if self.write_bytes + num_bytes > self._max_write_bytes:
            self._stats.add(f"{self.name}.dropped.queue_full")
            return False
        self.write_bytes += num_bytes
        self._submit(self._writes, _Job(work, then, num_bytes))
        return True

    def finish(self, job: _Job) -> None:
        """What the end of a job means; on the owner's thread."""
        self._running.discard(job)
        self.write_bytes -= job.num_bytes
        if job.error is not None:
            self._failed(job.error)
        elif job.started is not None:  # not one that was dropped
            self._errors_in_a_row = 0
        job.then(job.result)

    def close(self, drain_s: float) -> None:
        """Let what is queued land for at most `drain_s`, then drop the rest and let the threads
        go. What a tier is still busy with then is left to it.
        """
        deadline = self._clock() + drain_s
        while self._running and self._clock() < deadline and not self.resting():
            self._done.run(timeout_s=0.05)
        self._drop_queued("closing")
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        closer = threading.Thread(target=self._close_tier, daemon=True, name=f"lmc-{self.name}")
        closer.start()
        closer.join(timeout=_GRACE_S if self.resting() else max(_GRACE_S, deadline - self._clock()))
        if closer.is_alive():
            log.warning("tier %s: still busy at close", self.name)
            self._stats.add(f"{self.name}.error.close_timeout")
        while self._done.run():
            pass

    def _close_tier(self) -> None:
        """No verb is called after close: a thread that hangs keeps its tier open."""
        for thread in self._threads:
            thread.join()
        job = _Job(lambda tier: tier.close(), lambda _: None)
        self._call(job)
        if job.error is not None:
            self._done.put(self, job)

    def _failed(self, error: BaseException) -> None:
        cause = (
            errno.errorcode.get(error.errno or 0, "OSError")
            if isinstance(error, OSError)
            else type(error).__name__
        )
        self._stats.add(f"{self.name}.error.{cause}")
        if isinstance(error, OSError) and error.errno in _FULL:
            return  # nothing more fits, but what is there can be read
        self._errors_in_a_row += 1
        if self._errors_in_a_row >= MAX_ERRORS:
            self._rest(f"{error!r}", "errors")

    def _rest(self, why: str, cause: str) -> None:
        self._rest_until, self._errors_in_a_row = self._clock() + REST_S, 0
        self._stats.add(f"{self.name}.rested.{cause}")
        log.warning("tier %s rests for %.0f s: %s", self.name, REST_S, why)
        self._drop_queued("resting")

    def _drop_queued(self, why: str) -> None:
        with self._wake:
            jobs = [*self._reads, *self._writes]
            self._reads.clear()
            self._writes.clear()
        for job in jobs:
            self._stats.add(f"{self.name}.dropped.{why}")
            self._done.put(self, job)

    def _submit(self, lane: deque[_Job], job: _Job) -> None:
        self._running.add(job)
        with self._wake:
            lane.append(job)
            self._wake.notify()

    def _work(self, n: int) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._reads or self._writes or self._closing)
                if self._closing:
                    return
                job = (self._reads or self._writes).popleft()
            job.started = self._clock()
            self._on_thread[n] = job
            self._call(job)
            self._on_thread[n] = None
            self._done.put(self, job)

    def _call(self, job: _Job) -> None:
        try:
            job.result = job.work(self._tier)
        except BaseException as error:  # noqa: BLE001 - the boundary: whatever a tier does wrong is a miss
            job.error = error
