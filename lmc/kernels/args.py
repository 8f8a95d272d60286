"""The argument of both ops: `lmc_pages` in pages.h, by value, the same for both vendors.

Its tables lie in the device's memory: the rows of a pool and of a transfer, two columns made from
them here, and the page ids. All stay unchanged until the kernel is done. A chunk's address is the
one that the device knows it by, which on AMD is not the host's.
"""

import ctypes
from array import array
from itertools import accumulate
from typing import NamedTuple

__all__ = ["BLOCK", "GATHER", "SCATTER", "PagesArgs", "Tables", "before", "pages_args", "starts"]

BLOCK = 256  # LMC_BLOCK of platform.h
GATHER, SCATTER = "lmc_gather", "lmc_scatter"

SLICE_BYTES = 4096
"""What a crew moves at a time: one layer of one chunk still keeps hundreds of crews busy."""

_ROW = 4  # int64 of a plane (base, num_pages, page_stride, page_bytes) or a piece
_WORD_BYTES = 16
_UNROLL = 4  # LMC_UNROLL
_LINE_WORDS = 8  # 128 bytes: what a crew loads together is no less, where a page has as much
_LIMIT = 2**31


class PagesArgs(ctypes.Structure):
    _fields_ = (
        ("planes", ctypes.c_uint64),
        ("before", ctypes.c_uint64),
        ("pieces", ctypes.c_uint64),
        ("starts", ctypes.c_uint64),
        ("page_ids", ctypes.c_uint64),
        ("first_plane", ctypes.c_uint32),
        ("end_plane", ctypes.c_uint32),
        ("num_pieces", ctypes.c_uint32),
        ("max_pages", ctypes.c_uint32),
        ("slices", ctypes.c_uint32),
        ("slice_bytes", ctypes.c_uint32),
        ("crew_bits", ctypes.c_uint32),
        ("grid", ctypes.c_uint32),
    )


class Tables(NamedTuple):
    """Where the tables lie, as the device sees it."""

    planes: int
    before: int
    pieces: int
    starts: int
    page_ids: int


def before(planes: "array[int]") -> "array[int]":
    """Of each plane of a pool: the bytes a page has in all planes before it."""
    return array("q", list(accumulate(planes[3::_ROW], initial=0))[:-1])


def starts(pieces: "array[int]") -> "array[int]":
    """Of each piece of a transfer: the pages of all pieces before it."""
    return array("q", list(accumulate(pieces[3::_ROW], initial=0))[:-1])


def pages_args(
    planes: "array[int]",
    chosen: range,
    pieces: "array[int]",
    tables: Tables,
    *,
    wave: int,
    grid: int,
) -> PagesArgs | None:
    """The argument that moves the chosen planes of all pieces with `grid` blocks; None where there
    is nothing to move. `wave` is the widest crew.
    """
    max_pages = max(pieces[3::_ROW], default=0)
    if not chosen or not max_pages:
        return None
    page_bytes = max(planes[_ROW * plane + 3] for plane in chosen)
    args = PagesArgs(
        **tables._asdict(),
        first_plane=_small("first_plane", chosen.start),
        end_plane=_small("end_plane", chosen.stop),
        num_pieces=_small("num_pieces", len(pieces) // _ROW),
        max_pages=_small("max_pages", max_pages),
        slices=_small("slices", -(-page_bytes // SLICE_BYTES)),
        slice_bytes=SLICE_BYTES,
        crew_bits=_crew_bits(page_bytes, wave),
        grid=grid,
    )
    _small("grid x crews of a block", grid * (BLOCK >> args.crew_bits))
    return args


def _crew_bits(page_bytes: int, wave: int) -> int:
    """As few threads as have the whole page in flight: other pages are for the others."""
    words = -(-page_bytes // _WORD_BYTES)
    crew = max(-(-words // _UNROLL), min(words, _LINE_WORDS))
    return (min(crew, wave) - 1).bit_length()


def _small(name: str, value: int) -> int:
    if value >= _LIMIT:
        raise ValueError(f"{name} is {value}: one launch counts to 2^31")
    return value
