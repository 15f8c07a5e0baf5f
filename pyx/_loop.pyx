"""The reading thread: read → heed events → serve, and what is parked.

Its parts run without the GIL and allocate nothing. It never waits for a source: what cannot be filled
at once goes to the crew (_ahead).
"""

from libc.errno cimport EAGAIN, EINTR, EMFILE, ENFILE, ENODATA, errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from userfault cimport _abi
from userfault._abi cimport (
    c_read, load_int, load_ptr, msg_record, now, pollfd, ppoll, pthread_mutex_lock, pthread_mutex_unlock,
    swap_int_if, timespec,
)
from userfault._ahead cimport (
    CAPACITY, GONE, KEEPER, PAIR, SERVING, SPIN, UNKNOWNS, advance, loop_t, take_orders,
)
from userfault._evict cimport change, expect_change
from userfault._fill cimport park, parked_t, wake
from userfault._follow cimport ask, epoll_event, find_room, hear
from userfault._ioctl cimport PAGE_SIZE, uffd_writeprotect
from userfault._lease cimport lease_end, lease_expire, lease_held, lease_saw, lease_saw_many
from userfault._serve cimport serve
from userfault._served cimport served_t
from userfault._sigbus cimport take_sigbus
from userfault._space cimport space_t
from userfault._tree cimport empty, enter, entry_t, find, leave

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/epoll.h>" nogil:
    int epoll_wait(int epoll, epoll_event *events, int room, int milliseconds)

DEF RETRY_NS = 1000000     # until what was parked is tried again
DEF ALIKE_NS = 100000000   # between faults that are served as one batch
DEF SPIN_NS = 200000       # without a fault, until the thread sleeps
DEF LEASE_NS = 10000000    # until a lease is looked after
DEF WATCH_NS = 100000000   # between two looks at who has SIGBUS, in mode "inline"
DEF CHILDREN = 32          # served between two looks at our own faults


cdef int run_loop(loop_t *loop) noexcept nogil:
    """Until the keeper has nothing left to keep (0), or the descriptor fails (-errno)."""
    cdef pollfd fds[3]
    cdef timespec timeout
    cdef const timespec *patience
    cdef uint64_t kicks
    cdef int64_t since = 0, last = 0, most
    cdef bint keen = False, alone = False, watching
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
        elif got == -EAGAIN or got == -EINTR or got == -EMFILE:
            alone = False
            if got == -EMFILE:
                find_room(loop)
        else:
            lease_end(&loop.lease)
            return got if got < 0 else -ENODATA
        if loop.children != NULL and tend(loop):
            got = 1
            last = now()
            keen = True
        if got > 0:
            # All that is not urgent gets its turn even while faults never stop coming.
            if last - loop.unparked > RETRY_NS:
                loop.unparked = last
                unpark(loop)
                take_orders(loop)
                advance(loop, False)
                ask_in_time(loop, last)
            advance(loop, True)
            continue
        if loop.children != NULL:
            ask_in_time(loop, now())
            if loop.children == NULL:
                continue  # it may have been the last that a keeper had to keep
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
        watching = load_ptr(<void **>&loop.hands) != NULL and load_int(&loop.state) == SERVING
        if watching:
            most = min(most, <int64_t>WATCH_NS) if most else WATCH_NS
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
        if ready == 0 and watching:
            # Who replaced our handler ends the next thread that faults, or keeps it faulting for ever.
            take_sigbus()
        if ready == 0 or fds[1].revents:
            pair(loop, 0)
        if fds[1].revents:
            c_read(fds[1].fd, &kicks, sizeof(kicks))
            fds[1].revents = 0
        unpark_in_time(loop)


cdef inline void ask_in_time(loop_t *loop, int64_t at) noexcept nogil:
    """Every now and then, `ask`."""
    if loop.children != NULL and at - loop.asked > loop.patience:
        ask(loop)


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
    cdef int ticket
    loop.worker.space = space
    if space.hears_events:
        pthread_mutex_lock(&loop.desk.layout)
    # From before the read on: whoever unmaps memory waits (`quiesce`) until the faults that were read there
    # are served. Else they would be taken for faults of what is mapped there next.
    ticket = enter(space.tree)
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
    serve(loop, n_faults, loop.worker.since)
    leave(space.tree, ticket)
    return -EMFILE if got == -ENFILE else got


cdef bint tend(loop_t *loop) noexcept nogil:
    """Serve what is pending in the children's spaces. False: nothing was."""
    cdef epoll_event ready[CHILDREN]
    cdef int i, n = epoll_wait(loop.epoll, ready, CHILDREN, 0)
    for i in range(n):
        if attend(loop, <space_t *>ready[i].data.ptr) == -EMFILE:
            # Which may end some of those that are ready.
            find_room(loop)
            break
    return n > 0


cdef size_t decode(loop_t *loop, size_t n) noexcept nogil:
    """The pages of the page faults among n records, into `pages`. Events are heeded before any fault: the
    kernel lets faults overtake them. Other records are kept."""
    cdef uint64_t page = ~(PAGE_SIZE - 1), arg
    cdef const msg_record *msg = NULL
    cdef size_t i, n_pages = 0, record = 8
    cdef bint fault, protected
    loop.tid = 0
    for i in range(n):
        if loop.wire == _abi.WIRE_MSG:
            msg = <const msg_record *>loop.records + i
            # With THREAD_ID, which placement "pair" asks for; otherwise 0.
            loop.tid = <int>msg.ptid if i == 0 or loop.tid == <int>msg.ptid else 0
            # Also a minor one, of memory whose monitor has closed: it fails closed as a missing page does.
            fault = msg.event == _abi.UFFD_EVENT_PAGEFAULT
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
            # Changes are watched on msg only.
            if loop.worker.space.tracks and msg.flags & _abi.UFFD_PAGEFAULT_FLAG_WRITE:
                expect(loop, arg & page)
            loop.pages[n_pages] = arg & page
            n_pages += 1
        elif not hear(loop, loop.worker.space, loop.records + i * record):
            memcpy(loop.unknowns + loop.worker.counters.unknown % UNKNOWNS * sizeof(msg_record),
                   loop.records + i * record, record)
            loop.worker.counters.unknown += 1
    loop.worker.counters.records += n
    return n_pages


cdef served_t *watched(loop_t *loop, uint64_t page, uint64_t *number) noexcept nogil:
    """Whose changes are noted there, and which page of it that is; NULL: nobody's."""
    cdef entry_t entry
    cdef served_t *served
    if not (loop.worker.space.tracks and find(loop.worker.space.tree, page, &entry)):
        return NULL
    served = <served_t *>entry.payload
    if served == NULL or served.hold == NULL or served.hold.changed == NULL:
        return NULL
    number[0] = (page - entry.base) // PAGE_SIZE
    return served


cdef void expect(loop_t *loop, uint64_t page) noexcept nogil:
    """`expect_change`, where changes are watched."""
    cdef uint64_t number
    cdef int ticket = enter(loop.worker.space.tree)
    cdef served_t *served = watched(loop, page, &number)
    if served != NULL:
        expect_change(served, number)
    leave(loop.worker.space.tree, ticket)


cdef void unprotect(loop_t *loop, uint64_t page) noexcept nogil:
    """Let the writes to a page through, and where changes are watched note that it is changed."""
    cdef uint64_t number
    cdef int ticket = enter(loop.worker.space.tree), result
    cdef served_t *served = watched(loop, page, &number)
    if served != NULL:
        result = change(served, number)
    else:
        result = uffd_writeprotect(loop.worker.space.fd, page, PAGE_SIZE, 0)
    leave(loop.worker.space.tree, ticket)
    loop.worker.counters.ioctls += 1
    if result == -EAGAIN:
        loop.worker.counters.errors[EAGAIN] += 1
        park(&loop.worker, NULL, page, True)
    else:
        loop.worker.counters.unprotected += 1


# -- what is parked ------------------------------------------------------------------------------------

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
    cdef int64_t since, age
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
            # Each has its own patience.
            age = since - loop.parked[n - 1].since
            if i and (age > ALIKE_NS or -age > ALIKE_NS):
                break
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
