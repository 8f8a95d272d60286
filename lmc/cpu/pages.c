/* Gather and scatter of pages between a paged pool and chunks in host memory. Plain C11, plain C ABI.
 *
 * A page is an opaque run of bytes of any size and alignment. A chunk at an address is
 *     [plane 0: chunk_pages x page_bytes] [plane 1: chunk_pages x page_bytes] ...
 * and a piece is the pages first .. first + pages of one chunk; the page ids of all pieces follow each
 * other. A call checks all it was given before it writes a byte, keeps no state and returns a status.
 */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define LMC_API __attribute__((visibility("default")))

typedef struct {
    int64_t base, num_pages, page_stride, page_bytes;
} lmc_plane;

typedef struct {
    int64_t address, chunk_pages, first, pages;
} lmc_piece;

enum { LMC_OK, LMC_BAD_PLANE, LMC_BAD_RANGE, LMC_BAD_PIECE, LMC_BAD_COUNT, LMC_BAD_ID, LMC_BAD_PATH };

enum { LMC_PATH_BEST, LMC_PATH_PORTABLE, LMC_PATH_AVX2 };

/* Measured on Zen 4 in a virtual machine, pages at random (tests/bench/test_bench_transfer.py). */
enum {
    LANES = 4,         /* pages gathered side by side: 17 GB/s, one 13 (12 KiB); scatter loses */
    AHEAD_BYTES = 512, /* of the next pages, read early: 11.8 GB/s, without 10.2 (768-byte pages) */
    STREAM_MIN_BYTES = 1 << 20 /* about one L2: less than that is left in the cache, to be read soon */
};

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))

/* Streaming stores leave the cache to the engine. Only whole cache lines of the target are streamed:
 * half of one would be read back and merged. */
AVX2 static inline void stream_64(uint8_t *to, const uint8_t *from) {
    __m256i a = _mm256_loadu_si256((const __m256i *)from);
    __m256i b = _mm256_loadu_si256((const __m256i *)(from + 32));
    _mm256_stream_si256((__m256i *)to, a);
    _mm256_stream_si256((__m256i *)(to + 32), b);
}

AVX2 static inline void stream_128(uint8_t *to, const uint8_t *from) {
    __m256i a = _mm256_loadu_si256((const __m256i *)from);
    __m256i b = _mm256_loadu_si256((const __m256i *)(from + 32));
    __m256i c = _mm256_loadu_si256((const __m256i *)(from + 64));
    __m256i d = _mm256_loadu_si256((const __m256i *)(from + 96));
    _mm256_stream_si256((__m256i *)to, a);
    _mm256_stream_si256((__m256i *)(to + 32), b);
    _mm256_stream_si256((__m256i *)(to + 64), c);
    _mm256_stream_si256((__m256i *)(to + 96), d);
}

AVX2 static void stream_run(uint8_t *to, const uint8_t *from, int64_t n) {
    int64_t i = -(intptr_t)to & 63;
    if (i > n) i = n;
    memcpy(to, from, (size_t)i);
    for (; i + 128 <= n; i += 128) stream_128(to + i, from + i);
    for (; i + 64 <= n; i += 64) stream_64(to + i, from + i);
    memcpy(to + i, from + i, (size_t)(n - i));
}

/* LANES pages of n bytes from anywhere to one place; `to` and n are multiples of 64. Several streams
 * hide the wait for the first bytes of a page, which the processor cannot foresee; `next` are the pages
 * to be read after these. */
AVX2 static void stream_lanes(uint8_t *to, const uint8_t *const from[LANES],
                              const uint8_t *const next[LANES], int64_t n) {
    const uint8_t *a = from[0], *b = from[1], *c = from[2], *d = from[3];
    int64_t i = 0;
    for (; i + 128 <= n; i += 128) {
        for (int k = 0; k < LANES && i < AHEAD_BYTES; ++k) {
            _mm_prefetch((const char *)next[k] + i, _MM_HINT_T0);
            _mm_prefetch((const char *)next[k] + i + 64, _MM_HINT_T0);
        }
        stream_128(to + i, a + i);
        stream_128(to + n + i, b + i);
        stream_128(to + 2 * n + i, c + i);
        stream_128(to + 3 * n + i, d + i);
    }
    for (int k = 0; k < LANES && i < n; ++k) stream_64(to + k * n + i, from[k] + i);
}

static void finish_streams(void) { _mm_sfence(); }

/* Asked of the processor itself: zig's __builtin_cpu_supports answers 0 for everything. */
static int has_avx2(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 6) != 6) return 0; /* the system does not save the wide registers */
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}
#else
static void stream_run(uint8_t *to, const uint8_t *from, int64_t n) { memcpy(to, from, (size_t)n); }
static void stream_lanes(uint8_t *to, const uint8_t *const from[LANES],
                         const uint8_t *const next[LANES], int64_t n) {
    (void)next;
    for (int k = 0; k < LANES; ++k) memcpy(to + k * n, from[k], (size_t)n);
}
static void finish_streams(void) {}
static int has_avx2(void) { return 0; }
#endif

typedef struct {
    const lmc_plane *planes;
    int64_t num_planes, first_plane, end_plane;
    const lmc_piece *pieces;
    int64_t num_pieces;
    const int64_t *ids;
    int64_t num_ids;
} transfer;

static int check_planes(const transfer *t) {
    for (int64_t p = 0; p < t->num_planes; ++p) {
        const lmc_plane *plane = &t->planes[p];
        if (!plane->base || plane->num_pages < 1 || plane->page_bytes < 1 ||
            plane->page_stride < plane->page_bytes)
            return LMC_BAD_PLANE;
    }
    if (t->first_plane < 0 || t->first_plane > t->end_plane || t->end_plane > t->num_planes)
        return LMC_BAD_RANGE;
    return LMC_OK;
}

static int check_pieces(const transfer *t) {
    int64_t left = t->num_ids;
    for (int64_t i = 0; i < t->num_pieces; ++i) {
        const lmc_piece *piece = &t->pieces[i];
        if (!piece->address || piece->first < 0 || piece->pages < 0 ||
            piece->pages > piece->chunk_pages - piece->first)
            return LMC_BAD_PIECE;
        if (piece->pages > left) return LMC_BAD_COUNT;
        left -= piece->pages;
    }
    return left ? LMC_BAD_COUNT : LMC_OK;
}

static int check_ids(const transfer *t) {
    int64_t num_pages = INT64_MAX;
    for (int64_t p = t->first_plane; p < t->end_plane; ++p)
        if (t->planes[p].num_pages < num_pages) num_pages = t->planes[p].num_pages;
    for (int64_t i = 0; i < t->num_ids; ++i)
        if (t->ids[i] < 0 || t->ids[i] >= num_pages) return LMC_BAD_ID;
    return LMC_OK;
}

static int check(const transfer *t) {
    int status = check_planes(t);
    if (status == LMC_OK) status = check_pieces(t);
    if (status == LMC_OK) status = check_ids(t);
    return status;
}

/* The pages from ids[at] on that lie one after the other in the pool, at most `most`. */
static int64_t run_length(const transfer *t, const lmc_plane *plane, int64_t at, int64_t most) {
    int64_t run = 1;
    if (plane->page_stride == plane->page_bytes)
        while (run < most && t->ids[at + run] == t->ids[at] + run) ++run;
    return run;
}

static uint8_t *page_of(const transfer *t, const lmc_plane *plane, int64_t at) {
    if (at >= t->num_ids) at = t->num_ids - 1;
    return (uint8_t *)plane->base + t->ids[at] * plane->page_stride;
}

static void move_run(uint8_t *chunk, uint8_t *page, int64_t n, int is_gather, int stream) {
    uint8_t *to = is_gather ? chunk : page;
    const uint8_t *from = is_gather ? page : chunk;
    if (stream)
        stream_run(to, from, n);
    else
        memcpy(to, from, (size_t)n);
}

static void gather_lanes(const transfer *t, const lmc_plane *plane, int64_t at, uint8_t *chunk) {
    const uint8_t *from[LANES], *next[LANES];
    for (int k = 0; k < LANES; ++k) {
        from[k] = page_of(t, plane, at + k);
        next[k] = page_of(t, plane, at + k + LANES);
        __builtin_prefetch(page_of(t, plane, at + k + 2 * LANES)); /* translates its address early */
    }
    stream_lanes(chunk, from, next, plane->page_bytes);
}

/* One plane of all pieces; `before` is the size of one page of all planes before it. */
static void move_plane(const transfer *t, const lmc_plane *plane, int64_t before, int is_gather,
                       int stream) {
    const int64_t row = plane->page_bytes;
    int64_t at = 0;
    for (int64_t i = 0; i < t->num_pieces; ++i) {
        const lmc_piece *piece = &t->pieces[i];
        uint8_t *chunk = (uint8_t *)piece->address + before * piece->chunk_pages + piece->first * row;
        const int64_t end = at + piece->pages;
        const int lanes = is_gather && stream && (((intptr_t)chunk | row) & 63) == 0;
        while (at < end) {
            int64_t run = run_length(t, plane, at, end - at);
            if (lanes && run < LANES && at + LANES <= end) {
                gather_lanes(t, plane, at, chunk);
                run = LANES;
            } else {
                move_run(chunk, page_of(t, plane, at), run * row, is_gather, stream);
            }
            chunk += run * row;
            at += run;
        }
    }
}

static int64_t bytes_of(const transfer *t) {
    int64_t page = 0;
    for (int64_t p = t->first_plane; p < t->end_plane; ++p) page += t->planes[p].page_bytes;
    return page * t->num_ids;
}

LMC_API int32_t lmc_supports(int32_t path) {
    return path == LMC_PATH_BEST || path == LMC_PATH_PORTABLE || (path == LMC_PATH_AVX2 && has_avx2());
}

static int move(const transfer *t, int32_t path, int is_gather) {
    if (!lmc_supports(path)) return LMC_BAD_PATH;
    const int status = check(t);
    if (status != LMC_OK) return status;
    if (path == LMC_PATH_BEST)
        path = bytes_of(t) >= STREAM_MIN_BYTES && has_avx2() ? LMC_PATH_AVX2 : LMC_PATH_PORTABLE;
    const int stream = path == LMC_PATH_AVX2;
    int64_t before = 0;
    for (int64_t p = 0; p < t->end_plane; ++p) {
        if (p >= t->first_plane) move_plane(t, &t->planes[p], before, is_gather, stream);
        before += t->planes[p].page_bytes;
    }
    if (stream) finish_streams(); /* streamed bytes land before the caller's "done" */
    return LMC_OK;
}

LMC_API int32_t lmc_gather(const lmc_plane *planes, int64_t num_planes, int64_t first_plane,
                           int64_t end_plane, const lmc_piece *pieces, int64_t num_pieces,
                           const int64_t *ids, int64_t num_ids, int32_t path) {
    const transfer t = {planes, num_planes, first_plane, end_plane, pieces, num_pieces, ids, num_ids};
    return move(&t, path, 1);
}

LMC_API int32_t lmc_scatter(const lmc_plane *planes, int64_t num_planes, int64_t first_plane,
                            int64_t end_plane, const lmc_piece *pieces, int64_t num_pieces,
                            const int64_t *ids, int64_t num_ids, int32_t path) {
    const transfer t = {planes, num_planes, first_plane, end_plane, pieces, num_pieces, ids, num_ids};
    return move(&t, path, 0);
}

LMC_API const char *lmc_message(int32_t status) {
    switch (status) {
    case LMC_OK: return "ok";
    case LMC_BAD_PLANE: return "a plane has no address, no pages, no bytes or overlapping pages";
    case LMC_BAD_RANGE: return "the range of planes lies outside the pool";
    case LMC_BAD_PIECE: return "a piece has no address or lies outside its chunk";
    case LMC_BAD_COUNT: return "the page ids are not as many as the pages of all pieces";
    case LMC_BAD_ID: return "a page id lies outside the pool";
    case LMC_BAD_PATH: return "this processor cannot copy that way";
    default: return "unknown status";
    }
}
