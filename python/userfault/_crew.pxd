from libc.stdint cimport int64_t, uint64_t

from userfault._fill cimport desk_t, worker_t
from userfault._served cimport served_t
from userfault._space cimport space_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

cdef enum:
    MOST_WORKERS = 64

    # Queues: what threads wait for is done first.
    URGENT = 0
    AHEAD = 1

# Addresses [start, end) of a region, whose pages are marked as coming; threads wait for [want, want_end).
ctypedef struct job_t:
    space_t *space
    served_t *served       # only to be looked at while a piece of the table has it
    uint64_t base
    uint64_t start
    uint64_t end
    uint64_t want
    uint64_t want_end
    int64_t since
    uint64_t n_faults
    uint64_t skipped       # the region's count when the job was given

ctypedef struct queue_t:
    job_t *jobs            # a ring
    uint64_t taken
    uint64_t given

# The worker threads of an engine, and what they were asked for.
ctypedef struct crew_t:
    desk_t *desk
    int kick_fd            # wakes the reading thread
    worker_t *workers[MOST_WORKERS]
    pthread_t threads[MOST_WORKERS]
    int n_workers
    int waited_for         # the reading thread wants to be kicked when a job is done
    # Under the desk's lock:
    queue_t queues[2]
    int started            # threads that have taken their place
    int idle
    bint ending
    pthread_cond_t work

cdef int new_crew(crew_t *crew, desk_t *desk, int kick_fd) noexcept nogil
cdef void free_crew(crew_t *crew) noexcept nogil
cdef int hire(crew_t *crew) noexcept nogil
cdef void dismiss(crew_t *crew) noexcept nogil
cdef bint hand(crew_t *crew, const job_t *job, uint64_t first, uint64_t end) noexcept nogil
cdef int start_thread(pthread_t *thread, void *(*run)(void *) noexcept nogil, void *argument) noexcept nogil
