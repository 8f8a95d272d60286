"""`python -m lmc doctor` and `python -m lmc bench`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from lmc import __version__
from lmc.cli import bench, doctor

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {"doctor": doctor, "bench": bench}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m lmc", description="lmc keeps the KV cache")
    top.add_argument("--version", action="version", version=f"lmc {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        about = (module.__doc__ or "").partition("\n\n")[0]
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--json", action="store_true", help="one JSON object, no table")
        module.add_arguments(command)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    status: int = COMMANDS[options.command].run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
