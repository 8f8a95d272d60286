"""Pools and chunks for transfer tests, and every backend that works on this machine: also the GPUs'
kernels, compiled for the host.
"""

from collections.abc import Callable, Sequence

import pytest
import torch

from lmc import cpu
from lmc.transfer.native import CpuBackend
from lmc.transfer.ops import Backend
from lmc.transfer.pages import PagedPool, Piece
from lmc.transfer.reference import TorchBackend
from tests.kernels.executors import HOSTS, KernelBackend, make


def _cpu(path: cpu.CopyPath) -> Callable[[], Backend]:
    return lambda: CpuBackend(path)


BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": TorchBackend,
    "cpu-best": _cpu(cpu.CopyPath.BEST),
    "cpu-portable": _cpu(cpu.CopyPath.PORTABLE),
    "cpu-avx2": _cpu(cpu.CopyPath.AVX2),
}


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backend]:
    folder = tmp_path_factory.mktemp("hosts")
    return {name: KernelBackend(make(name, folder)) for name in HOSTS}


@pytest.fixture(params=[*BACKENDS, *HOSTS])
def backend(request: pytest.FixtureRequest, hosts: dict[str, Backend]) -> Backend:
    name: str = request.param
    if name in hosts:
        return hosts[name]
    if name.startswith("cpu"):
        if reason := cpu.missing():
            pytest.skip(reason)
        if name == "cpu-avx2" and not cpu.supports(cpu.CopyPath.AVX2):
            pytest.skip("this processor has no AVX2")
    return BACKENDS[name]()


class Chunk:
    """Host memory of one chunk, with `guard` bytes on both sides that must stay 0xEE."""

    GUARD = 64

    def __init__(self, pool: PagedPool, num_pages: int, shift: int = 0) -> None:
        self.num_pages = num_pages
        size = pool.chunk_bytes(num_pages)
        self.memory = torch.full((size + shift + 2 * self.GUARD,), 0xEE, dtype=torch.uint8)
        self.payload = self.memory[self.GUARD + shift : self.GUARD + shift + size]

    def piece(self, first: int = 0, pages: int | None = None) -> Piece:
        pages = self.num_pages - first if pages is None else pages
        return Piece(self.payload.data_ptr(), self.num_pages, first, pages)


def random_pool(
    page_bytes: list[int], num_pages: int, gap: int = 0, layers: Sequence[int] = (), shift: int = 0
) -> PagedPool:
    """Planes of random bytes; pages lie `gap` bytes apart and the first starts at byte `shift`."""
    planes = []
    for row in page_bytes:
        memory = torch.randint(256, (shift + num_pages * (row + gap),), dtype=torch.uint8)
        planes.append(memory[shift:].view(num_pages, row + gap)[:, :row])
    return PagedPool(planes, layers)
