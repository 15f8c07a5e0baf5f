"""The ways of opening a userfaultfd, tried in order, and for each that fails why and what mends it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from typing import NamedTuple

from userfault import _consts as c
from userfault import _ioctl
from userfault.errors import UnavailableError

DEVICE = "/dev/userfaultfd"
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK  # poll(2) on a blocking userfaultfd answers POLLERR

_LIMITS = {
    errno.EMFILE: "raise RLIMIT_NOFILE (ulimit -n), or close some descriptors",
    errno.ENFILE: "raise the sysctl fs.file-max",
}
_CONTAINER = "in a container, allow userfaultfd in its seccomp profile (--security-opt seccomp=…)"
_REMEDIES = {
    "device": {
        errno.ENOENT: "Linux 6.1 and later have it; in a container pass --device /dev/userfaultfd",
        errno.EACCES: f"sudo setfacl -m u:$USER:rw {DEVICE}",
        errno.EPERM: "in a container pass --device /dev/userfaultfd",
    },
    "syscall": {
        errno.EPERM: f"sudo sysctl vm.unprivileged_userfaultfd=1, or run with CAP_SYS_PTRACE; {_CONTAINER}",
        errno.ENOSYS: f"needs a kernel with CONFIG_USERFAULTFD; {_CONTAINER}",
    },
    "user-mode-only": {
        errno.EINVAL: "needs Linux 5.11",
        errno.EPERM: _CONTAINER,
        errno.ENOSYS: f"needs a kernel with CONFIG_USERFAULTFD; {_CONTAINER}",
    },
}


class Way(NamedTuple):
    """A way of opening a userfaultfd: whether it works here and, if not, why not and what mends it."""

    name: str
    works: bool
    reason: str
    remedy: str


def _device() -> int:
    with open(DEVICE, "rb+", buffering=0) as device:
        return fcntl.ioctl(device, c.USERFAULTFD_IOC_NEW, _FLAGS)


_WAYS: dict[str, Callable[[], int]] = {
    "device": _device,
    "syscall": lambda: _ioctl.open_by_syscall(_FLAGS),
    # Needs no privilege, but faults taken inside a system call fail with EFAULT.
    "user-mode-only": lambda: _ioctl.open_by_syscall(_FLAGS | c.UFFD_USER_MODE_ONLY),
}


def _try(name: str) -> tuple[int, Way]:
    """A descriptor, or -errno."""
    try:
        return _WAYS[name](), Way(name, True, "", "")
    except OSError as error:
        number = error.errno or 0
        remedy = _REMEDIES[name].get(number) or _LIMITS.get(number, "")
        reason = f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"
        return -number, Way(name, False, reason, remedy)


def open_userfaultfd() -> tuple[int, str]:
    """A new non-blocking descriptor, by the first way that works, and that way's name.

    Raises UnavailableError that lists every way. Source: userfaultfd(2).
    """
    failed = []
    fd = -errno.ENOSYS
    for name in _WAYS:
        fd, way = _try(name)
        if way.works:
            return fd, name
        failed.append(way)
    lines = "".join(f"\n  {way.name}: {way.reason}. {way.remedy}" for way in failed)
    raise UnavailableError(-fd, f"no way of opening a userfaultfd works here:{lines}")


def ways() -> tuple[Way, ...]:
    """Every way, tried on throw-away descriptors."""
    tried = []
    for name in _WAYS:
        fd, way = _try(name)
        if way.works:
            os.close(fd)
        tried.append(way)
    return tuple(tried)
