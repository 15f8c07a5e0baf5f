from libc.stdint cimport uint64_t

from userfault._fill cimport worker_t
from userfault._served cimport served_t
from userfault._source cimport source_t

cdef int new_stage(worker_t *worker) noexcept nogil
cdef void free_stage(worker_t *worker) noexcept nogil
cdef bint stage_is_huge(worker_t *worker) noexcept nogil
cdef bint is_prompt(const served_t *served, uint64_t first, uint64_t end) noexcept nogil
cdef int bring(worker_t *worker, const source_t *source, uint64_t offset, uint64_t length,
               bint may_wait) noexcept nogil
