"""The kernels move what the torch reference moves, in every way to run them without a GPU."""

import ctypes
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lmc.kernels import BLOCK, PagesArgs
from lmc.kernels.proof import How
from lmc.transfer.native import CpuBackend
from lmc.transfer.pages import PagedPool, Piece, Transfer
from lmc.transfer.reference import TorchBackend

from .cases import CASES
from .executors import (
    AMD,
    HOSTS,
    PTX,
    ROOT,
    SANITIZE,
    Executor,
    Host,
    Interpreted,
    KernelBackend,
    host_library,
    run_sanitized,
)
from .memory import Fault

Executors = Callable[[str], Executor]
Proves = Callable[..., None]


class Loop:
    """A page at a time, by the words of `Transfer`: what the reference itself is judged by."""

    name = "loop"

    def gather(self, transfer: Transfer, planes: range) -> None:
        for in_pool, in_chunk, size in self._pages(transfer, planes):
            ctypes.memmove(in_chunk, in_pool, size)

    def scatter(self, transfer: Transfer, planes: range) -> None:
        for in_pool, in_chunk, size in self._pages(transfer, planes):
            ctypes.memmove(in_pool, in_chunk, size)

    def _pages(self, transfer: Transfer, planes: range) -> Iterator[tuple[int, int, int]]:
        for plane in planes:
            base, _, stride, size = transfer.pool.table[4 * plane : 4 * plane + 4]
            before = sum(transfer.pool.page_bytes[:plane])
            page_ids = iter(transfer.page_ids.tolist())
            for piece in transfer.pieces:
                chunk = piece.address + before * piece.chunk_pages
                for page in range(piece.first, piece.first + piece.pages):
                    yield base + next(page_ids) * stride, chunk + page * size, size


@pytest.mark.parametrize("case", CASES)
def test_the_reference_moves_what_a_loop_moves(case: str, proves: Proves) -> None:
    assert all(map(torch.equal, CASES[case](TorchBackend()), CASES[case](Loop())))
    proves("torch", How.EXECUTED)


@pytest.mark.parametrize("case", CASES)
def test_the_native_library_moves_what_the_reference_moves(case: str, proves: Proves) -> None:
    assert all(map(torch.equal, CASES[case](CpuBackend()), CASES[case](TorchBackend())))
    proves(f"cpu {platform.machine()}", How.EXECUTED)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", HOSTS)
def test_as_cpp_it_moves_what_the_reference_moves(
    name: str, case: str, executor_of: Executors
) -> None:
    got, want = map(CASES[case], (KernelBackend(executor_of(name)), TorchBackend()))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*PTX, *AMD])
def test_interpreted_it_moves_what_the_reference_moves(
    name: str, case: str, executor_of: Executors, proves: Proves
) -> None:
    got, want = map(CASES[case], (KernelBackend(executor_of(name)), TorchBackend()))
    assert all(map(torch.equal, got, want))
    proves(name, How.INTERPRETED)


@pytest.mark.parametrize("grid", [1, 2, 7, 64])
@pytest.mark.parametrize("wave", [1, 8, 32, 64, 256])
def test_any_grid_and_any_crew_will_do(grid: int, wave: int, executor_of: Executors) -> None:
    host = executor_of("hip-host")
    assert isinstance(host, Host)
    backend = KernelBackend(Host(host.path, wave), grid)
    for case in ("mla and its indexer", "odd rows", "recurrent states", "many short pieces"):
        got, want = map(CASES[case], (backend, TorchBackend()))
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("name", HOSTS)
def test_the_argument_is_the_struct_of_the_source(name: str, executor_of: Executors) -> None:
    host = executor_of(name)
    assert isinstance(host, Host)
    assert host.library.host_args_bytes() == len(bytes(PagesArgs()))
    assert host.library.host_block_threads() == BLOCK


@pytest.mark.parametrize("name", [*PTX, *AMD])
def test_words_of_all_widths_were_moved(name: str, executor_of: Executors) -> None:
    """The cases reach every path: each of them loads and stores by words of its own."""
    executor = executor_of(name)
    assert isinstance(executor, Interpreted)
    executor.executed.clear()
    for case in ("rows of 8", "rows of 4", "odd rows", "mla fp8"):
        CASES[case](KernelBackend(executor))
    ops = [op.split(".")[-2:] if name in PTX else op.split("_")[1:] for op in executor.executed]
    wide = [["cs", "u8"], ["cs", "u32"], ["cs", "u64"], ["v4", "u32"]]
    if name in AMD:
        wide = [["store", width] for width in ("byte", "dword", "dwordx2", "dwordx4")]
    assert all(width in ops for width in wide)


def stray_transfer() -> Transfer:
    """A page id past the pool, as a bug of ours would let it through."""
    memory = torch.zeros(6, 64, dtype=torch.uint8)  # the chunk as well: a pool keeps it
    pool = PagedPool([memory[2:]])
    transfer = Transfer(pool, torch.tensor([0, 1]), [Piece(memory.data_ptr(), 2, 0, 2)])
    transfer.page_ids[1] = 4
    return transfer


@pytest.mark.parametrize("name", [*PTX, *AMD])
def test_interpreters_see_a_read_outside_the_pool(name: str, executor_of: Executors) -> None:
    with pytest.raises(Fault, match="outside of every buffer"):
        KernelBackend(executor_of(name)).gather(stray_transfer(), range(1))


SANITIZED = """
import sys
from tests.kernels.executors import Host, KernelBackend, Path, judge
from tests.kernels.test_kernels import stray_transfer

backend = KernelBackend(Host(Path(sys.argv[1]), int(sys.argv[2])))
print(judge(backend), flush=True)
backend.gather(stray_transfer(), range(1))
"""


@pytest.mark.parametrize(("vendor", "wave"), [("cuda", 32), ("hip", 64)])
def test_sanitizers_pass_all_cases_and_see_a_stray_page(
    vendor: str, wave: int, tmp_path: Path, proves: Proves
) -> None:
    library = host_library(vendor, tmp_path, ROOT, SANITIZE)
    done = run_sanitized(SANITIZED, str(library), str(wave))
    assert done.stdout == "None\n", done.stderr
    assert "AddressSanitizer: heap-" in done.stderr
    assert "pages.h:" in done.stderr
    proves(f"{vendor} source", How.SANITIZED, len(CASES))
