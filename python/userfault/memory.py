"""What memory of the caller's own may be registered."""

from __future__ import annotations

import errno

from userfault.errors import RangeError, UnsupportedError
from userfault.flags import Feature, RegisterMode, names
from userfault.procmaps import memory_devices, vmas

_ORDINARY = (
    "register private anonymous memory, as map() or mmap.mmap(-1, n, flags=MAP_PRIVATE|MAP_ANONYMOUS) gives"
)
_SHARED = {
    RegisterMode.MISSING: Feature.MISSING_SHMEM,
    RegisterMode.MINOR: Feature.MINOR_SHMEM,
    RegisterMode.WP: Feature.WP_HUGETLBFS_SHMEM,
}


def check_memory(
    start: int, length: int, mode: RegisterMode, features: Feature
) -> tuple[bool, list[tuple[int, int]]]:
    """Refuse what a service cannot serve, or what others share without knowing.

    Returns whether any of it is shared memory, and the pieces (start, length) that fork children get so far.
    """
    lacking = Feature(sum(_SHARED[bit] for bit in mode)) & ~features
    end, reached = start + length, start
    devices: set[str] | None = None
    shared = False
    inherited = []
    for vma in vmas(start, end):
        if vma.start > reached:
            break
        if "dc" not in vma.flags:
            inherited.append((reached, min(vma.end, end) - reached))
        reached = vma.end
        what, remedy = "", _ORDINARY
        if "ht" in vma.flags:
            what = "huge-page memory (hugetlbfs)"
        elif vma.name in ("[heap]", "[stack]"):
            what = f"memory of the {vma.name[1:-1]}, whose pages other objects share"
        elif vma.name and not vma.name.startswith("[anon:"):
            devices = devices or memory_devices()
            shared = True
            if vma.device not in devices:
                what = f"a mapping of {vma.name}"
            elif lacking:
                what = "shared memory"
                remedy = f'open with api="msg" and features that have {names(lacking)}'
        if what:
            raise UnsupportedError(errno.EOPNOTSUPP, f"[{start:#x}, +{length:#x}) is {what}: {remedy}")
    if reached < end:
        raise RangeError(f"[{start:#x}, +{length:#x}) is not all mapped: {reached:#x} is not")
    return shared, inherited
