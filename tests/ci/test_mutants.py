"""The list of planted bugs fits the source, and a bug that nothing sees is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from ci import mutants

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bug", mutants.planted(), ids=lambda bug: bug.name)
def test_planted_bug_fits_the_source(bug: mutants.Bug) -> None:
    text = (ROOT / bug.path).read_text(encoding="utf-8")
    assert text.count(bug.old) == 1
    compile(text.replace(bug.old, bug.new), bug.file, "exec")


@pytest.mark.parametrize(
    "bug", [*mutants.planted_kernels(), *mutants.planted_triton()], ids=lambda bug: bug.name
)
def test_planted_bug_fits_the_device_code(bug: mutants.KernelBug) -> None:
    assert (ROOT / bug.path).read_text(encoding="utf-8").count(bug.old) == 1


def test_bug_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    mutants.copy(ROOT, tmp_path)
    with pytest.raises(ValueError, match=r"gone: found 0 times in lmc/keys.py"):
        mutants.plant(mutants.Bug("gone", "keys.py", "no such line", ""), tmp_path)


def test_unseen_bug_and_outdated_one_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mutants.copy(ROOT, tmp_path)
    suite = mutants.Suite("lmc", ["tests/core/test_stats.py"])
    monkeypatch.setitem(mutants.SUITES, "core", suite)
    harmless = mutants.Bug(
        "harmless", "stats.py", "self._counts[name] += n", "self._counts[name] += (n)"
    )
    bad = mutants.Bug("miscounted", "stats.py", "self._counts[name] += n", "self._counts[name] = n")
    gone = mutants.Bug("gone", "stats.py", "no such line", "")
    assert mutants.judge(bad, tmp_path) is None
    assert mutants.judge(harmless, tmp_path) == "not seen"
    assert mutants.judge(gone, tmp_path) == "out of date"
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "seen",
        "NOT",
        "OUT",
    ]
