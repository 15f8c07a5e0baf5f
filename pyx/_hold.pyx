"""What is there of a region that a budget limits, and where its blocks are in the budget's queues.

Under the budget's lock, except for regions without a limit.
"""

from libc.stdint cimport uint64_t

from userfault._abi cimport (
    add_u64, and_u64, fetch_and_u64, fetch_or_u64, load_u64, or_u64, pthread_mutex_lock,
    pthread_mutex_unlock,
)
from userfault._bits cimport clear_bits, mask, n_set, set_bits
from userfault._budget cimport (
    ABSENT, BLOCK_PAGES, FRESH, GHOST, KEPT, block_of, budget_t, entry_of, fifo_t, is_whole, member_of, push,
)
from userfault._served cimport HUGE_PAGES, hold_t, served_t

cdef extern from *:
    int __builtin_ctzll(unsigned long long) nogil
    int __builtin_popcountll(unsigned long long) nogil


cdef bint any_changed(const served_t *served, uint64_t first, uint64_t end) noexcept nogil:
    """Whether any of the pages [first, end) is changed, or about to be, or just being written back."""
    cdef const hold_t *hold = served.hold
    cdef uint64_t found
    if hold == NULL or hold.changed == NULL:
        return False
    while first < end:
        found = load_u64(&hold.changed[first // 64]) | load_u64(&hold.writing[first // 64])
        if found & mask(first, end):
            return True
        first = (first // 64 + 1) * 64
    return False


cdef void there(served_t *served, uint64_t first, uint64_t end, bint asked) noexcept nogil:
    """Note that the pages [first, end) are there; `asked`: somebody has said that they will be used."""
    cdef hold_t *hold = served.hold
    if hold == NULL or (hold.blocks == NULL and hold.changed == NULL):
        set_bits(served.resident, first, end)
        return
    pthread_mutex_lock(&hold.budget.lock)
    take_in(served, first, end, asked)
    pthread_mutex_unlock(&hold.budget.lock)


cdef void take_in(served_t *served, uint64_t first, uint64_t end, bint asked) noexcept nogil:
    """As `there`, with the budget's lock held."""
    cdef hold_t *hold = served.hold
    cdef uint64_t block, stop, bits, added
    if hold.blocks == NULL:
        set_bits(served.resident, first, end)
        return
    while first < end:
        block = first // BLOCK_PAGES
        stop = min((block + 1) * BLOCK_PAGES, end)
        bits = mask(first, stop)
        added = __builtin_popcountll(bits & ~fetch_or_u64(&served.resident[first // 64], bits))
        if added and hold.member >= 0:
            enqueue(served, block, added, asked,
                    served.huge and first % HUGE_PAGES == 0 and end - first >= HUGE_PAGES)
        first = stop


cdef void gone(served_t *served, uint64_t first, uint64_t end) noexcept nogil:
    """Note that the pages [first, end) are missing."""
    cdef hold_t *hold = served.hold
    if hold == NULL or (hold.blocks == NULL and hold.changed == NULL):
        clear_bits(served.resident, first, end)
        return
    pthread_mutex_lock(&hold.budget.lock)
    take_out(served, first, end)
    pthread_mutex_unlock(&hold.budget.lock)


cdef uint64_t take_out(served_t *served, uint64_t first, uint64_t end) noexcept nogil:
    """As `gone`, with the budget's lock held; how many of them were there."""
    cdef hold_t *hold = served.hold
    cdef budget_t *budget = hold.budget
    cdef uint64_t stop, bits, removed, total = 0
    cdef unsigned char state
    if hold.blocks == NULL:
        total = n_set(served.resident, first, end)
        clear_bits(served.resident, first, end)
        return total
    while first < end:
        stop = min((first // BLOCK_PAGES + 1) * BLOCK_PAGES, end)
        bits = mask(first, stop)
        removed = __builtin_popcountll(bits & fetch_and_u64(&served.resident[first // 64], ~bits))
        state = hold.blocks[first // BLOCK_PAGES]
        if state == FRESH:
            budget.fresh.pages -= removed
        elif state == KEPT:
            budget.kept.pages -= removed
        total += removed
        first = stop
    if hold.member >= 0:
        hold.pages -= total
        add_u64(&budget.resident, -total)
    return total


cdef void enqueue(served_t *served, uint64_t block, uint64_t added, bint asked, bint whole) noexcept nogil:
    """So many pages of a block have come. With `whole` it is the first of a huge page that comes."""
    cdef hold_t *hold = served.hold
    cdef budget_t *budget = hold.budget
    cdef fifo_t *queue = &budget.fresh
    cdef unsigned char state = hold.blocks[block]
    cdef uint64_t i, n = 1
    hold.pages += added
    add_u64(&budget.resident, added)
    if state == KEPT or state == GHOST or (asked and state == ABSENT):
        queue = &budget.kept
    if state == ABSENT:
        # Also those that stayed when it was let go of last, and that nobody has counted since.
        added = n_set(served.resident, block * BLOCK_PAGES, min((block + 1) * BLOCK_PAGES, served.n_pages))
    queue.pages += added
    if state == FRESH or state == KEPT:
        return
    if whole:
        n = HUGE_PAGES // BLOCK_PAGES
        for i in range(n):
            if hold.blocks[block + i] == FRESH or hold.blocks[block + i] == KEPT:
                n = 1
                break
    put_back(budget, queue, entry_of(hold.member, block, n > 1))
    for i in range(n):
        hold.blocks[block + i] = FRESH if queue == &budget.fresh else KEPT


cdef void put_back(budget_t *budget, fifo_t *queue, uint64_t entry) noexcept nogil:
    """Put a block into a queue, as its last."""
    if not push(queue, entry):
        # Full of blocks of which others than us have let go.
        sift(budget, queue, -1)
        push(queue, entry)


cdef void sift(budget_t *budget, fifo_t *queue, int member) noexcept nogil:
    """Take out the blocks of a member, or (-1) those of which nothing is there."""
    cdef uint64_t at = queue.taken, to = queue.taken, entry, block, n, i, first, pages
    cdef served_t *served
    while at != queue.given:
        entry = queue.entries[at & (queue.room - 1)]
        served = <served_t *>budget.members[member_of(entry)]
        block = block_of(entry)
        n = HUGE_PAGES // BLOCK_PAGES if is_whole(entry) else 1
        first = block * BLOCK_PAGES
        pages = n_set(served.resident, first, min(first + n * BLOCK_PAGES, served.n_pages))
        if (member_of(entry) == member) if member >= 0 else pages == 0:
            queue.pages -= pages
            for i in range(n):
                served.hold.blocks[block + i] = ABSENT
        else:
            queue.entries[to & (queue.room - 1)] = entry
            to += 1
        at += 1
    queue.given = to


cdef void believe(served_t *served, uint64_t word, uint64_t are, uint64_t are_not) noexcept nogil:
    """Of the 64 pages of a word some are there, and others are not. Of a lazy array: with the lock held."""
    cdef uint64_t page, known
    if served.hold == NULL or served.hold.blocks == NULL:
        or_u64(&served.resident[word], are)
        and_u64(&served.resident[word], ~are_not)
        return
    known = load_u64(&served.resident[word])
    are &= ~known
    are_not &= known
    while are | are_not:
        page = 64 * word + __builtin_ctzll(are | are_not)
        if are >> (page % 64) & 1:
            take_in(served, page, page + 1, False)
        else:
            take_out(served, page, page + 1)
        are &= ~(<uint64_t>1 << (page % 64))
        are_not &= ~(<uint64_t>1 << (page % 64))


cdef bint leave_budget(hold_t *hold) noexcept nogil:
    """Count there no more; False: not yet, somebody is just letting go of some of it."""
    cdef budget_t *budget = hold.budget
    pthread_mutex_lock(&budget.lock)
    if hold.member >= 0:
        sift(budget, &budget.fresh, hold.member)
        sift(budget, &budget.kept, hold.member)
        sift(budget, &budget.ghosts, hold.member)
        if hold.pins == 0:
            add_u64(&budget.resident, -hold.pages)
            hold.pages = 0
            budget.members[hold.member] = NULL
            hold.member = -1
    pthread_mutex_unlock(&budget.lock)
    return hold.member < 0
