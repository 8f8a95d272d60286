"""Measures what lmc needs against what the bare thing needs, in the same minute.

The machine, its load and the versions are printed with it. Ratios are lmc's speed over the bare
one: 1.00x means lmc adds nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config
from .machine import machine, versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .row import Row

PARTS = ("checksum", "transfer", "keys", "disk")
ROUNDS = 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = f"what to measure: {', '.join(PARTS)} (default: all)"
    parser.add_argument("parts", nargs="*", type=_part, default=PARTS, metavar="part", help=about)
    about = "where to measure the disk (default: the first file:// of LMC_TIERS, else /tmp)"
    parser.add_argument("--folder", type=Path, help=about)
    about = "one round of small sizes: shows that it runs, not how fast"
    parser.add_argument("--quick", action="store_true", help=about)


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r}: choices: {', '.join(PARTS)}")
    return text


def run(options: argparse.Namespace) -> int:
    if not options.json:
        print(heading())
    rows = []
    for row in measure(options):
        rows.append(row)
        if not options.json:
            print(line(row), flush=True)
    if options.json:
        listed = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"machine": machine(), "versions": versions(), "rows": listed}))
    return 0


def measure(options: argparse.Namespace) -> Iterator[Row]:
    config = Config.from_env()
    folder = options.folder or next((Path(url.path) for url in config.tiers), None)
    parts = _quick(folder, config) if options.quick else _full(folder, config)
    for name in options.parts:
        if name == "transfer" and importlib.util.find_spec("torch") is None:
            print("transfer: not measured, torch is not installed", file=sys.stderr)
        else:
            yield from parts[name]()


def _full(folder: Path | None, config: Config) -> dict[str, Callable[[], Iterator[Row]]]:
    from . import bench_disk, bench_memory

    return {
        "checksum": lambda: bench_memory.checksum(ROUNDS),
        "transfer": lambda: bench_memory.transfer(ROUNDS),
        "keys": lambda: bench_memory.keys(ROUNDS),
        "disk": lambda: bench_disk.disk(ROUNDS, folder, config.io_threads),
    }


def _quick(folder: Path | None, config: Config) -> dict[str, Callable[[], Iterator[Row]]]:
    from . import bench_disk, bench_memory

    small = (bench_memory.Model("small", 64, 4),)
    return {
        "checksum": lambda: bench_memory.checksum(1, 1 << 20),
        "transfer": lambda: bench_memory.transfer(1, small, (64, 1), pool_chunks=2),
        "keys": lambda: bench_memory.keys(1, 1024),
        "disk": lambda: bench_disk.disk(1, folder, config.io_threads, (1 << 20,), 4 << 20),
    }


def heading() -> str:
    here = machine()
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gb']} GB, load {here['load_1min']}; "
        f"{here['system']}\n{found}\n\n"
        f"{'what':<62}{'lmc':>11}   {'against':<25}{'ratio':>9}"
    )


def line(row: Row) -> str:
    ours, base = (f"{value:.{_digits(value)}f} {row.unit}" for value in (row.value, row.baseline))
    return f"{row.name:<62}{ours:>11}   {row.against:<14}{base:>11}{row.ratio:>8.2f}x"


def _digits(value: float) -> int:
    return 1 if value >= 10 else 2
