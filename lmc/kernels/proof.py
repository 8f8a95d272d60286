"""What was proved of the kernels, and how: proof.json beside this file.

It is written from test runs (`pytest tests/kernels --write-parity`), never by hand. Each file of
tests has an entry: the hash of the device code it ran, and a row for each target, op and way. An
entry of other device code than the objects here were made from is stale and proves nothing of them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

__all__ = ["OPS", "PROOF", "Entry", "How", "Row", "read", "rows_of", "stale", "table", "write"]

PROOF = Path(__file__).with_name("proof.json")
OPS = ("gather", "scatter")


class How(StrEnum):
    """The strongest first."""

    GPU = "executed on GPU"
    INTERPRETED = "executed in an interpreter"
    SANITIZED = "executed as C++ (sanitizers)"
    EXECUTED = "executed"
    ISA = "ISA-checked"
    COMPILED = "compiled"


class Row(NamedTuple):
    """`cases` of them passed for this target (sm_90, gfx942, torch), op and way."""

    target: str
    op: str
    how: How
    cases: int


class Entry(NamedTuple):
    """What one file of tests proved; `source` as in the manifest of the objects."""

    source: str
    rows: tuple[Row, ...]


Entries = Mapping[str, Entry]  # by file of tests


def read(file: Path = PROOF) -> dict[str, Entry]:
    """The entries; none where nothing was ever proved."""
    if not file.exists():
        return {}
    entries = json.loads(file.read_text(encoding="utf-8"))
    return {
        tests: Entry(entry["source"], tuple(sorted(_row(*row) for row in entry["rows"])))
        for tests, entry in entries.items()
    }


def _row(target: str, op: str, how: str, cases: int) -> Row:
    return Row(target, op, How(how), cases)


def write(entries: Entries, file: Path = PROOF) -> None:
    """A row is a line, so that a diff shows what changed."""
    texts = []
    for tests, (source, rows) in sorted(entries.items()):
        lines = ",\n".join(f"   {json.dumps(row)}" for row in sorted(rows, key=_order))
        texts.append(
            f' {json.dumps(tests)}: {{\n  "source": "{source}",\n  "rows": [\n{lines}\n  ]}}'
        )
    file.write_text("{\n" + ",\n".join(texts) + "\n}\n", encoding="utf-8")


def rows_of(entries: Entries, source: str) -> list[Row]:
    """All that was proved of this device code, cases of several files added up."""
    cases: Counter[tuple[str, str, How]] = Counter()
    for entry in entries.values():
        if entry.source == source:
            for target, op, how, count in entry.rows:
                cases[target, op, how] += count
    return sorted((Row(*key, count) for key, count in cases.items()), key=_order)


def stale(entries: Entries, source: str) -> list[str]:
    """The files of tests that ran other device code."""
    return [tests for tests, entry in entries.items() if entry.source != source]


def table(rows: Iterable[Row]) -> list[list[str]]:
    """A line for each target below a head; a cell has the cases of gather / of scatter."""
    cases = {row[:3]: row.cases for row in rows}
    targets = dict.fromkeys(target for target, _, _ in cases)
    lines = [["target", *How]]
    for target in targets:
        counts = [[cases.get((target, op, how), 0) for op in OPS] for how in How]
        lines.append([_label(target), *(_cell(count) for count in counts)])
    return lines


def _cell(counts: Sequence[int]) -> str:
    return " / ".join(map(str, counts)) if any(counts) else "-"


_KINDS = {
    "torch": "torch index operations",
    "cpu ": "CPU {}",
    "cuda ": "CUDA {}",
    "hip ": "HIP {}",
    "sm_": "NVIDIA sm_{}",
    "compute_": "NVIDIA PTX compute_{}",
    "gfx": "AMD gfx{}",
    "triton sm_": "Triton, NVIDIA sm_{}",
    "triton gfx": "Triton, AMD gfx{}",
    "triton": "Triton source",
}
"""How a target's name begins, in the order of the table, and how it is shown."""


def _kind(target: str) -> str | None:
    return next((kind for kind in _KINDS if target.startswith(kind)), None)


def _label(target: str) -> str:
    kind = _kind(target)
    return _KINDS[kind].format(target.removeprefix(kind)) if kind else target


def _order(row: Row) -> tuple[int, list[tuple[int, str]], int, int]:
    """Targets by kind and number (sm_100 after sm_90), ways from the strongest on."""
    kind = [*_KINDS, None].index(_kind(row.target))
    words = re.findall(r"\d+|\D+", row.target)
    natural = [(int(word), "") if word.isdigit() else (0, word) for word in words]
    return kind, natural, OPS.index(row.op), list(How).index(row.how)
