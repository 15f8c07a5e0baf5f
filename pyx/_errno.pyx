"""The errno table: for every errno of a userfaultfd call, what the engine does and what Python raises."""

from libc cimport errno as e
from libc.stdint cimport uint64_t

import os

from userfault import errors

# errno, the engine's decision, the exception, what to do next.
# Sources: ioctl_userfaultfd(2) and its subpages, fs/userfaultfd.c, mm/userfaultfd.c.
ROWS = (
    (e.EAGAIN, PARK, errors.ChangingError,
     "the address space is changing (an event waits to be read) or only a part was done: "
     "read the pending events, then retry the rest"),
    (e.EEXIST, NEXT, errors.PageExistsError,
     "a page is already there: wake() it and go on after it"),
    (e.ENOENT, FORGET, errors.NotRegisteredError,
     "the range is not registered with this userfaultfd, or crosses a mapping's end"),
    (e.ESRCH, STOP, errors.ProcessGoneError, "the process whose memory it was has exited"),
    (e.ENOSPC, STOP, errors.ProcessGoneError,
     "the process whose memory it was has exited (Linux 4.11 to 4.13)"),
    (e.EINTR, RETRY, errors.UffdError, "interrupted by a signal"),
    (e.ENOMEM, PARK, errors.UffdError,
     "out of memory, or of mappings: free memory, or raise the sysctl vm.max_map_count"),
    (e.EBADF, STOP, errors.UffdError, "the descriptor is closed"),
    (e.EFAULT, POISON, errors.UffdError, "the source memory cannot be read, or is itself missing"),
    (e.EINVAL, POISON, errors.UffdError,
     "the kernel refuses the arguments: misaligned, not anonymous memory, or an ioctl that this range or "
     "kernel does not have (see Region.ioctls)"),
    (e.EBUSY, POISON, errors.UffdError,
     "the memory is registered with another userfaultfd, or its pages are pinned or shared: "
     "unregister it there first"),
    (e.EPERM, POISON, errors.UffdError,
     "not permitted: needs CAP_SYS_PTRACE (see `userfault doctor`)"),
    (e.ENOTTY, STOP, errors.UffdError, "the descriptor is not a userfaultfd"),
    (e.EMFILE, POISON, errors.UffdError,
     "too many open descriptors: raise RLIMIT_NOFILE (ulimit -n), or close some"),
    (e.ENFILE, POISON, errors.UffdError,
     "the system is out of descriptors: raise the sysctl fs.file-max"),
)

DEF LIMIT = 134  # errnos end at 133 (EHWPOISON)
cdef int decisions[LIMIT]
cdef dict raising = {}

for _err, _decision, _class, _text in ROWS:
    decisions[<int>_err] = _decision
    raising[_err] = (_class, _text)


cdef decision_t decide(int err) noexcept nogil:
    """What the engine does about `err`; an errno that the table does not name fails closed."""
    return <decision_t>decisions[err] if 0 < err < LIMIT else POISON


cpdef object error_for(str call, int err, uint64_t done=0):
    """The exception for errno `err` of `call`, naming the remedy; `done` is the progress in bytes."""
    kind, text = raising.get(err, (errors.UffdError, "not an answer that the manual pages name"))
    progress = f" after {done} bytes" if done else ""
    return kind(err, f"{call}: {os.strerror(err)}{progress}: {text}", done)


def decision(int err):
    """The name of what the engine does about `err`."""
    return ("POISON", "RETRY", "PARK", "NEXT", "FORGET", "STOP")[decide(err)]
