cdef class Descriptor:
    cdef readonly int pid
    cdef readonly bint closed
    cdef public bint served      # an engine reads it: nobody else may
    cdef bint borrowed           # somebody else's number
    cdef int fd
    cdef int closed_fd           # readable for ever once closed: wakes the readers
    cdef int kick_fd             # drained by the engine: look at your flags
    cdef int holders

    cpdef int check(self) except -1
    cpdef int hold(self) except -1
    cpdef object release(self)
    cpdef object kick(self)
