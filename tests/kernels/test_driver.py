"""The launcher, the copies around it and their order, on a driver that is as unkind as one may be
(fake_driver.cpp): every image that ships is loaded, every case moves its bytes.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lmc.cuda.driver as module
from lmc import cuda, hip
from lmc.kernels import GATHER, SCATTER, Compiled, Vendor, listed, load
from lmc.kernels.driver import DriverError, mapped_library
from lmc.tiers.arena import Arena
from lmc.transfer import pinning
from lmc.transfer.copier import ThreadCopier
from lmc.transfer.gpu import GpuBackend, Pins
from lmc.transfer.pages import PagedPool, Piece, Transfer
from lmc.transfer.pinning import Pinner
from lmc.transfer.reference import TorchBackend
from lmc.transfer.streams import StreamCopier, copier_of

from .cases import CASES
from .fake import VENDORS, Fake


@pytest.fixture(params=VENDORS, ids=str)
def fake(request: pytest.FixtureRequest, libraries: dict[Vendor, Path]) -> Fake:
    return Fake(request.param, libraries[request.param])


@contextmanager
def pinned(backend: GpuBackend, *tensors: torch.Tensor) -> Iterator[None]:
    for tensor in tensors:
        host, size = tensor.data_ptr(), tensor.numel()
        backend.pins.add(host, size, backend.driver.pin(host, size))
    yield
    for tensor in tensors:
        backend.pins.remove(tensor.data_ptr())
        backend.driver.unpin(tensor.data_ptr())


# --- every image, every call


@pytest.mark.parametrize("arch", listed())
def test_every_image_loads_where_it_belongs_and_nowhere_else(
    arch: str, libraries: dict[Vendor, Path]
) -> None:
    image = listed()[arch]
    for vendor, library in libraries.items():
        fake = Fake(vendor, library)
        fake.driver.use(0)
        if vendor is image.vendor:
            assert fake.driver.load(load(image)).functions.keys() == {"lmc_gather", "lmc_scatter"}
        else:
            with pytest.raises(DriverError, match=r"ModuleLoadData: .*\(200\), a fake one"):
                fake.driver.load(load(image))


def test_a_thread_uses_a_device_before_anything_else(fake: Fake) -> None:
    with pytest.raises(DriverError, match=r"\(201\)"):
        fake.driver.stream()


def test_a_driver_that_torch_has_is_found_where_it_lies(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 1    /usr/lib/libc.so.6\n"
        "7f02-7f03 r-xp 00000000 08:01 2    /opt/ro cm/lib/libamdhip64.so.6.4.60401\n"
        "7f04-7f05 rw-p 00000000 00:00 0\n"
    )
    assert mapped_library("libamdhip64.so", maps) == "/opt/ro cm/lib/libamdhip64.so.6.4.60401"
    assert mapped_library("libcuda.so", maps) is None


# --- bytes


class Pinned:
    """Chunks are pinned while they are moved."""

    def __init__(self, backend: GpuBackend) -> None:
        self.name, self._backend = backend.name, backend

    def gather(self, transfer: Transfer, planes: range) -> None:
        with self._pins(transfer):
            self._backend.gather(transfer, planes)

    def scatter(self, transfer: Transfer, planes: range) -> None:
        with self._pins(transfer):
            self._backend.scatter(transfer, planes)

    @contextmanager
    def _pins(self, transfer: Transfer) -> Iterator[None]:
        for piece in transfer.pieces:
            size = transfer.pool.chunk_bytes(piece.chunk_pages)
            device = self._backend.driver.pin(piece.address, size)
            self._backend.pins.add(piece.address, size, device)
        yield
        for piece in transfer.pieces:
            self._backend.pins.remove(piece.address)
            self._backend.driver.unpin(piece.address)


WAYS = {
    "reaching": ({"batch_from": None, "staged_from": None}, True),
    "in a batch": ({"batch_from": 0, "staged_from": None}, True),
    "staged": ({"batch_from": None, "staged_from": 0}, True),
    "staged in parts": ({"batch_from": None, "staged_from": 0, "staging_bytes": 1 << 16}, True),
    "pageable": ({"staged_from": None}, False),
}


class Lent(Pinned):
    """So is the pool, to the fake driver."""

    def __init__(self, fake: Fake, backend: GpuBackend) -> None:
        super().__init__(backend)
        self._fake = fake

    @contextmanager
    def _pins(self, transfer: Transfer) -> Iterator[None]:
        with self._fake.owns(transfer.pool), super()._pins(transfer):
            yield


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_every_case_moves_its_bytes(fake: Fake, way: str, case: str) -> None:
    policy, pins = WAYS[way]
    backend = fake.backend(**policy)
    mover = Lent(fake, backend) if pins else backend
    got, want = CASES[case](mover), CASES[case](TorchBackend())
    assert all(map(torch.equal, got, want))
    if fake.vendor is Vendor.CUDA and way == "in a batch":
        assert fake.count("launches") == 0
    else:
        assert fake.count("batches") == 0
    backend.close()
    assert fake.left == 0


@pytest.mark.parametrize("threads", [32, 64])
def test_kernels_that_take_arguments_one_by_one_move_their_bytes(fake: Fake, threads: int) -> None:
    """Launched as Triton's are; the fake does not look into an image."""
    image = Compiled(dict.fromkeys((GATHER, SCATTER), fake.image), {}, threads)
    fake.set("split", threads)
    for case in ("mla and its indexer", "many short pieces", "odd rows"):
        backend = fake.backend(image)
        assert all(map(torch.equal, CASES[case](Pinned(backend)), CASES[case](TorchBackend())))
        backend.close()
    assert fake.left == 0


def small_pool() -> PagedPool:
    return PagedPool(
        [torch.randint(256, (8, 64), dtype=torch.uint8) for _ in range(4)], [0, 0, 1, 1]
    )


def chunk_for(pool: PagedPool, pages: int = 4) -> torch.Tensor:
    return torch.zeros(pool.chunk_bytes(pages), dtype=torch.uint8)


IDS = (3, 1, 0, 7)


def transfer_at(pool: PagedPool, address: int) -> Transfer:
    return Transfer(pool, torch.tensor(IDS), [Piece(address, len(IDS), 0, len(IDS))])


def transfer_of(pool: PagedPool, chunk: torch.Tensor) -> Transfer:
    return transfer_at(pool, chunk.data_ptr())


def test_pinned_memory_is_reached_in_place_and_other_memory_by_copies(fake: Fake) -> None:
    backend, pool = fake.backend(staged_from=None), small_pool()
    reached, copied = chunk_for(pool), chunk_for(pool)
    both = [Piece(chunk.data_ptr(), 4, 0, 4) for chunk in (reached, copied)]
    with pinned(backend, reached):
        backend.gather(Transfer(pool, torch.arange(8), both), range(4))
    assert (fake.count("to_host"), fake.count("launches")) == (1, 2)  # one whole chunk, one copy
    want = torch.cat([plane.view(2, 4 * 64) for plane in pool.planes], 1)
    assert torch.equal(torch.stack([reached, copied]), want)


class TestBatches:
    """Copy engines that are given all pieces in one call: NVIDIA's alone."""

    @pytest.fixture
    def fake(self, libraries: dict[Vendor, Path]) -> Fake:
        return Fake(Vendor.CUDA, libraries[Vendor.CUDA])

    def move(self, fake: Fake, ids: Sequence[int], pool: PagedPool, **policy: object) -> None:
        backend, chunk = fake.backend(**policy), chunk_for(pool, len(ids))
        transfer = Transfer(
            pool, torch.tensor(ids), [Piece(chunk.data_ptr(), len(ids), 0, len(ids))]
        )
        with fake.owns(pool), pinned(backend, chunk):
            backend.gather(transfer, range(len(pool.planes)))
        assert torch.equal(
            chunk, torch.cat([plane[transfer.page_ids] for plane in pool.planes], 0).view(-1)
        )
        backend.close()
        assert fake.left == 0

    @pytest.mark.parametrize(
        ("ids", "pieces"),
        [((0, 1, 2, 3), 1), ((3, 2, 1, 0), 4), ((5, 6, 1, 2, 3, 7), 3), ((4, 4, 5, 4), 3)],
    )
    def test_pages_that_follow_one_another_are_one_piece(
        self, fake: Fake, ids: tuple[int, ...], pieces: int
    ) -> None:
        self.move(fake, ids, small_pool(), batch_from=0)
        assert (fake.count("batches"), fake.count("pieces")) == (1, 4 * pieces)

    def test_pages_with_something_between_them_are_not(self, fake: Fake) -> None:
        memory = [torch.randint(256, (8, 96), dtype=torch.uint8) for _ in range(4)]
        self.move(fake, (0, 1, 2), PagedPool([one[:, :64] for one in memory]), batch_from=0)
        assert fake.count("pieces") == 4 * 3

    @pytest.mark.parametrize(("ids", "is_batch"), [((1, 2, 3, 0), True), ((1, 2, 4, 0), False)])
    def test_pieces_are_as_large_as_they_are_submitted(
        self, fake: Fake, ids: tuple[int, ...], is_batch: bool
    ) -> None:
        """Two pieces of 128 bytes on the average, or three of 85."""
        self.move(fake, ids, small_pool(), batch_from=100)
        assert (fake.count("batches"), fake.count("launches")) == (is_batch, not is_batch)

    def test_no_call_has_more_pieces_than_a_driver_is_trusted_with(self, fake: Fake) -> None:
        pool = PagedPool([torch.randint(256, (2 * 9000, 4), dtype=torch.uint8) for _ in range(2)])
        self.move(fake, range(0, 18000, 2), pool, batch_from=0)
        assert (fake.count("batches"), fake.count("pieces")) == (4, 18000)

    def test_a_chunk_that_is_not_pinned_goes_by_the_staging_buffer(self, fake: Fake) -> None:
        backend, pool = fake.backend(batch_from=0), small_pool()
        chunks = [chunk_for(pool, 2) for _ in range(2)]
        pieces = [Piece(chunk.data_ptr(), 2, 0, 2) for chunk in chunks]
        with fake.owns(pool), pinned(backend, chunks[1]):
            backend.gather(Transfer(pool, torch.tensor((3, 1, 0, 7)), pieces), range(4))
        assert (fake.count("pieces"), fake.count("launches")) == (8, 1)
        for chunk, ids in zip(chunks, ([3, 1], [0, 7]), strict=True):
            assert torch.equal(chunk, torch.cat([plane[ids] for plane in pool.planes]).view(-1))
        backend.close()

    @pytest.mark.parametrize("calls", [["cuMemcpyBatchAsync"], []])
    def test_older_drivers(
        self, fake: Fake, calls: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            module, "BATCH_CALLS", {name: module.BATCH_CALLS[name] for name in calls}
        )
        fake.driver = module.CudaDriver(fake.driver.path)
        self.move(fake, (3, 1, 0, 7), small_pool(), batch_from=0)
        assert fake.count("batches") == len(calls)
        assert fake.count("cuMemcpyBatchAsync_v2") == 0

    def test_a_refusal_is_the_drivers_own(self, fake: Fake) -> None:
        backend, pool = fake.backend(batch_from=0), small_pool()
        chunk = chunk_for(pool)
        fake.set("fail_batch", 1)
        with (
            fake.owns(pool),
            pinned(backend, chunk),
            pytest.raises(DriverError, match=r"cuMemcpyBatchAsync_v2: .*\(2\), a fake one"),
        ):
            backend.gather(transfer_of(pool, chunk), range(4))
        backend.close()
        assert fake.left == 0


def test_a_vendors_choice_can_be_overruled() -> None:
    for policy in (cuda.POLICY, hip.POLICY):
        assert policy.forced("auto") == policy
        assert policy.forced("auto", 5) == replace(policy, grid=5)
        assert policy.forced("reach") == replace(policy, batch_from=None, staged_from=None)
        assert policy.forced("stage") == replace(policy, batch_from=None, staged_from=0)
        with pytest.raises(ValueError, match="'fast', choose from auto, reach, batch, stage"):
            policy.forced("fast")
    assert cuda.POLICY.forced("batch") == replace(cuda.POLICY, batch_from=0, staged_from=None)
    with pytest.raises(ValueError, match="choose reach or stage"):
        hip.POLICY.forced("batch")


def test_a_page_that_does_not_fit_the_staging_buffer_is_refused(fake: Fake) -> None:
    backend, pool = fake.backend(staging_bytes=32), small_pool()
    with pytest.raises(ValueError, match="page of 64 bytes does not fit the staging buffer of 32"):
        backend.gather(transfer_of(pool, chunk_for(pool)), range(4))


def test_pins_are_found_where_they_are_whole() -> None:
    pins = Pins()
    pins.add(1000, 100, 51_000)
    pins.add(1100, 100, 90_000)
    assert pins.find(1000, 100) == 51_000
    assert pins.find(1030, 70) == 51_030
    assert pins.find(1130, 70) == 90_030
    for host, size in ((999, 1), (1050, 51), (1050, 100), (1190, 11), (1200, 1), (5, 1)):
        assert pins.find(host, size) is None
    pins.remove(1000)
    assert pins.find(1000, 1) is None
    assert pins.find(1100, 1) == 90_000


def test_what_is_pinned_comes_from_the_devices_own_node(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(pinning, "node_of", lambda address: asked.append(address) or 3)
    monkeypatch.setattr(pinning, "prefer", lambda *slice_and_node: asked.append(slice_and_node))
    backend, arena = fake.backend(), Arena(4, 4096)
    pinner = Pinner(backend, arena.slices(2 * arena.slot_bytes))
    assert pinner.wait(10.0)
    assert asked == ["0000:3b:00.0", *((*one, 3) for one in arena.slices(2 * arena.slot_bytes))]
    pinner.close()
    backend.close()
    arena.close()


def test_an_arena_is_pinned_in_slices_of_whole_slots(fake: Fake, pool: PagedPool) -> None:
    arena = Arena(10, pool.chunk_bytes(4))
    backend = fake.backend()
    pinner = Pinner(backend, arena.slices(3 * arena.slot_bytes + 100))
    assert pinner.wait(10)
    assert fake.count("pinned") == 10 * arena.slot_bytes
    assert fake.count("pins") == 4
    pieces = [Piece(arena.address(slot), 4, 0, 4) for slot in (9, 3)]
    backend.gather(Transfer(pool, torch.arange(8), pieces), range(4))
    assert fake.count("to_host") == 0
    assert (
        bytes(arena.payload(3))
        == torch.stack([plane[4:] for plane in pool.planes]).numpy().tobytes()
    )
    pinner.close()
    backend.close()
    assert fake.left == 0
    arena.close()


def test_what_cannot_be_pinned_is_said_once_and_copied(
    fake: Fake, pool: PagedPool, caplog: pytest.LogCaptureFixture
) -> None:
    arena = Arena(10, pool.chunk_bytes(4))
    fake.set("pin_limit", 4 * arena.slot_bytes)
    backend = fake.backend()
    pinner = Pinner(backend, arena.slices(3 * arena.slot_bytes))
    assert pinner.wait(10)
    [line] = [record.message for record in caplog.records if record.name == "lmc"]
    assert "HostRegister" in line
    for slot in (2, 3):
        backend.gather(transfer_at(pool, arena.address(slot)), range(4))
        assert bytes(arena.payload(slot)[:64]) == bytes(pool.planes[0][3])
    assert fake.count("to_host") == 1
    pinner.close()
    backend.close()
    assert fake.left == 0
    arena.close()


# --- order


class Engine:
    """A stream in which a model writes pages, and reads them."""

    def __init__(self, fake: Fake, pool: PagedPool) -> None:
        self.fake, self.pool = fake, pool
        fake.driver.use(0)
        self.stream = fake.driver.stream()
        self.plane = pool.planes[0]
        fake.library.fake_own(ctypes.c_void_p(self.plane.data_ptr()), ctypes.c_size_t(512))

    def write(self, pages: torch.Tensor) -> None:
        self.fake.driver.to_device(self.plane.data_ptr(), pages.data_ptr(), 512, self.stream)

    def read(self, into: torch.Tensor) -> None:
        self.fake.driver.to_host(into.data_ptr(), self.plane.data_ptr(), 512, self.stream)

    def finish(self) -> None:
        event = self.fake.driver.event()
        self.fake.driver.event_record(event, self.stream)
        self.fake.driver.event_wait(event)
        self.fake.driver.event_end(event)

    def end(self) -> None:
        self.fake.driver.stream_end(self.stream)
        self.fake.library.fake_disown(ctypes.c_void_p(self.plane.data_ptr()))


@pytest.fixture
def pool() -> PagedPool:
    return small_pool()


@pytest.fixture
def engine(fake: Fake, pool: PagedPool) -> Engine:
    return Engine(fake, pool)


@pytest.fixture(params=[None, 0], ids=["reaching", "staged"])
def copier(fake: Fake, engine: Engine, request: pytest.FixtureRequest) -> Iterator[StreamCopier]:
    copier = StreamCopier(fake.backend(staged_from=request.param), lambda: [engine.stream])
    yield copier
    copier.close()
    engine.end()
    assert fake.left == 0


def first_pages(chunk: torch.Tensor, pages: int = 4) -> torch.Tensor:
    return chunk[: pages * 64].view(pages, 64)


def test_a_store_waits_for_the_step_that_writes_the_pages(
    copier: StreamCopier, engine: Engine, pool: PagedPool
) -> None:
    chunk, written = chunk_for(pool), torch.randint(256, (8, 64), dtype=torch.uint8)
    engine.write(written)
    job = copier.store([transfer_of(pool, chunk)])
    assert not job.done()  # nothing waits for it here
    assert job.wait(5)
    assert job.error is None
    assert torch.equal(first_pages(chunk), written[[3, 1, 0, 7]])


def test_a_load_waits_for_the_step_that_reads_the_pages(
    copier: StreamCopier, engine: Engine, pool: PagedPool
) -> None:
    before, seen = pool.planes[0].clone(), torch.zeros(8, 64, dtype=torch.uint8)
    chunk = torch.randint(256, (pool.chunk_bytes(4),), dtype=torch.uint8)
    engine.read(seen)
    job = copier.load([transfer_of(pool, chunk)])
    assert job.wait(5)
    engine.finish()
    assert torch.equal(seen, before)
    assert torch.equal(pool.planes[0][[3, 1, 0, 7]], first_pages(chunk))


def test_a_step_waits_for_the_layer_it_needs(
    copier: StreamCopier, engine: Engine, pool: PagedPool
) -> None:
    chunk = torch.randint(256, (pool.chunk_bytes(4),), dtype=torch.uint8)
    seen = torch.zeros(8, 64, dtype=torch.uint8)
    job = copier.load([transfer_of(pool, chunk)], layers=True)
    job.let_wait(0)
    engine.read(seen)
    engine.finish()
    assert torch.equal(seen[[3, 1, 0, 7]], first_pages(chunk))
    assert job.wait(5)
    job.let_wait(1)  # all is over: nothing to wait for


def test_a_store_in_a_hurry_does_not_wait_for_others(
    copier: StreamCopier, pool: PagedPool, fake: Fake
) -> None:
    slow, urgent = chunk_for(pool), chunk_for(pool)
    others = copier.store([transfer_of(pool, slow)])
    job = copier.store([transfer_of(pool, urgent)], hurry=True)
    assert job.wait(5)
    assert torch.equal(first_pages(urgent), pool.planes[0][[3, 1, 0, 7]])
    assert not slow.any()
    assert others.wait(5)


def test_a_step_that_reuses_pages_waits_for_the_stores_of_them(
    copier: StreamCopier, engine: Engine, pool: PagedPool
) -> None:
    chunk, before = chunk_for(pool), pool.planes[0].clone()
    job = copier.store([transfer_of(pool, chunk)])
    copier.fence([job])
    assert not job.done()
    engine.write(torch.zeros(8, 64, dtype=torch.uint8))
    engine.finish()
    assert torch.equal(first_pages(chunk), before[[3, 1, 0, 7]])
    assert job.wait(5)
    copier.fence([job])  # over: nothing to wait for


def test_a_step_that_reuses_pages_waits_for_the_load_of_them(
    copier: StreamCopier, engine: Engine, pool: PagedPool
) -> None:
    """Nobody read a layer of it, and it is given up while it is under way."""
    chunk = torch.randint(256, (pool.chunk_bytes(4),), dtype=torch.uint8)
    written = torch.randint(256, (8, 64), dtype=torch.uint8)
    job = copier.load([transfer_of(pool, chunk)], layers=True)
    copier.fence([job])
    engine.write(written)
    engine.finish()
    assert job.wait(5)
    assert torch.equal(pool.planes[0], written)


# --- what goes wrong


@pytest.mark.parametrize("fatal", [1, 2])
def test_a_launch_that_fails_ends_its_job(
    fake: Fake, engine: Engine, pool: PagedPool, fatal: int
) -> None:
    copier = StreamCopier(fake.backend(), lambda: [engine.stream])
    chunk = chunk_for(pool)
    fake.set("fail_launch", fatal)
    job = copier.load([transfer_of(pool, chunk)], layers=True)
    assert isinstance(job.error, DriverError)  # known before it is over
    job.let_wait(1)  # a layer that never comes
    assert job.wait(5)
    name = {"cuda": "CUDA_ERROR_LAUNCH_FAILED", "hip": "hipErrorLaunchFailure"}[fake.vendor]
    assert f"LaunchKernel: {name} (719), a fake one" in str(job.error)
    assert copier.store([transfer_of(pool, chunk)]).wait(5)  # the next one goes on
    copier.close()
    engine.end()
    assert fake.left == 0


def test_a_wait_that_the_driver_refuses_makes_its_job_one_that_failed(
    fake: Fake, engine: Engine, pool: PagedPool
) -> None:
    """The step may have read a layer before it was there."""
    streams = [engine.stream]
    copier = StreamCopier(fake.backend(), lambda: streams)
    job = copier.load([transfer_of(pool, chunk_for(pool))], layers=True)
    streams[:] = [1]  # a stream that nobody made
    job.let_wait(0)
    assert isinstance(job.error, DriverError)
    assert job.wait(5)
    copier.close()


def test_kernels_run_in_streams_and_torchs_ops_in_threads(fake: Fake) -> None:
    for backend, kind in ((fake.backend(), StreamCopier), (TorchBackend(), ThreadCopier)):
        copier = copier_of(backend, list)
        assert type(copier) is kind
        copier.close()


@pytest.mark.parametrize("call", ["fail_copy", "fail_launch"])
def test_after_a_call_that_failed_the_next_op_is_right_and_nothing_is_lost(
    fake: Fake, pool: PagedPool, call: str
) -> None:
    backend, chunk = fake.backend(), chunk_for(pool)
    fake.set(call, 1)  # of copies, the first is that of the pool's table
    with pytest.raises(DriverError):
        backend.gather(transfer_of(pool, chunk), range(4))
    backend.gather(transfer_of(pool, chunk), range(4))
    assert torch.equal(first_pages(chunk), pool.planes[0][[3, 1, 0, 7]])
    backend.close()
    assert fake.left == 0


def test_memory_without_an_address_on_the_device_is_not_left_pinned(fake: Fake) -> None:
    fake.driver.use(0)
    fake.set("no_address", 1)
    memory = torch.zeros(4096, dtype=torch.uint8)
    with pytest.raises(DriverError, match="GetDevicePointer"):
        fake.driver.pin(memory.data_ptr(), 4096)
    assert fake.left == 0


def test_memory_that_cannot_be_pinned_is_named_and_copied_all_the_same(
    fake: Fake, pool: PagedPool
) -> None:
    backend, chunk = fake.backend(), chunk_for(pool)
    fake.set("pin_limit", 100)
    with pytest.raises(DriverError, match=r"HostRegister.*\(2\)"):
        fake.driver.pin(chunk.data_ptr(), chunk.numel())
    backend.gather(transfer_of(pool, chunk), range(4))
    assert torch.equal(first_pages(chunk), pool.planes[0][[3, 1, 0, 7]])


def test_an_event_that_never_comes_holds_its_buffers_and_nobody_else(
    fake: Fake, engine: Engine, pool: PagedPool
) -> None:
    copier = StreamCopier(fake.backend(), lambda: [engine.stream])
    chunk = chunk_for(pool)
    fake.set("stuck", 1)
    stuck = copier.store([transfer_of(pool, chunk)])
    fake.set("stuck", 0)
    assert not stuck.wait(0.01)
    assert stuck.error is None
    other = copier.store([transfer_of(pool, chunk)])
    assert other.wait(5)
    assert {buffer.host for buffer in stuck._held}.isdisjoint(
        buffer.host for buffer in copier._backend._free
    )


def test_the_host_address_of_pinned_memory_is_no_address_on_the_device(
    fake: Fake, pool: PagedPool
) -> None:
    """What the fake is for: a launcher that forgets to ask breaks the context."""
    backend, chunk = fake.backend(), chunk_for(pool)
    host = chunk.data_ptr()
    device = fake.driver.pin(host, chunk.numel())
    assert device != host
    backend.pins.add(host, chunk.numel(), host)
    with pytest.raises(DriverError, match=r"\(700\)"):
        backend.gather(transfer_of(pool, chunk), range(4))
