"""`Remote`: a source that another process fills, and the thread that keeps one such process running.

The process that touches a page may sleep with the GIL held. So whoever asks here, and the thread that starts
a pager anew when one has died, take neither the GIL nor malloc: argument lists are made beforehand, and
posix_spawn(3) shares the memory with the new process until that runs its program.
"""

from libc.errno cimport EINTR, EIO, ESRCH, errno
from libc.stdint cimport UINT64_MAX, int64_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, strlen

from cpython.exc cimport PyErr_CheckSignals

from userfault._abi cimport (
    POLLIN, c_close, c_write, getpid, load_int, load_u64, pollfd, ppoll, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, store_int, swap_int_if, timespec,
)
from userfault._crew cimport pthread_cond_t, pthread_t, start_thread
from userfault._errno cimport error_for
from userfault._post cimport (
    ASKED, DONE, ENDED, FAILED, IDLE, MOST_SLOTS, READ, READY, SLOT_BYTES, STARTING, SYNC, WORDS, WRITE,
    bytes_of, data_of, futex_wait, futex_wake, head_t, slot_of, slot_t,
)
from userfault._say cimport make_printable
from userfault._source cimport Source

from userfault._descriptor import inherited
from userfault.errors import ForkedError, SourceError

cdef extern from "<errno.h>" nogil:
    int ECANCELED

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int c_madvise "madvise"(void *address, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MADV_DONTFORK

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_CLOEXEC

cdef extern from "<pthread.h>" nogil:
    int pthread_join(pthread_t thread, void **result)
    int pthread_cond_init(pthread_cond_t *condition, const void *attributes)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_broadcast(pthread_cond_t *condition)

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    ctypedef struct siginfo_t:
        int si_code
        int si_status
    int SIGINT, SIGKILL, CLD_EXITED
    int kill(int pid, int signal)
    int sigemptyset(sigset_t *set)
    int sigaddset(sigset_t *set, int signal)

cdef extern from "<spawn.h>" nogil:
    ctypedef struct posix_spawnattr_t:
        pass
    ctypedef struct posix_spawn_file_actions_t:
        pass
    int POSIX_SPAWN_SETSIGMASK
    int posix_spawn(int *pid, const char *path, const posix_spawn_file_actions_t *actions,
                    const posix_spawnattr_t *attributes, char **argv, char **envp)
    int posix_spawnattr_init(posix_spawnattr_t *attributes)
    int posix_spawnattr_destroy(posix_spawnattr_t *attributes)
    int posix_spawnattr_setflags(posix_spawnattr_t *attributes, short flags)
    int posix_spawnattr_setsigmask(posix_spawnattr_t *attributes, const sigset_t *set)
    int posix_spawn_file_actions_init(posix_spawn_file_actions_t *actions)
    int posix_spawn_file_actions_destroy(posix_spawn_file_actions_t *actions)
    int posix_spawn_file_actions_adddup2(posix_spawn_file_actions_t *actions, int fd, int new)
    int posix_spawn_file_actions_addopen(posix_spawn_file_actions_t *actions, int fd, const char *path,
                                         int flags, int mode)

cdef extern from "<sys/wait.h>" nogil:
    int P_PID, WEXITED, WNOHANG
    int waitid(int kind, unsigned int id, siginfo_t *info, int options)

cdef extern from *:
    """
    #include <sys/syscall.h>
    #ifndef P_PIDFD
    #define P_PIDFD 3
    #endif
    """
    int P_PIDFD, SYS_pidfd_open, SYS_pidfd_send_signal
    long syscall(long number, ...) nogil

DEF LONGEST_REASON = 640
DEF FAILURES = 64          # as many as there can be requests
DEF PAUSE_MS = 50          # before a pager that failed is started again; doubled each time
DEF MOST_PAUSE_MS = 1000
DEF KILLED_MS = 1000       # a pager that was killed, and does not end: in a system call that cannot be left
DEF SIGNALS_MS = 50
DEF MOST_ERRNO = 4095

# What was asked for and failed: an errno, and why.
cdef struct failure_t:
    uint64_t offset
    uint64_t length
    int error
    char words[LONGEST_REASON]

cdef struct pager_t:
    char *memory           # shared with the pager: what it says there is checked
    head_t *head
    int n_slots
    pthread_mutex_t lock   # of what follows
    pthread_cond_t freed
    unsigned char busy[MOST_SLOTS]
    failure_t failures[FAILURES]  # the last ones, a ring
    uint64_t n_failures
    int ended              # errno of every request from now on; 0
    int stop_fd            # readable: end
    int pid
    int starts
    int patience           # starts in a row that serve nothing
    int written            # the first pager (of `starts`) that was given a WRITE since the last SYNC; 0
    char **argv
    char **envp
    posix_spawn_file_actions_t actions
    posix_spawnattr_t attributes


# -- asking -----------------------------------------------------------------------------------------------

cdef int take_slot(pager_t *pager) noexcept nogil:
    """A slot that is nobody's, when there is one."""
    cdef int i
    pthread_mutex_lock(&pager.lock)
    while True:
        for i in range(pager.n_slots):
            if not pager.busy[i]:
                pager.busy[i] = True
                pthread_mutex_unlock(&pager.lock)
                return i
        pthread_cond_wait(&pager.freed, &pager.lock)


cdef void note_words(pager_t *pager, uint64_t offset, uint64_t length, int error, const char *words,
                     size_t size) noexcept nogil:
    """Keep why a request failed; the pager's bytes may be any. With the lock held."""
    cdef failure_t *failure = &pager.failures[pager.n_failures % FAILURES]
    pager.n_failures += 1
    failure.offset = offset
    failure.length = length
    failure.error = error
    memcpy(failure.words, words, size)  # before it is looked at: the pager may write there meanwhile
    failure.words[size - 1] = 0
    make_printable(failure.words)


cdef int ask(pager_t *pager, int what, uint64_t offset, void *to, const void *data,
             size_t length) noexcept nogil:
    """One request, of no more than a slot's bytes. 0 or -errno."""
    cdef int i = take_slot(pager), result = -EIO, start = load_int(&pager.starts)
    cdef slot_t *slot = slot_of(pager.memory, i)
    slot.what = what
    slot.offset = offset
    slot.length = length
    slot.words[0] = 0
    if data != NULL:
        memcpy(data_of(pager.memory, pager.n_slots, i), data, length)
    store_int(&slot.state, ASKED)
    futex_wake(&slot.state)
    # `end_requests` sets `ended`, and then takes back what is ASKED: one of us sees the other.
    while load_int(&slot.state) == ASKED and not load_int(&pager.ended):
        futex_wait(&slot.state, ASKED, -1)
    if load_int(&slot.state) == DONE:
        result = slot.result
        if result == 0 and to != NULL:
            memcpy(to, data_of(pager.memory, pager.n_slots, i), length)
        elif not -MOST_ERRNO <= result <= 0:
            result = -EIO
    elif load_int(&pager.ended):
        result = -load_int(&pager.ended)
    pthread_mutex_lock(&pager.lock)
    if result != 0 and not load_int(&pager.ended):
        note_words(pager, offset, length, -result, slot.words, WORDS)
    if what == WRITE and not pager.written:
        pager.written = start
    store_int(&slot.state, IDLE)
    pager.busy[i] = False
    pthread_cond_broadcast(&pager.freed)
    pthread_mutex_unlock(&pager.lock)
    return result


cdef int ask_all(pager_t *pager, int what, uint64_t offset, char *to, const char *data,
                 size_t length) noexcept nogil:
    """As many requests as that takes, one after the other. 0 or -errno."""
    cdef size_t at = 0, step
    cdef int result = 0
    while at < length and result == 0:
        step = min(length - at, <size_t>SLOT_BYTES)
        result = ask(pager, what, offset + at, to + at if to != NULL else NULL,
                     data + at if data != NULL else NULL, step)
        at += step
    return result


cdef int fill_from_pager(void *ctx, uint64_t offset, void *dst, size_t length) noexcept nogil:
    return ask_all(<pager_t *>ctx, READ, offset, <char *>dst, NULL, length)


cdef int write_to_pager(void *ctx, uint64_t offset, const void *src, size_t length) noexcept nogil:
    return ask_all(<pager_t *>ctx, WRITE, offset, NULL, <const char *>src, length)


cdef int sync_pager(void *ctx) noexcept nogil:
    cdef pager_t *pager = <pager_t *>ctx
    cdef const char *lost = "its pager died with changes that it had taken and not yet made durable"
    cdef int result = ask(pager, SYNC, 0, NULL, NULL, 0)
    pthread_mutex_lock(&pager.lock)
    if result == 0 and pager.head.buffers and pager.written and pager.written != load_int(&pager.starts):
        result = -EIO
        note_words(pager, 0, UINT64_MAX, EIO, lost, strlen(lost) + 1)
    if not load_int(&pager.ended):
        pager.written = 0
    pthread_mutex_unlock(&pager.lock)
    return result


cdef bint words_of_pager(void *ctx, int error, uint64_t offset, char *text, size_t size) noexcept nogil:
    cdef pager_t *pager = <pager_t *>ctx
    cdef failure_t *failure
    cdef uint64_t i
    cdef bint told = False
    pthread_mutex_lock(&pager.lock)
    for i in range(min(pager.n_failures, <uint64_t>FAILURES)):
        failure = &pager.failures[(pager.n_failures - 1 - i) % FAILURES]
        told = failure.words[0] != 0 and (
            failure.error == error if offset == UINT64_MAX else offset - failure.offset < failure.length)
        if told:
            snprintf(text, size, "%s", failure.words)
            break
    pthread_mutex_unlock(&pager.lock)
    return told


# -- keeping a pager ---------------------------------------------------------------------------------------

cdef void end_requests(pager_t *pager, int error) noexcept nogil:
    """Every request fails from now on, also those that wait."""
    cdef slot_t *slot
    cdef int i
    store_int(&pager.ended, error)
    for i in range(pager.n_slots):
        slot = slot_of(pager.memory, i)
        swap_int_if(&slot.state, ASKED, IDLE)
        futex_wake(&slot.state)
    store_int(&pager.head.phase, ENDED)
    futex_wake(&pager.head.phase)


cdef void end_closed(pager_t *pager) noexcept nogil:
    """We are told to stop: what failed before is not why requests fail from now on."""
    cdef const char *words = "its pager was closed"
    pthread_mutex_lock(&pager.lock)
    note_words(pager, 0, UINT64_MAX, ECANCELED, words, strlen(words) + 1)
    pthread_mutex_unlock(&pager.lock)
    end_requests(pager, ECANCELED)


cdef bint is_wanted(pager_t *pager) noexcept nogil:
    """Whether somebody waits for an answer. Wakes those who have one: a pager may have died before it did."""
    cdef slot_t *slot
    cdef bint wanted = False
    cdef int i
    for i in range(pager.n_slots):
        slot = slot_of(pager.memory, i)
        if load_int(&slot.state) == ASKED:
            wanted = True
        else:
            futex_wake(&slot.state)
    return wanted


cdef bint wait_for(int pidfd, int stop_fd, int64_t ms) noexcept nogil:
    """Wait until the process ends (pidfd >= 0), or we are told to stop: True. ms -1: without a limit."""
    cdef pollfd fds[2]
    cdef timespec limit
    fds[0].fd = stop_fd
    fds[1].fd = pidfd
    fds[0].events = fds[1].events = POLLIN
    fds[0].revents = fds[1].revents = 0
    limit.tv_sec = ms // 1000
    limit.tv_nsec = ms % 1000 * 1000000
    while ppoll(fds, 2, NULL if ms < 0 else &limit, NULL) < 0 and errno == EINTR:
        pass
    return fds[0].fd >= 0 and fds[0].revents != 0


cdef bint run_pager(pager_t *pager, char *reason) noexcept nogil:
    """Start a pager and wait for its end, which `reason` then says; True: we are told to stop."""
    cdef siginfo_t info
    cdef int pidfd, pid = 0, error
    cdef bint stop
    error = posix_spawn(&pid, pager.argv[0], &pager.actions, &pager.attributes, pager.argv, pager.envp)
    if error:
        snprintf(reason, LONGEST_REASON, "no pager could be started (errno %d)", error)
        return wait_for(-1, pager.stop_fd, 0)
    store_int(&pager.starts, pager.starts + 1)
    store_int(&pager.pid, pid)
    pidfd = <int>syscall(SYS_pidfd_open, <long>pid, <long>0)
    if pidfd < 0:
        # It has ended already, and somebody knows of that (ESRCH); or there are too many descriptors.
        error = errno
        if error != ESRCH:
            kill(pid, SIGKILL)
            waitid(P_PID, pid, &info, WEXITED)
        store_int(&pager.pid, 0)
        snprintf(reason, LONGEST_REASON, "its pager ended, or there is no descriptor for it (errno %d)",
                 error)
        return wait_for(-1, pager.stop_fd, 0)
    stop = wait_for(pidfd, pager.stop_fd, -1)
    if stop:
        syscall(SYS_pidfd_send_signal, <long>pidfd, <long>SIGKILL, NULL, <long>0)
        wait_for(pidfd, -1, KILLED_MS)
    store_int(&pager.pid, 0)
    # Whoever waits for all children of the process may have been faster.
    info.si_status = info.si_code = 0
    waitid(P_PIDFD, pidfd, &info, WEXITED | WNOHANG)
    c_close(pidfd)
    if info.si_code == CLD_EXITED:
        snprintf(reason, LONGEST_REASON, "its pager exited with status %d", info.si_status)
    elif info.si_code:
        snprintf(reason, LONGEST_REASON, "its pager was killed by signal %d", info.si_status)
    else:
        snprintf(reason, LONGEST_REASON, "its pager ended")
    return stop


cdef void *keep_pager(void *argument) noexcept nogil:
    """The whole life of the thread that keeps a pager: the pager dies with it (PR_SET_PDEATHSIG)."""
    cdef pager_t *pager = <pager_t *>argument
    cdef char reason[LONGEST_REASON]
    cdef char words[LONGEST_REASON + 128]
    cdef int failures = 0, deaths = 0, phase, error = EIO
    cdef uint64_t answered
    cdef bint wanted
    while True:
        answered = load_u64(&pager.head.answered)
        store_int(&pager.head.phase, STARTING)
        if run_pager(pager, reason):
            end_closed(pager)
            return NULL
        phase = load_int(&pager.head.phase)
        wanted = is_wanted(pager)
        if load_u64(&pager.head.answered) != answered:
            failures = deaths = 0
        elif wanted or phase != READY:
            failures += 1
        deaths += 1
        if phase == FAILED:
            memcpy(reason, pager.head.words, WORDS)
            reason[WORDS - 1] = 0
            error = pager.head.error
            if not 0 < error <= MOST_ERRNO:
                error = EIO
        if failures >= pager.patience or (phase == FAILED and pager.starts == 1):
            break
        if deaths > 1 and wait_for(-1, pager.stop_fd, min(PAUSE_MS << min(deaths, 5), MOST_PAUSE_MS)):
            end_closed(pager)
            return NULL
    pthread_mutex_lock(&pager.lock)
    if phase == FAILED or failures < 2:
        note_words(pager, 0, UINT64_MAX, error, reason, LONGEST_REASON)
    else:
        snprintf(words, sizeof(words), "%s, %d times in a row without having given a page", reason, failures)
        note_words(pager, 0, UINT64_MAX, error, words, LONGEST_REASON)
    pthread_mutex_unlock(&pager.lock)
    end_requests(pager, error)
    wait_for(-1, pager.stop_fd, -1)
    return NULL


# -- the source --------------------------------------------------------------------------------------------

cdef char **strings(list texts) except NULL:
    """A NULL-terminated array of the C strings of `texts`, which must stay alive."""
    cdef char **array = <char **>calloc(len(texts) + 1, sizeof(char *))
    cdef Py_ssize_t i
    if array == NULL:
        raise MemoryError
    for i in range(len(texts)):
        array[i] = <char *>(<bytes>texts[i])
    return array


cdef class Remote(Source):
    """A source that a process started by `argv` fills, through the shared memory `memory_fd` (`Post`).

    Args:
        argv, environment: the process's, as bytes; it inherits both descriptors by their numbers.
        memory_fd: as many bytes as `memory_bytes` says, which nobody can take away (F_SEAL_SHRINK); its own
            from here on, as is config_fd.
        workers: how many requests can be under way at the same time.
        patience: how often in a row a process is started that gives no page.

    Returns from __init__ when the process can take requests. Raises SourceError when it cannot make its
    source, in that source's words; OSError.
    """

    cdef pager_t pager
    cdef pthread_t thread
    cdef bint running
    cdef int owner, memory_fd, config_fd
    cdef list kept
    cdef readonly uint64_t chunk_bytes
    cdef object __weakref__

    def __cinit__(self):
        self.pager.stop_fd = self.memory_fd = self.config_fd = -1
        self.owner = getpid()
        pthread_mutex_init(&self.pager.lock, NULL)
        pthread_cond_init(&self.pager.freed, NULL)
        posix_spawn_file_actions_init(&self.pager.actions)
        posix_spawnattr_init(&self.pager.attributes)

    def __init__(self, list argv, list environment, int memory_fd, int config_fd, int workers, int patience):
        cdef pager_t *pager = &self.pager
        cdef sigset_t blocked
        cdef int error
        if self.memory_fd >= 0:
            raise SourceError("a pager is started once")
        self.memory_fd = memory_fd
        self.config_fd = config_fd
        self.c.ctx = pager
        self.c.words = words_of_pager
        inherited.add(self)
        pager.n_slots = workers
        pager.patience = patience
        pager.memory = <char *>mmap(NULL, bytes_of(workers), PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0)
        if <void *>pager.memory == <void *>-1:
            pager.memory = NULL
            raise error_for("mmap of the memory shared with a pager", errno)
        c_madvise(pager.memory, bytes_of(pager.n_slots), MADV_DONTFORK)
        pager.head = <head_t *>pager.memory
        pager.stop_fd = eventfd(0, EFD_CLOEXEC)
        if pager.stop_fd < 0:
            raise error_for("eventfd", errno)
        self.kept = [argv, environment]
        pager.argv = strings(argv)
        pager.envp = strings(environment)
        # Copying a descriptor to its own number is how it is kept open in the new process.
        posix_spawn_file_actions_addopen(&pager.actions, 0, b"/dev/null", 0, 0)
        posix_spawn_file_actions_adddup2(&pager.actions, memory_fd, memory_fd)
        posix_spawn_file_actions_adddup2(&pager.actions, config_fd, config_fd)
        # Control-C is for the process whose pager it is.
        sigemptyset(&blocked)
        sigaddset(&blocked, SIGINT)
        posix_spawnattr_setsigmask(&pager.attributes, &blocked)
        posix_spawnattr_setflags(&pager.attributes, POSIX_SPAWN_SETSIGMASK)
        error = start_thread(&self.thread, keep_pager, pager)
        if error:
            raise error_for("starting a thread for the pager", error)
        self.running = True
        while load_int(&pager.head.phase) != READY and not load_int(&pager.ended):
            with nogil:
                futex_wait(&pager.head.phase, STARTING, SIGNALS_MS)
            PyErr_CheckSignals()
        if load_int(&pager.ended):
            raise SourceError(self.explain(pager.ended))
        self.c.size = pager.head.nbytes
        self.chunk_bytes = pager.head.chunk_bytes
        self.c.fill = fill_from_pager
        self.c.whole_units = True
        if pager.head.writable:
            self.c.write = write_to_pager
            self.c.sync = sync_pager

    def close(self):
        """End the process, and with it every request. Idempotent; in a fork child nothing is done."""
        cdef uint64_t one = 1
        if self.running and self.owner == getpid():
            self.running = False
            c_write(self.pager.stop_fd, &one, sizeof(one))
            with nogil:
                pthread_join(self.thread, NULL)

    def __dealloc__(self):
        cdef uint64_t one = 1
        if self.owner == getpid():
            if self.running:
                c_write(self.pager.stop_fd, &one, sizeof(one))
                pthread_join(self.thread, NULL)
            if self.pager.memory != NULL:
                munmap(self.pager.memory, bytes_of(self.pager.n_slots))
        self.leave_to_parent()
        free(self.pager.argv)
        free(self.pager.envp)
        posix_spawn_file_actions_destroy(&self.pager.actions)
        posix_spawnattr_destroy(&self.pager.attributes)

    def leave_to_parent(self):
        """In a fork child: close what was inherited."""
        for fd in (self.memory_fd, self.config_fd, self.pager.stop_fd):
            if fd >= 0:
                c_close(fd)
        self.memory_fd = self.config_fd = self.pager.stop_fd = -1

    @property
    def closed(self):
        """Whether no request is answered any more: it was closed, or given up."""
        return load_int(&self.pager.ended) != 0

    @property
    def pid(self):
        """The process that fills now; 0 between two of them."""
        return load_int(&self.pager.pid)

    def stats(self):
        """What was counted so far: `starts` of a process, `answered` requests, `reads` and `read_bytes`
        (calls of the source, and what it gave), `writes` and `written_bytes`. A process that died may have
        lost its last counts. Raises ForkedError."""
        cdef head_t *head = self.pager.head
        if self.owner != getpid():
            raise ForkedError("the pager belongs to the parent")
        return {"starts": load_int(&self.pager.starts), "answered": load_u64(&head.answered),
                "reads": load_u64(&head.reads), "read_bytes": load_u64(&head.read_bytes),
                "writes": load_u64(&head.writes), "written_bytes": load_u64(&head.written_bytes)}


def memory_bytes(int workers):
    """How much memory a pager shares for so many requests at the same time."""
    return bytes_of(workers)
