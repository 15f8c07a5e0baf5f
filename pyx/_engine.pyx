"""`Engine`: read → sort, dedupe → dispatch → merge → fill → resolve, on one thread without the GIL.

A thread that touches a missing page from Python sleeps in the kernel holding the GIL, so nothing
between read and resolve may take it, allocate through Python, or wait for a thread that may hold it.

An engine never leaves registered memory unserved. What no source serves fails closed: the page is
poisoned (or, before Linux 6.6, made PROT_NONE), so that a touch raises SIGBUS (SIGSEGV) instead of
waiting for ever or reading zeros. An engine whose service is closed stays as the keeper that does just
this, until no registered memory is left.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, EFAULT, EINTR, ENODATA, errno
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport abort, calloc, free
from libc.string cimport memcpy, memset

import time

import numpy as np

from userfault cimport _abi
from userfault._abi cimport (
    aligned_alloc, c_read, load_int, msg_record, now, pollfd, ppoll, store_int, swap_int_if, timespec,
)
from userfault._descriptor cimport Descriptor
from userfault._errno cimport FORGET, NEXT, PARK, POISON, RETRY, STOP, decide, error_for
from userfault._ioctl cimport (
    PAGE_SIZE, uffd_copy, uffd_poison, uffd_wake, uffd_writeprotect, uffd_zeropage,
)
from userfault._regions cimport RegionTable
from userfault._source cimport Source, source_t
from userfault._tree cimport empty, enter, entry_t, find, leave, set_payload

from userfault._consts import DTYPES, WIRES
from userfault.errors import BusyError, ClosedError, RangeError, SourceError, UffdError

cdef extern from "<sys/mman.h>" nogil:
    int mprotect(void *address, size_t length, int protection)
    int PROT_NONE

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int SIG_BLOCK, SIG_SETMASK, SIGBUS, SIGSEGV, SIGFPE, SIGILL
    int sigfillset(sigset_t *set)
    int sigdelset(sigset_t *set, int signal)
    int pthread_sigmask(int how, const sigset_t *set, sigset_t *old)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    int pthread_create(pthread_t *thread, const void *attributes, void *(*start)(void *) noexcept nogil,
                       void *argument)
    int pthread_detach(pthread_t thread)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t process_vm_readv(int pid, const iovec *local, unsigned long n_local, const iovec *remote,
                             unsigned long n_remote, unsigned long flags)

cdef extern from "<unistd.h>" nogil:
    int gettid()

cdef enum:
    SERVING = 0   # for a service
    KEEPER = 1    # for nobody: everything fails closed
    GONE = 2      # the thread has left, or is leaving, its loop

    # Where a page failed.
    NO_SOURCE = 0
    SOURCE = 1
    RESOLVE = 2

DEF CAPACITY = 256       # records a read()
DEF STAGE_PAGES = 64     # pages a fill() of a source that is not memory
DEF PARKED = 4096
DEF FAILURES = 1024      # the last ones, for the report
DEF UNKNOWNS = 256       # likewise
DEF RETRY_NS = 1000000

cdef extern from *:
    """
    static const char uf_last_words[] = "userfault: a page that has no data could be neither poisoned nor "
        "protected; the process ends, or its thread would wait for ever\\n";
    """
    const char LAST_WORDS "uf_last_words"[]

STAGES = ("no source serves it", "its source failed", "the kernel refused it")

LATENCY_DTYPE = np.dtype([("from_ns", "<u8"), ("count", "<u8")])
STATS_DTYPE = np.dtype(
    [(name, "<u8") for name in (
        "reads", "records", "duplicates", "runs", "pages", "bytes", "ioctls", "existing", "forgotten",
        "parked", "failed", "unprotected", "unknown")]
    + [("latency", LATENCY_DTYPE, (LATENCY_BUCKETS,))])
FAILURE_DTYPE = np.dtype([("address", "<u8"), ("region", "<i8"), ("offset", "<i8"), ("errno", "<i4"),
                          ("stage", "<i4")])
assert FAILURE_DTYPE.itemsize == sizeof(failure_t)
assert sizeof(counters_t) == 8 * (len(STATS_DTYPE.names) - 1 + LATENCY_BUCKETS)


cdef inline size_t bucket(uint64_t ns) noexcept nogil:
    """Eight buckets an octave: below 8 ns one each, then steps of an eighth of the power of two."""
    cdef int octave = 0
    if ns < 8:
        return ns
    octave = 63 - __builtin_clzll(ns)
    return (octave - 2) * 8 + (ns >> (octave - 3) & 7)


cdef uint64_t bucket_start(int i):
    return i if i < 16 else <uint64_t>(8 + i % 8) << (i // 8 - 1)


cdef extern from *:
    int __builtin_clzll(unsigned long long) nogil


cdef void sort(uint64_t *values, size_t n) noexcept nogil:
    # Shell's, in place: qsort(3) may allocate.
    cdef size_t gap = 1, i, k
    cdef uint64_t value
    while gap < n // 3:
        gap = 3 * gap + 1
    while gap:
        for i in range(gap, n):
            value = values[i]
            k = i
            while k >= gap and values[k - gap] > value:
                values[k] = values[k - gap]
                k -= gap
            values[k] = value
        gap //= 3


cdef int read_own(void *to, const void *source, size_t length) noexcept nogil:
    """memcpy that answers -EFAULT where the source is a mapping of a file that became shorter."""
    cdef iovec local, remote
    cdef ssize_t got
    local.iov_base = to
    remote.iov_base = <void *>source
    local.iov_len = remote.iov_len = length
    got = process_vm_readv(_abi.getpid(), &local, 1, &remote, 1, 0)
    if got == <ssize_t>length:
        return 0
    if got >= 0 or errno == EFAULT:
        return -EFAULT
    memcpy(to, source, length)  # forbidden here, by seccomp or the kernel's configuration
    return 0


cdef void *run(Engine self) noexcept nogil:
    """The thread's whole life. It takes the GIL only when there is nothing left to serve."""
    self.native_id = gettid()
    cdef int result = self.loop()
    store_int(&self.state, GONE)
    with gil:
        self.error = -result
        self.finish()
        Py_DECREF(self)
    return NULL


cdef class Engine:
    """Serves the faults of one userfaultfd from the sources that the table's payloads name."""

    def __cinit__(self, Descriptor descriptor not None, RegionTable table not None, api, bint can_poison):
        self.records = <char *>aligned_alloc(64, CAPACITY * sizeof(msg_record))
        self.stage = <char *>aligned_alloc(PAGE_SIZE, STAGE_PAGES * PAGE_SIZE)
        self.pages = <uint64_t *>calloc(CAPACITY, sizeof(uint64_t))
        self.parked = <uint64_t *>calloc(PARKED, sizeof(uint64_t))
        self.failures = <failure_t *>calloc(FAILURES, sizeof(failure_t))
        self.unknowns = <char *>calloc(UNKNOWNS, sizeof(msg_record))
        if not (self.records and self.stage and self.pages and self.parked and self.failures
                and self.unknowns):
            raise MemoryError
        self.table = table
        self.wire = WIRES[api]
        self.can_poison = can_poison
        self.keep = {}
        self.descriptor = descriptor
        self.state = GONE
        self.finished = True

    def __dealloc__(self):
        free(self.records)
        free(self.stage)
        free(self.pages)
        free(self.parked)
        free(self.failures)
        free(self.unknowns)

    def start(self, bint as_keeper, buffers):
        """Start the thread, which keeps `buffers` alive with it.

        Raises UffdError when there is no thread to be had, and BusyError when a service would share the
        records with a read that is in progress.
        """
        cdef sigset_t blocked, before
        cdef pthread_t thread
        cdef int err
        if self.descriptor.readers and not as_keeper:
            raise BusyError("an EventReader is in read(): let it return first")
        self.fd = self.descriptor.hold()
        # Signals are for the threads that run Python's handlers, except those that are raised here.
        sigfillset(&blocked)
        for signal in (SIGBUS, SIGSEGV, SIGFPE, SIGILL):
            sigdelset(&blocked, signal)
        self.state = KEEPER if as_keeper else SERVING
        self.finished = False
        self.buffers = buffers
        self.descriptor.served += 1
        Py_INCREF(self)
        pthread_sigmask(SIG_BLOCK, &blocked, &before)
        # Not a threading.Thread: that needs the GIL to begin, which a thread that sleeps in a fault may hold.
        err = pthread_create(&thread, NULL, <void *(*)(void *) noexcept nogil>run, <void *>self)
        pthread_sigmask(SIG_SETMASK, &before, NULL)
        if err:
            self.finish()
            Py_DECREF(self)
            raise UffdError(err, "no thread to be had for the engine: raise RLIMIT_NPROC (ulimit -u) or the "
                                 "cgroup's pids.max")
        pthread_detach(thread)
        self.wake_all()

    cdef void finish(self) noexcept:
        self.state = GONE
        self.finished = True
        self.buffers = None
        self.descriptor.served -= 1
        self.descriptor.release()

    def wake_all(self):
        """Faults that somebody read and did not resolve are delivered again only after a wake."""
        cdef uint64_t start, length
        for start, length, _, _ in self.table.ranges().tolist():
            uffd_wake(self.fd, start, length)

    def adopt(self):
        """Serve a service (again); False when the thread is gone, or about to go."""
        return not self.finished and (load_int(&self.state) == SERVING
                                      or bool(swap_int_if(&self.state, KEEPER, SERVING)))

    def retire(self):
        """Become the keeper; wait for the thread to end as long as no registered memory is left to keep."""
        swap_int_if(&self.state, SERVING, KEEPER)
        self.descriptor.kick()
        while empty(&self.table.tree) and not self.finished:
            time.sleep(200e-6)

    def attach(self, int64_t region, uint64_t start, uint64_t length, Source source not None):
        """Serve region `region`, registered at [start, start + length), from the source, from now on.

        Raises ClosedError, UffdError when the engine failed, SourceError, RangeError, and changes nothing.
        """
        if self.error:
            raise error_for("the engine's read", self.error)
        if load_int(&self.state) != SERVING:
            raise ClosedError("the service is closed")
        if region in self.keep:
            raise SourceError("the region is served already")
        if source.c.size <= length - PAGE_SIZE:
            raise SourceError(f"the source has {source.c.size} bytes, the region {length}: map no more than "
                              "the source fills")
        self.keep[region] = source
        if not set_payload(&self.table.tree, start, start + length, region, &source.c):
            del self.keep[region]
            raise RangeError("the region is no longer registered")

    def detach(self, int64_t region, uint64_t start, uint64_t length):
        """Let go of one region's source; when it returns, the engine uses it no more."""
        if region in self.keep:
            set_payload(&self.table.tree, start, start + length, region, NULL)
            self.table.quiesce()
            self.keep.pop(region, None)

    def detach_all(self):
        """Let go of every source; when it returns, the engine uses none of them."""
        cdef uint64_t start, length
        served = list(self.keep)
        for start, length, region, _ in self.table.ranges().tolist():
            if region in self.keep:
                set_payload(&self.table.tree, start, start + length, region, NULL)
        self.table.quiesce()
        for region in served:
            self.keep.pop(region, None)

    def stats(self):
        """The counters so far: a scalar of STATS_DTYPE."""
        cdef counters_t snapshot = self.counters
        stats = np.zeros((), STATS_DTYPE)
        cdef int i
        cdef const uint64_t *values = <const uint64_t *>&snapshot
        for i, name in enumerate(STATS_DTYPE.names[:len(STATS_DTYPE.names) - 1]):
            stats[name] = values[i]
        latency = stats["latency"]
        cdef uint64_t[:] starts = latency["from_ns"], counts = latency["count"]
        for i in range(LATENCY_BUCKETS):
            starts[i] = bucket_start(i)
            counts[i] = snapshot.latency[i]
        return stats[()]

    def failed(self):
        """The last 1,024 pages that failed closed: array of FAILURE_DTYPE, oldest first."""
        cdef const unsigned char[::1] data = <const unsigned char[:FAILURES * sizeof(failure_t)]>(
            <const unsigned char *>self.failures)
        return oldest_first(np.frombuffer(data, FAILURE_DTYPE), self.counters.failed)

    def unknown(self):
        """The last 256 records that are not page faults, in the wire's dtype, oldest first."""
        dtype = {number: DTYPES[name] for name, number in WIRES.items()}[self.wire]
        cdef const unsigned char[::1] data = <const unsigned char[:UNKNOWNS * sizeof(msg_record)]>(
            <const unsigned char *>self.unknowns)
        ring = np.frombuffer(data, np.uint8).reshape(UNKNOWNS, sizeof(msg_record))
        records = np.ascontiguousarray(ring[:, :dtype.itemsize]).view(dtype)[:, 0]
        return oldest_first(records, self.counters.unknown)

    cdef int loop(self) noexcept nogil:
        """Until the keeper has nothing left to keep (0), or the descriptor fails (-errno)."""
        cdef size_t record = 8 if self.wire == _abi.WIRE_V1 else 16 if self.wire == _abi.WIRE_V2 else 32
        cdef pollfd fds[2]
        cdef timespec retry
        cdef uint64_t kicks
        cdef int64_t since, retried = 0
        cdef ssize_t got
        retry.tv_sec = 0
        retry.tv_nsec = RETRY_NS
        fds[0].fd = self.fd
        fds[1].fd = self.descriptor.kick_fd
        fds[0].events = fds[1].events = _abi.POLLIN
        while True:
            if load_int(&self.state) == KEEPER and empty(&self.table.tree):
                if swap_int_if(&self.state, KEEPER, GONE):
                    return 0
            # Reading first saves the poll whenever faults keep coming.
            got = c_read(self.fd, self.records, CAPACITY * record)
            if got > 0:
                since = now()
                self.counters.reads += 1
                self.serve(self.decode(got // record), since)
                # What is parked gets its turn even while faults never stop coming.
                if self.n_parked and since - retried > RETRY_NS:
                    self.unpark()
                    retried = since
                continue
            if got < 0 and errno == EINTR:
                continue
            if got == 0 or errno != EAGAIN:
                return -errno if got < 0 else -ENODATA
            if ppoll(fds, 2, &retry if self.n_parked else NULL, NULL) < 0 and errno != EINTR:
                return -errno
            if fds[1].revents:
                c_read(fds[1].fd, &kicks, sizeof(kicks))
                fds[1].revents = 0
            if self.n_parked:
                self.unpark()

    cdef size_t decode(self, size_t n) noexcept nogil:
        """The pages of the page faults among n records, into `pages`; other records are kept."""
        cdef uint64_t page = ~(PAGE_SIZE - 1), arg
        cdef const msg_record *msg
        cdef size_t i, n_pages = 0, record = 8
        cdef bint fault, protected
        for i in range(n):
            if self.wire == _abi.WIRE_MSG:
                msg = <const msg_record *>self.records + i
                fault = (msg.event == _abi.UFFD_EVENT_PAGEFAULT
                         and not msg.flags & _abi.UFFD_PAGEFAULT_FLAG_MINOR)
                protected = fault and msg.flags & _abi.UFFD_PAGEFAULT_FLAG_WP
                arg = msg.address
                record = sizeof(msg_record)
            elif self.wire == _abi.WIRE_V2:
                fault = (<const _abi.v2_record *>self.records)[i].type == _abi.UFFD_PAGEFAULT
                arg = (<const _abi.v2_record *>self.records)[i].arg
                protected = fault and arg & _abi.UFFD_BIT_WP
                record = sizeof(_abi.v2_record)
            else:
                fault = True
                arg = (<const _abi.v1_record *>self.records)[i].arg
                protected = arg & _abi.UFFD_BIT_WP
            if protected:
                # The data is there, and nobody is left who wants to know of the write.
                uffd_writeprotect(self.fd, arg & page, PAGE_SIZE, 0)
                self.counters.ioctls += 1
                self.counters.unprotected += 1
            elif fault:
                self.pages[n_pages] = arg & page
                n_pages += 1
            else:
                memcpy(self.unknowns + self.counters.unknown % UNKNOWNS * sizeof(msg_record),
                       self.records + i * record, record)
                self.counters.unknown += 1
        self.counters.records += n
        return n_pages

    cdef void serve(self, size_t n, int64_t since) noexcept nogil:
        """Resolve the n `pages`, which were read at time `since`, in runs of neighbours."""
        cdef int ticket = enter(&self.table.tree)
        cdef size_t i = 0, first
        cdef uint64_t start, end
        cdef entry_t entry
        cdef bint held
        sort(self.pages, n)
        while i < n:
            first = i
            start = self.pages[i]
            end = start + PAGE_SIZE
            held = find(&self.table.tree, start, &entry)
            i += 1
            while i < n:
                if self.pages[i] == end - PAGE_SIZE:
                    self.counters.duplicates += 1
                elif held and self.pages[i] == end and end < entry.end:
                    end += PAGE_SIZE
                else:
                    break
                i += 1
            self.counters.runs += 1
            if held and entry.payload != NULL:
                self.fill(&entry, <const source_t *>entry.payload, start, end - start)
            else:
                self.fail(&entry if held else NULL, start, 0, NO_SOURCE)
                while end - PAGE_SIZE > start:
                    end -= PAGE_SIZE
                    self.fail(&entry, end, 0, NO_SOURCE)
            self.counters.latency[bucket(now() - since)] += i - first
        leave(&self.table.tree, ticket)

    cdef void fill(self, const entry_t *entry, const source_t *source, uint64_t start,
                   uint64_t length) noexcept nogil:
        """Bring the run [start, start + length) of the entry from its source."""
        cdef uint64_t offset = start - entry.base
        cdef uint64_t has = source.size - offset if source.size > offset else 0
        cdef uint64_t whole = min(length, has & ~(PAGE_SIZE - 1)), done = 0, part
        if source.zero:
            self.resolve(entry, start, 0, length)
            return
        if source.direct != NULL and whole:
            self.resolve(entry, start, <uintptr_t>source.direct + offset, whole)
            done = whole
        while done < length:
            part = min(length - done, <uint64_t>STAGE_PAGES * PAGE_SIZE)
            if has <= done:
                self.fail(entry, start + done, ENODATA, SOURCE)
                done += PAGE_SIZE
            else:
                part = min(part, (has - done + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1))
                self.stage_and_copy(entry, source, start + done, part, min(part, has - done))
                done += part

    cdef void stage_and_copy(self, const entry_t *entry, const source_t *source, uint64_t start,
                             uint64_t length, uint64_t has) noexcept nogil:
        """Through the stage, of which the source gives the first `has` bytes; the rest is zeros."""
        cdef uint64_t offset = start - entry.base, page, part
        cdef int result
        if source.direct != NULL:
            result = read_own(self.stage, source.direct + offset, has)
        else:
            result = source.fill(source.ctx, offset, self.stage, has)
        if result == 0:
            memset(self.stage + has, 0, length - has)
            self.resolve(entry, start, <uintptr_t>self.stage, length)
        elif length == PAGE_SIZE:
            self.fail(entry, start, -result, SOURCE)
        else:
            # One bad page does not spoil its neighbours.
            page = 0
            while page < length:
                part = min(PAGE_SIZE, has - page)
                self.stage_and_copy(entry, source, start + page, PAGE_SIZE, part)
                page += PAGE_SIZE

    cdef void resolve(self, const entry_t *entry, uint64_t start, uint64_t source,
                      uint64_t length) noexcept nogil:
        """COPY the run from `source`, or ZEROPAGE it when that is 0, as the errno table decides."""
        cdef uint64_t done = 0, part, step
        cdef int result, decision
        while done < length:
            step = length - done
            while True:
                if source:
                    result = uffd_copy(self.fd, start + done, source + done, step, 0, &part)
                else:
                    result = uffd_zeropage(self.fd, start + done, step, 0, &part)
                self.counters.ioctls += 1
                self.counters.pages += part // PAGE_SIZE
                self.counters.bytes += part
                done += part
                decision = RETRY if result == 0 else decide(-result)
                # COPY and ZEROPAGE never cross a mapping: the run may lie in two, so try one page.
                if decision == FORGET and step > PAGE_SIZE and part == 0:
                    step = PAGE_SIZE
                    continue
                break
            if decision == RETRY or (decision == PARK and part):
                continue
            if decision == PARK:
                while done < length:
                    self.park(start + done)
                    done += PAGE_SIZE
            elif decision == NEXT:
                # Somebody else brought the page: its faulting thread may still sleep.
                uffd_wake(self.fd, start + done, PAGE_SIZE)
                self.counters.ioctls += 1
                self.counters.existing += 1
                done += PAGE_SIZE
            elif decision == FORGET or decision == STOP:
                self.counters.forgotten += 1
                done += PAGE_SIZE
            else:
                self.fail(entry, start + done, -result, RESOLVE)
                done += PAGE_SIZE

    cdef void fail(self, const entry_t *entry, uint64_t page, int error, int stage) noexcept nogil:
        """Let the page fail closed, and note why. `entry` is NULL where no region holds the page."""
        cdef uint64_t done
        cdef int result, decision = POISON
        cdef failure_t *failure
        if self.can_poison:
            result = uffd_poison(self.fd, page, PAGE_SIZE, 0, &done)
            self.counters.ioctls += 1
            decision = RETRY if result == 0 else decide(-result)
            if decision == PARK:
                self.park(page)
                return
            if decision == NEXT:
                # A page, or the marker of a write-protected one that is missing, which must go first.
                uffd_writeprotect(self.fd, page, PAGE_SIZE, 0)
                uffd_wake(self.fd, page, PAGE_SIZE)
                self.counters.ioctls += 2
                self.counters.existing += 1
                return
            if decision == FORGET or decision == STOP:
                self.counters.forgotten += 1
                return
        if not self.can_poison or decision == POISON:
            # Before Linux 6.6, or refused. Each page splits the mapping; when there are no more mappings
            # to be had, all that is left of the region goes. Waiting for ever is no choice, zeros are none.
            if mprotect(<void *>page, PAGE_SIZE, PROT_NONE) != 0 and (
                    entry == NULL
                    or mprotect(<void *>entry.start, entry.end - entry.start, PROT_NONE) != 0):
                _abi.c_write(2, LAST_WORDS, sizeof(LAST_WORDS) - 1)
                abort()
            uffd_wake(self.fd, page, PAGE_SIZE)
            self.counters.ioctls += 1
        failure = self.failures + self.counters.failed % FAILURES
        failure.address = page
        failure.region = entry.id if entry != NULL else -1
        failure.offset = <int64_t>(page - entry.base) if entry != NULL else -1
        failure.error = error
        failure.stage = stage
        self.counters.failed += 1

    cdef void park(self, uint64_t page) noexcept nogil:
        """Try the page again in a millisecond. With no room left, its thread asks again by itself."""
        self.counters.parked += 1
        if self.n_parked < PARKED:
            self.parked[self.n_parked] = page
            self.n_parked += 1
        else:
            uffd_wake(self.fd, page, PAGE_SIZE)
            self.counters.ioctls += 1

    cdef void unpark(self) noexcept nogil:
        """Serve everything parked; what must wait longer is parked anew."""
        cdef size_t n = self.n_parked, done = 0, part
        cdef uint64_t batch[CAPACITY]
        while done < n:
            part = min(n - done, <size_t>CAPACITY)
            memcpy(batch, self.parked + done, part * sizeof(uint64_t))
            done += part
            # Room at the front for what is parked again: it is never more than was taken.
            if done == part:
                self.n_parked = 0
            memcpy(self.pages, batch, part * sizeof(uint64_t))
            self.serve(part, now())


cdef object oldest_first(ring, uint64_t total):
    cdef size_t n = len(ring)
    return ring[:total].copy() if total <= n else np.roll(ring, -<Py_ssize_t>(total % n))
