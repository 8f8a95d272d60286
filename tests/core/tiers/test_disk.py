"""The disk tier beyond the contract: files, the bound, restarts, neighbours and damage."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from lmc.testing.contract import blob_of, buffer, name_of
from lmc.tiers import disk as module
from lmc.tiers.disk import DiskTier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmc.keys import Name

SIZE = 3 * 4096


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "tier"


def put(tier: DiskTier, *seeds: object, size: int = SIZE) -> list[Name]:
    names = [name_of(seed) for seed in seeds]
    for name in names:
        tier.write(name, blob_of(name, size))
    return names


def read(tier: DiskTier, name: Name) -> bytes:
    into = buffer(8 * 4096)
    return bytes(into[: tier.read(name, into)])


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("chunks/*/*"))


def file_of(root: Path, name: Name) -> Path:
    return root / "chunks" / name.hex()[:2] / name.hex()


def usage(root: Path) -> int:
    """Bytes of chunk files, each inode once."""
    return sum({info.st_ino: info.st_size for info in map(os.stat, files(root))}.values())


def here(tier: DiskTier, names: Sequence[Name]) -> list[bool]:
    """Which are here; each probed alone, so no probe stops at a gap."""
    return [tier.probe([name]) == 1 for name in names]


def age(tier: DiskTier, seconds: float) -> None:
    """Let all uses so far be longer ago."""
    for table in (tier._used, tier._saved):
        for inode in table:
            table[inode] -= int(seconds * 1e9)


# --- what is on disk


def test_layout_and_modes(root: Path) -> None:
    old = os.umask(0)
    try:
        tier = DiskTier(root, 10**9)
        (name,) = put(tier, 1)
    finally:
        os.umask(old)
    assert files(root) == [file_of(root, name)]
    assert stat.S_IMODE(file_of(root, name).stat().st_mode) == 0o600
    for folder in (root, root / "chunks", root / "aside", file_of(root, name).parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list((root / "aside").iterdir()) == []
    assert file_of(root, name).read_bytes() == blob_of(name)


def test_folders_made_again_are_as_private(root: Path) -> None:
    tier = DiskTier(root, 10**9)
    shutil.rmtree(root)
    put(tier, 1)
    for folder in (root, root / "chunks", root / "aside", *(root / "chunks").iterdir()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_write_that_is_cut_short_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = DiskTier(root, 10**9)
    full = OSError(errno.ENOSPC, "no space left")
    monkeypatch.setattr(os, "pwrite", _raise(full))
    with pytest.raises(OSError, match="no space left"):
        put(tier, 1)
    monkeypatch.undo()
    assert files(root) == []
    assert list((root / "aside").iterdir()) == []
    (name,) = put(tier, 1)
    assert read(tier, name) == blob_of(name)


def test_kill_in_the_middle_of_a_write_leaves_no_chunk(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the bytes are written when the process dies: nothing has that name yet."""
    tier = DiskTier(root, 10**9)
    real = os.pwrite

    def die(fd: int, data: memoryview, at: int) -> int:
        real(fd, data[:4096], at)
        raise SystemExit

    monkeypatch.setattr(os, "pwrite", die)
    with pytest.raises(SystemExit):
        put(tier, 1)
    monkeypatch.undo()
    after = DiskTier(root, 10**9)
    assert after.probe([name_of(1)]) == 0
    assert files(root) == []
    assert len(list((root / "aside").iterdir())) == 1


def test_short_writes_and_reads_are_continued(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:4096], at))
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][:4096]], at))
    tier = DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    assert read(tier, name) == blob_of(name)


def test_file_system_without_direct_io(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def plain(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            if flags & os.O_CREAT:
                os.close(real(path, flags & ~os.O_DIRECT, mode))  # some kernels make it first
            raise OSError(errno.EINVAL, "no direct I/O")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", plain)
    tier = DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    assert read(tier, name) == blob_of(name)
    assert list((root / "aside").iterdir()) == []


# --- restart


def test_restart_finds_all(root: Path) -> None:
    first = DiskTier(root, 10**9)
    names = put(first, *range(20))
    first.write(name_of("long"), blob_of(name_of("long")), names[:2])
    first.close()
    second = DiskTier(root, 10**9)
    assert second.probe([*names, name_of("long")]) == 21
    assert second._total_bytes == first._total_bytes == 19 * SIZE
    for name in names[2:]:
        assert read(second, name) == blob_of(name)
    assert read(second, names[0]) == read(second, names[1]) == blob_of(name_of("long"))


def test_order_of_use_outlives_the_process(root: Path) -> None:
    first = DiskTier(root, 10**9)
    names = put(first, *range(6))
    age(first, 3600)
    first.probe([names[0]])
    first.probe([names[3]])
    second = DiskTier(root, 4 * SIZE)
    (new,) = put(second, "new")
    kept = [name for name in [*names, new] if file_of(root, name).exists()]
    assert kept == [names[0], names[3], names[5], new]


def test_chain_that_was_used_goes_from_its_end_also_after_a_restart(root: Path) -> None:
    first = DiskTier(root, 10**9)
    chain = put(first, *range(5))
    first.probe(chain)
    second = DiskTier(root, 3 * SIZE)
    second._evict()
    assert here(second, chain) == [True, True, True, False, False]


def test_time_of_use_is_written_down_once_a_minute(root: Path) -> None:
    tier = DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    tier.probe([name])
    first = file_of(root, name).stat().st_mtime_ns
    tier.probe([name])
    assert file_of(root, name).stat().st_mtime_ns == first
    age(tier, 61)
    tier.probe([name])
    assert file_of(root, name).stat().st_mtime_ns > first


def test_strange_files_are_left_alone(root: Path) -> None:
    (root / "chunks" / "ab").mkdir(parents=True)
    name = name_of(1).hex()
    strangers = [
        root / "note.txt",
        root / "chunks" / "note.txt",
        root / "chunks" / "ab" / "short",
        root / "chunks" / "ab" / ("z" * 64),
        root / "chunks" / "ab" / name,  # not its folder
        root / "chunks" / "ab" / ("AB" + "0" * 62),
    ]
    for path in strangers:
        path.write_bytes(b"x" * 100)
    tier = DiskTier(root, 1)
    assert tier._total_bytes == 0
    tier._evict()
    assert all(path.exists() for path in strangers)
    assert tier.probe([name_of(1)]) == 0


def test_symlinks_are_not_followed(root: Path, tmp_path: Path) -> None:
    tier = DiskTier(root, 10**9)
    secret, name = tmp_path / "secret", name_of(1)
    secret.write_bytes(b"s" * SIZE)
    file_of(root, name).parent.mkdir()
    file_of(root, name).symlink_to(secret)
    assert tier.probe([name]) == 0
    assert DiskTier(root, 10**9).probe([name]) == 0
    with pytest.raises(OSError, match="symbolic links"):
        read(tier, name)
    put(tier, 1)
    assert read(tier, name) == blob_of(name)
    assert secret.read_bytes() == b"s" * SIZE


def test_folder_that_is_a_symlink_is_not_scanned(root: Path, tmp_path: Path) -> None:
    other = DiskTier(tmp_path / "other", 10**9)
    (name,) = put(other, 1)
    tier = DiskTier(root, 10**9)
    (root / "chunks" / name.hex()[:2]).symlink_to(file_of(tmp_path / "other", name).parent)
    tier._look()
    assert tier._total_bytes == 0


def test_what_a_crash_left_aside_is_swept_when_it_is_old(root: Path) -> None:
    DiskTier(root, 10**9)
    old, young = root / "aside" / "1.abc.0", root / "aside" / "1.abc.1"
    for path in (old, young):
        path.write_bytes(b"x")
    an_hour_ago = time.time() - 3600
    os.utime(old, (an_hour_ago, an_hour_ago))
    DiskTier(root, 10**9)
    assert not old.exists()
    assert young.exists()  # perhaps of a process in another container


def test_processes_with_the_same_number_do_not_meet_aside(root: Path) -> None:
    """As in two containers that share a folder."""
    one, other = DiskTier(root, 10**9), DiskTier(root, 10**9)
    assert {one._aside_path() for _ in range(9)}.isdisjoint(other._aside_path() for _ in range(9))


@pytest.mark.parametrize("place", ["", "chunks", "aside"])
def test_folder_that_cannot_be_made_shows_at_start(root: Path, place: str) -> None:
    if place:
        root.mkdir()
    (root / place).write_text("a file")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        DiskTier(root, 10**9)


def test_folder_without_permission_shows_at_start(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "aside")
    with pytest.raises(PermissionError, match=r"cannot be read and written: '.*aside'"):
        DiskTier(root, 10**9)


# --- the bound


def test_bytes_stay_within_the_bound_and_the_coldest_goes(root: Path) -> None:
    tier = DiskTier(root, 4 * SIZE)
    names = put(tier, *range(4))
    tier.probe([names[0]])
    names += put(tier, 4)
    assert usage(root) == 4 * SIZE
    assert here(tier, names) == [True, False, True, True, True]


def test_used_chain_is_let_go_from_its_end(root: Path) -> None:
    tier = DiskTier(root, 6 * SIZE)
    chain = put(tier, *range(4))
    tier.probe(chain)
    put(tier, *"abcd")
    assert here(tier, chain) == [True, True, False, False]


def test_blob_larger_than_everything_is_not_kept(root: Path) -> None:
    tier = DiskTier(root, 2 * SIZE)
    names = put(tier, 1, 2)
    put(tier, 3, size=2 * SIZE + 4096)
    assert here(tier, [*names, name_of(3)]) == [True, True, False]


def test_smaller_bound_after_a_restart(root: Path) -> None:
    put(DiskTier(root, 10**9), *range(8))
    tier = DiskTier(root, 3 * SIZE)
    put(tier, 9)
    assert usage(root) == 3 * SIZE


def test_other_names_of_a_file_count_once_and_go_with_it(root: Path) -> None:
    tier = DiskTier(root, 4 * SIZE)
    tails = put(tier, "t1", "t2", size=2 * 4096)
    long = name_of("long")
    tier.write(long, blob_of(long), tails)
    assert tier._total_bytes == usage(root) == SIZE
    assert len(files(root)) == 3
    assert file_of(root, long).stat().st_nlink == 3
    put(tier, *range(4))
    assert usage(root) == 4 * SIZE == tier._total_bytes
    assert here(tier, [long, *tails]) == [False] * 3
    assert list((root / "aside").iterdir()) == []


def test_forgetting_one_name_takes_all_names_of_the_file(root: Path) -> None:
    tier = DiskTier(root, 10**9)
    tails = put(tier, "t1", size=2 * 4096)
    tier.write(name_of("long"), blob_of(name_of("long")), tails)
    tier.forget(tails[0])
    assert files(root) == []
    assert tier._total_bytes == 0


def test_tail_of_a_tail(root: Path) -> None:
    tier = DiskTier(root, 10**9)
    one, two, three = name_of(1), name_of(2), name_of(3)
    tier.write(one, blob_of(one, 4096))
    tier.write(two, blob_of(two, 2 * 4096), [one])
    tier.write(three, blob_of(three), [one, two])
    assert read(tier, one) == read(tier, two) == blob_of(three)
    assert usage(root) == tier._total_bytes == SIZE


def test_file_system_without_hard_links_keeps_the_tail(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _raise(OSError(errno.EPERM, "no hard links")))
    tier = DiskTier(root, 10**9)
    (tail,) = put(tier, "tail", size=2 * 4096)
    tier.write(name_of("long"), blob_of(name_of("long")), [tail])
    assert read(tier, tail) == blob_of(tail, 2 * 4096)
    assert read(tier, name_of("long")) == blob_of(name_of("long"))
    assert tier._total_bytes == usage(root)


def test_name_that_leads_to_the_file_already_leaves_nothing_aside(root: Path) -> None:
    """Another process replaced the tail first; renaming one link over another does nothing."""
    tier = DiskTier(root, 10**9)
    (tail,) = put(tier, "tail", size=2 * 4096)
    other = DiskTier(root, 10**9)
    other.write(name_of("long"), blob_of(name_of("long")), [tail])
    tier.write(name_of("long"), blob_of(name_of("long")), [tail])
    assert list((root / "aside").iterdir()) == []
    assert read(tier, tail) == blob_of(name_of("long"))
    assert tier._total_bytes == usage(root) == SIZE


# --- neighbours


def _fill(root: Path, seed: int, bound: int) -> None:
    tier = DiskTier(root, bound)
    for n in range(40):
        name = name_of((seed, n % 25))
        tier.write(name, blob_of(name))
        other = name_of((1 - seed, n % 25))
        assert read(tier, other) in (b"", bytes(blob_of(other)))
    tier.close()


def test_two_processes_share_a_folder_and_its_bound(root: Path) -> None:
    context = multiprocessing.get_context("spawn")
    bound = 16 * SIZE
    both = [context.Process(target=_fill, args=(root, seed, bound)) for seed in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert usage(root) <= bound + bound // 16 + SIZE
    tier = DiskTier(root, bound)
    put(tier, "last")
    assert usage(root) == tier._total_bytes <= bound
    assert list((root / "aside").iterdir()) == []


def test_what_a_neighbour_wrote_is_found_and_not_written_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, other = DiskTier(root, 10**9), DiskTier(root, 10**9)
    (name,) = put(other, 1)
    monkeypatch.setattr(os, "pwrite", _raise(AssertionError("written again")))
    put(tier, 1)
    assert tier.probe([name]) == 1
    assert read(tier, name) == blob_of(name)
    assert tier._total_bytes == SIZE


def test_what_a_neighbour_removed_is_a_miss_and_can_be_written_again(root: Path) -> None:
    tier, other = DiskTier(root, 10**9), DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    assert other.probe([name])
    other.forget(name)
    assert read(tier, name) == b""
    assert tier.probe([name]) == 0
    assert tier._total_bytes == 0
    put(tier, 1)
    assert read(tier, name) == blob_of(name)


def test_aliases_a_neighbour_made_count_once(root: Path) -> None:
    tier, other = DiskTier(root, 3 * SIZE), DiskTier(root, 10**9)
    tails = put(other, "t", size=2 * 4096)
    other.write(name_of("long"), blob_of(name_of("long")), tails)
    assert here(tier, [name_of("long"), *tails]) == [True, True]
    assert tier._total_bytes == SIZE
    put(tier, 1, 2, 3)
    assert here(tier, [name_of("long"), *tails]) == [False, False]
    assert usage(root) == 3 * SIZE


def test_neighbours_bytes_count_before_anything_is_evicted(root: Path) -> None:
    tier, other = DiskTier(root, 8 * SIZE), DiskTier(root, 10**9)
    put(tier, *"abcd")
    put(other, *range(6))
    put(tier, *"efgh")
    assert usage(root) <= 8 * SIZE


def test_use_by_a_neighbour_keeps_a_chunk(root: Path) -> None:
    tier = DiskTier(root, 5 * SIZE)
    names = put(tier, *range(4))
    age(tier, 3600)
    for path in files(root):
        os.utime(path, ns=(0, tier._used[path.stat().st_ino]))
    DiskTier(root, 10**9).probe([names[0]])
    put(tier, *"abc")
    assert here(tier, [names[0], names[1]]) == [True, False]


def test_number_of_a_removed_file_is_given_to_another(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems use inode numbers again; a stale entry must not count or name the new file."""
    tier, other = DiskTier(root, 10**9), DiskTier(root, 10**9)
    (old,) = put(tier, "old")
    file_of(root, old).unlink()
    inode = tier._index[old]
    names = put(other, *range(3), size=2 * 4096)
    real = os.stat

    def same_number(path: Any, **kwargs: Any) -> Any:
        found = real(path, **kwargs)
        if not str(path).endswith(names[0].hex()):
            return found
        return SimpleNamespace(
            st_ino=inode,
            st_mode=found.st_mode,
            st_size=found.st_size,
            st_mtime_ns=found.st_mtime_ns,
        )

    monkeypatch.setattr(os, "stat", same_number)
    assert tier.probe([names[0]]) == 1
    assert tier.probe([old]) == 0
    assert tier._total_bytes == 2 * 4096


def test_what_is_written_while_another_thread_looks_is_not_lost(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = DiskTier(root, 10**9)
    put(tier, 1)
    real = tier._files

    def files_then_write() -> Any:
        found = list(real())
        put(tier, 2)
        tier._look()  # somebody is looking already
        return iter(found)

    monkeypatch.setattr(tier, "_files", files_then_write)
    tier._look()
    assert {*tier._index} == {name_of(1), name_of(2)}
    assert tier._total_bytes == 2 * SIZE


def test_index_does_not_feed_the_garbage_collector(root: Path) -> None:
    import gc

    tier = DiskTier(root, 10**9)
    put(tier, *range(4))
    for table in (tier._index, tier._names, tier._sizes, tier._used, tier._saved):
        for item in table.items():
            assert not any(gc.is_tracked(part) for part in item)


# --- damage and faults


def _raise(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("what", ["", "chunks", "aside", "sub"])
def test_folder_removed_under_us(root: Path, what: str) -> None:
    tier = DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    shutil.rmtree(file_of(root, name).parent if what == "sub" else root / what)
    assert read(tier, name) == (blob_of(name) if what == "aside" else b"")
    assert tier.probe([name]) == (what == "aside")
    put(tier, 1, 2)
    assert read(tier, name) == blob_of(name)
    assert read(tier, name_of(2)) == blob_of(name_of(2))


def test_empty_folder_after_the_bound_was_reached(root: Path) -> None:
    tier = DiskTier(root, 3 * SIZE)
    put(tier, *range(3))
    shutil.rmtree(root)
    names = put(tier, *"abcdef")
    assert here(tier, names) == [False, False, False, True, True, True]


def test_cut_file_says_its_size(root: Path) -> None:
    tier = DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    os.truncate(file_of(root, name), 5000)
    assert read(tier, name) == blob_of(name)[:5000]


def test_file_cut_to_nothing_is_not_here(root: Path) -> None:
    tier = DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    os.truncate(file_of(root, name), 0)
    assert DiskTier(root, 10**9).probe([name]) == 0
    assert read(tier, name) == b""
    assert tier.probe([name]) == 0
    put(tier, 1)
    assert read(tier, name) == blob_of(name)


def test_file_that_is_cut_while_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    real = os.preadv

    def cut(fd: int, buffers: list[memoryview], at: int) -> int:
        os.truncate(file_of(root, name), 4096)
        return real(fd, [buffers[0][:4096]], at)

    monkeypatch.setattr(os, "preadv", cut)
    assert read(tier, name) == blob_of(name)[:4096]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EPERM])
def test_file_that_cannot_be_read_makes_room_for_a_new_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    tier = DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    monkeypatch.setattr(os, "preadv", _raise(OSError(code, "injected")))
    with pytest.raises(OSError, match="injected"):
        read(tier, name)
    monkeypatch.undo()
    assert tier.probe([name]) == 0
    put(tier, 1)
    assert read(tier, name) == blob_of(name)


def test_trouble_of_our_own_costs_no_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    monkeypatch.setattr(os, "open", _raise(OSError(errno.EMFILE, "too many open files")))
    with pytest.raises(OSError, match="too many"):
        read(tier, name)
    monkeypatch.undo()
    assert read(tier, name) == blob_of(name)


def test_file_that_can_be_neither_read_nor_removed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    denied = PermissionError(errno.EACCES, "denied")
    monkeypatch.setattr(os, "open", _raise(denied))
    monkeypatch.setattr(Path, "unlink", _raise(denied))
    with pytest.raises(PermissionError, match="denied"):
        read(tier, name)
    assert tier._total_bytes == 0


def test_file_that_cannot_be_evicted_is_an_error_not_a_loop(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = DiskTier(root, 2 * SIZE)
    put(tier, 1, 2)
    monkeypatch.setattr(Path, "unlink", _raise(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(PermissionError):
        put(tier, 3)
    assert tier._total_bytes <= 2 * SIZE


def test_time_that_cannot_be_written_down_does_not_matter(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = DiskTier(root, 10**9)
    (name,) = put(tier, 1)
    monkeypatch.setattr(os, "utime", _raise(PermissionError(errno.EPERM, "denied")))
    assert tier.probe([name]) == 1


def test_rename_that_fails_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(root, 10**9)
    monkeypatch.setattr(os, "rename", _raise(OSError(errno.EIO, "injected")))
    with pytest.raises(OSError, match="injected"):
        put(tier, 1)
    assert list((root / "aside").iterdir()) == []
    assert tier.probe([name_of(1)]) == 0


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs here")
def test_memory_file_system() -> None:
    root = Path(f"/dev/shm/lmc-test-{os.getpid()}")
    try:
        tier = DiskTier(root, 10**9)
        (name,) = put(tier, 1)
        assert read(tier, name) == blob_of(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(root)


def test_unaligned_memory_falls_back_to_buffered_io(root: Path) -> None:
    assert module._DIRECT == os.O_DIRECT
    tier = DiskTier(root, 10**9)
    blob = memoryview(bytearray(SIZE + 1))[1:]
    blob[:] = blob_of(name_of(1))
    tier.write(name_of(1), blob)
    into = memoryview(bytearray(SIZE + 1))[1:]
    assert tier.read(name_of(1), into) == SIZE
    assert into == blob
