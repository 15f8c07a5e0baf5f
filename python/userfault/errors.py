"""The exception tree. Whatever carries an errno is an `OSError` too; every text says what to do next."""

from __future__ import annotations

from typing import Any


class UserfaultError(Exception):
    """Base of everything this library raises on its own account."""


class RangeError(UserfaultError, ValueError):
    """An address range is empty, not page-aligned, past the end of the address space, or not held."""


class OverlapError(UserfaultError, ValueError):
    """A range overlaps one that is already held; the text names both."""


class RecordError(UserfaultError, ValueError):
    """An array is not one of the wires' records, or holds records that the target wire cannot say."""


class TruncatedRecordError(UserfaultError, ValueError):
    """A descriptor delivered a byte count that is not a whole number of records.

    Attributes:
        records: copy of the whole records that came with it (structured array, maybe empty).
        tail: the bytes of the unfinished record.
    """

    def __init__(self, message: str, records: Any, tail: bytes) -> None:
        super().__init__(message)
        self.records = records
        self.tail = tail


class EndOfRecordsError(UserfaultError, EOFError):
    """The writing side of a pipe or socket is closed; no record will follow."""


class ClosedError(UserfaultError, ValueError):
    """The object was closed, before the call or while it waited."""


class ForkedError(UserfaultError, RuntimeError):
    """The object belongs to another process: a fork child may not act on its parent's memory."""


class BusyError(UserfaultError, RuntimeError):
    """Somebody else is reading this descriptor: a service, its keeper, or another thread."""


class SourceError(UserfaultError, ValueError):
    """A page source cannot serve here; the text says why and what to use."""


class LimitError(UserfaultError, MemoryError):
    """A memory limit leaves no room; the text names it."""


class UnsupportedError(UserfaultError, OSError):
    """The kernel does not have what was asked for; the text lists what it has."""


class UnavailableError(UserfaultError, OSError):
    """No way of opening a userfaultfd works here; the text lists each way, its errno and its remedy."""


class UffdError(UserfaultError, OSError):
    """A userfaultfd system call failed.

    Attributes:
        done: bytes that were completed before the failure (0 where the call has no progress).
    """

    def __init__(self, errno: int, message: str, done: int = 0) -> None:
        super().__init__(errno, message)
        self.done = done


class ChangingError(UffdError):
    """EAGAIN: the address space is changing, or only part was done. Read what is pending, retry the rest."""


class PageExistsError(UffdError):
    """EEXIST: the page after `done` bytes is already there. Wake it, and go on after it."""


class NotRegisteredError(UffdError):
    """ENOENT: the range is not, or no longer, registered with this descriptor (or crosses two mappings)."""


class ProcessGoneError(UffdError):
    """ESRCH (ENOSPC on Linux 4.11 to 4.13): the process whose memory it was has exited."""
