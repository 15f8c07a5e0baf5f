"""`touch`: take page faults on purpose, without the GIL. For the demo, the benchmarks and the tests."""

from libc.stdint cimport uint64_t


def touch(const unsigned char[::1] memory not None, const uint64_t[::1] offsets not None):
    """Read memory[offset] for each offset, in order; the sum of the bytes.

    Sleeps in each missing page without the GIL, so that several threads can fault at once.
    Raises IndexError, and touches nothing, when an offset is outside the memory.
    """
    cdef Py_ssize_t i
    cdef uint64_t total = 0, length = memory.shape[0]
    for i in range(offsets.shape[0]):
        if offsets[i] >= length:
            raise IndexError(f"offset {offsets[i]} is outside {length} bytes of memory")
    with nogil:
        for i in range(offsets.shape[0]):
            total += memory[offsets[i]]
    return total
