"""`RegionTable`: disjoint page ranges, and the batched way from addresses to regions.

A B+ tree: one root, an index over its leaves. Leaves hold up to 64 sorted pieces and are never
written once published: a change builds a new leaf and swaps one pointer (and, when leaves come or go,
the root), so that a change costs the same among ten regions and 10^5, and readers need no lock.
Replaced nodes are freed by epochs: a node retired in epoch e goes when no reader that entered in e or
before is left. The search itself is in _search.h.
"""

from cpython.buffer cimport PyBUF_STRIDED_RO, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport INT64_MAX, UINT64_MAX, int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

import time
from operator import index

import numpy as np

from userfault._abi cimport (
    UFFD_EVENT_PAGEFAULT, UFFD_PAGEFAULT, WIRE_MSG, WIRE_V2, add_i64, load_i64, load_ptr, load_u64,
    msg_record, store_ptr, store_u64, v1_record, v2_record,
)
from userfault._ioctl cimport PAGE_SIZE, check_range

from userfault._consts import DTYPES, WIRES
from userfault.errors import OverlapError, RangeError, RecordError

DEF BULK_FILL = 48   # pieces per leaf after add_many: room to add without splitting
DEF DECODED = 512    # addresses

RANGES_DTYPE = np.dtype([("start", "<u8"), ("length", "<u8"), ("id", "<i8"), ("offset", "<u8")])

cdef extern from "_search.h" nogil:
    const int UF_LEAF, UF_LEVELS

    ctypedef struct piece_t "uf_piece":
        uint64_t end
        uint64_t base
        int64_t id
        void *payload

    ctypedef struct leaf_t "uf_leaf":
        void *next
        size_t n
        int64_t *heads
        int64_t *starts
        piece_t *pieces

    ctypedef struct root_t "uf_root":
        void *next
        size_t n_leaves
        int n_levels
        leaf_t **leaves
        int64_t **levels

    int best_search "uf_best_search"()
    void locate "uf_locate"(int search, const root_t *root, const char *addresses, Py_ssize_t stride,
                            size_t n, int64_t *ids, int64_t *offsets)
    const leaf_t *find_leaf "uf_find"(const root_t *root, uint64_t address, size_t *place)

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

# 0: plain C, 1: AVX2, 2: AVX-512. Tests set it to try each that the processor has.
_search = BEST_SEARCH = best_search()


cdef inline size_t nodes(size_t keys) noexcept nogil:
    return (keys + 7) // 8


cdef root_t *new_root(size_t n_leaves) except NULL:
    """A root with room for `n_leaves`: the caller fills `leaves` and `levels[0]`, then calls `index`."""
    cdef size_t keys = n_leaves, room = 0
    cdef int n_levels = 0, level
    while True:
        keys = nodes(keys)
        room += 64 * keys
        n_levels += 1
        if keys == 1:
            break
    cdef size_t header = 64 * ((sizeof(root_t) + n_leaves * sizeof(leaf_t *) + 63) // 64)
    cdef root_t *root = <root_t *>aligned_alloc(64, header + room)
    if root == NULL or n_levels > UF_LEVELS:
        free(root)
        raise MemoryError
    root.next = NULL
    root.n_leaves = n_leaves
    root.n_levels = n_levels
    root.leaves = <leaf_t **>(root + 1)
    cdef int64_t *key = <int64_t *>(<char *>root + header)
    keys = n_leaves
    for level in range(n_levels):
        root.levels[level] = key
        key += 8 * nodes(keys)
        keys = nodes(keys)
    return root


cdef void index_root(root_t *root) noexcept:
    """Fill the levels above levels[0], and the unused places of all."""
    cdef size_t keys = root.n_leaves, i
    cdef int level
    root.levels[0][0] = 0
    for level in range(root.n_levels):
        for i in range(keys, 8 * nodes(keys)):
            root.levels[level][i] = INT64_MAX
        keys = nodes(keys)
        if level + 1 < root.n_levels:
            for i in range(keys):
                root.levels[level + 1][i] = root.levels[level][8 * i]


cdef leaf_t *new_leaf() except NULL:
    cdef leaf_t *leaf = <leaf_t *>aligned_alloc(64, sizeof(leaf_t))
    cdef int i
    if leaf == NULL:
        raise MemoryError
    leaf.next = NULL
    leaf.n = 0
    leaf.heads[0] = 0
    for i in range(1, 8):
        leaf.heads[i] = INT64_MAX
    for i in range(UF_LEAF):
        leaf.starts[i] = INT64_MAX
    return leaf


cdef inline void append(leaf_t *leaf, const entry_t *entry) noexcept nogil:
    cdef size_t i = leaf.n
    leaf.starts[i] = entry.start
    if i and i % 8 == 0:
        leaf.heads[i // 8] = entry.start
    leaf.pieces[i].end = entry.end
    leaf.pieces[i].base = entry.base
    leaf.pieces[i].id = entry.id
    leaf.pieces[i].payload = entry.payload
    leaf.n = i + 1


cdef inline void get(const leaf_t *leaf, size_t i, entry_t *entry) noexcept nogil:
    entry.start = leaf.starts[i]
    entry.end = leaf.pieces[i].end
    entry.base = leaf.pieces[i].base
    entry.id = leaf.pieces[i].id
    entry.payload = leaf.pieces[i].payload


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


cdef inline root_t *tree(RegionTable table) noexcept nogil:
    return <root_t *>table.root


# -- changes: one writer at a time, under the GIL ----------------------------------------------------

cdef void retire(RegionTable table, void *node) noexcept:
    (<void **>node)[0] = table.limbo[table.epoch & 1]
    table.limbo[table.epoch & 1] = node
    advance(table)


cdef void advance(RegionTable table) noexcept:
    # From epoch e to e + 1, once the readers of e - 1 have left; then nobody can hold a node that
    # was retired in e - 1.
    cdef uint64_t other = (table.epoch + 1) & 1
    cdef void *node
    if load_i64(&table.readers[other]) != 0:
        return
    store_u64(&table.epoch, table.epoch + 1)
    while table.limbo[other] != NULL:
        node = table.limbo[other]
        table.limbo[other] = (<void **>node)[0]
        free(node)


cdef int publish(RegionTable table, root_t *root) except -1:
    cdef root_t *old = tree(table)
    store_ptr(<void **>&table.root, root)
    retire(table, old)


cdef int edit(RegionTable table, size_t which, size_t position, size_t removed, entry_t *added,
              size_t n_added) except -1:
    """In leaf `which` replace `removed` pieces from `position` by `added`: one visible step."""
    cdef leaf_t *old = tree(table).leaves[which]
    cdef size_t total = old.n - removed + n_added, i
    cdef entry_t entry
    cdef leaf_t *low
    cdef leaf_t *high = NULL
    if total == 0 and tree(table).n_leaves > 1:
        publish(table, root_with(table, which, NULL, NULL))
        retire(table, old)
        return 0
    low = new_leaf()
    try:
        if total > <size_t>UF_LEAF:
            high = new_leaf()
        for i in range(total):
            if i < position:
                get(old, i, &entry)
            elif i < position + n_added:
                entry = added[i - position]
            else:
                get(old, i - n_added + removed, &entry)
            append(low if high == NULL or i < total // 2 else high, &entry)
        if high == NULL:
            store_ptr(<void **>&tree(table).leaves[which], low)
        else:
            publish(table, root_with(table, which, low, high))
    except MemoryError:
        free(low)
        free(high)
        raise
    retire(table, old)
    return 0


cdef root_t *root_with(RegionTable table, size_t which, leaf_t *low, leaf_t *high) except NULL:
    """A new root whose leaf `which` is replaced by `low` and `high`, or by nothing when they are NULL."""
    cdef root_t *old = tree(table)
    cdef size_t n_new = 0 if low == NULL else 2, i
    cdef root_t *root = new_root(old.n_leaves - 1 + n_new)
    for i in range(root.n_leaves):
        if i < which:
            root.leaves[i] = old.leaves[i]
            root.levels[0][i] = old.levels[0][i]
        elif i < which + n_new:
            root.leaves[i] = low if i == which else high
            root.levels[0][i] = old.levels[0][which] if i == which else high.starts[0]
        else:
            root.leaves[i] = old.leaves[i + 1 - n_new]
            root.levels[0][i] = old.levels[0][i + 1 - n_new]
    index_root(root)
    return root


cdef int make_room(RegionTable table, size_t which, uint64_t end) except -1:
    """Let leaf `which` reach up to `end`, which the next leaf has given up by removals."""
    cdef root_t *root
    cdef size_t n = tree(table).n_leaves, i
    if which + 1 == n or <int64_t>end <= tree(table).levels[0][which + 1]:
        return 0
    root = new_root(n)
    for i in range(n):
        root.leaves[i] = tree(table).leaves[i]
        root.levels[0][i] = tree(table).levels[0][i]
    root.levels[0][which + 1] = root.leaves[which + 1].starts[0]
    index_root(root)
    publish(table, root)
    return 0


cdef size_t leaf_of(RegionTable table, uint64_t address) noexcept:
    """The number of the leaf that holds the address or would."""
    cdef size_t low = 0, high = tree(table).n_leaves, middle
    while high - low > 1:
        middle = (low + high) // 2
        if tree(table).levels[0][middle] <= <int64_t>address:
            low = middle
        else:
            high = middle
    return low


cdef int rebuild(RegionTable table, starts, lengths, order, size_t n_held) except -1:
    """A fresh tree of the present pieces (numbers below `n_held` in `order`) and the new ranges."""
    cdef const uint64_t[:] new_starts = starts
    cdef const uint64_t[:] new_lengths = lengths
    cdef const int64_t[::1] numbers = order
    cdef size_t total = numbers.shape[0], i, j = 0, from_leaf = 0, from_piece = 0
    cdef size_t n_leaves = (total + BULK_FILL - 1) // BULK_FILL
    cdef root_t *old = tree(table)
    cdef root_t *root = new_root(n_leaves)
    cdef leaf_t *leaf
    cdef entry_t entry
    for i in range(n_leaves):
        root.leaves[i] = NULL
    try:
        for i in range(n_leaves):
            root.leaves[i] = new_leaf()
    except MemoryError:
        for i in range(n_leaves):
            free(root.leaves[i])
        free(root)
        raise
    for i in range(total):
        if <size_t>numbers[i] < n_held:
            # The present pieces come in their own order: a stable sort of what was sorted.
            while from_piece == old.leaves[from_leaf].n:
                from_leaf += 1
                from_piece = 0
            get(old.leaves[from_leaf], from_piece, &entry)
            from_piece += 1
        else:
            j = <size_t>numbers[i] - n_held
            entry.start = entry.base = new_starts[j]
            entry.end = new_starts[j] + new_lengths[j]
            entry.id = table.next_id + <int64_t>j
            entry.payload = NULL
        leaf = root.leaves[i // BULK_FILL]
        append(leaf, &entry)
    for i in range(n_leaves):
        root.levels[0][i] = root.leaves[i].starts[0]
    index_root(root)
    # All old nodes are retired in one epoch: none may be freed while the old root leads to it.
    store_ptr(<void **>&table.root, root)
    for i in range(old.n_leaves):
        (<void **>old.leaves[i])[0] = table.limbo[table.epoch & 1]
        table.limbo[table.epoch & 1] = old.leaves[i]
    retire(table, old)
    return 0


cdef class RegionTable:
    """Disjoint, page-aligned ranges with ids 0, 1, 2, … in the order of adding; ids are not used again.

    Removing the middle of a region leaves two pieces with the region's id and offsets. Lookups run
    without the GIL, never wait, and see each change wholly or not at all.
    """

    def __cinit__(self):
        self.root = new_root(1)
        tree(self).n_leaves = 0
        tree(self).leaves[0] = new_leaf()
        tree(self).n_leaves = 1
        index_root(tree(self))

    def __dealloc__(self):
        cdef size_t i
        cdef void *node
        if self.root != NULL:
            for i in range(tree(self).n_leaves):
                free(tree(self).leaves[i])
            free(self.root)
        for i in range(2):
            while self.limbo[i] != NULL:
                node = self.limbo[i]
                self.limbo[i] = (<void **>node)[0]
                free(node)

    cdef int enter(self) noexcept nogil:
        cdef uint64_t epoch
        while True:
            epoch = load_u64(&self.epoch)
            add_i64(&self.readers[epoch & 1], 1)
            if load_u64(&self.epoch) == epoch:
                return epoch & 1
            add_i64(&self.readers[epoch & 1], -1)

    cdef void leave(self, int ticket) noexcept nogil:
        add_i64(&self.readers[ticket], -1)

    cdef bint find(self, uint64_t address, entry_t *found) noexcept nogil:
        cdef size_t place
        cdef const leaf_t *leaf = find_leaf(<const root_t *>load_ptr(<void **>&self.root), address, &place)
        get(leaf, place, found)
        return place < leaf.n and found.start <= address < found.end

    cdef bint empty(self) noexcept nogil:
        cdef const root_t *root = <const root_t *>load_ptr(<void **>&self.root)
        return root.n_leaves == 1 and (<const leaf_t *>load_ptr(<void **>&root.leaves[0])).n == 0

    cdef uint64_t drop(self, uint64_t start, uint64_t end) except? 0:
        """Take [start, end) out of whatever holds it; the bytes taken. A leaf changes in one step."""
        cdef uint64_t taken = 0
        cdef size_t which = leaf_of(self, start)
        cdef size_t first, last, n_kept, n_leaves
        cdef leaf_t *leaf
        cdef entry_t entry
        cdef entry_t kept[2]
        while which < tree(self).n_leaves and (which == 0 or <uint64_t>tree(self).levels[0][which] < end):
            leaf = tree(self).leaves[which]
            first = 0
            while first < leaf.n and leaf.pieces[first].end <= start:
                first += 1
            last = first
            n_kept = 0
            while last < leaf.n and <uint64_t>leaf.starts[last] < end:
                get(leaf, last, &entry)
                taken += min(entry.end, end) - max(entry.start, start)
                if entry.start < start:
                    kept[n_kept] = entry
                    kept[n_kept].end = start
                    n_kept += 1
                if entry.end > end:
                    kept[n_kept] = entry
                    kept[n_kept].start = end
                    n_kept += 1
                last += 1
            n_leaves = tree(self).n_leaves
            if last > first:
                edit(self, which, first, last - first, kept, n_kept)
            # A leaf that became empty is gone, and its successor stands in its place.
            if tree(self).n_leaves >= n_leaves:
                which += 1 + tree(self).n_leaves - n_leaves
        return taken

    cdef int set_payload(self, uint64_t start, uint64_t end, void *payload) except -1:
        """Give every piece within [start, end) the payload."""
        cdef size_t which = leaf_of(self, start)
        cdef size_t i
        cdef leaf_t *old
        cdef leaf_t *leaf
        while which < tree(self).n_leaves and (which == 0 or <uint64_t>tree(self).levels[0][which] < end):
            old = tree(self).leaves[which]
            leaf = new_leaf()
            memcpy(leaf, old, sizeof(leaf_t))
            for i in range(leaf.n):
                if start <= <uint64_t>leaf.starts[i] < end:
                    leaf.pieces[i].payload = payload
            store_ptr(<void **>&tree(self).leaves[which], leaf)
            retire(self, old)
            which += 1
        return 0

    def add(self, uint64_t start, uint64_t length):
        """Add [start, start + length) and return its id.

        Raises RangeError unless the range is whole pages, OverlapError naming both ranges.
        """
        check_range(start, length)
        cdef entry_t entry, other
        cdef size_t which = leaf_of(self, start)
        cdef leaf_t *leaf = tree(self).leaves[which]
        cdef size_t position = 0
        while position < leaf.n and <uint64_t>leaf.starts[position] < start:
            position += 1
        if position > 0:
            get(leaf, position - 1, &other)
            refuse_overlap(start, length, &other)
        if position < leaf.n:
            get(leaf, position, &other)
            refuse_overlap(start, length, &other)
        elif which + 1 < tree(self).n_leaves:
            get(tree(self).leaves[which + 1], 0, &other)
            refuse_overlap(start, length, &other)
        entry.start = entry.base = start
        entry.end = start + length
        entry.id = self.next_id
        entry.payload = NULL
        make_room(self, which, entry.end)
        edit(self, which, position, 0, &entry, 1)
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
        held = self.ranges()
        all_starts = np.concatenate([held["start"], starts])
        all_lengths = np.concatenate([held["length"], lengths])
        order = np.argsort(all_starts, kind="stable")
        ends = (all_starts + all_lengths)[order]
        clash = np.flatnonzero(ends[:ends.size - 1] > all_starts[order][1:])
        if clash.size:
            a, b = sorted(order[clash[0]:clash[0] + 2], reverse=True)
            raise OverlapError(f"[{all_starts[a]:#x}, +{all_lengths[a]:#x}) overlaps "
                               f"[{all_starts[b]:#x}, +{all_lengths[b]:#x})")
        ids = np.arange(self.next_id, self.next_id + n, dtype=np.int64)
        if n:
            rebuild(self, starts, lengths, np.ascontiguousarray(order), held.size)
            self.next_id += n
        return ids

    def remove(self, uint64_t start, uint64_t length):
        """Remove [start, start + length) from the regions that hold it; the bytes that were held.

        A region that sticks out at either end keeps what is left, under its id and with its offsets.
        Raises RangeError unless the range is whole pages of which some are held.
        """
        check_range(start, length)
        cdef uint64_t taken = self.drop(start, start + length)
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
        if isinstance(what, (int, np.integer)):
            ticket = self.enter()
            held = self.find(what, &found)
            self.leave(ticket)
            if not held:
                return -1, -1
            return found.id, <uint64_t>what - found.base
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
        cdef const root_t *root
        with nogil:
            ticket = self.enter()
            root = <const root_t *>load_ptr(<void **>&self.root)
            if form:
                while done < n:
                    width = min(n - done, <size_t>DECODED)
                    fault_addresses(data + <Py_ssize_t>done * stride, stride, width, form, decoded)
                    locate(search, root, <const char *>decoded, sizeof(uint64_t), width, &id_view[done],
                           NULL if offset_out == NULL else offset_out + done)
                    done += width
            else:
                locate(search, root, data, stride, n, &id_view[0], offset_out)
            self.leave(ticket)
        PyBuffer_Release(&view)
        return ids, offsets

    def ranges(self):
        """All pieces in address order: structured array of start, length, id, and offset into the region."""
        table = np.empty(len(self), RANGES_DTYPE)
        cdef uint64_t[:] starts = table["start"], lengths = table["length"], offsets = table["offset"]
        cdef int64_t[:] ids = table["id"]
        cdef size_t which, i, row = 0
        cdef entry_t entry
        for which in range(tree(self).n_leaves):
            for i in range(tree(self).leaves[which].n):
                get(tree(self).leaves[which], i, &entry)
                starts[row] = entry.start
                lengths[row] = entry.end - entry.start
                ids[row] = entry.id
                offsets[row] = entry.start - entry.base
                row += 1
        return table

    def quiesce(self):
        """Wait until every reader that is inside now has left, and so lets go of the payloads it found."""
        cdef uint64_t target = self.epoch + 2
        advance(self)
        while self.epoch < target:
            time.sleep(20e-6)
            advance(self)

    def __len__(self):
        cdef size_t i, total = 0
        for i in range(tree(self).n_leaves):
            total += tree(self).leaves[i].n
        return total


cdef int refuse_overlap(uint64_t start, uint64_t length, const entry_t *other) except -1:
    if start < other.end and other.start < start + length:
        raise OverlapError(f"[{start:#x}, +{length:#x}) overlaps region {other.id} at "
                           f"[{other.start:#x}, +{other.end - other.start:#x})")
    return 0


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
    return np.fromiter(map(index, values), np.uint64, len(values))
