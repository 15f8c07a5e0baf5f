from libc.stdint cimport int64_t, uint64_t

from userfault._served cimport served_t
from userfault._tree cimport tree_t

# How a child's region is served: as its parent's, with bookkeeping of its own.
cdef struct copy_t:
    served_t served
    copy_t *next
    size_t size              # of this allocation

# One process's memory, as its userfaultfd shows it: our own, or that of a fork child.
cdef struct space_t:
    tree_t *tree
    int fd
    int pagemap              # /proc/self/pagemap; -1: not to be had, or not our own memory
    bint own
    bint hears_events        # of any kind
    bint hears_moves         # remap and unmap events
    bint hears_unmap
    bint tracks              # some region's changes are noted; never of a child's
    uint64_t changes         # events that moved or removed mappings
    # Of children:
    int users                # jobs of the crew that are about it
    bint ended               # what it missed has been made to fail closed; its children inherit that
    bint gone                # the process is; to be freed when nobody uses it
    tree_t table
    copy_t *copies
    space_t *next

cdef space_t *new_space(const space_t *parent, int fd) noexcept nogil
cdef void free_space(space_t *space) noexcept nogil
cdef bint has_ended(const space_t *space) noexcept nogil
cdef served_t *copy_of(const space_t *space, const served_t *original) noexcept nogil
