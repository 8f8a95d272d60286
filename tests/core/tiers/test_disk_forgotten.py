"""A file that went behind the index's back is written again when it is offered again."""

from __future__ import annotations

from lmc.keys import Name
from lmc.tiers.disk import DiskTier


def test_a_write_of_a_known_name_whose_file_is_gone_makes_it_anew(tmp_path) -> None:
    tier = DiskTier(tmp_path, 10**6)
    name, blob = Name(b"n" * 32), memoryview(b"x" * 4096)
    tier.write(name, blob)
    (file,) = tmp_path.glob("chunks/*/*")
    file.unlink()
    tier.write(name, blob)
    into = memoryview(bytearray(4096))
    assert tier.read(name, into) == 4096
    assert into == blob
    assert tier.probe([name]) == 1


def test_the_hottest_files_are_told_once_each(tmp_path) -> None:
    tier = DiskTier(tmp_path, 10**6)
    names = [Name(bytes([n]) * 32) for n in range(5)]
    for name in names:
        tier.write(name, memoryview(b"x" * 4096))
    tier.write(names[4], memoryview(b"x" * 4096), [names[3]])  # the third leads to the fourth now
    tier.probe([names[1], names[0]])
    assert list(tier.hottest(10))[:2] == [names[1], names[0]]
    assert len(tier.hottest(10)) == 4
    assert len(tier.hottest(2)) == 2
    again = DiskTier(tmp_path, 10**6)
    assert len(again.hottest(10)) == 4
