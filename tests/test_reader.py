"""EventReader over pipes and sockets, over the kernel's faults, and over the model's."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import userfault as uf
from support import PAGE, WIRES, Child, Faults, addresses, only, read_all, touching
from userfault._consts import DTYPES

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


def records(api: str, n: int) -> np.ndarray:
    made = np.zeros(n, DTYPES[api])
    raw = made.view("u1").reshape(n, -1)
    raw[:] = np.arange(raw.size, dtype=np.uint8).reshape(raw.shape)
    return made


@pytest.mark.parametrize("layout", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 64, 512])
def test_batches_arrive_whole_and_in_order(pipe: Pipe, layout: str, n: int) -> None:
    sent = records(layout, n)
    os.write(pipe[1], sent.tobytes())
    reader = uf.EventReader(pipe[0], capacity=512, api=layout)
    got = reader.read()
    assert got.dtype == sent.dtype
    assert got.tobytes() == sent.tobytes()


def test_one_call_reads_at_most_its_capacity_into_the_same_memory(pipe: Pipe) -> None:
    sent = records("v2", 10)
    os.write(pipe[1], sent.tobytes())
    reader = uf.EventReader(pipe[0], capacity=4, api="v2")
    first = reader.read()
    address = first.ctypes.data
    assert first.tobytes() == sent[:4].tobytes()
    assert reader.read().ctypes.data == address
    assert reader.read().tobytes() == sent[8:].tobytes()


def test_timeouts(pipe: Pipe) -> None:
    reader = uf.EventReader(pipe[0], api="v2")
    assert len(reader.read(0)) == 0
    before = time.monotonic()
    assert len(reader.read(0.05)) == 0
    assert time.monotonic() - before >= 0.05
    for wrong in (-1, float("nan"), -0.001):
        with pytest.raises(ValueError, match="timeout"):
            reader.read(wrong)
    os.write(pipe[1], records("v2", 1).tobytes())
    assert len(reader.read(1e12)) == 1


@pytest.mark.parametrize("blocking", [False, True])
def test_waits_for_the_first_record_without_the_gil(pipe: Pipe, blocking: bool) -> None:
    os.set_blocking(pipe[0], blocking)
    reader = uf.EventReader(pipe[0], api="v1")
    threading.Timer(0.05, os.write, (pipe[1], records("v1", 2).tobytes())).start()
    assert len(reader.read(30)) == 2
    assert len(reader.read(0)) == 0


def test_a_record_split_by_a_stream_is_completed(pipe: Pipe) -> None:
    sent = records("msg", 3).tobytes()
    reader = uf.EventReader(pipe[0], api="msg")
    os.write(pipe[1], sent[:40])
    assert reader.read().tobytes() == sent[:32]
    with pytest.raises(uf.TruncatedRecordError, match="8 bytes of a 32-byte msg record") as caught:
        reader.read(0)
    assert caught.value.tail == sent[32:40]
    os.write(pipe[1], sent[40:])
    assert reader.read().tobytes() == sent[32:]


def test_a_stream_that_ends_inside_a_record_says_so(pipe: Pipe) -> None:
    reader = uf.EventReader(pipe[0], api="v2")
    os.write(pipe[1], records("v2", 1).tobytes() + b"tail")
    os.close(pipe[1])
    assert len(reader.read()) == 1
    with pytest.raises(uf.TruncatedRecordError) as caught:
        reader.read()
    assert caught.value.tail == b"tail"


def test_a_message_that_is_no_whole_record_is_an_error_at_once() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        sent = records("v2", 2).tobytes()
        theirs.send(sent + b"xyz")
        theirs.send(sent)
        reader = uf.EventReader(ours, api="v2")
        with pytest.raises(uf.TruncatedRecordError) as caught:
            reader.read()
        assert caught.value.records.tobytes() == sent
        assert caught.value.tail == b"xyz"
        assert reader.read().tobytes() == sent


def test_end_of_records(pipe: Pipe) -> None:
    reader = uf.EventReader(pipe[0], api="v2")
    os.close(pipe[1])
    with pytest.raises(uf.EndOfRecordsError):
        reader.read()


def test_close_from_another_thread_wakes_the_reader(pipe: Pipe) -> None:
    reader = uf.EventReader(pipe[0], api="v2")
    threading.Timer(0.05, reader.close).start()
    with pytest.raises(uf.ClosedError):
        reader.read(30)
    with pytest.raises(uf.ClosedError):
        reader.read(0)
    os.fstat(pipe[0])  # the descriptor was never the reader's


def test_one_thread_at_a_time(pipe: Pipe) -> None:
    reader = uf.EventReader(pipe[0], api="v2")
    inside = threading.Thread(target=lambda: reader.read(30))
    inside.start()
    while inside.is_alive():
        try:
            reader.read(0)
        except uf.BusyError:
            break
    os.write(pipe[1], records("v2", 1).tobytes())
    inside.join()


def test_a_descriptor_that_was_closed_or_never_open(pipe: Pipe) -> None:
    reader = uf.EventReader(pipe[0], api="v2")
    os.close(pipe[0])
    with pytest.raises(uf.ClosedError):
        reader.read()
    with pytest.raises(uf.UffdError, match="descriptor"):
        uf.EventReader(pipe[0], api="v2")


def test_a_descriptor_that_cannot_be_read(pipe: Pipe) -> None:
    with pytest.raises((uf.UffdError, uf.ClosedError)):
        uf.EventReader(pipe[1], api="v2").read(0.2)
    directory = os.open("/", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(uf.UffdError, match="Is a directory"):
            uf.EventReader(directory, api="v2").read(0)
    finally:
        os.close(directory)


def test_bad_arguments(pipe: Pipe) -> None:
    for capacity in (0, -3):
        with pytest.raises(ValueError, match="capacity"):
            uf.EventReader(pipe[0], capacity=capacity, api="v2")
    for api in (None, "v3"):
        with pytest.raises(ValueError, match="api"):
            uf.EventReader(pipe[0], api=api)


def test_signals_run_their_handlers_and_the_wait_goes_on(child: Child) -> None:
    done = child("""
        r, w = os.pipe2(os.O_NONBLOCK)
        seen = []
        def handler(*_):
            seen.append(1)
            if len(seen) == 5:
                signal.setitimer(signal.ITIMER_REAL, 0)
                os.write(w, bytes(16))
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        assert len(uf.EventReader(r, api="v2").read(timeout=30)) == 1
        assert len(seen) == 5
        """)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_ends_the_wait(child: Child) -> None:
    done = child("""
        r, w = os.pipe2(os.O_NONBLOCK)
        reader = uf.EventReader(r, api="v2")
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            reader.read()
        except KeyboardInterrupt:
            os.write(w, bytes(16))
            print(len(reader.read()))
        """)
    assert done.stdout == "1\n", done.stderr


# -- faults: the kernel's, and the model's ----------------------------------------------------------------


def test_a_fault_says_where(faults: Faults, wire: str) -> None:
    reader = faults.reader()
    faults.at(2)
    got = reader.read(30)
    assert got.dtype == DTYPES[wire]
    assert addresses(got) == [faults.start + 2 * PAGE]
    assert uf.as_v2(got).tolist() == [(1, faults.start + 2 * PAGE)]
    assert len(reader.read(0)) == 0


def test_a_write_says_so(faults: Faults) -> None:
    reader = faults.reader()
    faults.at(1, write=True)
    assert uf.as_v2(reader.read(30)).tolist() == [(1, faults.start + PAGE | 1)]


@pytest.mark.parametrize("capacity", [5, 512])
def test_many_faults_are_read_together(faults: Faults, capacity: int) -> None:
    faults.at(*range(16))
    batches = read_all(faults.reader(capacity=capacity), 16)
    assert [len(batch) for batch in batches] == ([5, 5, 5, 1] if capacity == 5 else [16])
    got = np.concatenate(batches)
    assert sorted(addresses(got)) == [faults.start + page * PAGE for page in range(16)]
    ids, offsets = faults.table.dispatch(got)
    assert set(ids.tolist()) == {0}
    assert sorted(offsets) == [page * PAGE for page in range(16)]
    assert uf.as_v2(got)["arg"].tolist() == addresses(got)
    assert set(uf.as_v2(got)["type"].tolist()) == {1}


def test_waiting_for_a_fault(faults: Faults) -> None:
    reader = faults.reader()
    before = time.monotonic()
    assert len(reader.read(0.05)) == 0
    assert time.monotonic() - before >= 0.05
    later = threading.Timer(0.05, faults.at, [3], {"wait": False})
    later.start()
    assert addresses(reader.read(30)) == [faults.start + 3 * PAGE]
    later.join()


# -- on the real userfaultfd -------------------------------------------------------------------------


@only("msg")
def test_a_msg_says_who(u: uf.Userfaultfd) -> None:
    region = u.map(PAGE)
    thread = touching(region, [0])
    (record,) = uf.EventReader(u).read(30)
    assert record["event"] == 0x12
    assert record["flags"] == 0
    assert record["ptid"] == thread.native_id
    u.zeropage(region.start, PAGE)
    thread.join(30)


def test_closing_the_userfaultfd_wakes_the_reader(u: uf.Userfaultfd) -> None:
    reader = uf.EventReader(u)
    threading.Timer(0.05, u.close).start()
    with pytest.raises(uf.ClosedError):
        reader.read(30)


def test_a_blocking_userfaultfd_is_refused_with_the_remedy(u: uf.Userfaultfd, wire: str) -> None:
    os.set_blocking(u.fileno(), True)
    with pytest.raises(ValueError, match="set_blocking"):
        uf.EventReader(u.fileno(), api=wire)
    os.set_blocking(u.fileno(), False)
    assert len(uf.EventReader(u.fileno(), api=wire).read(0)) == 0


def test_a_wire_that_the_descriptor_does_not_speak(u: uf.Userfaultfd, wire: str) -> None:
    for other in WIRES:
        if other != wire:
            with pytest.raises(ValueError, match=f"speaks {wire}, not {other}"):
                uf.EventReader(u, api=other)
