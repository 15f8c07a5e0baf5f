"""Page sources that fill without the GIL: `Zero`, `Buffer`, `File`."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINTR, ENODATA, errno
from libc.stdint cimport UINT64_MAX, uint64_t, uintptr_t

import os
import stat
import weakref
from operator import index

from userfault._abi cimport c_close, pread

from userfault.errors import SourceError
from userfault.procmaps import registered

_live_buffers = weakref.WeakSet()


cdef class Source:
    """What a region's pages are filled from. Use one of the subclasses."""

    @property
    def nbytes(self):
        """Bytes the source has."""
        return self.c.size


cdef class Zero(Source):
    """Zeros, without end."""

    def __cinit__(self):
        self.c.zero = True
        self.c.size = UINT64_MAX


cdef class Buffer(Source):
    """The bytes of an object with the buffer protocol, copied straight from its memory.

    The object is held, and cannot be resized, while the source lives. Raises SourceError for memory that
    is not contiguous, or that is itself registered with a userfaultfd: the engine would wait for a page
    that only the engine can bring.
    """

    cdef Py_buffer view
    cdef bint held
    cdef object __weakref__

    def __init__(self, data):
        if self.held:
            raise SourceError("a Buffer takes its data once")
        try:
            PyObject_GetBuffer(data, &self.view, PyBUF_SIMPLE)
        except (BufferError, ValueError) as error:
            raise SourceError(f"{error}: pass contiguous memory, e.g. numpy.ascontiguousarray(…)") from None
        self.held = True
        cdef uint64_t start = <uintptr_t>self.view.buf
        if registered(start, start + self.view.len):
            raise SourceError(f"the buffer at [{start:#x}, +{self.view.len:#x}) is itself registered with a "
                              "userfaultfd: filling from it could wait for its own engine; copy it first")
        self.c.direct = <const char *>self.view.buf
        self.c.size = self.view.len
        _live_buffers.add(self)

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    def overlaps(self, uint64_t start, uint64_t end):
        """Whether the buffer has bytes in [start, end)."""
        cdef uint64_t mine = <uintptr_t>self.view.buf
        return mine < end and start < mine + <uint64_t>self.view.len


def refuse_live_buffers(uint64_t start, uint64_t end):
    """Raise SourceError when [start, end) holds bytes of a Buffer that may be serving."""
    for buffer in list(_live_buffers):
        if buffer.overlaps(start, end):
            raise SourceError(f"[{start:#x}, {end:#x}) holds the memory of a Buffer source: registering it "
                              "would make the engine wait for itself")


cdef struct file_t:
    int fd
    uint64_t offset


cdef int fill_from_file(void *ctx, uint64_t offset, void *dst, size_t length) noexcept nogil:
    cdef file_t *file = <file_t *>ctx
    cdef ssize_t got
    while length:
        got = pread(file.fd, dst, length, <long>(file.offset + offset))
        if got < 0:
            if errno == EINTR:
                continue
            return -errno
        if got == 0:
            return -ENODATA  # shorter than it was when it was opened
        dst = <char *>dst + got
        offset += got
        length -= got
    return 0


cdef class File(Source):
    """The bytes of a regular file from `offset` on, read by pread(2).

    Its size is taken now; bytes that a truncation takes away later are errors, not zeros. Raises OSError
    when it cannot be opened, SourceError for an offset outside it or anything but a regular file.
    """

    cdef file_t file

    def __cinit__(self):
        self.file.fd = -1

    def __init__(self, path, offset=0):
        offset = index(offset)
        if self.file.fd >= 0:
            raise SourceError("a File is opened once")
        # NONBLOCK: opening a FIFO would wait for its writer. A regular file knows no difference.
        self.file.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self.file.fd)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{os.fspath(path)!r} is not a regular file: pread needs one")
        if not 0 <= offset <= status.st_size:
            raise SourceError(f"offset {offset} is outside {os.fspath(path)!r} of {status.st_size} bytes")
        self.file.offset = offset
        self.c.size = status.st_size - offset
        self.c.fill = fill_from_file
        self.c.ctx = &self.file

    def __dealloc__(self):
        if self.file.fd >= 0:
            c_close(self.file.fd)
