from libc.stdint cimport int64_t, uint64_t

from userfault._crew cimport crew_t
from userfault._fill cimport desk_t, parked_t, worker_t
from userfault._lease cimport lease_t
from userfault._served cimport served_t
from userfault._space cimport space_t
from userfault._tree cimport entry_t

cdef enum:
    SERVING = 0   # for a service
    KEEPER = 1    # for nobody: everything fails closed
    GONE = 2      # the thread has left, or is leaving, its loop

    # placement
    SPIN = 0
    ANY = 1
    PAIR = 2

    CAPACITY = 1024   # records a read()
    UNKNOWNS = 256    # the last ones, for the report
    GOALS = 64
    MOST_DUE = 256    # runs whose threads sleep until all are filled

# Addresses [next, end) of region `id`, to be filled ahead of need.
ctypedef struct goal_t:
    space_t *space
    uint64_t next
    uint64_t end
    int64_t id
    bint fresh      # a fault asked for it since its last step
    bint bulk       # of materialize(): all the way

ctypedef struct due_t:
    served_t *served
    uint64_t n

# The reading thread.
cdef struct loop_t:
    loop_t *next           # for the process's end
    int pid
    desk_t desk
    space_t own
    space_t *children      # a list; under the desk's layout lock
    int n_children
    int epoll              # of the children's descriptors; -1 without fork events
    int64_t asked          # when it was last asked which children live
    int64_t patience       # until it is asked again
    crew_t crew
    worker_t worker
    worker_t *hands        # of threads that serve their own faults; NULL: none do
    int wire
    int kick_fd
    int state
    int placement
    bint may_spin          # there is another processor for those who fault
    lease_t lease
    int tid                # the thread whose faults the batch at hand holds; 0: several, or unknown
    char *records
    uint64_t *pages
    char *unknowns         # a ring of records, each in the room of a msg_record
    # Faults whose pages are there and whose threads sleep on until `flush`:
    uint64_t asleep_from
    uint64_t asleep_to
    size_t n_due
    due_t *due
    goal_t goals[GOALS]
    size_t n_goals
    size_t turn            # the goal whose turn it is
    int64_t unparked       # when what is parked was last tried
    bint retrying
    parked_t *parked       # room to take the parked ones
    int n_orders           # of materialize(), under the desk's lock
    goal_t orders[GOALS]

cdef uint64_t give(loop_t *loop, const entry_t *entry, served_t *served, uint64_t first, uint64_t end,
                   uint64_t want, uint64_t want_end, uint64_t n_faults) noexcept nogil
cdef void set_goal(loop_t *loop, int64_t id, uint64_t next, uint64_t end, bint bulk) noexcept nogil
cdef void take_orders(loop_t *loop) noexcept nogil
cdef bint advance(loop_t *loop, bint fresh) noexcept nogil
