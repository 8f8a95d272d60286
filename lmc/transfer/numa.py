"""Which part of a machine's memory a GPU is near to, and memory of that part.

Both are hints: where the kernel or the machine does not tell, memory comes from wherever it does.
"""

import ctypes
import platform
from pathlib import Path

__all__ = ["node_of", "prefer"]

DEVICES = Path("/sys/bus/pci/devices")
_MBIND = {"x86_64": 237, "aarch64": 235}
_PREFERRED = 1
_BITS = 1024


def node_of(pci_address: str, devices: Path = DEVICES) -> int | None:
    """The NUMA node of a PCI device; None where there is one node, or none is known."""
    try:
        node = int((devices / pci_address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if 0 <= node < _BITS else None


def prefer(address: int, num_bytes: int, node: int) -> bool:
    """Have memory that is not touched yet come from `node`, as long as there is any; `address` is a
    multiple of the page size. Whether the kernel agreed.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return False
    mask = (ctypes.c_uint64 * (_BITS // 64))()
    mask[node // 64] = 1 << node % 64
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    arguments = (address, num_bytes, _PREFERRED, ctypes.addressof(mask), _BITS, 0)
    return bool(call(ctypes.c_long(number), *map(ctypes.c_long, arguments)) == 0)
