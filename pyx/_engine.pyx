"""`Engine`: the threads that serve one userfaultfd, from their start to their end, and what they report.

A thread that touches a missing page from Python sleeps in the kernel holding the GIL, so nothing
between read and resolve (_loop, _crew, _fill) may take it, allocate through Python, or wait for a
thread that may hold it.

An engine never leaves registered memory unserved. What no source serves fails closed: the page is
poisoned (or, before Linux 6.6, made PROT_NONE), so that a touch raises SIGBUS (SIGSEGV) instead of
waiting for ever or reading zeros. An engine whose service is closed stays as the keeper that does just
this, until no registered memory is left.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport errno
from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import os
import time

import numpy as np

from userfault._abi cimport (
    UFFD_FEATURE_EVENT_FORK, UFFD_FEATURE_EVENT_REMAP, UFFD_FEATURE_EVENT_UNMAP,
    add_int, aligned_alloc, c_close, getpid, load_int, msg_record, now, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, store_int, store_ptr, swap_int_if, usleep,
)
from userfault._ahead cimport (
    ANY, CAPACITY, GOALS, GONE, KEEPER, MOST_DUE, SERVING, UNKNOWNS, due_t, goal_t, loop_t,
)
from userfault._crew cimport MOST_WORKERS, dismiss, free_crew, hire, new_crew, pthread_t, start_thread
from userfault._descriptor cimport Descriptor
from userfault._errno cimport error_for
from userfault._fill cimport (
    ERRNOS, FAILURES, LATENCIES, PARKED, TRIES, counters_t, failure_t, fill, parked_t, worker_t,
)
from userfault._inline cimport HANDS, LEVELS, SPACES, enrol, strike
from userfault._ioctl cimport PAGE_SIZE, uffd_wake
from userfault._follow cimport delist, end_children, enlist, leave_children, pin_child
from userfault._loop cimport run_loop
from userfault._regions cimport RegionTable, drop_payloads, give_payload, quiesce
from userfault._served cimport Served, first_missing, missing_end, served_t
from userfault._space cimport copy_of, space_t
from userfault._stage cimport free_stage, new_stage
from userfault._tree cimport empty, enter, entry_t, find, leave, tree_t

from userfault import _sigbus as sigbus
from userfault._consts import DTYPES, WIRES
from userfault._descriptor import hearers, inherited
from userfault._fill import bucket_start
from userfault.errors import BusyError, ClosedError, RangeError, SourceError, UffdError

cdef extern from "<sys/epoll.h>" nogil:
    int epoll_create1(int flags)
    int EPOLL_CLOEXEC

cdef extern from "<pthread.h>" nogil:
    int pthread_detach(pthread_t thread)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)

cdef extern from "<unistd.h>" nogil:
    int gettid()


STAGES = ("no source serves it", "its source failed", "the kernel refused it",
          "its memory limit left no room")
PLACEMENTS = ("spin", "any", "pair")
DEF AT_ONCE = 4096       # pages that are filled between two looks at the clock

LATENCY_DTYPE = np.dtype([("from_ns", "<u8"), ("count", "<u8")])
COUNTERS = (
    "reads", "records", "duplicates", "coming", "runs", "pages", "bytes", "ahead", "moved", "ioctls",
    "existing", "forgotten", "parked", "failed", "unprotected", "unknown", "handed",
    "forks", "remaps", "removes", "unmaps")
STATS_DTYPE = np.dtype([(name, "<u8") for name in COUNTERS]
                       + [("errors", "<u8", (ERRNOS,)), ("latency", LATENCY_DTYPE, (LATENCIES,))])
FAILURE_DTYPE = np.dtype([("address", "<u8"), ("region", "<i8"), ("offset", "<i8"), ("errno", "<i4"),
                          ("stage", "<i4")])
assert FAILURE_DTYPE.itemsize == sizeof(failure_t)
assert sizeof(counters_t) == 8 * (len(COUNTERS) + ERRNOS + LATENCIES)


cdef int enter_visitor(Engine engine) noexcept nogil:
    """A visitor that no other thread uses, locked."""
    cdef int i
    for i in range(VISITORS):
        if pthread_mutex_trylock(&engine.visiting[i]) == 0:
            return i
    pthread_mutex_lock(&engine.visiting[0])
    return 0


cdef bint visit(Engine engine, worker_t *worker, served_t *served, uint64_t first,
                uint64_t end) noexcept nogil:
    """Fill the pages [first, end) in the calling thread; False: nobody serves them any more."""
    cdef tree_t *tree = &engine.table.tree
    cdef int ticket = enter(tree)
    cdef entry_t entry
    cdef uint64_t address = served.hold.base + first * PAGE_SIZE
    cdef bint there = find(tree, address, &entry) and entry.payload == <void *>served
    if there:
        add_int(&served.users, 1)
    leave(tree, ticket)
    if there:
        worker.since = now()
        worker.tries = TRIES
        fill(worker, &entry, served, first, end, 0, 0, 0, True)
        add_int(&served.users, -1)
    return there


cdef void *read_and_serve(void *argument) noexcept nogil:
    """The reading thread's whole life. It takes the GIL only when there is nothing left to serve."""
    cdef loop_t *loop = &(<Engine>argument).loop
    cdef int result
    (<Engine>argument).native_id = gettid()
    result = run_loop(loop)
    store_int(&loop.state, GONE)
    dismiss(&loop.crew)
    # With no child left there is nobody to ask; after a failed read their threads fail closed.
    end_children(loop)
    with gil:
        engine = <Engine>argument
        (<Engine>engine).error = -result
        (<Engine>engine).finish()
        Py_DECREF(engine)
    return NULL


cdef class Engine:
    """Serves the faults of one userfaultfd from what the table's payloads name."""

    def __cinit__(self, Descriptor descriptor not None, RegionTable table not None, api, bint can_poison,
                  bint can_move, uint64_t events):
        cdef loop_t *loop = &self.loop
        cdef int i
        self.pid = getpid()
        loop.own.pagemap = loop.epoll = -1
        loop.own.own = True
        loop.own.hears_events = events != 0
        loop.own.hears_moves = events & (UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP) != 0
        loop.own.hears_unmap = events & UFFD_FEATURE_EVENT_UNMAP != 0
        self.hears_forks = events & UFFD_FEATURE_EVENT_FORK != 0
        loop.state = GONE
        self.finished = True
        self.keep = {}
        self.descriptor = descriptor
        self.table = table
        self.can_move = can_move
        loop.wire = WIRES[api]
        loop.kick_fd = descriptor.kick_fd
        loop.own.tree = &table.tree
        loop.desk.can_poison = can_poison
        loop.worker.desk = &loop.desk
        loop.worker.space = &loop.own
        for i in range(VISITORS):
            self.visitors[i].space = &loop.own
            self.visitors[i].desk = &loop.desk
            self.visitors[i].guarded = self.visitors[i].visits = True
            pthread_mutex_init(&self.visiting[i], NULL)
        loop.may_spin = len(os.sched_getaffinity(0)) > 1
        pthread_mutex_init(&loop.desk.lock, NULL)
        pthread_mutex_init(&loop.desk.layout, NULL)
        loop.records = <char *>aligned_alloc(4096, CAPACITY * sizeof(msg_record))
        loop.pages = <uint64_t *>calloc(CAPACITY, sizeof(uint64_t))
        loop.due = <due_t *>calloc(MOST_DUE, sizeof(due_t))
        loop.unknowns = <char *>calloc(UNKNOWNS, sizeof(msg_record))
        loop.parked = <parked_t *>calloc(PARKED, sizeof(parked_t))
        loop.desk.parked = <parked_t *>calloc(PARKED, sizeof(parked_t))
        loop.desk.failures = <failure_t *>calloc(FAILURES, sizeof(failure_t))
        if not (loop.records and loop.pages and loop.due and loop.unknowns and loop.parked
                and loop.desk.parked and loop.desk.failures):
            raise MemoryError
        if new_crew(&loop.crew, &loop.desk, descriptor.kick_fd) != 0 or new_stage(&loop.worker) != 0:
            raise MemoryError
        if self.hears_forks:
            # Now: when a child has to be followed there may be no descriptor left.
            loop.epoll = epoll_create1(EPOLL_CLOEXEC)
            if loop.epoll < 0:
                raise error_for("epoll_create1", errno)
        try:
            loop.own.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pass  # read-ahead learns of dropped pages one by one, and nothing is moved
        inherited.add(self)
        hearers.add(self)

    def __dealloc__(self):
        cdef loop_t *loop = &self.loop
        cdef int i
        if self.pid == getpid():
            # A fork child has no stage (DONTFORK), and may have other memory there.
            free_stage(&loop.worker)
            for i in range(VISITORS):
                free_stage(&self.visitors[i])
        if loop.own.pagemap >= 0:
            c_close(loop.own.pagemap)
        if loop.epoll >= 0:
            c_close(loop.epoll)
        free_crew(&loop.crew)
        free(loop.hands)
        free(loop.records)
        free(loop.pages)
        free(loop.due)
        free(loop.unknowns)
        free(loop.parked)
        free(loop.desk.parked)
        free(loop.desk.failures)

    def start(self, bint as_keeper, buffers):
        """Start the reading thread, which keeps `buffers` alive with it.

        Raises UffdError when there is no thread to be had, and BusyError when a service would share the
        records with a read that is in progress.
        """
        cdef pthread_t thread
        cdef int err
        if self.descriptor.readers and not as_keeper:
            raise BusyError("an EventReader is in read(): let it return first")
        self.loop.own.fd = self.descriptor.hold()
        self.loop.state = KEEPER if as_keeper else SERVING
        self.finished = False
        self.buffers = buffers
        self.descriptor.served += 1
        enlist(&self.loop)
        Py_INCREF(self)
        err = start_thread(&thread, read_and_serve, <void *>self)
        if err:
            self.finish()
            Py_DECREF(self)
            raise no_thread(err)
        pthread_detach(thread)
        self.wake_all()

    cdef void finish(self) noexcept:
        if self.loop.hands != NULL:
            strike(&self.loop)
        self.loop.state = GONE
        self.finished = True
        delist(&self.loop)
        self.buffers = None
        self.descriptor.served -= 1
        self.descriptor.release()

    def wake_all(self):
        """Faults that somebody read and did not resolve are delivered again only after a wake."""
        cdef uint64_t start, length
        for start, length, _, _ in self.table.ranges().tolist():
            uffd_wake(self.loop.own.fd, start, length)

    def adopt(self):
        """Serve a service (again); False when the thread is gone, or about to go."""
        return not self.finished and (load_int(&self.loop.state) == SERVING
                                      or bool(swap_int_if(&self.loop.state, KEEPER, SERVING)))

    def employ(self, int workers, int placement):
        """Have at least so many worker threads, and place them so. Raises UffdError for want of threads."""
        cdef int result = 0
        store_int(&self.loop.placement, placement)
        while self.loop.crew.n_workers < min(workers, <int>MOST_WORKERS) and result == 0:
            result = hire(&self.loop.crew)
        if result:
            raise no_thread(-result)
        self.descriptor.kick()

    def serve_inline(self):
        """Have faults served by the threads that take them, also when it is the keeper.

        Raises UffdError (EBUSY: too many userfaultfds are), UnsupportedError.
        """
        cdef worker_t *hands
        cdef int result
        sigbus.take()
        if self.loop.hands == NULL:
            hands = <worker_t *>calloc(LEVELS * HANDS, sizeof(worker_t))
            if hands == NULL:
                raise MemoryError
            store_ptr(<void **>&self.loop.hands, hands)
            result = enrol(&self.loop)
            if result:
                store_ptr(<void **>&self.loop.hands, NULL)
                free(hands)
                raise error_for(f"serving inline, which {SPACES} userfaultfds may be", -result)
            self.descriptor.kick()

    def retire(self):
        """Become the keeper; wait for the thread to end as long as there is nothing left to keep."""
        store_int(&self.loop.placement, ANY)  # give a lease back
        swap_int_if(&self.loop.state, SERVING, KEEPER)
        self.descriptor.kick()
        while empty(&self.table.tree) and not self.children and not self.finished:
            time.sleep(200e-6)

    def attach(self, uint64_t start, uint64_t length, Served served not None):
        """Serve the region, registered at [start, start + length), so from now on.

        Raises ClosedError, UffdError when the engine failed, SourceError, RangeError, and changes nothing.
        """
        cdef int64_t region = served.c.id
        if self.error:
            raise error_for("the engine's read", self.error)
        if load_int(&self.loop.state) != SERVING:
            raise ClosedError("the service is closed")
        if region in self.keep:
            raise SourceError("the region is served already")
        if served.c.source.size <= length - PAGE_SIZE:
            raise SourceError(f"the source has {served.c.source.size} bytes, the region {length}: "
                              "map no more than the source fills")
        self.keep[region] = served
        if served.hold.changed != NULL:
            self.loop.own.tracks = True
        if not give_payload(&self.table.tree, start, start + length, region, &served.c):
            del self.keep[region]
            raise RangeError("the region is no longer registered")

    def detach(self, int64_t region, uint64_t start, uint64_t length):
        """Let go of one region's source; when it returns, the engine uses it no more."""
        served = self.keep.get(region)
        if served is not None:
            if self.loop.own.hears_moves:
                start, length = 0, INT64_MAX
            give_payload(&self.table.tree, start, start + length, region, NULL)
            self.let_go([served])

    def detach_all(self):
        """Take no new ones, and let go of every source; when it returns, the engine uses none of them."""
        swap_int_if(&self.loop.state, SERVING, KEEPER)
        kept = list(self.keep.values())
        # Until there is none: what is moved meanwhile may be passed over.
        while drop_payloads(&self.table.tree):
            pass
        self.let_go(kept)

    cdef int let_go(self, kept) except -1:
        """Wait until nobody uses the sources of the regions, which our own memory has no more; fork children
        lose them too."""
        cdef space_t *space
        cdef served_t *copy
        cdef Served served
        for served in kept:
            store_int(&served.c.ending, True)
        quiesce(&self.table.tree)
        for served in kept:
            wait_for_workers(&served.c)
        # A child that was being adopted meanwhile is in the list before the layout's lock is to be had.
        space = pin_child(&self.loop, NULL)
        while space != NULL:
            for served in kept:
                give_payload(space.tree, 0, INT64_MAX, served.c.id, NULL)
            quiesce(space.tree)
            for served in kept:
                copy = copy_of(space, &served.c)
                if copy != NULL:
                    wait_for_workers(copy)
            space = pin_child(&self.loop, space)
        for served in kept:
            self.keep.pop(served.c.id, None)

    def settle(self):
        """Wait until every event is heeded that was read so far."""
        if self.loop.own.hears_events and self.pid == getpid():
            with nogil:
                pthread_mutex_lock(&self.loop.desk.layout)
                pthread_mutex_unlock(&self.loop.desk.layout)

    def leave_to_parent(self):
        """In a fork child: close what was inherited."""
        leave_children(&self.loop)
        delist(&self.loop)
        if self.loop.own.pagemap >= 0:
            c_close(self.loop.own.pagemap)
        self.loop.own.pagemap = self.loop.own.fd = -1

    def order(self, uint64_t start, uint64_t length, int64_t region):
        """Have [start, start + length) of the region filled; False: too many orders wait already.

        Raises ClosedError when the engine serves no more.
        """
        cdef goal_t *order
        cdef bint room
        if load_int(&self.loop.state) != SERVING:
            raise ClosedError("the service is closed")
        pthread_mutex_lock(&self.loop.desk.lock)
        room = self.loop.n_orders < GOALS
        if room:
            order = &self.loop.orders[self.loop.n_orders]
            order.next = start
            order.end = start + length
            order.id = region
            self.loop.n_orders += 1
        pthread_mutex_unlock(&self.loop.desk.lock)
        self.descriptor.kick()
        return room

    def fill(self, Served served not None, const uint64_t[::1] firsts, const uint64_t[::1] ends,
             double seconds):
        """Fill what is missing of the pages [first, end) of each pair, in this thread and without the GIL, as
        far as that goes in so many seconds. For lazy arrays.

        Returns how many pairs are done, and the page that the next of them begins with. What cannot be had is
        left out, for `take_errors`. Raises ClosedError, UffdError.
        """
        cdef served_t *c = &served.c
        cdef Py_ssize_t i = 0, n = firsts.shape[0]
        cdef uint64_t page = firsts[0] if n else 0, stop
        cdef int64_t until = now() + <int64_t>(seconds * 1e9)
        cdef bint there = True
        cdef int result = 0, k
        with nogil:
            k = enter_visitor(self)
            if self.visitors[k].stage == NULL:
                result = new_stage(&self.visitors[k])
            while result == 0 and i < n and there and now() < until:
                page = first_missing(c, page, ends[i])
                stop = missing_end(c, page, min(ends[i], page + AT_ONCE))
                if page < stop:
                    there = visit(self, &self.visitors[k], c, page, stop)
                page = stop
                if page >= ends[i] and there:
                    i += 1
                    page = firsts[i] if i < n else 0
            pthread_mutex_unlock(&self.visiting[k])
        if result:
            raise error_for("mmap of a stage", -result)
        if not there:
            raise ClosedError("the array is closed")
        return i, page

    @property
    def pagemap(self):
        """The number of the engine's /proc/self/pagemap, -1 where there is none."""
        return self.loop.own.pagemap

    @property
    def children(self):
        """How many fork children are served."""
        return load_int(&self.loop.n_children)

    @property
    def workers(self):
        """How many worker threads there are."""
        return self.loop.crew.n_workers

    def stats(self):
        """The counters so far, of all threads: a scalar of STATS_DTYPE."""
        cdef counters_t total = self.loop.worker.counters
        cdef uint64_t *sums = <uint64_t *>&total
        cdef const uint64_t *more
        cdef size_t n = sizeof(counters_t) // sizeof(uint64_t), i
        cdef int k, n_hands = LEVELS * HANDS if self.loop.hands != NULL else 0
        for k in range(VISITORS + n_hands + self.loop.crew.n_workers):
            if k < VISITORS:
                more = <const uint64_t *>&self.visitors[k].counters
            elif k < VISITORS + n_hands:
                more = <const uint64_t *>&self.loop.hands[k - VISITORS].counters
            else:
                more = <const uint64_t *>&self.loop.crew.workers[k - VISITORS - n_hands].counters
            for i in range(n):
                sums[i] += more[i]
        values = np.frombuffer(<const unsigned char[:sizeof(counters_t)]><const unsigned char *>sums,
                               np.uint64)
        stats = np.zeros((), STATS_DTYPE)
        for i, name in enumerate(COUNTERS):
            stats[name] = values[i]
        stats["errors"] = values[len(COUNTERS):len(COUNTERS) + ERRNOS]
        stats["latency"]["from_ns"] = BUCKET_STARTS
        stats["latency"]["count"] = values[len(COUNTERS) + ERRNOS:]
        return stats[()]

    def failed(self):
        """The last 1,024 pages that failed closed: array of FAILURE_DTYPE, oldest first."""
        ring = np.empty(FAILURES, FAILURE_DTYPE)
        cdef unsigned char[::1] copy = ring.view(np.uint8)
        cdef uint64_t total
        pthread_mutex_lock(&self.loop.desk.lock)
        memcpy(&copy[0], self.loop.desk.failures, FAILURES * sizeof(failure_t))
        total = self.loop.desk.n_failures
        pthread_mutex_unlock(&self.loop.desk.lock)
        return oldest_first(ring, total)

    def unknown(self):
        """The last 256 records that are not page faults, in the wire's dtype, oldest first."""
        dtype = {number: DTYPES[name] for name, number in WIRES.items()}[self.loop.wire]
        cdef const unsigned char[::1] data = <const unsigned char[:UNKNOWNS * sizeof(msg_record)]>(
            <const unsigned char *>self.loop.unknowns)
        ring = np.frombuffer(data, np.uint8).reshape(UNKNOWNS, sizeof(msg_record))
        records = np.ascontiguousarray(ring[:, :dtype.itemsize]).view(dtype)[:, 0]
        return oldest_first(records, self.loop.worker.counters.unknown)


BUCKET_STARTS = np.array([bucket_start(i) for i in range(LATENCIES)], np.uint64)


cdef int wait_for_workers(served_t *served) except -1:
    """Worker threads that took up a job of it before it was let go come to its end."""
    # Not in Python, where a signal handler may raise: the memory would go while it is being filled.
    with nogil:
        while load_int(&served.users):
            usleep(20)


cdef object no_thread(int err):
    return UffdError(err, "no thread to be had for the engine: raise RLIMIT_NPROC (ulimit -u) or the "
                          "cgroup's pids.max")


cdef object oldest_first(ring, uint64_t total):
    cdef size_t n = len(ring)
    return ring[:total].copy() if total <= n else np.roll(ring, -<Py_ssize_t>(total % n))
