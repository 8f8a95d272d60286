#!/usr/bin/env python3
"""Planted bugs, one at a time, in a copy of the repository: the tests of their part must see each.

    python ci/mutants.py              all of them, two at a time
    python ci/mutants.py vllm pin     those of a suite, and those whose names contain a word

The list is mutants.toml: a piece of source, and what it is replaced by. Where the piece is not
found exactly once the list is out of date, which is an error as well. Prints each bug, and the test
that saw it. Those in device code are for tests/kernels: test_planted.py and test_planted_triton.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("lmc", "integrations", "tests", "ci", "pyproject.toml", "README.md")
TIMEOUT_S = 200


class Suite(NamedTuple):
    """Tests that see the bugs of a part of the source, with the Python of an environment."""

    folder: str
    tests: list[str]
    env: str = "dev"

    @property
    def python(self) -> str:
        own = ROOT / ".venvs" / self.env / "bin" / "python"
        return str(own) if self.env != "dev" else sys.executable


CORE = ["tests/core", "--deselect", "tests/core/test_process_memory.py"]
SUITES = {
    "core": Suite("lmc", [*CORE, "--hypothesis-profile=no-shrink"]),
    "launch": Suite("lmc", ["tests/kernels/test_driver.py", "tests/transfer/test_copier.py"]),
    "sglang": Suite(
        "integrations/lmc_sglang",
        ["tests/integrations/test_gpu.py", "tests/integrations/test_linker.py"],
        "sglang",
    ),
    "models": Suite(
        "integrations/lmc_sglang",
        ["tests/integrations/test_models.py", "tests/integrations/test_patience.py"],
        "sglang",
    ),
    "ranks": Suite(
        "integrations/lmc_sglang",
        ["tests/integrations/test_identity.py", "tests/integrations/test_ranks.py"],
        "sglang",
    ),
    "tenants": Suite("integrations/lmc_sglang", ["tests/integrations/test_tenants.py"], "sglang"),
    "vllm": Suite(
        "integrations/lmc_vllm",
        ["tests/integrations/vllm", "-m", "not slow and not gpu", "--benchmark-disable"],
        "vllm",
    ),
}


class Bug(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    suite: str = "core"

    @property
    def path(self) -> str:
        return f"{SUITES[self.suite].folder}/{self.file}"


class KernelBug(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    seen_by: list[str]  # ways to run device code

    @property
    def path(self) -> str:
        return f"lmc/{self.file}"


def planted() -> list[Bug]:
    return [Bug(**bug) for bug in _listed()["bug"]]


def planted_kernels() -> list[KernelBug]:
    return [KernelBug(**bug) for bug in _listed()["kernel"]]


def planted_triton() -> list[KernelBug]:
    return [KernelBug(**bug) for bug in _listed()["triton"]]


def _listed() -> dict[str, list[dict[str, Any]]]:
    return tomllib.loads(ROOT.joinpath("ci", "mutants.toml").read_text(encoding="utf-8"))


def copy(source: Path, folder: Path) -> None:
    """What the tests need of a repository."""
    for part in COPIED:
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source / part, folder / part, ignore=leave)
        else:
            shutil.copy(source / part, folder / part)


def plant(bug: Bug | KernelBug, folder: Path) -> None:
    """Put a bug into a copy. Raises ValueError if it does not fit."""
    path = folder / bug.path
    text = path.read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: found {text.count(bug.old)} times in {bug.path}")
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")


def run_tests(folder: Path, suite: Suite) -> tuple[int, str]:
    """pytest's exit status (1: a test failed), and the first test that failed; a hang counts as
    one.
    """
    command = [suite.python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *suite.tests]
    places = f"{folder}{os.pathsep}{folder / 'integrations'}"
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": places}
    try:
        done = subprocess.run(
            [*command, "--tb=no"],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"hangs (ended after {TIMEOUT_S} s)"
    seen = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return done.returncode, seen[1] if seen else done.stdout[-500:]


def judge(bug: Bug, clean: Path) -> str | None:
    """Why a bug counts as not seen, or None; says how it went."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(clean, folder)
        try:
            plant(bug, folder)
        except ValueError as error:
            print(f"OUT OF DATE  {error}", flush=True)
            return "out of date"
        status, seen = run_tests(folder, SUITES[bug.suite])
    took = f"{time.monotonic() - started:5.1f} s"
    if status == 1:
        print(f"seen     {took}  {bug.name}: {seen}", flush=True)
        return None
    print(f"NOT SEEN {took}  {bug.name}: {seen if status else 'all tests pass'}", flush=True)
    return "not seen"


def main(words: list[str]) -> int:
    bugs = [
        bug
        for bug in planted()
        if not words or bug.suite in words or any(word in bug.name for word in words)
    ]
    with tempfile.TemporaryDirectory() as place:
        clean = Path(place)
        copy(ROOT, clean)
        for name in sorted({bug.suite for bug in bugs}):
            status, seen = run_tests(clean, SUITES[name])
            if status:
                print(f"the tests of {name} fail without a planted bug: {seen}")
                return 2
        with ThreadPoolExecutor(2) as pool:
            missed = [why for why in pool.map(lambda bug: judge(bug, clean), bugs) if why]
    print(f"{len(bugs) - len(missed)} of {len(bugs)} planted bugs seen")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
