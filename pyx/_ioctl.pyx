"""One function per userfaultfd ioctl: a raw face for the engine, a checked face for Python.

The checked faces take a descriptor number and whole pages, release the GIL, return the bytes
completed, and raise the exception of the errno table with its `done` set.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport INT64_MAX, UINT64_MAX, int64_t, uint64_t

from operator import index

from userfault cimport _abi
from userfault._abi cimport (
    ioctl, uffdio_api, uffdio_fill, uffdio_range, uffdio_register, uffdio_transfer, uffdio_writeprotect,
)
from userfault._errno cimport error_for

from userfault.errors import RangeError

cdef extern from "<sys/syscall.h>" nogil:
    const long SYS_userfaultfd

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, int flags)

cdef uint64_t PAGE_SIZE = <uint64_t>_abi.sysconf(_abi._SC_PAGESIZE)


cdef inline int call(int fd, unsigned long request, void *argument) noexcept nogil:
    cdef int err
    while True:
        if ioctl(fd, request, argument) >= 0:
            return 0
        err = errno
        if err != EINTR:
            return -err


cdef inline int range_call(int fd, unsigned long request, uint64_t start, uint64_t length) noexcept nogil:
    cdef uffdio_range argument
    argument.start = start
    argument.length = length
    return call(fd, request, &argument)


cdef inline int progress(int result, int64_t field, uint64_t *done) noexcept nogil:
    # The last field is the bytes done, or -errno; kernels before April 2025 left it unwritten on zero
    # progress, which is why every caller zeroes it first.
    done[0] = <uint64_t>field if field > 0 else 0
    return result


cdef inline int fill_call(int fd, unsigned long request, uint64_t start, uint64_t length, uint64_t mode,
                          uint64_t *done) noexcept nogil:
    cdef uffdio_fill argument
    argument.range.start = start
    argument.range.length = length
    argument.mode = mode
    argument.done = 0
    cdef int result = call(fd, request, &argument)
    return progress(result, argument.done, done)


cdef inline int transfer_call(int fd, unsigned long request, uint64_t dst, uint64_t src, uint64_t length,
                              uint64_t mode, uint64_t *done) noexcept nogil:
    cdef uffdio_transfer argument
    argument.dst = dst
    argument.src = src
    argument.length = length
    argument.mode = mode
    argument.done = 0
    cdef int result = call(fd, request, &argument)
    return progress(result, argument.done, done)


cdef int uffd_api(int fd, uint64_t api, uint64_t features, uint64_t *bits, uint64_t *ioctls) noexcept nogil:
    cdef uffdio_api argument
    argument.api = api
    argument.features = features
    argument.ioctls = 0
    cdef int result = call(fd, _abi.UFFDIO_API, &argument)
    bits[0] = argument.features
    ioctls[0] = argument.ioctls
    return result


cdef int uffd_register(int fd, uint64_t start, uint64_t length, uint64_t mode,
                       uint64_t *ioctls) noexcept nogil:
    cdef uffdio_register argument
    argument.range.start = start
    argument.range.length = length
    argument.mode = mode
    argument.ioctls = 0
    cdef int result = call(fd, _abi.UFFDIO_REGISTER, &argument)
    ioctls[0] = argument.ioctls
    return result


cdef int uffd_unregister(int fd, uint64_t start, uint64_t length) noexcept nogil:
    return range_call(fd, _abi.UFFDIO_UNREGISTER, start, length)


cdef int uffd_wake(int fd, uint64_t start, uint64_t length) noexcept nogil:
    return range_call(fd, _abi.UFFDIO_WAKE, start, length)


cdef int uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode,
                   uint64_t *done) noexcept nogil:
    return transfer_call(fd, _abi.UFFDIO_COPY, dst, src, length, mode, done)


cdef int uffd_move(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode,
                   uint64_t *done) noexcept nogil:
    return transfer_call(fd, _abi.UFFDIO_MOVE, dst, src, length, mode, done)


cdef int uffd_zeropage(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil:
    return fill_call(fd, _abi.UFFDIO_ZEROPAGE, start, length, mode, done)


cdef int uffd_continue(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil:
    return fill_call(fd, _abi.UFFDIO_CONTINUE, start, length, mode, done)


cdef int uffd_poison(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil:
    return fill_call(fd, _abi.UFFDIO_POISON, start, length, mode, done)


cdef int uffd_writeprotect(int fd, uint64_t start, uint64_t length, uint64_t mode) noexcept nogil:
    cdef uffdio_writeprotect argument
    argument.range.start = start
    argument.range.length = length
    argument.mode = mode
    return call(fd, _abi.UFFDIO_WRITEPROTECT, &argument)


cdef uint64_t as_u64(value) except? 0:
    """The integer; TypeError for anything else, RangeError unless it is in [0, 2^64)."""
    number = index(value)
    if not 0 <= number <= <uint64_t>UINT64_MAX:
        raise RangeError(f"{number:#x} is no address or size: below 0, or 2^64 and more")
    return number


cpdef uint64_t check_range(start, length) except? 0:
    """The length; raises RangeError unless [start, start + length) is a non-empty run of whole pages."""
    cdef uint64_t first = as_u64(start), size = as_u64(length)
    if size == 0:
        raise RangeError(f"empty range at {first:#x}: the length must be a positive multiple of {PAGE_SIZE}")
    if first % PAGE_SIZE or size % PAGE_SIZE:
        raise RangeError(f"[{first:#x}, +{size:#x}) is not page-aligned: start and length must be "
                         f"multiples of {PAGE_SIZE}")
    # Addresses of user space end far below 2^63; beyond, the signed keys of RegionTable would not do.
    if first + size < first or first + size > <uint64_t>INT64_MAX:
        raise RangeError(f"[{first:#x}, +{size:#x}) passes the end of the address space")
    return size


cdef object finish(str name, int result, uint64_t done):
    if result < 0:
        raise error_for(name, -result, done)
    return done


def open_by_syscall(int flags):
    """userfaultfd(2): a new descriptor number. Raises UffdError."""
    cdef long fd = syscall(SYS_userfaultfd, flags)
    if fd < 0:
        raise error_for("userfaultfd", errno)
    return fd


def api(int fd, uint64_t version, uint64_t features):
    """UFFDIO_API: (features, ioctls) as the kernel answered.

    Raises UffdError with `done == 0`; EINVAL means that the kernel does not know `version` or a feature.
    """
    cdef uint64_t bits, ioctls
    cdef int result = uffd_api(fd, version, features, &bits, &ioctls)
    finish("UFFDIO_API", result, 0)
    return bits, ioctls


def register(int fd, start, length, uint64_t mode):
    """UFFDIO_REGISTER: the bit mask of the ioctls that the range has."""
    cdef uint64_t size = check_range(start, length), first = start
    cdef uint64_t ioctls
    cdef int result
    with nogil:
        result = uffd_register(fd, first, size, mode, &ioctls)
    finish("UFFDIO_REGISTER", result, 0)
    return ioctls


def unregister(int fd, start, length):
    """UFFDIO_UNREGISTER: the range is ordinary memory again, its sleepers awake."""
    cdef uint64_t size = check_range(start, length), first = start
    cdef int result
    with nogil:
        result = uffd_unregister(fd, first, size)
    finish("UFFDIO_UNREGISTER", result, 0)


def wake(int fd, start, length):
    """UFFDIO_WAKE: every sleeper of the range tries again."""
    cdef uint64_t size = check_range(start, length), first = start
    cdef int result
    with nogil:
        result = uffd_wake(fd, first, size)
    finish("UFFDIO_WAKE", result, 0)


def copy(int fd, dst, src, length, uint64_t mode):
    """UFFDIO_COPY: bytes copied. `src` need not be aligned."""
    cdef uint64_t size = check_range(dst, length), to = dst, origin = as_u64(src)
    cdef uint64_t done
    cdef int result
    with nogil:
        result = uffd_copy(fd, to, origin, size, mode, &done)
    return finish("UFFDIO_COPY", result, done)


def move(int fd, dst, src, length, uint64_t mode):
    """UFFDIO_MOVE: bytes moved."""
    cdef uint64_t size = check_range(dst, length), to = dst, origin = as_u64(src)
    check_range(src, length)
    cdef uint64_t done
    cdef int result
    with nogil:
        result = uffd_move(fd, to, origin, size, mode, &done)
    return finish("UFFDIO_MOVE", result, done)


def zeropage(int fd, start, length, uint64_t mode):
    """UFFDIO_ZEROPAGE: bytes mapped to the zero page."""
    cdef uint64_t size = check_range(start, length), first = start
    cdef uint64_t done
    cdef int result
    with nogil:
        result = uffd_zeropage(fd, first, size, mode, &done)
    return finish("UFFDIO_ZEROPAGE", result, done)


def continue_(int fd, start, length, uint64_t mode):
    """UFFDIO_CONTINUE: bytes mapped from the page cache."""
    cdef uint64_t size = check_range(start, length), first = start
    cdef uint64_t done
    cdef int result
    with nogil:
        result = uffd_continue(fd, first, size, mode, &done)
    return finish("UFFDIO_CONTINUE", result, done)


def poison(int fd, start, length, uint64_t mode):
    """UFFDIO_POISON: bytes whose touch raises SIGBUS from now on."""
    cdef uint64_t size = check_range(start, length), first = start
    cdef uint64_t done
    cdef int result
    with nogil:
        result = uffd_poison(fd, first, size, mode, &done)
    return finish("UFFDIO_POISON", result, done)


def writeprotect(int fd, start, length, uint64_t mode):
    """UFFDIO_WRITEPROTECT: arm or, without MODE_WP, disarm and wake."""
    cdef uint64_t size = check_range(start, length), first = start
    cdef int result
    with nogil:
        result = uffd_writeprotect(fd, first, size, mode)
    finish("UFFDIO_WRITEPROTECT", result, 0)
