"""Where memory comes from; on the kernel of this machine."""

from __future__ import annotations

import ctypes
import mmap
import platform
from typing import TYPE_CHECKING

import pytest

from lmc.transfer.numa import node_of, prefer

if TYPE_CHECKING:
    from pathlib import Path

MPOL_F_ADDR, GET_MEMPOLICY = 2, {"x86_64": 239, "aarch64": 236}
MBIND = {"x86_64": 237, "aarch64": 235}
PREFERRED = 1


def policy_at(address: int) -> tuple[int, int]:
    """The kernel's own words for the memory there: policy, and its nodes as bits."""
    mode, nodes = ctypes.c_int(), (ctypes.c_uint64 * 16)()
    arguments = (ctypes.addressof(mode), ctypes.addressof(nodes), 1024, address, MPOL_F_ADDR)
    number = GET_MEMPOLICY[platform.machine()]
    status = ctypes.CDLL(None, use_errno=True).syscall(*map(ctypes.c_long, (number, *arguments)))
    assert status == 0, ctypes.get_errno()
    return mode.value, nodes[0]


def is_served() -> bool:
    """Whether this kernel knows nodes, and lets this process ask: containers often may not."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(memory)
    mode, address = ctypes.c_int(), ctypes.addressof(anchor)
    asks = [
        (GET_MEMPOLICY.get(platform.machine(), -1), ctypes.addressof(mode), 0, 0, address, 2),
        (MBIND.get(platform.machine(), -1), address, mmap.PAGESIZE, 0, 0, 0, 0),
    ]
    call = ctypes.CDLL(None).syscall
    return all(call(*map(ctypes.c_long, ask)) == 0 for ask in asks)


@pytest.mark.skipif(not is_served(), reason="this process may not ask for memory of a NUMA node")
def test_memory_is_asked_for_on_a_node() -> None:
    memory = mmap.mmap(-1, 8 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(anchor)
    assert prefer(address + mmap.PAGESIZE, 2 * mmap.PAGESIZE, 0)
    for page, want in enumerate([(0, 0), (PREFERRED, 1), (PREFERRED, 1), (0, 0)]):
        assert policy_at(address + page * mmap.PAGESIZE) == want
    memory[: mmap.PAGESIZE * 8] = b"x" * mmap.PAGESIZE * 8
    assert not prefer(address + 1, mmap.PAGESIZE, 0)
    assert not prefer(address, mmap.PAGESIZE, 1000)
    del anchor
    memory.close()


def test_another_machine_has_no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    assert not prefer(4096, 4096, 0)


@pytest.mark.parametrize(
    ("told", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("5000\n", None), ("", None)]
)
def test_the_node_of_a_device(told: str, node: int | None, tmp_path: Path) -> None:
    (tmp_path / "0000:3b:00.0").mkdir()
    (tmp_path / "0000:3b:00.0" / "numa_node").write_text(told)
    assert node_of("0000:3b:00.0", tmp_path) == node
    assert node_of("0000:3b:01.0", tmp_path) is None
