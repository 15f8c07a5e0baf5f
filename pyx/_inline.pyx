"""Mode "inline": a fault is served by the thread that took it, in the handler of the SIGBUS that it got.

Nothing here takes a lock that the interrupted thread may hold, for none of ours is held where served memory
is touched: that happens in the program, and in sources. The books of the regions are read without locks. The
budget's lock is held while bits are changed, pages are dropped, and the kernel copies from a stage or out of
a source's memory (a copy that faults is EFAULT, no signal), and it is let go of while a source writes; the
desk's is held for a few stores. No source is asked while either is held. The layout's lock is for events,
which this mode does not hear. A source promises as much by `signal_safe`. Only an asynchronous signal handler
of the program's that touches served memory could find one of them held by the thread that it interrupted.

A worker_t is taken out of a pool, by level: a source's own fault is served too, by a hand of the next level.
Who waits at one level waits for those of deeper ones only, and at the last nobody does.
"""

from libc.errno cimport EBUSY, EFAULT, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memset

from userfault._abi cimport (
    UFFDIO_MODE_DONTWAKE, add_int, c_write, count, load_int, load_ptr, load_u64, now, pread,
    store_int, store_ptr, store_u64, swap_int_if, swap_u64_if, usleep,
)
from userfault._ahead cimport loop_t
from userfault._bits cimport clear_bits, is_set, set_bits
from userfault._evict cimport change, expect_change
from userfault._fill cimport NO_SOURCE, TRIES, count_latency, fail, fill, worker_t
from userfault._ioctl cimport PAGE_SIZE
from userfault._serve cimport chunk_start, recheck, take_whole
from userfault._served cimport HUGE_PAGES, first_missing, look_ahead, missing_end, served_t
from userfault._stage cimport new_stage
from userfault._tree cimport enter, entry_t, find, leave

cdef extern from "<pthread.h>" nogil:
    uintptr_t pthread_self()

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int c_madvise "madvise"(void *address, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MADV_WIPEONFORK

cdef extern from "<sys/syscall.h>" nogil:
    long syscall(long number, ...)
    long SYS_rt_sigprocmask

cdef extern from "<sched.h>" nogil:
    int sched_getcpu()
    int sched_yield()

cdef extern from *:
    """
    static const char uf_too_deep[] = "userfault: a source touched served memory, whose source did so too, "
        "and so on: this fault is not served\\n";
    """
    const char TOO_DEEP "uf_too_deep"[]

DEF RETRY_US = 1000      # until what cannot be had now is tried again
DEF YIELDS = 100         # to those who bring a page, before sleeping
DEF PAUSE_US = 50

ctypedef struct slot_t:
    int taken
    int users      # handlers that look at it
    void *loop     # loop_t; NULL: nobody's

# A page that a fork child finds zeroed (MADV_WIPEONFORK): 1 where we serve. So no fault need ask for the
# id of the process, which would take 0.1 µs.
cdef int *here = NULL
cdef slot_t slots[SPACES]
cdef int n_slots = 0                       # that were ever used
cdef uint64_t owners[LEVELS * HANDS]       # the thread that has this hand; 0: none
cdef char *stages[LEVELS * HANDS]


cdef inline bint is_here() noexcept nogil:
    """Whether this process serves inline: a fork child that did would fill its parent's memory."""
    return here != NULL and load_int(here)


cdef int enrol(loop_t *loop) noexcept nogil:
    """Serve the faults of the engine's memory from now on. Under the GIL. 0 or -errno, EBUSY for too many."""
    global here
    cdef void *page
    cdef int i
    if here == NULL:
        page = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if page == <void *>-1:
            return -errno
        if c_madvise(page, PAGE_SIZE, MADV_WIPEONFORK) != 0:
            i = errno
            munmap(page, PAGE_SIZE)
            return -i
        here = <int *>page
    if not load_int(here):
        # It has neither the threads of its parent nor the memory of the stages.
        memset(slots, 0, sizeof(slots))
        memset(owners, 0, sizeof(owners))
        memset(stages, 0, sizeof(stages))
        store_int(&n_slots, 0)
        store_int(here, 1)
    for i in range(SPACES):
        if swap_int_if(&slots[i].taken, 0, 1):
            store_ptr(&slots[i].loop, loop)
            if n_slots <= i:
                store_int(&n_slots, i + 1)
            return 0
    return -EBUSY


cdef void strike(loop_t *loop) noexcept nogil:
    """Serve its faults no more; when it returns no handler uses the engine."""
    cdef int i
    if not is_here():
        return
    for i in range(load_int(&n_slots)):
        if load_ptr(&slots[i].loop) == <void *>loop:
            store_ptr(&slots[i].loop, NULL)
            while load_int(&slots[i].users):
                usleep(PAUSE_US)
            store_int(&slots[i].taken, 0)


cdef bint serve_own(uint64_t address, int writing) noexcept nogil:
    """Serve the fault that the calling thread took at the address. False: it is none of ours.

    `writing`: whether by a write; -1 where that is not known: then a missing page is taken to be read, and
    its protection tells of the write by another fault, which a fault of a page that is there is taken for."""
    cdef slot_t *slot
    cdef loop_t *loop
    cdef bint found = False
    cdef int i = 0
    if not is_here():
        return False
    while i < load_int(&n_slots) and not found:
        slot = &slots[i]
        i += 1
        if load_ptr(&slot.loop) == NULL:
            continue
        add_int(&slot.users, 1)
        loop = <loop_t *>load_ptr(&slot.loop)
        found = loop != NULL and serve_in(loop, address, writing)
        add_int(&slot.users, -1)
    return found


cdef bint serve_in(loop_t *loop, uint64_t address, int writing) noexcept nogil:
    """`serve_own`, if it is of this engine's memory."""
    cdef int ticket = enter(loop.own.tree), hand
    cdef entry_t entry
    cdef served_t *served = NULL
    cdef bint found = find(loop.own.tree, address, &entry)
    if found and entry.payload != NULL:
        # From here on whoever detaches the region waits for us.
        served = <served_t *>entry.payload
        add_int(&served.users, 1)
    leave(loop.own.tree, ticket)
    if not found:
        return False
    hand = take_hand()
    if hand < 0:
        c_write(2, TOO_DEEP, sizeof(TOO_DEEP) - 1)
        found = False
    else:
        found = serve_page(loop, hand, &entry, served, address, writing)
        store_u64(&owners[hand], 0)
    if served != NULL:
        add_int(&served.users, -1)
    return found


cdef int take_hand() noexcept nogil:
    """The number of a hand that is the calling thread's until its owner is 0 again; -1: it has too many."""
    cdef uint64_t self = pthread_self()
    cdef int level = 0, at = max(sched_getcpu(), 0), i, hand, waited = 0
    while level < LEVELS and has_hand(level, self):
        level += 1
    if level == LEVELS:
        return -1
    while True:
        for i in range(HANDS):
            # One a processor is enough as long as no source waits: stages are memory.
            hand = level * HANDS + (at + i) % HANDS
            if load_u64(&owners[hand]) == 0 and swap_u64_if(&owners[hand], 0, self):
                return hand
        pause(&waited)


cdef inline bint has_hand(int level, uint64_t self) noexcept nogil:
    cdef int i
    for i in range(level * HANDS, (level + 1) * HANDS):
        if load_u64(&owners[i]) == self:
            return True
    return False


cdef inline void pause(int *waited) noexcept nogil:
    """Let others go on."""
    waited[0] += 1
    if waited[0] < YIELDS:
        sched_yield()
    else:
        usleep(PAUSE_US)


cdef worker_t *equip(loop_t *loop, int hand) noexcept nogil:
    """The engine's worker for this hand; NULL: there is no memory for its stage."""
    cdef worker_t *worker = &loop.hands[hand]
    worker.desk = &loop.desk
    worker.space = &loop.own
    worker.awake = True
    worker.stage = stages[hand]
    if worker.stage == NULL:
        if new_stage(worker) != 0:
            return NULL
        stages[hand] = worker.stage
    worker.since = now()
    worker.tries = TRIES
    return worker


cdef bint is_lost(const worker_t *worker, uint64_t address) noexcept nogil:
    """Whether a page that is not missing is poisoned. Not all kernels say so by BUS_MCEERR_AR."""
    cdef uint64_t entry
    # An unknown `how`: it copies the set and then refuses, with EFAULT where there is none to be had.
    if syscall(SYS_rt_sigprocmask, <long>-1, address & ~<uint64_t>7, NULL, <long>8) != 0 and errno != EFAULT:
        return False
    if pread(worker.space.pagemap, &entry, sizeof(entry), <long>(address // PAGE_SIZE * 8)) != sizeof(entry):
        return True
    # Swapped out it would be readable; if it is missing, somebody has just let go of it.
    return entry >> 62 == 1


cdef bint serve_page(loop_t *loop, int hand, const entry_t *entry, served_t *served, uint64_t address,
                     int writing) noexcept nogil:
    """Have the page of the address, or let it fail closed. False: it had failed before, and ends so."""
    cdef bint mended = True
    cdef uint64_t page = (address - entry.base) // PAGE_SIZE
    cdef worker_t *worker = equip(loop, hand)
    if worker == NULL:
        usleep(RETRY_US)
        return True
    worker.counters.records += 1
    if served == NULL or page >= served.n_pages:
        if is_lost(worker, address):
            return False
        worker.counters.runs += 1
        fail(worker, entry, NULL, address & ~(PAGE_SIZE - 1), 0, NO_SOURCE)
        served = NULL
    else:
        count(&served.counters.records, 1)
        mended = bring_page(worker, entry, served, page, writing, hand < HANDS)
    count_latency(worker, served, 1, now() - worker.since)
    return mended


cdef bint bring_page(worker_t *worker, const entry_t *entry, served_t *served, uint64_t page, int writing,
                     bint may_wait) noexcept nogil:
    """Fill the page, and what is to be filled with it; False: it is poisoned. Not `may_wait`: a page that is
    coming may be coming by the calling thread, whose source asks for it."""
    cdef uint64_t address = entry.base + page * PAGE_SIZE, existing = worker.counters.existing
    cdef uint64_t low = (entry.start - entry.base) // PAGE_SIZE
    cdef uint64_t high = min((entry.end - entry.base) // PAGE_SIZE, served.n_pages)
    cdef uint64_t first = max(low, page - page % served.unit)
    cdef uint64_t end = min(page - page % served.unit + served.unit, high), at, stop, ahead, parked
    cdef bint watched = served.hold != NULL and served.hold.changed != NULL
    cdef int waited = 0
    if is_set(served.resident, page):
        recheck(worker.space.pagemap, entry, served, page, low, high)
        if is_set(served.resident, page):
            # Somebody brought it meanwhile, or it is there and protected; or it failed.
            if is_lost(worker, address):
                return False
            if watched and writing:
                worker.counters.ioctls += 1
                worker.counters.unprotected += 1
                change(served, page)
            else:
                worker.counters.duplicates += 1
                count(&served.counters.duplicates, 1)
            return True
    if is_set(served.coming, page):
        if may_wait:
            worker.counters.coming += 1
            while is_set(served.coming, page):
                pause(&waited)
            return True
        fill(worker, entry, served, page, page + 1, page, page + 1, UFFDIO_MODE_DONTWAKE, True)
        return True
    if watched and writing > 0:
        expect_change(served, page)
    if swap_int_if(&served.looking, 0, 1):
        ahead = look_ahead(served, first, end)
        store_int(&served.looking, 0)
        if served.huge and ahead >= end + HUGE_PAGES:
            take_whole(entry, served, low, high, &first, &end)
        end = max(end, min(ahead, high))
    while True:
        parked = worker.counters.parked
        at = first_missing(served, first, end)
        while at < end:
            stop = missing_end(served, at, end)
            set_bits(served.coming, at, stop)
            fill(worker, entry, served, at, stop, page, page + 1, UFFDIO_MODE_DONTWAKE, True)
            clear_bits(served.coming, at, stop)
            at = first_missing(served, stop, end)
        if worker.counters.parked == parked or load_int(&served.ending):
            return worker.counters.existing == existing or not is_lost(worker, address)
        # Each page has its own patience, which begins with its fault.
        usleep(RETRY_US)
        first = max(low, chunk_start(served, page))
        end = min(first + served.chunk, high)
