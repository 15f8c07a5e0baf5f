"""UFFDIO_API: which record format and which features a descriptor will speak, and `probe`.

0xAB is the probe: a kernel that accepts it is an RFC kernel, where 0xAA means v1; a mainline kernel
refuses it, and 0xAA means msg. A refused call leaves the descriptor usable for the next.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from userfault import _consts as c
from userfault import _ioctl
from userfault.errors import UnavailableError, UnsupportedError
from userfault.flags import Api, Feature, Ioctl, RfcBit, names
from userfault.opening import Way, open_userfaultfd, ways

Call = Callable[[int, int], tuple[int, int]]
"""UFFDIO_API on one descriptor: (api, features) to (features or bits, ioctls), or OSError(EINVAL)."""

Features = Feature | Literal["all"] | None

DEFAULT = Feature.THREAD_ID | Feature.MOVE | Feature.POISON
# SIGBUS silences every record, WP_ASYNC every write-protect record.
SILENCING = Feature.SIGBUS | Feature.WP_ASYNC
_KNOWN = Feature(sum(Feature))


@dataclass(frozen=True)
class Agreement:
    """What UFFDIO_API ended in. For v1 and v2 the masks are RfcBit, and nothing could be asked for."""

    api: Api
    asked: Feature | RfcBit
    available: Feature | RfcBit
    features: Feature | RfcBit
    ioctls: Ioctl

    @property
    def refused(self) -> Feature | RfcBit:
        """What was asked for (by default, or as part of "all") and is not to be had."""
        return self.asked & ~self.features


def _accepts(call: Call, api: int) -> tuple[int, int] | None:
    try:
        return call(api, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _unsupported(what: str, has: str) -> UnsupportedError:
    return UnsupportedError(errno.EOPNOTSUPP, f"{what}; this kernel has {has}")


def _rfc(api: Api, answer: tuple[int, int]) -> Agreement:
    bits = RfcBit(answer[0])
    return Agreement(api, RfcBit(0), bits, bits, Ioctl(answer[1]))


def negotiate(call: Call, throwaway: Call, api: str, features: Features) -> Agreement:
    """Agree on `api` ("auto", "v1", "v2" or "msg") and features through `call`.

    `throwaway` is the same call on another descriptor, whose answer shows what there is to ask for.
    Raises ValueError for an unknown api, or features asked of an RFC api; UnsupportedError, which lists
    what the kernel has, for an api or a feature that it lacks.
    """
    if api not in ("auto", *Api):
        raise ValueError(f"api must be auto, v1, v2 or msg, not {api!r}")
    asked_by_name = features not in (None, "all")
    if api in (Api.V1, Api.V2) and asked_by_name:
        raise ValueError(f"{api} has no features to ask for: they are msg's")
    if api in ("auto", Api.V2) and not (api == "auto" and asked_by_name):
        if answer := _accepts(call, c.UFFD_API_V2):
            return _rfc(Api.V2, answer)
        if api == Api.V2:
            raise _unsupported("no v2 (0xAB is refused: not an RFC kernel)", "msg")
    if api == Api.V1:
        if not _accepts(throwaway, c.UFFD_API_V2):
            raise _unsupported("no v1 (0xAB is refused: not an RFC kernel)", "msg")
        answer = call(c.UFFD_API, 0)
        # An RFC v1 answers page-fault bits; an RFC kernel told to keep 0xAA for msg answers features.
        if answer[0] & ~(c.UFFD_BIT_WRITE | c.UFFD_BIT_WP):
            raise _unsupported("no v1 (0xAA speaks msg)", "v2 and msg")
        return _rfc(Api.V1, answer)
    return _msg(call, throwaway, features)


def _msg(call: Call, throwaway: Call, features: Features) -> Agreement:
    bits, _ = throwaway(c.UFFD_API, 0)
    if bits == c.UFFD_BIT_WRITE:
        raise _unsupported("no msg (0xAA answers as v1 does)", "v1 and v2")
    available = Feature(bits)
    if features == "all":
        asked = _KNOWN & ~SILENCING
    elif features is None:
        asked = DEFAULT
    else:
        asked = Feature(features)
        if missing := asked & ~available:
            raise _unsupported(f"no {names(missing)}", names(available))
    wanted = asked & available
    try:
        _, ioctls = call(c.UFFD_API, wanted)
    except OSError as error:
        # Fork events need CAP_SYS_PTRACE: "all" is all that may be had.
        if error.errno != errno.EPERM or features != "all":
            raise
        wanted &= ~Feature.EVENT_FORK
        _, ioctls = call(c.UFFD_API, wanted)
    return Agreement(Api.MSG, asked, available, wanted, Ioctl(ioctls))


def negotiate_on(fd: int, api: str, features: Features) -> Agreement:
    """`negotiate` on a fresh userfaultfd."""
    other, _ = open_userfaultfd()
    try:
        return negotiate(lambda *a: _ioctl.api(fd, *a), lambda *a: _ioctl.api(other, *a), api, features)
    finally:
        os.close(other)


@dataclass(frozen=True)
class Capabilities:
    """What this machine can do.

    Attributes:
        apis: the record formats that the kernel speaks; empty when no userfaultfd can be opened.
        features: the features of msg, or None where the kernel has no msg.
        rfc_bits: what v2 answers in their place, or None where the kernel has no v2.
        ioctls: the ioctls that UFFDIO_API lists (those of a range come with `Region.ioctls`).
        ways: every way of opening, whether it works, and if not why and what mends it.
    """

    apis: tuple[Api, ...]
    features: Feature | None
    rfc_bits: RfcBit | None
    ioctls: Ioctl
    ways: tuple[Way, ...]

    @property
    def user_mode_only(self) -> bool:
        """Whether faults taken inside system calls would fail with EFAULT: no privileged way works."""
        return not any(way.works for way in self.ways if way.name != "user-mode-only")


def probe() -> Capabilities:
    """What this machine can do, asked of throw-away descriptors. Raises nothing for what is missing."""
    found: dict[Api, Agreement] = {}
    for api in Api:
        try:
            fd, _ = open_userfaultfd()
        except UnavailableError:
            break
        try:
            found[api] = negotiate_on(fd, api, None)
        except UnsupportedError:
            pass
        finally:
            os.close(fd)
    msg, v2 = found.get(Api.MSG), found.get(Api.V2)
    ioctls = Ioctl(0)
    for agreement in found.values():
        ioctls |= agreement.ioctls
    return Capabilities(
        tuple(found),
        Feature(msg.available) if msg else None,
        RfcBit(v2.available) if v2 else None,
        ioctls,
        ways(),
    )
