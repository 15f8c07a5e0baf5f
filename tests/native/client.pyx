# cython: language_level=3
"""A module of somebody's own: it makes page sources of its functions, and looks into those of the package."""

from libc.stdint cimport uint64_t

from userfault._native cimport native
from userfault._source cimport Source


cdef api int fill(void *ctx, uint64_t offset, void *dst, size_t length) noexcept nogil:
    """As fill.c's."""
    cdef unsigned char *to = <unsigned char *>dst
    cdef uint64_t key = (<const uint64_t *>ctx)[0] if ctx != NULL else 0
    cdef size_t i
    for i in range(length):
        to[i] = (key + (offset + i) * <uint64_t>0x9E3779B97F4A7C15u) >> 56
    return 0


cdef api int other(void *ctx, uint64_t offset, void *dst) noexcept nogil:
    return 0


cdef class Keyed:
    """Holds the ctx of the source that `source` makes."""

    cdef uint64_t key
    cdef object __weakref__

    def __init__(self, key):
        self.key = key

    def source(self, uint64_t nbytes):
        return native(fill, &self.key, nbytes, self)


def null():
    return native(NULL, NULL, 0, None)


def ask(Source source, uint64_t offset, size_t length, bint prompt=False):
    """What fill() or prompt() returns, and the bytes then; 0xEE where it wrote nothing, nor past the end."""
    data = bytearray(b"\xee" * (length + 8))
    cdef unsigned char[::1] view = data
    cdef int result
    with nogil:
        if prompt:
            result = source.c.prompt(source.c.ctx, offset, &view[0], length)
        else:
            result = source.c.fill(source.c.ctx, offset, &view[0], length)
    assert data[length:] == b"\xee" * 8
    return result, bytes(data[:length])


def prompt(Source source):
    """Whether there is a prompt(), and whether it is fill() itself."""
    return source.c.prompt != NULL, source.c.prompt == source.c.fill


def solid(Source source):
    return bool(source.c.solid)
