from libc.stdint cimport int64_t, uint64_t

from userfault._ahead cimport loop_t
from userfault._served cimport served_t
from userfault._tree cimport entry_t

cdef void serve(loop_t *loop, size_t n, int64_t since) noexcept nogil
cdef uint64_t chunk_start(const served_t *served, uint64_t page) noexcept nogil
cdef void recheck(int pagemap, const entry_t *entry, served_t *served, uint64_t page, uint64_t low,
                  uint64_t high) noexcept nogil
cdef void take_whole(const entry_t *entry, served_t *served, uint64_t low, uint64_t high, uint64_t *first,
                     uint64_t *end) noexcept nogil
