"""The tree under `RegionTable`: lock-free to read, copied on write.

A B+ tree: one root, an index over its leaves. Leaves hold up to 64 sorted pieces and are never
written once published: a change builds a new leaf and swaps one pointer (and, when leaves come or go,
the root), so that a change costs the same among ten regions and 10^5, and readers need no lock.
Replaced nodes are freed by epochs: a node retired in epoch e goes when no reader that entered in e or
before is left. The search itself is in _search.h.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from userfault._abi cimport add_i64, aligned_alloc, getpid, load_i64, load_ptr, load_u64, store_ptr, store_u64

DEF BULK_FILL = 48   # pieces per leaf of a new tree: room to add without splitting

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

    int c_best_search "uf_best_search"()
    void c_locate "uf_locate"(int search, const root_t *root, const char *addresses, Py_ssize_t stride,
                              size_t n, int64_t *ids, int64_t *offsets)
    const leaf_t *find_leaf "uf_find"(const root_t *root, uint64_t address, size_t *place)


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
    leaf.pieces[0].end = 0  # an empty leaf is searched like any other
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


cdef inline root_t *trunk(tree_t *tree) noexcept nogil:
    """The root, for the writer."""
    return <root_t *>tree.root


cdef inline const root_t *published(tree_t *tree) noexcept nogil:
    """The root, for readers."""
    return <const root_t *>load_ptr(&tree.root)


# -- readers -----------------------------------------------------------------------------------------

cdef int enter(tree_t *tree) noexcept nogil:
    cdef uint64_t epoch
    while True:
        epoch = load_u64(&tree.epoch)
        add_i64(&tree.readers[epoch & 1], 1)
        if load_u64(&tree.epoch) == epoch:
            return epoch & 1
        add_i64(&tree.readers[epoch & 1], -1)


cdef void leave(tree_t *tree, int ticket) noexcept nogil:
    add_i64(&tree.readers[ticket], -1)


cdef bint find(tree_t *tree, uint64_t address, entry_t *found) noexcept nogil:
    cdef size_t place
    cdef const leaf_t *leaf = find_leaf(published(tree), address, &place)
    get(leaf, place, found)
    return place < leaf.n and found.start <= address < found.end


cdef bint empty(tree_t *tree) noexcept nogil:
    cdef int ticket = enter(tree)
    cdef const root_t *root = published(tree)
    cdef bint nothing = root.n_leaves == 1 and (<const leaf_t *>load_ptr(<void **>&root.leaves[0])).n == 0
    leave(tree, ticket)
    return nothing


cdef void locate(tree_t *tree, int search, const char *addresses, Py_ssize_t stride, size_t n,
                 int64_t *ids, int64_t *offsets) noexcept nogil:
    """Addresses to ids and, unless `offsets` is NULL, offsets; -1 where no piece holds one."""
    c_locate(search, published(tree), addresses, stride, n, ids, offsets)


cdef int best_search() noexcept nogil:
    """The fastest `search` that this processor has: 0 is plain C, 1 AVX2, 2 AVX-512."""
    return c_best_search()


# -- the writer --------------------------------------------------------------------------------------

cdef int plant(tree_t *tree) except -1:
    """Make an empty tree of zeroed memory."""
    cdef leaf_t *leaf = new_leaf()
    cdef root_t *root
    try:
        root = new_root(1)
    except MemoryError:
        free(leaf)
        raise
    root.leaves[0] = leaf
    index_root(root)
    tree.root = root
    tree.pid = getpid()
    return 0


cdef void fell(tree_t *tree) noexcept:
    """Free everything; no reader may be inside."""
    cdef size_t i
    cdef void *node
    if tree.root != NULL:
        for i in range(trunk(tree).n_leaves):
            free(trunk(tree).leaves[i])
        free(tree.root)
    for i in range(2):
        while tree.limbo[i] != NULL:
            node = tree.limbo[i]
            tree.limbo[i] = (<void **>node)[0]
            free(node)


cdef void retire(tree_t *tree, void *node) noexcept:
    (<void **>node)[0] = tree.limbo[tree.epoch & 1]
    tree.limbo[tree.epoch & 1] = node
    tree.version += 1
    advance(tree)


cdef void advance(tree_t *tree) noexcept:
    # From epoch e to e + 1, once the readers of e - 1 have left; then nobody can hold a node that
    # was retired in e - 1.
    cdef uint64_t other = (tree.epoch + 1) & 1
    cdef void *node
    if tree.pid != getpid():
        # A fork child has none of the threads that were inside when it was forked.
        tree.pid = getpid()
        tree.readers[0] = tree.readers[1] = 0
    if load_i64(&tree.readers[other]) != 0:
        return
    store_u64(&tree.epoch, tree.epoch + 1)
    while tree.limbo[other] != NULL:
        node = tree.limbo[other]
        tree.limbo[other] = (<void **>node)[0]
        free(node)


cdef int publish(tree_t *tree, root_t *root) except -1:
    cdef root_t *old = trunk(tree)
    store_ptr(&tree.root, root)
    retire(tree, old)


cdef int edit(tree_t *tree, size_t which, size_t position, size_t removed, entry_t *added,
              size_t n_added) except -1:
    """In leaf `which` replace `removed` pieces from `position` by `added`: one visible step."""
    cdef leaf_t *old = trunk(tree).leaves[which]
    cdef size_t total = old.n - removed + n_added, i
    cdef entry_t entry
    cdef leaf_t *low
    cdef leaf_t *high = NULL
    if total == 0 and trunk(tree).n_leaves > 1:
        publish(tree, root_with(tree, which, NULL, NULL))
        retire(tree, old)
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
            store_ptr(<void **>&trunk(tree).leaves[which], low)
        else:
            publish(tree, root_with(tree, which, low, high))
    except MemoryError:
        free(low)
        free(high)
        raise
    retire(tree, old)
    return 0


cdef root_t *root_with(tree_t *tree, size_t which, leaf_t *low, leaf_t *high) except NULL:
    """A new root whose leaf `which` is replaced by `low` and `high`, or by nothing when they are NULL."""
    cdef root_t *old = trunk(tree)
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


cdef int make_room(tree_t *tree, size_t which, uint64_t end) except -1:
    """Let leaf `which` reach up to `end`, which the next leaf has given up by removals."""
    cdef root_t *root
    cdef size_t n = trunk(tree).n_leaves, i
    if which + 1 == n or <int64_t>end <= trunk(tree).levels[0][which + 1]:
        return 0
    root = new_root(n)
    for i in range(n):
        root.leaves[i] = trunk(tree).leaves[i]
        root.levels[0][i] = trunk(tree).levels[0][i]
    root.levels[0][which + 1] = root.leaves[which + 1].starts[0]
    index_root(root)
    publish(tree, root)
    return 0


cdef size_t leaf_of(tree_t *tree, uint64_t address) noexcept:
    """The number of the leaf that holds the address or would."""
    cdef size_t low = 0, high = trunk(tree).n_leaves, middle
    while high - low > 1:
        middle = (low + high) // 2
        if trunk(tree).levels[0][middle] <= <int64_t>address:
            low = middle
        else:
            high = middle
    return low


cdef uint64_t cut(tree_t *tree, uint64_t start, uint64_t end) except? 0:
    """Take [start, end) out of whatever holds it; the bytes taken. A leaf changes in one step."""
    cdef uint64_t taken = 0
    cdef size_t which = leaf_of(tree, start)
    cdef size_t first, last, n_kept, n_leaves
    cdef leaf_t *leaf
    cdef entry_t entry
    cdef entry_t kept[2]
    while which < trunk(tree).n_leaves and (which == 0 or <uint64_t>trunk(tree).levels[0][which] < end):
        leaf = trunk(tree).leaves[which]
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
        n_leaves = trunk(tree).n_leaves
        if last > first:
            edit(tree, which, first, last - first, kept, n_kept)
        # A leaf that became empty is gone, and its successor stands in its place.
        if trunk(tree).n_leaves >= n_leaves:
            which += 1 + trunk(tree).n_leaves - n_leaves
    return taken


cdef uint64_t set_payload(tree_t *tree, uint64_t start, uint64_t end, int64_t id, void *payload) except? 0:
    """Give every piece of region `id` within [start, end) the payload; the bytes that have it now."""
    cdef size_t which = leaf_of(tree, start)
    cdef uint64_t total = 0
    cdef size_t i
    cdef leaf_t *old
    cdef leaf_t *leaf
    while which < trunk(tree).n_leaves and (which == 0 or <uint64_t>trunk(tree).levels[0][which] < end):
        old = trunk(tree).leaves[which]
        leaf = new_leaf()
        memcpy(leaf, old, sizeof(leaf_t))
        for i in range(leaf.n):
            if leaf.pieces[i].id == id and start <= <uint64_t>leaf.starts[i] < end:
                leaf.pieces[i].payload = payload
                total += leaf.pieces[i].end - <uint64_t>leaf.starts[i]
        store_ptr(<void **>&trunk(tree).leaves[which], leaf)
        retire(tree, old)
        which += 1
    return total


cdef bint overlap(const entry_t *entry, const leaf_t *leaf, size_t i, entry_t *other) noexcept:
    get(leaf, i, other)
    return entry.start < other.end and other.start < entry.end


cdef bint insert(tree_t *tree, const entry_t *entry, entry_t *clash) except -1:
    """Add the piece; or change nothing, fill `clash` with one that overlaps, and return True."""
    cdef size_t which = leaf_of(tree, entry.start), position = 0
    cdef leaf_t *leaf = trunk(tree).leaves[which]
    cdef entry_t added = entry[0]
    while position < leaf.n and <uint64_t>leaf.starts[position] < entry.start:
        position += 1
    if position > 0 and overlap(entry, leaf, position - 1, clash):
        return True
    if position < leaf.n and overlap(entry, leaf, position, clash):
        return True
    if position == leaf.n and which + 1 < trunk(tree).n_leaves:
        if overlap(entry, trunk(tree).leaves[which + 1], 0, clash):
            return True
    make_room(tree, which, entry.end)
    edit(tree, which, position, 0, &added, 1)
    return False


cdef int replace_all(tree_t *tree, const entry_t *entries, size_t n) except -1:
    """A fresh tree of n > 0 sorted, disjoint pieces takes the place of all that there is."""
    cdef size_t n_leaves = (n + BULK_FILL - 1) // BULK_FILL, i
    cdef root_t *old = trunk(tree)
    cdef root_t *root = new_root(n_leaves)
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
    for i in range(n):
        append(root.leaves[i // BULK_FILL], &entries[i])
    for i in range(n_leaves):
        root.levels[0][i] = root.leaves[i].starts[0]
    index_root(root)
    # All old nodes are retired in one epoch: none may be freed while the old root leads to it.
    store_ptr(&tree.root, root)
    for i in range(old.n_leaves):
        (<void **>old.leaves[i])[0] = tree.limbo[tree.epoch & 1]
        tree.limbo[tree.epoch & 1] = old.leaves[i]
    retire(tree, old)
    return 0


cdef size_t count(tree_t *tree) noexcept:
    cdef size_t i, total = 0
    for i in range(trunk(tree).n_leaves):
        total += trunk(tree).leaves[i].n
    return total


cdef void list_all(tree_t *tree, entry_t *entries) noexcept:
    """All `count` pieces in address order."""
    cdef size_t which, i, k = 0
    for which in range(trunk(tree).n_leaves):
        for i in range(trunk(tree).leaves[which].n):
            get(trunk(tree).leaves[which], i, &entries[k])
            k += 1
