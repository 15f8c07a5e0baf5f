from libc.stdint cimport int64_t, uint64_t

# What a lookup finds: the piece [start, end) of region `id`, whose offset 0 is at address `base`.
# `payload` is the engine's own, NULL until it serves the region.
ctypedef struct entry_t:
    uint64_t start
    uint64_t end
    uint64_t base
    int64_t id
    void *payload


cdef class RegionTable:
    cdef void *root      # the published tree, replaced as a whole
    cdef uint64_t epoch
    cdef int64_t readers[2]
    cdef void *limbo[2]  # replaced nodes, by the parity of the epoch that retired them
    cdef int64_t next_id

    # The lock-free face. A reader looks up between enter() and leave(ticket); what it found stays
    # allocated until then.
    cdef int enter(self) noexcept nogil
    cdef void leave(self, int ticket) noexcept nogil
    cdef bint find(self, uint64_t address, entry_t *found) noexcept nogil
    cdef bint empty(self) noexcept nogil

    # Writers hold the GIL.
    cdef int set_payload(self, uint64_t start, uint64_t end, void *payload) except -1
    cdef uint64_t drop(self, uint64_t start, uint64_t end) except? 0

    cdef tuple search(self, what, bint with_offsets)
