"""The disk tier: one framed file a chunk, written aside and renamed, found again after a restart.

    ROOT/chunks/<2 hex>/<name>     0600; a tail replaced by a longer chunk becomes one more link to
    the chunk's file ROOT/aside/<pid>.<n>           being written; left by a crash, swept at start

Any number of processes, models and layouts may share ROOT: names never collide, and the byte bound
holds for all of it together, by looking again at what is there before anything is evicted. No
fsync: a kill loses nothing that was renamed, a power cut costs misses (frames are checked by the
reader). State is guarded by one lock, never held during data I/O.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from ..keys import KEY_BYTES, Name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_DIRECT = getattr(os, "O_DIRECT", 0)
_TOUCH_EVERY_S = 60.0
_STALE_ASIDE_S = 3600.0


class _File:
    """One inode: its size, the names that lead to it, when its time of use was last written
    down.
    """

    __slots__ = ("names", "num_bytes", "used")

    def __init__(self, num_bytes: int, names: list[Name], used: float) -> None:
        self.num_bytes, self.names, self.used = num_bytes, names, used


class DiskTier:
    """Chunks under `root`, at most `capacity_bytes` of them.

    Raises OSError if `root` cannot be made or used: a bad setting shows at start.
    """

    name = "disk"
    persistent = True

    def __init__(self, root: Path, capacity_bytes: int) -> None:
        self._root, self._capacity = root, capacity_bytes
        self._chunks, self._aside = root / "chunks", root / "aside"
        self._lock = threading.Lock()  # guards all below
        self._index: dict[Name, _File] = {}
        self._lru: OrderedDict[int, _File] = OrderedDict()  # by id, coldest first
        self._total_bytes = 0
        self._unseen_bytes = 0  # written since the last look at what is there
        self._serial = itertools.count()
        for folder in (root, self._chunks, self._aside):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self._chunks, self._aside):
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "cannot be read and written", str(folder))
        self._sweep()
        self._rescan()

    # --- verbs

    def probe(self, names: Sequence[Name]) -> int:
        for n, name in enumerate(names):
            with self._lock:
                file = self._index.get(name)
                if file is not None:
                    self._lru.move_to_end(id(file))
            if file is None and not self._adopt(name):
                return n
            if file is not None:
                self._touch(name, file)
        return len(names)

    def read(self, name: Name, into: memoryview) -> int:
        try:
            return self._read(name, into, _DIRECT)
        except FileNotFoundError:
            self._unlist(name)
            return 0
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return self._read(name, into, 0)  # no direct I/O on this file system, or for this memory

    def write(self, name: Name, blob: memoryview, shorter: Sequence[Name] = ()) -> None:
        with self._lock:
            known = name in self._index
        if not known:
            aside = self._write_aside(blob)
            try:
                os.rename(aside, self._make_path(name))
            except OSError:
                aside.unlink(missing_ok=True)
                raise
            self._enlist(name, len(blob))
        for alias in shorter:
            self._replace(alias, name)
        self._evict()

    def forget(self, name: Name) -> None:
        with self._lock:
            file = self._index.get(name)
        self._remove(file if file is not None else _File(0, [name], 0.0))

    def close(self) -> None:
        pass

    # --- files

    def _path(self, name: Name) -> Path:
        text = name.hex()
        return self._chunks / text[:2] / text

    def _make_path(self, name: Name) -> Path:
        path = self._path(name)
        for folder in (self._chunks, path.parent):  # the first is missing if somebody removed it
            folder.mkdir(mode=0o700, exist_ok=True)
        return path

    def _aside_path(self) -> Path:
        return self._aside / f"{os.getpid()}.{next(self._serial)}"

    def _read(self, name: Name, into: memoryview, direct: int) -> int:
        fd = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | direct)
        try:
            size = os.fstat(fd).st_size
            wanted, done = min(size, len(into)), 0
            while done < wanted:
                n = os.preadv(fd, [into[done : done + _even(wanted - done)]], done)
                if n == 0:
                    return done
                done += n
            return size
        finally:
            os.close(fd)

    def _write_aside(self, blob: memoryview) -> Path:
        try:
            return self._write_file(blob, _DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return self._write_file(blob, 0)

    def _write_file(self, blob: memoryview, direct: int) -> Path:
        path = self._aside_path()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | direct
        try:
            fd = os.open(path, flags, 0o600)
        except FileNotFoundError:  # somebody removed the folder under us
            self._aside.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._chunks.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(path, flags, 0o600)
        try:
            done = 0
            while done < len(blob):
                done += os.pwrite(fd, blob[done:], done)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return path

    def _replace(self, alias: Name, name: Name) -> None:
        """Let a tail's name lead to the longer chunk; the tail's bytes go."""
        with self._lock:
            old, new = self._index.get(alias), self._index.get(name)
            if old is None or new is None or old is new:
                return
        link = self._aside_path()
        try:
            os.link(self._path(name), link)
            os.rename(link, self._path(alias))
        except (
            OSError
        ):  # no hard links here, or the file has just gone: the tail stays, which is only room
            link.unlink(missing_ok=True)
            return
        with self._lock:
            if self._index.get(alias) is old:
                self._unname(alias, old)
            new.names.append(alias)
            self._index[alias] = new

    # --- what is here

    def _enlist(self, name: Name, num_bytes: int) -> None:
        with self._lock:
            file = _File(num_bytes, [name], time.time())
            if (
                old := self._index.get(name)
            ) is not None:  # written twice at once: the rename replaced it
                self._unname(name, old)
            self._index[name] = file
            self._lru[id(file)] = file
            self._total_bytes += num_bytes
            self._unseen_bytes += num_bytes

    def _unname(self, name: Name, file: _File) -> None:
        """One name less; with the last the file is gone. Under the lock."""
        if name in file.names:
            file.names.remove(name)
            self._index.pop(name, None)
            if not file.names and self._lru.pop(id(file), None) is not None:
                self._total_bytes -= file.num_bytes

    def _unlist(self, name: Name) -> None:
        with self._lock:
            if (file := self._index.get(name)) is not None:
                self._unname(name, file)

    def _adopt(self, name: Name) -> bool:
        """A file that another process wrote after we looked."""
        try:
            found = os.stat(self._path(name), follow_symlinks=False)
        except OSError:
            return False
        self._enlist(name, found.st_size)
        return True

    def _touch(self, name: Name, file: _File) -> None:
        """Write the time of use down, so that the LRU outlives us; not more than once a minute."""
        now = time.time()
        if now - file.used > _TOUCH_EVERY_S:
            file.used = now
            with contextlib.suppress(OSError):
                os.utime(self._path(name), (now, now), follow_symlinks=False)

    def _evict(self) -> None:
        """Stay within the bound, coldest first. Others may have written or evicted too, so look
        before judging.
        """
        with self._lock:
            over = self._total_bytes > self._capacity
            look = self._unseen_bytes > self._capacity // 16
        if look:
            self._rescan()
        elif not over:
            return
        while True:
            with self._lock:
                if self._total_bytes <= self._capacity or not self._lru:
                    return
                file = next(iter(self._lru.values()))
            self._remove(file)

    def _remove(self, file: _File) -> None:
        for name in list(file.names):
            with contextlib.suppress(FileNotFoundError):
                self._path(name).unlink()
            self._unlist(name)

    def _rescan(self) -> None:
        """Learn what is in the folder, by whomever; the order of use is the order of modification
        times.
        """
        found: dict[int, tuple[float, _File]] = {}
        for entry in self._entries():
            with contextlib.suppress(OSError):
                stat = entry.stat(follow_symlinks=False)
                file = found.setdefault(
                    stat.st_ino, (stat.st_mtime, _File(stat.st_size, [], stat.st_mtime))
                )[1]
                file.names.append(Name(bytes.fromhex(entry.name)))
        with self._lock:
            order = {id(file): n for n, file in enumerate(self._lru.values())}
            rank = {
                name: order[id(file)] for name, file in self._index.items() if id(file) in order
            }
            files = sorted(found.values(), key=lambda item: item[0])
            if rank:  # what we know of the order is finer than the clock of the files
                files.sort(
                    key=lambda item: max(
                        (rank.get(name, len(rank)) for name in item[1].names), default=0
                    )
                )
            self._index = {name: file for _, file in files for name in file.names}
            self._lru = OrderedDict((id(file), file) for _, file in files)
            self._total_bytes = sum(file.num_bytes for _, file in files)
            self._unseen_bytes = 0

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        try:
            folders = list(os.scandir(self._chunks))
        except FileNotFoundError:
            return
        for folder in folders:
            if folder.is_dir(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                    for entry in entries:
                        if len(entry.name) == 2 * KEY_BYTES and entry.is_file(
                            follow_symlinks=False
                        ):
                            yield entry

    def _sweep(self) -> None:
        """Remove what writers that are no more have left aside."""
        for entry in os.scandir(self._aside):
            with contextlib.suppress(OSError, ValueError):
                old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_ASIDE_S
                if old or not _alive(int(entry.name.split(".")[0])):
                    os.unlink(entry.path)


def _even(num_bytes: int) -> int:
    """Direct I/O wants whole blocks; the end of the buffer is one, the end of a cut file may not
    be.
    """
    return -(-num_bytes // 4096) * 4096


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
