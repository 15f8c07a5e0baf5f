cdef class Descriptor:
    cdef object __weakref__
    cdef readonly int pid
    cdef readonly bint closed
    cdef int served              # engines that read it: nobody else may
    cdef int readers             # reads in progress
    cdef bint borrowed           # somebody else's number
    cdef int fd
    cdef int closed_fd           # readable for ever once closed: wakes the readers
    cdef int kick_fd             # drained by the engine: look at your flags
    cdef int holders

    cpdef int check(self) except -1
    cdef int of_this_process(self) except -1
    cpdef int hold(self, bint even_closed=*) except -1
    cpdef object release(self)
    cpdef object kick(self)
