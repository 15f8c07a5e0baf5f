from libc.stdint cimport int64_t, uint64_t

from userfault._abi cimport pthread_mutex_t
from userfault._served cimport served_t
from userfault._space cimport space_t
from userfault._tree cimport entry_t

cdef enum:
    LATENCIES = 496
    ERRNOS = 134          # errnos end at 133 (EHWPOISON)
    FAILURES = 1024       # the last ones, for the report
    PARKED = 4096
    STAGE_BYTES = 2097152  # one huge page
    TRIES = 64

    # Where a page failed.
    NO_SOURCE = 0
    SOURCE = 1
    RESOLVE = 2
    LIMIT = 3

# Field by field what STATS_DTYPE says. Each thread counts for itself.
ctypedef struct counters_t:
    uint64_t reads
    uint64_t records
    uint64_t duplicates
    uint64_t coming
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
    uint64_t unprotected
    uint64_t unknown
    uint64_t handed
    uint64_t forks
    uint64_t remaps
    uint64_t removes
    uint64_t unmaps
    uint64_t errors[ERRNOS]
    uint64_t latency[LATENCIES]

ctypedef struct failure_t:
    uint64_t address
    int64_t region
    int64_t offset
    int error
    int stage

ctypedef struct parked_t:
    space_t *space
    uint64_t page
    int64_t since
    bint protected        # write-protected, not missing

# What the threads of an engine share.
ctypedef struct desk_t:
    bint can_poison
    # Held by the reading thread from before it reads an event until the books say what that said; and by
    # workers while they have the kernel fill what the books say.
    pthread_mutex_t layout
    pthread_mutex_t lock  # of all that follows; held for moments, and never in a system call
    parked_t *parked      # faults to try again
    size_t n_parked
    uint64_t lost_from    # what found no room there lies between these
    uint64_t lost_to
    failure_t *failures   # a ring
    uint64_t n_failures

# One thread that fills. Times are CLOCK_MONOTONIC, in ns.
ctypedef struct worker_t:
    desk_t *desk
    space_t *space        # the memory that is being filled
    bint guarded          # others read the events that change its layout
    bint visits           # it is a thread of the program's, that asks for pages ahead of need
    bint awake            # it is the thread that faulted: nobody sleeps, and it tries again itself
    counters_t counters
    int64_t since         # when the faults at hand were read
    int tries             # times that the end of an event is waited for, awake, until faults are parked
    char *stage           # STAGE_BYTES, aligned to them
    uint64_t reserved     # pages, of the budget of the array that it fills
    int64_t small_until   # the stage was no huge page: do not try again before

cdef uint64_t fill(worker_t *worker, const entry_t *entry, served_t *served, uint64_t first, uint64_t end,
                   uint64_t want, uint64_t want_end, uint64_t mode, bint may_wait) noexcept nogil
cdef void fill_grown(worker_t *worker, const entry_t *entry, uint64_t page, uint64_t mode) noexcept nogil
cdef void fail(worker_t *worker, const entry_t *entry, served_t *served, uint64_t page, int error,
               int stage) noexcept nogil
cdef void wake(worker_t *worker, uint64_t start, uint64_t end) noexcept nogil
cdef void park(worker_t *worker, served_t *served, uint64_t page, bint protected) noexcept nogil
cdef void count_latency(worker_t *worker, served_t *served, uint64_t n, int64_t ns) noexcept nogil
