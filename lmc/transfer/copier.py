"""Background copies between the pool and chunks: what they look like to their owner (Copier, Job),
and those by threads: one worker for stores, one for loads, one for stores in a hurry.

A load never queues behind stores, nor does a store that somebody waits for. The caller's thread
owns the Copier and what its jobs read; a worker owns a job from its start to its end, and the pages
and chunks of a job stay valid until it is over. What fails in a worker travels in the Job:

    queued -> running -> done (error None, or what failed)
       '---> cancelled (error CancelledError)
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from functools import partial
from typing import Protocol

from lmc.transfer.ops import Backend
from lmc.transfer.pages import Transfer

__all__ = ["Copier", "Job", "ThreadCopier", "ThreadJob", "num_layers"]


class Job(Protocol):
    """One transfer in the background. Over with `error` None means every byte arrived."""

    def done(self) -> bool:
        """Over: finished, failed or cancelled, and its memory is touched no more. Never waits."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is over; False when `timeout_s` went by first. Never raises `error`."""

    @property
    def error(self) -> BaseException | None:
        """What went wrong, as soon as that is known, which may be before the job is over."""

    def let_wait(self, layer: int | None = None) -> None:
        """Let the engine wait: what it does from now on comes after this job, or after one layer of
        a load by layers (a layer that it does not have is after all of them); at once where that
        has failed. Never raises `error`.
        """


class Copier(Protocol):
    """Transfers of one job run one after the other; its memory and page ids are left alone until
    it is over.
    """

    def pin(self, slices: Callable[[int], Sequence[tuple[int, int]]]) -> None:
        """Memory in which chunks will lie: `slices(most)` is all of it as (address, bytes), where
        no chunk straddles two.
        """

    def store(self, transfers: Sequence[Transfer], *, hurry: bool = False) -> Job:
        """Gather pages into chunks, all planes of a pool in one call. In a hurry it overtakes the
        stores that nobody waits for.
        """

    def load(self, transfers: Sequence[Transfer], *, layers: bool = False) -> Job:
        """Scatter chunks into pages, all planes of a pool in one call; with `layers`, the planes of
        a layer in all pools before those of the next, each of which may be waited for.
        """

    def fence(self, jobs: Sequence[Job]) -> None:
        """What the engine does from now on comes after these jobs; stores overtake others."""

    def close(self) -> None:
        """Nothing runs any more when this returns; what did not begin never will."""


class ThreadJob:
    """A Job that one of the workers does; `layers` are set as it gets there."""

    def __init__(
        self,
        queue: ThreadPoolExecutor,
        work: Callable[[], None],
        layers: Sequence[Future[None]] = (),
    ) -> None:
        self._work, self._layers = work, layers
        self._future = queue.submit(work)

    def done(self) -> bool:
        return self._future.done()

    def wait(self, timeout_s: float | None = None) -> bool:
        return not wait_for([self._future], timeout_s).not_done

    @property
    def error(self) -> BaseException | None:
        if not self._future.done():
            return None
        if self._future.cancelled():
            return CancelledError()
        return self._future.exception()

    def let_wait(self, layer: int | None = None) -> None:
        """Wait: this thread is where the engine goes on."""
        if layer is None or layer >= len(self._layers):
            self.wait()
        elif not self._layers[layer].done():
            wait_for([self._layers[layer], self._future], return_when=FIRST_COMPLETED)

    def cancel(self) -> bool:
        """True when the job had not started and never will; False when it runs or is done."""
        return self._future.cancel()

    def move_to(self, queue: ThreadPoolExecutor) -> None:
        """Wait for its turn in another queue, unless it has begun."""
        if self._future.cancel():
            self._future = queue.submit(self._work)


class ThreadCopier:
    """A Copier where the processor does the copying, or a GPU while a worker waits for it.

    `engine_work(transfers)` is called with each job, on the owner's thread; what it returns waits
    for what the engine does to their pools at that time, and is called by the worker first.
    """

    def __init__(
        self,
        backend: Backend,
        engine_work: Callable[[Sequence[Transfer]], Callable[[], None]] = lambda _: lambda: None,
    ) -> None:
        self._backend, self._engine_work = backend, engine_work
        self._stores = ThreadPoolExecutor(1, thread_name_prefix="lmc-store")
        self._hurried = ThreadPoolExecutor(1, thread_name_prefix="lmc-hurry")
        self._loads = ThreadPoolExecutor(1, thread_name_prefix="lmc-load")

    def pin(self, slices: Callable[[int], Sequence[tuple[int, int]]]) -> None:
        pass  # the processor reaches all memory

    def store(self, transfers: Sequence[Transfer], *, hurry: bool = False) -> ThreadJob:
        queue = self._hurried if hurry else self._stores
        work = self._engine_work(transfers)
        return ThreadJob(queue, partial(self._store, tuple(transfers), work))

    def fence(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            assert isinstance(job, ThreadJob)
            job.move_to(self._hurried)
        for job in jobs:
            job.wait()

    def load(self, transfers: Sequence[Transfer], *, layers: bool = False) -> ThreadJob:
        work = self._engine_work(transfers)
        if not layers:
            return ThreadJob(self._loads, partial(self._load, tuple(transfers), work))
        landed: list[Future[None]] = [Future() for _ in range(num_layers(transfers))]
        task = partial(self._load_layers, tuple(transfers), work, landed)
        return ThreadJob(self._loads, task, landed)

    def close(self) -> None:
        """Cancel what is queued and wait for what runs."""
        for pool in (self._stores, self._hurried, self._loads):
            pool.shutdown(wait=True, cancel_futures=True)

    def _store(self, transfers: tuple[Transfer, ...], engine_over: Callable[[], None]) -> None:
        engine_over()  # the step that writes the pages
        for transfer in transfers:
            self._backend.gather(transfer, range(len(transfer.pool.planes)))

    def _load(self, transfers: tuple[Transfer, ...], engine_over: Callable[[], None]) -> None:
        engine_over()  # a step that still reads the pages
        for transfer in transfers:
            self._backend.scatter(transfer, range(len(transfer.pool.planes)))

    def _load_layers(
        self,
        transfers: tuple[Transfer, ...],
        engine_over: Callable[[], None],
        landed: Sequence[Future[None]],
    ) -> None:
        engine_over()  # as above
        for layer, there in enumerate(landed):
            for transfer in transfers:
                if planes := transfer.pool.layer_planes(layer):
                    self._backend.scatter(transfer, planes)
            there.set_result(None)


def num_layers(transfers: Sequence[Transfer]) -> int:
    """Layers of a load by layers."""
    return max((transfer.pool.num_layers for transfer in transfers), default=0)
