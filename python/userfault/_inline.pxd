from libc.stdint cimport uint64_t

from userfault._ahead cimport loop_t

cdef enum:
    SPACES = 64   # engines that serve inline at the same time
    LEVELS = 4    # a fault, one of the source that serves it, one of that one's source, …
    HANDS = 16    # threads that serve at the same time, at each level; others wait for one of them

cdef int enrol(loop_t *loop) noexcept nogil
cdef void strike(loop_t *loop) noexcept nogil
cdef bint serve_own(uint64_t address, int writing) noexcept nogil
