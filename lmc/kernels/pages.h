// Gather and scatter of pages between a paged pool and chunks, on raw pointers; one body for every
// vendor.
//
// A page is an opaque run of bytes of any size and alignment. The work is planes x pieces x pages x
// slices, a slice being slice_bytes of a page. Crews of 1 << crew_bits threads, any number of them
// in any order, take every num_crews-th slice. Pieces and pages may differ in size: slices that lie
// outside of one are passed over.
//
// The widest word that a slice's two addresses and its size allow moves it: 16, 8 or 4 bytes, or
// single ones.
#pragma once

struct lmc_plane {
    lmc_u64 base;
    lmc_i64 num_pages, page_stride, page_bytes;
};

struct lmc_piece {
    lmc_u64 address;
    lmc_i64 chunk_pages, first, pages;
};

struct lmc_pages {            // lmc.kernels.PagesArgs; no count is 0, none reaches 2^31
    const lmc_plane* planes;  // rows of PagedPool.table
    const lmc_i64* before;    // of each plane: bytes that a page has in all planes before it
    const lmc_piece* pieces;  // rows of Transfer.table
    const lmc_i64* starts;    // of each piece: its first page id
    const lmc_i64* page_ids;
    lmc_u32 first_plane, end_plane;
    lmc_u32 num_pieces, max_pages;  // pages of the longest piece
    lmc_u32 slices, slice_bytes;    // slices of the largest page
    lmc_u32 crew_bits, grid;
};

struct lmc_place {
    lmc_u32 plane, piece, page, slice;
};

LMC_DEVICE lmc_place lmc_place_of(const lmc_pages& a, lmc_u32 n) {
    lmc_place at;
    at.slice = n % a.slices;
    n /= a.slices;
    at.page = n % a.max_pages;
    n /= a.max_pages;
    at.piece = n % a.num_pieces;
    at.plane = n / a.num_pieces;
    return at;
}

// Adds digit by digit: no division a slice, and the number of all slices may pass 2^32.
LMC_DEVICE void lmc_advance(const lmc_pages& a, lmc_place& at, const lmc_place& step) {
    at.slice += step.slice;
    at.page += step.page;
    at.piece += step.piece;
    at.plane += step.plane;
    if (at.slice >= a.slices) {
        at.slice -= a.slices;
        ++at.page;
    }
    if (at.page >= a.max_pages) {
        at.page -= a.max_pages;
        ++at.piece;
    }
    if (at.piece >= a.num_pieces) {
        at.piece -= a.num_pieces;
        ++at.plane;
    }
}

// All loads before all stores: what is in flight is what hides the way to the host and back.
template <bool GATHER, class Word>
LMC_DEVICE void lmc_copy(lmc_u64 page, lmc_u64 chunk, lmc_u32 bytes, lmc_u32 lane, lmc_u32 crew) {
    Word* const p = (Word*)page;
    Word* const c = (Word*)chunk;
    const lmc_u32 n = bytes / sizeof(Word);
    for (lmc_u32 i = lane; i < n; i += LMC_UNROLL * crew) {
        Word words[LMC_UNROLL];
#pragma unroll
        for (lmc_u32 u = 0; u < LMC_UNROLL; ++u) {
            const lmc_u32 at = i + u * crew;
            if (at < n) words[u] = GATHER ? lmc_load_pool(p + at) : lmc_load_chunk(c + at);
        }
#pragma unroll
        for (lmc_u32 u = 0; u < LMC_UNROLL; ++u) {
            const lmc_u32 at = i + u * crew;
            if (at >= n) break;
            if (GATHER)
                lmc_store_chunk(c + at, words[u]);
            else
                lmc_store_pool(p + at, words[u]);
        }
    }
}

template <bool GATHER>
LMC_DEVICE void lmc_move_slice(const lmc_pages& a, const lmc_place& at, lmc_u32 lane,
                               lmc_u32 crew) {
    const lmc_plane* plane = a.planes + at.plane;
    const lmc_piece* piece = a.pieces + at.piece;
    const lmc_i64 page_bytes = lmc_load(&plane->page_bytes);
    const lmc_i64 skip = (lmc_i64)at.slice * a.slice_bytes, left = page_bytes - skip;
    if (at.page >= lmc_load(&piece->pages) || left <= 0) return;

    const lmc_i64 page_id = lmc_load(a.page_ids + lmc_load(a.starts + at.piece) + at.page);
    const lmc_i64 in_pool = page_id * lmc_load(&plane->page_stride);
    const lmc_i64 plane_in_chunk = lmc_load(a.before + at.plane) * lmc_load(&piece->chunk_pages);
    const lmc_i64 page_in_plane = (lmc_load(&piece->first) + at.page) * page_bytes;
    const lmc_u64 page = lmc_load(&plane->base) + in_pool + skip;
    const lmc_u64 chunk = lmc_load(&piece->address) + plane_in_chunk + page_in_plane + skip;
    const lmc_u32 bytes = left < a.slice_bytes ? (lmc_u32)left : a.slice_bytes;

    const lmc_u32 odd = (lmc_u32)page | (lmc_u32)chunk | bytes;
    if (odd % 16 == 0)
        lmc_copy<GATHER, lmc_b16>(page, chunk, bytes, lane, crew);
    else if (odd % 8 == 0)
        lmc_copy<GATHER, lmc_u64>(page, chunk, bytes, lane, crew);
    else if (odd % 4 == 0)
        lmc_copy<GATHER, lmc_u32>(page, chunk, bytes, lane, crew);
    else
        lmc_copy<GATHER, lmc_u8>(page, chunk, bytes, lane, crew);
}

template <bool GATHER>
LMC_DEVICE void lmc_move(const lmc_pages& a) {
    const lmc_u32 crew = 1u << a.crew_bits, crews = LMC_BLOCK >> a.crew_bits;
    const lmc_u32 lane = lmc_thread() & (crew - 1);
    const lmc_place step = lmc_place_of(a, a.grid * crews);
    lmc_place at = lmc_place_of(a, lmc_block() * crews + (lmc_thread() >> a.crew_bits));
    for (at.plane += a.first_plane; at.plane < a.end_plane; lmc_advance(a, at, step))
        lmc_move_slice<GATHER>(a, at, lane, crew);
}
