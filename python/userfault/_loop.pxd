from userfault._ahead cimport loop_t

cdef int run_loop(loop_t *loop) noexcept nogil
