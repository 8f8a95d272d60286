"""Background copies: order, cancel, close, errors, and a GIL that stays free."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from itertools import chain, pairwise

import pytest
import torch

from lmc import cpu
from lmc.transfer.copier import ThreadCopier, ThreadJob
from lmc.transfer.native import CpuBackend
from lmc.transfer.ops import Backend
from lmc.transfer.pages import PagedPool, Transfer
from lmc.transfer.reference import TorchBackend
from lmc.transfer.streams import copier_of

from .conftest import Chunk, random_pool


def transfer_of(pool: PagedPool, page_ids: torch.Tensor, *chunks: Chunk) -> Transfer:
    return Transfer(pool, page_ids, [chunk.piece() for chunk in chunks])


class Gate(TorchBackend):
    """A backend whose stores wait until the gate opens."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.order: list[int] = []  # addresses of chunks

    def gather(self, transfer: Transfer, planes: range) -> None:
        self.order.append(transfer.pieces[0].address)
        self.entered.set()
        assert self.open.wait(30)
        super().gather(transfer, planes)


class Steps(TorchBackend):
    """A backend that loads a layer when it is told to."""

    def __init__(self) -> None:
        self.next = threading.Semaphore(0)

    def scatter(self, transfer: Transfer, planes: range) -> None:
        assert self.next.acquire(timeout=30)
        super().scatter(transfer, planes)


class Broken(TorchBackend):
    """A backend that fails from `plane` on."""

    def __init__(self, plane: int) -> None:
        self.plane = plane

    def scatter(self, transfer: Transfer, planes: range) -> None:
        if planes.stop > self.plane:
            raise OSError("broken")
        super().scatter(transfer, planes)


def pool_of_layers(layers: int = 3) -> PagedPool:
    return random_pool([96, 7] * layers, 16, layers=[i // 2 for i in range(2 * layers)])


@pytest.mark.parametrize("layers", [False, True])
def test_store_then_load_brings_the_bytes_back(backend: Backend, layers: bool) -> None:
    pool = pool_of_layers()
    chunk = Chunk(pool, 8)
    ids, new_ids = torch.randperm(16)[:8], torch.randperm(16)[:8]
    before = [plane[ids] for plane in pool.planes]
    copier = ThreadCopier(backend)
    job = copier.store([transfer_of(pool, ids, chunk)])
    assert job.wait()
    assert (job.done(), job.error) == (True, None)
    job = copier.load([transfer_of(pool, new_ids, chunk)], layers=layers)
    job.let_wait()
    assert (job.done(), job.error) == (True, None)
    copier.close()
    after = [plane[new_ids] for plane in pool.planes]
    assert all(map(torch.equal, after, before))


def test_who_waits_for_a_layer_finds_it_and_no_more() -> None:
    pool = pool_of_layers()
    chunk = Chunk(pool, 4)
    chunk.payload.fill_(1)
    for plane in pool.planes:
        plane.zero_()
    backend = Steps()
    copier = ThreadCopier(backend)
    job = copier.load([transfer_of(pool, torch.arange(4), chunk)], layers=True)
    for layer in range(3):
        assert not job.done()
        threading.Timer(0.05, backend.next.release).start()
        job.let_wait(layer)
        sums = [int(plane.sum()) for plane in pool.planes]
        assert sums == [384, 28] * (layer + 1) + [0, 0] * (2 - layer)
    copier.close()
    job.let_wait(0)  # over


def test_a_layer_is_there_when_every_pool_has_it() -> None:
    """Layers read different pools; one that a load does not have is after all of them."""
    pools = [random_pool([96, 7], 8, layers=[0, 2]), random_pool([64], 8, layers=[1])]
    chunks = [Chunk(pool, 4) for pool in pools]
    planes = [pools[0].planes[0], pools[1].planes[0], pools[0].planes[1]]
    for plane, chunk in zip(planes[:2], chunks, strict=True):
        chunk.payload.fill_(1)
        plane.zero_()
    planes[2].zero_()
    backend = Steps()
    copier = ThreadCopier(backend)
    pairs = zip(pools, chunks, strict=True)
    job = copier.load([transfer_of(p, torch.arange(4), c) for p, c in pairs], layers=True)
    for layer in range(3):
        threading.Timer(0.05, backend.next.release).start()
        job.let_wait(layer)
        assert [bool(plane.any()) for plane in planes] == [i <= layer for i in range(3)]
    job.let_wait(7)
    assert job.done()
    copier.close()


def test_a_load_does_not_queue_behind_stores() -> None:
    pool = pool_of_layers()
    gate = Gate()
    copier = ThreadCopier(gate)
    chunks = [Chunk(pool, 4) for _ in range(4)]
    stores = [copier.store([transfer_of(pool, torch.arange(4), chunk)]) for chunk in chunks[1:]]
    load = copier.load([transfer_of(pool, torch.arange(4), chunks[0])])
    assert load.wait(30)
    assert not any(job.done() for job in stores)
    assert not stores[0].wait(0.01)
    gate.open.set()
    copier.close()


def test_a_job_moves_pages_of_several_pools_in_order(backend: Backend) -> None:
    pools = [pool_of_layers(), random_pool([64], 8)]
    chunks = [Chunk(pool, 4) for pool in pools]
    ids, new_ids = torch.tensor([3, 1, 0, 7]), torch.tensor([4, 6, 2, 5])
    before = [[plane[ids] for plane in pool.planes] for pool in pools]
    copier = ThreadCopier(backend)
    pairs = list(zip(pools, chunks, strict=True))
    copier.store([Transfer(pool, ids, [chunk.piece()]) for pool, chunk in pairs]).wait()
    job = copier.load([Transfer(pool, new_ids, [chunk.piece()]) for pool, chunk in pairs])
    copier.close()
    assert job.error is None
    after = [[plane[new_ids] for plane in pool.planes] for pool in pools]
    assert all(map(torch.equal, chain(*after), chain(*before)))


def test_only_a_queued_job_is_cancelled() -> None:
    pool = pool_of_layers()
    gate = Gate()
    copier = ThreadCopier(gate)
    chunks = [Chunk(pool, 4) for _ in range(3)]
    running, queued, last = (copier.store([transfer_of(pool, torch.arange(4), c)]) for c in chunks)
    assert gate.entered.wait(30)
    assert not running.cancel()
    assert queued.cancel()
    assert queued.done()
    assert isinstance(queued.error, CancelledError)
    assert running.error is None
    gate.open.set()
    assert last.wait(30)
    assert running.error is None
    assert not last.cancel()
    assert bool((chunks[1].memory == 0xEE).all())
    copier.close()


def test_close_waits_for_what_runs_and_cancels_the_rest() -> None:
    pool = pool_of_layers()
    gate = Gate()
    copier = ThreadCopier(gate)
    chunks = [Chunk(pool, 4) for _ in range(2)]
    running, queued = (
        copier.store([transfer_of(pool, torch.arange(4), chunk)]) for chunk in chunks
    )
    assert gate.entered.wait(30)
    threading.Timer(0.05, gate.open.set).start()
    copier.close()
    assert (running.done(), running.error) == (True, None)
    assert isinstance(queued.error, CancelledError)
    with pytest.raises(RuntimeError, match="shutdown"):
        copier.store([transfer_of(pool, torch.arange(4), chunks[0])])


def test_a_fence_has_its_stores_overtake_others() -> None:
    pool = pool_of_layers()
    gate = Gate()
    copier = ThreadCopier(gate)
    chunks = [Chunk(pool, 4) for _ in range(4)]
    jobs = [copier.store([transfer_of(pool, torch.arange(4), c)]) for c in chunks[:3]]
    assert gate.entered.wait(30)
    early = copier.store([transfer_of(pool, torch.arange(4), chunks[3])], hurry=True)
    threading.Timer(0.05, gate.open.set).start()
    copier.fence([jobs[0], jobs[2], early])
    assert all(job.done() and job.error is None for job in (jobs[0], jobs[2], early))
    copier.close()
    assert gate.order[:2] == [chunk.piece().address for chunk in (chunks[0], chunks[3])]
    assert jobs[1].done()
    assert torch.equal(chunks[2].payload[: 4 * 96].view(4, 96), pool.planes[0][:4])


def test_a_store_that_overtook_others_is_cancelled_as_any_other() -> None:
    pool = pool_of_layers()
    gate = Gate()
    copier = ThreadCopier(gate)
    chunks = [Chunk(pool, 4) for _ in range(2)]
    jobs = [copier.store([transfer_of(pool, torch.arange(4), c)], hurry=True) for c in chunks]
    assert gate.entered.wait(30)
    assert jobs[1].cancel()
    assert isinstance(jobs[1].error, CancelledError)
    gate.open.set()
    copier.close()


def test_an_error_in_the_worker_travels_in_the_job() -> None:
    pool = pool_of_layers()
    chunk = Chunk(pool, 4)
    copier = ThreadCopier(Broken(plane=2))
    job = copier.load([transfer_of(pool, torch.arange(4), chunk)], layers=True)
    started = time.monotonic()
    for layer in range(3):
        job.let_wait(layer)  # there, or given up
    assert time.monotonic() - started < 2
    assert job.wait(30)
    assert isinstance(job.error, OSError)
    assert torch.equal(pool.planes[0][:4], chunk.payload[: 4 * 96].view(4, 96))
    assert copier.store([transfer_of(pool, torch.arange(4), chunk)]).wait(30)
    copier.close()


def test_a_bad_transfer_is_refused_where_it_is_made() -> None:
    pool = pool_of_layers()
    copier = ThreadCopier(TorchBackend())
    with pytest.raises(IndexError, match="outside a pool"):
        copier.store([Transfer(pool, torch.tensor([16]), [Chunk(pool, 1).piece()])])
    copier.close()


def test_page_ids_may_change_once_the_job_is_made() -> None:
    pool = pool_of_layers()
    gate = Gate()
    copier = ThreadCopier(gate)
    chunk, ids = Chunk(pool, 4), torch.arange(4)
    copier.store([transfer_of(pool, ids, chunk)])
    ids.fill_(9)
    gate.open.set()
    copier.close()
    assert torch.equal(chunk.payload[: 4 * 96].view(4, 96), pool.planes[0][:4])


class Timed(CpuBackend):
    """Notes when its store began and ended."""

    began = ended = 0.0

    def gather(self, transfer: Transfer, planes: range) -> None:
        self.began = time.perf_counter()
        super().gather(transfer, planes)
        self.ended = time.perf_counter()


def longest_pause(job: ThreadJob, backend: Timed) -> float:
    """The longest time, as a share of the copy, in which this thread could not take a step."""
    steps = [time.perf_counter()]
    while not job.done():
        steps.append(time.perf_counter())
    inside = [step for step in steps if backend.began <= step <= backend.ended]
    edges = [backend.began, *inside, backend.ended]
    pauses = (after - before for before, after in pairwise(edges))
    return max(pauses) / (backend.ended - backend.began)


@pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
def test_the_gil_is_free_while_a_native_copy_runs() -> None:
    """Holding the GIL, the copy is one pause; a busy machine makes pauses too, hence the tries."""
    pool = random_pool([1 << 20], 8)
    backend = Timed()
    copier = ThreadCopier(backend)
    chunk = Chunk(pool, 8)
    again = 200  # into the same chunk: a long call that needs little memory
    pieces, page_ids = [chunk.piece()] * again, torch.arange(8).repeat(again)
    free = any(
        longest_pause(copier.store([Transfer(pool, page_ids, pieces)]), backend) < 0.4
        for _ in range(10)
    )
    copier.close()
    assert free


def test_each_job_waits_for_what_the_engine_did_before_it() -> None:
    """Marked by the owner when the job is made, waited for by the worker before a byte moves."""
    pool, chunk, owner = pool_of_layers(), Chunk(pool_of_layers(), 4), threading.get_ident()
    over, marked, waited = threading.Event(), [], []

    def engine_work(transfers: Sequence[Transfer]) -> Callable[[], None]:
        marked.append((threading.get_ident(), len(transfers)))

        def wait() -> None:
            assert over.wait(30)
            waited.append(threading.get_ident())

        return wait

    gate = Gate()
    gate.open.set()
    copier = ThreadCopier(gate, engine_work)
    transfer = transfer_of(pool, torch.arange(4), chunk)
    jobs = [copier.store([transfer]), copier.load([transfer]), copier.load([transfer], layers=True)]
    assert marked == [(owner, 1)] * 3
    assert not gate.entered.wait(0.05)
    assert not any(job.done() for job in jobs)
    over.set()
    assert all(job.wait(30) for job in jobs)
    assert [job.error for job in jobs] == [None] * 3
    assert len(waited) == 3
    assert owner not in waited
    copier.close()


def test_a_pool_on_the_host_has_no_streams() -> None:
    pool = pool_of_layers()
    copier = copier_of(TorchBackend(), lambda: pytest.fail("asked for streams"))
    job = copier.store([transfer_of(pool, torch.arange(4), Chunk(pool, 4))])
    assert job.wait(30)
    assert job.error is None
    copier.close()
