"""The reading thread: read → sort, dedupe → dispatch → widen → fill, and what is parked.

Its parts run without the GIL and allocate nothing. It never waits for a source: what cannot be filled
at once goes to the crew (_ahead).
"""

from libc.errno cimport EAGAIN, EINTR, EMFILE, ENFILE, ENODATA, errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from userfault cimport _abi
from userfault._abi cimport (
    UFFDIO_MODE_DONTWAKE, add_u64, c_read, count, load_int, msg_record, now, pollfd, ppoll,
    pthread_mutex_lock, pthread_mutex_unlock, swap_int_if, timespec,
)
from userfault._ahead cimport (
    CAPACITY, GONE, KEEPER, MOST_DUE, PAIR, SPIN, UNKNOWNS, loop_t, advance, give, set_goal, take_orders,
)
from userfault._books cimport find_grown
from userfault._fill cimport (
    NO_SOURCE, count_latency, fail, fill, fill_grown, is_prompt, park, parked_t, wake,
)
from userfault._follow cimport ask, epoll_event, find_room, hear
from userfault._ioctl cimport PAGE_SIZE, uffd_writeprotect
from userfault._lease cimport lease_end, lease_expire, lease_held, lease_saw, lease_saw_many
from userfault._served cimport (
    HUGE_PAGES, clear_bits, first_missing, is_set, look_ahead, missing_end, resync, served_t,
)
from userfault._space cimport space_t
from userfault._tree cimport empty, enter, entry_t, find, leave

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/epoll.h>" nogil:
    int epoll_wait(int epoll, epoll_event *events, int room, int milliseconds)

DEF RETRY_NS = 1000000     # until what was parked is tried again
DEF SPIN_NS = 200000       # without a fault, until the thread sleeps
DEF LEASE_NS = 10000000    # until a lease is looked after
DEF RECHECK = 512          # pages about a fault that contradicts what is known of them
DEF CHILDREN = 32         # served between two looks at our own faults
DEF LONG_RUN = 16          # pages: their threads are woken at once, and more are not waited for


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


cdef int run_loop(loop_t *loop) noexcept nogil:
    """Until the keeper has nothing left to keep (0), or the descriptor fails (-errno)."""
    cdef pollfd fds[3]
    cdef timespec timeout
    cdef const timespec *patience
    cdef uint64_t kicks
    cdef int64_t since = 0, last = 0, most
    cdef bint keen = False, alone = False
    cdef ssize_t got
    cdef int err, ready
    fds[0].fd = loop.own.fd
    fds[1].fd = loop.kick_fd
    fds[0].events = fds[1].events = fds[2].events = _abi.POLLIN
    while True:
        if load_int(&loop.state) == KEEPER and empty(loop.own.tree) and loop.children == NULL:
            if swap_int_if(&loop.state, KEEPER, GONE):
                lease_end(&loop.lease)
                return 0
        # Reading first saves the poll whenever faults keep coming. Not so where the one thread that
        # faults shares our processor, and has not run yet.
        got = -EAGAIN
        if not alone:
            got = attend(loop, &loop.own)
        if got > 0:
            since = loop.worker.since
            # Worth waiting for the next, awake?
            keen = since - last < 2 * SPIN_NS
            last = since
            pair(loop, since)
            alone = loop.lease.held and got == 1
            if loop.children != NULL:
                tend(loop)
            # All that is not urgent gets its turn even while faults never stop coming.
            if since - loop.unparked > RETRY_NS:
                loop.unparked = since
                unpark(loop)
                take_orders(loop)
                advance(loop, False)
            advance(loop, True)
            continue
        alone = False
        if got == -EINTR:
            continue
        if got != -EAGAIN:
            lease_end(&loop.lease)
            return got if got < 0 else -ENODATA
        if loop.children != NULL:
            if now() - loop.asked > loop.patience:
                ask(loop)
            if tend(loop):
                last = now()
                keen = True
                advance(loop, True)
                continue
        take_orders(loop)
        unpark_in_time(loop)
        if advance(loop, False):
            continue
        if keen and loop.may_spin and load_int(&loop.placement) == SPIN and now() - last < SPIN_NS:
            # Whoever is ready to run on this processor may be the next to fault.
            sched_yield()
            continue
        keen = False
        patience = NULL
        most = 0
        if loop.desk.n_parked:
            most = RETRY_NS
        elif lease_held(&loop.lease):
            # What is left of a lease that has ended is one more look at who inherited it, much later.
            most = LEASE_NS if loop.lease.held else 10 * LEASE_NS
        if loop.children != NULL:
            most = min(most, loop.patience) if most else loop.patience
        if most:
            timeout.tv_sec = most // 1000000000
            timeout.tv_nsec = most % 1000000000
            patience = &timeout
        fds[2].fd = loop.epoll
        ready = ppoll(fds, 3, patience, NULL)
        if ready < 0 and errno != EINTR:
            err = errno
            lease_end(&loop.lease)
            return -err
        if ready == 0 or fds[1].revents:
            pair(loop, 0)
        if fds[1].revents:
            c_read(fds[1].fd, &kicks, sizeof(kicks))
            fds[1].revents = 0
        unpark_in_time(loop)


cdef void pair(loop_t *loop, int64_t since) noexcept nogil:
    """Share a processor with the thread that keeps faulting; `since` is 0 when there was no fault."""
    if load_int(&loop.placement) != PAIR:
        if lease_held(&loop.lease):
            lease_end(&loop.lease)
    elif since == 0:
        lease_expire(&loop.lease, now())
    elif loop.tid:
        lease_saw(&loop.lease, loop.tid, since)
    else:
        lease_saw_many(&loop.lease, since)


cdef ssize_t attend(loop_t *loop, space_t *space) noexcept nogil:
    """Read what is pending in a space, and serve it. How many records there were, or -errno."""
    cdef size_t record = 8 if loop.wire == _abi.WIRE_V1 else 16 if loop.wire == _abi.WIRE_V2 else 32
    cdef size_t n_faults = 0
    cdef ssize_t got
    loop.worker.space = space
    if space.hears_events:
        pthread_mutex_lock(&loop.desk.layout)
    got = c_read(space.fd, loop.records, CAPACITY * record)
    if got < 0:
        got = -errno
    elif got > 0:
        loop.worker.since = now()
        loop.worker.counters.reads += 1
        got //= record
        n_faults = decode(loop, got)
    if space.hears_events:
        pthread_mutex_unlock(&loop.desk.layout)
    if got == -EMFILE or got == -ENFILE:
        find_room(loop)
        return -EINTR
    serve(loop, n_faults, loop.worker.since)
    return got


cdef bint tend(loop_t *loop) noexcept nogil:
    """Serve what is pending in the children's spaces. False: nothing was."""
    cdef epoll_event ready[CHILDREN]
    cdef int i, n = epoll_wait(loop.epoll, ready, CHILDREN, 0)
    for i in range(n):
        attend(loop, <space_t *>ready[i].data.ptr)
    return n > 0


cdef size_t decode(loop_t *loop, size_t n) noexcept nogil:
    """The pages of the page faults among n records, into `pages`. Events are heeded before any fault: the
    kernel lets faults overtake them. Other records are kept."""
    cdef uint64_t page = ~(PAGE_SIZE - 1), arg
    cdef const msg_record *msg
    cdef size_t i, n_pages = 0, record = 8
    cdef bint fault, protected
    loop.tid = 0
    for i in range(n):
        if loop.wire == _abi.WIRE_MSG:
            msg = <const msg_record *>loop.records + i
            # With THREAD_ID, which placement "pair" asks for; otherwise 0.
            loop.tid = <int>msg.ptid if i == 0 or loop.tid == <int>msg.ptid else 0
            fault = (msg.event == _abi.UFFD_EVENT_PAGEFAULT
                     and not msg.flags & _abi.UFFD_PAGEFAULT_FLAG_MINOR)
            protected = fault and msg.flags & _abi.UFFD_PAGEFAULT_FLAG_WP
            arg = msg.address
            record = sizeof(msg_record)
        elif loop.wire == _abi.WIRE_V2:
            fault = (<const _abi.v2_record *>loop.records)[i].type == _abi.UFFD_PAGEFAULT
            arg = (<const _abi.v2_record *>loop.records)[i].arg
            protected = fault and arg & _abi.UFFD_BIT_WP
            record = sizeof(_abi.v2_record)
        else:
            fault = True
            arg = (<const _abi.v1_record *>loop.records)[i].arg
            protected = arg & _abi.UFFD_BIT_WP
        if protected:
            # The data is there, and nobody is left who wants to know of the write.
            loop.worker.since = now()
            unprotect(loop, arg & page)
        elif fault:
            loop.pages[n_pages] = arg & page
            n_pages += 1
        elif not hear(loop, loop.worker.space, loop.records + i * record):
            memcpy(loop.unknowns + loop.worker.counters.unknown % UNKNOWNS * sizeof(msg_record),
                   loop.records + i * record, record)
            loop.worker.counters.unknown += 1
    loop.worker.counters.records += n
    return n_pages


cdef void unprotect(loop_t *loop, uint64_t page) noexcept nogil:
    """Let the writes to a page through."""
    cdef int result = uffd_writeprotect(loop.worker.space.fd, page, PAGE_SIZE, 0)
    loop.worker.counters.ioctls += 1
    if result == -EAGAIN:
        loop.worker.counters.errors[EAGAIN] += 1
        park(&loop.worker, NULL, page, True)
    else:
        loop.worker.counters.unprotected += 1


# -- the batch -----------------------------------------------------------------------------------------

cdef void serve(loop_t *loop, size_t n, int64_t since) noexcept nogil:
    """Resolve the n `pages`, which were read at time `since`."""
    cdef space_t *space = loop.worker.space
    cdef int ticket = enter(space.tree)
    cdef entry_t entry
    cdef bint held = False
    cdef size_t i = 0
    cdef uint64_t mode = UFFDIO_MODE_DONTWAKE if n > 1 else 0
    loop.worker.since = since
    sort(loop.pages, n)
    while i < n:
        if not (held and entry.start <= loop.pages[i] < entry.end):
            held = (find(space.tree, loop.pages[i], &entry)
                    or find_grown(space.tree, space.fd, loop.pages[i], &entry))
        if held and entry.payload != NULL:
            i += serve_run(loop, &entry, <served_t *>entry.payload, loop.pages + i, n - i, mode)
        elif i and loop.pages[i] == loop.pages[i - 1]:
            loop.worker.counters.duplicates += 1
            i += 1
        elif not held and space.hears_moves and not loop.retrying:
            # Its memory may have come here by a remap that we have not been told of yet.
            park(&loop.worker, NULL, loop.pages[i], False)
            i += 1
        else:
            loop.worker.counters.runs += 1
            fail(&loop.worker, &entry if held else NULL, NULL, loop.pages[i], 0, NO_SOURCE)
            count_latency(&loop.worker, NULL, 1, now() - since)
            i += 1
    flush(loop)
    leave(space.tree, ticket)


cdef size_t serve_run(loop_t *loop, const entry_t *entry, served_t *served, const uint64_t *pages, size_t n,
                      uint64_t mode) noexcept nogil:
    """Serve the first of the sorted faults, and those after it that belong to the same run of units.

    Returns how many that were.
    """
    cdef uint64_t low = (entry.start - entry.base) // PAGE_SIZE
    cdef uint64_t high = min((entry.end - entry.base) // PAGE_SIZE, served.n_pages)
    cdef uint64_t page = (pages[0] - entry.base) // PAGE_SIZE
    cdef uint64_t want = page, want_end = page, first, start, end, stop, ahead, parked, n_faults = 0
    cdef size_t i = 0
    cdef bint handed = False, there
    if page >= served.n_pages:
        fill_grown(&loop.worker, entry, pages[0], mode)
        note_due(loop, NULL, pages[0], pages[0] + PAGE_SIZE, 1, mode)
        return 1
    if is_set(served.coming, page) and left_to_worker(loop, served, page):
        # The reader has caught up with what is read ahead of it.
        ahead = look_ahead(served, page, page + 1)
        set_goal(loop, served.id, entry.base + page * PAGE_SIZE, entry.base + ahead * PAGE_SIZE, False)
        return 1
    first = end = max(low, chunk_start(served, page))
    while i < n and pages[i] < entry.base + high * PAGE_SIZE:
        page = (pages[i] - entry.base) // PAGE_SIZE
        if page + 1 == want_end:
            loop.worker.counters.duplicates += 1
            count(&served.counters.duplicates, 1)
            n_faults += 1
        elif page >= end and chunk_start(served, page) > end:
            break
        elif i == 0 or not (is_set(served.coming, page) and left_to_worker(loop, served, page)):
            if is_set(served.resident, page):
                recheck(loop, entry, served, page, low, high)
            if page >= end:
                start = chunk_start(served, page)
                end = min(start + served.chunk, page - page % served.unit + served.unit, high)
            want_end = page + 1
            n_faults += 1
        i += 1
    if not loop.retrying:
        count(&served.counters.records, n_faults)
    ahead = look_ahead(served, first, end)
    if served.huge and ahead >= end + HUGE_PAGES:
        take_whole(entry, served, low, high, &first, &end)
    elif ahead - end < LONG_RUN:
        # Within the same call: cheaper than to come back for them.
        end = min(ahead, high)
    parked = loop.worker.counters.parked
    there = is_set(served.resident, want)
    page = first_missing(served, first, end)
    while page < end:
        stop = missing_end(served, page, end)
        if fill_or_hand(loop, entry, served, page, stop, want, want_end, 0 if handed else n_faults, mode):
            handed = True
        page = first_missing(served, stop, end)
    if there and mode == 0:
        # Brought since the fault, perhaps with a batch whose wake-up was for others: no COPY will wake it.
        wake(&loop.worker, pages[0], pages[0] + PAGE_SIZE)
    parked = loop.worker.counters.parked - parked
    n_faults = 0 if handed or parked >= n_faults else n_faults - parked
    if parked and mode:
        # These sleep on; so only those whose pages came are woken.
        flush(loop)
        page = want
        while page < want_end:
            stop = first_missing(served, page, want_end)
            if stop > page:
                wake(&loop.worker, entry.base + page * PAGE_SIZE, entry.base + stop * PAGE_SIZE)
            page = missing_end(served, stop, want_end)
        count_latency(&loop.worker, served, n_faults, now() - loop.worker.since)
        return i
    note_due(loop, served, entry.base + want * PAGE_SIZE, entry.base + want_end * PAGE_SIZE, n_faults, mode)
    if end - first > LONG_RUN:
        flush(loop)
    if served.unit > served.chunk:
        # The rest of a unit that is larger than a huge page follows.
        set_goal(loop, served.id, entry.base + max(low, first - first % served.unit) * PAGE_SIZE,
                 entry.base + min(max(ahead, first - first % served.unit + served.unit), high) * PAGE_SIZE,
                 False)
    elif ahead > end:
        set_goal(loop, served.id, entry.base + end * PAGE_SIZE, entry.base + ahead * PAGE_SIZE, False)
    return i


cdef inline uint64_t chunk_start(const served_t *served, uint64_t page) noexcept nogil:
    """The first page of what is filled together with this one: its unit, or a huge page of that."""
    return page - page % served.unit % served.chunk


cdef bint left_to_worker(loop_t *loop, served_t *served, uint64_t page) noexcept nogil:
    """A worker has been asked for the page: it will wake those who came too late. False: it is through."""
    add_u64(&served.skipped, 1)
    if not is_set(served.coming, page):
        return False
    loop.worker.counters.coming += 1
    if not loop.retrying:
        count(&served.counters.records, 1)
    return True


cdef void recheck(loop_t *loop, const entry_t *entry, served_t *served, uint64_t page, uint64_t low,
                  uint64_t high) noexcept nogil:
    """A page that was there is missing: madvise(MADV_DONTNEED) took it, and maybe its neighbours."""
    cdef uint64_t first = page - page % RECHECK
    if resync(served, loop.worker.space.pagemap, entry.base, max(first, low), min(first + RECHECK, high)) < 0:
        clear_bits(served.resident, page, page + 1)


cdef void take_whole(const entry_t *entry, served_t *served, uint64_t low, uint64_t high, uint64_t *first,
                     uint64_t *end) noexcept nogil:
    """Widen [first, end) to the huge page that it lies in, if nothing is there yet: one page that comes
    before the others would spoil the move."""
    cdef uint64_t page = first[0], aligned
    aligned = (entry.base // PAGE_SIZE + page) % HUGE_PAGES
    if aligned > page - low or page - aligned + HUGE_PAGES > high:
        return
    page -= aligned
    if end[0] <= page + HUGE_PAGES and missing_end(served, page, page + HUGE_PAGES) == page + HUGE_PAGES:
        first[0] = page
        end[0] = page + HUGE_PAGES


cdef bint fill_or_hand(loop_t *loop, const entry_t *entry, served_t *served, uint64_t first, uint64_t end,
                       uint64_t want, uint64_t want_end, uint64_t n_faults, uint64_t mode) noexcept nogil:
    """Fill the missing pages [first, end) here as far as that needs no waiting; the rest is for the crew,
    which True says."""
    if is_prompt(served, first, end):
        first = fill(&loop.worker, entry, served, first, end, want, want_end, mode, False)
        if first == end:
            return False
    give(loop, entry, served, first, end, want, want_end, n_faults)
    return True


cdef void note_due(loop_t *loop, served_t *served, uint64_t start, uint64_t end, uint64_t n_faults,
                   uint64_t mode) noexcept nogil:
    """The pages of n faults are there. Their threads, if they were not woken by that, sleep until `flush`."""
    if mode == 0:
        count_latency(&loop.worker, served, n_faults, now() - loop.worker.since)
        return
    if loop.n_due == 0:
        loop.asleep_from = start
    loop.asleep_to = end
    loop.due[loop.n_due].served = served
    loop.due[loop.n_due].n = n_faults
    loop.n_due += 1
    if loop.n_due == MOST_DUE:
        flush(loop)


cdef void flush(loop_t *loop) noexcept nogil:
    """Wake all whose pages came with DONTWAKE, in one call: each wake-up walks the list of all sleepers."""
    cdef int64_t ns
    cdef size_t i
    if loop.n_due == 0:
        return
    wake(&loop.worker, loop.asleep_from, loop.asleep_to)
    ns = now() - loop.worker.since
    for i in range(loop.n_due):
        count_latency(&loop.worker, loop.due[i].served, loop.due[i].n, ns)
    loop.n_due = 0


cdef void unpark_in_time(loop_t *loop) noexcept nogil:
    """Every millisecond, `unpark`."""
    cdef int64_t at
    if loop.desk.n_parked:
        at = now()
        if at - loop.unparked > RETRY_NS:
            loop.unparked = at
            unpark(loop)


cdef void unpark(loop_t *loop) noexcept nogil:
    """Serve everything parked; what must wait longer is parked anew."""
    cdef size_t n, i
    cdef int64_t since
    cdef uint64_t lost_from, lost_to
    cdef space_t *space
    pthread_mutex_lock(&loop.desk.lock)
    n = loop.desk.n_parked
    memcpy(loop.parked, loop.desk.parked, n * sizeof(parked_t))
    loop.desk.n_parked = 0
    lost_from, lost_to = loop.desk.lost_from, loop.desk.lost_to
    loop.desk.lost_from = loop.desk.lost_to = 0
    pthread_mutex_unlock(&loop.desk.lock)
    if n == 0:
        return
    n = once_each(loop.parked, n)
    loop.retrying = True
    while n:
        since = loop.parked[n - 1].since
        space = loop.worker.space = loop.parked[n - 1].space
        if loop.parked[n - 1].protected:
            n -= 1
            loop.worker.since = since
            unprotect(loop, loop.parked[n].page)
            continue
        i = 0
        while n and i < CAPACITY and not loop.parked[n - 1].protected and loop.parked[n - 1].space == space:
            n -= 1
            since = min(since, loop.parked[n].since)
            loop.pages[i] = loop.parked[n].page
            i += 1
        serve(loop, i, since)
    loop.retrying = False
    if lost_to:
        loop.worker.space = &loop.own
        wake(&loop.worker, lost_from, lost_to)


cdef inline bint comes_after(const parked_t *one, const parked_t *other) noexcept nogil:
    if one.space != other.space:
        return one.space > other.space
    return one.page > other.page


cdef size_t once_each(parked_t *parked, size_t n) noexcept nogil:
    """Sort by space and page, and leave out what is there twice; how many are left."""
    cdef size_t gap = 1, i, k
    cdef parked_t value
    while gap < n // 3:
        gap = 3 * gap + 1
    while gap:
        for i in range(gap, n):
            value = parked[i]
            k = i
            while k >= gap and comes_after(&parked[k - gap], &value):
                parked[k] = parked[k - gap]
                k -= gap
            parked[k] = value
        gap //= 3
    k = 0
    for i in range(1, n):
        if parked[i].page == parked[k].page and parked[i].space == parked[k].space:
            parked[k].since = min(parked[k].since, parked[i].since)
        else:
            k += 1
            parked[k] = parked[i]
    return k + 1
