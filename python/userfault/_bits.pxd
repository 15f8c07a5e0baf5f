# Sets of pages: a bit each, in words that several threads change at once.

from libc.stdint cimport UINT64_MAX, uint64_t

from userfault._abi cimport and_u64, load_u64, or_u64

cdef extern from *:
    int __builtin_popcountll(unsigned long long) nogil

cdef inline uint64_t mask(uint64_t first, uint64_t end) noexcept nogil:
    """Bits of the word of `first`, from `first` up to `end` or the word's end."""
    cdef uint64_t bits = UINT64_MAX << (first % 64)
    if end // 64 == first // 64:
        bits &= ~(UINT64_MAX << (end % 64))
    return bits

cdef inline bint is_set(const uint64_t *bits, uint64_t page) noexcept nogil:
    return load_u64(<uint64_t *>&bits[page // 64]) >> (page % 64) & 1

cdef inline void set_bits(uint64_t *bits, uint64_t first, uint64_t end) noexcept nogil:
    while first < end:
        or_u64(&bits[first // 64], mask(first, end))
        first = (first // 64 + 1) * 64

cdef inline void clear_bits(uint64_t *bits, uint64_t first, uint64_t end) noexcept nogil:
    while first < end:
        and_u64(&bits[first // 64], ~mask(first, end))
        first = (first // 64 + 1) * 64

cdef inline uint64_t n_set(const uint64_t *bits, uint64_t first, uint64_t end) noexcept nogil:
    """How many of the bits [first, end) are set."""
    cdef uint64_t n = 0
    while first < end:
        n += __builtin_popcountll(load_u64(<uint64_t *>&bits[first // 64]) & mask(first, end))
        first = (first // 64 + 1) * 64
    return n
