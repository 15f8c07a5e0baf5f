"""The books of a userfaultfd: its table of regions after each event equals what the kernel says.

Events say less than all: a remap names the old length only, growing in place is not told at all, and no
record says what MADV_DONTFORK kept from a child. There the kernel is asked: UFFDIO_COPY from memory that
cannot be read answers EFAULT where the range lies in one registered mapping, and ENOENT where it does not.
It works on other processes too, whose /proc we may not know. Sources: userfaultfd(2) and fs/userfaultfd.c.
"""

from libc.errno cimport EAGAIN, EEXIST, EFAULT, ENOENT, ESRCH, errno
from libc.stdint cimport INT64_MAX, uint32_t, uint64_t

from userfault cimport _abi
from userfault._abi cimport POLLIN, msg_record, pollfd, ppoll, timespec, v2_record
from userfault._errno cimport error_for
from userfault._ioctl cimport PAGE_SIZE, uffd_copy, uffd_poison
from userfault._served cimport served_t
from userfault._tree cimport before, cut, enter, insert, leave, list_range, lock_tree, next_entry, unlock_tree

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int PROT_NONE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE

DEF YIELDS = 32      # times that a change of the mappings, whose event was read, is waited for awake
DEF PATIENCE = 1000  # and asleep
DEF MOMENT = 50000   # ns
DEF WALKED = 67108864   # bytes that are asked about page by page
# In a tree's `unsure`: which of its pieces are there. Any other address: whether a region has grown to there.
DEF EVERYTHING = 1

# A page that cannot be read. Low, because the kernel wants address + length to be user space.
cdef uint64_t unreadable = <uint64_t>mmap(<void *><uint64_t>0x100000000, PAGE_SIZE, PROT_NONE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
if unreadable == <uint64_t>-1:
    raise error_for("mmap of a page", errno)


cdef int decode_event(int wire, const char *record, event_t *event) noexcept nogil:
    """The kind of a record, and unless it is FAULT or UNKNOWN what it says."""
    cdef const msg_record *msg = <const msg_record *>record
    cdef const v2_record *v2 = <const v2_record *>record
    event.kind = UNKNOWN
    if wire == _abi.WIRE_V1:
        event.kind = FAULT
    elif wire == _abi.WIRE_V2:
        if v2.type == _abi.UFFD_PAGEFAULT:
            event.kind = FAULT
        elif v2.type == _abi.UFFD_FORK:
            event.kind = FORK
            event.fd = <int>v2.arg
    elif msg.event == _abi.UFFD_EVENT_PAGEFAULT:
        event.kind = FAULT
    elif msg.event == _abi.UFFD_EVENT_FORK:
        event.kind = FORK
        event.fd = <int><uint32_t>msg.flags
    elif msg.event == _abi.UFFD_EVENT_REMAP:
        # {from, to, len}, under the names of a page fault; len is the old one.
        event.kind = REMAP
        event.start = msg.flags
        event.to = msg.address
        event.end = msg.flags + msg.ptid
    elif msg.event == _abi.UFFD_EVENT_REMOVE or msg.event == _abi.UFFD_EVENT_UNMAP:
        event.kind = REMOVE if msg.event == _abi.UFFD_EVENT_REMOVE else UNMAP
        event.start = msg.flags
        event.end = msg.address
    return event.kind


# -- what the kernel says ------------------------------------------------------------------------------

cdef int is_registered(int fd, uint64_t start, uint64_t end) noexcept nogil:
    """Whether [start, end) lies in one registered mapping: 1, 0, or -errno: EAGAIN, while another event
    waits to be read; ESRCH, when the process is gone."""
    cdef uint64_t done
    cdef pollfd event
    cdef timespec moment
    cdef int result = -EAGAIN, tries = 0
    event.fd = fd
    event.events = POLLIN
    moment.tv_sec = 0
    moment.tv_nsec = MOMENT
    while result == -EAGAIN and tries < PATIENCE:
        # Whoever changed the mappings says that this is over when it runs again, unless there is one more
        # event, which waits for us.
        if tries > 0 and tries < YIELDS:
            sched_yield()
        elif tries and ppoll(&event, 1, &moment, NULL) > 0:
            break
        tries += 1
        result = uffd_copy(fd, start, unreadable, end - start, 0, &done)
    if result == -EFAULT or result == -EEXIST:
        return 1
    return result if result == -EAGAIN or result == -ESRCH else 0


cdef uint64_t reach(int fd, uint64_t start, uint64_t end, uint64_t limit) noexcept nogil:
    """[start, end) is registered: the end of its mapping, `limit` at the most."""
    cdef uint64_t step = PAGE_SIZE
    while end + step <= limit and is_registered(fd, start, end + step) == 1:
        end += step
        step *= 2
    while step > PAGE_SIZE:
        step //= 2
        if end + step <= limit and is_registered(fd, start, end + step) == 1:
            end += step
    return end


# -- keeping the books ---------------------------------------------------------------------------------

cdef int keep_books(tree_t *tree, int fd, const event_t *event, bint hears_unmap) noexcept nogil:
    """Change the table as the event says. `hears_unmap`: what is moved away from is told by an unmap event.

    0 or -ENOMEM.
    """
    cdef uint64_t taken
    cdef int result = 0
    if event.end <= event.start or (event.start | event.end) % PAGE_SIZE:
        return 0
    if event.kind == UNMAP:
        lock_tree(tree)
        result = cut(tree, event.start, event.end, &taken)
        unlock_tree(tree)
    elif event.kind == REMAP and event.to % PAGE_SIZE == 0:
        result = remap(tree, fd, event, hears_unmap)
    # Before the unmap event that follows a remap is read, the kernel fills, and answers, nothing.
    if result == 0 and tree.unsure and not (event.kind == REMAP and hears_unmap):
        result = settle(tree, fd)
    return result


cdef int settle(tree_t *tree, int fd) noexcept nogil:
    """Ask the kernel what no event has said; what it cannot answer yet is asked after the next event."""
    cdef uint64_t unsure = tree.unsure, at = 0, page, taken
    cdef entry_t entry
    cdef int result = 0, answer = 0
    tree.unsure = 0
    if unsure != EVERYTHING:
        if find_grown(tree, fd, unsure, &entry) == -EAGAIN:
            tree.unsure = unsure
        return 0
    while result == 0 and next_entry(tree, at, INT64_MAX, &entry):
        at = entry.end
        answer = is_registered(fd, entry.start, entry.end)
        page = entry.start
        if answer == 0 and (at - page > WALKED and entry.payload == NULL
                            and is_registered(fd, page, page + PAGE_SIZE) == 0
                            and is_registered(fd, at - PAGE_SIZE, at) == 0):
            # Kept from a child as a whole, most likely: page by page is slow.
            lock_tree(tree)
            result = cut(tree, page, at, &taken)
            unlock_tree(tree)
            page = at
        # In several mappings, or partly kept from a child (MADV_DONTFORK).
        while answer == 0 and result == 0 and page < at:
            answer = is_registered(fd, page, page + PAGE_SIZE)
            if answer == 1:
                page = reach(fd, page, page + PAGE_SIZE, at)
                answer = 0
            elif answer == 0:
                lock_tree(tree)
                result = cut(tree, page, page + PAGE_SIZE, &taken)
                unlock_tree(tree)
                page += PAGE_SIZE
        if answer < 0:
            break
    if answer == -EAGAIN:
        tree.unsure = EVERYTHING
    return result


cdef int remap(tree_t *tree, int fd, const event_t *event, bint hears_unmap) noexcept nogil:
    cdef uint64_t at = event.start, shift = event.to - event.start, to_end = event.end + shift, taken
    # MREMAP_DONTUNMAP leaves the old range registered.
    cdef bint leaves = hears_unmap or is_registered(fd, event.start, event.start + PAGE_SIZE) in (1, -EAGAIN)
    cdef entry_t entry, other
    cdef int result
    lock_tree(tree)
    # Whatever was there has been unmapped (MREMAP_FIXED).
    result = cut(tree, event.to, to_end, &taken)
    while result == 0 and list_range(tree, at, event.end, &entry, 1):
        at = entry.end
        entry.start += shift
        entry.end += shift
        entry.base += shift
        result = insert(tree, &entry, &other)
    if result == 0 and not leaves:
        result = cut(tree, event.start, event.end, &taken)
    unlock_tree(tree)
    if result == 0 and at > event.start:
        # It may have grown on the way, or before, which no event says.
        if tree.unsure != EVERYTHING:
            tree.unsure = at + shift
    return result


cdef int find_grown(tree_t *tree, int fd, uint64_t address, entry_t *entry) noexcept nogil:
    """Whether the unknown address belongs to a region that grew (mremap in place raises no event).

    1: the table holds all of it now, and `entry` is it; else 0, or -errno as of `is_registered`.
    """
    cdef entry_t other
    cdef uint64_t end, limit = INT64_MAX, taken, length
    cdef int ticket = enter(tree)
    cdef bint near = before(tree, address, entry)
    cdef int answer = 0
    leave(tree, ticket)
    if near and entry.end <= address:
        answer = is_registered(fd, entry.end - PAGE_SIZE, address + PAGE_SIZE)
    if answer != 1:
        return answer
    if next_entry(tree, address, limit, &other):
        limit = other.start
    end = reach(fd, entry.end - PAGE_SIZE, address + PAGE_SIZE, limit)
    lock_tree(tree)
    # As it is now: it may have been let go of meanwhile.
    near = (list_range(tree, entry.end - PAGE_SIZE, end, &other, 1) == 1 and other.id == entry.id
            and other.base == entry.base and other.end == entry.end)
    if near:
        entry.payload = other.payload
        length = (<served_t *>entry.payload).n_pages * PAGE_SIZE if entry.payload != NULL else 0
        if entry.end - entry.base < length:
            # A part of its region: what is new is not the region's next page, but past its end.
            entry.start = entry.end
            entry.base = entry.end - length
        else:
            near = cut(tree, entry.start, entry.end, &taken) == 0
        entry.end = end
        near = near and insert(tree, entry, &other) == 0
    unlock_tree(tree)
    return near


cdef int copy_books(tree_t *parent, tree_t *child, int child_fd) noexcept nogil:
    """Fill a new table with what a forked child has of its parent's regions. 0 or -ENOMEM.

    All of them for now, where the child has changed its mappings already, and its event is to be read.
    """
    cdef entry_t entry, other
    cdef uint64_t at = 0
    cdef int result = 0
    while result == 0 and next_entry(parent, at, INT64_MAX, &entry):
        at = entry.end
        result = insert(child, &entry, &other)
    child.unsure = EVERYTHING
    return settle(child, child_fd) if result == 0 else result


cdef bint poison_missing(tree_t *tree, int fd) noexcept nogil:
    """Let all missing pages of a child's regions fail closed: when its descriptor is closed they would read
    as zeros. False: not all, for an event of the child waits to be read. Before Linux 6.6 nothing happens."""
    cdef entry_t entry
    cdef uint64_t at = 0, size, done
    cdef int result, patience = PATIENCE
    cdef bint complete = True
    while next_entry(tree, at, INT64_MAX, &entry):
        at = entry.start
        size = entry.end - at
        while at < entry.end:
            result = uffd_poison(fd, at, size, 0, &done)
            at += done
            if result == -EAGAIN and (done or patience):
                patience -= not done
                sched_yield()
            elif result == -ENOENT and size > PAGE_SIZE:
                # In several mappings, of which one ioctl reaches one.
                size = (size // 2 + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
                continue
            elif result == -EEXIST or result == -ENOENT:
                at += PAGE_SIZE
            elif result != 0:
                complete = complete and result != -EAGAIN
                break
            size = entry.end - at
        at = entry.end
    return complete
