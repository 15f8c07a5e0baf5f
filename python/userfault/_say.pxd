from libc.stdint cimport uint64_t

from userfault._served cimport hold_t, served_t

cdef void make_printable(char *text) noexcept nogil
cdef void say(hold_t *hold, const char *what, uint64_t offset, int error, const char *words,
              int *lines) noexcept nogil
cdef void say_why(served_t *served, const char *what, uint64_t offset, int error, int *lines) noexcept nogil
