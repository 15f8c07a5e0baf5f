"""`EventReader`: many records per read() into one preallocated array; `as_v2`: any wire as RFC v2."""

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_STRIDED_RO, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EBADF, EINTR, EIO, errno
from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.string cimport memmove

import os
import socket
import stat
import time
import weakref
from operator import index

import numpy as np

from userfault._abi cimport (
    UFFD_BIT_WP, UFFD_BIT_WRITE, UFFD_EVENT_FORK, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP,
    UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP, UFFD_FORK, UFFD_PAGEFAULT,
    UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, POLLERR, POLLIN, POLLNVAL,
    c_close, c_read, load_int, msg_record, now, pollfd, ppoll, store_int, timespec, v2_record,
)
from userfault._books cimport FORK, decode_event, event_t
from userfault._children cimport ForkBatch, follow, forking
from userfault._descriptor cimport Descriptor
from userfault._errno cimport error_for
from userfault._ioctl cimport PAGE_SIZE
from userfault._regions cimport RegionTable

from userfault._children import readers
from userfault._consts import DTYPES, MSG_DTYPE, V1_DTYPE, V2_DTYPE, WIRES
from userfault._descriptor import hearers, inherited
from userfault.errors import (
    BusyError, ClosedError, EndOfRecordsError, RecordError, TruncatedRecordError,
)
from userfault.flags import Feature
from userfault.negotiation import agreement_of, probe

cdef enum:
    TIMED_OUT = -100001
    WOKEN = -100002

DEF MOMENT = 1000000    # ns

cdef int64_t NEVER = INT64_MAX


cdef ssize_t wait_and_read(int fd, int closed_fd, int parent_closed_fd, char *into, size_t room,
                           bint poll_first, int64_t deadline, int *reading) noexcept nogil:
    """Bytes read, 0 at the end of file, -errno, TIMED_OUT, or WOKEN by close(). `reading` tells others that
    something may be read, and stays set when something was."""
    cdef pollfd fds[3]
    cdef timespec left
    cdef int64_t nanoseconds
    cdef ssize_t got
    cdef int ready
    cdef bint failed = False
    while True:
        if not poll_first:
            # Reading first saves the poll whenever something is pending.
            store_int(reading, True)
            got = c_read(fd, into, room)
            if got >= 0 or errno != EAGAIN:
                return got if got >= 0 else -errno
            store_int(reading, False)
            if failed:
                return -EIO
            if deadline == 0:
                return TIMED_OUT
        fds[0].fd = fd
        fds[1].fd = closed_fd
        fds[2].fd = parent_closed_fd  # poll passes over -1
        fds[0].events = fds[1].events = fds[2].events = POLLIN
        nanoseconds = 0 if deadline == 0 else max(<int64_t>0, deadline - now())
        left.tv_sec = nanoseconds // 1000000000
        left.tv_nsec = nanoseconds % 1000000000
        ready = ppoll(fds, 3, NULL if deadline == NEVER else &left, NULL)
        if ready <= 0:
            return -errno if ready < 0 else TIMED_OUT
        if fds[1].revents or fds[2].revents:
            return WOKEN
        if fds[0].revents & POLLNVAL:
            return -EBADF
        # With an error and nothing to read, read() must say which: once, not in a loop.
        failed = fds[0].revents & POLLERR and not fds[0].revents & POLLIN
        if poll_first:
            got = c_read(fd, into, room)
            return got if got >= 0 else -errno


cdef class EventReader:
    """Reads fault records from a `Userfaultfd`, or from any descriptor that yields them.

    Args:
        source: a `Userfaultfd`; or a descriptor number, or an object with `fileno()`, and then `api` too.
            The reader does not own a bare descriptor, and wants it left open while it reads.
        capacity: records per read() system call at the most.
        api: "v1", "v2" or "msg": the records' format.

    Raises ValueError for a capacity below 1, an unknown wire, a wire other than the Userfaultfd's, or a
    blocking userfaultfd (poll(2) on one answers POLLERR: set O_NONBLOCK); UffdError for a number that is
    not an open descriptor. One thread may read at a time. Source: userfaultfd(2), and the RFC's read().
    """

    cdef readonly str api
    cdef readonly object dtype
    cdef readonly Py_ssize_t capacity
    cdef Descriptor own        # the number, borrowed, and our own close()
    cdef Descriptor parent     # the Userfaultfd's, None for a bare number
    cdef RegionTable table     # whose books are kept; None where no events are heard
    cdef object agreement
    cdef bint hears_moves
    cdef bint hears_unmap
    cdef int wire
    cdef object batch          # weak reference to the last ForkBatch
    cdef int waiting           # in read(), and not on the way out of it
    cdef int reading           # a fork's descriptor may have come that `unowned` does not cover yet
    cdef size_t unowned        # bytes of records whose forks' descriptors are in no batch yet
    cdef object array
    cdef Py_buffer buffer
    cdef size_t record         # bytes of one
    cdef size_t tail           # bytes of an unfinished record, at the end of what was read last
    cdef size_t tail_at
    cdef bint poll_first       # a blocking descriptor: read() only when something is there
    cdef bint framed           # each read() ends with a message: no later bytes complete a record
    cdef bint busy
    cdef object __weakref__

    def __cinit__(self, source, capacity=512, api=None):
        capacity = index(capacity)
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 record, not {capacity}")
        self.parent = getattr(source, "_descriptor", None)
        if self.parent is not None:
            if api is not None and api != source.api:
                raise ValueError(f"this userfaultfd speaks {source.api}, not {api}")
            api = str(source.api)
            self.framed = True
            fd = self.parent.check()
            self.agreement = source.agreement
            if self.agreement.events:
                self.table = source.regions
        elif not isinstance(api, str) or api not in DTYPES:
            raise ValueError(f"a bare descriptor needs api= one of {', '.join(DTYPES)}, not {api!r}")
        else:
            fd = source.fileno() if hasattr(source, "fileno") else index(source)
            if not 0 <= fd < 1 << 31:
                raise error_for(f"descriptor {fd}", EBADF)
            try:
                mode = os.fstat(fd).st_mode
                self.poll_first = os.get_blocking(fd)
                link = os.readlink(f"/proc/self/fd/{fd}")
            except OSError as error:
                raise error_for(f"descriptor {fd}", error.errno) from None
            if link == "anon_inode:[userfaultfd]":
                self.framed = True
                if self.poll_first:
                    raise ValueError(f"descriptor {fd} is a blocking userfaultfd, which cannot be polled: "
                                     f"call os.set_blocking({fd}, False) first")
                if api not in probe().apis:
                    raise ValueError(f"descriptor {fd} is a userfaultfd, and the kernel does not speak {api}")
                self.agreement = agreement_of(fd, api)
                if self.agreement.events:
                    # Of another process, perhaps: there are no books, only descriptors of fork children.
                    self.table = RegionTable()
            elif stat.S_ISSOCK(mode):
                with socket.socket(fileno=os.dup(fd)) as peer:
                    self.framed = peer.type != socket.SOCK_STREAM
        if self.table is not None:
            self.hears_moves = bool(self.agreement.events & (Feature.EVENT_REMAP | Feature.EVENT_UNMAP))
            self.hears_unmap = Feature.EVENT_UNMAP in self.agreement.events
        self.wire = WIRES[api]
        self.own = Descriptor(fd, borrowed=True)
        self.api = str(api)
        self.dtype = DTYPES[api]
        self.capacity = capacity
        self.record = <size_t>self.dtype.itemsize
        # The kernel copies a fifth slower to memory that does not start at a cache line.
        room = np.zeros(capacity * self.record + 63, np.uint8)
        skip = -room.ctypes.data % 64
        self.array = room[skip:skip + capacity * self.record].view(self.dtype)
        PyObject_GetBuffer(self.array, &self.buffer, PyBUF_SIMPLE | PyBUF_WRITABLE)
        if self.table is not None and Feature.EVENT_FORK in self.agreement.events:
            readers.append(weakref.ref(self, readers.remove))
            inherited.add(self)
            hearers.add(self)

    def __dealloc__(self):
        if self.array is not None:
            PyBuffer_Release(&self.buffer)

    def read(self, timeout=None):
        """Read what is pending, waiting for the first record only.

        Args:
            timeout: seconds to wait; 0 does not wait, None waits for ever.

        Returns a structured array of `dtype`, shape (n,) with n <= capacity: a view of the reader's own
        memory, valid until the next read. Empty when the time ran out. Signal handlers run, and the wait
        goes on.

        Raises ClosedError (closed, now or while waiting), ForkedError, BusyError (another thread or a
        FaultService reads), EndOfRecordsError, TruncatedRecordError (bytes of an unfinished record are kept
        on a stream, and completed by a later read), UffdError, ValueError for a negative timeout.
        """
        cdef int64_t deadline = NEVER
        cdef double seconds
        if timeout is not None:
            seconds = timeout
            if not seconds >= 0:
                raise ValueError(f"timeout must be None or a number of seconds from 0 up, not {timeout!r}")
            if seconds < 1e9:
                deadline = 0 if seconds == 0 else now() + <int64_t>(seconds * 1e9)
        if self.busy:
            raise BusyError("another thread is in read(): its records would be overwritten; "
                            "use one reader per thread")
        cdef int fd
        if self.parent is None:
            fd = self.own.check()
        else:
            fd = self.parent.check()
            if self.own.closed:
                raise ClosedError("the reader is closed")
            if self.parent.served:
                raise BusyError("a FaultService (or its keeper) reads this userfaultfd")
            self.parent.holders += 1
            self.parent.readers += 1
        self.busy = True
        try:
            return self.records(fd, deadline)
        finally:
            self.busy = False
            if self.parent is not None:
                self.parent.readers -= 1
                self.parent.release()

    cdef object records(self, int fd, int64_t deadline):
        cdef char *data = <char *>self.buffer.buf
        cdef int closed_fd = self.own.closed_fd
        cdef int parent_closed_fd = -1 if self.parent is None else self.parent.closed_fd
        cdef bint poll_first = self.poll_first, hears = self.table is not None
        cdef size_t room, whole
        cdef ssize_t got
        if self.batch is not None:
            self.end_batch()
        if self.tail:
            memmove(data, data + self.tail_at, self.tail)
            self.tail_at = 0
        while True:
            room = self.capacity * self.record - self.tail
            with nogil:
                if hears:
                    got = self.wait(fd, parent_closed_fd, data, room, deadline)
                else:
                    got = wait_and_read(fd, closed_fd, parent_closed_fd, data + self.tail, room, poll_first,
                                        deadline, &self.reading)
            if got > 0:
                self.tail += got
                whole = self.tail // self.record
                self.tail_at = whole * self.record
                self.tail -= self.tail_at
                if self.tail and self.framed:
                    raise self.truncated("the message ends there", whole)
                if whole:
                    return self.array[:whole] if self.table is None else self.heard(fd, whole)
                continue
            if got == -EINTR:
                PyErr_CheckSignals()
                continue
            if got == TIMED_OUT:
                if self.tail:
                    raise self.truncated("no more came in time; they are kept for the next read", 0)
                return self.array[:0]
            if got == 0:
                if self.tail:
                    raise self.truncated("the writing side closed", 0)
                raise EndOfRecordsError("the writing side closed: no record will follow")
            if got == WOKEN or got == -EBADF:
                raise ClosedError("the descriptor was closed")
            raise error_for(f"read of descriptor {fd}", -got)

    cdef ssize_t wait(self, int fd, int parent_closed_fd, char *into, size_t room,
                      int64_t deadline) noexcept nogil:
        """`wait_and_read`, and more of the same until no os.fork() is in progress, which holds the GIL."""
        cdef ssize_t first = 0, got
        cdef size_t total = 0
        while True:
            store_int(&self.waiting, True)
            got = wait_and_read(fd, self.own.closed_fd, parent_closed_fd, into + total, room - total, False,
                                deadline, &self.reading)
            total += max(got, 0)
            self.unowned = total
            store_int(&self.reading, False)
            first = first or got
            store_int(&self.waiting, False)
            if load_int(&forking) == 0 or total == room:
                return <ssize_t>total or first
            deadline = now() + MOMENT

    def is_waiting(self, int fd):
        """Whether a thread waits in read() of that descriptor, and will read the next record."""
        return load_int(&self.waiting) and self.own.fd == fd

    def settle(self):
        """Wait until no other thread is reading a fork's record."""
        while load_int(&self.reading):
            time.sleep(100e-6)

    def leave_to_parent(self):
        """In a fork child: close what was inherited."""
        cdef event_t event
        cdef size_t i
        for i in range(self.unowned // self.record):
            if decode_event(self.wire, <const char *>self.buffer.buf + i * self.record, &event) == FORK:
                c_close(event.fd)
        self.unowned = 0
        self.reading = False

    cdef object heard(self, int fd, size_t n):
        """Keep the books by the first n records, which may be events: the array of them."""
        cdef const char *data = <const char *>self.buffer.buf
        cdef ForkBatch batch = None
        cdef event_t event
        cdef size_t i = 0
        while True:
            with nogil:
                i = follow(&self.table.tree, fd, self.wire, self.hears_moves, self.hears_unmap, data, i, n,
                           &event)
            if i == n:
                break
            if batch is None:
                batch = ForkBatch(self.array, self.agreement)
            batch.adopt(event.fd, self.table)
            i += 1
        self.unowned = 0
        if batch is None:
            return self.array[:n]
        self.batch = weakref.ref(batch)
        return np.frombuffer(batch, self.dtype, n)

    cdef int end_batch(self) except -1:
        batch = self.batch()
        self.batch = None
        if batch is not None:
            batch.close()
        return 0

    cdef object truncated(self, str why, size_t whole):
        tail = self.array.view("u1")[self.tail_at:self.tail_at + self.tail].tobytes()
        records = self.array[:whole].copy()
        if self.framed:
            self.tail = 0
        return TruncatedRecordError(f"{len(tail)} bytes of a {self.record}-byte {self.api} record: {why}",
                                    records, tail)

    def close(self):
        """Wake a read() in another thread, and refuse new ones. The descriptor itself stays open; those of
        fork children that nobody has taken are closed."""
        self.own.close()
        if self.batch is not None:
            self.end_batch()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def as_v2(records):
    """Records of any wire as RFC v2 records (new array of V2_DTYPE, shape (n,)).

    Page faults keep their page address with the WRITE and WP bits in its low bits, as the RFC encoded
    them; a fork keeps its descriptor. Raises RecordError, and translates nothing, when a record is one
    that v2 has no number or bit for: mainline's remap, remove and unmap events, minor faults, and types
    that nobody knows.
    """
    dtype = getattr(records, "dtype", None)
    if dtype not in (V1_DTYPE, V2_DTYPE, MSG_DTYPE) or records.ndim != 1:
        raise RecordError("need a 1-D array of V1_DTYPE, V2_DTYPE or MSG_DTYPE records, "
                          f"not {type(records).__name__} of {dtype}")
    if dtype == V2_DTYPE:
        return records.copy()
    cdef size_t n = records.shape[0], i
    out = np.empty(n, V2_DTYPE)
    if dtype == V1_DTYPE:
        out["type"] = UFFD_PAGEFAULT
        out["arg"] = records["arg"]
        return out
    cdef Py_buffer from_view, to_view
    PyObject_GetBuffer(records, &from_view, PyBUF_STRIDED_RO)
    PyObject_GetBuffer(out, &to_view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    cdef v2_record *to = <v2_record *>to_view.buf
    cdef const msg_record *msg
    cdef uint64_t page = ~(PAGE_SIZE - 1)
    cdef bint unsayable = False
    for i in range(n):
        msg = <const msg_record *>(<const char *>from_view.buf + i * from_view.strides[0])
        if msg.event == UFFD_EVENT_PAGEFAULT and not msg.flags & ~<uint64_t>(
                UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP):
            to[i].type = UFFD_PAGEFAULT
            to[i].arg = msg.address & page
            if msg.flags & UFFD_PAGEFAULT_FLAG_WRITE:
                to[i].arg |= UFFD_BIT_WRITE
            if msg.flags & UFFD_PAGEFAULT_FLAG_WP:
                to[i].arg |= UFFD_BIT_WP
        elif msg.event == UFFD_EVENT_FORK:
            to[i].type = UFFD_FORK
            to[i].arg = msg.flags & 0xFFFFFFFF
        else:
            unsayable = True
            break
    PyBuffer_Release(&to_view)
    PyBuffer_Release(&from_view)
    if unsayable:
        raise RecordError(f"record {i}: {describe(records[i])}, for which RFC v2 has no number; "
                          "it knows page faults (WRITE, WP) and forks only")
    return out


cdef str describe(record):
    event, flags = int(record["event"]), int(record["flags"])
    if event == UFFD_EVENT_PAGEFAULT:
        minor = " (a minor fault)" if flags & UFFD_PAGEFAULT_FLAG_MINOR else ""
        return f"a page fault with flags {flags:#x}{minor}"
    known = {UFFD_EVENT_REMAP: "a remap", UFFD_EVENT_REMOVE: "a remove", UFFD_EVENT_UNMAP: "an unmap"}
    return f"{known.get(event, 'an unknown')} event ({event:#x})"
