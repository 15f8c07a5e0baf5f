from libc.stdint cimport uint64_t

# 0, or -errno. Runs on the engine's thread without the GIL; must not touch missing memory.
ctypedef int (*fill_t)(void *ctx, uint64_t offset, void *dst, size_t length) noexcept nogil

ctypedef struct source_t:
    uint64_t size        # bytes it has; the rest of its last page is zeros, past that it has nothing
    bint zero            # all of it is zeros: ZEROPAGE instead of COPY
    const char *direct   # all of it lies in memory here: COPY straight from it; or NULL, and
    bint solid           # that memory is private and anonymous: no file under it can become shorter
    fill_t fill          # fill() with
    fill_t prompt        # as fill(), but answers -EAGAIN where it would have to wait; NULL: always waits
    void *ctx


cdef class Source:
    cdef source_t c
