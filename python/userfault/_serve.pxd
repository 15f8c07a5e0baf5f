from libc.stdint cimport int64_t

from userfault._ahead cimport loop_t

cdef void serve(loop_t *loop, size_t n, int64_t since) noexcept nogil
