"""Gather and scatter of pages, as in pages.h, in Triton's dialect: for GPUs that none of the images
is for. Imported by `lmc.kernels.jit` alone, when such a GPU is met.

A program is one wave and takes every grid-th slice. The arguments are the fields of PagesArgs, in
their order; crew_bits is not used. Each width has a tile of another size, so that Triton lays out
the threads of each by itself.
"""

import triton
import triton.language as tl


@triton.jit
def _copy(
    page,
    chunk,
    num_bytes,
    GATHER: tl.constexpr,
    TYPE: tl.constexpr,
    TYPE_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Both addresses and num_bytes are multiples of ALIGNED, which makes its words of that size."""
    words = num_bytes // ALIGNED * (ALIGNED // TYPE_BYTES)
    pages = page.to(tl.pointer_type(TYPE))
    chunks = chunk.to(tl.pointer_type(TYPE))
    for first in range(0, words, TILE):
        at = first + tl.arange(0, TILE)
        in_page = tl.multiple_of(pages + at, ALIGNED)
        in_chunk = tl.multiple_of(chunks + at, ALIGNED)
        if GATHER:
            tl.store(in_chunk, tl.load(in_page, at < words), at < words)
        else:
            tl.store(in_page, tl.load(in_chunk, at < words), at < words)


@triton.jit
def _move_slice(
    planes,
    before,
    pieces,
    starts,
    page_ids,
    slice_bytes,
    plane,
    piece,
    page,
    slice,
    GATHER: tl.constexpr,
):
    plane_row = planes + 4 * plane  # base, num_pages, page_stride, page_bytes
    piece_row = pieces + 4 * piece  # address, chunk_pages, first, pages
    page_bytes = tl.load(plane_row + 3)
    skip = slice * slice_bytes
    left = page_bytes - skip
    if (page < tl.load(piece_row + 3)) & (left > 0):
        page_id = tl.load(page_ids + tl.load(starts + piece) + page)
        in_pool = page_id * tl.load(plane_row + 2)
        plane_in_chunk = tl.load(before + plane) * tl.load(piece_row + 1)
        page_in_plane = (tl.load(piece_row + 2) + page) * page_bytes
        source = tl.load(plane_row) + in_pool + skip
        chunk = tl.load(piece_row) + plane_in_chunk + page_in_plane + skip
        num_bytes = tl.minimum(left, slice_bytes).to(tl.int32)
        odd = source | chunk | num_bytes
        if (odd & 15) == 0:
            _copy(source, chunk, num_bytes, GATHER, tl.int32, 4, 16, 1024)
        elif (odd & 7) == 0:
            _copy(source, chunk, num_bytes, GATHER, tl.int64, 8, 8, 512)
        elif (odd & 3) == 0:
            _copy(source, chunk, num_bytes, GATHER, tl.int32, 4, 4, 256)
        else:
            _copy(source, chunk, num_bytes, GATHER, tl.int8, 1, 1, 128)


@triton.jit
def _move(
    planes,
    before,
    pieces,
    starts,
    page_ids,
    first_plane,
    end_plane,
    num_pieces,
    max_pages,
    slices,
    slice_bytes,
    grid,
    GATHER: tl.constexpr,
):
    # in 64 bits, since a sum of two counts may pass 2^31; digit by digit as in lmc_advance
    step_slice = (grid % slices).to(tl.int64)
    step_page = (grid // slices % max_pages).to(tl.int64)
    step_piece = (grid // slices // max_pages % num_pieces).to(tl.int64)
    step_plane = (grid // slices // max_pages // num_pieces).to(tl.int64)
    n = tl.program_id(0)
    slice = (n % slices).to(tl.int64)
    page = (n // slices % max_pages).to(tl.int64)
    piece = (n // slices // max_pages % num_pieces).to(tl.int64)
    plane = (n // slices // max_pages // num_pieces + first_plane).to(tl.int64)
    while plane < end_plane:
        _move_slice(
            planes, before, pieces, starts, page_ids, slice_bytes, plane, piece, page, slice, GATHER
        )
        slice += step_slice
        page += step_page
        piece += step_piece
        plane += step_plane
        if slice >= slices:
            slice -= slices
            page += 1
        if page >= max_pages:
            page -= max_pages
            piece += 1
        if piece >= num_pieces:
            piece -= num_pieces
            plane += 1


@triton.jit
def lmc_gather(
    planes, before, pieces, starts, page_ids, first_plane, end_plane, num_pieces, max_pages,
    slices, slice_bytes, crew_bits, grid
):  # fmt: skip
    _move(
        planes, before, pieces, starts, page_ids, first_plane, end_plane, num_pieces, max_pages,
        slices, slice_bytes, grid, True
    )  # fmt: skip


@triton.jit
def lmc_scatter(
    planes, before, pieces, starts, page_ids, first_plane, end_plane, num_pieces, max_pages,
    slices, slice_bytes, crew_bits, grid
):  # fmt: skip
    _move(
        planes, before, pieces, starts, page_ids, first_plane, end_plane, num_pieces, max_pages,
        slices, slice_bytes, grid, False
    )  # fmt: skip
