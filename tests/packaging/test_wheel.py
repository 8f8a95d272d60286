"""The wheel and the editable install: built from a clean copy, used from an empty environment.

The registry is asked for what lmc depends on, and for missing build requirements.
"""

import os
import shutil
import struct
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from ci import native

ROOT = Path(__file__).parents[2]
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}

USE = """
import importlib, pkgutil, sys
from array import array

import lmc

with_torch_or_not_python = ("lmc.transfer", "lmc.testing", "lmc.__main__", "lmc.cpu.liblmc")
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


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Standard output of a command whose Python sees nothing of this checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LMC_"))}
    environment |= variables
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def clean_copy(target: Path) -> Path:
    """What a clone of this working tree would hold: no built library, no caches."""
    listed = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def build_flags() -> list[str]:
    try:
        native.check_compilers()
    except SystemExit:
        return []
    return ["--no-build-isolation"] if find_spec("setuptools") else []


def use(python: Path, folder: Path) -> str:
    """Where lmc was used from, in a folder that is not its own, with no compiler to be found."""
    return run(python, "-c", USE, cwd=folder, PATH=str(folder))


def empty_environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_copy(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", *build_flags())
    run(*pip, sources, "-w", out, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def archive(wheel: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel) as opened:
        yield opened


def test_one_wheel_serves_every_python_and_both_architectures(wheel: Path) -> None:
    tags = wheel.name.removesuffix(".whl").split("-", 2)[2]
    assert tags == "py3-none-manylinux2014_x86_64.manylinux2014_aarch64"
    assert wheel.stat().st_size < 5_000_000


def test_the_wheel_holds_the_packages_and_nothing_else(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} <= {"lmc", "lmc_sglang", "lmc_vllm"}
    assert "lmc/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert b"[sglang.srt.plugins]" in archive.read(entry_points)
    assert set(native.outputs()) <= set(names)


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
