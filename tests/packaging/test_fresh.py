"""The wheel beside torch and nothing else: the doctor is content, and pages go out and come back.

In every run of the tests; no registry is asked. torch and what it needs are links into the
environment of the tests, so numpy, pytest and all else there are out of sight.
"""

import json
import sys
import venv
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from .building import run

ROUND_TRIP = """
import sys
import torch
from lmc.transfer import PagedPool, Piece, gather, resolve, scatter

assert "numpy" not in sys.modules
backend = resolve("auto", torch.device("cpu"))
planes = [torch.randint(256, (9, 1000), dtype=torch.uint8) for _ in range(4)]
pool, ids = PagedPool(planes, [0, 0, 1, 1]), torch.tensor([7, 0, 3])
chunk = torch.zeros(pool.chunk_bytes(3), dtype=torch.uint8)
before = [plane.clone() for plane in planes]
gather(pool, ids, [Piece(chunk.data_ptr(), 3, 0, 3)], backend=backend)
for plane in planes:
    plane[ids] = 0
scatter(pool, ids, [Piece(chunk.data_ptr(), 3, 0, 3)], backend=backend)
assert all(map(torch.equal, planes, before))
print(backend.name)
"""


def needs(package: str) -> Iterator[str]:
    """It, and all that it depends on here."""
    yield package
    for text in metadata.requires(package) or ():
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            yield from needs(needed.name)


def link(package: str, site: Path) -> None:
    """All that a package has in site-packages."""
    found = metadata.distribution(package)
    for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        if not (site / name).exists() and not name.endswith(".pth"):
            (site / name).symlink_to(Path(str(found.locate_file(name))))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel, xxhash and torch."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv")
    (site,) = folder.glob("venv/lib/python*/site-packages")
    for package in {*needs("torch"), "xxhash"}:
        link(package, site)
    python = folder / "venv/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index")
    run(*pip, wheel, cwd=folder)
    return python


@pytest.fixture
def use(python: Path, tmp_path: Path) -> Callable[..., str]:
    """Output of that Python, in a folder that is not its own, with no compiler to be found."""
    return lambda *words: run(python, *words, cwd=tmp_path, PATH=str(tmp_path))


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 5_000_000


def test_it_is_that_wheel_and_only_torch_is_beside_it(
    use: Callable[..., str], python: Path
) -> None:
    assert use("-c", "import lmc; print(lmc.__file__)").startswith(str(python.parents[1]))
    hidden = "from importlib.util import find_spec; print(find_spec('numpy'), find_spec('pytest'))"
    assert use("-c", hidden) == "None None\n"


def test_the_doctor_is_content(use: Callable[..., str]) -> None:
    assert use("-m", "lmc", "doctor").endswith("\nhealthy\n")


def test_the_doctor_finds_every_object_and_moves_pages(use: Callable[..., str]) -> None:
    report = json.loads(use("-m", "lmc", "doctor", "--kernels", "--json"))
    assert report["healthy"] is True
    states = [(found["name"], found["state"]) for found in report["findings"]]
    assert states == [("proof", "ok"), *[("object", "ok")] * 13, ("device", "ok")]
    device = report["findings"][-1]["figures"]
    assert (device["backend"], device["differ"]) == ("cpu", [])


def test_pages_go_out_and_come_back(use: Callable[..., str]) -> None:
    assert use("-W", "ignore", "-c", ROUND_TRIP) == "cpu\n"
