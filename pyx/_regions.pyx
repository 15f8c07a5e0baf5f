"""`RegionTable`: disjoint page ranges, and the batched way from addresses to regions."""

from cpython.buffer cimport PyBUF_STRIDED_RO, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EEXIST
from libc.stdint cimport INT64_MAX, UINT64_MAX, int64_t, uint64_t
from libc.stdlib cimport free, malloc


import numpy as np

from userfault._abi cimport (
    UFFD_EVENT_PAGEFAULT, UFFD_PAGEFAULT, WIRE_MSG, WIRE_V2, msg_record, v1_record,
    usleep, v2_record,
)
from userfault._ioctl cimport PAGE_SIZE, as_u64, check_range
from userfault._tree cimport (
    advance, best_search, count, cut, enter, entry_t, fell, find, insert, leave, list_all, locate,
    lock_tree, next_entry, plant, replace_all, set_payload, tree_t, unlock_tree,
)

from userfault._consts import DTYPES, WIRES
from userfault.errors import OverlapError, RangeError, RecordError

DEF DECODED = 512    # addresses

RANGES_DTYPE = np.dtype([("start", "<u8"), ("length", "<u8"), ("id", "<i8"), ("offset", "<u8")])

# Tests set it to try each that the processor has.
_search = BEST_SEARCH = best_search()


cdef void fault_addresses(const char *records, Py_ssize_t stride, size_t n, int wire,
                          uint64_t *addresses) noexcept nogil:
    """The page of each page-fault record; UINT64_MAX, which no region can hold, for any other record."""
    cdef uint64_t page = ~(PAGE_SIZE - 1)
    cdef const msg_record *msg
    cdef const v2_record *v2
    cdef size_t i
    for i in range(n):
        if wire == WIRE_MSG:
            msg = <const msg_record *>(records + i * stride)
            addresses[i] = msg.address if msg.event == UFFD_EVENT_PAGEFAULT else UINT64_MAX
        elif wire == WIRE_V2:
            v2 = <const v2_record *>(records + i * stride)
            addresses[i] = v2.arg & page if v2.type == UFFD_PAGEFAULT else UINT64_MAX
        else:
            addresses[i] = (<const v1_record *>(records + i * stride)).arg & page


cdef class RegionTable:
    """Disjoint, page-aligned ranges with ids 0, 1, 2, … in the order of adding; ids are not used again.

    Removing the middle of a region leaves two pieces with the region's id and offsets. Lookups run
    without the GIL and never wait; an address that stays held is found throughout every change.
    """

    def __cinit__(self):
        if plant(&self.tree) < 0:
            raise MemoryError

    def __dealloc__(self):
        fell(&self.tree)

    def add(self, start, length):
        """Add [start, start + length) and return its id.

        Raises RangeError unless the range is whole pages, OverlapError naming both ranges.
        """
        cdef entry_t entry, clash
        cdef int error
        entry.start = entry.base = as_u64(start)
        entry.end = entry.start + check_range(start, length)
        entry.id = self.next_id
        entry.payload = NULL
        lock_tree(&self.tree)
        error = insert(&self.tree, &entry, &clash)
        unlock_tree(&self.tree)
        if error == -EEXIST:
            raise OverlapError(f"[{start:#x}, +{length:#x}) overlaps region {clash.id} at "
                               f"[{clash.start:#x}, +{clash.end - clash.start:#x})")
        if error:
            raise MemoryError
        self.next_id += 1
        return entry.id

    def add_many(self, starts, lengths):
        """Add many ranges at once and return their ids (int64 array); all are added, or none.

        `starts` and `lengths` are uint64 arrays (or sequences of int) of one length. Costs one pass over
        the table. Raises as `add` does.
        """
        starts = as_addresses(starts)
        lengths = as_addresses(lengths)
        if starts.ndim != 1 or starts.shape != lengths.shape:
            raise ValueError(f"starts and lengths must be 1-D and equally long, "
                             f"not {starts.shape} and {lengths.shape}")
        cdef size_t n = starts.shape[0]
        ends = starts + lengths
        bad = np.flatnonzero((lengths == 0) | ((starts | lengths) % PAGE_SIZE != 0)
                             | (ends < starts) | (ends > np.uint64(INT64_MAX)))
        if bad.size:
            check_range(starts[bad[0]], lengths[bad[0]])
        cdef size_t n_held, total, i
        cdef uint64_t version
        cdef entry_t *pieces
        cdef const uint64_t[:] start_view = starts, end_view = ends
        cdef const int64_t[:] order
        while True:
            # numpy may let other threads run, and they may change the table, as the engine's threads may
            # at any time: then all over again.
            pieces = copy_pieces(&self.tree, n, &n_held, &version)
            total = n_held + n
            try:
                for i in range(n):
                    pieces[n_held + i].start = pieces[n_held + i].base = start_view[i]
                    pieces[n_held + i].end = end_view[i]
                    pieces[n_held + i].payload = NULL
                order = by_start(pieces, total)
                for i in range(n):
                    pieces[n_held + i].id = self.next_id + <int64_t>i
                if merge(&self.tree, version, pieces, pieces + total, order):
                    self.next_id += n
                    break
            finally:
                free(pieces)
        return np.arange(self.next_id - n, self.next_id, dtype=np.int64)

    def remove(self, start, length):
        """Remove [start, start + length) from the regions that hold it; the bytes that were held.

        A region that sticks out at either end keeps what is left, under its id and with its offsets.
        Raises RangeError unless the range is whole pages of which some are held.
        """
        cdef uint64_t first = as_u64(start), end = first + check_range(start, length), taken
        cdef int error
        lock_tree(&self.tree)
        error = cut(&self.tree, first, end, &taken)
        unlock_tree(&self.tree)
        if error:
            raise MemoryError
        if taken == 0:
            raise RangeError(f"no region holds any of [{start:#x}, +{length:#x})")
        return taken

    def lookup(self, addresses):
        """Region ids of addresses, -1 where none.

        A uint64 array (1-D, any stride) or a sequence of int gives an int64 array; an int gives an int.
        """
        return self.search(addresses, False)[0]

    def dispatch(self, records):
        """(ids, offsets) of page-fault records of any wire, or of addresses as `lookup` takes them.

        Both are int64; the offset counts bytes from the region's start as it was added. -1 where no region
        holds the address, and for records that are not page faults. Raises RecordError for other arrays.
        """
        return self.search(records, True)

    cdef tuple search(self, what, bint with_offsets):
        cdef entry_t found
        cdef int ticket
        cdef bint held
        cdef uint64_t address
        if isinstance(what, (int, np.integer)):
            address = as_u64(what)
            ticket = enter(&self.tree)
            held = find(&self.tree, address, &found)
            leave(&self.tree, ticket)
            if not held:
                return -1, -1
            return found.id, address - found.base
        wire = wire_of(what)
        array = as_addresses(what) if wire == 0 else what
        if array.ndim != 1:
            raise RecordError(f"need a 1-D array, not one of shape {array.shape}")
        cdef size_t n = array.shape[0]
        ids = np.empty(n, np.int64)
        offsets = np.empty(n, np.int64) if with_offsets else None
        if n == 0:
            return ids, offsets
        cdef int64_t[::1] id_view = ids
        cdef int64_t[::1] offset_view = offsets
        cdef int64_t *offset_out = &offset_view[0] if with_offsets else NULL
        cdef Py_buffer view
        PyObject_GetBuffer(array, &view, PyBUF_STRIDED_RO)
        cdef const char *data = <const char *>view.buf
        cdef Py_ssize_t stride = view.strides[0]
        cdef int form = wire, search = _search
        cdef uint64_t[DECODED] decoded  # stays in the L1 cache between decoding and search
        cdef size_t done = 0, width
        with nogil:
            ticket = enter(&self.tree)
            if form:
                while done < n:
                    width = min(n - done, <size_t>DECODED)
                    fault_addresses(data + <Py_ssize_t>done * stride, stride, width, form, decoded)
                    locate(&self.tree, search, <const char *>decoded, sizeof(uint64_t), width, &id_view[done],
                           NULL if offset_out == NULL else offset_out + done)
                    done += width
            else:
                locate(&self.tree, search, data, stride, n, &id_view[0], offset_out)
            leave(&self.tree, ticket)
        PyBuffer_Release(&view)
        return ids, offsets

    def ranges(self):
        """All pieces in address order: structured array of start, length, id, and offset into the region."""
        cdef size_t n
        cdef uint64_t version
        cdef entry_t *pieces = copy_pieces(&self.tree, 0, &n, &version)
        try:
            table = np.empty(n, RANGES_DTYPE)
            fill_ranges(table, pieces)
        finally:
            free(pieces)
        return table

    def __len__(self):
        cdef size_t n
        lock_tree(&self.tree)
        n = count(&self.tree)
        unlock_tree(&self.tree)
        return n


cdef entry_t *copy_pieces(tree_t *tree, size_t more, size_t *n, uint64_t *version) except NULL:
    """All pieces, and which version of the tree has them; room behind them for `more`, and as much again."""
    cdef size_t room = 0
    cdef entry_t *pieces = NULL
    while True:
        lock_tree(tree)
        n[0] = count(tree)
        version[0] = tree.version
        if pieces != NULL and n[0] <= room:
            list_all(tree, pieces)
            unlock_tree(tree)
            return pieces
        unlock_tree(tree)
        # Not under the lock: a fork() that holds malloc's may wait for a thread that waits for the tree's.
        free(pieces)
        room = n[0]
        pieces = <entry_t *>malloc(2 * (room + more) * sizeof(entry_t) + 1)
        if pieces == NULL:
            raise MemoryError


cdef int fill_ranges(table, const entry_t *pieces) except -1:
    cdef uint64_t[:] starts = table["start"], lengths = table["length"], offsets = table["offset"]
    cdef int64_t[:] ids = table["id"]
    cdef Py_ssize_t i
    for i in range(starts.shape[0]):
        starts[i] = pieces[i].start
        lengths[i] = pieces[i].end - pieces[i].start
        ids[i] = pieces[i].id
        offsets[i] = pieces[i].start - pieces[i].base
    return 0


cdef object by_start(const entry_t *pieces, size_t n):
    """The order of the pieces by their start."""
    cdef size_t i
    starts = np.empty(n, np.uint64)
    cdef uint64_t[::1] view = starts
    for i in range(n):
        view[i] = pieces[i].start
    return np.argsort(starts, kind="stable")


cdef bint merge(tree_t *tree, uint64_t version, const entry_t *pieces, entry_t *ordered,
                const int64_t[:] order) except -1:
    """Put the pieces, in that order, in the place of those of that version; False: there is a newer one.

    OverlapError changes nothing.
    """
    cdef size_t i, n = order.shape[0]
    cdef bint same
    cdef int error = 0
    for i in range(n):
        ordered[i] = pieces[order[i]]
        if i and ordered[i - 1].end > ordered[i].start:
            raise OverlapError(
                f"[{ordered[i].start:#x}, +{ordered[i].end - ordered[i].start:#x}) overlaps "
                f"[{ordered[i - 1].start:#x}, +{ordered[i - 1].end - ordered[i - 1].start:#x})")
    lock_tree(tree)
    same = tree.version == version
    if same and n:
        error = replace_all(tree, ordered, n)
    unlock_tree(tree)
    if error:
        raise MemoryError
    return same


cdef int wire_of(array) except -1:
    """The wire whose record dtype the array has, 0 for none."""
    dtype = getattr(array, "dtype", None)
    if dtype is not None and dtype.names is not None:
        for name, record in DTYPES.items():
            if dtype == record:
                return WIRES[name]
        raise RecordError(f"{dtype} is none of the record dtypes V1_DTYPE, V2_DTYPE and MSG_DTYPE")
    return 0


cdef object as_addresses(values):
    if isinstance(values, np.ndarray):
        if values.dtype != np.uint64:
            raise RecordError(f"addresses must be uint64, not {values.dtype}: use .astype(np.uint64)")
        return values
    return np.fromiter(map(as_u64, values), np.uint64, len(values))


# -- for the engine ------------------------------------------------------------------------------------

cdef uint64_t give_payload(tree_t *tree, uint64_t start, uint64_t end, int64_t id, void *payload) except? 0:
    """`set_payload` as one step of its own: the bytes that have the payload now."""
    cdef uint64_t total
    cdef int error
    lock_tree(tree)
    error = set_payload(tree, start, end, id, payload, &total)
    unlock_tree(tree)
    if error:
        raise MemoryError
    return total


cdef size_t drop_payloads(tree_t *tree) except? 0:
    """How many pieces had one."""
    cdef entry_t entry
    cdef uint64_t at = 0
    cdef size_t n = 0
    while next_entry(tree, at, INT64_MAX, &entry):
        at = entry.end
        if entry.payload != NULL:
            give_payload(tree, entry.start, entry.end, entry.id, NULL)
            n += 1
    return n


cdef int quiesce(tree_t *tree) except -1:
    """Wait until every reader that is inside now has left, and so lets go of the payloads it found."""
    cdef uint64_t target = tree.epoch + 2
    # Not in Python, where a signal handler may raise.
    with nogil:
        while tree.epoch < target:
            lock_tree(tree)
            advance(tree)
            unlock_tree(tree)
            if tree.epoch < target:
                usleep(20)
    return 0
