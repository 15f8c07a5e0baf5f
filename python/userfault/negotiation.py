"""UFFDIO_API: which record format and which features a descriptor will speak, and `probe`.

0xAB is the probe: a kernel that accepts it is an RFC kernel, where 0xAA means v1; a mainline kernel
refuses it, and 0xAA means msg. A refused call leaves the descriptor usable for the next.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from userfault import _consts as c
from userfault import _ioctl
from userfault.errors import UffdError, UnavailableError, UnsupportedError
from userfault.flags import Api, Feature, Ioctl, RfcBit, names
from userfault.opening import Way, open_userfaultfd, ways

Call = Callable[[int, int], tuple[int, int]]
"""UFFDIO_API on one descriptor: (api, features) to (features or bits, ioctls), or OSError(EINVAL)."""

Features = Feature | Literal["all"] | None

DEFAULT = Feature.THREAD_ID | Feature.MOVE | Feature.POISON
# SIGBUS silences every record, WP_ASYNC every write-protect record.
SILENCING = Feature.SIGBUS | Feature.WP_ASYNC
EVENTS = Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
_KNOWN = Feature(sum(Feature))


def _without(mask: int, other: int) -> int:
    # On plain integers: an IntFlag's ~ forgets the bits above the highest it knows.
    return int(mask) & ~int(other)


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
        return type(self.asked)(_without(self.asked, self.features))

    @property
    def events(self) -> Feature:
        """The events that the kernel reports: those of msg's features, or v2's forks."""
        if self.api == Api.MSG:
            return Feature(self.features) & EVENTS
        return Feature.EVENT_FORK if RfcBit.FORK in RfcBit(self.features) else Feature(0)


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
    by_name = features not in (None, "all")
    if api in (Api.V1, Api.V2) and by_name:
        raise ValueError(f"{api} has no features to ask for: they are msg's")
    if api == Api.V2 or (api == "auto" and not by_name):
        try:
            return _rfc(Api.V2, call(c.UFFD_API_V2, 0))
        except OSError as error:
            if api == Api.V2 and error.errno == errno.EINVAL:
                raise _unsupported("no v2 (0xAB is refused: not an RFC kernel)", "msg") from None
            # EPERM: v2 brings fork records, which need CAP_SYS_PTRACE; v1 or msg may do without.
            if api == Api.V2 or error.errno not in (errno.EINVAL, errno.EPERM):
                raise
    bits, _ = throwaway(c.UFFD_API, 0)
    # An RFC v1 answers page-fault bits, WRITE at the least; mainline answers features.
    speaks_v1 = bits & ~(c.UFFD_BIT_WRITE | c.UFFD_BIT_WP) == 0 and bits & c.UFFD_BIT_WRITE
    if api == Api.V1 and not speaks_v1:
        try:
            call(c.UFFD_API_V2, 0)
        except OSError:
            raise _unsupported("no v1 (0xAB is refused: not an RFC kernel)", "msg") from None
        raise _unsupported("no v1 (0xAA speaks msg)", "v2 and msg")
    if speaks_v1:
        if api == Api.MSG or by_name:
            raise _unsupported("no msg (0xAA speaks v1)", "v1 and v2")
        return _rfc(Api.V1, call(c.UFFD_API, 0))
    return _msg(call, Feature(bits), features)


def _msg(call: Call, available: Feature, features: Features) -> Agreement:
    if features == "all":
        asked = _KNOWN & ~SILENCING
    elif features is None:
        asked = DEFAULT
    else:
        if not isinstance(features, int) or features < 0:
            raise TypeError(f'features are Feature flags, "all" or None, not {features!r}')
        asked = Feature(features)
        if missing := _without(asked, available):
            raise _unsupported(f"no {names(Feature(missing))}", names(available))
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
        # UffdError is EPERM: the kernel speaks it, but not to this process. UnavailableError: one
        # descriptor was to be had, and no second.
        try:
            with contextlib.suppress(UnavailableError, UnsupportedError, UffdError):
                found[api] = negotiate_on(fd, api, None)
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


def agreement_of(fd: int, api: str) -> Agreement:
    """What a userfaultfd that others opened has agreed to: by its fdinfo; of v2 all that the kernel has."""
    can = probe()
    if api != Api.MSG:
        bits = can.rfc_bits if api == Api.V2 and can.rfc_bits is not None else RfcBit(0)
        return Agreement(Api(api), RfcBit(0), bits, bits, can.ioctls)
    with open(f"/proc/self/fdinfo/{fd}") as info:
        spoken = next(line for line in info if line.startswith("API:"))
    features = Feature(int(spoken.split(":")[2], 16)) & _KNOWN  # API:, its number, features, ioctls
    return Agreement(Api.MSG, features, can.features or features, features, can.ioctls)
