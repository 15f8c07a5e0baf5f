"""`Descriptor`: who may use a userfaultfd, and when its number may be given back.

The number stays open while somebody holds it: a call in progress, an engine, or memory that is still
registered. Closing wakes the readers at once; the last holder closes the number, so no call ever
runs on a number that has been given to another file.
"""

from libc.errno cimport errno
from libc.stdint cimport uint64_t

import os
import weakref

from userfault._abi cimport c_close, c_write, getpid
from userfault._errno cimport error_for

from userfault.errors import ClosedError, ForkedError

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_CLOEXEC
    int EFD_NONBLOCK


# What a fork child inherits and has no use for: it would hold the parent's userfaultfds, and those of other
# children, open. Each has a method `leave_to_parent`.
inherited = weakref.WeakSet()

# What reads fork records. Each has a method `settle`, to wait until it knows of every descriptor that one has
# brought: read() installs that, and lets fork() return, before the record is in our memory.
hearers = weakref.WeakSet()


def leave_to_parent():
    for one in inherited:
        one.leave_to_parent()


os.register_at_fork(after_in_child=leave_to_parent)


cdef class Descriptor:
    """Owner of the userfaultfd number `fd`, bound to the process that made it.

    A borrowed number is somebody else's, and never closed here.
    """

    def __cinit__(self, int fd, bint borrowed=False):
        self.fd = self.closed_fd = self.kick_fd = -1
        self.pid = getpid()
        self.holders = 1
        self.closed_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.closed_fd >= 0:
            self.kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.kick_fd < 0:
            raise error_for("eventfd", errno)
        self.borrowed = borrowed
        self.fd = fd  # from here on it is ours to close
        inherited.add(self)

    def __dealloc__(self):
        if self.fd >= 0 and not self.borrowed:
            c_close(self.fd)
        if self.closed_fd >= 0:
            c_close(self.closed_fd)
        if self.kick_fd >= 0:
            c_close(self.kick_fd)

    def leave_to_parent(self):
        """In a fork child: close what was inherited."""
        for fd in (self.fd if not self.borrowed else -1, self.closed_fd, self.kick_fd):
            if fd >= 0:
                c_close(fd)
        self.fd = self.closed_fd = self.kick_fd = -1

    cpdef int check(self) except -1:
        """The number. Raises ClosedError once closed, ForkedError in a fork child."""
        if self.closed:
            raise ClosedError("it is closed")
        return self.of_this_process()

    cdef int of_this_process(self) except -1:
        if getpid() != self.pid:
            raise ForkedError(f"this belongs to process {self.pid}, and its ioctls would act on that "
                              "process's memory: make one of your own in the child")
        return self.fd

    cpdef int hold(self, bint even_closed=False) except -1:
        """Keep the number open until `release`, and return it; raises as `check` does.

        `even_closed`: also after close(), as long as others hold it.
        """
        cdef int fd = self.of_this_process() if even_closed and self.holders else self.check()
        self.holders += 1
        return fd

    cpdef object release(self):
        """Give a hold back; the last one closes the number."""
        self.holders -= 1
        if self.holders == 0 and self.fd >= 0:
            if not self.borrowed:
                c_close(self.fd)
            self.fd = -1

    def __enter__(self):
        return self.hold()

    def __exit__(self, *exc):
        self.release()

    cpdef object kick(self):
        """Make the engine, if one runs, look at its flags."""
        cdef uint64_t one = 1
        # The eventfd is shared with the parent: a fork child keeps its hands off.
        if getpid() == self.pid:
            c_write(self.kick_fd, &one, sizeof(one))

    def close(self):
        """Refuse new calls and wake the readers. Idempotent; a fork child closes its copy, no more."""
        cdef uint64_t one = 1
        if self.closed:
            return
        self.closed = True
        if getpid() == self.pid:
            c_write(self.closed_fd, &one, sizeof(one))
            self.release()

    def reading(self):
        """How many reads are in progress."""
        return self.readers
