"""`Budget`: how many bytes of lazy arrays may be in memory at a time, and in which order they are let go of.

The kernel does not tell which pages are used, only which are missed. So the order is that of 2Q (Johnson and
Shasha, 1994): what came once waits in a queue of its own, where a scan passes through; what comes again soon
after it has gone is kept in another, where no scan reaches it.
"""

from libc.errno cimport errno
from libc.stdint cimport UINT64_MAX, uint64_t

from operator import index

from userfault._abi cimport getpid, load_u64, pthread_mutex_init
from userfault._errno cimport error_for
from userfault._ioctl cimport PAGE_SIZE

from userfault.errors import BusyError, ForkedError

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE

DEF WHOLE = 1 << 47      # the entry is a huge page
DEF MOST_MEMBERS = 65535
DEF MOST_STEP = 512      # pages
DEF STEPS = 16           # that a limit is, at least

LEAST_BYTES = STEPS * BLOCK_PAGES * PAGE_SIZE


cdef inline uint64_t entry_of(int member, uint64_t block, bint whole) noexcept nogil:
    return <uint64_t>member << 48 | (<uint64_t>WHOLE if whole else 0) | block


cdef inline int member_of(uint64_t entry) noexcept nogil:
    return entry >> 48


cdef inline uint64_t block_of(uint64_t entry) noexcept nogil:
    return entry & (<uint64_t>WHOLE - 1)


cdef inline bint is_whole(uint64_t entry) noexcept nogil:
    return entry & <uint64_t>WHOLE != 0


cdef bint push(fifo_t *queue, uint64_t entry) noexcept nogil:
    """False: there is no room."""
    if queue.given - queue.taken == queue.room:
        return False
    queue.entries[queue.given & (queue.room - 1)] = entry
    queue.given += 1
    return True


cdef bint pop(fifo_t *queue, uint64_t *entry) noexcept nogil:
    """The oldest; False: there is none."""
    if queue.given == queue.taken:
        return False
    entry[0] = queue.entries[queue.taken & (queue.room - 1)]
    queue.taken += 1
    return True


cdef void *mapped(size_t size) except NULL:
    """Zeroed memory that is made when it is touched."""
    cdef void *room = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                           -1, 0)
    if room == <void *>-1:
        raise error_for("mmap for the queues of a Budget", errno)
    return room


cdef int plant(fifo_t *queue, uint64_t room) except -1:
    queue.room = 64
    while queue.room < room:
        queue.room *= 2
    queue.entries = <uint64_t *>mapped(queue.room * 8)
    return 0


cdef void uproot(fifo_t *queue) noexcept:
    if queue.entries != NULL:
        munmap(queue.entries, queue.room * 8)


cdef class Budget:
    """How many bytes may be in memory at a time, of all the lazy arrays that were given this.

    Args:
        nbytes: the limit, 1 MiB at the least; None: no limit.

    What is there beyond it is let go of, oldest first, except what came back soon after it had gone: that
    is kept, so that a scan does not drive out what is used again and again. Changed pages are written back
    first, or stay. Raises ValueError for a limit that is too small.
    """

    def __cinit__(self, nbytes):
        pthread_mutex_init(&self.c.lock, NULL)
        self.pid = getpid()
        self.c.limit = UINT64_MAX
        self.c.step = UINT64_MAX
        if nbytes is None:
            return
        if not LEAST_BYTES <= index(nbytes) < 2**63:
            raise ValueError(f"a memory limit is {LEAST_BYTES} bytes at the least, not {nbytes}")
        self.c.limit = <uint64_t>nbytes // PAGE_SIZE
        self.c.step = min(self.c.limit // STEPS, <uint64_t>MOST_STEP)
        plant(&self.c.fresh, 2 * self.c.limit)
        plant(&self.c.kept, 2 * self.c.limit)
        plant(&self.c.ghosts, self.c.limit // 2)
        self.c.members = <void **>mapped(MOST_MEMBERS * sizeof(void *))

    def __dealloc__(self):
        uproot(&self.c.fresh)
        uproot(&self.c.kept)
        uproot(&self.c.ghosts)
        if self.c.members != NULL:
            munmap(self.c.members, MOST_MEMBERS * sizeof(void *))

    cdef int join(self, void *served) except -2:
        """A number for a region, -1 without a limit. Under the GIL, so that nobody else joins meanwhile."""
        cdef int member = 0
        if self.pid != getpid():
            raise ForkedError("a Budget is of one process's memory: make one in the child")
        if self.c.members == NULL:
            return -1
        while member < MOST_MEMBERS and self.c.members[member] != NULL:
            member += 1
        if member == MOST_MEMBERS:
            raise BusyError(f"a Budget is for {MOST_MEMBERS} arrays at the most")
        self.c.members[member] = served
        return member

    @property
    def nbytes(self):
        """The limit in bytes; None: there is none."""
        return None if self.c.limit == UINT64_MAX else self.c.limit * PAGE_SIZE

    @property
    def used(self):
        """How many bytes of its arrays are in memory."""
        return load_u64(&self.c.resident) * PAGE_SIZE

    def __repr__(self):
        return f"<Budget {self.nbytes} bytes, {self.used} used>"

    def __reduce__(self):
        raise TypeError("a Budget cannot be copied or pickled: it is of one process's memory")
