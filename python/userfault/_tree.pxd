from libc.stdint cimport int64_t, uint64_t

# A piece [start, end) of region `id`, whose offset 0 is at address `base`. `payload` is the engine's own,
# NULL until it serves the region.
ctypedef struct entry_t:
    uint64_t start
    uint64_t end
    uint64_t base
    int64_t id
    void *payload

cdef struct tree_t:
    void *root           # the published tree; replaced, never changed, except for the pointers to leaves
    uint64_t epoch
    int64_t readers[2]   # by the parity of the epoch in which they entered
    void *limbo[2]       # replaced nodes, by the parity of the epoch that retired them
    uint64_t version     # counts changes
    int pid

# Readers: any thread, without the GIL. What a reader found stays allocated between enter() and leave(ticket).
cdef int enter(tree_t *tree) noexcept nogil
cdef void leave(tree_t *tree, int ticket) noexcept nogil
cdef bint find(tree_t *tree, uint64_t address, entry_t *found) noexcept nogil
cdef bint empty(tree_t *tree) noexcept nogil
cdef void locate(tree_t *tree, int search, const char *addresses, Py_ssize_t stride, size_t n,
                 int64_t *ids, int64_t *offsets) noexcept nogil
cdef int best_search() noexcept nogil

# Writers: one at a time, holding the GIL.
cdef int plant(tree_t *tree) except -1
cdef void fell(tree_t *tree) noexcept
cdef bint insert(tree_t *tree, const entry_t *entry, entry_t *clash) except -1
cdef uint64_t cut(tree_t *tree, uint64_t start, uint64_t end) except? 0
cdef uint64_t set_payload(tree_t *tree, uint64_t start, uint64_t end, int64_t id, void *payload) except? 0
cdef int replace_all(tree_t *tree, const entry_t *entries, size_t n) except -1
cdef size_t count(tree_t *tree) noexcept
cdef void list_all(tree_t *tree, entry_t *entries) noexcept
cdef void advance(tree_t *tree) noexcept
