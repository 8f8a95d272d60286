"""The disk tier against plain direct I/O of the same bytes to new files, and against fio if it is
installed: the same sizes, threads and folder, in turn.

A tier's figures include what it does for safety: frame and checksum, the file written aside and
renamed, verification of all that is read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ..keys import Key, Namespace
from ..layout import ALIGN, KVLayout
from ..tiers.arena import Arena
from ..tiers.disk import DiskTier
from ..tiers.frame import seal, verify
from .row import Row, rounds, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUND_BYTES = 192 << 20
STEPS = 4


class Disk:
    """One size of chunk on one disk: `num_chunks` of them are written and read per round."""

    def __init__(self, folder: Path, chunk_bytes: int, num_chunks: int, num_threads: int) -> None:
        self.layout = KVLayout(64, 64 * STEPS, (chunk_bytes // STEPS,))
        self.num_threads = num_threads
        self._arena = Arena(num_chunks, chunk_bytes)
        self._namespace = Namespace.of({"bench": os.urandom(32).hex()})
        self._slots = range(num_chunks)
        self._keys = [[Key(os.urandom(32)) for _ in range(STEPS)] for _ in self._slots]
        self._names = [self._namespace.fold(keys[-1]) for keys in self._keys]
        self._tier = DiskTier(folder / "tier", 1 << 60)
        self._plain = folder / "plain"
        self._plain.mkdir()
        self._fio = folder / "fio"
        self._fio.mkdir()
        self._pool = ThreadPoolExecutor(num_threads)
        self._direct = _direct_flag(folder)
        for slot in self._slots:
            self._arena.payload(slot)[:] = os.urandom(ALIGN) * (chunk_bytes // ALIGN)
        self.num_bytes = num_chunks * self._arena.slot_bytes

    @property
    def plainly(self) -> str:
        return "O_DIRECT" if self._direct else "buffered I/O"

    def close(self) -> None:
        self._pool.shutdown()
        self._tier.close()
        self._arena.close()

    def tier_write(self) -> float:
        for name in self._names:
            self._tier.forget(name)
        return self._all(self._tier_write)

    def tier_read(self) -> float:
        for slot in self._slots:
            self._arena.view(slot)[:ALIGN] = bytes(ALIGN)  # what was not read would show
        return self._all(self._tier_read)

    def plain_write(self) -> float:
        for slot in self._slots:
            (self._plain / str(slot)).unlink(missing_ok=True)
        return self._all(self._plain_write)

    def plain_read(self) -> float:
        return self._all(self._plain_read)

    def fio_write(self) -> float:
        for path in self._fio.iterdir():
            path.unlink()
        return self._run_fio("write")

    def fio_read(self) -> float:
        return self._run_fio("read")

    def _all(self, work: Callable[[int], None]) -> float:
        """Seconds until `work` is done for every slot."""
        return seconds(lambda: list(self._pool.map(work, self._slots)))

    def _tier_write(self, slot: int) -> None:
        blob = seal(self._arena.view(slot), self._namespace, self._keys[slot], self.layout)
        self._tier.write(self._names[slot], blob)

    def _tier_read(self, slot: int) -> None:
        view, keys = self._arena.view(slot), self._keys[slot]
        size = self._tier.read(self._names[slot], view)
        verify(view, size, self._namespace, keys[-1], STEPS, self.layout)

    def _plain_write(self, slot: int) -> None:
        view, done = self._arena.view(slot), 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | self._direct
        with _opened(self._plain / str(slot), flags) as fd:
            while done < len(view):
                done += os.pwrite(fd, view[done:], done)

    def _plain_read(self, slot: int) -> None:
        view, done = self._arena.view(slot), 0
        with _opened(self._plain / str(slot), os.O_RDONLY | self._direct) as fd:
            while done < len(view):
                done += os.preadv(fd, [view[done:]], done)

    def _run_fio(self, verb: str) -> float:
        """Seconds for `num_bytes` at the rate that fio reports."""
        share = len(self._slots) // self.num_threads * self._arena.slot_bytes
        options = {
            "name": "lmc",
            "directory": self._fio,
            "rw": verb,
            "bs": self._arena.slot_bytes,
            "size": share,
            "numjobs": self.num_threads,
            "direct": int(bool(self._direct)),
            "ioengine": "psync",
            "output-format": "json",
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        command = ["fio", *words, "--group_reporting"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][verb]
        return self.num_bytes / float(job["bw_bytes"])


def disk(
    num_rounds: int,
    folder: Path | None,
    num_threads: int,
    sizes: tuple[int, ...] = (4 << 20, 32 << 20),
    round_bytes: int = ROUND_BYTES,
) -> Iterator[Row]:
    for chunk_bytes in sizes:
        with tempfile.TemporaryDirectory(prefix="lmc-bench-", dir=folder) as place:
            per_thread = max(1, round_bytes // chunk_bytes // num_threads)
            on = Disk(Path(place), chunk_bytes, per_thread * num_threads, num_threads)
            try:
                yield from _rows(num_rounds, on, f"chunks of {chunk_bytes >> 20} MiB")
            finally:
                on.close()


def _rows(num_rounds: int, on: Disk, what: str) -> Iterator[Row]:
    steps = [on.plain_write, on.tier_write, on.plain_read, on.tier_read]
    if fio := shutil.which("fio"):
        steps[2:2] = [on.fio_write]
        steps.append(on.fio_read)
    taken = rounds(num_rounds, *steps)
    by_step = {step.__name__: times for step, times in zip(steps, taken, strict=True)}
    for verb, name in (("write", f"write {what}"), ("read", f"read and check {what}")):
        ours = by_step[f"tier_{verb}"]
        name = f"{name}, {on.num_threads} threads"
        yield Row.rate("disk", name, on.num_bytes, ours, on.plainly, by_step[f"plain_{verb}"])
        if fio:
            yield Row.rate("disk", name, on.num_bytes, ours, "fio psync", by_step[f"fio_{verb}"])


def _direct_flag(folder: Path) -> int:
    """O_DIRECT where the file system takes it."""
    probe = folder / "direct"
    try:
        with _opened(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT):
            return os.O_DIRECT
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
