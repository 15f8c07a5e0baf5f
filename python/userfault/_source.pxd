from libc.stdint cimport uint64_t

# 0, or -errno; anything above 0 is a short fill (an error). Runs on an engine's thread without the GIL,
# possibly several at once; must not touch missing memory.
ctypedef int (*fill_t)(void *ctx, uint64_t offset, void *dst, size_t length) noexcept nogil

# 0, or -errno. Runs without the GIL, on any thread; must not touch missing memory.
ctypedef int (*write_t)(void *ctx, uint64_t offset, const void *src, size_t length) noexcept nogil
ctypedef int (*sync_t)(void *ctx) noexcept nogil

# The source's own words for its last failure at `offset`, or (UINT64_MAX) for the last with this `error`,
# NUL-terminated, into `size` bytes; False: it has none.
ctypedef bint (*words_t)(void *ctx, int error, uint64_t offset, char *text, size_t size) noexcept nogil

ctypedef struct source_t:
    uint64_t size        # bytes it has; the rest of its last page is zeros, past that it has nothing
    uint64_t start       # where in it a region's first byte is: for its functions only
    bint zero            # all of it is zeros: ZEROPAGE instead of COPY
    const char *direct   # all of it lies in memory here: COPY straight from it; or NULL, and
    # That memory is private and anonymous: no file under it can become shorter (memcpy is safe), and it
    # never waits for a disk, unless it was swapped out.
    bint solid
    fill_t fill          # fill() with
    fill_t prompt        # as fill(), but -EAGAIN where it would have to wait; NULL: it may always wait
    write_t write        # NULL: it cannot be written to
    sync_t sync          # makes what was written durable; NULL: it is, or never can be
    words_t words        # NULL: an errno says it all
    # It has something to do for a unit that it should do once: one thread asks for all of a unit.
    bint whole_units
    # All its functions may run in a signal handler: they take no lock that a thread may hold while it touches
    # served memory, and allocate nothing.
    bint signal_safe
    void *ctx

cdef int fill_with_constant(void *ctx, uint64_t offset, void *dst, size_t length) noexcept nogil


cdef class Source:
    cdef source_t c
