/* The tree of _regions.pyx and the search in it, in C because Cython cannot say "compile this for
 * AVX-512 too and choose when loaded".
 *
 * A node is 8 sorted keys, one cache line: the number of keys at or below the address is the number of
 * the child. Keys are signed (ranges end below 2^63), because AVX2 has no unsigned comparison. Lookups
 * go 64 at a time through each step, so that their cache misses overlap.
 */
#ifndef USERFAULT_SEARCH_H
#define USERFAULT_SEARCH_H

#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define UF_LEAF 64   /* pieces in a leaf: a node of 8 heads over 8 nodes of 8 starts */
#define UF_LEVELS 8  /* 8^8 leaves */
#define UF_LANES 64

typedef struct { uint64_t end; uint64_t base; int64_t id; void *payload; } uf_piece;

typedef struct {
    void *next; /* in limbo */
    size_t n;
    int64_t heads[8] __attribute__((aligned(64))); /* starts[0], starts[8], …; heads[0] is 0 */
    int64_t starts[UF_LEAF];                       /* unused ones are INT64_MAX */
    uf_piece pieces[UF_LEAF];
} uf_leaf;

typedef struct {
    void *next;
    size_t n_leaves;
    int n_levels;
    uf_leaf **leaves;
    int64_t *levels[UF_LEVELS]; /* levels[0][i]: all of leaf i is at or above it; levels[l + 1] is every 8th */
} uf_root;

static inline size_t uf_count_plain(const int64_t *keys, int64_t address)
{
    size_t count = 0;
    for (int i = 0; i < 8; i++)
        count += keys[i] <= address;
    return count;
}

#if defined(__x86_64__)
__attribute__((target("avx512f,popcnt")))
static inline size_t uf_count_avx512(const int64_t *keys, int64_t address)
{
    return (size_t)__builtin_popcount(
        _mm512_cmple_epi64_mask(_mm512_load_si512((const void *)keys), _mm512_set1_epi64(address)));
}

__attribute__((target("avx2,popcnt")))
static inline size_t uf_count_avx2(const int64_t *keys, int64_t address)
{
    __m256i a = _mm256_set1_epi64x(address);
    __m256i low = _mm256_cmpgt_epi64(_mm256_load_si256((const __m256i *)keys), a);
    __m256i high = _mm256_cmpgt_epi64(_mm256_load_si256((const __m256i *)(keys + 4)), a);
    int above = _mm256_movemask_pd(_mm256_castsi256_pd(low)) << 4 | _mm256_movemask_pd(_mm256_castsi256_pd(high));
    return 8 - (size_t)__builtin_popcount((unsigned)above);
}
#endif

/* Addresses to ids and, unless `offsets` is NULL, offsets from the base of the region; -1 where none. */
typedef void uf_locate_fn(const uf_root *, const char *, ptrdiff_t, size_t, int64_t *, int64_t *);
typedef void uf_locate_one_fn(const uf_leaf *, const char *, ptrdiff_t, size_t, int64_t *, int64_t *);

#define UF_DEFINE_LOCATE(NAME, TARGET, COUNT)                                                          \
    TARGET static void NAME(const uf_root *root, const char *addresses, ptrdiff_t stride, size_t n,    \
                            int64_t *ids, int64_t *offsets)                                            \
    {                                                                                                  \
        uint64_t lane[UF_LANES];                                                                       \
        int64_t key[UF_LANES];                                                                         \
        size_t at[UF_LANES];                                                                           \
        const uf_leaf *leaf[UF_LANES];                                                                 \
        for (size_t done = 0; done < n; done += UF_LANES) {                                            \
            size_t width = n - done < UF_LANES ? n - done : UF_LANES;                                  \
            for (size_t k = 0; k < width; k++) {                                                       \
                lane[k] = *(const uint64_t *)(addresses + (ptrdiff_t)(done + k) * stride);             \
                key[k] = lane[k] < INT64_MAX ? (int64_t)lane[k] : 0; /* not a key of padding */         \
                at[k] = 0;                                                                             \
            }                                                                                          \
            for (int level = root->n_levels - 1; level >= 0; level--)                                  \
                for (size_t k = 0; k < width; k++)                                                     \
                    at[k] = at[k] * 8 + COUNT(root->levels[level] + at[k] * 8, key[k]) - 1;            \
            for (size_t k = 0; k < width; k++) {                                                       \
                leaf[k] = __atomic_load_n(&root->leaves[at[k]], __ATOMIC_ACQUIRE);                     \
                __builtin_prefetch(leaf[k]->heads);                                                    \
            }                                                                                          \
            for (size_t k = 0; k < width; k++) {                                                       \
                at[k] = 8 * (COUNT(leaf[k]->heads, key[k]) - 1);                                       \
                __builtin_prefetch(leaf[k]->starts + at[k]);                                           \
            }                                                                                          \
            for (size_t k = 0; k < width; k++) {                                                       \
                size_t count = COUNT(leaf[k]->starts + at[k], key[k]);                                 \
                at[k] += count - (count != 0);                                                         \
                __builtin_prefetch(leaf[k]->pieces + at[k]);                                           \
            }                                                                                          \
            for (size_t k = 0; k < width; k++) {                                                       \
                const uf_piece *piece = leaf[k]->pieces + at[k];                                       \
                int held = ((uint64_t)leaf[k]->starts[at[k]] <= lane[k]) & (lane[k] < piece->end);     \
                int64_t miss = (int64_t)held - 1; /* all ones where no region holds it */              \
                ids[done + k] = piece->id | miss;                                                      \
                if (offsets)                                                                           \
                    offsets[done + k] = (int64_t)(lane[k] - piece->base) | miss;                       \
            }                                                                                          \
        }                                                                                              \
    }

/* A table of one region, the commonest of all: one comparison an address, and no search. */
#define UF_DEFINE_LOCATE_ONE(NAME, TARGET)                                                             \
    TARGET static void NAME(const uf_leaf *leaf, const char *addresses, ptrdiff_t stride, size_t n,    \
                            int64_t *ids, int64_t *offsets)                                            \
    {                                                                                                  \
        const uint64_t start = (uint64_t)leaf->starts[0], length = leaf->pieces[0].end - start;        \
        const uint64_t base = leaf->pieces[0].base;                                                    \
        const int64_t id = leaf->pieces[0].id;                                                         \
        if (stride == sizeof(uint64_t) && !offsets) {                                                  \
            const uint64_t *dense = (const uint64_t *)addresses;                                       \
            for (size_t i = 0; i < n; i++)                                                             \
                ids[i] = id | ((int64_t)(dense[i] - start < length) - 1);                              \
            return;                                                                                    \
        }                                                                                              \
        for (size_t i = 0; i < n; i++) {                                                               \
            uint64_t address = *(const uint64_t *)(addresses + (ptrdiff_t)i * stride);                 \
            int64_t miss = (int64_t)(address - start < length) - 1;                                    \
            ids[i] = id | miss;                                                                        \
            if (offsets)                                                                               \
                offsets[i] = (int64_t)(address - base) | miss;                                         \
        }                                                                                              \
    }

UF_DEFINE_LOCATE(uf_locate_plain, , uf_count_plain)
UF_DEFINE_LOCATE_ONE(uf_locate_one_plain, )
#if defined(__x86_64__)
UF_DEFINE_LOCATE(uf_locate_avx512, __attribute__((target("avx512f,popcnt"))), uf_count_avx512)
UF_DEFINE_LOCATE_ONE(uf_locate_one_avx512, __attribute__((target("avx512f"))))
UF_DEFINE_LOCATE(uf_locate_avx2, __attribute__((target("avx2,popcnt"))), uf_count_avx2)
UF_DEFINE_LOCATE_ONE(uf_locate_one_avx2, __attribute__((target("avx2"))))
#endif

/* The best of the three that this processor has: 2 is AVX-512, 1 AVX2, 0 plain. */
static int uf_best_search(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f"))
        return 2;
    if (__builtin_cpu_supports("avx2"))
        return 1;
#endif
    return 0;
}

static void uf_locate(int search, const uf_root *root, const char *addresses, ptrdiff_t stride, size_t n,
                      int64_t *ids, int64_t *offsets)
{
#if defined(__x86_64__)
    static uf_locate_fn *const many[] = {uf_locate_plain, uf_locate_avx2, uf_locate_avx512};
    static uf_locate_one_fn *const one[] = {uf_locate_one_plain, uf_locate_one_avx2, uf_locate_one_avx512};
#else
    static uf_locate_fn *const many[] = {uf_locate_plain};
    static uf_locate_one_fn *const one[] = {uf_locate_one_plain};
#endif
    /* Loaded once: a writer may put another in its place. */
    const uf_leaf *first = __atomic_load_n(&root->leaves[0], __ATOMIC_ACQUIRE);
    if (root->n_leaves == 1 && first->n == 1)
        one[search](first, addresses, stride, n, ids, offsets);
    else
        many[search](root, addresses, stride, n, ids, offsets);
}

/* One address, from the engine: the leaf that may hold it, and the place in the leaf. */
static inline const uf_leaf *uf_find(const uf_root *root, uint64_t address, size_t *place)
{
    int64_t key = address < INT64_MAX ? (int64_t)address : 0;
    size_t at = 0, count;
    for (int level = root->n_levels - 1; level >= 0; level--)
        at = at * 8 + uf_count_plain(root->levels[level] + at * 8, key) - 1;
    const uf_leaf *leaf = __atomic_load_n(&root->leaves[at], __ATOMIC_ACQUIRE);
    at = 8 * (uf_count_plain(leaf->heads, key) - 1);
    count = uf_count_plain(leaf->starts + at, key);
    *place = at + count - (count != 0);
    return leaf;
}

#endif
