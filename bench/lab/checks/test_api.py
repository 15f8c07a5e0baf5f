"""UFFDIO_API: which values are known, what they answer, who may ask."""

from __future__ import annotations

import errno
import os
import pathlib

import pytest
import raw_uffd as w

V1_PARAMETER = pathlib.Path("/sys/module/userfaultfd/parameters/v1_api")


@pytest.mark.parametrize(
    ("wire", "bits"),
    [("v1", 0x1), ("v2", 0x3001)],
)
def test_rfc_answer(wire: str, bits: int) -> None:
    assert w.negotiate(w.open_uffd(), w.APIS[wire]) == (0, (w.APIS[wire], bits, w.API_IOCTLS))


@pytest.mark.parametrize("wire", ["v1", "v2"])
def test_rfc_ignores_what_bits_held(wire: str) -> None:
    """The RFC reads the first 8 bytes of the struct only."""
    failed, words = w.negotiate(w.open_uffd(), w.APIS[wire], bits=2**64 - 1)
    assert failed == 0
    assert words[0] == w.APIS[wire]


@pytest.mark.wire("msg")
def test_mainline_answer() -> None:
    failed, (api, features, ioctls) = w.negotiate(w.open_uffd(), 0xAA)
    assert (failed, api, ioctls) == (0, 0xAA, w.API_IOCTLS)
    assert features & w.EVENT_FORK
    assert features & w.THREAD_ID
    assert features < 1 << 13, "Linux 6.1 knows features 0 to 12"


@pytest.mark.wire("msg")
def test_the_format_bits_cannot_be_asked_for() -> None:
    for bit in (29, 30, 31):
        assert w.negotiate(w.open_uffd(), 0xAA, bits=1 << bit) == (errno.EINVAL, (0, 0, 0))


@pytest.mark.wire("api")
@pytest.mark.parametrize("value", [0, 1, 0xA0, 0xAC, 0x1AB, 0xAB << 32, 2**64 - 1], ids=hex)
def test_unknown_api(value: int) -> None:
    fd = w.open_uffd()
    assert w.negotiate(fd, value) == (errno.EINVAL, (0, 0, 0))
    assert w.negotiate(fd, w.APIS["v2"])[0] == 0, "the descriptor stays usable"


@pytest.mark.parametrize("wire", ["v1", "v2", "msg"])
def test_only_once(wire: str) -> None:
    fd = w.opened(wire)
    for api in w.APIS.values():
        assert w.negotiate(fd, api) == (errno.EINVAL, (0, 0, 0))
    assert w.errno_of(fd, w.SIZES[wire]) == "EAGAIN", "and the first answer stands"
    assert w.errno_of(fd, w.SIZES[wire] - 1) == "EINVAL"


@pytest.mark.wire("api")
def test_nothing_works_before_the_api() -> None:
    assert w.errno_of(w.open_uffd(), 4096) == "EINVAL"


def drop_privileges() -> None:
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


@pytest.mark.wire("v2")
def test_v2_needs_cap_sys_ptrace() -> None:
    """It implies fork events, and those open another process's memory."""
    drop_privileges()
    fd = w.open_uffd(os.O_NONBLOCK | w.USER_MODE_ONLY)
    assert w.negotiate(fd, w.APIS["v2"]) == (errno.EPERM, (0, 0, 0))
    assert w.negotiate(fd, w.APIS["v1"])[0] == 0


@pytest.mark.wire("v1")
def test_v1_needs_no_privilege() -> None:
    drop_privileges()
    fd = w.open_uffd(os.O_NONBLOCK | w.USER_MODE_ONLY)
    assert w.negotiate(fd, w.APIS["v1"])[1][1] == 0x1


@pytest.mark.wire("v1")
def test_which_value_means_v1_can_be_changed() -> None:
    """0xAA is v1 for an RFC program, and mainline for everyone else."""
    before = V1_PARAMETER.read_text()
    assert int(before) == 0xA1, "the default"
    try:
        V1_PARAMETER.write_text("0xAA")
        assert w.negotiate(w.open_uffd(), 0xAA) == (0, (0xAA, 0x1, w.API_IOCTLS))
        assert w.negotiate(w.open_uffd(), 0xA1) == (errno.EINVAL, (0, 0, 0))
        V1_PARAMETER.write_text("0xA1")
        assert w.negotiate(w.open_uffd(), 0xA1)[1][1] == 0x1
        assert w.negotiate(w.open_uffd(), 0xAA)[1][1] & w.EVENT_FORK
    finally:
        V1_PARAMETER.write_text(before)


@pytest.mark.wire("v1")
def test_only_root_changes_it() -> None:
    drop_privileges()
    with pytest.raises(PermissionError):
        V1_PARAMETER.write_text("0xAA")


@pytest.mark.wire("msg")
def test_fdinfo_of_mainline_is_untouched() -> None:
    fd = w.open_uffd()
    assert w.negotiate(fd, 0xAA, bits=w.THREAD_ID)[0] == 0
    api, features, _ = w.fdinfo(fd)["API"].split(":")
    assert (api, int(features, 16)) == ("aa", 1 << 31 | w.THREAD_ID)
