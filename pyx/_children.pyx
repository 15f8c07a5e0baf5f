"""What an `EventReader` does with events: it keeps the books, and owns the descriptors of fork children.

read() of a fork record has installed a descriptor in this process (userfaultfd(2)). Until somebody takes it,
it belongs to the batch of records, and is closed with that; what the child misses fails closed before, for
without a userfaultfd it would read zeros.
"""

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.stdint cimport uint64_t
from libc.string cimport memset

import os
import time
import weakref

import numpy as np

from userfault._abi cimport (
    UFFD_EVENT_PAGEFAULT, UFFD_PAGEFAULT, WIRE_MSG, add_int, c_close, c_read, getpid, msg_record, store_int,
    v2_record,
)
from userfault._books cimport (
    FAULT, FORK, copy_books, decode_event, event_t, find_grown, keep_books, poison_missing,
)
from userfault._descriptor cimport Descriptor
from userfault._ioctl cimport PAGE_SIZE
from userfault._regions cimport RegionTable
from userfault._tree cimport enter, entry_t, fell, find, leave, plant, tree_t

from userfault._consts import DTYPES, WIRES
from userfault._descriptor import hearers, inherited
from userfault.errors import RecordError

DEF ROUNDS = 100   # of reading a child's events and poisoning what it misses, while it goes on making some


# -- os.fork() ------------------------------------------------------------------------------------------
#
# It holds the GIL until the fork's record is read. So it waits until a reader is in read(), and while it is
# in progress no reader comes out of read(), where it would wait for the GIL.

sharing = []    # weak references to the `Userfaultfd`s whose memory fork children get
readers = []    # and to the `EventReader`s that hear forks


def before_fork():
    """Wait, without the GIL, until each fork record will be read, and those before it are heeded."""
    while True:
        add_int(&forking, 1)
        if all(map(is_read, [reference() for reference in list(sharing)])):
            break
        add_int(&forking, -1)
        time.sleep(100e-6)
    # The child must know of all descriptors that it inherits.
    for hearer in list(hearers):
        hearer.settle()


def is_read(userfaultfd):
    """Whether a fork of this process would not wait for ever for somebody to read its record."""
    if userfaultfd is None or not userfaultfd._shares():
        return True
    cdef Descriptor descriptor = userfaultfd._descriptor
    if descriptor.closed or descriptor.served:
        return True
    found = [reference() for reference in list(readers)]
    return any(reader.is_waiting(descriptor.fd) for reader in found if reader is not None)


def after_fork():
    add_int(&forking, -1)


def after_fork_in_child():
    store_int(&forking, 0)
    # The child's own forks are read by the parent.
    sharing.clear()
    readers.clear()


os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=after_fork_in_child)


# -- records --------------------------------------------------------------------------------------------

cdef inline bint is_fault(int wire, const char *record) noexcept nogil:
    if wire == WIRE_MSG:
        return (<const msg_record *>record).event == UFFD_EVENT_PAGEFAULT
    return (<const v2_record *>record).type == UFFD_PAGEFAULT


cdef size_t follow(tree_t *tree, int fd, int wire, bint hears_moves, bint hears_unmap, const char *records,
                   size_t i, size_t n, event_t *event) noexcept nogil:
    """Keep the books by the records from number i on, up to the next fork: its number and `event`; or n."""
    cdef size_t size = sizeof(msg_record) if wire == WIRE_MSG else sizeof(v2_record)
    cdef const char *record
    cdef entry_t entry
    cdef uint64_t page
    cdef bint held
    cdef int ticket
    while i < n:
        record = records + i * size
        if not hears_moves and is_fault(wire, record):
            # Where no region moves, none is looked for.
            i += 1
            continue
        if decode_event(wire, record, event) == FORK:
            break
        if event.kind == FAULT:
            page = ~(PAGE_SIZE - 1)
            if wire == WIRE_MSG:
                page &= (<const msg_record *>record).address
            else:
                page &= (<const v2_record *>record).arg
            ticket = enter(tree)
            held = find(tree, page, &entry)
            leave(tree, ticket)
            if not held:
                find_grown(tree, fd, page, &entry)
        else:
            keep_books(tree, fd, event, hears_unmap)
        i += 1
    return i


cdef void give_up(tree_t *tree, int fd, int wire) noexcept nogil:
    """Nobody will serve this child: what it misses, and what its own children miss, fails closed."""
    cdef msg_record records[16]
    cdef size_t size = sizeof(msg_record) if wire == WIRE_MSG else sizeof(v2_record), i, n
    cdef event_t event
    cdef tree_t table
    cdef ssize_t got
    for _ in range(ROUNDS):
        while True:
            # While an event is unread, nothing can be poisoned.
            got = c_read(fd, records, sizeof(records))
            if got <= 0:
                break
            n, i = got // size, 0
            while True:
                i = follow(tree, fd, wire, True, False, <const char *>records, i, n, &event)
                if i == n:
                    break
                memset(&table, 0, sizeof(table))
                if plant(&table) == 0:
                    copy_books(tree, &table, event.fd)
                    give_up(&table, event.fd, wire)
                    fell(&table)
                c_close(event.fd)
                i += 1
        if poison_missing(tree, fd):
            break


def fail_closed(int fd, RegionTable regions not None, str api):
    """Let all that a fork child misses fail closed (SIGBUS); its descriptor may be closed then.

    Before Linux 6.6, which brought UFFDIO_POISON, nothing happens, and missing pages will read as zeros.
    """
    cdef int wire = WIRES[api]
    with nogil:
        give_up(&regions.tree, fd, wire)


def end_children(list children, str api, int pid):
    """Fail closed and close those that nobody has taken."""
    while children:
        fd, regions = children.pop()
        if getpid() == pid:
            fail_closed(fd, regions, api)
        c_close(fd)


cdef class ForkBatch:
    """The memory of one batch of records, and the children that its fork records brought.

    Args:
        records: the reader's array. The batch exports its memory, so that an array over the batch ends it.
        agreement: the `Agreement` of the userfaultfd that was read, which holds for the children, too.
    """

    def __cinit__(self, records, agreement):
        self.records = records
        self.agreement = agreement
        self.children = []
        # Not __dealloc__: at the interpreter's end there are arrays that nothing frees.
        self.ending = weakref.finalize(self, end_children, self.children, str(agreement.api), getpid())
        inherited.add(self)

    def __getbuffer__(self, Py_buffer *view, int flags):
        cdef Py_buffer room
        PyObject_GetBuffer(self.records, &room, PyBUF_SIMPLE | PyBUF_WRITABLE)
        # The batch holds the array, and the array its memory.
        PyBuffer_FillInfo(view, self, room.buf, room.len, 0, flags)
        PyBuffer_Release(&room)

    cdef object adopt(self, int fd, RegionTable parent):
        """Own a child's descriptor, with the books of what it has of the parent's regions."""
        cdef RegionTable regions = RegionTable()
        self.children.append((fd, regions))
        # It has the flags with which the parent's was opened, by others perhaps.
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)
        regions.next_id = parent.next_id
        with nogil:
            copy_books(&parent.tree, &regions.tree, fd)

    def take(self, make):
        """`make(fd, agreement, regions)` of each child that is left, in the order of their records.

        A child whose `make` raises stays here, and so do those after it.
        """
        taken = []
        while self.children:
            fd, regions = self.children.pop(0)
            try:
                taken.append(make(fd, self.agreement, regions))
            except BaseException:
                self.children.insert(0, (fd, regions))
                raise
        return taken

    def leave_to_parent(self):
        """In a fork child: close what was inherited."""
        while self.children:
            c_close(self.children.pop()[0])

    def close(self):
        """End the children that nobody has taken. Idempotent."""
        self.ending()


def batch_of(records):
    """The `ForkBatch` whose memory an array of records shows; None for one without forks.

    Raises RecordError for anything but an array of records.
    """
    if not isinstance(records, np.ndarray) or records.dtype.itemsize not in (
            dtype.itemsize for dtype in DTYPES.values()):
        raise RecordError(f"need the array that EventReader.read() returned, not {type(records).__name__}")
    owner = records.base
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner if isinstance(owner, ForkBatch) else None
