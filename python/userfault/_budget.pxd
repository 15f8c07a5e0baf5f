from libc.stdint cimport uint64_t

from userfault._abi cimport pthread_mutex_t

cdef enum:
    BLOCK_PAGES = 16      # let go of together; a block lies in one word of a bitmap

    # Where a block is.
    ABSENT = 0
    FRESH = 1
    KEPT = 2
    GHOST = 3             # let go of a while ago: it is kept when it comes again

# Blocks, oldest first.
ctypedef struct fifo_t:
    uint64_t *entries     # a ring; NULL without a limit
    uint64_t room         # a power of two
    uint64_t taken
    uint64_t given
    uint64_t pages        # that are there of its blocks

# How much of several regions may be there at a time. All but `resident` and `reserved` under the lock.
cdef struct budget_t:
    pthread_mutex_t lock  # also of the members' records of changed pages
    uint64_t limit        # pages; UINT64_MAX: none
    uint64_t resident     # pages
    uint64_t reserved     # pages that somebody is bringing
    uint64_t step         # pages that are filled at a time
    int writers           # who write back now, without the lock
    fifo_t fresh          # came once
    fifo_t kept           # came again soon after they had gone
    fifo_t ghosts
    void **members        # served_t *, by number; NULL: nobody

cdef uint64_t entry_of(int member, uint64_t block, bint whole) noexcept nogil
cdef int member_of(uint64_t entry) noexcept nogil
cdef uint64_t block_of(uint64_t entry) noexcept nogil
cdef bint is_whole(uint64_t entry) noexcept nogil
cdef bint push(fifo_t *queue, uint64_t entry) noexcept nogil
cdef bint pop(fifo_t *queue, uint64_t *entry) noexcept nogil


cdef class Budget:
    cdef budget_t c
    cdef int pid
    cdef public object serving  # who lets go of pages: threads, or who faults; None: it has no array yet

    cdef int join(self, void *served) except -2
