"""Tries each tier of LMC_TIERS: opens it, writes, reads back, measures, cleans up.

All of it runs beside us, on a thread that is left behind if it does not come back: a hung disk is a
finding, not a hung doctor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..keys import Key, Namespace
from ..layout import KVLayout
from ..tiers import open_tiers
from ..tiers.arena import Arena
from ..tiers.frame import Damaged, seal, verify
from .finding import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..config import Config, TierUrl
    from ..tiers.tier import Tier

TIMEOUT_S = 30.0
NUM_CHUNKS = 8
LAYOUT = KVLayout(page_tokens=64, chunk_tokens=256, plane_bytes=(1 << 20,))
"""Of the chunks written to a tier: 4 MiB each."""
DEFAULT_GB = "20"


def check_tiers(config: Config) -> Iterator[Finding]:
    if not config.tiers:
        text = "none below RAM: chunks do not outlive the process"
        yield Finding("tiers", "note", text, "LMC_TIERS=file:///folder?gb=200 keeps them on disk")
    places = [place_of(url) for url in config.tiers]
    for url, place in zip(config.tiers, places, strict=True):
        of_one = dataclasses.replace(config, tiers=(url,))
        yield from beside(place, lambda one=of_one, at=place: try_tier(one, at))  # type: ignore[misc]
    if len(set(places)) < len(places):
        yield Finding("tier", "bad", "LMC_TIERS names a place twice", "name each place once")


def place_of(url: TierUrl) -> str:
    return f"{url.scheme}://{url.host.rpartition('@')[2]}{url.path}"


def beside(place: str, work: Callable[[], list[Finding]]) -> list[Finding]:
    """What `work` finds, on a thread of its own, or that it does not come back."""
    answers: queue.SimpleQueue[list[Finding]] = queue.SimpleQueue()

    def answer() -> None:
        found = [Finding("tier", "bad", f"{place}: the trial failed", "see the traceback")]
        try:
            found = work()
        finally:
            answers.put(found)

    threading.Thread(target=answer, daemon=True, name="lmc-doctor").start()
    try:
        return answers.get(timeout=TIMEOUT_S)
    except queue.Empty:
        text = f"{place}: no answer within {TIMEOUT_S:.0f} s"
        todo = "look at the disk or the mount; a server would serve misses and rest this tier"
        return [Finding("tier", "bad", text, todo)]


def try_tier(config: Config, place: str) -> list[Finding]:
    """Open the one tier of `config`, write to it, read back, clean up."""
    (url,) = config.tiers
    with no_trace(Path(url.path)):
        try:
            (tier,) = open_tiers(config)
        except ValueError as error:  # names the setting and what it should be
            return [Finding("tier", "bad", str(error), "correct LMC_TIERS, or the folder's rights")]
        try:
            write_s, read_s = exercise(tier)
        except (OSError, Damaged) as error:
            what = f"came back damaged ({error})" if isinstance(error, Damaged) else str(error)
            todo = "look at the disk, the folder's rights and gb=; a server would serve misses"
            return [Finding("tier", "bad", f"{place}: {what}", todo)]
        finally:
            tier.close()
        return [measured(place, write_s, read_s), *check_room(place, url)]


def exercise(tier: Tier) -> tuple[float, float]:
    """Seconds to write and to read `NUM_CHUNKS` chunks. Raises OSError or Damaged where the tier
    does not keep its word.

    Each is removed before the next, so a full tier gives up one old chunk, not many.
    """
    arena = Arena(2, LAYOUT.chunk_bytes)
    namespace = Namespace.of({"doctor": os.urandom(32).hex()})
    try:
        times = [_there_and_back(tier, arena, namespace) for _ in range(NUM_CHUNKS)]
    finally:
        arena.close()
    return sum(write for write, _ in times), sum(read for _, read in times)


def _there_and_back(tier: Tier, arena: Arena, namespace: Namespace) -> tuple[float, float]:
    keys = [Key(os.urandom(32)) for _ in range(LAYOUT.chunk_steps)]
    name = namespace.fold(keys[-1])
    arena.payload(0)[:] = os.urandom(LAYOUT.chunk_bytes)
    try:
        began = time.perf_counter()
        tier.write(name, seal(arena.view(0), namespace, keys, LAYOUT))
        written = time.perf_counter()
        size = tier.read(name, arena.view(1))
        if not size:
            raise OSError("a chunk of 4 MiB was not kept")
        verify(arena.view(1), size, namespace, keys[-1], len(keys), LAYOUT)
        read = time.perf_counter()
    finally:
        tier.forget(name)
    if tier.probe([name]):
        raise OSError("a chunk that was removed is still there")
    return written - began, read - written


def measured(place: str, write_s: float, read_s: float) -> Finding:
    gb = NUM_CHUNKS * LAYOUT.chunk_bytes / 1e9
    figures = {"write_gbps": round(gb / write_s, 3), "read_gbps": round(gb / read_s, 3)}
    text = (
        f"{place}: {NUM_CHUNKS} chunks of 4 MiB, written at {figures['write_gbps']:.1f} GB/s, "
        f"read and checked at {figures['read_gbps']:.1f} GB/s by one thread, removed"
    )
    return Finding("tier", "ok", text, figures=figures)


def check_room(place: str, url: TierUrl) -> Iterator[Finding]:
    """Whether the disk can hold what `gb=` allows, beside what the tier holds already."""
    allowed_gb = float(url.options.get("gb", DEFAULT_GB))
    free_gb = shutil.disk_usage(url.path).free / 1e9
    held_gb = _held_bytes(Path(url.path)) / 1e9
    text = f"{place}: {held_gb:.1f} GB held, {free_gb:.1f} GB free, up to {allowed_gb:g} GB allowed"
    figures = {"held_gb": held_gb, "free_gb": free_gb, "allowed_gb": allowed_gb}
    if allowed_gb <= held_gb + free_gb:
        yield Finding("tier", "ok", text, figures=figures)
    else:
        todo = "lower gb= or free some disk: on a full one new chunks are lost, and counted"
        yield Finding("tier", "bad", text, todo, figures)


def _held_bytes(folder: Path) -> int:
    """Bytes of the files below; one with several names counts once."""
    sizes: dict[int, int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # just gone
            found = path.lstat()
            sizes[found.st_ino] = found.st_size if path.is_file() else 0
    return sum(sizes.values())


@contextlib.contextmanager
def no_trace(folder: Path) -> Iterator[None]:
    """Remove, of the folders that come into being meanwhile, those that are empty in the end."""
    before = set(_folders(folder))
    yield
    for path in _folders(folder):
        if path not in before:
            with contextlib.suppress(OSError):  # in use by now
                path.rmdir()


def _folders(folder: Path) -> list[Path]:
    """Those below, itself and those above, as far as they exist; the deepest first."""
    below = [Path(path) for path, _, _ in os.walk(folder, topdown=False)]
    return [*below, *(path for path in folder.parents if path.exists())]
