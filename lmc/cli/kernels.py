"""`doctor --kernels`: what was proved of the kernels, which objects are here, what moves pages on
each device of this machine and whether it does so rightly.

A device is tried in a process of its own: a driver that refuses, crashes or hangs is a finding.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from .. import cpu
from ..kernels import ImageError, listed, load, manifest, proof
from .finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TRY_TIMEOUT_S = 120.0
TRY = (sys.executable, "-m", "lmc.cli.try_kernels")


def examine_kernels() -> Iterator[Finding]:
    try:
        source = manifest().source
    except ImageError as error:
        yield Finding("objects", "bad", str(error), "install lmc anew")
    else:
        yield from check_proof(source)
        yield from check_objects()
    if (reason := cpu.missing()) is not None:
        todo = "install lmc anew; until then torch moves the pages of a CPU"
        yield Finding("native", "note", reason, todo)
    yield from check_devices()


def check_proof(source: str) -> Iterator[Finding]:
    """What the tests wrote down of the device code with this hash."""
    entries = proof.read()
    rows = proof.rows_of(entries, source)
    stale = proof.stale(entries, source)
    figures = {"rows": [row._asdict() for row in rows], "stale": stale}
    head, *lines = proof.table(rows)
    text = "\n".join(["cases of gather / of scatter", *(_proved(head, line) for line in lines)])
    if rows:
        yield Finding("proof", "ok", text, figures=figures)
    if stale or not rows:
        text = f"of other device code than this: {', '.join(stale) or 'nothing was proved'}"
        yield Finding("proof", "note", text, "pytest tests/kernels --write-parity", figures)


def _proved(head: Sequence[str], line: Sequence[str]) -> str:
    ways = (f"{how} {cell}" for how, cell in zip(head[1:], line[1:], strict=True) if cell != "-")
    return f"{line[0]:<25}{', '.join(ways)}"


def check_objects() -> Iterator[Finding]:
    """Each object against the hash it was built with."""
    objects = manifest().objects
    for arch, image in listed().items():
        try:
            load(image)
        except (ImageError, OSError) as error:
            yield Finding("object", "bad", f"{arch}: {error}", "install lmc anew")
        else:
            text = f"{arch:<12}whole, {objects[arch]['bytes']} bytes{_takes(objects[arch])}"
            yield Finding("object", "ok", text, figures={"arch": arch, **objects[arch]})


def _takes(made: dict[str, Any]) -> str:
    kernels = [
        f"; {name.removeprefix('lmc_')} {takes['registers']} registers, {takes['spills']} spills"
        for name, takes in made["kernels"].items()
    ]
    return "".join(kernels) or "; the driver compiles it"


# --- devices


def check_devices() -> Iterator[Finding]:
    """The CPU, then each GPU that torch sees."""
    if importlib.util.find_spec("torch") is None:
        text = "torch is not installed: nothing moves pages, and no GPU can be asked for"
        yield Finding("torch", "note", text, "install the engine, which brings it")
        return
    of_cpu = check_device("cpu")
    yield of_cpu
    for gpu in _names(of_cpu.figures.get("gpus")):
        yield check_device(gpu)


def _names(found: object) -> list[str]:
    return [str(name) for name in found] if isinstance(found, list) else []


def check_device(device: str, command: Sequence[str] = TRY) -> Finding:
    """Both ops there, over a few shapes of pools."""
    try:
        done = subprocess.run(
            [*command, device], capture_output=True, text=True, timeout=TRY_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return _failed(device, f"no answer within {TRY_TIMEOUT_S:.0f} s")
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["it said nothing"]
        return _failed(device, f"{words[-1]} ({_ended(done.returncode)})")
    tried = json.loads(done.stdout.splitlines()[-1])
    text = f"{device}, {tried['name']}: {tried['chosen']}"
    if tried["differ"]:
        return _failed(device, f"{text}: wrong bytes in {'; '.join(tried['differ'])}", tried)
    where = "CPU" if device == "cpu" else "GPU"
    text += f"; executed on this {where}: {tried['cases']} cases, as the torch reference"
    fallback = device != "cpu" and tried["backend"] == "torch"
    return Finding("device", "note" if fallback else "ok", text, figures=tried)


def _failed(device: str, what: str, figures: dict[str, object] | None = None) -> Finding:
    todo = "LMC_KERNELS=torch moves pages without these kernels, by torch alone"
    what = what if what.startswith(device) else f"{device}: {what}"
    return Finding("device", "bad", what, todo, figures or {})


def _ended(returncode: int) -> str:
    if returncode > 0:
        return f"exit status {returncode}"
    return f"killed by {signal.Signals(-returncode).name}"
