"""Bugs planted in the device code are seen by the executors that ci/mutants.toml names, and by no
other: what only a vendor's compiler gets wrong only its own code shows.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from ci import mutants, native

from .executors import PTX, ROOT, SANITIZE, KernelBackend, host_library, judge, make, run_sanitized

pytestmark = pytest.mark.slow

Bug = mutants.Bug | mutants.KernelBug
BUGS = mutants.planted_kernels()
CLEAN = mutants.Bug("none", "cuda/pages.cu", "pages.h", "pages.h")
SOURCES = {"cuda": native.CUDA_SOURCES, "hip": native.HIP_SOURCES}
INTERPRETED = {PTX[0]: "cuda", "gfx942": "hip", "gfx950": "hip"}

JUDGE_ALL = """
import json, os, signal, sys
from tests.kernels.executors import Host, KernelBackend, Path, judge

def seen(library):
    child = os.fork()  # which may write anywhere, or never end
    if child == 0:
        signal.alarm(60)
        backend = KernelBackend(Host(Path(library), int(sys.argv[1])))
        os._exit(judge(backend) is not None)
    return os.waitpid(child, 0)[1] != 0

print(json.dumps({library: seen(library) for library in sys.argv[2:]}))
"""


def with_bug(bug: Bug, folder: Path) -> Path:
    """A copy of the device code that has the bug."""
    for name in {*native.CUDA_SOURCES, *native.HIP_SOURCES}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    mutants.plant(bug, folder)
    return folder


def touched(bug: Bug, vendor: str) -> bool:
    return f"lmc/{bug.file}" in SOURCES[vendor]


@pytest.fixture(scope="module")
def seen_by_hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Of each bug, the executors on the host that see it: one process judges them all."""
    found: dict[str, set[str]] = {bug.name: set() for bug in (CLEAN, *BUGS)}
    for vendor, wave in (("cuda", "32"), ("hip", "64")):
        folders = {
            bug.name: with_bug(bug, tmp_path_factory.mktemp(vendor))
            for bug in (CLEAN, *BUGS)
            if touched(bug, vendor)
        }
        compiled = partial(host_library, vendor, flags=SANITIZE)
        with ThreadPoolExecutor() as pool:
            libraries = [*map(str, pool.map(compiled, folders.values(), folders.values()))]
        done = run_sanitized(JUDGE_ALL, wave, *libraries)
        verdicts = json.loads(done.stdout)
        for name, library in zip(folders, libraries, strict=True):
            if verdicts[library]:
                found[name].add(f"{vendor}-host")
    return found


def seen_by_interpreters(bug: Bug, folder: Path) -> set[str]:
    source = with_bug(bug, folder)
    names = [name for name, vendor in INTERPRETED.items() if touched(bug, vendor)]
    return {name for name in names if judge(KernelBackend(make(name, folder, source)))}


def test_without_a_bug_all_is_well(seen_by_hosts: dict[str, set[str]], tmp_path: Path) -> None:
    assert seen_by_hosts["none"] == set()
    assert seen_by_interpreters(CLEAN, tmp_path) == set()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_bug_is_seen(
    bug: mutants.KernelBug, seen_by_hosts: dict[str, set[str]], tmp_path: Path
) -> None:
    assert seen_by_hosts[bug.name] | seen_by_interpreters(bug, tmp_path) == set(bug.seen_by)
