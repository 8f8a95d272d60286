#!/usr/bin/env python3
"""Writes what was proved of the kernels (lmc/kernels/proof.json) into README.md, as its table.

    python ci/parity.py

proof.json itself is written by a run of the tests: pytest tests/kernels --write-parity
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from ci import native  # noqa: E402
from lmc.kernels import proof  # noqa: E402

README = ROOT / "README.md"
BEGIN, END = "<!-- parity: begin, by ci/parity.py -->\n", "<!-- parity: end -->\n"


def markdown() -> str:
    """The table of this source; what was proved of any other is left out."""
    head, *lines = proof.table(proof.rows_of(proof.read(), native.source_hash()))
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


def with_table(text: str, table: str) -> str:
    """`text` with the table between its markers, in place of what stood there."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"README.md lacks the markers {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + table + END + after


def main() -> None:
    README.write_text(with_table(README.read_text(encoding="utf-8"), markdown()), encoding="utf-8")


if __name__ == "__main__":
    main()
