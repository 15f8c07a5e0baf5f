"""A service follows what its process does to the memory: fork, remap, remove and unmap."""

from __future__ import annotations

import userfault as uf
from support import LAB, Child, forks, has, only

# What the children's code shares: a service that hears everything, and system calls that hold the GIL or not.
EVENTS = """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    MAYMOVE, FIXED, DONTUNMAP = 1, 2, 4
    holding = ctypes.PyDLL(None)
    for name in ("mmap", "mremap", "munmap", "madvise"):
        getattr(holding, name).argtypes = getattr(libc, name).argtypes
        getattr(holding, name).restype = getattr(libc, name).restype

    def room(pages):
        return libc.mmap(None, pages * PAGE, 3, 0x4022, -1, 0)

    def page_at(address):
        return np.frombuffer((ctypes.c_ubyte * PAGE).from_address(address), np.uint8)

    def page_of(data, number):
        return data[number * PAGE:(number + 1) * PAGE]

    def same(address, data, number):
        return bool((page_at(address) == page_of(data, number)).all())

    N = 64
    data = np.random.default_rng(0).integers(1, 256, N * PAGE, dtype=np.uint8)
    # One mapping of our own for each region, as users have them.
    u = uf.Userfaultfd(WIRE, "all" if WIRE == "msg" else None)
    service = uf.FaultService(u)
"""


def run(child: Child, code: str, timeout: float = 60) -> None:
    lines = [line[4:] for line in EVENTS.splitlines()]
    body = [line.removeprefix("        ") for line in code.splitlines()]
    done = child("\n".join([*lines, *body, 'print("good")']), timeout=timeout)
    assert done.stdout == "good\n", done.stderr


@forks
@only("v2", "msg")
def test_a_fork_child_reads_the_right_bytes(wire: str, child: Child) -> None:
    """Pages that the parent had and had not; what the parent writes later is not the child's."""
    run(
        child,
        """
        region = u.map(N * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        region.array[5 * PAGE] = 0
        def child():
            good = [same(region.start + n * PAGE, data, n) for n in range(N) if n != 5]
            good += [region.array[5 * PAGE] == 0, region.array[5 * PAGE + 1] == data[5 * PAGE + 1]]
            return all(good)
        pids = [fork(child) for _ in range(3)]
        region.array[7 * PAGE:8 * PAGE] = 1
        assert all(map(ended_well, pids))
        assert same(region.start, data, 0) and gone(service)
        assert service.stats()["forks"] == 3
        """,
    )


@forks
@only("v2", "msg")
def test_a_grandchild_is_followed(wire: str, child: Child) -> None:
    run(
        child,
        """
        region = u.map(N * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        def grandchild():
            return all(same(region.start + n * PAGE, data, n) for n in range(N))
        def child():
            good = same(region.start, data, 0)
            return good and ended_well(fork(grandchild)) and same(region.start + PAGE, data, 1)
        assert ended_well(fork(child)) and gone(service)
        assert service.stats()["forks"] == 2
        """,
    )


@forks
@only("v2", "msg")
def test_one_service_follows_many_children_at_once(wire: str, child: Child) -> None:
    run(
        child,
        f"""
        region = u.map(N * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        go = os.pipe()
        before = len(os.listdir("/proc/self/fd"))
        def child():
            # All of them live at once; none has a userfaultfd of its parent or a sibling.
            os.read(go[0], 1)
            links = [os.readlink(f"/proc/self/fd/{{n}}") for n in os.listdir("/proc/self/fd")
                     if os.path.lexists(f"/proc/self/fd/{{n}}")]
            return not any("userfaultfd" in link for link in links) and all(
                same(region.start + n * PAGE, data, n) for n in range(N))
        pids = [fork(child) for _ in range({12 if LAB else 300})]
        assert service.children == len(pids)
        os.write(go[1], bytes(len(pids)))
        assert all(map(ended_well, pids)) and gone(service)
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # one for epoll
        """,
        timeout=120,
    )


@forks
@only("v2", "msg")
def test_closing_the_service_under_children(wire: str, child: Child) -> None:
    """What they miss fails closed; whoever forks or unmaps afterwards does not hang."""
    poison = has(uf.Feature.POISON)
    run(
        child,
        f"""
        region = u.map(N * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        view = region.array
        assert view[0] == data[0]
        go = os.pipe()
        def child():
            same(region.start, data, 0)
            os.read(go[0], 1)
            return page_at(region.start + PAGE).any()  # SIGBUS
        pid = fork(child)
        service.close()
        assert view[0] == data[0]
        after = fork(lambda: True)
        assert ended_well(after)
        os.write(go[1], b"x")
        if {poison}:
            status = os.waitpid(pid, 0)[1]
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGBUS, status
        else:
            time.sleep(0.2)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # it sleeps: rather that than zeros
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        region.close()
        u.close()
        assert ended_well(fork(lambda: True))
        """,
    )


@only("msg")
def test_remap(wire: str, child: Child) -> None:
    """Moved, moved with growth, in part, over other memory; with the GIL held and without."""
    run(
        child,
        """
        for lib in (libc, holding):
            own = room(N)
            region = u.register(own, N * PAGE)
            service.serve(region, uf.sources.Buffer(data))
            assert same(own + 3 * PAGE, data, 3)
            to = room(2 * N)
            assert lib.mremap(own, N * PAGE, N * PAGE, MAYMOVE | FIXED, to) == to
            assert all(same(to + n * PAGE, data, n) for n in range(N // 2))
            assert u._pieces(region.id, 0, 0) == [(to, N * PAGE, 0)]
            # In part, and back to where it was.
            assert lib.mremap(to + 8 * PAGE, 8 * PAGE, 8 * PAGE, MAYMOVE | FIXED, own) == own
            assert all(same(own + n * PAGE, data, 8 + n) for n in range(8))
            assert u.regions.lookup(to + 8 * PAGE) == -1
            assert [piece[2] // PAGE for piece in u._pieces(region.id, 0, 0)] in ([8, 0, 16], [0, 16, 8])
            # Grown on the way: what comes in addition is zeros, as mremap(2) says.
            big = room(2 * N)
            assert lib.mremap(to + 16 * PAGE, (N - 16) * PAGE, N * PAGE, MAYMOVE | FIXED, big) == big
            assert all(same(big + n * PAGE, data, 16 + n) for n in range(N - 16))
            assert not page_at(big + (N - 16) * PAGE).any() and not page_at(big + (N - 1) * PAGE).any()
            assert u.regions.lookup(big + (N - 1) * PAGE) == region.id
            assert service.resident(region)[16:].all()
            for start, length, _ in u._pieces(region.id, 0, 0):
                lib.munmap(start, length)
            assert not region.registered and len(u.regions) == 0
            region.close()
        """,
    )


@only("msg")
def test_remap_that_leaves_the_old_range_registered(wire: str, child: Child) -> None:
    """MREMAP_DONTUNMAP: the pages go, the old range is served anew."""
    run(
        child,
        """
        own, to = room(N), room(N)
        region = u.register(own, N * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        page_at(own + PAGE)[:] = 9
        assert libc.mremap(own, N * PAGE, N * PAGE, MAYMOVE | FIXED | DONTUNMAP, to) == to
        assert (page_at(to + PAGE) == 9).all()
        for n in range(N):
            assert same(own + n * PAGE, data, n), n
            assert n == 1 or same(to + n * PAGE, data, n), n
        assert sorted(u._pieces(region.id, 0, 0)) == sorted([(own, N * PAGE, 0), (to, N * PAGE, 0)])
        """,
    )


@only("msg")
def test_a_region_that_grows_in_place(wire: str, child: Child) -> None:
    """Which no event tells."""
    run(
        child,
        """
        whole = room(2 * N)
        libc.munmap(whole + N * PAGE, N * PAGE)
        region = u.register(whole, N * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        assert libc.mremap(whole, N * PAGE, 2 * N * PAGE, 0, None) == whole
        assert not page_at(whole + (N + 7) * PAGE).any() and not page_at(whole + (2 * N - 1) * PAGE).any()
        assert same(whole + (N - 1) * PAGE, data, N - 1)
        assert u._pieces(region.id, 0, 0) == [(whole, 2 * N * PAGE, 0)]
        service.materialize(region)
        assert service.resident(region).all() and not service.failures()
        """,
    )


@only("msg")
def test_remove(wire: str, child: Child) -> None:
    """What was dropped is missing, for resident() and materialize() too, and comes from the source anew."""
    run(
        child,
        """
        for lib in (libc, holding):
            region = u.map(N * PAGE)
            service.serve(region, uf.sources.Buffer(data))
            service.materialize(region)
            region.array[:] = 0
            assert lib.madvise(region.start + 8 * PAGE, 8 * PAGE, 4) == 0
            missing = ~service.resident(region)
            assert missing[8:16].all() and missing.sum() == 8
            assert same(region.start + 9 * PAGE, data, 9) and not region.array[0]
            service.materialize(region)
            assert service.resident(region).all() and same(region.start + 15 * PAGE, data, 15)
            region.close()
        """,
    )


@only("msg")
def test_unmap(wire: str, child: Child) -> None:
    """The hole is nobody's any more: what is mapped there next is an ordinary mapping, or another region."""
    run(
        child,
        """
        other = np.full(N * PAGE, 77, np.uint8)
        for lib in (libc, holding):
            own = room(N)
            region = u.register(own, N * PAGE)
            service.serve(region, uf.sources.Buffer(data))
            assert lib.munmap(own + 8 * PAGE, 8 * PAGE) == 0
            rest = (own + 16 * PAGE, (N - 16) * PAGE, 16 * PAGE)
            assert u._pieces(region.id, 0, 0) == [(own, 8 * PAGE, 0), rest]
            assert lib.mmap(own + 8 * PAGE, 8 * PAGE, 3, 0x32, -1, 0) == own + 8 * PAGE
            assert not page_at(own + 8 * PAGE).any()
            assert lib.munmap(own + 8 * PAGE, 8 * PAGE) == 0
            assert lib.mmap(own + 8 * PAGE, 8 * PAGE, 3, 0x32, -1, 0) == own + 8 * PAGE
            another = u.register(own + 8 * PAGE, 8 * PAGE)
            service.serve(another, uf.sources.Buffer(other))
            assert (page_at(own + 9 * PAGE) == 77).all() and same(own + 20 * PAGE, data, 20)
            service.materialize(region)
            assert service.resident(region).sum() == N - 8
            assert lib.munmap(own, N * PAGE) == 0
            assert len(u.regions) == 0
        """,
    )


@only("msg")
def test_memory_of_ours_that_the_user_unmapped_or_moved(wire: str, child: Child) -> None:
    """The end of a region must not unmap what somebody else has at its address by now."""
    run(
        child,
        """
        region = u.map(N * PAGE)
        start = region.start
        service.serve(region, uf.sources.Buffer(data))
        to = room(N)
        assert libc.mremap(start, N // 2 * PAGE, N // 2 * PAGE, MAYMOVE | FIXED, to) == to
        assert libc.mmap(start, N // 2 * PAGE, 3, 0x32, -1, 0) == start
        page_at(start)[:] = 3
        assert same(to + PAGE, data, 1) and same(start + (N - 1) * PAGE, data, N - 1)
        another = u.register(start, N // 2 * PAGE)
        region.close()
        gc.collect()
        assert (page_at(start) == 3).all() and another.registered
        """,
    )


@forks
@only("msg")
def test_no_descriptors_left_for_more_children(wire: str, child: Child) -> None:
    """fork() waits until one of those that are followed has exited."""
    run(
        child,
        """
        import resource
        region = u.map(N * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, used + 8))
        def child():
            time.sleep(0.02)
            return all(same(region.start + n * PAGE, data, n) for n in range(N))
        pids = [fork(child) for _ in range(40)]
        assert all(map(ended_well, pids)) and gone(service)
        assert service.stats()["errors"][24]  # EMFILE
        """,
    )
