"""Every way in which Python makes processes, out of one whose regions are served.

A child reads the right bytes where fork events are on. Where they are off it has not got the memory, and dies
when it touches it. Zeros it reads never; and whatever becomes of it, its parent's pages come.
"""

from __future__ import annotations

import pytest

import userfault as uf
from children import run_served
from support import LAB, Child, forks, needs, on_and_off, only

METHODS = ("fork",) if LAB else ("fork", "forkserver", "spawn")

# -- the start methods ---------------------------------------------------------------------------------------


@on_and_off
@pytest.mark.parametrize("method", METHODS)
def test_multiprocessing(wire: str, events: bool, method: str, child: Child) -> None:
    """A fork child has the memory itself, or not at all; others have a copy, which is pickled."""
    run_served(
        child,
        """
        check = "import numpy; assert numpy.array_equal(array, data)"
        process = multiprocessing.get_context(METHOD).Process(
            target=exec, args=(check, {"array": array, "data": data}))
        process.start()
        process.join()
        assert process.exitcode == (0 if EVENTS or METHOD != "fork" else -signal.SIGSEGV), process.exitcode
        assert same(array) and not service.failures()
        """,
        events,
        METHOD=method,
    )


@on_and_off
@pytest.mark.parametrize("method", METHODS)
def test_a_process_pool(wire: str, events: bool, method: str, child: Child) -> None:
    run_served(
        child,
        """
        def right(page):
            return same(array, page, page + 1)
        context = multiprocessing.get_context(METHOD)
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            if METHOD != "fork":
                assert pool.submit(np.array_equal, array, data).result()
            elif EVENTS:
                assert all(pool.map(right, range(N)))
            else:
                try:
                    pool.submit(right, 3).result()
                except concurrent.futures.process.BrokenProcessPool:
                    pass
                else:
                    raise AssertionError("it has got the memory")
        assert same(array) and not service.failures()
        """,
        events,
        METHOD=method,
    )


@on_and_off
def test_subprocess(wire: str, events: bool, child: Child) -> None:
    """A program that is started has nothing of ours; a preexec_fn runs in a fork child."""
    run_served(
        child,
        """
        assert subprocess.run(["ls", "-l", "/proc/self/fd"], check=True, capture_output=True,
                              close_fds=False).stdout.count(b"userfaultfd") == 0
        def checked():
            if not same(array):
                os._exit(9)
        started = subprocess.Popen(["ls", "-l", "/proc/self/fd"], stdout=subprocess.PIPE, close_fds=False,
                                   preexec_fn=checked)
        assert started.stdout.read().count(b"userfaultfd") == 0
        assert started.wait() == (0 if EVENTS else -signal.SIGSEGV), started.returncode
        assert same(array) and not service.failures() and gone(service)
        """,
        events,
    )


@on_and_off
def test_a_plain_fork(wire: str, events: bool, child: Child) -> None:
    """Which may have a service of its own beside its parent's."""
    run_served(
        child,
        """
        for features in ("all", None):
            assert ended_well(fork(lambda: own_service(features) and (not EVENTS or same(array))))
        pid = fork(lambda: same(array))
        assert ended_well(pid) if EVENTS else died_of(pid, signal.SIGSEGV)
        assert same(array) and not service.failures()
        """,
        events,
    )


@only("msg")
def test_a_child_has_other_memory_at_a_regions_address(wire: str, child: Child) -> None:
    """Which the end of the region there must not unmap."""
    run_served(
        child,
        """
        def in_child():
            global array, region
            libc = ctypes.CDLL(None)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
            start = region.start
            assert libc.mmap(start, PAGE, 3, 0x100022, -1, 0) == start
            del array, region
            gc.collect()
            ctypes.memset(start, 7, PAGE)
            return ctypes.string_at(start, 1) == bytes([7])
        assert ended_well(fork(in_child)) and same(array)
        """,
        events=False,
    )


@only("msg")
def test_without_the_capability_for_fork_events(wire: str, child: Child) -> None:
    """What was asked for by name is refused; "all" does without, and children fault on touch."""
    run_served(
        child,
        """
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(header, sets) == 0
        SYS_PTRACE = 19
        sets[0] &= ~(1 << SYS_PTRACE)
        assert libc.capset(header, sets) == 0
        try:
            uf.Userfaultfd("msg", uf.Feature.EVENT_FORK)
        except uf.UffdError as error:
            assert error.errno == errno.EPERM, error
        else:
            raise AssertionError("fork events without CAP_SYS_PTRACE")
        with uf.Userfaultfd("msg", "all") as u, uf.FaultService(u) as service:
            assert uf.Feature.EVENT_FORK not in u.features
            region = u.map(N * PAGE)
            service.serve(region, uf.sources.Buffer(data))
            assert died_of(fork(lambda: same(region.array)), signal.SIGSEGV)
            assert same(region.array)
        """,
        events=False,
    )


def test_what_is_bound_to_its_process_cannot_be_pickled(wire: str, child: Child) -> None:
    """Its error says so; an array is copied."""
    run_served(
        child,
        """
        for bound in (u, service, region):
            for method in ("fork", "spawn", "forkserver"):
                process = multiprocessing.get_context(method).Process(target=print, args=(bound,))
                if method == "fork":
                    continue  # which pickles nothing
                try:
                    process.start()
                except TypeError as error:
                    assert "cannot be copied or pickled" in str(error), error
                else:
                    raise AssertionError(f"{bound!r} was pickled")
        for bound in (u.regions, uf.EventReader(uf.Userfaultfd(WIRE)), uf.sources.Buffer(data)):
            try:
                pickle.dumps(bound)
            except TypeError:
                continue
            raise AssertionError(f"{bound!r} was pickled")
        assert same(pickle.loads(pickle.dumps(array)))
        """,
        events=False,
    )


# -- how children end ----------------------------------------------------------------------------------------


@on_and_off
def test_however_a_child_ends_the_parents_pages_come(wire: str, events: bool, child: Child) -> None:
    """Those that end their interpreter as well as those that do not."""
    run_served(
        child,
        """
        def drop():
            global region, array, service, u
            del region, array, service, u
            gc.collect()
            sys.exit(0)
        def quit():
            with u, service:
                sys.exit(0)
        def fail():
            with u, service:
                raise RuntimeError("as it should be")
        def close():
            region.close()
            service.close()
            u.close()
        ends = {
            quit: 0, fail: 1, drop: 0, sys.exit: 0, close: 0,
            lambda: os._exit(3): 3,
            lambda: os.kill(os.getpid(), signal.SIGKILL): -signal.SIGKILL,
            lambda: os.kill(os.getpid(), signal.SIGTERM): -signal.SIGTERM,
        }
        for page, (end, status) in enumerate(ends.items()):
            for touching in (False, True) if EVENTS else (False,):
                pid = os.fork()
                if pid == 0:
                    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
                    if touching and not same(array, 0, N // 2):
                        os._exit(77)
                    end()
                    sys.exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status, (page, touching)
            assert same(array, page, page + 1), page
        assert settles(service, "failed", 0) and service.resident(region).sum() == len(ends)
        assert same(array) and gone(service)
        """,
        events,
    )


@on_and_off
def test_two_hundred_children_leave_nothing_behind(wire: str, events: bool, child: Child) -> None:
    run_served(
        child,
        """
        def census():
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * PAGE
            return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident
        def some(count):
            for n in range(count):
                assert ended_well(fork(lambda: not EVENTS or same(array, n % N, n % N + 1)))
            assert gone(service)
        some(10)  # with these come a descriptor for epoll, and the allocators' pools
        before = census()
        some(COUNT)
        after = census()
        assert after[:2] == before[:2], (before, after)
        assert after[2] < before[2] + (2 << 20), (before, after)
        assert same(array) and not service.failures()
        """,
        events,
        COUNT=20 if LAB else 200,
        timeout=120,
    )


# -- children that outlive what serves them ------------------------------------------------------------------

orphans = needs(uf.Feature.POISON)  # their pages fail closed from Linux 6.6 on


@forks
@orphans
@only("msg")
@pytest.mark.parametrize("closed", ["unregistered", "region", "service", "userfaultfd", "dropped"])
def test_a_child_outlives_what_was_closed(wire: str, closed: str, child: Child) -> None:
    """Its missing pages are SIGBUS; and when it has ended, nothing is left of what followed it."""
    run_served(
        child,
        """
        threads = len(os.listdir("/proc/self/task"))
        go = os.pipe()
        def outlive():
            good = same(array, 0, 8)
            os.read(go[0], 1)
            return good and same(array, 0, 8) and array[9 * PAGE]
        def wait():
            os.read(go[0], 1)
            return True
        pid, idle = fork(outlive), fork(wait)
        assert same(array, 0, 2)
        if CLOSED == "unregistered":
            region.unregister()
        elif CLOSED == "region":
            region.close()
        elif CLOSED == "service":
            service.close()
        elif CLOSED == "userfaultfd":
            u.close()
        else:
            del u, service, region
            gc.collect()
        os.write(go[1], b"x" * 2)
        assert died_of(pid, signal.SIGBUS) and ended_well(idle)
        array = region = service = u = None
        gc.collect()
        deadline = time.monotonic() + 30
        while len(os.listdir("/proc/self/task")) >= threads and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/task")) == threads - 1
        assert not any("userfaultfd" in os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                       if os.path.lexists(f"/proc/self/fd/{n}"))
        """,
        CLOSED=closed,
    )


@forks
@orphans
@only("msg")
@pytest.mark.parametrize("deep", [0, 1, 2])
def test_a_child_outlives_its_parent(wire: str, deep: int, child: Child) -> None:
    """Which ends as any interpreter does, be it a fork child itself, and a service's own process or not."""
    run_served(
        child,
        """
        told = os.pipe()
        def parent():
            # Its own region is missing the same pages as that of its parent's parent.
            theirs = opened()
            serving = uf.FaultService(theirs)
            lazy = theirs.map(N * PAGE)
            serving.serve(lazy, uf.sources.Buffer(data), readahead=0)
            me, there = os.getpid(), os.pipe()
            def outlive():
                good = same(lazy.array, 0, 2)
                os.write(there[1], b"x")
                good = good and has_ended(me) and same(lazy.array, 0, 2) and same(array)
                os.write(told[1], b"g" if good else b"b")
                os.write(told[1], b"b" if lazy.array[5 * PAGE] != data[5 * PAGE] else b"r")
                return True
            fork(outlive)
            os.read(there[0], 1)
            sys.exit(0)
        def descend(deep):
            pid = os.fork()
            if pid == 0:
                descend(deep - 1) if deep else parent()
                sys.exit(0)
            assert ended_well(pid)
        descend(DEEP)
        os.close(told[1])
        assert os.read(told[0], 1) == b"g"
        assert os.read(told[0], 2) == b""  # not before it has ended
        """,
        DEEP=deep,
    )


@forks
@orphans
@only("msg")
def test_a_child_goes_on_forking_while_its_parent_ends(wire: str, child: Child) -> None:
    """Whichever side of the end a grandchild was born on, it reads no zeros."""
    run_served(
        child,
        """
        def parent(lasts):
            theirs = opened()
            serving = uf.FaultService(theirs)
            lazy = theirs.map(N * PAGE)
            serving.serve(lazy, uf.sources.Buffer(data))
            me, begun = os.getpid(), os.pipe()
            def look():
                if has_ended(me) and not lazy.array[5 * PAGE]:
                    os.write(told[1], b"z")
            def go_on():
                os.write(begun[1], b"x")
                until = time.monotonic() + lasts + 0.05
                while time.monotonic() < until:
                    fork(look)
                return True
            for _ in range(3):
                fork(go_on)
            os.read(begun[0], 3)
            time.sleep(lasts)
            sys.exit(0)
        for number in range(20):
            told = os.pipe()
            pid = os.fork()
            if pid == 0:
                parent(0.005 + 0.001 * number)
            assert ended_well(pid)
            os.close(told[1])
            assert os.read(told[0], 1) == b""  # not before all have ended
            os.close(told[0])
        assert same(array) and not service.failures()
        """,
    )
