"""Every backend moves exactly the bytes that plain indexing says, and refuses the rest."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmc import cpu
from lmc.config import KERNELS
from lmc.transfer.ops import Backend, gather, resolve, scatter
from lmc.transfer.pages import PagedPool, Piece
from lmc.transfer.reference import TorchBackend

from .conftest import Chunk, random_pool

every_case = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass
class Case:
    pool: PagedPool
    chunks: list[Chunk]
    pieces: list[Piece]
    page_ids: torch.Tensor
    planes: range


@st.composite
def cases(draw: st.DrawFn, repeats: bool) -> Case:
    rows = st.sampled_from([1, 3, 32, 60, 64, 96, 128, 576, 768, 1000, 4096])
    page_bytes = draw(st.lists(rows, min_size=1, max_size=4))
    num_pages = draw(st.integers(1, 24))
    pool = random_pool(
        page_bytes,
        num_pages,
        gap=draw(st.sampled_from([0, 0, 1, 32])),
        shift=draw(st.sampled_from([0, 0, 1, 32, 63])),
    )
    page = st.integers(0, num_pages - 1)
    ids = draw(st.lists(page, max_size=24, unique=not repeats))
    if draw(st.booleans()):
        ids.sort()  # runs of consecutive pages
    chunks, pieces = [], []
    left = len(ids)
    while left or not pieces:
        pages = draw(st.integers(min(1, left), left))
        first, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        chunk = Chunk(pool, max(1, first + pages + after), shift=draw(st.sampled_from([0, 1, 32])))
        chunks.append(chunk)
        pieces.append(chunk.piece(min(first, chunk.num_pages - pages), pages))
        left -= pages
    start = draw(st.integers(0, len(page_bytes)))
    stop = draw(st.integers(start, len(page_bytes)))
    return Case(pool, chunks, pieces, torch.tensor(ids, dtype=torch.int64), range(start, stop))


def page_slices(case: Case) -> list[tuple[int, int, torch.Tensor]]:
    """(plane, page id, the bytes of that page in its chunk): the layout, page by page."""
    found = []
    ids = iter(case.page_ids.tolist())
    for chunk, piece in zip(case.chunks, case.pieces, strict=True):
        for page in range(piece.first, piece.first + piece.pages):
            page_id = next(ids)
            for plane in case.planes:
                row = case.pool.page_bytes[plane]
                begin = sum(case.pool.page_bytes[:plane]) * chunk.num_pages + page * row
                found.append((plane, page_id, chunk.payload[begin : begin + row]))
    return found


@every_case
@given(case=cases(repeats=True))
def test_gather_fills_its_pieces_and_nothing_else(backend: Backend, case: Case) -> None:
    pool_before = [plane.clone() for plane in case.pool.planes]
    gather(case.pool, case.page_ids, case.pieces, case.planes, backend=backend)
    for plane, page_id, got in page_slices(case):
        assert torch.equal(got, pool_before[plane][page_id])
        got.fill_(0xEE)
    assert all(bool((chunk.memory == 0xEE).all()) for chunk in case.chunks)
    assert all(map(torch.equal, case.pool.planes, pool_before))


@every_case
@given(case=cases(repeats=False))
def test_scatter_fills_its_pages_and_nothing_else(backend: Backend, case: Case) -> None:
    for chunk in case.chunks:
        chunk.memory.random_(256)
    chunks_before = [chunk.memory.clone() for chunk in case.chunks]
    want = [_whole(plane).clone() for plane in case.pool.planes]
    for plane, page_id, page in page_slices(case):
        stride = case.pool.planes[plane].stride(0)
        want[plane][page_id * stride : page_id * stride + len(page)] = page
    scatter(case.pool, case.page_ids, case.pieces, case.planes, backend=backend)
    assert all(torch.equal(_whole(p), w) for p, w in zip(case.pool.planes, want, strict=True))
    memory = [chunk.memory for chunk in case.chunks]
    assert all(map(torch.equal, memory, chunks_before))


def _whole(plane: torch.Tensor) -> torch.Tensor:
    """The plane with the bytes between its pages."""
    length = (plane.shape[0] - 1) * plane.stride(0) + plane.shape[1]
    return plane.as_strided((length,), (1,))


def test_large_transfer_equals_the_reference(backend: Backend) -> None:
    """Above the size from which the cpu backend streams past the cache."""
    pool = random_pool([768, 2048, 576], 2048)
    ids = torch.randperm(2048)[:1024]
    ids[100:400] = torch.arange(700, 1000)
    got, want = Chunk(pool, 1024), Chunk(pool, 1024)
    gather(pool, ids, [got.piece(0, 100), got.piece(100)], backend=backend)
    gather(pool, ids, [want.piece()], backend=TorchBackend())
    assert torch.equal(got.payload, want.payload)


def test_gathered_pages_come_back(backend: Backend) -> None:
    pool = random_pool([96, 7], 32, layers=[0, 0])
    chunk = Chunk(pool, 16)
    ids = torch.randperm(32)[:16]
    before = [plane[ids] for plane in pool.planes]
    gather(pool, ids, [chunk.piece()], backend=backend)
    for plane in pool.planes:
        plane.zero_()
    new_ids = torch.randperm(32)[:16]
    scatter(pool, new_ids, [chunk.piece()], backend=backend)
    after = [plane[new_ids] for plane in pool.planes]
    assert all(map(torch.equal, after, before))


@pytest.mark.parametrize("op", [gather, scatter])
@pytest.mark.parametrize("bad", [-1, 8, 2**62])
def test_page_id_outside_the_pool_is_refused_before_a_write(op, bad: int, backend: Backend) -> None:
    pool = random_pool([64, 64], 8)
    chunk = Chunk(pool, 4)
    pool_before = [plane.clone() for plane in pool.planes]
    with pytest.raises(IndexError, match="outside a pool of 8 pages"):
        op(pool, torch.tensor([0, 1, bad, 2]), [chunk.piece()], backend=backend)
    assert bool((chunk.memory == 0xEE).all())
    assert all(map(torch.equal, pool.planes, pool_before))


@pytest.mark.parametrize(
    ("page_ids", "reason"),
    [
        (torch.zeros(4, dtype=torch.int32), "torch.int32"),
        (torch.zeros(2, 2, dtype=torch.int64), r"\(2, 2\)"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "on meta"),
        (torch.zeros(3, dtype=torch.int64), "3 page ids for pieces of 4 pages"),
        (torch.zeros(5, dtype=torch.int64), "5 page ids for pieces of 4 pages"),
    ],
)
def test_page_ids_of_the_wrong_kind_are_refused(page_ids: torch.Tensor, reason: str) -> None:
    pool = random_pool([64], 8)
    chunk = Chunk(pool, 4)
    with pytest.raises(ValueError, match=reason):
        gather(pool, page_ids, [chunk.piece()], backend=TorchBackend())


@pytest.mark.parametrize("planes", [range(-1, 1), range(3), range(0, 2, 2)])
def test_planes_outside_the_pool_are_refused(planes: range) -> None:
    pool = random_pool([64, 64], 8)
    with pytest.raises(ValueError, match="lies outside the planes"):
        gather(pool, torch.zeros(0, dtype=torch.int64), [], planes, backend=TorchBackend())


def test_strided_page_ids_are_read_right(backend: Backend) -> None:
    pool = random_pool([64], 8)
    chunk = Chunk(pool, 3)
    gather(pool, torch.tensor([7, 0, 2, 0, 5, 0])[::2], [chunk.piece()], backend=backend)
    assert torch.equal(chunk.payload.view(3, 64), pool.planes[0][[7, 2, 5]])


def test_resolve_names_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmc")
    assert resolve("torch", torch.device("cpu")).name == "torch"
    assert caplog.messages == ["lmc transfer backend: torch (asked for)"]


def test_resolve_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown kernels 'fast', choose from auto, cpu, cuda"):
        resolve("fast", torch.device("cpu"))


def test_auto_serves_other_devices_with_torch() -> None:
    assert resolve("auto", torch.device("meta")).name == "torch"
    with pytest.raises(ValueError, match="the pool is on meta"):
        resolve("cpu", torch.device("meta"))


def test_auto_takes_the_native_library_where_it_is_built() -> None:
    expected = "torch" if cpu.missing() else "cpu"
    assert resolve("auto", torch.device("cpu")).name == expected


def test_without_the_library_auto_falls_to_torch_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmc")
    monkeypatch.setattr(cpu, "_library", lambda: cpu.load(Path("/not/built.so")))
    assert resolve("auto", torch.device("cpu")).name == "torch"
    [line] = caplog.messages
    assert re.fullmatch(r"lmc transfer backend: torch \(/not/built.so: cannot open.*\)", line)
    with pytest.raises(ValueError, match=r"cannot serve this pool: /not/built\.so"):
        resolve("cpu", torch.device("cpu"))


@pytest.mark.parametrize("name", KERNELS)
def test_every_choice_of_the_setting_serves_or_is_refused_by_name(name: str) -> None:
    if name in ("cuda", "hip", "triton"):
        with pytest.raises(ValueError, match=f"'{name}' cannot serve .*the pool is on cpu"):
            resolve(name, torch.device("cpu"))
    elif name == "cpu" and (reason := cpu.missing()):
        pytest.skip(reason)
    else:
        assert resolve(name, torch.device("cpu")).name in KERNELS
