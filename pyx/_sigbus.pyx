"""SIGBUS: whose fault it is, and to whom it goes that is none of ours.

The handler stays once it is there. What handled the signal before it is called for whatever is not ours;
whoever replaces it is found out, and becomes what is called. It runs on the stack that the fault was taken
on: alternate stacks are too small for some of what it does.
"""

from libc.errno cimport EOPNOTSUPP, errno
from libc.stdint cimport uint64_t, uintptr_t

from userfault._abi cimport (
    getpid, load_int, load_ptr, load_u64, store_int, store_ptr, store_u64, swap_int_if, swap_u64_if,
)
from userfault._errno cimport error_for
from userfault._inline cimport serve_own

from userfault.errors import UnsupportedError

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    ctypedef struct siginfo_t:
        int si_code
        void *si_addr
    ctypedef void (*plain_t)(int) noexcept nogil
    ctypedef void (*handler_t)(int, siginfo_t *, void *) noexcept nogil
    struct action_t "sigaction":
        plain_t sa_handler
        handler_t sa_sigaction
        sigset_t sa_mask
        int sa_flags
    int sigaction(int signal, const action_t *new, action_t *old)
    int sigemptyset(sigset_t *set)
    int sigismember(const sigset_t *set, int signal)
    int pthread_sigmask(int how, const sigset_t *set, sigset_t *old)
    int c_raise "raise"(int signal)
    int SIGBUS, SIG_BLOCK, SIG_SETMASK, SA_SIGINFO, SA_NODEFER, SA_RESTART, SA_RESETHAND
    int BUS_ADRERR, BUS_MCEERR_AO
    plain_t SIG_DFL, SIG_IGN

cdef extern from "<pthread.h>" nogil:
    uintptr_t pthread_self()

cdef extern from *:
    """
    #include <errno.h>
    #include <ucontext.h>
    #define uf_set_errno(value) (errno = (value))
    /* Whether the touch was a write: the page fault's error code. -1: this processor does not tell. */
    #ifdef __x86_64__
    #define uf_is_write(context) (((ucontext_t *)(context))->uc_mcontext.gregs[19 /* REG_ERR */] >> 1 & 1)
    #else
    #define uf_is_write(context) -1
    #endif
    """
    void set_errno "uf_set_errno"(int value) nogil
    int is_write "uf_is_write"(void *context) nogil

DEF BEFORE = 16     # who had the signal: the last ones are kept
DEF PASSING = 16    # threads that pass a signal on at the same time

# What to do with what is not ours: the action that ours replaced last, and below it those before.
ctypedef struct before_t:
    action_t action
    before_t *older

ctypedef struct passing_t:
    uint64_t thread
    uintptr_t frame
    void *context
    before_t *to

cdef before_t default       # zeroed: SIG_DFL
cdef before_t befores[BEFORE]
cdef uint64_t n_befores = 0
cdef void *last = &default
cdef passing_t passing[PASSING]
cdef int changing = 0       # the process in which a thread is at it: a fork child does without that
cdef int ending = 0         # the default action has been asked for


cdef void on_sigbus(int signal, siginfo_t *info, void *context) noexcept nogil:
    cdef int saved = errno
    if info.si_code != BUS_ADRERR or not serve_own(<uintptr_t>info.si_addr, is_write(context)):
        pass_on(signal, info, context)
    set_errno(saved)


cdef void pass_on(int signal, siginfo_t *info, void *context) noexcept nogil:
    """Do what would have been done without us."""
    cdef before_t *to = <before_t *>load_ptr(&last)
    cdef const action_t *action
    cdef passing_t *mine = NULL
    cdef uint64_t self = pthread_self()
    cdef uintptr_t frame = <uintptr_t>&action
    cdef sigset_t mask
    cdef int i
    for i in range(PASSING):
        # It may come back to us: who replaced us calls what was there before, or raises it anew.
        if load_u64(&passing[i].thread) == self and frame < passing[i].frame and (
                context == passing[i].context or info.si_code <= 0):
            to = passing[i].to.older if passing[i].to.older != NULL else &default
            mine = &passing[i]
    action = &to.action
    if action.sa_flags & SA_SIGINFO == 0 and (action.sa_handler == SIG_DFL or action.sa_handler == SIG_IGN):
        if action.sa_handler == SIG_DFL or info.si_code > 0:
            end_by_it(info)
        return
    if mine == NULL:
        for i in range(PASSING):
            # Of this thread's own there may be one that was left by siglongjmp(3).
            if mine == NULL and (load_u64(&passing[i].thread) == self
                                 or swap_u64_if(&passing[i].thread, 0, self)):
                mine = &passing[i]
                mine.frame = frame
                mine.context = context
    if mine != NULL:
        mine.to = to
    if action.sa_flags & SA_RESETHAND:
        store_ptr(&last, &default)
    pthread_sigmask(SIG_BLOCK, &action.sa_mask, &mask)
    if action.sa_flags & SA_SIGINFO:
        action.sa_sigaction(signal, info, context)
    else:
        action.sa_handler(signal)
    pthread_sigmask(SIG_SETMASK, &mask, NULL)
    if mine != NULL and mine.frame == frame:
        store_u64(&mine.thread, 0)


cdef void end_by_it(const siginfo_t *info) noexcept nogil:
    """The default action: the process ends by the signal."""
    store_int(&ending, 1)
    sigaction(SIGBUS, &default.action, NULL)
    if info.si_code <= 0 or info.si_code == BUS_MCEERR_AO:
        c_raise(SIGBUS)
    # Else the instruction is tried again, so that a core dump shows where.


cdef inline bint is_ours(const action_t *action) noexcept nogil:
    return action.sa_flags & SA_SIGINFO != 0 and action.sa_sigaction == on_sigbus


cdef int take_sigbus() noexcept nogil:
    """Have our handler there; whoever is there now is called for what is not ours. 0 or -errno."""
    global n_befores
    cdef action_t ours, found
    cdef before_t *before
    cdef int result = 0, pid = getpid(), by = load_int(&changing)
    if sigaction(SIGBUS, NULL, &found) != 0:
        return -errno
    if is_ours(&found) or load_int(&ending) or by == pid or not swap_int_if(&changing, by, pid):
        return 0
    before = &befores[n_befores % BEFORE]
    n_befores += 1
    before.action = found
    before.older = <before_t *>load_ptr(&last)
    if befores <= before.older < befores + BEFORE and n_befores >= BEFORE:
        before.older = &default
    store_ptr(&last, before)
    ours.sa_sigaction = on_sigbus
    # Not deferred: a source's own memory may be served too.
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART
    sigemptyset(&ours.sa_mask)
    if sigaction(SIGBUS, &ours, NULL) != 0:
        result = -errno
    store_int(&changing, 0)
    return result


def take():
    """Have SIGBUS handled by us. Raises UnsupportedError where it is blocked in the calling thread."""
    cdef sigset_t mask
    cdef int result
    pthread_sigmask(SIG_BLOCK, NULL, &mask)
    if sigismember(&mask, SIGBUS):
        raise UnsupportedError(
            EOPNOTSUPP, "SIGBUS is blocked in this thread, which the kernel would kill at its first fault: "
                        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGBUS])")
    result = take_sigbus()
    if result:
        raise error_for("sigaction for SIGBUS", -result)
