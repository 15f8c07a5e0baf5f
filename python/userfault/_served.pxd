from libc.stdint cimport int64_t, uint64_t

from userfault._budget cimport Budget, budget_t
from userfault._source cimport Source, source_t

cdef enum:
    HUGE_PAGES = 512      # of 4 KiB: what one huge page holds
    ADAPTIVE = -1
    REGION_LATENCIES = 48

# A run of faults that come one after the other, in pages of the region.
ctypedef struct stream_t:
    uint64_t length  # how far it has come, without what it found filled by others
    uint64_t next    # one past its last fault
    uint64_t end     # one past what was asked for ahead of it
    uint64_t used    # the region's tick of its last fault

# Field by field what REGION_STATS_DTYPE says. Several threads count.
ctypedef struct region_counters_t:
    uint64_t records
    uint64_t duplicates
    uint64_t runs
    uint64_t pages
    uint64_t bytes
    uint64_t ahead
    uint64_t moved
    uint64_t ioctls
    uint64_t existing
    uint64_t forgotten
    uint64_t parked
    uint64_t failed
    uint64_t changed
    uint64_t written
    uint64_t evicted
    uint64_t latency[REGION_LATENCIES]

# What a lazy array has beside. It is never moved, and its memory is this process's.
ctypedef struct hold_t:
    budget_t *budget
    uint64_t pages         # that are there, with a limit
    int member             # its number there; -1: nothing limits it
    unsigned char *blocks  # where each block is, with a limit; else NULL
    uint64_t base          # the address of page 0
    int fd
    int pagemap            # /proc/self/pagemap; -1: not to be had
    uint64_t *changed      # a bit a page: it may differ from the source; NULL: nobody writes
    uint64_t *writing      # a bit a page: it is being written back
    int users              # who write back now
    int pins               # blocks of it that are out of their queue, to be let go of; under the lock
    uint64_t first_byte    # of the region, that may be written back
    uint64_t end_byte
    int write_error        # errno of the last page that could not be written back; 0
    int64_t patience       # ns that a page which the source does not give is tried again; 0: it fails at once
    int64_t retry_at
    int warned             # lines on stderr: of what may yet be mended
    int lost               # of pages that cannot be had
    const char *name

# How one region is served; the payload of its pieces in the table. All counts are pages, from its offset 0.
cdef struct served_t:
    source_t source
    int64_t id
    uint64_t n_pages
    uint64_t unit          # filled together
    uint64_t chunk         # filled at once for a fault: the unit, or a huge page of it
    uint64_t granule       # a multiple of it, or a part: filled at a time
    int64_t readahead      # past each fault, or ADAPTIVE
    uint64_t most_ahead    # of a stream
    int huge               # moves of huge pages are worth trying; cleared when the kernel refuses one
    int users              # worker threads that fill from it now
    int ending             # it is let go of: fork children get no copy any more
    int scattered          # some page of it may lie at several addresses (MREMAP_DONTUNMAP)
    uint64_t *resident     # a bit a page: it is there, as far as is known
    uint64_t *coming       # a bit a page: a worker thread was asked for it
    uint64_t skipped       # faults left to a worker thread because their page was coming
    uint64_t source_error  # errno of the last page that nobody waited for and that its source did not give
    uint64_t kernel_error  # likewise, that the kernel did not take
    const served_t *original     # itself, or whose copy it is for a fork child
    stream_t *streams
    int n_streams
    uint64_t tick
    int looking                  # of threads that serve their own faults, one at a time reads ahead
    hold_t *hold                 # NULL: no lazy array, or a fork child's copy
    region_counters_t *counters  # shared with the copies for fork children

cdef uint64_t first_missing(const served_t *served, uint64_t first, uint64_t end) noexcept nogil
cdef uint64_t missing_end(const served_t *served, uint64_t first, uint64_t end) noexcept nogil
cdef uint64_t look_ahead(served_t *served, uint64_t first, uint64_t end) noexcept nogil
cdef int look(served_t *served, int pagemap, uint64_t base, uint64_t first, uint64_t end) noexcept nogil
cdef int resync(served_t *served, int pagemap, uint64_t base, uint64_t first, uint64_t end) noexcept nogil


cdef class Served:
    cdef served_t c
    cdef region_counters_t counters
    cdef hold_t hold
    cdef readonly Budget budget
    cdef bytes name
    cdef readonly Source source
