from libc.stdint cimport uint64_t

from userfault._served cimport hold_t

cdef void say(hold_t *hold, const char *what, uint64_t offset, int error, int *lines) noexcept nogil
