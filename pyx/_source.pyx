"""Page sources that fill without the GIL: `Zero`, `Constant`, `Pattern`, `Buffer`, `File`."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EINTR, ENODATA, EOPNOTSUPP, errno
from libc.stdint cimport UINT64_MAX, uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

import os
import stat
import weakref
from operator import index

import numpy as np

from userfault._abi cimport c_close, iovec, load_int, pread, store_int

from userfault.errors import SourceError
from userfault.procmaps import WATCHED, vmas

cdef extern from "<endian.h>" nogil:
    uint64_t htole64(uint64_t)

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv2(int fd, const iovec *parts, int n_parts, long offset, int flags)
    int RWF_NOWAIT

cdef extern from "<unistd.h>" nogil:
    ssize_t pwrite(int fd, const void *data, size_t count, long offset)
    int fdatasync(int fd)

cdef extern from *:
    """
    #define UF_STEP 0x9E3779B97F4A7C15
    #define UF_MIXER 0xD6E8FEB86659FD93 /* odd: no two words mix to the same */
    """
    const uint64_t STEP "UF_STEP", MIXER "UF_MIXER"

DEF LONGEST = 1024

_live_buffers = weakref.WeakSet()


cdef class Source:
    """What a region's pages are filled from. Use one of the subclasses."""

    @property
    def nbytes(self):
        """Bytes the source has; 2**64 - 1 when it has no end."""
        return self.c.size

    @property
    def writable(self):
        """Whether changes can be written back to it."""
        return self.c.write != NULL

    @property
    def signal_safe(self):
        """Whether it can fill in a signal handler, as mode "inline" does."""
        return self.c.signal_safe

    def explain(self, int error, uint64_t offset=UINT64_MAX):
        """Why it failed last at that offset, or anywhere with this errno: in its own words, if it has any."""
        cdef char text[LONGEST]
        if self.c.words != NULL and self.c.words(self.c.ctx, error, offset, text, LONGEST):
            return text.decode(errors="replace")
        return os.strerror(error)

    def __repr__(self):
        return f"{type(self).__name__}()"

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} source is of this process's memory, and cannot be pickled")


cdef class Zero(Source):
    """Zeros, without end."""

    def __cinit__(self):
        self.c.zero = self.c.signal_safe = True
        self.c.size = UINT64_MAX

    def __reduce__(self):
        return Zero, ()


cdef int fill_with_constant(void *ctx, uint64_t offset, void *dst, size_t length) noexcept nogil:
    memset(dst, (<const uint8_t *>ctx)[0], length)
    return 0


cdef class Constant(Source):
    """One byte, 0 to 255, over and over, without end. Raises SourceError for any other value."""

    cdef uint8_t value

    def __init__(self, value):
        value = index(value)
        if self.c.fill != NULL:
            raise SourceError("a Constant takes its value once")
        if not 0 <= value <= 255:
            raise SourceError(f"a byte is 0 to 255, not {value}")
        self.value = value
        self.c.size = UINT64_MAX
        self.c.fill = self.c.prompt = fill_with_constant
        self.c.signal_safe = True
        self.c.ctx = &self.value

    def __repr__(self):
        return f"Constant({self.value})"

    def __reduce__(self):
        return Constant, (self.value,)


cdef int fill_with_pattern(void *ctx, uint64_t offset, void *dst, size_t length) noexcept nogil:
    cdef uint64_t *words = <uint64_t *>dst
    cdef uint64_t product = ((<const uint64_t *>ctx)[0] + offset) * MIXER, last
    cdef size_t i
    for i in range(length // 8):
        words[i] = htole64(product ^ product >> 32)
        product += 8 * MIXER
    last = htole64(product ^ product >> 32)
    memcpy(words + length // 8, &last, length % 8)
    return 0


cdef class Pattern(Source):
    """Bytes that tell where they come from, for tests; without end.

    No two of its 8-byte words are the same, so that a page from a wrong offset shows; another seed, any
    integer, gives others. The little-endian word at byte offset o, a multiple of 8, is x ^ x >> 32 of
    x = (o + (seed + 1) * 0x9E3779B97F4A7C15) * 0xD6E8FEB86659FD93, all modulo 2**64. `expected` tells the
    bytes.
    """

    cdef uint64_t base
    cdef object seed

    def __init__(self, seed=0):
        base = (index(seed) + 1) * STEP % 2**64
        if self.c.fill != NULL:
            raise SourceError("a Pattern takes its seed once")
        self.seed = index(seed)
        self.base = base
        self.c.size = UINT64_MAX
        self.c.fill = self.c.prompt = fill_with_pattern
        self.c.signal_safe = True
        self.c.ctx = &self.base

    def __repr__(self):
        return f"Pattern({self.seed})"

    def __reduce__(self):
        return Pattern, (self.seed,)

    def expected(self, offset, length):
        """What [offset, offset + length) of it reads, in bytes: array of uint8, as numpy computes it."""
        words = np.arange(offset // 8, -(-(offset + length) // 8), dtype=np.uint64) * np.uint64(8)
        words = (words + np.uint64(self.base)) * np.uint64(MIXER)
        words ^= words >> np.uint64(32)
        return words.astype("<u8").view(np.uint8)[offset % 8:][:length]


cdef int write_to_buffer(void *ctx, uint64_t offset, const void *src, size_t length) noexcept nogil:
    memcpy(<char *>ctx + offset, src, length)
    return 0


cdef class Buffer(Source):
    """The bytes of an object with the buffer protocol, copied straight from its memory.

    The object is held, and cannot be resized, while the source lives; it can be written to unless it is
    read-only. Raises SourceError for memory that
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
        cdef uint64_t start = <uintptr_t>self.view.buf, end = start + self.view.len, reached = start
        for vma in vmas(start, end):
            if vma.flags & WATCHED:
                raise SourceError(f"the buffer at [{start:#x}, +{self.view.len:#x}) is itself registered "
                                  "with a userfaultfd: filling from it could wait for its own engine; copy "
                                  "it first")
            if is_solid(vma) and vma.start <= reached:
                reached = vma.end
        self.c.solid = reached >= end
        self.c.direct = <const char *>self.view.buf
        self.c.size = self.view.len
        self.c.ctx = self.view.buf
        self.c.signal_safe = True
        if not self.view.readonly:
            self.c.write = write_to_buffer
        _live_buffers.add(self)

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    def __repr__(self):
        return f"Buffer(<{self.c.size} bytes>)"

    def overlaps(self, uint64_t start, uint64_t end):
        """Whether the buffer has bytes in [start, end)."""
        cdef uint64_t mine = <uintptr_t>self.view.buf
        return mine < end and start < mine + <uint64_t>self.view.len


cdef bint is_solid(vma):
    """Readable private memory with no file under it. "[anon:…" are mappings named by prctl(2)."""
    return (vma.permissions[0] == "r" and vma.permissions[3] == "p"
            and (vma.name in ("", "[heap]", "[stack]") or vma.name.startswith("[anon:")))


def refuse_live_buffers(uint64_t start, uint64_t end):
    """Raise SourceError when [start, end) holds memory that a source which may be serving reads."""
    for buffer in list(_live_buffers):
        if buffer.overlaps(start, end):
            raise SourceError(f"[{start:#x}, {end:#x}) holds the memory of a Buffer source, or the ctx of a "
                              "Native: registering it would make the engine wait for itself")


cdef struct file_t:
    int fd
    uint64_t offset
    int slow  # its file system cannot say what would have to wait


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


cdef int fill_from_cache(void *ctx, uint64_t offset, void *dst, size_t length) noexcept nogil:
    cdef file_t *file = <file_t *>ctx
    cdef iovec part
    cdef ssize_t got
    if load_int(&file.slow):
        return -EAGAIN
    part.iov_base = dst
    part.iov_len = length
    got = preadv2(file.fd, &part, 1, <long>(file.offset + offset), RWF_NOWAIT)
    if got == <ssize_t>length:
        return 0
    if got < 0 and errno == EOPNOTSUPP:
        store_int(&file.slow, True)
    # Not all of it is cached. An error or the file's end is for fill() to find: Linux 5.9 answers 0, as at
    # the end, where it would have to wait.
    return -EAGAIN


cdef int write_to_file(void *ctx, uint64_t offset, const void *src, size_t length) noexcept nogil:
    cdef file_t *file = <file_t *>ctx
    cdef ssize_t put
    while length:
        put = pwrite(file.fd, src, length, <long>(file.offset + offset))
        if put < 0:
            if errno == EINTR:
                continue
            return -errno
        src = <const char *>src + put
        offset += put
        length -= put
    return 0


cdef int sync_file(void *ctx) noexcept nogil:
    while fdatasync((<file_t *>ctx).fd) != 0:
        if errno != EINTR:
            return -errno
    return 0


cdef class File(Source):
    """The bytes of a regular file from `offset` on, read by pread(2), written by pwrite(2) if `writable`.

    Its size is taken now; bytes that a truncation takes away later are errors, not zeros. Raises OSError
    when it cannot be opened, SourceError for an offset outside it or anything but a regular file.
    """

    cdef file_t file
    cdef str path

    def __cinit__(self):
        self.file.fd = -1

    def __init__(self, path, offset=0, *, writable=False):
        offset = index(offset)
        if self.file.fd >= 0:
            raise SourceError("a File is opened once")
        # NONBLOCK: opening a FIFO would wait for its writer. A regular file knows no difference.
        access = os.O_RDWR if writable else os.O_RDONLY
        self.file.fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
        self.path = os.path.abspath(os.fsdecode(path))
        status = os.fstat(self.file.fd)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{os.fspath(path)!r} is not a regular file: pread needs one")
        if not 0 <= offset <= status.st_size:
            raise SourceError(f"offset {offset} is outside {os.fspath(path)!r} of {status.st_size} bytes")
        self.file.offset = offset
        self.c.size = status.st_size - offset
        self.c.fill = fill_from_file
        self.c.prompt = fill_from_cache
        self.c.signal_safe = True
        self.c.ctx = &self.file
        if writable:
            self.c.write = write_to_file
            self.c.sync = sync_file

    def __repr__(self):
        offset = f", {self.file.offset}" if self.file.offset else ""
        return f"File({self.path!r}{offset}{', writable=True' if self.writable else ''})"

    def __reduce__(self):
        return reopen_file, (self.path, self.file.offset, self.writable)

    def __dealloc__(self):
        if self.file.fd >= 0:
            c_close(self.file.fd)


def reopen_file(path, offset, writable):
    """What a pickled File is made by."""
    return File(path, offset, writable=writable)
