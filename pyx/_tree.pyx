"""The tree under `RegionTable`: lock-free to read, copied on write.

A B+ tree: one root, an index over its leaves. Leaves hold up to 64 sorted pieces and are never
written once published: a change builds a new leaf and swaps one pointer (and, when leaves come or go,
the root), so that a change costs the same among ten regions and 10^5, and readers need no lock.
Replaced nodes are freed by epochs: a node retired in epoch e goes when no reader that entered in e or
before is left. The search itself is in _search.h.

Writers take turns by a lock of the tree's own, and get their memory from its slab: the threads of an
engine, which may neither take the GIL nor call malloc, are among them.
"""

from libc.errno cimport EEXIST, ENOMEM
from libc.stdint cimport SIZE_MAX, UINT64_MAX, int64_t, uint64_t
from libc.string cimport memcpy

from userfault._abi cimport (
    add_i64, getpid, load_i64, load_int, load_ptr, load_u64, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, store_int, store_ptr, store_u64, swap_int_if,
)
from userfault._node cimport (
    UF_LEAF, append, free_leaf, free_root, get, index_root, leaf_of, leaf_t, new_leaf, new_root, root_t,
)
from userfault._slab cimport slab_unmap

DEF BULK_FILL = 48   # pieces per leaf of a new tree: room to add without splitting

cdef extern from "_search.h" nogil:
    int c_best_search "uf_best_search"()
    void c_locate "uf_locate"(int search, const root_t *root, const char *addresses, Py_ssize_t stride,
                              size_t n, int64_t *ids, int64_t *offsets)
    const leaf_t *find_leaf "uf_find"(const root_t *root, uint64_t address, size_t *place)

cdef extern from "<sched.h>" nogil:
    int sched_yield()


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


cdef bint before(tree_t *tree, uint64_t address, entry_t *found) noexcept nogil:
    """The last piece that starts at or below the address, whether or not it holds it."""
    cdef const root_t *root = published(tree)
    cdef const leaf_t *leaf
    cdef size_t which = leaf_of(root, address) + 1, i
    # A leaf whose first pieces were removed may begin above the address: then it is the last of another.
    while which > 0:
        which -= 1
        leaf = <const leaf_t *>load_ptr(<void **>&root.leaves[which])
        for i in range(leaf.n, 0, -1):
            if <uint64_t>leaf.starts[i - 1] <= address:
                get(leaf, i - 1, found)
                return True
    return False


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


# -- writers -----------------------------------------------------------------------------------------

cdef int plant(tree_t *tree) noexcept nogil:
    """Make an empty tree of zeroed memory."""
    cdef leaf_t *leaf = new_leaf(&tree.slab)
    cdef root_t *root = new_root(&tree.slab, 1)
    if leaf == NULL or root == NULL:
        return -ENOMEM
    root.leaves[0] = leaf
    index_root(root)
    tree.root = root
    pthread_mutex_init(&tree.lock, NULL)
    tree.pid = getpid()
    return 0


cdef void fell(tree_t *tree) noexcept nogil:
    """Free everything; no reader or writer may be inside."""
    slab_unmap(&tree.slab)


cdef void lock_tree(tree_t *tree) noexcept nogil:
    cdef int pid = getpid(), seen
    while True:
        seen = load_int(&tree.pid)
        if seen == pid:
            break
        if seen == -pid:
            sched_yield()
        elif swap_int_if(&tree.pid, seen, -pid):
            # A fork child has none of the threads that were inside when it was forked.
            pthread_mutex_init(&tree.lock, NULL)
            tree.readers[0] = tree.readers[1] = 0
            store_int(&tree.pid, pid)
    pthread_mutex_lock(&tree.lock)


cdef void unlock_tree(tree_t *tree) noexcept nogil:
    pthread_mutex_unlock(&tree.lock)


cdef void retire_leaf(tree_t *tree, leaf_t *leaf) noexcept nogil:
    """Have a leaf freed that nothing leads to any more; `advance` is the caller's."""
    leaf.next = tree.limbo_leaves[tree.epoch & 1]
    tree.limbo_leaves[tree.epoch & 1] = leaf


cdef void advance(tree_t *tree) noexcept nogil:
    # From epoch e to e + 1, once the readers of e - 1 have left; then nobody can hold a node that
    # was retired in e - 1.
    cdef uint64_t other = (tree.epoch + 1) & 1
    cdef leaf_t *leaf
    cdef root_t *root
    if load_i64(&tree.readers[other]) != 0:
        return
    store_u64(&tree.epoch, tree.epoch + 1)
    while tree.limbo_leaves[other] != NULL:
        leaf = <leaf_t *>tree.limbo_leaves[other]
        tree.limbo_leaves[other] = leaf.next
        free_leaf(&tree.slab, leaf)
    while tree.limbo_roots[other] != NULL:
        root = <root_t *>tree.limbo_roots[other]
        tree.limbo_roots[other] = root.next
        free_root(&tree.slab, root)


cdef void publish_leaf(tree_t *tree, size_t which, leaf_t *leaf) noexcept nogil:
    """Put a leaf in the place of leaf `which`."""
    cdef leaf_t *old = trunk(tree).leaves[which]
    store_ptr(<void **>&trunk(tree).leaves[which], leaf)
    retire_leaf(tree, old)
    tree.version += 1
    advance(tree)


cdef void publish_root(tree_t *tree, root_t *root, leaf_t **dropped, size_t n_dropped) noexcept nogil:
    """Put a root in the place of the old one, some leaves of which it has no more."""
    cdef root_t *old = trunk(tree)
    cdef size_t i
    store_ptr(&tree.root, root)
    # All in one epoch: none may be freed while the old root leads to it.
    for i in range(n_dropped):
        retire_leaf(tree, dropped[i])
    old.next = tree.limbo_roots[tree.epoch & 1]
    tree.limbo_roots[tree.epoch & 1] = old
    tree.version += 1
    advance(tree)


cdef int edit(tree_t *tree, size_t which, size_t position, size_t removed, entry_t *added,
              size_t n_added) noexcept nogil:
    """In leaf `which` replace `removed` pieces from `position` by `added`: one visible step."""
    cdef leaf_t *old = trunk(tree).leaves[which]
    cdef size_t total = old.n - removed + n_added, i
    cdef bint none = total == 0 and trunk(tree).n_leaves > 1, two = total > <size_t>UF_LEAF
    cdef leaf_t *low = NULL if none else new_leaf(&tree.slab)
    cdef leaf_t *high = new_leaf(&tree.slab) if two else NULL
    cdef root_t *root = NULL
    cdef entry_t entry
    if (low != NULL or none) and (high != NULL or not two):
        for i in range(total):
            if i < position:
                get(old, i, &entry)
            elif i < position + n_added:
                entry = added[i - position]
            else:
                get(old, i - n_added + removed, &entry)
            append(high if two and i >= total // 2 else low, &entry)
        if not none and not two:
            publish_leaf(tree, which, low)
            return 0
        root = root_with(tree, which, low, high)
    if root == NULL:
        free_leaf(&tree.slab, low)
        free_leaf(&tree.slab, high)
        return -ENOMEM
    publish_root(tree, root, &old, 1)
    return 0


cdef root_t *root_with(tree_t *tree, size_t which, leaf_t *low, leaf_t *high) noexcept nogil:
    """A new root whose leaf `which` is replaced by `low` and `high`, either of which may be NULL."""
    cdef root_t *old = trunk(tree)
    cdef size_t n_new = <size_t>(low != NULL) + <size_t>(high != NULL), i
    cdef root_t *root = new_root(&tree.slab, old.n_leaves - 1 + n_new)
    if root == NULL:
        return NULL
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


cdef int make_room(tree_t *tree, size_t which, uint64_t end) noexcept nogil:
    """Let leaf `which` reach up to `end`, which the next leaf has given up by removals."""
    cdef root_t *root
    if which + 1 == trunk(tree).n_leaves or end <= <uint64_t>trunk(tree).levels[0][which + 1]:
        return 0
    root = root_with(tree, which, trunk(tree).leaves[which], NULL)
    if root == NULL:
        return -ENOMEM
    root.levels[0][which + 1] = root.leaves[which + 1].starts[0]
    index_root(root)
    publish_root(tree, root, NULL, 0)
    return 0


cdef inline bint begins_below(tree_t *tree, size_t which, uint64_t end) noexcept nogil:
    """Whether there is a leaf `which` that can hold something below `end`."""
    return which < trunk(tree).n_leaves and <uint64_t>trunk(tree).levels[0][which] < end


cdef int cut(tree_t *tree, uint64_t start, uint64_t end, uint64_t *taken) noexcept nogil:
    """Take [start, end) out of whatever holds it; the bytes taken. A leaf changes in one step."""
    cdef size_t which = leaf_of(trunk(tree), start)
    cdef size_t first, last, n_kept, n_leaves
    cdef leaf_t *leaf
    cdef entry_t entry
    cdef entry_t kept[2]
    taken[0] = 0
    while begins_below(tree, which, end):
        leaf = trunk(tree).leaves[which]
        first = 0
        while first < leaf.n and leaf.pieces[first].end <= start:
            first += 1
        last = first
        n_kept = 0
        while last < leaf.n and <uint64_t>leaf.starts[last] < end:
            get(leaf, last, &entry)
            taken[0] += min(entry.end, end) - max(entry.start, start)
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
        if last > first and edit(tree, which, first, last - first, kept, n_kept) < 0:
            return -ENOMEM
        # A leaf that became empty is gone, and its successor stands in its place.
        if trunk(tree).n_leaves >= n_leaves:
            which += 1 + trunk(tree).n_leaves - n_leaves
    return 0


cdef int set_payload(tree_t *tree, uint64_t start, uint64_t end, int64_t id, void *payload,
                     uint64_t *total) noexcept nogil:
    """Give every piece of region `id` within [start, end) the payload; the bytes that have it now."""
    cdef size_t which = leaf_of(trunk(tree), start)
    cdef size_t i
    cdef leaf_t *old
    cdef leaf_t *leaf
    total[0] = 0
    while begins_below(tree, which, end):
        old = trunk(tree).leaves[which]
        leaf = NULL
        for i in range(old.n):
            if old.pieces[i].id == id and start <= <uint64_t>old.starts[i] < end:
                if leaf == NULL:
                    leaf = new_leaf(&tree.slab)
                    if leaf == NULL:
                        return -ENOMEM
                    memcpy(leaf, old, sizeof(leaf_t))
                leaf.pieces[i].payload = payload
                total[0] += old.pieces[i].end - <uint64_t>old.starts[i]
        if leaf != NULL:
            publish_leaf(tree, which, leaf)
        which += 1
    return 0


cdef bint overlap(const entry_t *entry, const leaf_t *leaf, size_t i, entry_t *other) noexcept nogil:
    get(leaf, i, other)
    return entry.start < other.end and other.start < entry.end


cdef int insert(tree_t *tree, const entry_t *entry, entry_t *clash) noexcept nogil:
    """Add the piece; or change nothing, fill `clash` with one that overlaps, and return -EEXIST."""
    cdef size_t which = leaf_of(trunk(tree), entry.start), position = 0
    cdef leaf_t *leaf = trunk(tree).leaves[which]
    cdef entry_t added = entry[0]
    while position < leaf.n and <uint64_t>leaf.starts[position] < entry.start:
        position += 1
    if position > 0 and overlap(entry, leaf, position - 1, clash):
        return -EEXIST
    if position < leaf.n and overlap(entry, leaf, position, clash):
        return -EEXIST
    if position == leaf.n and which + 1 < trunk(tree).n_leaves:
        if overlap(entry, trunk(tree).leaves[which + 1], 0, clash):
            return -EEXIST
    if make_room(tree, which, entry.end) < 0:
        return -ENOMEM
    return edit(tree, which, position, 0, &added, 1)


cdef int replace_all(tree_t *tree, const entry_t *entries, size_t n) noexcept nogil:
    """A fresh tree of n > 0 sorted, disjoint pieces takes the place of all that there is."""
    cdef size_t n_leaves = (n + BULK_FILL - 1) // BULK_FILL, i, k
    cdef root_t *root = new_root(&tree.slab, n_leaves)
    if root == NULL:
        return -ENOMEM
    for i in range(n_leaves):
        root.leaves[i] = new_leaf(&tree.slab)
        if root.leaves[i] == NULL:
            for k in range(i):
                free_leaf(&tree.slab, root.leaves[k])
            free_root(&tree.slab, root)
            return -ENOMEM
    for i in range(n):
        append(root.leaves[i // BULK_FILL], &entries[i])
    for i in range(n_leaves):
        root.levels[0][i] = root.leaves[i].starts[0]
    index_root(root)
    publish_root(tree, root, trunk(tree).leaves, trunk(tree).n_leaves)
    return 0


cdef size_t count(tree_t *tree) noexcept nogil:
    cdef size_t i, total = 0
    for i in range(trunk(tree).n_leaves):
        total += trunk(tree).leaves[i].n
    return total


cdef void list_all(tree_t *tree, entry_t *entries) noexcept nogil:
    """All `count` pieces in address order."""
    list_range(tree, 0, UINT64_MAX, entries, SIZE_MAX)


cdef bint next_entry(tree_t *tree, uint64_t start, uint64_t end, entry_t *entry) noexcept nogil:
    """The first piece that overlaps [start, end), clipped to it; False when there is none. Takes the lock."""
    cdef size_t found
    lock_tree(tree)
    found = list_range(tree, start, end, entry, 1)
    unlock_tree(tree)
    return found == 1


cdef size_t list_range(tree_t *tree, uint64_t start, uint64_t end, entry_t *entries,
                       size_t room) noexcept nogil:
    """The pieces that overlap [start, end), in order and clipped to it, at most `room`; how many."""
    cdef size_t which = leaf_of(trunk(tree), start), i, k = 0
    cdef leaf_t *leaf
    while start < end and k < room and begins_below(tree, which, end):
        leaf = trunk(tree).leaves[which]
        for i in range(leaf.n):
            if k < room and leaf.pieces[i].end > start and <uint64_t>leaf.starts[i] < end:
                get(leaf, i, &entries[k])
                entries[k].start = max(entries[k].start, start)
                entries[k].end = min(entries[k].end, end)
                k += 1
        which += 1
    return k
