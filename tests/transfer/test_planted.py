"""Bugs planted in the native library must be seen by a comparison with the torch reference."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lmc import cpu
from lmc.transfer.native import CpuBackend
from lmc.transfer.ops import Backend, gather, scatter
from lmc.transfer.reference import TorchBackend

from .conftest import Chunk, random_pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ziglang") is None, reason="needs the compiler in ziglang"),
]

SOURCE = Path(cpu.__file__).with_name("pages.c")
BUGS = {
    "none": ("LANES = 4,", "LANES = 4,"),
    "run too long": ("t->ids[at] + run) ++run", "t->ids[at] + run) run += 2"),
    "run across gaps": ("plane->page_stride == plane->page_bytes", "1"),
    "stride ignored": ("t->ids[at] * plane->page_stride", "t->ids[at] * plane->page_bytes"),
    "first ignored": (" + piece->first * row;", ";"),
    "planes of pieces mixed": ("before * piece->chunk_pages", "before * piece->pages"),
    "planes before skipped": ("if (p >= t->first_plane) move_plane", "move_plane"),
    "tail dropped": ("memcpy(to + i, from + i, (size_t)(n - i));", ""),
    "lanes swapped": ("stream_128(to + 2 * n + i, c + i)", "stream_128(to + 2 * n + i, d + i)"),
    "lane tail dropped": ("stream_64(to + k * n + i, from[k] + i);", ";"),
    "lanes past the end": ("at + LANES <= end", "1"),
}


def library_with(bug: str, folder: Path) -> Path:
    old, new = BUGS[bug]
    text = SOURCE.read_text()
    assert text.count(old) == 1, f"the bug {bug!r} has no place of its own"
    (folder / "pages.c").write_text(text.replace(old, new))
    compiler = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-O2",
        "-fPIC",
        "-shared",
        "-nostdlib",
        "-lc",
    ]
    subprocess.run([*compiler, "pages.c", "-o", "pages.so"], cwd=folder, check=True)
    return folder / "pages.so"


def same_as_reference(backend: Backend, row: int, gap: int) -> bool:
    """Moves some of the planes of two pieces both ways, with runs and jumps among the page ids."""
    pool = random_pool([row, 64, row], 64, gap)
    ids = torch.tensor([9, 10, 11, 12, 13, 40, 3, 60, 22, 23, 5, 6, 50, 33, 1])
    chunks = [Chunk(pool, 16), Chunk(pool, 16)]
    before = [plane.clone() for plane in pool.planes]
    seen = []
    for mover in (backend, TorchBackend()):
        for chunk in chunks:
            chunk.memory.fill_(0xEE)
        pieces = [chunks[0].piece(2, 9), chunks[1].piece(0, 6)]
        gather(pool, ids, pieces, range(1, 3), backend=mover)
        gathered = [chunk.memory.clone() for chunk in chunks]
        scatter(pool, ids.flip(0), pieces, range(1, 3), backend=mover)
        seen.append(gathered + [plane.clone() for plane in pool.planes])
        for plane, original in zip(pool.planes, before, strict=True):
            plane.copy_(original)
    return all(map(torch.equal, *seen))


@pytest.mark.parametrize("bug", BUGS)
def test_the_reference_sees(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = cpu.load(library_with(bug, tmp_path))
    monkeypatch.setattr(cpu, "_library", lambda: library)
    backends = [CpuBackend(path) for path in cpu.CopyPath if cpu.supports(path)]
    cases = [
        (backend, row, gap) for backend in backends for row in (7, 192, 1024) for gap in (0, 64)
    ]
    assert all(same_as_reference(*case) for case in cases) == (bug == "none")
