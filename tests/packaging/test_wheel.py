"""The wheel and the editable install: built from a clean copy, used from an empty environment.

The registry is asked for what lmc depends on, and for missing build requirements.
"""

import struct
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ci import native

from .building import run

ELF_MACHINES = {"x86_64": 62, "aarch64": 183}

USE = """
import importlib, pkgutil, sys
from array import array

import lmc

with_torch_or_not_python = (
    "lmc.transfer", "lmc.testing", "lmc.__main__", "lmc.cli.try_kernels", "lmc.cpu.liblmc"
)
for module in pkgutil.walk_packages(lmc.__path__, "lmc."):
    if not module.name.startswith(with_torch_or_not_python):
        importlib.import_module(module.name)
assert "torch" not in sys.modules and "sglang" not in sys.modules

from lmc import cpu
assert cpu.missing() is None, cpu.missing()
pool, chunk, ids = array("B", range(32)), array("B", bytes(16)), array("q", [2, 0])
planes = array("q", [pool.buffer_info()[0], 4, 8, 8])
pieces = array("q", [chunk.buffer_info()[0], 2, 0, 2])
cpu.Pages().gather(planes, range(1), pieces, ids.buffer_info()[0], 2)
assert chunk.tolist() == [*range(16, 24), *range(8)]

from lmc import kernels
images = [kernels.load(image) for image in kernels.listed().values()]
assert len(images) == 13, len(images)
print(lmc.__file__)
"""

pytestmark = pytest.mark.slow


def use(python: Path, folder: Path) -> str:
    """Where lmc was used from, in a folder that is not its own, with no compiler to be found."""
    return run(python, "-c", USE, cwd=folder, PATH=str(folder))


def empty_environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.fixture
def archive(wheel: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel) as opened:
        yield opened


def test_one_wheel_serves_every_python_and_both_architectures(wheel: Path) -> None:
    tags = wheel.name.removesuffix(".whl").split("-", 2)[2]
    assert tags == "py3-none-manylinux2014_x86_64.manylinux2014_aarch64"


def test_the_wheel_holds_the_packages_and_nothing_else(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} <= {"lmc", "lmc_sglang", "lmc_vllm"}
    assert "lmc/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert b"[sglang.srt.plugins]" in archive.read(entry_points)
    assert {*native.outputs(), "lmc/kernels/proof.json"} <= set(names)


@pytest.mark.parametrize("arch", ELF_MACHINES)
def test_the_libraries_are_for_their_architecture_and_an_old_glibc(
    archive: zipfile.ZipFile, arch: str
) -> None:
    image = archive.read(f"lmc/cpu/liblmc_cpu_{arch}.so")
    assert image[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", image, 18) == (ELF_MACHINES[arch],)
    versions = {word for word in image.split(b"\0") if word.startswith(b"GLIBC_")}
    assert versions <= {b"GLIBC_2.2.5", b"GLIBC_2.14", b"GLIBC_2.17"}


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", wheel, cwd=tmp_path)
    assert use(python, tmp_path).startswith(str(tmp_path / "venv"))


def test_an_editable_install_builds_beside_the_source(sources: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", "-e", sources, cwd=tmp_path)
    assert use(python, tmp_path).startswith(str(sources))
