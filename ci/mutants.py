#!/usr/bin/env python3
"""Planted bugs, one at a time, in a copy of the repository: the core's tests must see each of them.

    python ci/mutants.py              all of them, two at a time
    python ci/mutants.py pin leaf     those whose names contain one of these words

The list is mutants.toml: a piece of source, and what it is replaced by. Where the piece is not
found exactly once the list is out of date, which is an error as well. Prints each bug, and the test
that saw it. Those in device code are for tests/kernels/test_planted.py.
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
COPIED = ("lmc", "tests/core", "pyproject.toml")
TESTS = ["tests/core", "--deselect", "tests/core/test_process_memory.py"]
TIMEOUT_S = 150


class Bug(NamedTuple):
    name: str
    file: str
    old: str
    new: str


class KernelBug(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    seen_by: list[str]  # ways to run device code


def planted() -> list[Bug]:
    return [Bug(**bug) for bug in _listed()["bug"]]


def planted_kernels() -> list[KernelBug]:
    return [KernelBug(**bug) for bug in _listed()["kernel"]]


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
    path = folder / "lmc" / bug.file
    text = path.read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: found {text.count(bug.old)} times in lmc/{bug.file}")
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")


def run_tests(folder: Path) -> tuple[int, str]:
    """pytest's exit status (1: a test failed), and the first test that failed; a hang counts as
    one.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    try:
        done = subprocess.run(
            [*command, "--tb=no", "--hypothesis-profile=no-shrink"],
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
        status, seen = run_tests(folder)
    took = f"{time.monotonic() - started:5.1f} s"
    if status == 1:
        print(f"seen     {took}  {bug.name}: {seen}", flush=True)
        return None
    print(f"NOT SEEN {took}  {bug.name}: {seen if status else 'all tests pass'}", flush=True)
    return "not seen"


def main(words: list[str]) -> int:
    bugs = [bug for bug in planted() if not words or any(word in bug.name for word in words)]
    with tempfile.TemporaryDirectory() as name:
        clean = Path(name)
        copy(ROOT, clean)
        status, seen = run_tests(clean)
        if status:
            print(f"the tests fail without a planted bug: {seen}")
            return 2
        with ThreadPoolExecutor(2) as pool:
            missed = [why for why in pool.map(lambda bug: judge(bug, clean), bugs) if why]
    print(f"{len(bugs) - len(missed)} of {len(bugs)} planted bugs seen")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
