"""The benchmark runs, says what it measured against what, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from lmc.__main__ import main
from lmc.cli import bench_disk
from lmc.cli.row import Row, rounds

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for var in [var for var in os.environ if var.startswith("LMC_")]:
        monkeypatch.delenv(var)


def test_a_quick_run_measures_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    assert main(["bench", "--quick", "--json", "--folder", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["part"] for row in report["rows"]} == {"checksum", "transfer", "keys", "disk"}
    assert all(row["value"] > 0 and row["ratio"] > 0 for row in report["rows"])
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["lmc"] == "0.1.0"
    assert list(tmp_path.iterdir()) == []


def test_the_table_names_machine_versions_and_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--quick", "checksum"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cores" in lines[0]
    assert lines[1].startswith("lmc 0.1.0, python")
    assert lines[-1].startswith("xxh3-64 of 1 MiB")
    assert "memcpy" in lines[-1]
    assert lines[-1].endswith("x")


def test_without_torch_the_rest_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "--quick", "transfer", "checksum"]) == 0
    said = capsys.readouterr()
    assert "torch is not installed" in said.err
    assert "xxh3-64" in said.out


def test_the_folder_is_the_first_disk_tier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMC_TIERS", f"file://{tmp_path}")
    used = []
    monkeypatch.setattr(bench_disk, "disk", lambda _, folder, *rest: used.append(folder) or ())
    assert main(["bench", "--quick", "disk"]) == 0
    assert used == [tmp_path]


def test_fio_is_used_only_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["bench", "--quick", "disk", "--json", "--folder", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 2
    assert not [row for row in rows if "fio" in row["against"]]


def test_an_unknown_part_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "gpu"])
    assert "choices: checksum, transfer, keys, disk" in capsys.readouterr().err


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    row = Row.rate("p", "n", 10**9, [1.0, 2.0, 4.0], "b", [2.0, 2.0, 1.0])
    assert (row.value, row.baseline, row.ratio) == (0.5, 0.5, 1.0)


def test_the_first_round_does_not_count() -> None:
    times = iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0])
    assert rounds(2, lambda: next(times), lambda: next(times)) == [[1.0, 3.0], [2.0, 4.0]]


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "doctor" in capsys.readouterr().err
