"""fork(): type 2 in v2, none in v1, mainline's own event in msg.

The reader of a fork event must not be the process that forks, nor wait for a
lock of it. So the watched process is a child that hands its descriptor over.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import struct

import pytest
import raw_uffd as w

PAGES = 4
MSG_FORK = 0x13


class Victim:
    """A child with registered memory, which forks and touches on command."""

    def __init__(self, wire: str, bits: int = 0) -> None:
        self.wire = wire
        self.control, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.live(theirs, bits)
            finally:
                os._exit(1)
        theirs.close()
        text, fds, _, _ = socket.recv_fds(self.control, 8, 1)
        (self.start,), (self.fd,) = struct.unpack("<Q", text), fds

    def live(self, control: socket.socket, bits: int) -> None:
        fd = w.open_uffd()
        assert w.negotiate(fd, w.APIS[self.wire], bits)[0] == 0
        start = w.anonymous(PAGES)
        w.register(fd, start, PAGES)
        socket.send_fds(control, [struct.pack("<Q", start)], [fd])
        os.close(fd)
        while command := control.recv(1):
            if command == b"f":  # one generation on: the child takes over
                if os.fork():
                    signal.pause()
                control.send(b"F")
            else:  # touch the page of that number
                control.send(ctypes.string_at(start + command[0] * w.PAGE, 1))

    def send(self, command: bytes) -> None:
        self.control.send(command)

    def answer(self) -> bytes:
        self.control.settimeout(20)
        return self.control.recv(1)

    def silent(self) -> bool:
        return not select.select([self.control], [], [], 0.3)[0]


def next_record(fd: int, wire: str) -> w.Record:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(20_000), "no record came"
    (record,) = w.read(fd, wire)
    return record


def descriptors() -> set[int]:
    """Those that are open, without the one that lists them."""
    listed = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in listed if os.path.exists(f"/proc/self/fd/{fd}")}


def fork_event(victim: Victim, fd: int) -> int:
    """Let the watched process fork; the new descriptor that the record names."""
    before = descriptors()
    victim.send(b"f")
    record = next_record(fd, victim.wire)
    assert record.type == (MSG_FORK if victim.wire == "msg" else w.FORK)
    new = record.arg
    assert descriptors() - before == {new}, "not a new descriptor of this process"
    assert os.readlink(f"/proc/self/fd/{new}") == "anon_inode:[userfaultfd]"
    assert victim.answer() == b"F", "fork() returns once its event was read"
    return new


@pytest.mark.wire("v2")
def test_fork_is_type_2_with_a_live_descriptor() -> None:
    victim = Victim("v2")
    new = fork_event(victim, victim.fd)

    assert w.negotiate(new, w.APIS["v2"]) == (errno.EINVAL, (0, 0, 0)), "it is running already"
    assert (w.errno_of(new, 16), w.errno_of(new, 15)) == ("EAGAIN", "EINVAL"), "and speaks v2"

    for page in range(PAGES):  # every page of the parent's region is watched
        victim.send(bytes([page]))
        assert next_record(new, "v2") == w.Record(w.PAGEFAULT, victim.start + page * w.PAGE)
        assert victim.silent(), "the child must sleep until it is served"
        w.copy(new, victim.start + page * w.PAGE, 0x61 + page)
        assert victim.answer() == bytes([0x61 + page])
    assert w.errno_of(victim.fd, 4096) == "EAGAIN", "the parent's context saw none of it"


@pytest.mark.wire("v2")
def test_what_the_child_got_is_not_in_its_parent() -> None:
    victim = Victim("v2")
    new = fork_event(victim, victim.fd)
    w.copy(new, victim.start, 0x61)
    with pytest.raises(FileExistsError):
        w.copy(new, victim.start, 0x61)
    w.copy(victim.fd, victim.start, 0x62)  # still missing there


@pytest.mark.wire("v2")
def test_the_grandchild_inherits_the_format() -> None:
    victim = Victim("v2")
    child = fork_event(victim, victim.fd)
    grandchild = fork_event(victim, child)
    victim.send(b"\x02")
    assert next_record(grandchild, "v2") == w.Record(w.PAGEFAULT, victim.start + 2 * w.PAGE)
    w.copy(grandchild, victim.start + 2 * w.PAGE, 0x67)
    assert victim.answer() == b"g"


@pytest.mark.wire("v2")
def test_pages_served_before_the_fork_are_kept() -> None:
    victim = Victim("v2")
    w.copy(victim.fd, victim.start, 0x70)
    fork_event(victim, victim.fd)
    victim.send(b"\x00")
    assert victim.answer() == b"p"


@pytest.mark.wire("v1")
def test_v1_reports_no_fork_and_the_child_reads_zeros() -> None:
    """What the RFC set out to mend."""
    victim = Victim("v1")
    victim.send(b"f")
    assert victim.answer() == b"F"
    assert w.errno_of(victim.fd, 4096) == "EAGAIN"
    victim.send(b"\x01")
    assert victim.answer() == b"\x00"


@pytest.mark.wire("msg")
def test_mainline_fork_event_is_untouched() -> None:
    victim = Victim("msg", bits=w.EVENT_FORK)
    new = fork_event(victim, victim.fd)
    assert w.errno_of(new, 32) == "EAGAIN"
    assert w.errno_of(new, 31) == "EINVAL"
    api, features, _ = w.fdinfo(new)["API"].split(":")
    assert (api, int(features, 16)) == ("aa", 1 << 31 | w.EVENT_FORK)
