"""The native library checks what it is given before it writes, whoever calls it."""

from array import array

import pytest
import torch

from lmc import cpu
from lmc.cpu import CopyPath, NativeError, Pages

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

PAGES, ROW, CHUNK_PAGES = 4, 8, 3


class Call:
    """A valid call on one plane and one chunk; tests spoil one thing."""

    def __init__(self) -> None:
        self.pool = torch.arange(PAGES * ROW, dtype=torch.uint8)
        self.chunk = torch.full((CHUNK_PAGES * ROW,), 0xEE, dtype=torch.uint8)
        self.ids = torch.tensor([2, 0])
        self.planes = [self.pool.data_ptr(), PAGES, ROW, ROW]
        self.piece = [self.chunk.data_ptr(), CHUNK_PAGES, 1, 2]
        self.chosen = range(1)
        self.num_ids = 2

    def gather(self, path: CopyPath = CopyPath.BEST) -> None:
        planes, pieces = array("q", self.planes), array("q", self.piece)
        Pages(path).gather(planes, self.chosen, pieces, self.ids.data_ptr(), self.num_ids)


def test_a_valid_call_moves_its_pages() -> None:
    call = Call()
    call.gather()
    assert call.chunk.view(CHUNK_PAGES, ROW)[1:].tolist() == [[*range(16, 24)], [*range(8)]]
    assert call.chunk[:ROW].tolist() == [0xEE] * ROW


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("planes", [0, PAGES, ROW, ROW], "a plane has no address"),
        ("planes", [64, 0, ROW, ROW], "no pages"),
        ("planes", [64, PAGES, ROW, 0], "no bytes"),
        ("planes", [64, PAGES, ROW - 1, ROW], "overlapping pages"),
        ("chosen", range(2), "range of planes"),
        ("chosen", range(-1, 1), "range of planes"),
        ("chosen", range(1, 0), "range of planes"),
        ("piece", [0, CHUNK_PAGES, 1, 2], "a piece has no address"),
        ("piece", [64, CHUNK_PAGES, 2, 2], "outside its chunk"),
        ("piece", [64, CHUNK_PAGES, -1, 2], "outside its chunk"),
        ("piece", [64, CHUNK_PAGES, 1, -2], "outside its chunk"),
        ("piece", [64, 2**62, 1, 2**62], "outside its chunk"),
        ("num_ids", 1, "not as many"),
        ("num_ids", 3, "not as many"),
        ("ids", torch.tensor([0, PAGES]), "page id"),
        ("ids", torch.tensor([0, -1]), "page id"),
    ],
)
def test_a_spoiled_call_is_refused_before_a_write(field: str, value: object, reason: str) -> None:
    call = Call()
    setattr(call, field, value)
    with pytest.raises(NativeError, match=reason):
        call.gather()
    assert call.chunk.tolist() == [0xEE] * len(call.chunk)


def test_an_unknown_copy_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NativeError, match="cannot copy that way"):
        Call().gather(9)  # type: ignore[arg-type]


def test_the_processor_is_asked() -> None:
    with open("/proc/cpuinfo") as info:
        assert cpu.supports(CopyPath.AVX2) == (" avx2 " in info.read())
    assert cpu.supports(CopyPath.PORTABLE)
