from libc.stdint cimport int64_t, uint64_t

from userfault._descriptor cimport Descriptor
from userfault._regions cimport RegionTable
from userfault._source cimport source_t
from userfault._tree cimport entry_t

cdef enum:
    LATENCY_BUCKETS = 496

# Field by field what STATS_DTYPE says.
cdef struct counters_t:
    uint64_t reads
    uint64_t records
    uint64_t duplicates
    uint64_t runs
    uint64_t pages
    uint64_t bytes
    uint64_t ioctls
    uint64_t existing
    uint64_t forgotten
    uint64_t parked
    uint64_t failed
    uint64_t unprotected
    uint64_t unknown
    uint64_t latency[LATENCY_BUCKETS]

cdef struct failure_t:
    uint64_t address
    int64_t region
    int64_t offset
    int error
    int stage


cdef class Engine:
    cdef Descriptor descriptor
    cdef RegionTable table
    cdef readonly dict keep     # what must live while the engine may use it
    cdef object buffers         # registered memory of the user's, alive as long as the thread
    cdef readonly bint finished  # the thread has ended, or never began
    cdef readonly int native_id
    cdef int wire
    cdef bint can_poison
    cdef int state
    cdef int fd
    cdef readonly int error     # errno that ended the loop, 0
    cdef counters_t counters
    cdef char *records
    cdef char *stage
    cdef uint64_t *pages
    cdef uint64_t *parked
    cdef size_t n_parked
    cdef failure_t *failures
    cdef char *unknowns

    cdef void finish(self) noexcept
    cdef int loop(self) noexcept nogil
    cdef size_t decode(self, size_t n) noexcept nogil
    cdef void serve(self, size_t n, int64_t since) noexcept nogil
    cdef void fill(self, const entry_t *entry, const source_t *source, uint64_t start,
                   uint64_t length) noexcept nogil
    cdef void stage_and_copy(self, const entry_t *entry, const source_t *source, uint64_t start,
                             uint64_t length, uint64_t has) noexcept nogil
    cdef void resolve(self, const entry_t *entry, uint64_t start, uint64_t source,
                      uint64_t length) noexcept nogil
    cdef void fail(self, const entry_t *entry, uint64_t page, int error, int stage) noexcept nogil
    cdef void park(self, uint64_t page) noexcept nogil
    cdef void unpark(self) noexcept nogil
