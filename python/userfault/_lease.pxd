from libc.stdint cimport int64_t, uint64_t

cdef extern from "<sched.h>" nogil:
    ctypedef struct cpu_set_t:
        pass

# Zeroed memory is "nothing leased".
ctypedef struct lease_t:
    int64_t seen      # when `tid` last faulted alone
    int64_t look      # when to look for heirs next; 0: no more
    int64_t retry     # no lease before
    int64_t backoff
    int64_t tick      # the lease's beginning, in clock ticks since boot
    uint64_t served   # faults of the toucher under this lease
    int tid           # the toucher, or who may become it
    int streak
    int others        # rises with faults of others, falls with the toucher's
    int cpu
    bint held
    cpu_set_t saved   # the toucher's mask
    cpu_set_t own     # the engine thread's

# All of them on the engine thread, which is the calling thread. Times are CLOCK_MONOTONIC's nanoseconds.
# lease_saw best before the fault is resolved: to move a thread that sleeps costs nothing. lease_expire when
# nothing is pending, with the time of now: a toucher that waits for the engine is not quiet.
cdef void lease_saw(lease_t *lease, int tid, int64_t now) noexcept nogil
cdef void lease_saw_many(lease_t *lease, int64_t now) noexcept nogil
cdef bint lease_held(const lease_t *lease) noexcept nogil
cdef void lease_expire(lease_t *lease, int64_t now) noexcept nogil
cdef void lease_end(lease_t *lease) noexcept nogil
