from libc.stdint cimport uint64_t

from userfault._tree cimport entry_t, tree_t

# Kinds of records. What is none of these is unknown, and kept.
cdef enum kind_t:
    UNKNOWN = 0
    FAULT = 1
    FORK = 2
    REMAP = 3
    REMOVE = 4
    UNMAP = 5

# What an event says. FORK: `fd`; REMAP: [start, end) went to `to`; REMOVE, UNMAP: [start, end).
ctypedef struct event_t:
    int kind
    int fd
    uint64_t start
    uint64_t end
    uint64_t to

cdef int decode_event(int wire, const char *record, event_t *event) noexcept nogil
cdef int keep_books(tree_t *tree, int fd, const event_t *event, bint hears_unmap) noexcept nogil
cdef int find_grown(tree_t *tree, int fd, uint64_t address, entry_t *entry) noexcept nogil
cdef int copy_books(tree_t *parent, tree_t *child, int child_fd) noexcept nogil
cdef bint poison_missing(tree_t *tree, int fd) noexcept nogil
