"""`space_t`: one process's memory, as its userfaultfd shows it: our own, or that of a fork child.

A child's is made by the thread that reads the fork record, while fork() may hold malloc's locks until that
record is read: so its memory comes from mmap.
"""

from libc.errno cimport ESRCH
from libc.stdint cimport INT64_MAX, uint64_t

from userfault._abi cimport c_close, load_int
from userfault._books cimport copy_books
from userfault._ioctl cimport PAGE_SIZE, uffd_writeprotect
from userfault._served cimport served_t, stream_t
from userfault._tree cimport entry_t, fell, lock_tree, next_entry, plant, set_payload, unlock_tree

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE

DEF LOWEST = 65536       # mmap_min_addr: below it the kernel looks at no process


cdef void *zeroed(size_t size) noexcept nogil:
    """Zeroed memory that is made when it is touched; NULL when there is none."""
    cdef void *room = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                           -1, 0)
    return NULL if room == <void *>-1 else room


cdef space_t *new_space(const space_t *parent, int fd) noexcept nogil:
    """The space of a child that the parent has just forked, whose descriptor `fd` becomes the space's.

    Its regions are the parent's, missing as far as is known, and served from the same sources. NULL without
    memory."""
    cdef space_t *space = <space_t *>zeroed(sizeof(space_t))
    cdef entry_t entry
    cdef served_t *served
    cdef uint64_t at = 0, total
    if space == NULL:
        return NULL
    space.fd = fd
    space.pagemap = -1
    space.ended = parent.ended
    space.tree = &space.table
    space.hears_events = parent.hears_events
    space.hears_moves = parent.hears_moves
    space.hears_unmap = parent.hears_unmap
    if plant(space.tree) != 0 or copy_books(parent.tree, space.tree, fd) != 0:
        free_copies(space)
        return NULL
    while next_entry(space.tree, at, INT64_MAX, &entry):
        at = entry.end
        if entry.payload != NULL:
            served = copy_served(space, <served_t *>entry.payload)
            lock_tree(space.tree)
            set_payload(space.tree, entry.start, entry.end, entry.id, served, &total)
            unlock_tree(space.tree)
    return space


cdef served_t *copy_served(space_t *space, const served_t *original) noexcept nogil:
    """The space's own copy, with nothing there yet; NULL without memory: then its pages fail closed."""
    cdef served_t *served = copy_of(space, original.original)
    cdef size_t words = original.n_pages // 64 + 1, streams = original.n_streams * sizeof(stream_t), size
    cdef copy_t *copy
    if load_int(<int *>&original.original.ending):
        return NULL
    if served != NULL:
        return served
    size = sizeof(copy_t) + streams + 2 * 8 * words
    copy = <copy_t *>zeroed(size)
    if copy == NULL:
        return NULL
    copy.size = size
    copy.next = space.copies
    space.copies = copy
    copy.served = original[0]
    copy.served.huge = 0    # nothing can be moved to another process
    copy.served.users = copy.served.scattered = 0
    copy.served.hold = NULL  # a child's changes are its own
    copy.served.tick = copy.served.skipped = copy.served.source_error = copy.served.kernel_error = 0
    copy.served.streams = <stream_t *>(copy + 1)
    copy.served.resident = <uint64_t *>(<char *>(copy + 1) + streams)
    copy.served.coming = copy.served.resident + words
    return &copy.served


cdef served_t *copy_of(const space_t *space, const served_t *original) noexcept nogil:
    """The child's copy of how a region of ours is served; NULL when it has none of that region."""
    cdef copy_t *copy = space.copies
    while copy != NULL:
        if copy.served.original == original:
            return &copy.served
        copy = copy.next
    return NULL


cdef void free_copies(space_t *space) noexcept nogil:
    cdef copy_t *copy
    while space.copies != NULL:
        copy = space.copies
        space.copies = copy.next
        munmap(copy, copy.size)
    fell(space.tree)
    munmap(space, sizeof(space_t))


cdef void free_space(space_t *space) noexcept nogil:
    """Close a child's descriptor, and forget the child. Nobody may use it any more."""
    c_close(space.fd)
    free_copies(space)


cdef bint has_ended(const space_t *space) noexcept nogil:
    """Whether the process is gone, or has replaced its memory (execve). Nothing tells it: one must ask."""
    # Nothing is registered there, which a process that lives answers with ENOENT.
    return uffd_writeprotect(space.fd, LOWEST, PAGE_SIZE, 0) == -ESRCH
