"""The affinity lease: the engine thread and the one thread that keeps faulting share a CPU.

Waking an idle CPU is the largest cost of a fault, and only a pair that is pinned together is spared it. The
toucher's mask is leased, and given back when it stops faulting. Its heirs, the threads and processes that it
creates meanwhile and that inherit the pinned mask, get the toucher's own: every half second while the lease
lasts, at its end, and once more.

An heir is who started in or after the clock tick (10 ms) of the lease's beginning, in this process or among
its descendants, and has exactly the leased CPU as its mask. So who was pinned to that very CPU on purpose is
unpinned, if it started during the lease, or before it in the same tick. Never found: another user's
processes, those that init adopted, those beyond DEPTH generations, and without CONFIG_PROC_CHILDREN any.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport atoi, atoll
from libc.string cimport memset, strchr, strrchr
from posix.fcntl cimport O_CLOEXEC, O_DIRECTORY, O_RDONLY, open as c_open
from posix.time cimport CLOCK_BOOTTIME
from posix.unistd cimport _SC_CLK_TCK

from userfault._abi cimport c_close, c_read, clock_gettime, getpid, sysconf, timespec

cdef extern from "<sched.h>" nogil:
    int CPU_SETSIZE
    int CPU_COUNT(cpu_set_t *set)
    bint CPU_ISSET(int cpu, cpu_set_t *set)
    void CPU_SET(int cpu, cpu_set_t *set)
    int sched_getcpu()
    int sched_getaffinity(int tid, size_t size, cpu_set_t *mask)
    int sched_setaffinity(int tid, size_t size, const cpu_set_t *mask)

cdef extern from "<unistd.h>" nogil:
    int gettid()
    long syscall(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_getdents64, SYS_tgkill

cdef extern from "<dirent.h>" nogil:
    struct dirent:
        unsigned short d_reclen
        char *d_name

DEF STREAK = 16            # batches of one fault, all of the same thread,
DEF GAP_NS = 1000000       # and no two further apart than this
DEF QUIET_NS = 10000000
DEF OTHERS = 16
DEF LOOK_NS = 500000000
DEF WORTH = 256            # faults that pay for a lease; after fewer the next one waits:
DEF BACKOFF_NS = 20000000  # doubles, up to
DEF MAX_BACKOFF_NS = 1000000000
DEF DEPTH = 8


cdef void lease_saw(lease_t *lease, int tid, int64_t now) noexcept nogil:
    """A batch with exactly one fault, by thread `tid` (0: unknown)."""
    if lease.held and tid == lease.tid:
        lease.seen = now
        lease.served += 1
        lease.others -= lease.others > 0
        if now >= lease.look:
            look(lease, now)
        return
    if lease.held:
        lease_saw_many(lease, now)
        return
    if tid != lease.tid or now - lease.seen > GAP_NS:
        lease.tid = tid
        lease.streak = 0
    lease.seen = now
    lease.streak += lease.streak < STREAK
    if lease.streak == STREAK and tid > 0 and now >= lease.retry:
        begin(lease, now)


cdef void lease_saw_many(lease_t *lease, int64_t now) noexcept nogil:
    """A batch with faults of several threads. The lease ends where half of the batches are others'."""
    if not lease.held:
        lease.tid = lease.streak = 0
        return
    lease.others += 2
    if lease.others >= OTHERS:
        finish(lease, now)


cdef bint lease_held(const lease_t *lease) noexcept nogil:
    """Whether lease_expire has something left to do: to end a lease, or to look for its heirs."""
    return lease.look != 0


cdef void lease_expire(lease_t *lease, int64_t now) noexcept nogil:
    """Give back when the toucher has not faulted for 10 ms."""
    if lease.held and now - lease.seen > QUIET_NS:
        finish(lease, now)
    elif lease.look and now >= lease.look:
        look(lease, now)


cdef void lease_end(lease_t *lease) noexcept nogil:
    """Give back now, and forget everything."""
    if lease.held:
        give_back(lease)
    elif lease.look:
        free_heirs(lease, getpid(), DEPTH)
    memset(lease, 0, sizeof(lease_t))


cdef void begin(lease_t *lease, int64_t now) noexcept nogil:
    if lease.look:
        look(lease, lease.look)  # for the last lease's heirs: its masks go now
    lease.streak = lease.others = lease.served = 0
    lease.held = take(lease)
    if lease.held:
        lease.look = now + LOOK_NS
    else:
        back_off(lease, now)


cdef bint take(lease_t *lease) noexcept nogil:
    """Pin lease.tid and the calling thread to one CPU; False when that cannot be, and nothing is changed."""
    cdef size_t size = sizeof(cpu_set_t)
    cdef long hz = sysconf(_SC_CLK_TCK)
    cdef cpu_set_t one
    cdef timespec t
    # Threads of other processes fault in this memory, too: a vfork child, until its exec.
    if lease.tid == gettid() or started(getpid(), lease.tid) < 0:
        return False
    # EINVAL where the kernel has more than CPU_SETSIZE CPUs.
    if sched_getaffinity(lease.tid, size, &lease.saved) or sched_getaffinity(0, size, &lease.own):
        return False
    lease.cpu = sched_getcpu()
    if not CPU_ISSET(lease.cpu, &lease.saved):
        lease.cpu = 0
        while not (CPU_ISSET(lease.cpu, &lease.saved) and CPU_ISSET(lease.cpu, &lease.own)):
            lease.cpu += 1
            if lease.cpu == CPU_SETSIZE:
                return False
    clock_gettime(CLOCK_BOOTTIME, &t)
    lease.tick = t.tv_sec * hz + t.tv_nsec // (1000000000 // hz)
    memset(&one, 0, size)
    CPU_SET(lease.cpu, &one)
    # Who has one CPU only needs no lease of it, and has no heirs.
    if CPU_COUNT(&lease.saved) > 1 and sched_setaffinity(lease.tid, size, &one):
        return False
    sched_setaffinity(0, size, &one)  # look() ends the lease should it fail
    return True


cdef void finish(lease_t *lease, int64_t now) noexcept nogil:
    give_back(lease)
    lease.tid = 0
    if lease.served < WORTH:
        back_off(lease, now)
    else:
        lease.backoff = 0
    # A process that is being forked has the pinned mask, and cannot be found yet. To fork a large one takes
    # longer than QUIET_NS: that fork is then why the lease ended.
    lease.look = now + LOOK_NS


cdef void back_off(lease_t *lease, int64_t now) noexcept nogil:
    lease.backoff = min(2 * lease.backoff, <int64_t>MAX_BACKOFF_NS) if lease.backoff else BACKOFF_NS
    lease.retry = now + lease.backoff


cdef void give_back(lease_t *lease) noexcept nogil:
    # Needs no descriptor, of which there may be none. Who has the number of a toucher that is gone is either
    # of another process, where tgkill finds nobody, or started during the lease, as heirs did.
    if CPU_COUNT(&lease.saved) > 1 and syscall(SYS_tgkill, getpid(), lease.tid, 0) == 0:
        unpin(lease.tid, lease.cpu, &lease.saved)
    unpin(0, lease.cpu, &lease.own)
    free_heirs(lease, getpid(), DEPTH)
    lease.held = False


cdef void look(lease_t *lease, int64_t now) noexcept nogil:
    """Free the heirs that there are; end a lease of which somebody else has moved one side."""
    if lease.held and not (pinned(lease.tid, lease.cpu) and pinned(0, lease.cpu)):
        finish(lease, now)
    else:
        free_heirs(lease, getpid(), DEPTH)
        lease.look = now + LOOK_NS if lease.held else 0


cdef bint pinned(int tid, int cpu) noexcept nogil:
    """Whether the mask of a thread (0: the calling one) is exactly this CPU."""
    cdef cpu_set_t mask
    if sched_getaffinity(tid, sizeof(cpu_set_t), &mask):
        return False
    return CPU_COUNT(&mask) == 1 and CPU_ISSET(cpu, &mask)


cdef void unpin(int tid, int cpu, const cpu_set_t *mask) noexcept nogil:
    if pinned(tid, cpu):  # else somebody chose another mask meanwhile
        sched_setaffinity(tid, sizeof(cpu_set_t), mask)


cdef void free_heirs(lease_t *lease, int pid, int depth) noexcept nogil:
    """Give the toucher's mask to its heirs among the threads and descendants of process `pid`."""
    cdef char path[64]
    cdef uint64_t entries[128]
    cdef dirent *entry
    cdef long got, at
    cdef int fd, tid
    if CPU_COUNT(&lease.saved) == 1:
        return
    snprintf(path, sizeof(path), "/proc/%d/task", pid)
    fd = c_open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    while fd >= 0:
        got = syscall(SYS_getdents64, fd, entries, sizeof(entries))
        if got <= 0:
            c_close(fd)
            return
        at = 0
        while at < got:
            entry = <dirent *>(<char *>entries + at)
            at += entry.d_reclen
            tid = atoi(entry.d_name)
            if tid == 0:  # "." and ".."
                continue
            # After the end only processes: a thread is created in no time, and pools pin their threads.
            if ((lease.held or depth < DEPTH) and tid != lease.tid and pinned(tid, lease.cpu)
                    and tid != gettid() and started(pid, tid) >= lease.tick):
                sched_setaffinity(tid, sizeof(cpu_set_t), &lease.saved)
            # It is free already: whom it creates from now on need not be found.
            if depth > 0:
                free_children(lease, pid, tid, depth - 1)


cdef void free_children(lease_t *lease, int pid, int tid, int depth) noexcept nogil:
    """The same for the children of one thread, of which the kernel gives the list as "12 34 "."""
    cdef char text[512]
    cdef ssize_t got, i
    cdef int fd, child = 0
    snprintf(text, sizeof(text), "/proc/%d/task/%d/children", pid, tid)
    fd = c_open(text, O_RDONLY | O_CLOEXEC)
    while fd >= 0:
        got = c_read(fd, text, sizeof(text))
        if got <= 0:
            c_close(fd)
            return
        for i in range(got):
            if text[i] != b" ":
                child = 10 * child + text[i] - c"0"
                continue
            if started(child, child) >= lease.tick:
                free_heirs(lease, child, depth)
            child = 0


cdef int64_t started(int pid, int tid) noexcept nogil:
    """When a thread of process `pid` started, in clock ticks since boot; -1 when there is no such thread."""
    cdef char text[1024]
    cdef char *at
    cdef ssize_t got
    cdef int fd
    snprintf(text, sizeof(text), "/proc/%d/task/%d/stat", pid, tid)
    fd = c_open(text, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return -1
    got = c_read(fd, text, sizeof(text) - 1)
    c_close(fd)
    text[max(got, 0)] = 0
    # Field 22. Field 2 is a name in parentheses, which may itself contain parentheses and spaces.
    at = strrchr(text, c")")
    for _ in range(20):
        at = strchr(at + 1, c" ") if at != NULL else NULL
    return atoll(at) if at != NULL else -1


cdef class Lease:
    """For tests: a lease whose engine is the calling thread."""

    cdef lease_t c

    @property
    def held(self):
        return lease_held(&self.c)

    def saw(self, int tid, int64_t now):
        lease_saw(&self.c, tid, now)

    def saw_many(self, int64_t now):
        lease_saw_many(&self.c, now)

    def expire(self, int64_t now):
        lease_expire(&self.c, now)

    def end(self):
        lease_end(&self.c)
