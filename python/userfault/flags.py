"""The kernel's bit masks as IntFlags. Bits that this version does not know are kept, and print as numbers."""

from __future__ import annotations

from enum import IntEnum, IntFlag, StrEnum

from userfault import _consts as c


class Api(StrEnum):
    """The record formats: RFC v1 (8 bytes), RFC v2 (16 bytes), and mainline's `uffd_msg` (32 bytes)."""

    V1 = "v1"
    V2 = "v2"
    MSG = "msg"


class Event(IntEnum):
    """UFFD_EVENT_*: what a record of msg is about, its field `event`."""

    PAGEFAULT = c.UFFD_EVENT_PAGEFAULT
    FORK = c.UFFD_EVENT_FORK
    REMAP = c.UFFD_EVENT_REMAP
    REMOVE = c.UFFD_EVENT_REMOVE
    UNMAP = c.UFFD_EVENT_UNMAP


class Feature(IntFlag):
    """UFFD_FEATURE_*: what a mainline kernel has, or what a descriptor agreed to (ioctl_userfaultfd(2))."""

    PAGEFAULT_FLAG_WP = c.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    EVENT_FORK = c.UFFD_FEATURE_EVENT_FORK
    EVENT_REMAP = c.UFFD_FEATURE_EVENT_REMAP
    EVENT_REMOVE = c.UFFD_FEATURE_EVENT_REMOVE
    MISSING_HUGETLBFS = c.UFFD_FEATURE_MISSING_HUGETLBFS
    MISSING_SHMEM = c.UFFD_FEATURE_MISSING_SHMEM
    EVENT_UNMAP = c.UFFD_FEATURE_EVENT_UNMAP
    SIGBUS = c.UFFD_FEATURE_SIGBUS
    THREAD_ID = c.UFFD_FEATURE_THREAD_ID
    MINOR_HUGETLBFS = c.UFFD_FEATURE_MINOR_HUGETLBFS
    MINOR_SHMEM = c.UFFD_FEATURE_MINOR_SHMEM
    EXACT_ADDRESS = c.UFFD_FEATURE_EXACT_ADDRESS
    WP_HUGETLBFS_SHMEM = c.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    WP_UNPOPULATED = c.UFFD_FEATURE_WP_UNPOPULATED
    POISON = c.UFFD_FEATURE_POISON
    WP_ASYNC = c.UFFD_FEATURE_WP_ASYNC
    MOVE = c.UFFD_FEATURE_MOVE


class RfcBit(IntFlag):
    """What an RFC kernel answers in place of features: page-fault bits, and v2's record types `>> 12`."""

    WRITE = c.UFFD_BIT_WRITE
    WP = c.UFFD_BIT_WP
    PAGEFAULT = 1 << (c.UFFD_PAGEFAULT - 1) << c.UFFD_V2_TYPE_SHIFT
    FORK = 1 << (c.UFFD_FORK - 1) << c.UFFD_V2_TYPE_SHIFT


class RegisterMode(IntFlag):
    """UFFDIO_REGISTER_MODE_*: which faults of a range are reported."""

    MISSING = c.UFFDIO_REGISTER_MODE_MISSING
    WP = c.UFFDIO_REGISTER_MODE_WP
    MINOR = c.UFFDIO_REGISTER_MODE_MINOR


class Ioctl(IntFlag):
    """The `ioctls` masks of UFFDIO_API and UFFDIO_REGISTER: bit n stands for ioctl number n."""

    REGISTER = 1 << c.NR_REGISTER
    UNREGISTER = 1 << c.NR_UNREGISTER
    WAKE = 1 << c.NR_WAKE
    COPY = 1 << c.NR_COPY
    ZEROPAGE = 1 << c.NR_ZEROPAGE
    MOVE = 1 << c.NR_MOVE
    WRITEPROTECT = 1 << c.NR_WRITEPROTECT
    CONTINUE = 1 << c.NR_CONTINUE
    POISON = 1 << c.NR_POISON
    API = 1 << c.NR_API


def names(mask: IntFlag) -> str:
    """The mask's members by name, and bits without a name as a number."""
    known = [str(flag.name) for flag in mask]
    unknown = int(mask) & ~sum(mask)
    return "|".join([*known, *([hex(unknown)] if unknown else [])]) or "nothing"
