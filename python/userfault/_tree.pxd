from libc.stdint cimport int64_t, uint64_t

from userfault._abi cimport pthread_mutex_t
from userfault._slab cimport slab_t

# A piece [start, end) of region `id`, whose offset 0 is at address `base`. `payload` is the engine's own,
# NULL until it serves the region.
ctypedef struct entry_t:
    uint64_t start
    uint64_t end
    uint64_t base
    int64_t id
    void *payload

cdef struct tree_t:
    void *root              # the published tree; replaced, never changed, except for the pointers to leaves
    uint64_t epoch
    int64_t readers[2]      # by the parity of the epoch in which they entered
    int pid                 # the process that the lock and the readers are of; negative: it makes them so
    pthread_mutex_t lock    # of all that follows, and to write
    void *limbo_leaves[2]   # replaced nodes, by the parity of the epoch that retired them
    void *limbo_roots[2]
    uint64_t version        # counts changes
    uint64_t unsure         # what the books have to ask the kernel (_books); 0: nothing
    slab_t slab

# Readers: any thread, without the GIL. What a reader found stays allocated between enter() and leave(ticket).
cdef int enter(tree_t *tree) noexcept nogil
cdef void leave(tree_t *tree, int ticket) noexcept nogil
cdef bint find(tree_t *tree, uint64_t address, entry_t *found) noexcept nogil
cdef bint before(tree_t *tree, uint64_t address, entry_t *found) noexcept nogil
cdef bint empty(tree_t *tree) noexcept nogil
cdef void locate(tree_t *tree, int search, const char *addresses, Py_ssize_t stride, size_t n,
                 int64_t *ids, int64_t *offsets) noexcept nogil
cdef int best_search() noexcept nogil

# Writers: any thread, without the GIL, between lock_tree() and unlock_tree(); 0 or -errno.
cdef int plant(tree_t *tree) noexcept nogil     # needs no lock, as fell() does not
cdef void fell(tree_t *tree) noexcept nogil
cdef void lock_tree(tree_t *tree) noexcept nogil
cdef void unlock_tree(tree_t *tree) noexcept nogil
cdef int insert(tree_t *tree, const entry_t *entry, entry_t *clash) noexcept nogil
cdef int cut(tree_t *tree, uint64_t start, uint64_t end, uint64_t *taken) noexcept nogil
cdef int set_payload(tree_t *tree, uint64_t start, uint64_t end, int64_t id, void *payload,
                     uint64_t *total) noexcept nogil
cdef int replace_all(tree_t *tree, const entry_t *entries, size_t n) noexcept nogil
cdef size_t count(tree_t *tree) noexcept nogil
cdef void list_all(tree_t *tree, entry_t *entries) noexcept nogil
cdef size_t list_range(tree_t *tree, uint64_t start, uint64_t end, entry_t *entries,
                       size_t room) noexcept nogil
cdef void advance(tree_t *tree) noexcept nogil

# Any thread, which may not have the lock.
cdef bint next_entry(tree_t *tree, uint64_t start, uint64_t end, entry_t *entry) noexcept nogil
