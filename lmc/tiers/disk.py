"""The disk tier: one framed file a chunk, written aside and renamed, found again after a restart.

    ROOT/chunks/<2 hex>/<name>      0600; a tail replaced by a longer chunk becomes one more link
                                    to that chunk's file
    ROOT/aside/<pid>.<token>.<n>    being written; what a crash leaves here is swept later

Any number of processes, models and layouts may share ROOT: names never collide, and the byte bound
holds for all of it together, by looking again at what is there before anything is evicted. No
fsync: a kill loses nothing that was renamed, a power cut costs misses (frames are checked by the
reader). State is guarded by one lock, never held during data I/O; it is kept in plain numbers and
bytes, which do not feed the garbage collector.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from ..keys import KEY_BYTES, Name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_DIRECT = getattr(os, "O_DIRECT", 0)
_SAVE_EVERY_NS = 60 * 10**9
_STALE_ASIDE_S = 600.0
_SPOILT = (errno.EIO, errno.EACCES, errno.EPERM, errno.ELOOP)


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
        self._index: dict[Name, int] = {}  # name -> file, by its inode number
        self._names: OrderedDict[int, bytes] = OrderedDict()  # file -> joined names; coldest first
        self._sizes: dict[int, int] = {}
        self._used: dict[int, int] = {}  # file -> last use, ns
        self._saved: dict[int, int] = {}  # file -> last use as its modification time tells it, ns
        self._total_bytes = 0
        self._unseen_bytes = 0  # written since the last look at what is there
        self._looking = False
        self._since_look: dict[Name, tuple[int, int]] = {}  # names new while one looks
        self._serial = itertools.count()
        self._token = f"{os.getpid()}.{os.urandom(4).hex()}"
        self._make_folders()
        for folder in (self._chunks, self._aside):
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "cannot be read and written", str(folder))
        self._look()

    # --- verbs

    def probe(self, names: Sequence[Name]) -> int:
        run = 0
        while True:
            with self._lock:
                while run < len(names) and names[run] in self._index:
                    run += 1
            if run == len(names) or not self._adopt(names[run]):
                break
        self._use(names[:run])
        return run

    def read(self, name: Name, into: memoryview) -> int:
        try:
            return self._read(name, into)
        except FileNotFoundError:
            with self._lock:
                self._discard(name)
            return 0
        except OSError as error:
            if error.errno in _SPOILT:  # this file will not get better: make room for a new one
                with contextlib.suppress(OSError):
                    self.forget(name)
            raise

    def write(self, name: Name, blob: memoryview, shorter: Sequence[Name] = ()) -> None:
        if len(blob) > self._capacity:
            return  # would push out everything else, and itself
        if not self._is_here(name) and not self._adopt(name):
            self._create(name, blob)
        for alias in shorter:
            self._replace(alias, name)
        self._evict()

    def hottest(self, most: int) -> Sequence[Name]:
        with self._lock:
            files = [self._names[inode] for inode in itertools.islice(reversed(self._names), most)]
        return [Name(joined[:KEY_BYTES]) for joined in files]

    def forget(self, name: Name) -> None:
        with self._lock:
            inode = self._index.get(name)
            names = [name] if inode is None else self._take_out(inode)
        self._unlink(names)

    def close(self) -> None:
        pass

    # --- files

    def _path(self, name: Name) -> Path:
        text = name.hex()
        return self._chunks / text[:2] / text

    def _aside_path(self) -> Path:
        return self._aside / f"{self._token}.{next(self._serial)}"

    def _make_folders(self, *more: Path) -> None:
        """Also when somebody has removed them under us."""
        for folder in (self._root, self._chunks, self._aside, *more):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _read(self, name: Name, into: memoryview) -> int:
        try:
            return self._read_file(name, into, _DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return self._read_file(name, into, 0)  # no direct I/O here, or not for this memory

    def _read_file(self, name: Name, into: memoryview, direct: int) -> int:
        fd = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | direct)
        try:
            size = os.fstat(fd).st_size
            wanted, done = min(size, len(into)), 0
            while done < wanted:
                n = os.preadv(fd, [into[done : done + _even(wanted - done)]], done)
                if n == 0:  # cut while we read
                    size = done
                    break
                done += n
        finally:
            os.close(fd)
        if size == 0:
            self.forget(name)  # cut to nothing: as good as not here, and in the way of a new one
        return size

    def _create(self, name: Name, blob: memoryview) -> None:
        path = self._path(name)
        try:
            aside, inode = self._write_aside(blob)
        except FileNotFoundError:
            self._make_folders()
            aside, inode = self._write_aside(blob)
        try:
            try:
                os.rename(aside, path)
            except FileNotFoundError:
                self._make_folders(path.parent)
                os.rename(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        with self._lock:
            self._take_out(inode)  # if known, then as a file that somebody else has removed
            self._add(name, inode, len(blob), time.time_ns())
            self._saved[inode] = 0  # the first use is written down, and with it the chain's order
            self._unseen_bytes += len(blob)

    def _write_aside(self, blob: memoryview) -> tuple[Path, int]:
        try:
            return self._write_file(blob, _DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return self._write_file(blob, 0)  # no direct I/O here, or not for this memory

    def _write_file(self, blob: memoryview, direct: int) -> tuple[Path, int]:
        path = self._aside_path()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | direct
        try:
            fd = os.open(path, flags, 0o600)
            try:
                done = 0
                while done < len(blob):
                    done += os.pwrite(fd, blob[done:], done)
                return path, os.fstat(fd).st_ino
            finally:
                os.close(fd)
        except OSError:
            path.unlink(missing_ok=True)  # even a refused open may have made the file
            raise

    def _replace(self, alias: Name, name: Name) -> None:
        """Let a tail's name lead to the longer chunk; the tail's bytes go."""
        with self._lock:
            old, new = self._index.get(alias), self._index.get(name)
            if old is None or new is None or old == new:
                return
            num_bytes = self._sizes[new]
        link = self._aside_path()
        try:
            os.link(self._path(name), link, follow_symlinks=False)
            os.rename(link, self._path(alias))
        except OSError:  # no hard links here, or just gone: the tail stays, which is only room
            return
        finally:
            # still there after a failure, and where both already were links to one file
            link.unlink(missing_ok=True)
        with self._lock:
            self._add(alias, new, num_bytes, self._used.get(new, 0))

    def _unlink(self, names: Sequence[Name]) -> None:
        for name in names:
            self._path(name).unlink(missing_ok=True)

    # --- what is here; `_add`, `_discard` and `_take_out` under the lock

    def _add(self, name: Name, inode: int, num_bytes: int, used: int) -> None:
        """`name` leads to this file."""
        self._discard(name)
        if self._sizes.get(inode, num_bytes) != num_bytes:
            self._take_out(inode)  # the number of a file that is gone was given to another
        if inode not in self._names:
            self._names[inode] = b""
            self._sizes[inode] = num_bytes
            self._used[inode] = self._saved[inode] = used
            self._total_bytes += num_bytes
        self._names[inode] += name
        self._index[name] = inode
        if self._looking:
            self._since_look[name] = (inode, num_bytes)

    def _discard(self, name: Name) -> None:
        """`name` leads nowhere; with its last name a file is gone."""
        inode = self._index.pop(name, None)
        if inode is not None:
            rest = [other for other in _split(self._names[inode]) if other != name]
            self._names[inode] = b"".join(rest)
            if not rest:
                self._take_out(inode)

    def _take_out(self, inode: int) -> list[Name]:
        """Forget a file; returns its names."""
        names = _split(self._names.pop(inode, b""))
        for name in names:
            del self._index[name]
        if inode in self._sizes:
            self._total_bytes -= self._sizes.pop(inode)
            del self._used[inode], self._saved[inode]
        return names

    def _is_here(self, name: Name) -> bool:
        """Known, and not removed since, by another process or by a `forget` beside a write."""
        with self._lock:
            known = name in self._index
        if known and not os.path.lexists(self._path(name)):
            with self._lock:
                self._discard(name)
            known = False
        return known

    def _adopt(self, name: Name) -> bool:
        """A file that another process wrote after we looked."""
        try:
            found = os.stat(self._path(name), follow_symlinks=False)
        except OSError:
            return False
        if not (stat.S_ISREG(found.st_mode) and found.st_size):
            return False
        with self._lock:
            self._add(name, found.st_ino, found.st_size, found.st_mtime_ns)
        return True

    def _use(self, names: Sequence[Name]) -> None:
        """A chain was used: its beginning goes last. Times are written down, so that the order
        outlives us; not more than once a minute.
        """
        now, due = time.time_ns(), []
        with self._lock:
            for n, name in enumerate(reversed(names)):
                if (inode := self._index.get(name)) is not None:
                    self._names.move_to_end(inode)
                    self._used[inode] = now + n * 1000
                    if now - self._saved[inode] > _SAVE_EVERY_NS:
                        self._saved[inode] = now + n * 1000
                        due.append((name, now + n * 1000))
        for name, used in due:
            with contextlib.suppress(OSError):
                os.utime(self._path(name), ns=(used, used), follow_symlinks=False)

    def _evict(self) -> None:
        """Stay within the bound, coldest first. Others may have written or evicted too, so look
        before judging.
        """
        with self._lock:
            look = self._unseen_bytes > self._capacity // 16
        if look:
            self._look()
        while True:
            with self._lock:
                if self._total_bytes <= self._capacity:
                    return
                names = self._take_out(next(iter(self._names)))
            self._unlink(names)

    def _look(self) -> None:
        """Learn what is in the folder, by whomever, and when it was last used, here or there."""
        with self._lock:
            if self._looking:
                return
            self._looking = True
            self._since_look.clear()
        try:
            self._sweep()
            found = list(self._files())
        finally:
            with self._lock:
                self._looking = False
        with self._lock:
            used = self._used
            new = [(name, inode, size, 0) for name, (inode, size) in self._since_look.items()]
            self._index, self._names, self._sizes = {}, OrderedDict(), {}
            self._used, self._saved = {}, {}
            self._total_bytes = self._unseen_bytes = 0
            found.sort(key=lambda file: max(file[3], used.get(file[1], 0)))
            for name, inode, num_bytes, modified in found + new:
                self._add(name, inode, num_bytes, modified)
                self._used[inode] = max(modified, used.get(inode, 0))

    def _files(self) -> Iterator[tuple[Name, int, int, int]]:
        """Name, inode, size and time of modification of every chunk file."""
        for folder in _scan(self._chunks):
            if folder.is_dir(follow_symlinks=False):
                for entry in _scan(folder):
                    with contextlib.suppress(OSError, ValueError):
                        name = Name(bytes.fromhex(entry.name))
                        ours = len(name) == KEY_BYTES and entry.name == folder.name + name.hex()[2:]
                        found = entry.stat(follow_symlinks=False)
                        if ours and stat.S_ISREG(found.st_mode) and found.st_size:
                            yield name, found.st_ino, found.st_size, found.st_mtime_ns

    def _sweep(self) -> None:
        """Remove what a crash has left aside. Only its age tells: a writer may be in another
        container, where process numbers mean something else.
        """
        for entry in _scan(self._aside):
            with contextlib.suppress(OSError):
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if age > _STALE_ASIDE_S:
                    os.unlink(entry.path)


def _scan(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing if it is gone."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _split(joined: bytes) -> list[Name]:
    return [Name(joined[i : i + KEY_BYTES]) for i in range(0, len(joined), KEY_BYTES)]


def _even(num_bytes: int) -> int:
    """Direct I/O wants whole blocks; the end of the buffer is one, the end of a cut file may not
    be.
    """
    return -(-num_bytes // 4096) * 4096
