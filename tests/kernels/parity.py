"""Turns a run of these tests into lmc/kernels/proof.json, or says where the two differ.

A test that proves something says so by the fixture `proves`; it counts once all of it has passed. A
run speaks for a file of tests only where every test of that file ran and passed: after a failure, a
skip, a -k or a -m nothing is said of it. Entries of other files stay, so several runs, in several
environments, fill one table.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmc.kernels import proof
from lmc.kernels.proof import Entry, How, Row

PROPERTY = "proves"
REWRITE = "pytest tests/kernels --write-parity && python ci/parity.py"
OF_THIS_MACHINE = (How.GPU, How.EXECUTED)
"""Another machine proves it of other targets: a run speaks of those it ran on alone."""


class Parity:
    """A pytest plugin. `tests` is where the tests lie, from pytest's root folder."""

    def __init__(self, config: pytest.Config, source: str, file: Path, tests: str) -> None:
        self.root, self.source, self.file, self.tests = config.rootpath, source, file, tests
        self.write = config.getoption("write_parity", False)
        self.partial = config.getoption("lf", False) or any("::" in arg for arg in config.args)
        self.collected: defaultdict[str, set[str]] = defaultdict(set)
        self.ended: set[str] = set()
        self.not_passed: set[str] = set()
        self.proved: defaultdict[str, Counter[tuple[str, str, str]]] = defaultdict(Counter)
        self.said: list[str] = []

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        if item.nodeid.startswith(self.tests):
            self.collected[file_of(item.nodeid)].add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self.not_passed.add(report.nodeid)
        if report.when == "teardown":
            self.ended.add(report.nodeid)
            for name, value in report.user_properties:
                if name == PROPERTY:
                    *key, cases = value
                    self.proved[file_of(report.nodeid)][tuple(key)] += cases

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        told = {} if self.partial else dict(self.told())
        known = proof.read(self.file)
        now = merged(known, told, self.root) if told else known
        if now == known:
            return
        if self.write:
            proof.write(now, self.file)
            self.said = [f"{self.file} was written"]
            return
        self.said = [*differences(known, now), f"it is written by: {REWRITE}"]
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def told(self) -> Iterator[tuple[str, Entry]]:
        """Of each file of which every test passed."""
        for file, items in self.collected.items():
            if items <= self.ended - self.not_passed:
                yield file, entry(self.source, self.proved[file])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.said:
            terminalreporter.section("what the kernels' tests prove")
            for line in self.said:
                terminalreporter.write_line(line)


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def entry(source: str, proved: Counter[tuple[str, str, str]]) -> Entry:
    rows = (Row(target, op, How(how), count) for (target, op, how), count in proved.items())
    return Entry(source, tuple(sorted(rows)))


def merged(known: proof.Entries, told: proof.Entries, root: Path) -> dict[str, Entry]:
    """What is known after a run; files of tests that are gone prove nothing any more."""
    now = {file: entry for file, entry in known.items() if (root / file).exists()}
    for file, (source, rows) in told.items():
        kept = elsewhere(now.pop(file, None), source, rows)
        if rows or kept:
            now[file] = Entry(source, tuple(sorted((*rows, *kept))))
    return {file: Entry(source, tuple(sorted(rows))) for file, (source, rows) in now.items()}


def elsewhere(known: Entry | None, source: str, rows: tuple[Row, ...]) -> list[Row]:
    """Rows of the same source that only other machines can prove."""
    if known is None or known.source != source:
        return []
    here = {row.target for row in rows}
    return [row for row in known.rows if row.how in OF_THIS_MACHINE and row.target not in here]


def differences(known: proof.Entries, now: proof.Entries) -> Iterator[str]:
    """Lines for a reader."""
    for file in sorted({*known, *now}):
        old, new = (entries.get(file, Entry("none", ())) for entries in (known, now))
        if old.source != new.source:
            yield f"{file}: device code {new.source[:12]}, in proof.json {old.source[:12]}"
        for sign, rows in (("+", {*new.rows} - {*old.rows}), ("-", {*old.rows} - {*new.rows})):
            for row in sorted(rows):
                yield f"{sign} {file}: {row.target} {row.op} {row.how} ({row.cases})"
