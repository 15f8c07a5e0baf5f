"""Letting go of pages, and writing back those that were changed.

A changed page is never dropped. Every page comes write-protected, so that its first write faults, and the
reading thread notes the change before it lets the writer go on; whoever drops pages does it under the same
lock, in which nothing becomes changed. A page that is being written back is protected anew before it is
read: who writes meanwhile makes it changed again.
"""

from libc.errno cimport EAGAIN, EINVAL, EIO, ENOBUFS, errno
from libc.stdint cimport uint64_t, uintptr_t

from userfault._abi cimport (
    UFFDIO_WRITEPROTECT_MODE_WP, add_int, add_u64, count, iovec, load_int, load_u64, pthread_mutex_lock,
    pthread_mutex_unlock, store_int,
)
from userfault._bits cimport clear_bits, is_set, n_set, set_bits
from userfault._budget cimport (
    ABSENT, BLOCK_PAGES, GHOST, KEPT, block_of, budget_t, fifo_t, is_whole, member_of, pop, push,
)
from userfault._hold cimport any_changed, put_back, take_in, take_out
from userfault._ioctl cimport PAGE_SIZE, uffd_writeprotect
from userfault._served cimport HUGE_PAGES, Served, hold_t, look, served_t
from userfault._say cimport say_why

cdef extern from "<sys/mman.h>" nogil:
    int c_madvise "madvise"(void *address, size_t length, int advice)
    int MADV_DONTNEED

cdef extern from "<sys/syscall.h>" nogil:
    long syscall(long number, ...)
    long SYS_process_madvise

DEF MOST_ERRNO = 4096
DEF BATCH = 128              # blocks looked at together
DEF RUNS = 64                # let go of in one call
DEF MOST_WRITTEN = 512       # pages, at once
DEF AT_ONCE = 8192          # pages looked at while the lock is held
DEF PIDFD_SELF = -10001       # PIDFD_SELF_THREAD_GROUP (Linux 6.15)
DEF MADV_DONTNEED_LOCKED = 24
DEF SPARE = 32               # one part of the limit is let go of at a time

# process_madvise(2) takes many runs at once; before Linux 6.15, which cannot name us so, they go one by one.
cdef int takes_many = 1

# What is to be dropped, under the lock of a budget.
ctypedef struct drops_t:
    iovec runs[RUNS]
    served_t *owners[RUNS]
    int n


cdef void drop(drops_t *drops) noexcept nogil:
    """Have the kernel drop the runs: their next touch is a missing fault."""
    cdef ssize_t got, wanted = 0
    cdef served_t *owner
    cdef uint64_t first, n
    cdef int i
    if drops.n > 1 and load_int(&takes_many):
        got = syscall(SYS_process_madvise, <long>PIDFD_SELF, drops.runs, <long>drops.n, <long>MADV_DONTNEED,
                      <long>0)
        for i in range(drops.n):
            wanted += drops.runs[i].iov_len
        if got == wanted:
            drops.n = 0
            return
        if got < 0 and errno != EINVAL:
            store_int(&takes_many, 0)
    for i in range(drops.n):
        if (c_madvise(drops.runs[i].iov_base, drops.runs[i].iov_len, MADV_DONTNEED) != 0
                and c_madvise(drops.runs[i].iov_base, drops.runs[i].iov_len, MADV_DONTNEED_LOCKED) != 0):
            # Locked by mlock(2), before Linux 5.18: it is still there.
            owner = drops.owners[i]
            first = (<uintptr_t>drops.runs[i].iov_base - owner.hold.base) // PAGE_SIZE
            n = drops.runs[i].iov_len // PAGE_SIZE
            take_in(owner, first, first + n, False)
            count(&owner.counters.evicted, -n)
    drops.n = 0


cdef inline uint64_t changed_word(const hold_t *hold, uint64_t word) noexcept nogil:
    if hold.changed == NULL:
        return 0
    return load_u64(&hold.changed[word]) | load_u64(&hold.writing[word])


cdef uint64_t next_run(const served_t *served, uint64_t first, uint64_t end, bint changed,
                       uint64_t *stop) noexcept nogil:
    """Where the first run of pages of [first, end) that are there and (not) changed begins; `end`: none."""
    cdef const hold_t *hold = served.hold
    cdef uint64_t word, page = first
    stop[0] = end
    first = end
    while page < end:
        word = load_u64(&served.resident[page // 64])
        if changed:
            word &= load_u64(&hold.changed[page // 64]) & ~load_u64(&hold.writing[page // 64])
        else:
            word &= ~changed_word(hold, page // 64)
        if word >> (page % 64) & 1:
            first = min(first, page)
        elif first < end:
            stop[0] = page
            return first
        elif word == 0:
            page |= 63
        page += 1
    return first


cdef uint64_t drop_clean(served_t *served, uint64_t first, uint64_t end, drops_t *drops) noexcept nogil:
    """Let go of what is not changed of the pages [first, end); how many. The lock is held until `drop`."""
    cdef uint64_t stop = first, total = 0
    while first < end:
        first = next_run(served, stop, end, False, &stop)
        if first == end:
            break
        # First the note: what comes between, and finds the page there, notes that it is there.
        take_out(served, first, stop)
        total += stop - first
        drops.owners[drops.n] = served
        drops.runs[drops.n].iov_base = <void *>(served.hold.base + first * PAGE_SIZE)
        drops.runs[drops.n].iov_len = (stop - first) * PAGE_SIZE
        drops.n += 1
        if drops.n == RUNS:
            drop(drops)
        first = stop
    count(&served.counters.evicted, total)
    return total


cdef int write_back(served_t *served, uint64_t first, uint64_t end) noexcept nogil:
    """Give the changed pages of [first, end) to the source. 0 or the last -errno; those stay changed.

    The lock is held, but not while the source writes."""
    cdef hold_t *hold = served.hold
    cdef uint64_t stop = first, at, low, high
    cdef int result, worst = 0
    while first < end:
        first = next_run(served, stop, end, True, &stop)
        if first == end:
            break
        stop = min(stop, first + MOST_WRITTEN)
        # Of a page that came and went at once, the note that it came may be the last: reading it here would
        # wait for room that is ours to make.
        look(served, hold.pagemap, hold.base, first, stop)
        first = next_run(served, first, stop, True, &stop)
        if first == stop:
            continue
        at = hold.base + first * PAGE_SIZE
        result = uffd_writeprotect(hold.fd, at, (stop - first) * PAGE_SIZE, UFFDIO_WRITEPROTECT_MODE_WP)
        if result == 0:
            clear_bits(hold.changed, first, stop)
            set_bits(hold.writing, first, stop)
            add_int(&hold.users, 1)
            hold.budget.writers += 1
            pthread_mutex_unlock(&hold.budget.lock)
            low = max(first * PAGE_SIZE, hold.first_byte)
            high = min(stop * PAGE_SIZE, hold.end_byte)
            if low < high:
                result = served.source.write(served.source.ctx, served.source.start + low,
                                             <void *>(hold.base + low), high - low)
                if result > 0 or result < -MOST_ERRNO:
                    result = -EIO
            pthread_mutex_lock(&hold.budget.lock)
            if result != 0:
                set_bits(hold.changed, first, stop)
            clear_bits(hold.writing, first, stop)
            add_int(&hold.users, -1)
            hold.budget.writers -= 1
        if result != 0:
            worst = result
            store_int(&hold.write_error, -result)
            say_why(served, "cannot be written back, and stays in memory", first * PAGE_SIZE, -result,
                    &hold.warned)
        else:
            store_int(&hold.write_error, 0)
            count(&served.counters.written, stop - first)
    return worst


cdef inline uint64_t end_of(const served_t *served, uint64_t entry) noexcept nogil:
    cdef uint64_t n = HUGE_PAGES if is_whole(entry) else BLOCK_PAGES
    return min(block_of(entry) * BLOCK_PAGES + n, served.n_pages)


cdef size_t choose(budget_t *budget, uint64_t wanted, bint asked, uint64_t *entries) noexcept nogil:
    """Take the oldest blocks out of their queues, until so many pages of them are there; how many blocks.

    Of what came once, until what is kept fills three quarters. What is asked for is kept: for that, what came
    once goes altogether."""
    cdef size_t n = 0
    cdef uint64_t found = 0
    cdef fifo_t *queue
    cdef served_t *served
    cdef bint enough
    while n < BATCH and found < wanted:
        queue = &budget.fresh
        enough = budget.kept.given != budget.kept.taken and budget.kept.pages > budget.limit // 4 * 3
        if queue.given == queue.taken or (enough and not asked):
            queue = &budget.kept
        if not pop(queue, &entries[n]):
            break
        served = <served_t *>budget.members[member_of(entries[n])]
        # Whoever leaves the budget waits for us.
        served.hold.pins += 1
        found += n_set(served.resident, block_of(entries[n]) * BLOCK_PAGES, end_of(served, entries[n]))
        n += 1
    return n


cdef uint64_t let_go(budget_t *budget, uint64_t *entries, size_t n, bint may_wait,
                     int *error) noexcept nogil:
    """Drop what is not changed of the blocks, and first write back what is if it may wait; how many pages."""
    cdef size_t i, k
    cdef served_t *served
    cdef hold_t *hold
    cdef uint64_t first, end, block, ghost, total = 0, left, blocks
    cdef unsigned char state
    cdef drops_t drops
    cdef fifo_t *queue
    cdef int result
    drops.n = 0
    sort(entries, n)
    i = 0
    while i < n:
        served = <served_t *>budget.members[member_of(entries[i])]
        first = block_of(entries[i]) * BLOCK_PAGES
        k = i
        # Neighbours are written together.
        while k + 1 < n and member_of(entries[k + 1]) == member_of(entries[i]) and (
                block_of(entries[k + 1]) * BLOCK_PAGES == end_of(served, entries[k])):
            k += 1
        end = end_of(served, entries[k])
        if any_changed(served, first, end):
            if served.source.write == NULL:
                pass
            elif may_wait and not load_int(&served.hold.users):
                result = write_back(served, first, end)
                error[0] = result if result else error[0]
            elif error[0] == 0:
                error[0] = -EAGAIN  # not by us, or by somebody who is at it
        i = k + 1
    for i in range(n):
        served = <served_t *>budget.members[member_of(entries[i])]
        hold = served.hold
        block = block_of(entries[i])
        first, end = block * BLOCK_PAGES, end_of(served, entries[i])
        total += drop_clean(served, first, end, &drops)
        blocks = (end - first + BLOCK_PAGES - 1) // BLOCK_PAGES
        state = hold.blocks[block]
        queue = &budget.kept if state == KEPT else &budget.fresh
        left = n_set(served.resident, first, end)
        hold.pins -= 1
        if left and served.source.write != NULL:
            put_back(budget, queue, entries[i])  # its turn comes again
            continue
        # Changed pages that cannot be written back stay, and nobody need look at them again.
        queue.pages -= left
        state = ABSENT
        if left == 0:
            if budget.ghosts.given - budget.ghosts.taken == budget.ghosts.room:
                pop(&budget.ghosts, &ghost)
                forget_ghost(budget, ghost)
            push(&budget.ghosts, entries[i])
            state = GHOST
        for k in range(blocks):
            hold.blocks[block + k] = state
    drop(&drops)
    return total


cdef inline void forget_ghost(budget_t *budget, uint64_t entry) noexcept nogil:
    cdef served_t *served = <served_t *>budget.members[member_of(entry)]
    cdef uint64_t i, block = block_of(entry), n = HUGE_PAGES // BLOCK_PAGES if is_whole(entry) else 1
    for i in range(n):
        if served.hold.blocks[block + i] == GHOST:
            served.hold.blocks[block + i] = ABSENT


cdef int make_room(budget_t *budget, uint64_t n, bint may_wait, bint asked) noexcept nogil:
    """Let go of what is oldest until n pages may come, which the caller has reserved then, until they have.

    0; -EAGAIN: changed pages have to be written back first, which may wait, or are just being; -ENOBUFS, or
    the errno of a source that failed to write: what is left is all changed.
    """
    cdef uint64_t entries[BATCH]
    cdef uint64_t freed, looked = 0, most, wanted
    cdef size_t found
    cdef int error = 0
    if add_u64(&budget.reserved, n) + load_u64(&budget.resident) <= budget.limit:
        return 0
    pthread_mutex_lock(&budget.lock)
    # Each block is looked at once, and once more after it was written back.
    most = 2 * (budget.fresh.given - budget.fresh.taken + budget.kept.given - budget.kept.taken)
    while looked <= most:
        wanted = load_u64(&budget.resident) + load_u64(&budget.reserved)
        if wanted <= budget.limit:
            break
        wanted = max(wanted - budget.limit, min(budget.limit // SPARE, <uint64_t>HUGE_PAGES))
        found = choose(budget, wanted, asked, entries)
        if found == 0:
            break
        freed = let_go(budget, entries, found, may_wait, &error)
        if freed == 0 and error == -EAGAIN and not may_wait:
            break  # the next are hardly better
        looked += found
    if load_u64(&budget.resident) + load_u64(&budget.reserved) <= budget.limit:
        error = 0
    else:
        if error == 0:
            # What others are bringing or writing back, or was changed again, can go another time.
            error = -EAGAIN
            if not budget.writers and budget.fresh.given == budget.fresh.taken and (
                    budget.kept.given == budget.kept.taken and load_u64(&budget.reserved) == n):
                error = -ENOBUFS
        add_u64(&budget.reserved, -n)
    pthread_mutex_unlock(&budget.lock)
    return error


cdef void expect_change(served_t *served, uint64_t page) noexcept nogil:
    """A missing page is written to: it comes without protection, so that the write need not fault again."""
    cdef hold_t *hold = served.hold
    pthread_mutex_lock(&hold.budget.lock)
    if not is_set(hold.changed, page):
        set_bits(hold.changed, page, page + 1)
        count(&served.counters.changed, 1)
    pthread_mutex_unlock(&hold.budget.lock)


cdef int change(served_t *served, uint64_t page) noexcept nogil:
    """A page is written to: note it, and let its writers go on. -errno of UFFDIO_WRITEPROTECT."""
    cdef hold_t *hold = served.hold
    cdef int result
    pthread_mutex_lock(&hold.budget.lock)
    if not is_set(hold.changed, page):
        set_bits(hold.changed, page, page + 1)
        count(&served.counters.changed, 1)
    if not is_set(served.resident, page):
        # Whoever brought it has not noted that yet, and its writer may flush; or it was let go of since.
        look(served, hold.pagemap, hold.base, page, page + 1)
    result = uffd_writeprotect(hold.fd, hold.base + page * PAGE_SIZE, PAGE_SIZE, 0)
    pthread_mutex_unlock(&hold.budget.lock)
    return result


cdef void sort(uint64_t *values, size_t n) noexcept nogil:
    """By insertion: they come nearly sorted, or are few."""
    cdef size_t i, k
    cdef uint64_t value
    for i in range(1, n):
        value = values[i]
        k = i
        while k and values[k - 1] > value:
            values[k] = values[k - 1]
            k -= 1
        values[k] = value


# -- from Python -----------------------------------------------------------------------------------------

def evict(Served served not None, const uint64_t[::1] firsts, const uint64_t[::1] ends):
    """Let go of the pages [first, end) of each pair, whose changes are written back before if the source can.

    Returns how many pages were let go of, and the errno of the last write that failed, 0 for none.
    """
    cdef served_t *c = &served.c
    cdef drops_t drops
    cdef uint64_t total = 0, at, end
    cdef Py_ssize_t i
    cdef int result, error = 0
    drops.n = 0
    with nogil:
        for i in range(firsts.shape[0]):
            at = firsts[i]
            while at < ends[i]:
                # The reading thread may be waiting for the lock.
                end = min(at + AT_ONCE, ends[i])
                pthread_mutex_lock(&c.hold.budget.lock)
                # What has just come may not be noted yet.
                look(c, c.hold.pagemap, c.hold.base, at, end)
                if c.source.write != NULL and any_changed(c, at, end):
                    result = write_back(c, at, end)
                    error = -result if result else error
                total += drop_clean(c, at, end, &drops)
                drop(&drops)
                pthread_mutex_unlock(&c.hold.budget.lock)
                at = end
    return total, error


def flush(Served served not None):
    """Write back all changes, but for what others are writing back. 0 or errno."""
    cdef served_t *c = &served.c
    cdef uint64_t first = 0, end = c.n_pages, stop
    cdef int result, worst = 0
    with nogil:
        while first < end:
            stop = min(first + AT_ONCE, end)
            pthread_mutex_lock(&c.hold.budget.lock)
            result = write_back(c, first, stop)
            pthread_mutex_unlock(&c.hold.budget.lock)
            worst = result if result else worst
            first = stop
    return -worst


def sync(Served served not None):
    """Make durable what was written back. 0 or errno."""
    cdef served_t *c = &served.c
    cdef int result = 0
    if c.source.sync != NULL:
        with nogil:
            result = c.source.sync(c.source.ctx)
    return -result


def is_writing(Served served not None):
    """Whether somebody is writing back right now."""
    return load_int(&served.c.hold.users) != 0
