"""What is not filled at once for a fault: handed to the crew, or filled ahead of need.

A goal is a range of a region that is to be filled while nothing waits: what lies ahead of a stream of faults,
the rest of a unit, or all of a region (materialize). The reading thread takes a step towards one between two
looks at the faults.
"""

from libc.stdint cimport int64_t, uint64_t

from userfault._abi cimport load_int, load_u64, pthread_mutex_lock, pthread_mutex_unlock, store_int
from userfault._crew cimport AHEAD, URGENT, crew_t, hand, job_t, queue_t
from userfault._fill cimport fill, park
from userfault._ioctl cimport PAGE_SIZE
from userfault._served cimport HUGE_PAGES, first_missing, missing_end, served_t
from userfault._stage cimport is_prompt
from userfault._tree cimport enter, entry_t, find, leave, tree_t


cdef uint64_t give(loop_t *loop, const entry_t *entry, served_t *served, uint64_t first, uint64_t end,
                   uint64_t want, uint64_t want_end, uint64_t n_faults) noexcept nogil:
    """Ask the crew for the missing pages [first, end). When it is swamped, those wanted are parked.

    Returns how far it got."""
    cdef job_t job
    cdef uint64_t stop, page
    job.space = loop.worker.space
    job.served = served
    job.base = entry.base
    job.since = loop.worker.since
    job.n_faults = n_faults
    while first < end:
        stop = min(stop_of(entry, served, first, end), end)
        job.start = entry.base + first * PAGE_SIZE
        job.end = entry.base + stop * PAGE_SIZE
        job.want = entry.base + min(max(first, want), stop) * PAGE_SIZE
        job.want_end = entry.base + min(max(first, want_end), stop) * PAGE_SIZE
        if not hand(&loop.crew, &job, first, stop):
            for page in range(max(first, want), min(end, want_end)):
                park(&loop.worker, served, entry.base + page * PAGE_SIZE, False)
            return first
        loop.worker.counters.handed += 1
        job.n_faults = 0
        first = stop
    return end


cdef inline uint64_t stop_of(const entry_t *entry, const served_t *served, uint64_t first,
                             uint64_t end) noexcept nogil:
    """Where to stop for now with a long run from `first` to `end`: between units, between huge pages."""
    cdef uint64_t stop = first - first % served.granule + served.granule, huge
    if served.huge and served.granule <= HUGE_PAGES:
        huge = first + HUGE_PAGES - (entry.base // PAGE_SIZE + first) % HUGE_PAGES
        if huge - first == HUGE_PAGES <= end - first:
            return huge
        return min(huge, stop)
    return stop


cdef void set_goal(loop_t *loop, int64_t id, uint64_t next, uint64_t end, bint bulk) noexcept nogil:
    """Fill the addresses [next, end) of the region, in the worker's space, when nothing else is to do."""
    cdef goal_t *goal
    cdef size_t i
    for i in range(loop.n_goals):
        goal = &loop.goals[i]
        if (goal.space == loop.worker.space and goal.id == id and goal.bulk == bulk
                and next <= goal.end and goal.next <= end):
            # A stream has come as far as `next`: what lies behind is nobody's goal any more.
            goal.next = min(goal.next, next) if bulk else next
            goal.end = max(goal.end, end)
            goal.fresh = True
            return
    if loop.n_goals < GOALS:
        goal = &loop.goals[loop.n_goals]
        loop.n_goals += 1
    else:
        # Some other stream has to do without.
        loop.turn += 1
        goal = &loop.goals[loop.turn % GOALS]
        if goal.bulk:
            return
    goal.space = loop.worker.space
    goal.id = id
    goal.next = next
    goal.end = end
    goal.bulk = bulk
    goal.fresh = True


cdef void take_orders(loop_t *loop) noexcept nogil:
    """What materialize() asked for."""
    cdef goal_t order
    while load_int(&loop.n_orders) and loop.n_goals < GOALS:
        pthread_mutex_lock(&loop.desk.lock)
        loop.n_orders -= 1
        order = loop.orders[loop.n_orders]
        pthread_mutex_unlock(&loop.desk.lock)
        loop.worker.space = &loop.own
        set_goal(loop, order.id, order.next, order.end, True)


cdef bint advance(loop_t *loop, bint fresh) noexcept nogil:
    """One step towards every goal that faults asked for just now, or (not `fresh`) towards one goal.

    False when there was nothing to do, or nothing that can be done now.
    """
    cdef size_t i = 0
    cdef bint did = False
    loop.worker.since = 0
    if fresh:
        while i < loop.n_goals:
            if loop.goals[i].fresh:
                loop.goals[i].fresh = False
                step(loop, i, &did)
            i += 1
        return did
    while i < loop.n_goals and not did:
        loop.turn += 1
        step(loop, loop.turn % loop.n_goals, &did)
        i += 1
    return did


cdef void step(loop_t *loop, size_t i, bint *did) noexcept nogil:
    """One step towards a goal, which is dropped when it is reached or its region is gone."""
    cdef goal_t *goal = &loop.goals[i]
    cdef tree_t *tree = goal.space.tree
    cdef int ticket = enter(tree)
    cdef entry_t entry
    cdef served_t *served
    cdef uint64_t first, limit, stop
    cdef bint reached = True
    loop.worker.space = goal.space
    if find(tree, goal.next, &entry) and entry.id == goal.id and entry.payload != NULL:
        served = <served_t *>entry.payload
        limit = min((min(goal.end, entry.end) - entry.base) // PAGE_SIZE, served.n_pages)
        first = first_missing(served, (goal.next - entry.base) // PAGE_SIZE, limit)
        stop = limit
        if first < limit:
            stop = missing_end(served, first, min(limit, stop_of(&entry, served, first, limit)))
            # A worker that is idle can do as well, while we go on.
            if is_prompt(served, first, stop) and not (loop.crew.idle and is_idle(&loop.crew)):
                first = fill(&loop.worker, &entry, served, first, stop, 0, 0, 0, False)
            if first < stop and not is_busy(&loop.crew):
                first = give(loop, &entry, served, first, stop, 0, 0, 0)
            if first < stop:
                goal.next = entry.base + first * PAGE_SIZE
                leave(tree, ticket)
                return
        goal.next = entry.base + stop * PAGE_SIZE
        reached = stop == limit
    did[0] = True
    leave(tree, ticket)
    if reached:
        loop.n_goals -= 1
        loop.goals[i] = loop.goals[loop.n_goals]


cdef bint is_idle(crew_t *crew) noexcept nogil:
    return crew.queues[URGENT].given == crew.queues[URGENT].taken and (
        crew.queues[AHEAD].given == crew.queues[AHEAD].taken)


cdef bint is_busy(crew_t *crew) noexcept nogil:
    """Whether the crew has enough to do ahead of need; then it will kick us when it has done some of it."""
    cdef uint64_t enough = 2 * crew.n_workers
    cdef queue_t *queue = &crew.queues[AHEAD]
    if load_u64(&queue.given) - load_u64(&queue.taken) < enough:
        return False
    store_int(&crew.waited_for, 1)
    return load_u64(&queue.given) - load_u64(&queue.taken) >= enough
