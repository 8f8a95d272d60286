"""The native CPU library `pages.c` behind ctypes: gather and scatter of pages, the GIL released.

Tables are rows of four int64: (base, num_pages, page_stride, page_bytes) a plane and (address,
chunk_pages, first, pages) a piece. The library is stateless; it checks every call before it writes.
"""

import ctypes
import enum
import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from array import array

__all__ = ["CopyPath", "NativeError", "Pages", "missing", "supports"]

_ROW = 4


class CopyPath(enum.IntEnum):
    """How bytes are copied; BEST asks the processor."""

    BEST = 0
    PORTABLE = 1
    AVX2 = 2


class NativeError(ValueError):
    """The native library refused a call; nothing was written."""


class Pages:
    """The two ops over raw tables."""

    def __init__(self, path: CopyPath = CopyPath.BEST) -> None:
        self._library = _library()
        self._path = path

    def gather(
        self, planes: "array[int]", chosen: range, pieces: "array[int]", ids: int, num_ids: int
    ) -> None:
        self._call(self._library.lmc_gather, planes, chosen, pieces, ids, num_ids)

    def scatter(
        self, planes: "array[int]", chosen: range, pieces: "array[int]", ids: int, num_ids: int
    ) -> None:
        self._call(self._library.lmc_scatter, planes, chosen, pieces, ids, num_ids)

    def _call(
        self,
        op: Callable[..., int],
        planes: "array[int]",
        chosen: range,
        pieces: "array[int]",
        ids: int,
        num_ids: int,
    ) -> None:
        status = op(
            planes.buffer_info()[0],
            len(planes) // _ROW,
            chosen.start,
            chosen.stop,
            pieces.buffer_info()[0],
            len(pieces) // _ROW,
            ids,
            num_ids,
            self._path,
        )
        if status:
            raise NativeError(self._library.lmc_message(status).decode())


def library_file() -> Path:
    """Where the library of this machine's processor lies, built or not."""
    return Path(__file__).with_name(f"liblmc_cpu_{platform.machine()}.so")


def missing() -> str | None:
    """Why the library cannot be used here; None where it can."""
    try:
        _library()
    except OSError as error:
        return f"no native library: {error}"
    return None


def supports(path: CopyPath) -> bool:
    return bool(_library().lmc_supports(path))


@functools.cache
def _library() -> ctypes.CDLL:
    return load(library_file())


def load(file: Path) -> ctypes.CDLL:
    """The library in `file` with its signatures; OSError says why it cannot be had."""
    library = ctypes.CDLL(str(file))
    table, count = ctypes.c_void_p, ctypes.c_int64
    for op in (library.lmc_gather, library.lmc_scatter):
        op.argtypes = [table, count, count, count, table, count, table, count, ctypes.c_int32]
        op.restype = ctypes.c_int32
    library.lmc_supports.argtypes = [ctypes.c_int32]
    library.lmc_supports.restype = ctypes.c_int32
    library.lmc_message.argtypes = [ctypes.c_int32]
    library.lmc_message.restype = ctypes.c_char_p
    return library
