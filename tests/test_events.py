"""Events that a monitor of one's own reads: fork, remap, remove and unmap; and the children of forks."""

from __future__ import annotations

import os

import numpy as np
import pytest

import userfault as uf
from support import LAB, PAGE, Child, forks, has, needs, only
from userfault.rfc import RfcModel

# What the children's code shares. System calls of ctypes.CDLL release the GIL, which the reader needs.
EVENTS = """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    MAYMOVE, FIXED, DONTUNMAP = 1, 2, 4

    def room(pages):
        return libc.mmap(None, pages * PAGE, 3, 0x4022, -1, 0)

    def page_at(address):
        # The monitor needs the GIL to bring it.
        page = np.frombuffer((ctypes.c_ubyte * PAGE).from_address(address), np.uint8)
        uf.touch(page, np.zeros(1, np.uint64))
        return page

    def page_of(number):
        return data[number * PAGE:(number + 1) * PAGE]

    def same(address, number):
        return bool((page_at(address) == page_of(number)).all())

    def fork(function):
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            code = 0 if function() else 2
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)

    def ended_well(pid):
        return os.waitpid(pid, 0)[1] == 0

    def failed_closed(pid):
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGBUS, status
        return True

    def userfaultfds():
        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                if os.readlink("/proc/self/fd/" + name) == "anon_inode:[userfaultfd]":
                    found.append(int(name))
            except FileNotFoundError:  # the folder's own
                pass
        return found

    def piece(table):
        return [tuple(int(x) for x in row) for row in table.ranges().tolist()]

    class Monitor(threading.Thread):
        # Serves a userfaultfd from `data`, the children of its forks too, and keeps the events.
        def __init__(self, u):
            super().__init__(daemon=True)
            self.u, self.events, self.kids = u, [], []
            self.reader = uf.EventReader(u)
            self.start()

        def run(self):
            while True:
                try:
                    records = self.reader.read()
                except uf.ClosedError:
                    return
                if records.dtype == uf.MSG_DTYPE:
                    self.events += [bytes(one) for one in records if one["event"] != uf.Event.PAGEFAULT]
                self.kids += [Monitor(child) for child in uf.take_children(records)]
                ids, offsets = self.u.regions.dispatch(records)
                faults = records["address" if records.dtype == uf.MSG_DTYPE else "arg"]
                for address, number, offset in zip(faults.tolist(), ids.tolist(), offsets.tolist()):
                    if number >= 0:
                        self.fill(address & -PAGE, offset // PAGE)

        def fill(self, address, number):
            while True:
                try:
                    return self.u.copy(address, page_of(number) if number < N else bytes(PAGE))
                except uf.ChangingError:
                    time.sleep(0.001)
                except (uf.PageExistsError, uf.ProcessGoneError):
                    return

        def event(self, number):
            # The thread that caused it may be on its way before the reader has the GIL.
            deadline = time.monotonic() + 30
            while len(self.events) <= number and time.monotonic() < deadline:
                time.sleep(0.001)
            record, = np.frombuffer(self.events[number], uf.MSG_DTYPE)
            kind = uf.Event(record["event"])
            dtype = uf.REMAP_DTYPE if kind == uf.Event.REMAP else uf.RANGE_DTYPE
            fields = np.frombuffer(self.events[number], dtype)[0].tolist()[4:]
            return (kind.name, *fields[:3 if kind == uf.Event.REMAP else 2])

    N = 16
    data = np.random.default_rng(0).integers(1, 256, N * PAGE, dtype=np.uint8)
    u = uf.Userfaultfd(WIRE, "all" if WIRE == "msg" else None)
    ours = len(userfaultfds())
    go = os.pipe()
"""


def run(child: Child, code: str, timeout: float = 60) -> None:
    lines = [line[4:] for line in EVENTS.splitlines()]
    body = [line.removeprefix("        ") for line in code.splitlines()]
    done = child("\n".join([*lines, *body, 'print("good", flush=True)', "os._exit(0)"]), timeout=timeout)
    assert done.stdout == "good\n", done.stderr


# -- records --------------------------------------------------------------------------------------------


def test_events_under_their_own_names() -> None:
    made = np.array(
        [(0x14, 0, 0, 0, 1, 2, 3), (0x16, 0, 0, 0, 4, 5, 0), (0x13, 0, 0, 0, 7, 0, 0)], uf.MSG_DTYPE
    )
    assert made.view(uf.REMAP_DTYPE)[["event", "from", "to", "length"]][0].tolist() == (0x14, 1, 2, 3)
    assert made.view(uf.RANGE_DTYPE)[["event", "start", "end"]][1].tolist() == (0x16, 4, 5)
    assert made.view(uf.FORK_DTYPE)[["event", "fd"]][2].tolist() == (0x13, 7)
    assert [uf.Event(event).name for event in made["event"]] == ["REMAP", "UNMAP", "FORK"]


def test_a_peer_cannot_make_us_close_a_number() -> None:
    """A fork record from a pipe names a number of somebody else."""
    victim, read_end = os.open("/dev/null", os.O_RDONLY), os.pipe2(os.O_NONBLOCK)
    reader = uf.EventReader(read_end[0], api="msg")
    made = np.array([(0x13, 0, 0, 0, victim, 0, 0)], uf.MSG_DTYPE)
    for _ in range(2):
        os.write(read_end[1], made.tobytes())
        got = reader.read(0)
        assert got.view(uf.FORK_DTYPE)["fd"].tolist() == [victim]
        assert uf.take_children(got) == []
        assert uf.as_v2(got).tolist() == [(2, victim)]
    reader.close()
    for fd in (victim, *read_end):
        os.close(fd)


def test_forks_of_the_model() -> None:
    with RfcModel(fork=True) as model:
        model.api(0xAB, 0)
        with model.fork() as child, uf.EventReader(model.fileno(), api="v2") as reader:
            got = reader.read(0)
            assert got.tolist() == [(2, child.fileno())]
            assert uf.take_children(got) == []
            assert len(reader.read(0)) == 0
            reader.close()
            os.fstat(child.fileno())


def test_arrays_that_have_no_children() -> None:
    for dtype in (uf.V1_DTYPE, uf.V2_DTYPE, uf.MSG_DTYPE):
        assert uf.take_children(np.zeros(3, dtype)) == []
    for wrong in (None, [1, 2], np.zeros(3, np.uint8)):
        with pytest.raises(uf.RecordError, match=r"EventReader\.read\(\) returned"):
            uf.take_children(wrong)  # type: ignore[arg-type]


# -- the books ------------------------------------------------------------------------------------------


@only("msg")
def test_the_books_after_unmap_remap_and_remove(wire: str, child: Child) -> None:
    run(
        child,
        """
        own = room(N)
        region = u.register(own, N * PAGE)
        monitor = Monitor(u)
        assert libc.munmap(own + 4 * PAGE, 4 * PAGE) == 0
        assert monitor.event(0) == ("UNMAP", own + 4 * PAGE, own + 8 * PAGE)
        assert piece(u.regions) == [(own, 4 * PAGE, 0, 0), (own + 8 * PAGE, 8 * PAGE, 0, 8 * PAGE)]
        to = room(N)
        assert libc.mremap(own, 4 * PAGE, 4 * PAGE, MAYMOVE | FIXED, to) == to
        assert monitor.event(1) == ("REMAP", own, to, 4 * PAGE)
        assert monitor.event(2) == ("UNMAP", own, own + 4 * PAGE)
        assert piece(u.regions) == sorted([(to, 4 * PAGE, 0, 0), (own + 8 * PAGE, 8 * PAGE, 0, 8 * PAGE)])
        assert same(to + PAGE, 1) and same(own + 9 * PAGE, 9)
        assert libc.madvise(to, 2 * PAGE, 4) == 0
        assert monitor.event(3) == ("REMOVE", to, to + 2 * PAGE)
        assert same(to + PAGE, 1)
        assert sorted(row[0] for row in piece(u.regions)) == sorted([to, own + 8 * PAGE])
        """,
    )


@only("msg")
def test_the_books_of_a_region_that_grows(wire: str, child: Child) -> None:
    """On the way, and in place, of which no event tells: the first fault in there does."""
    run(
        child,
        """
        own, to = room(N), room(4 * N)
        libc.munmap(to + 3 * N * PAGE, N * PAGE)
        region = u.register(own, N * PAGE)
        monitor = Monitor(u)
        assert libc.mremap(own, N * PAGE, 2 * N * PAGE, MAYMOVE | FIXED, to) == to
        assert monitor.event(0) == ("REMAP", own, to, N * PAGE)
        assert not page_at(to + N * PAGE).any() and same(to + 3 * PAGE, 3)
        assert piece(u.regions) == [(to, 2 * N * PAGE, 0, 0)]
        libc.munmap(to + 2 * N * PAGE, N * PAGE)
        assert libc.mremap(to, 2 * N * PAGE, 3 * N * PAGE, 0, None) == to
        assert not page_at(to + (2 * N + 3) * PAGE).any()
        assert piece(u.regions) == [(to, 3 * N * PAGE, 0, 0)]
        """,
    )


@only("msg")
def test_the_books_of_a_range_that_was_left_registered(wire: str, child: Child) -> None:
    run(
        child,
        """
        own, to = room(N), room(N)
        region = u.register(own, N * PAGE)
        monitor = Monitor(u)
        assert libc.mremap(own, N * PAGE, N * PAGE, MAYMOVE | FIXED | DONTUNMAP, to) == to
        assert same(own + PAGE, 1) and same(to + 2 * PAGE, 2)
        assert piece(u.regions) == sorted([(own, N * PAGE, 0, 0), (to, N * PAGE, 0, 0)])
        """,
    )


# -- fork -----------------------------------------------------------------------------------------------


@forks
@only("v2", "msg")
def test_children_and_grandchildren_are_served_by_the_parent(wire: str, child: Child) -> None:
    """Pages that the parent had and those that it had not, in the order and under the ids of the parent."""
    run(
        child,
        """
        kept = u.map(PAGE)
        region = u.map(N * PAGE, inherit=True)
        own = room(N)
        u.register(own, N * PAGE, inherit=True)
        monitor = Monitor(u)
        page_at(region.start + 2 * PAGE)
        def grandchild():
            return all(same(start + n * PAGE, n) for n in range(N) for start in (region.start, own))
        def child():
            return same(region.start, 0) and same(own, 0) and ended_well(fork(grandchild)) and grandchild()
        assert ended_well(fork(child))
        (followed,) = monitor.kids
        assert sorted(piece(followed.u.regions)) == sorted(
            [(region.start, N * PAGE, region.id, 0), (own, N * PAGE, 2, 0)])
        (grand,) = followed.kids
        assert piece(grand.u.regions) == piece(followed.u.regions)
        assert (followed.u.api, followed.u.features, followed.u.ioctls) == (u.api, u.features, u.ioctls)
        assert len(userfaultfds()) == ours + 2
        for one in (grand.u, followed.u, followed.u):
            one.close()
        assert len(userfaultfds()) == ours and followed.u.closed
        try:
            followed.u.copy(region.start, bytes(PAGE))
        except uf.ClosedError:
            print("closed", file=sys.stderr)
        else:
            raise AssertionError
        """,
    )


@forks
@only("v2", "msg")
def test_forks_one_after_another(wire: str, child: Child) -> None:
    """os.fork() holds the GIL, which the reader needs after each record: by two threads, and amid faults."""
    run(
        child,
        f"""
        region = u.map({20 if LAB else 400} * PAGE, inherit=True)
        monitor = Monitor(u)
        pages = np.arange(0, region.length, PAGE, np.uint64)
        toucher = threading.Thread(target=uf.touch, args=(region.array, pages))
        toucher.start()
        pids = []
        def some():
            for _ in range({4 if LAB else 40}):
                pids.append(fork(lambda: True))
        others = [threading.Thread(target=some) for _ in range(2)]
        for other in others:
            other.start()
        some()
        for other in others:
            other.join()
        toucher.join()
        assert all(map(ended_well, pids))
        while len(monitor.kids) < len(pids):
            time.sleep(0.001)
        """,
    )


WAYS = {
    "the array dropped": "del records",
    "a view dropped": "view = records[:1]; del records; gc.collect(); open_still(); del view",
    "the reader closed": "reader.close()",
    "the next read": "reader.read(0)",
    "the reader and the array dropped": "del reader; gc.collect(); open_still(); del records",
    "the taken closed": "v, = uf.take_children(records); assert uf.take_children(records) == []; v.close()",
    "the taken dropped": "v, = uf.take_children(records); del records; reader.read(0); v.fileno(); del v",
    "the taken read": "v, = uf.take_children(records); uf.EventReader(v).read(); v.close()",
}


@forks
@only("v2", "msg")
@pytest.mark.parametrize("way", WAYS)
def test_a_child_that_nobody_serves_fails_closed(wire: str, child: Child, way: str) -> None:
    """Its descriptor is closed, and what it misses is SIGBUS and not zeros."""
    asleep = way == "the taken read"
    run(
        child,
        f"""
        region = u.map(N * PAGE, inherit=True)
        u.copy(region.start, page_of(0))
        reader, records = uf.EventReader(u), None
        def child():
            good = same(region.start, 0)
            {asleep} or os.read(go[0], 1)
            return not good or page_at(region.start + 3 * PAGE).any() or True
        def read():
            global records
            records = reader.read()
        thread = threading.Thread(target=read)
        thread.start()
        pid = fork(child)
        thread.join()
        def open_still():
            assert len(userfaultfds()) == ours + 1
        open_still()
        other = [fd for fd in userfaultfds() if fd != u.fileno()][0]
        assert not os.get_inheritable(other) and not os.get_blocking(other)
        {WAYS[way]}
        gc.collect()
        assert len(userfaultfds()) == ours
        os.write(go[1], b"x")
        assert failed_closed(pid) if {has(uf.Feature.POISON)} else os.waitpid(pid, 0)
        """,
    )


@needs(uf.Feature.POISON)
@forks
@only("msg")
@pytest.mark.parametrize("taken", [False, True])
def test_a_child_that_waits_for_an_event_fails_closed(wire: str, child: Child, taken: bool) -> None:
    """While its own fork is unread nothing can be poisoned: it is read, and the grandchild fails, too."""
    run(
        child,
        f"""
        region = u.map(N * PAGE, inherit=True)
        reader, records = uf.EventReader(u), None
        def grandchild():
            return not page_at(region.start).any()
        def child():
            return failed_closed(fork(grandchild)) and not page_at(region.start + PAGE).any()
        def read():
            global records
            records = reader.read()
        thread = threading.Thread(target=read)
        thread.start()
        pid = fork(child)
        thread.join()
        kids = uf.take_children(records) if {taken} else []
        (other,) = [fd for fd in userfaultfds() if fd != u.fileno()]
        select.select([other], [], [])
        for kid in kids:
            kid.close()
        reader.close()
        assert failed_closed(pid) and len(userfaultfds()) == ours
        """,
    )


@needs(uf.Feature.POISON)
@forks
@only("msg")
@pytest.mark.parametrize("taken", [False, True])
def test_children_outlive_the_process_that_served_them(wire: str, child: Child, taken: bool) -> None:
    run(
        child,
        f"""
        libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        told = os.pipe()
        if os.fork() == 0:
            u = uf.Userfaultfd("msg", "all")
            region = u.map(N * PAGE, inherit=True)
            reader, kept = uf.EventReader(u), []
            def child():
                os.write(told[1], os.getpid().to_bytes(4))
                os.read(go[0], 1)
                return not page_at(region.start).any()
            def read():
                kept.append(reader.read())
                kept.append(uf.take_children(kept[0]) if {taken} else None)
            threading.Thread(target=read).start()
            fork(child)
            sys.exit(0)
        served = int.from_bytes(os.read(told[0], 4))
        pid, status = os.wait()
        assert pid != served and status == 0
        os.write(go[1], b"x")
        assert failed_closed(served)
        """,
    )


@forks
@only("v2", "msg")
def test_a_fork_child_has_no_userfaultfd_of_its_siblings(wire: str, child: Child) -> None:
    """Neither those that were taken, nor those that nobody took."""
    run(
        child,
        """
        region = u.map(N * PAGE, inherit=True)
        reader, batches = uf.EventReader(u), []
        thread = threading.Thread(target=lambda: batches.append(reader.read()))
        thread.start()
        pids = [fork(lambda: os.read(go[0], 1))]
        thread.join()
        region.close()  # no fork waits for a reader any more
        assert len(userfaultfds()) == ours + 1
        pids.append(fork(lambda: not userfaultfds()))
        taken = uf.take_children(batches[0])
        assert len(userfaultfds()) == ours + 1
        pids.append(fork(lambda: not userfaultfds()))
        os.write(go[1], b"x")
        assert all(map(ended_well, pids))
        """,
    )


@forks
@only("msg")
def test_a_fork_child_has_no_userfaultfd_whose_record_is_still_being_read(wire: str, child: Child) -> None:
    """The kernel lets fork() return before it copies the record: here that copy waits for a page, too."""
    run(
        child,
        """
        from userfault import _ioctl
        region = u.map(N * PAGE, inherit=True)
        reader, batches = uf.EventReader(u, 1 << 16), []
        start = reader.read(0).ctypes.data & -PAGE
        kept = np.array(page_at(start))
        slow = _ioctl.open_by_syscall(os.O_NONBLOCK)
        _ioctl.api(slow, 0xAA, 0)
        _ioctl.register(slow, start, PAGE, 1)
        libc.madvise(start, PAGE, mmap.MADV_DONTNEED)
        thread = threading.Thread(target=lambda: batches.append(reader.read()))
        thread.start()
        pids = [fork(lambda: os.read(go[0], 1))]
        assert select.select([slow], [], [], 30)[0] and not batches
        region.close()  # no fork waits for a reader any more
        threading.Timer(0.3, _ioctl.copy, [slow, start, kept.ctypes.data, PAGE, 0]).start()
        pids.append(fork(lambda: userfaultfds() == [slow]))
        thread.join()
        os.write(go[1], b"x")
        assert all(map(ended_well, pids))
        """,
    )


@forks
@only("v2", "msg")
def test_shared_memory_after_close_fails_closed_in_children(wire: str, child: Child) -> None:
    poison = has(uf.Feature.POISON)
    run(
        child,
        f"""
        region = u.map(N * PAGE, inherit=True)
        array = region.array
        u.close()
        pid = fork(lambda: not page_at(region.start).any())
        if {poison}:
            assert failed_closed(pid)
        else:
            time.sleep(0.2)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
            os.kill(pid, signal.SIGKILL)
        """,
    )


@only("v1", "msg")
def test_memory_is_shared_with_children_only_where_forks_are_heard(wire: str, u: uf.Userfaultfd) -> None:
    with pytest.raises(uf.UnsupportedError, match="without fork events the children would read zeros"):
        u.map(PAGE, inherit=True)
    with pytest.raises(uf.UnsupportedError, match=r"Feature\.EVENT_FORK"):
        u.register(0x10000, PAGE, inherit=True)
    assert len(u.regions) == 0


@forks
@only("v2", "msg")
def test_what_a_child_is_refused_and_what_not(wire: str, child: Child) -> None:
    """Memory of its own can be registered, by address; what needs it here cannot be."""
    run(
        child,
        """
        region = u.map(N * PAGE, inherit=True)
        told = os.pipe()
        reader, kids = uf.EventReader(u), []
        def child():
            mine = room(N)
            os.write(told[1], mine.to_bytes(8))
            os.read(go[0], 1)
            good = same(mine + 5 * PAGE, 5)
            os.read(go[0], 1)
            return good and not page_at(mine + 6 * PAGE).any()
        thread = threading.Thread(target=lambda: kids.extend(uf.take_children(reader.read())))
        thread.start()
        pid = fork(child)
        thread.join()
        (v,) = kids
        start = int.from_bytes(os.read(told[0], 8))
        for call in (lambda: v.map(PAGE), lambda: v.register(bytearray(PAGE)), lambda: v.register(start),
                     lambda: v.move(start, start, PAGE), lambda: uf.FaultService(v),
                     lambda: uf.FaultService(v, shards=2)):
            try:
                call()
            except uf.UnsupportedError as error:
                assert "fork child" in str(error)
            else:
                raise AssertionError
        more = v.register(start, N * PAGE)
        assert more.id == region.id + 1 and more.registered
        try:
            more.array
        except uf.UnsupportedError as error:
            assert "fork child" in str(error)
        else:
            raise AssertionError
        os.write(go[1], b"x")
        records = uf.EventReader(v).read()
        ids, offsets = v.regions.dispatch(records)
        assert ids.tolist() == [more.id] and offsets[0] & -PAGE == 5 * PAGE
        assert v.copy(start + 5 * PAGE, page_of(5)) == PAGE
        more.unregister()
        os.write(go[1], b"x")
        assert ended_well(pid)
        assert not more.registered
        try:
            v.zeropage(region.start, PAGE)
        except uf.ProcessGoneError:
            v.close()
        else:
            raise AssertionError
        """,
    )


@forks
@only("v2", "msg")
def test_forks_of_a_bare_descriptor(wire: str, child: Child) -> None:
    """It has no books, and its children none; their descriptors are owned all the same."""
    run(
        child,
        """
        region = u.map(N * PAGE, inherit=True)
        reader, batches = uf.EventReader(u.fileno(), api=WIRE), []
        def forked(function):
            thread = threading.Thread(target=lambda: batches.append(reader.read()))
            thread.start()
            pid = fork(function)
            thread.join()
            return pid
        pid = forked(lambda: os.read(go[0], 1))
        assert len(userfaultfds()) == ours + 1
        batches.clear()
        assert len(userfaultfds()) == ours
        os.write(go[1], b"x")
        assert ended_well(pid)
        pid = forked(lambda: same(region.start, 1))
        (v,) = uf.take_children(batches[0])
        assert len(v.regions) == 0 and v.api == WIRE and uf.EventReader(v).read()[-1]
        assert (v.agreement.events == u.agreement.events)
        v.copy(region.start, page_of(1))
        assert ended_well(pid)
        v.close()
        """,
    )


@forks
@only("msg")
def test_a_child_is_no_more_inheritable_than_other_descriptors(wire: str, child: Child) -> None:
    """The kernel gives it the flags with which its parent's was opened, by others."""
    run(
        child,
        """
        from userfault import _ioctl
        fd = _ioctl.open_by_syscall(os.O_NONBLOCK)
        _ioctl.api(fd, 0xAA, int(uf.Feature.EVENT_FORK))
        own = room(N)
        _ioctl.register(fd, own, N * PAGE, 1)
        reader, batches = uf.EventReader(fd, api="msg"), []
        thread = threading.Thread(target=lambda: batches.append(reader.read()))
        thread.start()
        while not reader.is_waiting(fd):
            time.sleep(0.001)
        pid = fork(lambda: True)
        thread.join()
        assert os.get_inheritable(fd)
        (v,) = uf.take_children(batches[0])
        assert not os.get_inheritable(v.fileno()) and v.features == uf.Feature.EVENT_FORK
        assert ended_well(pid)
        """,
    )
