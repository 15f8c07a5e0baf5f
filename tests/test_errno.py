"""The errno table: each row's decision and exception."""

from __future__ import annotations

import errno
import os

import pytest

import userfault as uf
from userfault import _errno

ROWS = {
    errno.EAGAIN: ("PARK", uf.ChangingError, "pending events"),
    errno.EEXIST: ("NEXT", uf.PageExistsError, "wake"),
    errno.ENOENT: ("FORGET", uf.NotRegisteredError, "not registered"),
    errno.ESRCH: ("STOP", uf.ProcessGoneError, "exited"),
    errno.ENOSPC: ("STOP", uf.ProcessGoneError, "exited"),
    errno.EINTR: ("RETRY", uf.UffdError, "signal"),
    errno.ENOMEM: ("PARK", uf.UffdError, "vm.max_map_count"),
    errno.EBADF: ("STOP", uf.UffdError, "closed"),
    errno.EFAULT: ("POISON", uf.UffdError, "source memory"),
    errno.EINVAL: ("POISON", uf.UffdError, "Region.ioctls"),
    errno.EBUSY: ("POISON", uf.UffdError, "another userfaultfd"),
    errno.EPERM: ("POISON", uf.UffdError, "CAP_SYS_PTRACE"),
    errno.ENOTTY: ("STOP", uf.UffdError, "not a userfaultfd"),
    errno.EMFILE: ("POISON", uf.UffdError, "RLIMIT_NOFILE"),
    errno.ENFILE: ("POISON", uf.UffdError, "fs.file-max"),
    errno.EIO: ("POISON", uf.UffdError, "manual pages"),
}


def test_every_row_is_here() -> None:
    assert {row[0] for row in _errno.ROWS} == set(ROWS) - {errno.EIO}


@pytest.mark.parametrize("number", ROWS, ids=errno.errorcode.get)
def test_row(number: int) -> None:
    decision, kind, text = ROWS[number]
    error = _errno.error_for("UFFDIO_X", number, 4096)
    assert type(error) is kind
    assert error.errno == number
    assert error.done == 4096
    assert isinstance(error, OSError)
    for part in ("UFFDIO_X", os.strerror(number), "4096 bytes", text):
        assert part in str(error)
    assert _errno.decision(number) == decision


def test_errnos_outside_the_table_fail_closed() -> None:
    for number in (-1, 0, 7, 133, 134, 10_000):
        assert _errno.decision(number) == "POISON"
