"""The table of proof says what a run proved: no failure, no skip and no part of a run counts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ci import native
from lmc.kernels import listed, proof
from lmc.kernels.proof import Entry, How, Row

from .executors import AMD, ROOT

CONFTEST = """
import os
import pytest
from tests.kernels.parity import PROPERTY, Parity

def pytest_addoption(parser):
    parser.addoption("--write-parity", action="store_true")

def pytest_configure(config):
    file = config.rootpath / "proof.json"
    config.pluginmanager.register(Parity(config, os.environ["SOURCE"], file, ""), "parity")

@pytest.fixture
def proves(request):
    def record(target, how):
        request.node.user_properties.append((PROPERTY, [target, "gather", how, 1]))
    return record
"""
TESTS = """
import pytest

@pytest.mark.parametrize("case", range(3))
def test_runs(case, proves):
    proves("sm_90", "executed in an interpreter")
"""
GPU = """
import os

def test_gpu(proves):
    proves(os.environ["GPU"], "executed on GPU")
"""
BROKEN_END = """
import pytest

@pytest.fixture
def ends_badly():
    yield
    raise OSError

def test_end(ends_badly, proves):
    proves("sm_75", "executed on GPU")
"""
INTERPRETED = Row("sm_90", "gather", How.INTERPRETED, 3)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_one.py").write_text(TESTS)
    return tmp_path


def run(project: Path, *words: str, source: str = "s1", gpu: str = "sm_90") -> tuple[int, str]:
    """Exit status and output of pytest."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SOURCE": source, "GPU": gpu}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def proved(project: Path) -> dict[str, Entry]:
    return proof.read(project / "proof.json")


def test_a_run_writes_when_asked_and_compares_otherwise(project: Path) -> None:
    status, said = run(project)
    assert status == 1
    assert "+ test_one.py: sm_90 gather executed in an interpreter (3)" in said
    assert "pytest tests/kernels --write-parity" in said
    assert proved(project) == {}
    assert run(project, "--write-parity")[0] == 0
    assert proved(project) == {"test_one.py": Entry("s1", (INTERPRETED,))}
    assert run(project)[0] == 0


def test_less_or_other_than_what_is_written_fails(project: Path) -> None:
    run(project, "--write-parity")
    status, said = run(project, source="s2")
    assert (status, "test_one.py: device code s2, in proof.json s1" in said) == (1, True)
    (project / "test_one.py").write_text(TESTS.replace("range(3)", "range(2)"))
    status, said = run(project)
    assert status == 1
    assert "- test_one.py: sm_90 gather executed in an interpreter (3)" in said
    (project / "test_one.py").write_text("def test_nothing_is_proved(): pass")
    assert run(project)[0] == 1


@pytest.mark.parametrize(
    "words",
    [
        ("-k", "test_runs[1]"),
        ("test_one.py::test_runs[1]",),
        ("--deselect", "test_one.py::test_runs[1]"),
        ("--collect-only",),
        ("-p", "cacheprovider", "--lf"),
    ],
    ids=" ".join,
)
def test_a_part_of_a_run_says_nothing(project: Path, words: tuple[str, ...]) -> None:
    before = {"test_one.py": Entry("s0", (INTERPRETED,))}
    proof.write(before, project / "proof.json")
    for more in ((), ("--write-parity",)):
        assert run(project, *words, *more)[0] == 0
        assert proved(project) == before


@pytest.mark.parametrize("end", ["raise AssertionError", "pytest.skip()", "pytest.xfail()"])
def test_a_test_that_did_not_pass_proves_nothing(project: Path, end: str) -> None:
    (project / "test_one.py").write_text(f"{TESTS}    if case == 1:\n        {end}\n")
    run(project, "--write-parity")
    assert proved(project) == {}


def test_what_fails_at_its_end_proves_nothing(project: Path) -> None:
    (project / "test_end.py").write_text(BROKEN_END)
    assert run(project, "--write-parity")[0] == 1
    assert set(proved(project)) == {"test_one.py"}


def test_several_runs_fill_one_table(project: Path) -> None:
    run(project, "--write-parity")
    (project / "test_gpu.py").write_text(GPU)
    for gpu in ("sm_90", "gfx942"):
        assert run(project, "test_gpu.py", gpu=gpu)[0] == 1
        assert run(project, "test_gpu.py", "--write-parity", gpu=gpu)[0] == 0
    assert run(project, gpu="gfx942")[0] == 0
    rows = proof.rows_of(proved(project), "s1")
    assert [row.target for row in rows if row.how is How.GPU] == ["sm_90", "gfx942"]
    assert INTERPRETED in rows
    assert run(project, "test_gpu.py", "--write-parity", source="s2")[0] == 0
    assert proof.stale(proved(project), "s2") == ["test_one.py"]
    assert [row.target for row in proof.rows_of(proved(project), "s2")] == ["sm_90"]


def test_tests_that_are_gone_prove_nothing(project: Path) -> None:
    run(project, "--write-parity")
    (project / "test_one.py").rename(project / "test_two.py")
    assert run(project)[0] == 1
    assert run(project, "--write-parity")[0] == 0
    assert set(proved(project)) == {"test_two.py"}


# --- the table


def test_targets_stand_by_kind_and_number_and_cells_count_both_ops() -> None:
    rows = [
        Row(target, "gather", How.ISA, 2)
        for target in ("triton", "gfx1100", "gfx90a", "sm_100", "sm_90", "torch")
    ]
    entries = {"a": Entry("s", (*rows, Row("sm_90", "scatter", How.ISA, 1))), "b": Entry("t", ())}
    head, *lines = proof.table(proof.rows_of(entries, "s"))
    assert head == ["target", *How]
    cells = {line[0]: line[1 + list(How).index(How.ISA)] for line in lines}
    nvidia, amd = ["NVIDIA sm_90", "NVIDIA sm_100"], ["AMD gfx90a", "AMD gfx1100"]
    assert list(cells) == ["torch index operations", *nvidia, *amd, "Triton source"]
    assert [cells[name] for name in nvidia] == ["2 / 1", "2 / 0"]
    assert {cell for line in lines for cell in line[1:2]} == {"-"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    entries = {"a": Entry("s", (INTERPRETED,)), "b": Entry("t", ())}
    proof.write(entries, tmp_path / "proof.json")
    assert proof.read(tmp_path / "proof.json") == entries
    assert proof.read(tmp_path / "none.json") == {}


def test_the_shipped_table_has_every_object_that_ships(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("write_parity", False):
        pytest.skip("the table is about to be written")
    ways: dict[str, set[How]] = {}
    for row in proof.rows_of(proof.read(), native.source_hash()):
        ways.setdefault(row.target, set()).add(row.how)
    for arch in listed():
        wanted = {How.COMPILED} if arch == "compute_80" else {How.COMPILED, How.ISA}
        assert wanted <= ways[arch], arch
    for arch in ("compute_80", *AMD):
        assert How.INTERPRETED in ways[arch]
    for vendor in ("cuda", "hip"):
        assert How.SANITIZED in ways[f"{vendor} source"]
