"""The kernels on a real GPU, by torch's own driver: every case in every way, the order of streams,
and how fast it is. Where this was written there was none: it never ran.

    pytest tests/kernels/test_gpu.py -m gpu
    pytest tests/kernels/test_gpu.py -m gpu --benchmark-enable -s
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from lmc.kernels import compile_pages
from lmc.kernels.proof import How
from lmc.transfer.gpu import GpuBackend
from lmc.transfer.ops import Backend
from lmc.transfer.pages import PagedPool, Piece, Transfer
from lmc.transfer.reference import TorchBackend
from lmc.transfer.streams import copier_of

from .cases import CASES, Case
from .test_driver import WAYS, Pinned

pytestmark = pytest.mark.gpu

MIB = 1 << 20


@pytest.fixture(scope="module")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["image", "triton"])
def backend(device: torch.device, request: pytest.FixtureRequest) -> Iterator[GpuBackend]:
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed here")
        backend = GpuBackend.of(device, compile_pages)
    else:
        backend = GpuBackend.of(device)
    yield backend
    backend.close()


def arch_of(device: torch.device) -> str:
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return found.gcnArchName.partition(":")[0]
    return f"sm_{found.major}{found.minor}"


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if isinstance(case, Case)])
@pytest.mark.parametrize("way", WAYS)
def test_every_case_moves_its_bytes(
    backend: GpuBackend, device: torch.device, way: str, case: str, proves: Callable[..., None]
) -> None:
    policy, pins = WAYS[way]
    backend.policy = replace(backend.policy, **policy)
    found = CASES[case]
    assert isinstance(found, Case)
    got = found(Pinned(backend) if pins else backend, device)
    assert all(map(torch.equal, got, found(TorchBackend())))
    if way != "in a batch":  # which may be copy engines alone
        proves(arch_of(device), How.GPU)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if isinstance(case, Case)])
def test_torch_moves_its_bytes(device: torch.device, case: str) -> None:
    found = CASES[case]
    assert isinstance(found, Case)
    assert all(map(torch.equal, found(TorchBackend(), device), found(TorchBackend())))


def pool_on(device: torch.device, page_bytes: int, pages: int) -> PagedPool:
    return PagedPool([torch.zeros(pages, page_bytes, dtype=torch.uint8, device=device)])


def test_stores_and_loads_keep_their_place_among_the_models_steps(
    backend: GpuBackend, device: torch.device
) -> None:
    keep_their_place(backend, device)


def test_stores_and_loads_of_torch_keep_their_place(device: torch.device) -> None:
    keep_their_place(TorchBackend(), device)


def keep_their_place(backend: Backend, device: torch.device) -> None:
    pool, chunk = pool_on(device, 4096, 4096), torch.zeros(16 * MIB, dtype=torch.uint8)
    stream = torch.cuda.Stream(device)
    copier = copier_of(backend, lambda: [stream.cuda_stream])
    copier.pin(lambda _: [(chunk.data_ptr(), chunk.numel())])
    transfer = Transfer(pool, torch.randperm(4096), [Piece(chunk.data_ptr(), 4096, 0, 4096)])
    for value in range(1, 20):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)  # a step that takes its time
            pool.planes[0].fill_(value)
        store = copier.store([transfer])
        copier.fence([store])
        with torch.cuda.stream(stream):
            pool.planes[0].zero_()
        assert store.wait(10)
        assert store.error is None
        assert bool((chunk == value).all())
        load = copier.load([transfer])
        assert load.wait(10)
        assert bool((pool.planes[0] == value).all())
    copier.close()


@pytest.mark.parametrize("page_bytes", [512, 2048, 16384, 131072])
@pytest.mark.parametrize("grid", [2, 8, 32, 128])
@pytest.mark.parametrize("op", ["gather", "scatter"])
def test_rate_by_page_and_grid(
    backend: GpuBackend, device: torch.device, benchmark, page_bytes: int, grid: int, op: str
) -> None:
    """32 MiB in pinned memory, beside one copy of as many bytes."""
    backend.policy = replace(backend.policy, grid=grid, staged_from=None)
    pages = 32 * MIB // page_bytes
    pool = pool_on(device, page_bytes, 2 * pages)
    chunk = torch.zeros(32 * MIB, dtype=torch.uint8)
    address = backend.driver.pin(chunk.data_ptr(), chunk.numel())
    backend.pins.add(chunk.data_ptr(), chunk.numel(), address)
    transfer = Transfer(
        pool, torch.randperm(2 * pages)[:pages], [Piece(chunk.data_ptr(), pages, 0, pages)]
    )
    benchmark(getattr(backend, op), transfer, range(1))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flat = pool.planes[0].view(-1)[: chunk.numel()]
    begin.record()
    (chunk.copy_ if op == "gather" else flat.copy_)(flat if op == "gather" else chunk)
    end.record()
    end.synchronize()
    backend.driver.unpin(chunk.data_ptr())
    if benchmark.enabled:
        took = benchmark.stats.stats.median
        benchmark.extra_info["GB/s"] = round(chunk.numel() / took / 1e9, 1)
        benchmark.extra_info["against one copy"] = round(begin.elapsed_time(end) / 1e3 / took, 2)
