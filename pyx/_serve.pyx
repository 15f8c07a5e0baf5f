"""Resolving one batch of faults: sort, dedupe → dispatch → widen → fill, and one wake-up for all."""

from libc.stdint cimport int64_t, uint64_t

from userfault._abi cimport UFFDIO_MODE_DONTWAKE, add_u64, count, now
from userfault._ahead cimport MOST_DUE, give, loop_t, set_goal
from userfault._bits cimport is_set
from userfault._books cimport find_grown
from userfault._fill cimport NO_SOURCE, TRIES, count_latency, fail, fill, fill_grown, park, wake
from userfault._hold cimport gone
from userfault._ioctl cimport PAGE_SIZE
from userfault._served cimport HUGE_PAGES, first_missing, look_ahead, missing_end, resync, served_t
from userfault._space cimport space_t
from userfault._stage cimport is_prompt
from userfault._tree cimport enter, entry_t, find, leave

DEF RECHECK = 512          # pages about a fault that contradicts what is known of them
DEF LONG_RUN = 16          # pages: their threads are woken at once, and more are not waited for


cdef void serve(loop_t *loop, size_t n, int64_t since) noexcept nogil:
    """Resolve the n `pages`, which were read at time `since`."""
    cdef space_t *space = loop.worker.space
    cdef int ticket = enter(space.tree)
    cdef entry_t entry
    cdef bint held = False
    cdef size_t i = 0
    cdef uint64_t mode = UFFDIO_MODE_DONTWAKE if n > 1 else 0
    loop.worker.since = since
    loop.worker.tries = TRIES
    sort(loop.pages, n)
    while i < n:
        if not (held and entry.start <= loop.pages[i] < entry.end):
            held = (find(space.tree, loop.pages[i], &entry)
                    or find_grown(space.tree, space.fd, loop.pages[i], &entry) == 1)
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
    if served.hold != NULL:
        # What comes may have been let go of again before it is looked at: so each call wakes for itself.
        mode = 0
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
                recheck(loop.worker.space.pagemap, entry, served, page, low, high)
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
    if (parked or handed) and mode:
        # These sleep on; so only those whose pages came are woken.
        flush(loop)
        wake_come(loop, entry, served, want, want_end)
        count_latency(&loop.worker, served, n_faults, now() - loop.worker.since)
        if parked:
            return i
    else:
        note_due(loop, served, entry.base + want * PAGE_SIZE, entry.base + want_end * PAGE_SIZE, n_faults,
                 mode)
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


cdef void wake_come(loop_t *loop, const entry_t *entry, const served_t *served, uint64_t first,
                    uint64_t end) noexcept nogil:
    """Wake who sleeps at those of the pages [first, end) that are there."""
    cdef uint64_t stop
    while first < end:
        stop = first
        while stop < end and is_set(served.resident, stop):
            stop += 1
        if stop > first:
            wake(&loop.worker, entry.base + first * PAGE_SIZE, entry.base + stop * PAGE_SIZE)
        first = stop + 1


cdef uint64_t chunk_start(const served_t *served, uint64_t page) noexcept nogil:
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


cdef void recheck(int pagemap, const entry_t *entry, served_t *served, uint64_t page, uint64_t low,
                  uint64_t high) noexcept nogil:
    """A page that was there is missing: madvise(MADV_DONTNEED) took it, and maybe its neighbours."""
    cdef uint64_t first = page - page % RECHECK
    if resync(served, pagemap, entry.base, max(first, low), min(first + RECHECK, high)) < 0:
        gone(served, page, page + 1)


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
