"""Following what a process does to its memory: fork, remap, remove and unmap, as the reading thread hears it.

Whoever forks, moves or drops memory sleeps until its record is read, perhaps holding the GIL, or, in fork(),
the locks of malloc: nothing here waits for either. Source: userfaultfd(2), "non-cooperative" events.
"""

from libc.errno cimport EMFILE
from libc.stdint cimport int64_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcmp, strlen

from userfault._abi cimport (
    WIRE_V2, add_int, add_u64, c_close, getpid, load_int, now, ppoll, pthread_mutex_lock,
    pthread_mutex_unlock, timespec,
)
from userfault._ahead cimport CAPACITY, loop_t
from userfault._books cimport FORK, REMAP, UNKNOWN, UNMAP, decode_event, event_t, keep_books, poison_missing
from userfault._hold cimport gone
from userfault._ioctl cimport PAGE_SIZE
from userfault._served cimport served_t
from userfault._space cimport free_space, has_ended, new_space, space_t
from userfault._tree cimport entry_t, next_entry

cdef extern from "<sys/epoll.h>" nogil:
    int epoll_ctl(int epoll, int what, int fd, epoll_event *event)
    int EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLIN

cdef extern from "<stdlib.h>" nogil:
    int atexit(void (*function)() noexcept nogil)

cdef extern from "<unistd.h>" nogil:
    ssize_t readlink(const char *path, char *target, size_t room)

cdef extern from "<sys/resource.h>" nogil:
    struct rlimit:
        unsigned long rlim_cur
        unsigned long rlim_max
    int getrlimit(int resource, rlimit *limits)
    int setrlimit(int resource, const rlimit *limits)
    int RLIMIT_NOFILE

DEF SOON = 10000000       # ns until children are asked whether they live, when there is a new one
DEF LATE = 1000000000     # at the most
DEF ROOM = 64             # descriptors
DEF PARTING = 1000000000  # ns that the end of the process waits for children that go on forking

cdef const char *USERFAULTFD = "anon_inode:[userfaultfd]"


cdef bint hear(loop_t *loop, space_t *space, const char *record) noexcept nogil:
    """Do what a record that is no page fault says, under the layout's lock. False: it says nothing known."""
    cdef event_t event
    cdef entry_t entry
    cdef served_t *served
    cdef uint64_t at
    decode_event(loop.wire, record, &event)
    if not space.hears_events or event.kind == UNKNOWN:
        return False
    loop.unparked = 0  # what could not be filled while the record waited can be now
    if event.kind == FORK:
        loop.worker.counters.forks += 1
        if not adopt(loop, space, event.fd):
            return False
        (<char *>record)[0] = 0  # its descriptor is nobody's business any more (leave_children)
        return True
    at = event.start
    if event.kind == UNMAP:
        loop.worker.counters.unmaps += 1
        at = event.end
    elif event.kind == REMAP:
        loop.worker.counters.remaps += 1
    else:
        loop.worker.counters.removes += 1
    while next_entry(space.tree, at, event.end, &entry):
        at = entry.end
        served = <served_t *>entry.payload
        if served != NULL and event.kind == REMAP:
            served.scattered = True
        elif served != NULL:
            gone(served, min((entry.start - entry.base) // PAGE_SIZE, served.n_pages),
                 min((entry.end - entry.base) // PAGE_SIZE, served.n_pages))
    keep_books(space.tree, space.fd, &event, space.hears_unmap)
    # Last: a worker that sees no change has seen the books as they are.
    add_u64(&space.changes, 1)
    return True


cdef bint adopt(loop_t *loop, space_t *parent, int fd) noexcept nogil:
    """Serve a child, whose descriptor is `fd`. Without memory it is not: its threads sleep."""
    cdef epoll_event event
    cdef space_t *space = new_space(parent, fd)
    if space == NULL:
        return False
    event.events = EPOLLIN
    event.data.ptr = space
    if epoll_ctl(loop.epoll, EPOLL_CTL_ADD, fd, &event) != 0:
        poison_missing(space.tree, fd)
        free_space(space)
        return True
    space.next = loop.children
    loop.children = space
    add_int(&loop.n_children, 1)
    loop.asked = now()
    loop.patience = SOON
    return True


cdef void ask(loop_t *loop) noexcept nogil:
    """Ask the children whether they live, and let go of those that do not."""
    cdef space_t **link = &loop.children
    cdef space_t *space
    cdef bint ended = False, idle
    loop.asked = now()
    while link[0] != NULL:
        space = link[0]
        if not space.gone and has_ended(space):
            space.gone = ended = True
            # Whoever has inherited the descriptor keeps it in there otherwise.
            epoll_ctl(loop.epoll, EPOLL_CTL_DEL, space.fd, NULL)
            forget(loop, space)
        idle = False
        if space.gone:
            # Under the lock: others take hold of a child that they find in the list.
            pthread_mutex_lock(&loop.desk.layout)
            idle = load_int(&space.users) == 0
            if idle:
                link[0] = space.next
            pthread_mutex_unlock(&loop.desk.layout)
        if idle:
            forget(loop, space)  # also what a worker has parked since
            free_space(space)
            add_int(&loop.n_children, -1)
        else:
            link = &space.next
    loop.patience = SOON if ended else min(2 * loop.patience, <int64_t>LATE)


cdef void forget(loop_t *loop, const space_t *space) noexcept nogil:
    """Nothing of the space is to be done any more."""
    cdef size_t i = 0, n = 0
    while i < loop.n_goals:
        if loop.goals[i].space == space:
            loop.n_goals -= 1
            loop.goals[i] = loop.goals[loop.n_goals]
        else:
            i += 1
    pthread_mutex_lock(&loop.desk.lock)
    for i in range(loop.desk.n_parked):
        if loop.desk.parked[i].space != space:
            loop.desk.parked[n] = loop.desk.parked[i]
            n += 1
    loop.desk.n_parked = n
    pthread_mutex_unlock(&loop.desk.lock)


cdef void find_room(loop_t *loop) noexcept nogil:
    """A fork record needs a descriptor, and there is none: fork() waits for it. Sleeps for a moment."""
    cdef rlimit limits
    cdef timespec moment
    loop.worker.counters.errors[EMFILE] += 1
    ask(loop)
    if getrlimit(RLIMIT_NOFILE, &limits) == 0 and limits.rlim_cur < limits.rlim_max:
        limits.rlim_cur = min(limits.rlim_cur + ROOM, limits.rlim_max)
        setrlimit(RLIMIT_NOFILE, &limits)
        return
    moment.tv_sec = 0
    moment.tv_nsec = 1000000
    ppoll(NULL, 0, &moment, NULL)


cdef space_t *pin_child(loop_t *loop, space_t *last) noexcept nogil:
    """The child after `last` (the first after NULL), which stays there until it is `last`; or NULL."""
    cdef space_t *space
    pthread_mutex_lock(&loop.desk.layout)
    space = loop.children if last == NULL else last.next
    if space != NULL:
        add_int(&space.users, 1)
    if last != NULL:
        add_int(&last.users, -1)
    pthread_mutex_unlock(&loop.desk.layout)
    return space


cdef void end_children(loop_t *loop) noexcept nogil:
    """What the children still miss fails closed: without us they would read zeros."""
    cdef int64_t until = now() + PARTING
    cdef space_t *space
    cdef bint more = True
    while more and now() < until:
        # Once more: a child may have been adopted that was forked before its parent had been through.
        more = False
        space = pin_child(loop, NULL)
        while space != NULL:
            if not space.gone and not space.ended:
                more = True
                if poison_missing(space.tree, space.fd):
                    pthread_mutex_lock(&loop.desk.layout)
                    space.ended = True
                    pthread_mutex_unlock(&loop.desk.layout)
            space = pin_child(loop, space)


cdef void leave_children(loop_t *loop) noexcept nogil:
    """In a fork child: close what of its siblings was inherited."""
    cdef space_t *space = loop.children
    cdef size_t record = 16 if loop.wire == WIRE_V2 else 32, i
    cdef event_t event
    while space != NULL:
        c_close(space.fd)
        space = space.next
    # And what the parent's thread had only just read.
    for i in range(<size_t>CAPACITY):
        if decode_event(loop.wire, loop.records + i * record, &event) == FORK:
            close_userfaultfd(event.fd)
    if loop.epoll >= 0:
        c_close(loop.epoll)
    loop.children = NULL
    loop.n_children = 0
    loop.epoll = -1


cdef void close_userfaultfd(int fd) noexcept nogil:
    """Close the descriptor if that is what it still is."""
    cdef char path[64]
    cdef char target[32]
    cdef ssize_t n
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd)
    n = readlink(path, target, sizeof(target))
    if n == <ssize_t>strlen(USERFAULTFD) and memcmp(target, USERFAULTFD, n) == 0:
        c_close(fd)


# -- the process's end ---------------------------------------------------------------------------------

cdef loop_t running     # the head of a list of the loops that run; changed under the GIL


cdef void enlist(loop_t *loop) noexcept:
    loop.pid = getpid()
    loop.next = running.next
    running.next = loop


cdef void delist(loop_t *loop) noexcept:
    cdef loop_t *before = &running
    while before.next != NULL and before.next != loop:
        before = before.next
    if before.next != NULL:
        before.next = loop.next


cdef void farewell() noexcept nogil:
    """When nothing of Python is left: fork children will not be served any more."""
    cdef loop_t *loop = running.next
    while loop != NULL:
        if loop.pid == getpid():
            end_children(loop)
        loop = loop.next


atexit(farewell)
