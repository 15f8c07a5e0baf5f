from libc.stdint cimport uint64_t

from userfault._budget cimport budget_t, fifo_t
from userfault._served cimport hold_t, served_t

cdef bint any_changed(const served_t *served, uint64_t first, uint64_t end) noexcept nogil
cdef void there(served_t *served, uint64_t first, uint64_t end, bint asked) noexcept nogil
cdef void take_in(served_t *served, uint64_t first, uint64_t end, bint asked) noexcept nogil
cdef void gone(served_t *served, uint64_t first, uint64_t end) noexcept nogil
cdef uint64_t take_out(served_t *served, uint64_t first, uint64_t end) noexcept nogil
cdef void put_back(budget_t *budget, fifo_t *queue, uint64_t entry) noexcept nogil
cdef void believe(served_t *served, uint64_t word, uint64_t are, uint64_t are_not) noexcept nogil
cdef bint leave_budget(hold_t *hold) noexcept nogil
