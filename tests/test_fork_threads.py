"""Forks while other threads are at work, services in children, and what children do to their inheritance."""

from __future__ import annotations

import pytest

from children import run_served
from support import LAB, Child, forks, on_and_off, only

HAMMERS = """
        stop = False
        def hammer(function):
            def work():
                while not stop:
                    function()
            thread = threading.Thread(target=work)
            thread.start()
            return thread
        def map_and_close():
            with opened("all" if EVENTS else None) as more, uf.FaultService(more) as serving:
                for each, using in ((u, service), (more, serving)):
                    lazy = each.map(8 * PAGE)
                    using.serve(lazy, uf.sources.Buffer(data))
                    assert same(lazy.array, 1, 2)
                    lazy.close()
        def ask():
            service.stats(), service.failures(), service.resident(region), u.regions.ranges()
        def materialize():
            lazy = u.map(N * PAGE)
            service.serve(lazy, uf.sources.Buffer(data))
            service.materialize(lazy)
            assert same(lazy.array)
            lazy.close()
        quiet = uf.Userfaultfd(WIRE)
        reader = uf.EventReader(quiet)
        busy = [hammer(work) for work in (map_and_close, ask, materialize, lambda: reader.read(0.001))]
        def in_child():
            # What asks no lock of the parent's threads answers, and all else says that it is the parent's.
            assert not u.closed and service.stats()["failed"] == 0 and region.id == 0
            for call in (u.fileno, lambda: u.map(PAGE), lambda: service.resident(region), service.failures,
                         lambda: service.map(PAGE), lambda: service.serve(region, uf.sources.Zero())):
                try:
                    call()
                except uf.ForkedError:
                    continue
                return False
            region.close()
            return own_service("all" if EVENTS else None) and (not EVENTS or same(array))
        def forker():
            for _ in range(ROUNDS):
                results.append(ended_well(fork(in_child)))
        results = []
        forkers = [threading.Thread(target=forker) for _ in range(FORKERS)]
        for thread in forkers:
            thread.start()
        for thread in forkers:
            thread.join()
        stop = True
        for thread in busy:
            thread.join()
        assert results == [True] * ROUNDS * FORKERS, results
        assert same(array) and not service.failures() and gone(service)
"""


@on_and_off
@pytest.mark.parametrize("forkers", [1, 4])
def test_forks_while_threads_are_in_our_locks(wire: str, events: bool, forkers: int, child: Child) -> None:
    run_served(child, HAMMERS, events, timeout=120, FORKERS=forkers, ROUNDS=4 if LAB else 40 // forkers)


@on_and_off
def test_forks_while_threads_touch_missing_pages(wire: str, events: bool, child: Child) -> None:
    """Holding the GIL, and not."""
    run_served(
        child,
        """
        stop = False
        def touch(number):
            rng = np.random.default_rng(number)
            while not stop:
                lazy = u.map(N * PAGE)
                service.serve(lazy, uf.sources.Buffer(data))
                pages = rng.permutation(N)
                if number % 2:
                    uf.touch(lazy.array, pages.astype(np.uint64) * np.uint64(PAGE))
                assert all(lazy.array[page * PAGE] == data[page * PAGE] for page in pages.tolist())
                lazy.close()
        touching = [threading.Thread(target=touch, args=(n,)) for n in range(4)]
        for thread in touching:
            thread.start()
        for _ in range(ROUNDS):
            assert ended_well(fork(lambda: not EVENTS or same(array)))
        stop = True
        for thread in touching:
            thread.join()
        assert same(array) and not service.failures() and gone(service)
        """,
        events,
        ROUNDS=10 if LAB else 100,
        timeout=120,
    )


@forks
@only("v2", "msg")
def test_regions_come_and_go_while_many_children_end(wire: str, child: Child) -> None:
    """Who goes through the list of children holds on to the one that it has come to."""
    run_served(
        child,
        """
        stop = False
        def churn():
            while not stop:
                lazy = u.map(PAGE)
                service.serve(lazy, uf.sources.Buffer(data))
                lazy.close()
        churning = [threading.Thread(target=churn) for _ in range(3)]
        for thread in churning:
            thread.start()
        for _ in range(ROUNDS):
            go = os.pipe()
            pids = [fork(lambda: os.read(go[0], 1)) for _ in range(40)]
            os.write(go[1], bytes(40))
            assert all(map(ended_well, pids))
            os.close(go[0])
            os.close(go[1])
        assert gone(service)
        stop = True
        for thread in churning:
            thread.join()
        assert same(array) and not service.failures()
        """,
        ROUNDS=2 if LAB else 15,
        timeout=120,
    )


@forks
@only("v2", "msg")
def test_processes_of_a_process(wire: str, child: Child) -> None:
    """multiprocessing inside a child, which has regions of its own besides: two services follow."""
    run_served(
        child,
        """
        context = multiprocessing.get_context("fork")
        def finish(process):
            process.join()
            return process.exitcode == 0
        def inner(lazy):
            assert same(array) and same(lazy.array) and own_service()
        def outer():
            with opened() as mine, uf.FaultService(mine) as serving:
                lazy = mine.map(N * PAGE)
                serving.serve(lazy, uf.sources.Buffer(data))
                processes = [context.Process(target=inner, args=(lazy,)) for _ in range(3)]
                for process in processes:
                    process.start()
                assert all(map(finish, processes)) and serving.stats()["forks"] == 3
                assert same(lazy.array) and same(array)
        processes = [context.Process(target=outer) for _ in range(2)]
        for process in processes:
            process.start()
        assert all(map(finish, processes))
        assert same(array) and not service.failures() and gone(service)
        assert service.stats()["forks"] == 8
        """,
    )


@forks
@only("v2", "msg")
def test_a_child_that_forks_at_once(wire: str, child: Child) -> None:
    """While what it has of many regions is still being looked at."""
    run_served(
        child,
        """
        lazies = [u.map(PAGE) for _ in range(REGIONS)]
        for lazy in lazies:
            service.serve(lazy, uf.sources.Buffer(data))
        def good():
            return all(lazy.array[7] == data[7] for lazy in lazies)
        for _ in range(5):
            def in_child():
                grandchild = fork(good)
                return good() and ended_well(grandchild)
            assert ended_well(fork(in_child))
        assert not service.failures() and gone(service)
        """,
        REGIONS=50 if LAB else 1000,
    )


@forks
@only("v2", "msg")
def test_shards_follow(wire: str, child: Child) -> None:
    run_served(
        child,
        """
        with opened() as more, uf.FaultService(more, shards=3) as serving:
            lazies = [serving.map(N * PAGE) for _ in range(6)]
            for lazy in lazies:
                serving.serve(lazy, uf.sources.Buffer(data))
            assert len({id(lazy._userfaultfd) for lazy in lazies}) == 3
            for _ in range(3):
                assert ended_well(fork(lambda: all(same(lazy.array) for lazy in lazies)))
            assert all(same(lazy.array) for lazy in lazies) and gone(serving)
        """,
    )


@forks
@only("msg")
def test_a_child_changes_the_memory_that_it_inherited(wire: str, child: Child) -> None:
    """Its events are the parent's service's to read: nothing of the parent's changes."""
    run_served(
        child,
        """
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mremap.restype = libc.mmap.restype = ctypes.c_void_p
        size = ctypes.c_size_t
        libc.mremap.argtypes = [ctypes.c_void_p, size, size, ctypes.c_int, ctypes.c_void_p]
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        MAYMOVE, FIXED, DONTNEED = 1, 2, 4
        start, half = region.start, N // 2 * PAGE
        def at(address, pages):
            return np.frombuffer((ctypes.c_ubyte * (pages * PAGE)).from_address(address), np.uint8)
        def in_child():
            array[:4 * PAGE] = 0
            assert libc.madvise(start, 4 * PAGE, DONTNEED) == 0
            assert same(array, 0, 4)
            to = libc.mmap(None, half, 3, 0x4022, -1, 0)
            assert libc.mremap(start + half, half, half, MAYMOVE | FIXED, to) == to
            assert (at(to, N // 2) == data[half:]).all()
            assert libc.mmap(start + half, half, 3, 0x32, -1, 0) == start + half
            assert not at(start + half, N // 2).any()
            assert libc.munmap(start + 8 * PAGE, 8 * PAGE) == 0
            assert same(array, 0, 8) and same(array, 16, N // 2)
            # To register anew what has come from the parent is refused, or it would read zeros.
            with opened() as mine:
                try:
                    mine.register(start, 8 * PAGE)
                except uf.UffdError as error:
                    return error.errno == errno.EBUSY
        for _ in range(3):
            assert ended_well(fork(in_child))
        assert u._pieces(region.id, 0, 0) == [(start, N * PAGE, 0)]
        assert not service.resident(region).any()
        assert same(array) and not service.failures() and gone(service)
        """,
    )
