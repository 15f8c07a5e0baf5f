"""`Served`: how one region is served: its source, which of its pages are there, and how far to read ahead.

Residency is what the engine believes, one bit a page. It learns of what it fills itself and of EEXIST;
pages that madvise(MADV_DONTNEED) took away it finds out about by their next fault, and then asks the
kernel about their neighbours too (`resync`). A bit that is wrongly clear costs an EEXIST; one that is
wrongly set keeps read-ahead away from a page, whose own fault is served all the same.
"""

from libc.stdint cimport UINT64_MAX, uint64_t
from libc.stdlib cimport calloc, free

import numpy as np

from userfault._abi cimport (
    load_int, load_u64, pread, pthread_mutex_lock, pthread_mutex_unlock, store_u64, usleep,
)
from userfault._bits cimport mask, n_set, set_bits
from userfault._budget cimport BLOCK_PAGES, Budget
from userfault._hold cimport believe, leave_budget
from userfault._ioctl cimport PAGE_SIZE
from userfault._source cimport Source, fill_with_constant, source_t

DEF STREAMS = 32
DEF MOST_AHEAD = 4096    # pages: 16 MiB
DEF LEAST_AHEAD = 4
DEF PART_AHEAD = 8       # of a limit, that a stream may be read ahead
DEF GAP = 64             # pages: what a stream may find filled already, and step over
DEF STEP = 64            # pages filled at a time where the unit is less
DEF ENTRIES = 512        # of pagemap, a pread
DEF AT_ONCE = 8192       # pages of a lazy array asked about while the lock is held

LATENCY_BUCKETS = REGION_LATENCIES
REGION_STATS_DTYPE = np.dtype(
    [(name, "<u8") for name in (
        "records", "duplicates", "runs", "pages", "bytes", "ahead", "moved", "ioctls", "existing",
        "forgotten", "parked", "failed", "changed", "written", "evicted")]
    + [("latency", "<u8", (REGION_LATENCIES,))])
assert REGION_STATS_DTYPE.itemsize == sizeof(region_counters_t)

cdef unsigned char zero = 0

cdef extern from *:
    int __builtin_ctzll(unsigned long long) nogil


cdef inline uint64_t scan(const served_t *served, uint64_t first, uint64_t end, bint missing) noexcept nogil:
    """The first page of [first, end) that is missing and not coming (or, not `missing`: that is not so)."""
    cdef uint64_t word
    while first < end:
        word = load_u64(&served.resident[first // 64]) | load_u64(&served.coming[first // 64])
        word = (~word if missing else word) & mask(first, end)
        if word:
            return first // 64 * 64 + __builtin_ctzll(word)
        first = (first // 64 + 1) * 64
    return end


cdef uint64_t first_missing(const served_t *served, uint64_t first, uint64_t end) noexcept nogil:
    """The first page of [first, end) that is missing and not coming; `end` when there is none."""
    return scan(served, first, end, True)


cdef uint64_t missing_end(const served_t *served, uint64_t first, uint64_t end) noexcept nogil:
    """The end of the run of missing pages that begins at `first`."""
    return scan(served, first, end, False)


cdef inline uint64_t up(const served_t *served, uint64_t page) noexcept nogil:
    """No unit is left half read."""
    return min((page + served.unit - 1) // served.unit * served.unit, served.n_pages)


cdef uint64_t look_ahead(served_t *served, uint64_t first, uint64_t end) noexcept nogil:
    """The pages [first, end) were asked for by faults: one past the last page to bring ahead of need.

    Adaptive: a fault that goes on where an earlier one ended, or in what was read ahead of it, belongs to
    a stream, which is read ahead by as many pages as it has come, up to MOST_AHEAD. A stream that went
    16 pages has so cost 32 at the most, and random faults, which belong to no stream, one page each.
    """
    cdef stream_t *stream
    cdef stream_t *oldest = served.streams
    cdef uint64_t ahead
    cdef int i
    if served.readahead >= 0:
        return up(served, end + <uint64_t>served.readahead)
    served.tick += 1
    for i in range(served.n_streams):
        stream = &served.streams[i]
        if stream.used == 0:
            oldest = stream
            break
        if stream.next <= first and (
                first <= stream.end
                or (first - stream.end <= GAP and scan(served, stream.end, first, True) == first)):
            stream.length += min(first, stream.end) - stream.next + end - first
            ahead = max(min(<uint64_t>LEAST_AHEAD, served.most_ahead), min(stream.length, served.most_ahead))
            if served.huge and ahead >= 2 * HUGE_PAGES:
                ahead -= (end + ahead) % HUGE_PAGES  # a part of a huge page could not be moved into place
            stream.next = end
            stream.end = up(served, max(stream.end, end + ahead))
            stream.used = served.tick
            return max(stream.end, end)
        if stream.used < oldest.used:
            oldest = stream
    oldest.length = end - first
    oldest.next = oldest.end = end
    oldest.used = served.tick
    return end


cdef int resync(served_t *served, int pagemap, uint64_t base, uint64_t first, uint64_t end) noexcept nogil:
    """Ask the kernel which of [first, end) are there (proc_pid_pagemap(5)); -1 where it does not tell."""
    cdef uint64_t stop
    cdef int result = 0
    if served.hold == NULL:
        return look(served, pagemap, base, first, end)
    while first < end and result == 0:
        stop = min(first + AT_ONCE, end)
        # What comes meanwhile is noted after it has come, and so after what is noted here.
        pthread_mutex_lock(&served.hold.budget.lock)
        result = look(served, pagemap, base, first, stop)
        pthread_mutex_unlock(&served.hold.budget.lock)
        first = stop
    return result


cdef int look(served_t *served, int pagemap, uint64_t base, uint64_t first, uint64_t end) noexcept nogil:
    """As `resync`; of a lazy array with its budget's lock held."""
    cdef uint64_t entries[ENTRIES]
    cdef uint64_t n, i, are, are_not
    cdef ssize_t got
    while first < end:
        # Word by word, whole words but for the ends.
        n = min(end - first, <uint64_t>ENTRIES - first % 64)
        got = pread(pagemap, entries, n * 8, <long>((base // PAGE_SIZE + first) * 8))
        if got < 8:
            return -1
        n = <uint64_t>got // 8
        are = are_not = 0
        for i in range(n):
            # Present, or not present and yet not missing: swapped out, poisoned.
            if entries[i] >> 62:
                are |= <uint64_t>1 << ((first + i) % 64)
            else:
                are_not |= <uint64_t>1 << ((first + i) % 64)
            if (first + i) % 64 == 63 or i == n - 1:
                believe(served, (first + i) // 64, are, are_not)
                are = are_not = 0
        first += n
    return 0


cdef object unpacked(const uint64_t *bits, uint64_t first, uint64_t end):
    """The bits [first, end) as a bool array."""
    cdef uint64_t word = first // 64
    cdef size_t n = (end - 64 * word + 63) // 64 + 1
    cdef const unsigned char[::1] view = <const unsigned char[:n * 8]>(<const unsigned char *>(bits + word))
    return np.unpackbits(np.frombuffer(view[:(n - 1) * 8], np.uint8).copy(), count=end - 64 * word,
                         bitorder="little").view(np.bool_)[first - 64 * word:]


cdef class Served:
    """The state of one served region. The engine's thread and its workers use it without the GIL."""

    def __cinit__(self, Source source not None, int64_t region, uint64_t n_pages, uint64_t unit,
                  int64_t readahead, bint huge, uint64_t start=0):
        cdef size_t words = n_pages // 64 + 1
        self.source = source
        self.c.source = source.c
        self.c.source.start = start
        self.c.source.size -= start if source.c.size != UINT64_MAX else 0
        if source.c.direct != NULL:
            self.c.source.direct += start
        self.c.id = region
        self.c.n_pages = n_pages
        self.c.unit = unit
        self.c.chunk = min(unit, <uint64_t>HUGE_PAGES)
        self.c.granule = HUGE_PAGES if unit >= HUGE_PAGES else max(unit, STEP // unit * unit)
        if source.c.whole_units:
            self.c.granule = max(self.c.granule, unit)
        self.c.readahead = readahead
        self.c.most_ahead = MOST_AHEAD
        self.c.huge = huge
        self.c.counters = &self.counters
        self.c.original = &self.c
        self.c.n_streams = <int>max(<uint64_t>1, min(n_pages // 16, <uint64_t>STREAMS))
        # calloc leaves large zeroed memory to be made when it is touched.
        self.c.resident = <uint64_t *>calloc(words, 8)
        self.c.coming = <uint64_t *>calloc(words, 8)
        self.c.streams = <stream_t *>calloc(self.c.n_streams, sizeof(stream_t))
        if not (self.c.resident and self.c.coming and self.c.streams):
            raise MemoryError

    def __dealloc__(self):
        # Unless it has: of one that could not be attached.
        while self.c.hold != NULL and not leave_budget(&self.hold):
            usleep(20)
        free(self.c.resident)
        free(self.c.coming)
        free(self.c.streams)
        free(self.hold.blocks)
        free(self.hold.changed)
        free(self.hold.writing)

    def hold_to(self, Budget budget not None, uint64_t base, int fd, int pagemap, bint written,
                bint written_back, uint64_t first_byte, uint64_t end_byte, double patience,
                bytes name not None):
        """Hold it to the budget, before it is attached: memory at `base` that stays there, of `fd`.

        `written`: its write-protect faults are changes. `written_back`: those of [first_byte, end_byte) go to
        the source; others are this process's own. `patience`: seconds in which a source that fails is asked
        again. `name`: for stderr.
        """
        cdef size_t words = self.c.n_pages // 64 + 1
        self.name = name
        self.budget = budget
        self.hold.name = <const char *>name
        self.hold.budget = &budget.c
        self.hold.base = base
        self.hold.fd = fd
        self.hold.pagemap = pagemap
        self.hold.first_byte = first_byte
        self.hold.end_byte = end_byte
        self.hold.patience = <int64_t>(patience * 1e9)
        if not written_back:
            self.c.source.write = NULL
        if written:
            self.hold.changed = <uint64_t *>calloc(words, 8)
            self.hold.writing = <uint64_t *>calloc(words, 8)
            if not (self.hold.changed and self.hold.writing):
                raise MemoryError
            if self.c.source.zero:
                # ZEROPAGE cannot protect what it fills.
                self.c.source.zero = False
                self.c.source.ctx = &zero
                self.c.source.fill = self.c.source.prompt = fill_with_constant
        self.c.granule = min(self.c.granule, max(self.c.unit, budget.c.step // self.c.unit * self.c.unit))
        # What is read ahead must not drive out what is just being used, nor itself.
        self.c.most_ahead = min(self.c.most_ahead, budget.c.limit // PART_AHEAD)
        self.c.readahead = min(self.c.readahead, <int64_t>self.c.most_ahead)
        if budget.c.members != NULL:
            # Whole huge pages of them.
            self.hold.blocks = <unsigned char *>calloc(words + HUGE_PAGES, 64 // BLOCK_PAGES)
            if self.hold.blocks == NULL:
                raise MemoryError
        self.hold.member = budget.join(&self.c)
        self.c.hold = &self.hold

    def leave_budget(self):
        """Count there no more. The region is detached: nobody fills it."""
        with nogil:
            while self.c.hold != NULL and not leave_budget(&self.hold):
                usleep(20)  # somebody who makes room for others writes back what is changed of it

    @property
    def may_wait(self):
        """Whether filling may have to wait, which the reading thread must not."""
        cdef const source_t *source = &self.c.source
        if self.c.hold != NULL and self.hold.blocks != NULL:
            return True  # to make room for it: others of the budget may have changes to write back
        if source.direct != NULL:
            return not source.solid
        return not source.zero and source.prompt != source.fill

    def advance(self, uint64_t first, uint64_t end):
        """`look_ahead`, for tests: faults asked for the pages [first, end)."""
        return look_ahead(&self.c, first, end)

    def fill(self, uint64_t first, uint64_t end):
        """Note, for tests, that the pages [first, end) are there."""
        set_bits(self.c.resident, first, end)

    def resync(self, int pagemap, uint64_t base, uint64_t first, uint64_t end):
        """Ask the kernel about the pages [first, end), page 0 being at `base`. Raises nothing: where it does
        not tell, the belief stays."""
        cdef int result
        with nogil:
            result = resync(&self.c, pagemap, base, first, min(end, self.c.n_pages))
        return result == 0

    @property
    def resident(self):
        """Which pages are there, as far as is known: bool array, one a page."""
        return unpacked(self.c.resident, 0, self.c.n_pages)

    def resident_of(self, uint64_t first, uint64_t end):
        """Which of the pages [first, end) are there, as far as is known: bool array."""
        return unpacked(self.c.resident, first, end)

    def changed_of(self, uint64_t first, uint64_t end):
        """Which of the pages [first, end) are there and may differ from the source: bool array."""
        if self.hold.changed == NULL:
            return np.zeros(end - first, np.bool_)
        # With the lock: whoever goes on because a page came finds it noted.
        with nogil:
            pthread_mutex_lock(&self.hold.budget.lock)
            pthread_mutex_unlock(&self.hold.budget.lock)
        return unpacked(self.hold.changed, first, end) & unpacked(self.c.resident, first, end)

    @property
    def write_error(self):
        """The errno with which the source last failed to take a change, 0 when it took the last."""
        return load_int(&self.hold.write_error)

    def take_errors(self):
        """Of the last pages that nobody waited for and that could not be had: the errno of the source and
        that of the kernel, 0 for none; forgets them."""
        cdef uint64_t of_source = load_u64(&self.c.source_error), of_kernel = load_u64(&self.c.kernel_error)
        store_u64(&self.c.source_error, 0)
        store_u64(&self.c.kernel_error, 0)
        return of_source, of_kernel

    def count(self, uint64_t first, uint64_t end):
        """Of the pages [first, end): (those that are there, those that workers were asked for)."""
        cdef uint64_t there, coming
        with nogil:
            end = min(end, self.c.n_pages)
            there = n_set(self.c.resident, first, end)
            coming = n_set(self.c.coming, first, end)
        return there, coming

    def missing(self, const uint64_t[::1] firsts, const uint64_t[::1] ends):
        """How many of the pages [first, end) of each pair are missing, as far as is known."""
        cdef uint64_t total = 0
        cdef Py_ssize_t i
        with nogil:
            for i in range(firsts.shape[0]):
                total += ends[i] - firsts[i] - n_set(self.c.resident, firsts[i], ends[i])
        return total

    def stats(self):
        """The region's counters: a scalar of REGION_STATS_DTYPE."""
        cdef region_counters_t snapshot = self.counters
        cdef const unsigned char[::1] view = <const unsigned char[:sizeof(region_counters_t)]>(
            <const unsigned char *>&snapshot)
        return np.frombuffer(view, REGION_STATS_DTYPE).copy()[0]
