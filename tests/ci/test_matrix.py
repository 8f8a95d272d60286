"""ci/matrix.yml runs what is there: its commands, files, options and markers."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from lmc.__main__ import parser

ROOT = Path(__file__).parents[2]
FILE = ROOT / "ci/matrix.yml"
JOBS = ("cpu", "cuda", "rocm")
GPU_RUNS = (
    "-m pytest -m gpu tests/kernels --write-parity",
    "-m lmc doctor --kernels --json",
)


def jobs() -> dict[str, str]:
    """The text of each job, as YAML is not in every environment of the tests."""
    text = FILE.read_text(encoding="utf-8").partition("\njobs:\n")[2]
    _, *parts = re.split(r"^  (\w+):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def commands(job: str) -> list[str]:
    found = []
    for block, one in re.findall(r"^ +- run: (?:\|\n((?: {10}.*\n)+)|(.+))", job, re.MULTILINE):
        found += [line.strip() for line in block.splitlines()] or [one]
    return found


ALL = [(name, command) for name, job in jobs().items() for command in commands(job)]


def test_the_three_kinds_of_machines_are_there() -> None:
    assert tuple(jobs()) == JOBS
    assert "bash ci/test.sh" in commands(jobs()["cpu"])
    for name in ("cuda", "rocm"):
        assert f"[self-hosted, linux, x64, {name}]" in jobs()[name]
        python = ".venv/bin/python "
        assert [c.removeprefix(python) for c in commands(jobs()[name])[-2:]] == [*GPU_RUNS]
    assert "--device=/dev/kfd --device=/dev/dri" in jobs()["rocm"]
    assert "ci/requirements/torch.txt" not in jobs()["rocm"]


@pytest.mark.parametrize(("job", "command"), ALL)
def test_every_command_names_what_is_there(job: str, command: str) -> None:
    words = shlex.split(command)
    for word in words:
        if re.match(r"(ci|tests|lmc)/", word):
            assert (ROOT / word).exists(), word
    if words[1:3] == ["-m", "lmc"]:
        parser().parse_args(words[3:])
    if words[1:3] == ["-m", "pytest"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        markers = project["tool"]["pytest"]["ini_options"]["markers"]
        assert any(marker.startswith(f"{words[4]}:") for marker in markers)
        assert words[-1] in (ROOT / "tests/kernels/conftest.py").read_text(encoding="utf-8")
    if words[1] == "-c":
        compile(words[2], command, "exec")


def test_the_files_it_keeps_are_there() -> None:
    kept = re.findall(r"^ +path: (.+)$", FILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(kept) == 2
    assert all((ROOT / path).is_file() for path in kept)


def test_it_is_yaml_and_means_what_is_read_here() -> None:
    """Where there is a reader of YAML: in the engines' environments."""
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    assert tuple(found["jobs"]) == JOBS
    for name, job in found["jobs"].items():
        runs = [step["run"].splitlines() for step in job["steps"] if "run" in step]
        assert [line for run in runs for line in run] == commands(jobs()[name])
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    assert found["jobs"]["rocm"]["container"]["image"].startswith("rocm/pytorch:")
