"""Fill runs of pages from their source, and do what the errno table says about the kernel's answers.

Without the GIL, and without allocating: each thread has a stage of one huge page. What is not in memory
already is filled into it and copied from there; a whole huge page is moved from there into its place
instead, which costs no copy and leaves the region mapped huge.
"""

from libc.errno cimport EBUSY, EAGAIN, EEXIST, EINVAL, ENOBUFS, ENODATA, ENOENT
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport abort
from libc.string cimport memset

from userfault cimport _abi
from userfault._abi cimport (
    add_u64, count, now, pthread_mutex_lock, pthread_mutex_unlock, store_int, store_u64,
)
from userfault._bits cimport clear_bits, is_set, set_bits
from userfault._errno cimport FORGET, NEXT, PARK, POISON, RETRY, STOP, decide
from userfault._hold cimport take_in, there
from userfault._ioctl cimport (
    PAGE_SIZE, uffd_copy, uffd_move, uffd_poison, uffd_wake, uffd_writeprotect, uffd_zeropage,
)
from userfault._evict cimport make_room
from userfault._say cimport say, say_why
from userfault._served cimport HUGE_PAGES, REGION_LATENCIES, hold_t, served_t
from userfault._source cimport source_t
from userfault._stage cimport bring, stage_is_huge
from userfault._tree cimport enter, entry_t, find, leave

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/mman.h>" nogil:
    int mprotect(void *address, size_t length, int protection)
    int c_madvise "madvise"(void *address, size_t length, int advice)
    int PROT_NONE, MADV_DONTNEED

cdef extern from *:
    """
    static const char uf_last_words[] = "userfault: a page that has no data could be neither poisoned nor "
        "protected; the process ends, or its thread would wait for ever\\n";
    """
    const char LAST_WORDS "uf_last_words"[]
    int __builtin_clzll(unsigned long long) nogil

DEF RETRY_NS = 10000000       # until a source that failed is asked again
DEF SMALL_NS = 100000000      # huge pages were not to be had: so long until the next try


# -- the layout -----------------------------------------------------------------------------------------

cdef inline bint claim(worker_t *worker, const entry_t *entry, const served_t *served, uint64_t address,
                       uint64_t length) noexcept nogil:
    """Whether the books still say what `entry` says of the range. If so that cannot change until `disclaim`.

    A region may be moved, and another take its place, as soon as the event has been read: by the reading
    thread, which therefore need not ask. While an event waits to be read the kernel fills nothing (EAGAIN).
    """
    cdef entry_t found
    cdef int ticket
    cdef bint same
    if not (worker.guarded and worker.space.hears_moves):
        return True
    pthread_mutex_lock(&worker.desk.layout)
    ticket = enter(worker.space.tree)
    same = (find(worker.space.tree, address, &found) and found.base == entry.base
            and found.payload == <const void *>served and address + length <= found.end)
    leave(worker.space.tree, ticket)
    if not same:
        pthread_mutex_unlock(&worker.desk.layout)
    return same


cdef inline void disclaim(worker_t *worker) noexcept nogil:
    if worker.guarded and worker.space.hears_moves:
        pthread_mutex_unlock(&worker.desk.layout)


# -- filling -------------------------------------------------------------------------------------------

cdef uint64_t fill(worker_t *worker, const entry_t *entry, served_t *served, uint64_t first, uint64_t end,
                   uint64_t want, uint64_t want_end, uint64_t mode, bint may_wait) noexcept nogil:
    """Fill the pages [first, end) of the region, all in one piece of it, in as few calls as there can be.

    Threads wait for (some of) the pages [want, want_end): those that cannot be had fail closed; others
    stay missing. `mode` is UFFDIO_MODE_DONTWAKE or 0. Returns `end`, or unless it `may_wait`, the page
    before which the source would wait.
    """
    cdef uint64_t stop = fill_run(worker, entry, served, first, end, want, want_end, mode, may_wait)
    if worker.reserved:
        add_u64(&served.hold.budget.reserved, -worker.reserved)
        worker.reserved = 0
    return stop


cdef uint64_t fill_run(worker_t *worker, const entry_t *entry, served_t *served, uint64_t first, uint64_t end,
                       uint64_t want, uint64_t want_end, uint64_t mode, bint may_wait) noexcept nogil:
    cdef const source_t *source = &served.source
    cdef uint64_t address, offset, has, n, page
    cdef int result
    if served.hold != NULL and served.hold.retry_at and now() < served.hold.retry_at:
        park_wanted(worker, entry, served, first, end, want, want_end)
        return end
    while first < end:
        address = entry.base + first * PAGE_SIZE
        offset = first * PAGE_SIZE
        n = end - first
        if served.hold != NULL:
            n = min(n, served.hold.budget.step)
            add_u64(&served.hold.budget.reserved, -worker.reserved)
            worker.reserved = 0
            result = make_room(served.hold.budget, n, may_wait, worker.visits)
            if result == -EAGAIN and not may_wait:
                return first
            if result == 0:
                worker.reserved = n
            else:
                no_room(worker, entry, served, first, end, want, want_end, result)
                return end
        if source.zero:
            resolve(worker, entry, served, first, n, 0, want, want_end, mode)
            first += n
            continue
        has = source.size - offset if source.size > offset else 0
        if has == 0:
            lose(worker, entry, served, first, end, want, want_end, ENODATA)
            return end
        if served.huge:
            if address % STAGE_BYTES == 0 and n >= HUGE_PAGES and has >= STAGE_BYTES:
                result = move(worker, entry, served, first, want, want_end, mode, may_wait)
                if result == 0:
                    first += HUGE_PAGES
                    continue
                if result == -EAGAIN:
                    return first
            n = min(n, HUGE_PAGES - address % STAGE_BYTES // PAGE_SIZE)
        # A worker copies under the layout's lock, where it may not wait for a file.
        if source.direct != NULL and has >= PAGE_SIZE and (
                source.solid or not (worker.guarded and worker.space.hears_moves)):
            n = min(n, has // PAGE_SIZE)
            resolve(worker, entry, served, first, n, <uintptr_t>source.direct + offset, want, want_end, mode)
            first += n
            continue
        n = min(n, served.granule - first % served.granule, <uint64_t>HUGE_PAGES)
        has = min(has, n * PAGE_SIZE)
        n = (has + PAGE_SIZE - 1) // PAGE_SIZE
        result = bring(worker, source, offset, has, may_wait)
        if result == 0:
            if served.hold != NULL:
                served.hold.retry_at = 0
            memset(worker.stage + has, 0, n * PAGE_SIZE - has)
            resolve(worker, entry, served, first, n, <uintptr_t>worker.stage, want, want_end, mode)
        elif result == -EAGAIN and not may_wait:
            return first
        elif n == 1:
            lose(worker, entry, served, first, first + 1, want, want_end, -result)
        else:
            # One bad page does not spoil its neighbours.
            for page in range(first, first + n):
                if fill(worker, entry, served, page, page + 1, want, want_end, mode, may_wait) == page:
                    return page
        first += n
    return end


cdef int move(worker_t *worker, const entry_t *entry, served_t *served, uint64_t first, uint64_t want,
              uint64_t want_end, uint64_t mode, bint may_wait) noexcept nogil:
    """Fill a huge page's worth of pages into the stage and move it into place.

    0 when done, by whatever means; -EAGAIN when the source would wait; -EBUSY when no huge page is to be
    had or the source failed: then nothing is done.
    """
    cdef uint64_t address = entry.base + first * PAGE_SIZE, done
    cdef int result
    if now() < worker.small_until:
        return -EBUSY
    if not stage_is_huge(worker):
        c_madvise(worker.stage, STAGE_BYTES, MADV_DONTNEED)
        worker.small_until = now() + SMALL_NS
        return -EBUSY
    result = bring(worker, &served.source, first * PAGE_SIZE, STAGE_BYTES, may_wait)
    if result != 0:
        return -EAGAIN if result == -EAGAIN and not may_wait else -EBUSY
    done = 0
    if not claim(worker, entry, served, address, STAGE_BYTES):
        return -EBUSY
    result = uffd_move(worker.space.fd, address, <uintptr_t>worker.stage, STAGE_BYTES, mode, &done)
    came(worker, served, first, done // PAGE_SIZE, want, want_end)
    disclaim(worker)
    worker.counters.ioctls += 1
    count(&served.counters.ioctls, 1)
    worker.counters.moved += done // PAGE_SIZE
    count(&served.counters.moved, done // PAGE_SIZE)
    if result != 0:
        note(worker, result)
        # mlock, mprotect, pinned pages, or a process that is not ours: copying does not mind those.
        if result == -EINVAL or result == -EBUSY:
            store_int(&served.huge, 0)
        first += done // PAGE_SIZE
        resolve(worker, entry, served, first, HUGE_PAGES - done // PAGE_SIZE,
                <uintptr_t>worker.stage + done, want, want_end, mode)
        c_madvise(worker.stage, STAGE_BYTES, MADV_DONTNEED)
    return 0


cdef void resolve(worker_t *worker, const entry_t *entry, served_t *served, uint64_t first, uint64_t n,
                  uint64_t source, uint64_t want, uint64_t want_end, uint64_t mode) noexcept nogil:
    """COPY n pages from `source`, or ZEROPAGE them when that is 0, as the errno table decides."""
    cdef uint64_t end = first + n, page, step, done
    cdef uint64_t address, origin = source - first * PAGE_SIZE if source else 0, copying
    cdef int result, decision
    cdef bint wanted, open
    worker.counters.runs += 1
    count(&served.counters.runs, 1)
    while first < end:
        step = end - first
        while True:
            address = entry.base + first * PAGE_SIZE
            copying = mode
            done = 0
            if not claim(worker, entry, served, address, step * PAGE_SIZE):
                result = -ENOENT
            else:
                if source:
                    open = False
                    if served.hold != NULL and served.hold.changed != NULL:
                        open = lock_changed(served, first, first + step, &step)
                        copying |= 0 if open else _abi.UFFDIO_COPY_MODE_WP
                    result = uffd_copy(worker.space.fd, address, origin + first * PAGE_SIZE,
                                       step * PAGE_SIZE, copying, &done)
                    if open:
                        # Its writer is awake, and may flush.
                        take_in(served, first, first + done // PAGE_SIZE, worker.visits)
                        pthread_mutex_unlock(&served.hold.budget.lock)
                else:
                    result = uffd_zeropage(worker.space.fd, address, step * PAGE_SIZE, mode, &done)
                # An event that is read next may say that they are gone again.
                done //= PAGE_SIZE
                came(worker, served, first, done, want, want_end)
                if result == -EEXIST:
                    there(served, first + done, first + done + 1, worker.visits)
                disclaim(worker)
            worker.counters.ioctls += 1
            count(&served.counters.ioctls, 1)
            first += done
            if result == 0:
                decision = RETRY
                break
            if result == -EAGAIN and worker.tries and worker.space.hears_events:
                # Whoever made the event that has just been read has yet to say that it is over.
                worker.tries -= 1
                sched_yield()
                continue
            note(worker, result)
            decision = decide(-result)
            # COPY and ZEROPAGE never cross a mapping: the run may lie in two, so try one page.
            if decision == FORGET and step > 1 and done == 0:
                step = 1
                continue
            break
        if decision == RETRY or (decision == PARK and done):
            continue
        address = entry.base + first * PAGE_SIZE
        wanted = want <= first < want_end
        if decision == PARK:
            store_u64(&served.kernel_error, -result)
            for page in range(max(first, want), min(end, want_end)):
                park(worker, served, entry.base + page * PAGE_SIZE, False)
            return
        if decision == NEXT:
            # Somebody else brought the page: its faulting thread may still sleep.
            uffd_wake(worker.space.fd, address, PAGE_SIZE)
            worker.counters.ioctls += 1
            count(&served.counters.ioctls, 1)
            worker.counters.existing += 1
            count(&served.counters.existing, 1)
        elif decision == FORGET or decision == STOP:
            worker.counters.forgotten += 1
            count(&served.counters.forgotten, 1)
            if wanted:
                # munmap and mremap wake nobody.
                wake(worker, address, address + PAGE_SIZE)
        elif wanted:
            fail(worker, entry, served, address, -result, RESOLVE)
        else:
            store_u64(&served.kernel_error, -result)
        first += 1


cdef bint lock_changed(served_t *served, uint64_t first, uint64_t end, uint64_t *n) noexcept nogil:
    """Whether the page `first` is about to be written to, and so comes unprotected; how many from it on are
    alike. If it is, the budget's lock is held: it stays noted as changed until it is there."""
    cdef hold_t *hold = served.hold
    cdef uint64_t at = first
    pthread_mutex_lock(&hold.budget.lock)
    while at < end and is_set(hold.changed, at) == is_set(hold.changed, first):
        at += 1
    n[0] = at - first
    if is_set(hold.changed, first):
        return True
    pthread_mutex_unlock(&hold.budget.lock)
    return False


cdef void fill_grown(worker_t *worker, const entry_t *entry, uint64_t page, uint64_t mode) noexcept nogil:
    """Zeros, as mremap(2) promises, for a page by which a region grew beyond what it was served as."""
    cdef uint64_t done
    cdef int result = uffd_zeropage(worker.space.fd, page, PAGE_SIZE, mode, &done), decision
    worker.counters.ioctls += 1
    worker.counters.runs += 1
    if result == 0:
        worker.counters.pages += 1
        worker.counters.bytes += PAGE_SIZE
        return
    note(worker, result)
    decision = decide(-result)
    if decision == PARK:
        park(worker, NULL, page, False)
    elif decision == POISON:
        fail(worker, entry, NULL, page, -result, RESOLVE)
    else:
        wake(worker, page, page + PAGE_SIZE)


cdef inline void came(worker_t *worker, served_t *served, uint64_t first, uint64_t n, uint64_t want,
                      uint64_t want_end) noexcept nogil:
    """Note that n pages are there now."""
    cdef uint64_t wanted = 0
    if n == 0:
        return
    there(served, first, first + n, worker.visits)
    if want < want_end and want < first + n and first < want_end:
        wanted = min(first + n, want_end) - max(first, want)
    worker.counters.pages += n
    worker.counters.bytes += n * PAGE_SIZE
    worker.counters.ahead += n - wanted
    count(&served.counters.pages, n)
    count(&served.counters.bytes, n * PAGE_SIZE)
    if n > wanted:
        count(&served.counters.ahead, n - wanted)


cdef inline void note(worker_t *worker, int result) noexcept nogil:
    """Count an errno."""
    worker.counters.errors[-result if -result < ERRNOS else 0] += 1


# -- what cannot be filled -----------------------------------------------------------------------------

cdef void park_wanted(worker_t *worker, const entry_t *entry, served_t *served, uint64_t first, uint64_t end,
                      uint64_t want, uint64_t want_end) noexcept nogil:
    cdef uint64_t page
    for page in range(max(first, want), min(end, want_end)):
        park(worker, served, entry.base + page * PAGE_SIZE, False)


cdef void no_room(worker_t *worker, const entry_t *entry, served_t *served, uint64_t first, uint64_t end,
                  uint64_t want, uint64_t want_end, int result) noexcept nogil:
    """The budget has no room for the pages [first, end), because of `result`."""
    cdef uint64_t page
    if result == -EAGAIN:
        park_wanted(worker, entry, served, first, end, want, want_end)
        return
    store_u64(&served.kernel_error, -result)
    for page in range(max(first, want), min(end, want_end)):
        fail(worker, entry, served, entry.base + page * PAGE_SIZE, -result, LIMIT)


cdef void lose(worker_t *worker, const entry_t *entry, served_t *served, uint64_t first, uint64_t end,
               uint64_t want, uint64_t want_end, int error) noexcept nogil:
    """The source does not have the pages [first, end): those that somebody waits for fail closed."""
    cdef uint64_t page
    if first < want or end > want_end:
        store_u64(&served.source_error, error)
    if served.hold != NULL and now() - worker.since < served.hold.patience:
        if served.hold.retry_at == 0 and max(first, want) < min(end, want_end):
            say_why(served, "cannot be had yet, and is asked for again", max(first, want) * PAGE_SIZE, error,
                    &served.hold.warned)
        served.hold.retry_at = now() + RETRY_NS
        park_wanted(worker, entry, served, first, end, want, want_end)
        return
    for page in range(max(first, want), min(end, want_end)):
        fail(worker, entry, served, entry.base + page * PAGE_SIZE, error, SOURCE)


cdef void fail(worker_t *worker, const entry_t *entry, served_t *served, uint64_t page, int error,
               int stage) noexcept nogil:
    """Let the page fail closed, and note why. `entry` and `served` are NULL where there is none."""
    cdef desk_t *desk = worker.desk
    cdef int fd = worker.space.fd
    cdef uint64_t done, number = 0
    cdef int result = 0, decision = POISON
    cdef failure_t *failure
    cdef bint changed = False, watched
    watched = served != NULL and served.hold != NULL and served.hold.changed != NULL
    if served != NULL:
        number = (page - entry.base) // PAGE_SIZE
        if served.hold != NULL:
            if stage == LIMIT and error == ENOBUFS:
                say(served.hold, "cannot be had: its memory_limit is full of changed pages that cannot go",
                    number * PAGE_SIZE, 0, NULL, &served.hold.lost)
            elif stage == SOURCE:
                say_why(served, "cannot be had", number * PAGE_SIZE, error, &served.hold.lost)
            else:
                say(served.hold, "cannot be had", number * PAGE_SIZE, error, NULL, &served.hold.lost)
    if watched:
        # What was to be written there does not come: nothing is to be written back. (Where changes are
        # watched nothing moves, and `claim` takes no lock.)
        pthread_mutex_lock(&served.hold.budget.lock)
        changed = is_set(served.hold.changed, number)
        clear_bits(served.hold.changed, number, number + 1)
    if desk.can_poison:
        result = -ENOENT
        if claim(worker, entry, served, page, PAGE_SIZE):
            result = uffd_poison(fd, page, PAGE_SIZE, 0, &done)
            disclaim(worker)
    if watched:
        if changed and desk.can_poison and result != 0:
            set_bits(served.hold.changed, number, number + 1)
        pthread_mutex_unlock(&served.hold.budget.lock)
    if served != NULL:
        # Not missing any more; read-ahead has no business there.
        there(served, number, number + 1, False)
    if desk.can_poison:
        worker.counters.ioctls += 1
        decision = RETRY
        if result != 0:
            note(worker, result)
            decision = decide(-result)
        if decision == PARK:
            park(worker, served, page, False)
            return
        if decision == NEXT:
            # A page, or the marker of a write-protected one that is missing, which must go first.
            # Where changes are watched it is a page, and stays protected.
            if not watched:
                uffd_writeprotect(fd, page, PAGE_SIZE, 0)
            uffd_wake(fd, page, PAGE_SIZE)
            worker.counters.ioctls += 2
            worker.counters.existing += 1
            return
        if decision == FORGET or decision == STOP:
            worker.counters.forgotten += 1
            wake(worker, page, page + PAGE_SIZE)
            return
    # Nothing else makes a fork child's page fail: there its thread sleeps on.
    if worker.space.own and (not desk.can_poison or decision == POISON):
        # Before Linux 6.6, or refused. Each page splits the mapping; when there are no more mappings
        # to be had, all that is left of the region goes. Waiting for ever is no choice, zeros are none.
        if mprotect(<void *>page, PAGE_SIZE, PROT_NONE) != 0 and (
                entry == NULL
                or mprotect(<void *>entry.start, entry.end - entry.start, PROT_NONE) != 0):
            _abi.c_write(2, LAST_WORDS, sizeof(LAST_WORDS) - 1)
            abort()
        uffd_wake(fd, page, PAGE_SIZE)
        worker.counters.ioctls += 1
    worker.counters.failed += 1
    if served != NULL:
        count(&served.counters.failed, 1)
    pthread_mutex_lock(&desk.lock)
    failure = desk.failures + desk.n_failures % FAILURES
    failure.address = page
    failure.region = entry.id if entry != NULL else -1
    failure.offset = <int64_t>(page - entry.base) if entry != NULL else -1
    failure.error = error
    failure.stage = stage
    desk.n_failures += 1
    pthread_mutex_unlock(&desk.lock)


cdef void park(worker_t *worker, served_t *served, uint64_t page, bint protected) noexcept nogil:
    """Try the page again in a millisecond. With no room left, its thread is woken then, and asks again."""
    cdef desk_t *desk = worker.desk
    cdef bint room
    worker.counters.parked += 1
    if served != NULL:
        count(&served.counters.parked, 1)
    if worker.awake:
        return
    pthread_mutex_lock(&desk.lock)
    room = desk.n_parked < PARKED
    if room:
        desk.parked[desk.n_parked].space = worker.space
        desk.parked[desk.n_parked].page = page
        desk.parked[desk.n_parked].since = worker.since
        desk.parked[desk.n_parked].protected = protected
        desk.n_parked += 1
    elif worker.space.own:
        desk.lost_from = min(desk.lost_from, page) if desk.lost_to else page
        desk.lost_to = max(desk.lost_to, page + PAGE_SIZE)
    pthread_mutex_unlock(&desk.lock)
    if not room and not worker.space.own:
        wake(worker, page, page + PAGE_SIZE)


cdef void wake(worker_t *worker, uint64_t start, uint64_t end) noexcept nogil:
    """Whoever sleeps in [start, end) looks again."""
    uffd_wake(worker.space.fd, start, end - start)
    worker.counters.ioctls += 1


# -- time ----------------------------------------------------------------------------------------------

cdef inline size_t bucket(uint64_t ns) noexcept nogil:
    """Eight buckets an octave: below 8 ns one each, then steps of an eighth of the power of two."""
    cdef int octave
    if ns < 8:
        return ns
    octave = 63 - __builtin_clzll(ns)
    return (octave - 2) * 8 + (ns >> (octave - 3) & 7)


def bucket_start(int i):
    """The first ns of a bucket of the latency histogram."""
    return i if i < 16 else <uint64_t>(8 + i % 8) << (i // 8 - 1)


cdef void count_latency(worker_t *worker, served_t *served, uint64_t n, int64_t ns) noexcept nogil:
    """n faults were resolved `ns` after they had been read."""
    cdef int octave
    worker.counters.latency[bucket(ns)] += n
    if served != NULL:
        octave = 64 - __builtin_clzll(ns) if ns > 0 else 0
        count(&served.counters.latency[min(octave, REGION_LATENCIES - 1)], n)
