from libc.stdint cimport uint64_t

from userfault._budget cimport budget_t
from userfault._served cimport served_t

cdef int make_room(budget_t *budget, uint64_t n, bint may_wait, bint asked) noexcept nogil
cdef void expect_change(served_t *served, uint64_t page) noexcept nogil
cdef int change(served_t *served, uint64_t page) noexcept nogil
