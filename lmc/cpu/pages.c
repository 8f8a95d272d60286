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

/* Copies n bytes; `ahead` is where a later read will start: a hint, never dereferenced. */
typedef void copy_fn(uint8_t *to, const uint8_t *from, int64_t n, const uint8_t *ahead, int64_t ahead_n);

/* Each constant was measured: Zen 3, rows of 768 and 2048 bytes, see tests/bench/test_bench_transfer.py. */
enum {
    AHEAD_PAGES = 4,           /* pages of 1 token: 10.8 GB/s with, 7.7 without; 2 and 4 are equal */
    STREAM_MIN_BYTES = 1 << 20 /* smaller transfers are read again at once: leave them in the cache */
};

static void copy_portable(uint8_t *to, const uint8_t *from, int64_t n, const uint8_t *ahead,
                          int64_t ahead_n) {
    (void)ahead, (void)ahead_n;
    memcpy(to, from, (size_t)n);
}

#if defined(__x86_64__)
/* Only whole cache lines of the target are streamed: half of one would be read back and merged. */
__attribute__((target("avx2"))) static void copy_avx2(uint8_t *to, const uint8_t *from, int64_t n,
                                                      const uint8_t *ahead, int64_t ahead_n) {
    int64_t i = -(intptr_t)to & 63;
    if (i > n) i = n;
    if (i) memcpy(to, from, (size_t)i);
    for (; i + 128 <= n; i += 128) {
        if (i < ahead_n) {
            _mm_prefetch((const char *)ahead + i, _MM_HINT_T0);
            _mm_prefetch((const char *)ahead + i + 64, _MM_HINT_T0);
        }
        __m256i a = _mm256_loadu_si256((const __m256i *)(from + i));
        __m256i b = _mm256_loadu_si256((const __m256i *)(from + i + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + i + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(from + i + 96));
        _mm256_stream_si256((__m256i *)(to + i), a);
        _mm256_stream_si256((__m256i *)(to + i + 32), b);
        _mm256_stream_si256((__m256i *)(to + i + 64), c);
        _mm256_stream_si256((__m256i *)(to + i + 96), d);
    }
    if (i + 64 <= n) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(from + i));
        __m256i b = _mm256_loadu_si256((const __m256i *)(from + i + 32));
        _mm256_stream_si256((__m256i *)(to + i), a);
        _mm256_stream_si256((__m256i *)(to + i + 32), b);
        i += 64;
    }
    if (i < n) memcpy(to + i, from + i, (size_t)(n - i));
}

/* Asked of the processor itself: zig's __builtin_cpu_supports answers 0 for everything. */
static int has_avx2(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 6) != 6) return 0; /* the system saves the wide registers */
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}

static void finish_streams(void) { _mm_sfence(); }
#else
#define copy_avx2 copy_portable
static int has_avx2(void) { return 0; }
static void finish_streams(void) {}
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

/* One plane of all pieces; `before` is the size of one page of all planes before it. */
static void move_plane(const transfer *t, const lmc_plane *plane, int64_t before, copy_fn *copy,
                       int is_gather) {
    const int64_t row = plane->page_bytes;
    int64_t at = 0;
    for (int64_t i = 0; i < t->num_pieces; ++i) {
        const lmc_piece *piece = &t->pieces[i];
        uint8_t *chunk = (uint8_t *)piece->address + before * piece->chunk_pages + piece->first * row;
        const int64_t end = at + piece->pages;
        while (at < end) {
            const int64_t run = run_length(t, plane, at, end - at);
            uint8_t *page = page_of(t, plane, at);
            if (is_gather)
                copy(chunk, page, run * row, page_of(t, plane, at + run - 1 + AHEAD_PAGES), row);
            else
                copy(page, chunk, run * row, chunk, 0);
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
    copy_fn *copy = path == LMC_PATH_AVX2 ? copy_avx2 : copy_portable;
    int64_t before = 0;
    for (int64_t p = 0; p < t->end_plane; ++p) {
        if (p >= t->first_plane) move_plane(t, &t->planes[p], before, copy, is_gather);
        before += t->planes[p].page_bytes;
    }
    if (path == LMC_PATH_AVX2) finish_streams(); /* streamed bytes before the caller's "done" */
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
