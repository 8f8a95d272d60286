"""The backends of GPUs: launches of the kernels, and the copies around them.

    reaching    a kernel reads or writes chunks in the host's memory, by their address on the device
    batches     pages <-> chunks, by copy engines that are given all pieces in one call
    staged      pages <-> a buffer of the device, by a kernel; buffer <-> chunks, by copy engines

Which of them moves a transfer says the policy; chunks in memory that is not pinned are always
staged. All of it is put into a stream of the caller's and nothing waits for it here, so what
`enqueue` returns, and the transfer, stay as they are until the stream is that far.
"""

import ctypes
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple, Self

import torch

from lmc import cuda, hip
from lmc.cuda.driver import CudaDriver
from lmc.hip.driver import HipDriver
from lmc.kernels import BLOCK, GATHER, SCATTER, Tables, Vendor, before, choose, load, pages_args
from lmc.kernels.driver import BATCH_PIECES, Driver, DriverError, Kernels
from lmc.kernels.jit import Compiled
from lmc.kernels.policy import Policy
from lmc.transfer.contiguous import Contiguous, Run
from lmc.transfer.pages import PagedPool, Transfer

__all__ = ["Buffer", "GpuBackend", "Pins"]

_WORD = 8
_MIN_BUFFER = 1 << 14
_ROW = 4


class Buffer(NamedTuple):
    """The same bytes twice: pinned in the host's memory, and on the device."""

    host: int
    device: int
    num_bytes: int


class Pins:
    """Host memory that the device reaches, in ranges; what straddles two is in neither. Another
    thread may add ranges while one looks them up.
    """

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, int]] = []  # begin and end here, address on the device

    def add(self, host: int, num_bytes: int, device: int) -> None:
        self._ranges = sorted([*self._ranges, (host, host + num_bytes, device)])

    def remove(self, host: int) -> None:
        self._ranges = [found for found in self._ranges if found[0] != host]

    def find(self, host: int, num_bytes: int) -> int | None:
        """The address on the device; None if any byte is not pinned."""
        ranges = self._ranges
        at = bisect_right(ranges, host, key=itemgetter(0)) - 1
        if at < 0 or host + num_bytes > ranges[at][1]:
            return None
        return ranges[at][2] + host - ranges[at][0]


class _Batch(NamedTuple):
    """One launch. `staged`: where each run lies in the staging buffer, from its begin."""

    planes: range
    runs: list[Run]
    staged: list[int] | None


class GpuBackend:
    def __init__(
        self, driver: Driver, image: bytes | Compiled, policy: Policy, device: int = 0
    ) -> None:
        """`image` must be one for that device. Raises DriverError."""
        self.name = "triton" if isinstance(image, Compiled) else str(driver.vendor)
        self.driver, self.policy, self.device = driver, policy, device
        self.pins = Pins()
        self._free: list[Buffer] = []
        self._pools: dict[PagedPool, tuple[Buffer, array[int]]] = {}
        self._staging: dict[int, int] = {}  # by stream
        self._own_stream = 0
        driver.use(device)
        self._kernels: Kernels = driver.load(image)

    @classmethod
    def of(
        cls,
        device: torch.device,
        image_for: Callable[[Vendor, str], bytes | Compiled] = lambda *gpu: load(choose(*gpu)),
    ) -> Self:
        """For a GPU of torch's, with the image that ships or another (`lmc.kernels.compile_pages`).
        Raises ImageError, DriverError or OSError where no image or no driver serves it.
        """
        if device.type != "cuda":  # torch's name for AMD's GPUs as well
            raise OSError(f"the pool is on {device}")
        index = device.index if device.index is not None else torch.cuda.current_device()
        found = torch.cuda.get_device_properties(index)
        driver: Driver
        if torch.version.hip:
            driver, policy, arch = HipDriver(), hip.POLICY, found.gcnArchName
        else:
            driver, policy, arch = CudaDriver(), cuda.POLICY, f"sm_{found.major}{found.minor}"
        return cls(driver, image_for(driver.vendor, arch), policy, index)

    # --- one op, to its end

    def gather(self, transfer: Transfer, planes: range) -> None:
        self._run(GATHER, transfer, planes)

    def scatter(self, transfer: Transfer, planes: range) -> None:
        self._run(SCATTER, transfer, planes)

    def _run(self, op: str, transfer: Transfer, planes: range) -> None:
        self.driver.use(self.device)
        self._own_stream = self._own_stream or self.driver.stream()
        held: list[Buffer] = []
        try:
            self.enqueue(op, transfer, planes, self._own_stream, held)
        finally:
            self._wait_for(self._own_stream)
            self.give_back(held)

    # --- in a stream

    def enqueue(
        self, op: str, transfer: Transfer, planes: range, stream: int, held: list[Buffer]
    ) -> None:
        """Put the op into a stream, and into `held` the buffers it reads, to be given back once it
        is over. Raises DriverError; what was put into the stream before that runs all the same.
        """
        pool = transfer.pool
        pinned, others = self._runs(transfer, planes)
        if (direct := self._contiguous(transfer, pinned)) is not None:
            self._copy(op, direct, stream)
            pinned = []
        batches = list(self._batches(transfer, pinned, others))
        if not batches:
            return
        rows, sums = self._tables_of(pool)
        pieces = [self._pieces(pool, batch, stream) for batch in batches]
        buffer = self._pack(transfer, batches, pieces)
        held.append(buffer)
        self.driver.to_device(buffer.device, buffer.host, buffer.num_bytes, stream)
        at = buffer.device + len(transfer.page_ids) * _WORD
        for batch, table in zip(batches, pieces, strict=True):
            starts = at + len(table) * _WORD
            tables = Tables(rows, sums, at, starts, buffer.device)
            at = starts + len(batch.runs) * _WORD
            wave, grid = self.policy.wave, self.policy.grid * BLOCK // self._kernels.threads
            args = pages_args(pool.table, batch.planes, table, tables, wave=wave, grid=grid)
            assert args is not None
            copies = self._copies(pool, batch, stream)
            if op == SCATTER:
                for host, device, size in copies:
                    self.driver.to_device(device, host, size, stream)
            self.driver.launch(self._kernels, op, args, stream)
            if op == GATHER:
                for host, device, size in copies:
                    self.driver.to_host(host, device, size, stream)

    def give_back(self, buffers: Iterable[Buffer]) -> None:
        """The stream is past what read them."""
        self._free.extend(buffers)

    def close(self) -> None:
        """Free all memory; nothing is under way any more."""
        pools = [buffer for buffer, _ in self._pools.values()]
        for buffer in (*self._free, *pools):
            self.driver.free(buffer.device)
            self.driver.free_host(buffer.host)
        self._free.clear()
        self._pools.clear()
        for address in self._staging.values():
            self.driver.free(address)
        self._staging.clear()
        if self._own_stream:
            self.driver.stream_end(self._own_stream)
            self._own_stream = 0

    # --- what is moved in one launch

    def _runs(self, transfer: Transfer, planes: range) -> tuple[list[Run], list[Run]]:
        """Those with chunks in pinned memory, and the others."""
        found: tuple[list[Run], list[Run]] = [], []
        start = 0
        for piece in transfer.pieces:
            run = Run(planes, piece.address, piece.chunk_pages, piece.first, piece.pages, start)
            start += piece.pages
            if run.pages and planes:
                size = transfer.pool.chunk_bytes(piece.chunk_pages)
                found[self.pins.find(piece.address, size) is None].append(run)
        return found

    def _contiguous(self, transfer: Transfer, runs: Sequence[Run]) -> Contiguous | None:
        """What the copy engines move by themselves; None if that is not the way for it."""
        limit = self.policy.batch_from
        if limit is None or not runs or not self.driver.batches:
            return None
        found = Contiguous(transfer.pool, transfer.page_ids, runs)
        return found if found.mean_bytes >= limit else None

    def _copy(self, op: str, direct: Contiguous, stream: int) -> None:
        for chunk, pool, sizes in direct.pieces(BATCH_PIECES):
            to, source = (chunk, pool) if op == GATHER else (pool, chunk)
            self.driver.batch(
                to.data_ptr(), source.data_ptr(), sizes.data_ptr(), len(sizes), stream
            )

    def _batches(
        self, transfer: Transfer, pinned: Sequence[Run], others: Sequence[Run]
    ) -> Iterator[_Batch]:
        total = sum(_bytes_of(transfer.pool, run) for run in (*pinned, *others))
        limit = self.policy.staged_from
        if pinned and (limit is None or total < limit):
            yield _Batch(pinned[0].planes, list(pinned), None)
            pinned = []
        yield from self._staged(transfer.pool, [*pinned, *others])

    def _staged(self, pool: PagedPool, runs: Iterable[Run]) -> Iterator[_Batch]:
        """As many runs at a time as fit the staging buffer."""
        batch: list[Run] = []
        places = [0]
        for run in self._cut(pool, runs):
            size = _bytes_of(pool, run)
            if batch and (
                run.planes != batch[0].planes or places[-1] + size > self.policy.staging_bytes
            ):
                yield _Batch(batch[0].planes, batch, places[:-1])
                batch, places = [], [0]
            batch.append(run)
            places.append(-(-(places[-1] + size) // 16) * 16)
        if batch:
            yield _Batch(batch[0].planes, batch, places[:-1])

    def _cut(self, pool: PagedPool, runs: Iterable[Run]) -> Iterator[Run]:
        """Runs that each fit the staging buffer: of fewer planes, of fewer pages where one plane is
        still too much. Raises ValueError for a page that does not.
        """
        for run in runs:
            if _bytes_of(pool, run) <= self.policy.staging_bytes:
                yield run
                continue
            for plane in run.planes:
                most = self.policy.staging_bytes // pool.page_bytes[plane]
                if not most:
                    raise ValueError(
                        f"a page of {pool.page_bytes[plane]} bytes does not fit the staging buffer "
                        f"of {self.policy.staging_bytes}"
                    )
                for skip in range(0, run.pages, most):
                    yield run._replace(
                        planes=range(plane, plane + 1),
                        first=run.first + skip,
                        pages=min(most, run.pages - skip),
                        start=run.start + skip,
                    )

    # --- tables

    def _tables_of(self, pool: PagedPool) -> tuple[int, int]:
        """Where the device finds a pool's planes, and the bytes before each. Written once."""
        if pool not in self._pools:
            sums = before(pool.table)
            words = pool.table + sums
            buffer = self._take(len(words) * _WORD)
            ctypes.memmove(buffer.host, words.buffer_info()[0], len(words) * _WORD)
            try:
                self._own_stream = self._own_stream or self.driver.stream()
                self.driver.to_device(
                    buffer.device, buffer.host, buffer.num_bytes, self._own_stream
                )
                self._wait_for(self._own_stream)  # streams of ours do not wait for each other
            except DriverError:
                self.give_back([buffer])
                raise
            self._pools[pool] = buffer, sums
        buffer, _ = self._pools[pool]
        return buffer.device, buffer.device + len(pool.table) * _WORD

    def _pieces(self, pool: PagedPool, batch: _Batch, stream: int) -> "array[int]":
        """The rows of a batch: in the staging buffer a run is a chunk of its own, whose other
        planes would lie before and behind it.
        """
        table = array("q")
        if batch.staged is None:
            for run in batch.runs:
                address = self.pins.find(run.address, pool.chunk_bytes(run.chunk_pages))
                assert address is not None
                table.extend((address, run.chunk_pages, run.first, run.pages))
            return table
        base, before_planes = self._staging_of(stream), self._pools[pool][1][batch.planes.start]
        for run, place in zip(batch.runs, batch.staged, strict=True):
            table.extend((base + place - before_planes * run.pages, run.pages, 0, run.pages))
        return table

    def _pack(
        self, transfer: Transfer, batches: Sequence[_Batch], pieces: Sequence["array[int]"]
    ) -> Buffer:
        """Page ids, then of each batch its pieces and where their page ids start."""
        words = array("q")
        for batch, table in zip(batches, pieces, strict=True):
            words.extend(table)
            words.extend(run.start for run in batch.runs)
        ids = len(transfer.page_ids) * _WORD
        buffer = self._take(ids + len(words) * _WORD)
        ctypes.memmove(buffer.host, transfer.page_ids.data_ptr(), ids)
        ctypes.memmove(buffer.host + ids, words.buffer_info()[0], len(words) * _WORD)
        return buffer

    # --- memory

    def _copies(
        self, pool: PagedPool, batch: _Batch, stream: int
    ) -> Iterator[tuple[int, int, int]]:
        """(host, device, bytes) of each contiguous piece between chunks and the staging buffer."""
        if batch.staged is None:
            return
        base, sums = self._staging_of(stream), self._pools[pool][1]
        for run, place in zip(batch.runs, batch.staged, strict=True):
            device = base + place
            if run.pages == run.chunk_pages:  # all planes of a whole chunk lie side by side
                host = run.address + sums[run.planes.start] * run.chunk_pages
                yield host, device, _bytes_of(pool, run)
                continue
            for plane in run.planes:
                size = run.pages * pool.page_bytes[plane]
                skip = sums[plane] * run.chunk_pages + run.first * pool.page_bytes[plane]
                yield run.address + skip, device, size
                device += size

    def _staging_of(self, stream: int) -> int:
        """Its buffer: what is put into one stream uses it in turn."""
        if stream not in self._staging:
            self._staging[stream] = self.driver.allocate(self.policy.staging_bytes)
        return self._staging[stream]

    def _wait_for(self, stream: int) -> None:
        event = self.driver.event()
        try:
            self.driver.event_record(event, stream)
            self.driver.event_wait(event)
        finally:
            self.driver.event_end(event)

    def _take(self, num_bytes: int) -> Buffer:
        size = max(_MIN_BUFFER, 1 << (num_bytes - 1).bit_length())
        for at, buffer in enumerate(self._free):
            if buffer.num_bytes == size:
                return self._free.pop(at)
        return Buffer(self.driver.allocate_host(size), self.driver.allocate(size), size)


def _bytes_of(pool: PagedPool, run: Run) -> int:
    return run.pages * sum(pool.page_bytes[plane] for plane in run.planes)
