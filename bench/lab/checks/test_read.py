"""read() and poll(): records, how many, when it waits, and every error."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import threading
import time

import pytest
import raw_uffd as w

ALL = pytest.mark.parametrize("wire", ["v1", "v2", "msg"])
RFC = pytest.mark.parametrize("wire", ["v1", "v2"])
MSG_PAGEFAULT = 0x12


def pending(wire: str, count: int, flags: int = os.O_NONBLOCK) -> tuple[int, int]:
    """A descriptor with `count` unread faults, and where the memory starts."""
    fd, start = w.opened(wire, flags), w.anonymous(16)
    w.register(fd, start, 16)
    for page in range(count):
        w.touch(start + page * w.PAGE)
    w.await_pending(fd, count)
    return fd, start


def pages_of(records: list[w.Record], start: int) -> set[int]:
    return {(record.arg - start) // w.PAGE for record in records}


@ALL
@pytest.mark.parametrize("write", [False, True])
def test_one_fault(wire: str, write: bool) -> None:
    """The page's address, and in its low bits nothing but WRITE."""
    fd, start = w.opened(wire), w.anonymous(4)
    w.register(fd, start, 4)
    thread = w.touch(start + w.PAGE + 0x123, write)
    w.await_pending(fd, 1)
    kind = MSG_PAGEFAULT if wire == "msg" else w.PAGEFAULT
    assert w.read(fd, wire) == [w.Record(kind, start + w.PAGE | (w.WRITE if write else 0))]
    w.copy(fd, start + w.PAGE, 0x41)
    thread.join()
    assert ctypes.string_at(start + w.PAGE, 1) == b"A"
    assert ctypes.string_at(start + w.PAGE + 0x123, 1) == (b"\x77" if write else b"A")


@ALL
def test_write_protect_fault(wire: str) -> None:
    fd, start = w.opened(wire), w.anonymous(1)
    w.register(fd, start, 1, w.MISSING | w.REGISTER_WP)
    w.copy(fd, start, 0x41)
    w.write_protect(fd, start, on=True)
    thread = w.touch(start + 8, write=True)
    w.await_pending(fd, 1)
    (record,) = w.read(fd, wire)
    assert record.arg == start | w.WRITE | w.WP
    w.write_protect(fd, start, on=False)
    thread.join()
    assert ctypes.string_at(start + 8, 1) == b"\x77"


@RFC
@pytest.mark.parametrize("write", [False, True])
def test_a_minor_fault_adds_no_bit(wire: str, write: bool) -> None:
    """The RFC has no bit for it; mainline's is 4."""
    memory = os.memfd_create("lab")
    os.ftruncate(memory, w.PAGE)
    os.pwrite(memory, b"A", 0)
    shared = w.libc.mmap(None, w.PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, memory, 0)
    fd = w.opened(wire)
    w.register(fd, shared, 1, w.MINOR)
    w.touch(shared + 1, write)
    w.await_pending(fd, 1)
    (record,) = w.read(fd, wire)
    assert record == w.Record(w.PAGEFAULT, shared | (w.WRITE if write else 0))


@ALL
def test_several_records_a_call(wire: str) -> None:
    """As many whole records as fit; the rest stays for the next call."""
    fd, start = pending(wire, 5)
    size = w.SIZES[wire]
    first = w.read(fd, wire, 3 * size + size - 1)
    assert len(first) == 3
    rest = w.read(fd, wire, 64 * size)
    assert len(rest) == 2, "a partial result, though the next record would have to wait"
    assert pages_of(first + rest, start) == set(range(5))
    assert w.errno_of(fd, 64 * size) == "EAGAIN"


@ALL
def test_a_buffer_below_one_record(wire: str) -> None:
    fd, _ = pending(wire, 1)
    for size in (0, 1, w.SIZES[wire] - 1):
        assert w.errno_of(fd, size) == "EINVAL"
    assert len(w.read(fd, wire, w.SIZES[wire])) == 1, "and no fault was lost by it"


@ALL
def test_nothing_pending(wire: str) -> None:
    fd = w.opened(wire)
    assert w.errno_of(fd, 4096) == "EAGAIN"
    assert w.errno_of(fd, w.SIZES[wire] - 1) == "EINVAL", "the size is looked at first"


@ALL
def test_waits_for_the_first_record_only(wire: str) -> None:
    fd, start = w.opened(wire, 0), w.anonymous(4)
    w.register(fd, start, 4)
    got: list[list[w.Record]] = []
    reader = threading.Thread(target=lambda: got.append(w.read(fd, wire)))
    reader.start()
    time.sleep(0.3)
    assert reader.is_alive(), "read() returned with no fault pending"
    w.touch(start)
    reader.join(20)
    assert len(got) == 1
    assert pages_of(got[0], start) == {0}


@ALL
def test_a_blocking_read_takes_what_is_there(wire: str) -> None:
    fd, start = pending(wire, 3, flags=0)
    assert pages_of(w.read(fd, wire), start) == {0, 1, 2}


@ALL
def test_poll(wire: str) -> None:
    fd, start = w.opened(wire), w.anonymous(1)
    w.register(fd, start, 1)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(0) == []
    thread = w.touch(start)
    assert poll.poll(20_000) == [(fd, select.POLLIN)]
    w.read(fd, wire)
    assert poll.poll(0) == []
    w.copy(fd, start, 1)
    thread.join()
    assert poll.poll(0) == []


@ALL
def test_poll_of_a_blocking_descriptor(wire: str) -> None:
    fd = w.opened(wire, 0)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(0) == [(fd, select.POLLERR)]


@ALL
def test_a_bad_buffer_consumes_the_record(wire: str) -> None:
    fd, start = pending(wire, 1)
    nowhere = w.anonymous(1, w.PROT_NONE)
    expected = errno.EINVAL if wire == "v2" else errno.EFAULT
    assert w.read_at(fd, nowhere, w.SIZES[wire]) == (-1, expected)
    assert (w.fdinfo(fd)["pending"], w.fdinfo(fd)["total"]) == ("0", "1")
    assert w.errno_of(fd, 4096) == "EAGAIN"
    w.wake(fd, start, 1)
    w.await_pending(fd, 1)
    assert pages_of(w.read(fd, wire), start) == {0}, "woken, the thread faults again"


@ALL
def test_a_buffer_that_goes_bad_half_way(wire: str) -> None:
    """What was filled is returned; the record after it is consumed."""
    fd, _start = pending(wire, 3)
    buffer = w.anonymous(2)
    w.libc.mprotect(ctypes.c_void_p(buffer + w.PAGE), w.PAGE, w.PROT_NONE)
    size = w.SIZES[wire]
    place = buffer + w.PAGE - size
    assert w.read_at(fd, place, 8 * size) == (size, 0)
    assert len(w.decode(wire, ctypes.string_at(place, size))) == 1
    assert w.fdinfo(fd)["pending"] == "1"
    assert len(w.read(fd, wire)) == 1


@ALL
def test_no_byte_beyond_the_records_is_written(wire: str) -> None:
    fd, _ = pending(wire, 2)
    size = w.SIZES[wire]
    buffer = ctypes.create_string_buffer(b"\xa5" * (4 * size), 4 * size)
    assert w.read_at(fd, ctypes.addressof(buffer), 4 * size) == (2 * size, 0)
    assert buffer.raw[2 * size :] == b"\xa5" * (2 * size)
