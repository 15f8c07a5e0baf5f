from libc.stdint cimport uint64_t

cdef enum decision_t:
    POISON = 0   # nothing can mend it: the page fails closed
    RETRY = 1    # interrupted: the same call again
    PARK = 2     # cannot be done now: again on a timer
    NEXT = 3     # the page is there: wake it, go on after it
    FORGET = 4   # nobody is waiting for it any more
    STOP = 5     # the descriptor is of no more use

cdef decision_t decide(int err) noexcept nogil
cpdef object error_for(str call, int err, uint64_t done=*)
