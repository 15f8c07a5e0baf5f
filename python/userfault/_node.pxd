# The nodes of a tree: how they lie in memory, made, filled and read. The search in them is in _search.h.

from libc.stdint cimport INT64_MAX, int64_t, uint64_t

from userfault._slab cimport slab_alloc, slab_free, slab_t
from userfault._tree cimport entry_t

cdef extern from "_search.h" nogil:
    const int UF_LEAF, UF_LEVELS

    ctypedef struct piece_t "uf_piece":
        uint64_t end
        uint64_t base
        int64_t id
        void *payload

    ctypedef struct leaf_t "uf_leaf":
        void *next
        size_t n
        int64_t *heads
        int64_t *starts
        piece_t *pieces

    ctypedef struct root_t "uf_root":
        void *next
        size_t n_leaves
        int n_levels
        leaf_t **leaves
        int64_t **levels

cdef inline size_t nodes(size_t keys) noexcept nogil:
    return (keys + 7) // 8

cdef inline size_t header_bytes(size_t n_leaves) noexcept nogil:
    return 64 * ((sizeof(root_t) + n_leaves * sizeof(leaf_t *) + 63) // 64)

cdef inline size_t root_bytes(size_t n_leaves) noexcept nogil:
    """The size of a root: a power of two, so that the roots of a growing tree share few sizes."""
    cdef size_t needed = header_bytes(n_leaves) + 64 * (n_leaves // 7 + UF_LEVELS), size = 1024
    while size < needed:
        size *= 2
    return size

cdef inline root_t *new_root(slab_t *slab, size_t n_leaves) noexcept nogil:
    """A root with room for `n_leaves`: the caller fills `leaves` and `levels[0]`, then calls `index_root`."""
    cdef size_t keys = n_leaves
    cdef bint fits = n_leaves <= <size_t>1 << 3 * UF_LEVELS
    cdef root_t *root = <root_t *>slab_alloc(slab, root_bytes(n_leaves)) if fits else NULL
    if root == NULL:
        return NULL
    root.n_leaves = n_leaves
    root.n_levels = 0
    root.leaves = <leaf_t **>(root + 1)
    root.levels[0] = <int64_t *>(<char *>root + header_bytes(n_leaves))
    while keys > 1 or root.n_levels == 0:
        keys = nodes(keys)
        root.n_levels += 1
        if keys > 1:
            root.levels[root.n_levels] = root.levels[root.n_levels - 1] + 8 * keys
    return root

cdef inline void index_root(root_t *root) noexcept nogil:
    """Fill the levels above levels[0], and the unused places of all."""
    cdef size_t keys = root.n_leaves, i
    cdef int level
    root.levels[0][0] = 0
    for level in range(root.n_levels):
        for i in range(keys, 8 * nodes(keys)):
            root.levels[level][i] = INT64_MAX
        keys = nodes(keys)
        if level + 1 < root.n_levels:
            for i in range(keys):
                root.levels[level + 1][i] = root.levels[level][8 * i]

cdef inline leaf_t *new_leaf(slab_t *slab) noexcept nogil:
    cdef leaf_t *leaf = <leaf_t *>slab_alloc(slab, sizeof(leaf_t))
    cdef int i
    if leaf == NULL:
        return NULL
    leaf.n = 0
    leaf.heads[0] = 0
    leaf.pieces[0].end = 0  # an empty leaf is searched like any other
    for i in range(1, 8):
        leaf.heads[i] = INT64_MAX
    for i in range(UF_LEAF):
        leaf.starts[i] = INT64_MAX
    return leaf

cdef inline void free_leaf(slab_t *slab, leaf_t *leaf) noexcept nogil:
    slab_free(slab, leaf, sizeof(leaf_t))

cdef inline void free_root(slab_t *slab, root_t *root) noexcept nogil:
    slab_free(slab, root, root_bytes(root.n_leaves))

cdef inline void append(leaf_t *leaf, const entry_t *entry) noexcept nogil:
    cdef size_t i = leaf.n
    leaf.starts[i] = entry.start
    if i and i % 8 == 0:
        leaf.heads[i // 8] = entry.start
    leaf.pieces[i].end = entry.end
    leaf.pieces[i].base = entry.base
    leaf.pieces[i].id = entry.id
    leaf.pieces[i].payload = entry.payload
    leaf.n = i + 1

cdef inline void get(const leaf_t *leaf, size_t i, entry_t *entry) noexcept nogil:
    entry.start = leaf.starts[i]
    entry.end = leaf.pieces[i].end
    entry.base = leaf.pieces[i].base
    entry.id = leaf.pieces[i].id
    entry.payload = leaf.pieces[i].payload

cdef inline size_t leaf_of(const root_t *root, uint64_t address) noexcept nogil:
    """The number of the leaf that holds the address or would."""
    cdef size_t low = 0, high = root.n_leaves, middle
    while high - low > 1:
        middle = (low + high) // 2
        if <uint64_t>root.levels[0][middle] <= address:
            low = middle
        else:
            high = middle
    return low
