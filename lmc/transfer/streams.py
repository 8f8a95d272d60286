"""Transfers in streams of a GPU: the counterpart of `copier`, where no thread waits for a copy.

    store    after what the engine's streams hold now: the step that wrote the pages
    load     after that as well: a step that still reads the pages must be over
    layer    an event behind each layer of a load, for which the engine's own stream can wait

Owned by one thread. A transfer's pages, chunks and tables are left alone until its job is over,
even where it failed half-way: what was put into a stream before that runs to its end.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from lmc.kernels import GATHER, SCATTER
from lmc.kernels.driver import DriverError
from lmc.transfer.copier import Copier, Job, ThreadCopier, num_layers
from lmc.transfer.gpu import Buffer, GpuBackend
from lmc.transfer.ops import Backend
from lmc.transfer.pages import Transfer
from lmc.transfer.pinning import SLICE_BYTES, Pinner

__all__ = ["StreamCopier", "StreamJob", "copier_of", "engine_work"]

_POLL_S = 0.0002


class StreamJob:
    """One transfer in a stream; as `copier.Job`, but looked at by its owner's thread alone."""

    def __init__(self, backend: GpuBackend, engine_streams: Callable[[], Sequence[int]]) -> None:
        self._backend, self._engine_streams = backend, engine_streams
        self._held: list[Buffer] = []
        self._events: list[int] = []
        self._end = 0
        self._layers: list[int] = []
        self._over = False
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Over: every byte arrived, or it failed. Never waits."""
        if not self._over:
            try:
                if self._end and not self._backend.driver.event_over(self._end):
                    return False
            except DriverError as error:
                self._error = self._error or error
            self._finish()
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is over; False when `timeout_s` went by first."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.done():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True

    @property
    def error(self) -> BaseException | None:
        """What went wrong; known before it is over where a call was refused."""
        self.done()
        return self._error

    def let_wait(self, layer: int | None = None) -> None:
        """What is put into the engine's streams from now on runs after this, or after a layer of
        it (where it has no such layer, as it failed before that, after all of it); at once where
        all is over. A wait that the driver refuses makes the job one that failed.
        """
        if layer is None or layer >= len(self._layers):
            events = [self._end] if self._end else []
        else:
            events = self._layers[layer : layer + 1]
        try:
            for event in events:
                for stream in self._engine_streams():
                    self._backend.driver.stream_wait(stream, event)
        except DriverError as error:
            self._error = self._error or error

    def _finish(self) -> None:
        self._over = True
        for event in (*self._events, *self._layers):
            self._backend.driver.event_end(event)
        self._events, self._layers, self._end = [], [], 0
        self._backend.give_back(self._held)


class StreamCopier:
    """`engine_streams` tells the streams that the engine reads and writes pages in, at the time of
    the call.
    """

    def __init__(self, backend: GpuBackend, engine_streams: Callable[[], Sequence[int]]) -> None:
        self._backend, self._driver = backend, backend.driver
        self._engine_streams = engine_streams
        self._driver.use(backend.device)
        self._stores, self._hurried, self._loads = (self._driver.stream() for _ in range(3))
        self._jobs: list[StreamJob] = []
        self._pinners: list[Pinner] = []
        self._closed = False

    def pin(self, slices: Callable[[int], Sequence[tuple[int, int]]]) -> None:
        """In the background; until then chunks are copied by way of the device's own memory."""
        self._pinners.append(Pinner(self._backend, slices(SLICE_BYTES)))

    def store(self, transfers: Sequence[Transfer], *, hurry: bool = False) -> StreamJob:
        """Gather pages into chunks. In a hurry it overtakes the stores that nobody waits for."""
        job, stream = self._job(), self._hurried if hurry else self._stores
        with self._filling(job, stream):
            for transfer in transfers:
                self._put(job, GATHER, transfer, range(len(transfer.pool.planes)), stream)
        return job

    def fence(self, jobs: Sequence[Job]) -> None:
        """What the engine puts into its streams from now on runs after these jobs."""
        for job in jobs:
            job.let_wait()

    def load(self, transfers: Sequence[Transfer], *, layers: bool = False) -> StreamJob:
        """Scatter chunks into pages; with `layers`, layer by layer."""
        job = self._job()
        with self._filling(job, self._loads):
            if not layers:
                for transfer in transfers:
                    self._put(job, SCATTER, transfer, range(len(transfer.pool.planes)), self._loads)
                return job
            for layer in range(num_layers(transfers)):
                for transfer in transfers:
                    if planes := transfer.pool.layer_planes(layer):
                        self._put(job, SCATTER, transfer, planes, self._loads)
                job._layers.append(self._mark(self._loads))
        return job

    def _job(self) -> StreamJob:
        return StreamJob(self._backend, self._engine_streams)

    @contextmanager
    def _filling(self, job: StreamJob, stream: int) -> Iterator[None]:
        """What is done inside runs after what the engine has put into its streams; a call that the
        driver refuses ends it, and the job is over when what came before it is.
        """
        self._jobs = [other for other in self._jobs if not other.done()]
        self._jobs.append(job)
        self._driver.use(self._backend.device)
        try:
            for other in self._engine_streams():
                event = self._mark(other)
                job._events.append(event)
                self._driver.stream_wait(stream, event)
            yield
        except DriverError as error:
            job._error = error
        finally:
            self._seal(job, stream)

    def _seal(self, job: StreamJob, stream: int) -> None:
        """The job is over when the stream is as far as it is now."""
        try:
            job._end = self._mark(stream)
            job._events.append(job._end)
        except DriverError as error:  # then nobody knows when the buffers are free again
            job._error = job._error or error
            job._held = []

    def _put(self, job: StreamJob, op: str, transfer: Transfer, planes: range, stream: int) -> None:
        self._backend.enqueue(op, transfer, planes, stream, job._held)

    def _mark(self, stream: int) -> int:
        event = self._driver.event()
        self._driver.event_record(event, stream)
        return event

    def close(self) -> None:
        """Wait for what is under way. May be called again."""
        if self._closed:
            return
        self._closed = True
        for job in self._jobs:
            job.wait()
        self._jobs.clear()
        for pinner in self._pinners:
            pinner.close()
        self._pinners.clear()
        for stream in (self._stores, self._hurried, self._loads):
            self._driver.stream_end(stream)
        self._backend.close()


def copier_of(backend: Backend, engine_streams: Callable[[], Sequence[int]]) -> Copier:
    """Streams where a GPU's kernels do the copying, threads elsewhere."""
    if isinstance(backend, GpuBackend):
        return StreamCopier(backend, engine_streams)
    return ThreadCopier(backend, partial(engine_work, engine_streams))


def engine_work(
    engine_streams: Callable[[], Sequence[int]], transfers: Sequence[Transfer]
) -> Callable[[], None]:
    """For copies by torch's ops in a thread: marks what the streams hold now, where the pools are
    on a GPU; what is returned blocks its caller until that is over.
    """
    devices = {transfer.pool.device for transfer in transfers}
    places = [
        torch.cuda.ExternalStream(stream, device)  # type: ignore[no-untyped-call]
        for device in devices
        if device.type == "cuda"
        for stream in engine_streams()
    ]
    marks = [place.record_event() for place in places]

    def wait() -> None:
        for mark in marks:
            mark.synchronize()

    return wait
