"""`Served`: how one region is served: its source, which of its pages are there, and how far to read ahead.

Residency is what the engine believes, one bit a page. It learns of what it fills itself and of EEXIST;
pages that madvise(MADV_DONTNEED) took away it finds out about by their next fault, and then asks the
kernel about their neighbours too (`resync`). A bit that is wrongly clear costs an EEXIST; one that is
wrongly set keeps read-ahead away from a page, whose own fault is served all the same.
"""

from libc.stdint cimport UINT64_MAX, uint64_t
from libc.stdlib cimport calloc, free

import numpy as np

from userfault._abi cimport and_u64, load_u64, or_u64, pread, store_u64
from userfault._ioctl cimport PAGE_SIZE
from userfault._source cimport Source, source_t

DEF STREAMS = 32
DEF MOST_AHEAD = 4096    # pages: 16 MiB
DEF LEAST_AHEAD = 4
DEF GAP = 64             # pages: what a stream may find filled already, and step over
DEF STEP = 64            # pages filled at a time where the unit is less
DEF ENTRIES = 512        # of pagemap, a pread

LATENCY_BUCKETS = REGION_LATENCIES
REGION_STATS_DTYPE = np.dtype(
    [(name, "<u8") for name in (
        "records", "duplicates", "runs", "pages", "bytes", "ahead", "moved", "ioctls", "existing",
        "forgotten", "parked", "failed")]
    + [("latency", "<u8", (REGION_LATENCIES,))])
assert REGION_STATS_DTYPE.itemsize == sizeof(region_counters_t)

cdef extern from *:
    int __builtin_ctzll(unsigned long long) nogil
    int __builtin_popcountll(unsigned long long) nogil


cdef inline uint64_t mask(uint64_t first, uint64_t end) noexcept nogil:
    """Bits of the word of `first`, from `first` up to `end` or the word's end."""
    cdef uint64_t bits = UINT64_MAX << (first % 64)
    if end // 64 == first // 64:
        bits &= ~(UINT64_MAX << (end % 64))
    return bits


cdef bint is_set(const uint64_t *bits, uint64_t page) noexcept nogil:
    return load_u64(<uint64_t *>&bits[page // 64]) >> (page % 64) & 1


cdef void set_bits(uint64_t *bits, uint64_t first, uint64_t end) noexcept nogil:
    while first < end:
        or_u64(&bits[first // 64], mask(first, end))
        first = (first // 64 + 1) * 64


cdef void clear_bits(uint64_t *bits, uint64_t first, uint64_t end) noexcept nogil:
    while first < end:
        and_u64(&bits[first // 64], ~mask(first, end))
        first = (first // 64 + 1) * 64


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
        return min(end + <uint64_t>served.readahead, served.n_pages)
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
            ahead = max(<uint64_t>LEAST_AHEAD, min(stream.length, <uint64_t>MOST_AHEAD))
            stream.next = end
            stream.end = min(max(stream.end, end + ahead), served.n_pages)
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
    cdef uint64_t entries[ENTRIES]
    cdef uint64_t n, i, there, gone
    cdef ssize_t got
    while first < end:
        # Word by word, whole words but for the ends.
        n = min(end - first, <uint64_t>ENTRIES - first % 64)
        got = pread(pagemap, entries, n * 8, <long>((base // PAGE_SIZE + first) * 8))
        if got < 8:
            return -1
        n = <uint64_t>got // 8
        there = gone = 0
        for i in range(n):
            # Present, or not present and yet not missing: swapped out, poisoned.
            if entries[i] >> 62:
                there |= <uint64_t>1 << ((first + i) % 64)
            else:
                gone |= <uint64_t>1 << ((first + i) % 64)
            if (first + i) % 64 == 63 or i == n - 1:
                or_u64(&served.resident[(first + i) // 64], there)
                and_u64(&served.resident[(first + i) // 64], ~gone)
                there = gone = 0
        first += n
    return 0


cdef class Served:
    """The state of one served region. The engine's thread and its workers use it without the GIL."""

    def __cinit__(self, Source source not None, int64_t region, uint64_t n_pages, uint64_t unit,
                  int64_t readahead, bint huge):
        cdef size_t words = n_pages // 64 + 1
        self.source = source
        self.c.source = source.c
        self.c.id = region
        self.c.n_pages = n_pages
        self.c.unit = unit
        self.c.chunk = min(unit, <uint64_t>HUGE_PAGES)
        self.c.granule = HUGE_PAGES if unit >= HUGE_PAGES else max(unit, STEP // unit * unit)
        self.c.readahead = readahead
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
        free(self.c.resident)
        free(self.c.coming)
        free(self.c.streams)

    @property
    def may_wait(self):
        """Whether filling may have to wait, which the reading thread must not."""
        cdef const source_t *source = &self.c.source
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
        cdef size_t n = self.c.n_pages // 64 + 1
        cdef const unsigned char[::1] view = <const unsigned char[:n * 8]>(
            <const unsigned char *>self.c.resident)
        return np.unpackbits(np.frombuffer(view, np.uint8).copy(), count=self.c.n_pages,
                             bitorder="little").view(np.bool_)

    def take_errors(self):
        """Of the last pages that nobody waited for and that could not be had: the errno of the source and
        that of the kernel, 0 for none; forgets them."""
        cdef uint64_t of_source = load_u64(&self.c.source_error), of_kernel = load_u64(&self.c.kernel_error)
        store_u64(&self.c.source_error, 0)
        store_u64(&self.c.kernel_error, 0)
        return of_source, of_kernel

    def count(self, uint64_t first, uint64_t end):
        """Of the pages [first, end): (those that are there, those that workers were asked for)."""
        cdef uint64_t there = 0, coming = 0, bits
        end = min(end, self.c.n_pages)
        with nogil:
            while first < end:
                bits = mask(first, end)
                there += __builtin_popcountll(load_u64(&self.c.resident[first // 64]) & bits)
                coming += __builtin_popcountll(load_u64(&self.c.coming[first // 64]) & bits)
                first = (first // 64 + 1) * 64
        return there, coming

    def stats(self):
        """The region's counters: a scalar of REGION_STATS_DTYPE."""
        cdef region_counters_t snapshot = self.counters
        cdef const unsigned char[::1] view = <const unsigned char[:sizeof(region_counters_t)]>(
            <const unsigned char *>&snapshot)
        return np.frombuffer(view, REGION_STATS_DTYPE).copy()[0]
