"""The worker threads of an engine: they fill from sources that may wait, while reading goes on.

The pages of a job are marked as coming, so that further faults of theirs are left to it. A worker
that is through clears the marks; faults that were skipped meanwhile it wakes, for they may have come
too late for its own wake-up, and ask again.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport INT64_MAX, uint64_t
from libc.stdlib cimport calloc, free

from userfault._abi cimport (
    add_int, c_write, load_u64, now, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, swap_int_if,
)
from userfault._bits cimport clear_bits, set_bits
from userfault._fill cimport TRIES, count_latency, desk_t, fill, wake, worker_t
from userfault._ioctl cimport PAGE_SIZE
from userfault._served cimport served_t
from userfault._space cimport space_t
from userfault._stage cimport free_stage, new_stage
from userfault._tree cimport enter, entry_t, find, leave, next_entry

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int SIG_BLOCK, SIG_SETMASK, SIGBUS, SIGSEGV, SIGFPE, SIGILL
    int sigfillset(sigset_t *set)
    int sigdelset(sigset_t *set, int signal)
    int pthread_sigmask(int how, const sigset_t *set, sigset_t *old)

cdef extern from "<pthread.h>" nogil:
    int pthread_create(pthread_t *thread, const void *attributes, void *(*start)(void *) noexcept nogil,
                       void *argument)
    int pthread_join(pthread_t thread, void **result)
    int pthread_cond_init(pthread_cond_t *condition, const void *attributes)
    int pthread_cond_destroy(pthread_cond_t *condition)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_signal(pthread_cond_t *condition)
    int pthread_cond_broadcast(pthread_cond_t *condition)

DEF JOBS = 1024


cdef int start_thread(pthread_t *thread, void *(*run)(void *) noexcept nogil, void *argument) noexcept nogil:
    """A thread without signals: those are for the threads that run Python's handlers. 0 or errno.

    Not a threading.Thread: that needs the GIL to begin, which a thread that sleeps in a fault may hold.
    """
    cdef sigset_t blocked, before
    cdef int result
    sigfillset(&blocked)
    # What is raised in the thread itself cannot be blocked.
    sigdelset(&blocked, SIGBUS)
    sigdelset(&blocked, SIGSEGV)
    sigdelset(&blocked, SIGFPE)
    sigdelset(&blocked, SIGILL)
    pthread_sigmask(SIG_BLOCK, &blocked, &before)
    result = pthread_create(thread, NULL, run, argument)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return result


cdef int new_crew(crew_t *crew, desk_t *desk, int kick_fd) noexcept nogil:
    """A crew of nobody, in zeroed memory. 0 or -errno."""
    crew.desk = desk
    crew.kick_fd = kick_fd
    crew.queues[URGENT].jobs = <job_t *>calloc(JOBS, sizeof(job_t))
    crew.queues[AHEAD].jobs = <job_t *>calloc(JOBS, sizeof(job_t))
    if crew.queues[URGENT].jobs == NULL or crew.queues[AHEAD].jobs == NULL:
        return -ENOMEM
    return -pthread_cond_init(&crew.work, NULL)


cdef void free_crew(crew_t *crew) noexcept nogil:
    """After `dismiss`, or in a fork child, which has none of the threads."""
    cdef int i
    for i in range(crew.n_workers):
        free(crew.workers[i])
    free(crew.queues[URGENT].jobs)
    free(crew.queues[AHEAD].jobs)


cdef int hire(crew_t *crew) noexcept nogil:
    """One more worker. 0 or -errno. Not while another thread hires or dismisses."""
    cdef worker_t *worker = <worker_t *>calloc(1, sizeof(worker_t))
    cdef int result
    if worker == NULL:
        return -ENOMEM
    worker.desk = crew.desk
    worker.guarded = True
    result = new_stage(worker)
    if result == 0:
        crew.workers[crew.n_workers] = worker
        result = -start_thread(&crew.threads[crew.n_workers], run, crew)
        if result == 0:
            crew.n_workers += 1
            return 0
        free_stage(worker)
    free(worker)
    return result


cdef void dismiss(crew_t *crew) noexcept nogil:
    """Let everybody finish what was asked, and end. Their counters stay."""
    cdef int i
    pthread_mutex_lock(&crew.desk.lock)
    crew.ending = True
    pthread_cond_broadcast(&crew.work)
    pthread_mutex_unlock(&crew.desk.lock)
    for i in range(crew.n_workers):
        pthread_join(crew.threads[i], NULL)
    for i in range(crew.n_workers):
        free_stage(crew.workers[i])


cdef bint hand(crew_t *crew, const job_t *job, uint64_t first, uint64_t end) noexcept nogil:
    """Ask for the pages [first, end) of the region, of which none is coming. False: there is no room."""
    cdef queue_t *queue = &crew.queues[URGENT if job.want < job.want_end else AHEAD]
    cdef job_t *place
    cdef bint room
    pthread_mutex_lock(&crew.desk.lock)
    room = queue.given - queue.taken < JOBS
    if room:
        place = &queue.jobs[queue.given % JOBS]
        place[0] = job[0]
        place.skipped = load_u64(&job.served.skipped)
        set_bits(job.served.coming, first, end)
        add_int(&job.space.users, 1)
        queue.given += 1
        if crew.idle:
            pthread_cond_signal(&crew.work)
    pthread_mutex_unlock(&crew.desk.lock)
    return room


cdef void *run(void *argument) noexcept nogil:
    """A worker's whole life."""
    cdef crew_t *crew = <crew_t *>argument
    cdef queue_t *queue
    cdef worker_t *worker
    cdef job_t job
    cdef uint64_t one = 1, parked
    pthread_mutex_lock(&crew.desk.lock)
    worker = crew.workers[crew.started]
    crew.started += 1
    while True:
        queue = &crew.queues[URGENT]
        if queue.given == queue.taken:
            queue = &crew.queues[AHEAD]
        if queue.given == queue.taken:
            if crew.ending:
                break
            crew.idle += 1
            pthread_cond_wait(&crew.work, &crew.desk.lock)
            crew.idle -= 1
            continue
        job = queue.jobs[queue.taken % JOBS]
        queue.taken += 1
        pthread_mutex_unlock(&crew.desk.lock)
        parked = worker.counters.parked
        worker.space = job.space
        do(worker, &job)
        add_int(&job.space.users, -1)
        # The reading thread, which may sleep without a timeout, tries again what was parked.
        if swap_int_if(&crew.waited_for, 1, 0) or worker.counters.parked != parked:
            c_write(crew.kick_fd, &one, sizeof(one))
        pthread_mutex_lock(&crew.desk.lock)
    pthread_mutex_unlock(&crew.desk.lock)
    return NULL


cdef void do(worker_t *worker, const job_t *job) noexcept nogil:
    cdef space_t *space = job.space
    cdef entry_t entry
    cdef served_t *served = NULL
    cdef uint64_t first, end, last, address = job.start, parked = worker.counters.parked
    cdef uint64_t changes = load_u64(&space.changes)
    cdef int ticket = enter(space.tree)
    # Parts of the region may have been given up since; the first that was not begins at `address`.
    while address < job.end and served == NULL:
        if find(space.tree, address, &entry) and is_of(job, &entry):
            served = job.served
        else:
            address += PAGE_SIZE
    if served == NULL and space.hears_moves and next_piece(space, job.served, 0, &entry):
        served = job.served  # all of it was moved or unmapped
    if served != NULL:
        # From here on whoever detaches the region waits for us, and no longer than for us.
        add_int(&served.users, 1)
    leave(space.tree, ticket)
    if served == NULL:
        # Closed, or given up. Whoever waits there asks again, and is told so.
        wake(worker, job.start, job.end)
        return
    worker.since = job.since
    worker.tries = TRIES
    first = (job.start - job.base) // PAGE_SIZE
    end = (job.end - job.base) // PAGE_SIZE
    last = end
    if address < job.end:
        last = (min(job.end, entry.end) - job.base) // PAGE_SIZE
        fill(worker, &entry, served, (address - job.base) // PAGE_SIZE, last,
             (job.want - job.base) // PAGE_SIZE, (job.want_end - job.base) // PAGE_SIZE, 0, True)
    clear_bits(served.coming, first, end)
    if address > job.start or last < end or load_u64(&served.skipped) != job.skipped:
        wake(worker, job.start, job.end)
        if served.scattered or load_u64(&space.changes) != changes or address == job.end:
            # Those who were left to us may wait at other addresses.
            address = 0
            while next_piece(space, served, address, &entry):
                wake(worker, entry.start, entry.end)
                address = entry.end
    if job.n_faults and worker.counters.parked == parked:
        count_latency(worker, served, job.n_faults, now() - job.since)
    add_int(&served.users, -1)


cdef inline bint is_of(const job_t *job, const entry_t *entry) noexcept nogil:
    return entry.payload == <void *>job.served and entry.base == job.base


cdef bint next_piece(space_t *space, const served_t *served, uint64_t start, entry_t *entry) noexcept nogil:
    """The first piece of the region at or after `start`; False when there is none."""
    while next_entry(space.tree, start, INT64_MAX, entry):
        if entry.payload == <void *>served:
            return True
        start = entry.end
    return False
