"""fork(): a child does nothing to its parent, reads no zeros, and costs the parent no event."""

from __future__ import annotations

from support import LAB, Child, only


def test_a_fork_child_does_nothing_to_its_parent(wire: str, child: Child) -> None:
    """Each way a child can leave, while the parent's region is served; then the parent's pages still come."""
    done = child("""
        data = np.random.default_rng(0).integers(1, 256, 64 * PAGE, dtype=np.uint8)
        with uf.Userfaultfd(WIRE) as u, uf.FaultService(u) as service:
            region = u.map(64 * PAGE)
            service.serve(region, uf.sources.Buffer(data))
            touched = 0
            for leave in ("exit block", "close", "sys.exit", "raise", "calls", "drop"):
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        if leave == "exit block":
                            with service, u:
                                pass
                        elif leave == "close":
                            region.close(); service.close(); u.close()
                        elif leave == "sys.exit":
                            with u, service:
                                sys.exit(0)
                        elif leave == "raise":
                            with u, service:
                                raise KeyboardInterrupt
                        elif leave == "calls":
                            for call in (u.fileno, lambda: u.map(PAGE), lambda: u.poison(region.start, PAGE),
                                         lambda: uf.EventReader(u).read(0), region.unregister,
                                         lambda: service.serve(region, uf.sources.Zero())):
                                try:
                                    call()
                                except uf.ForkedError:
                                    continue
                                os._exit(2)
                        elif leave == "drop":
                            del region, service, u
                            gc.collect()
                        code = 0
                    except SystemExit as error:
                        code = error.code
                    except KeyboardInterrupt:
                        code = 0
                    os._exit(code)
                assert os.waitpid(pid, 0)[1] == 0, leave
                page = slice(touched * PAGE, (touched + 1) * PAGE)
                touched += 1
                assert (region.array[page] == data[page]).all(), leave
            assert settles(service, "pages", touched) and not service.failures()
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


def test_a_fork_in_the_middle_of_a_lookup(wire: str, child: Child) -> None:
    """Forked right after a fault, maybe inside the engine's lookup, a child lets go all the same."""
    done = child(f"""
        data = bytes(range(1, 256)) * PAGE
        u = uf.Userfaultfd(WIRE)
        service = uf.FaultService(u)
        region = u.map(255 * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        for page in range({64 if LAB else 255}):
            region.array[page * PAGE]
            pid = os.fork()
            if pid == 0:
                del region, service, u
                gc.collect()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


@only("v1", "msg")  # v2 always hears forks: test_follow.py
def test_a_fork_child_faults_where_the_parent_has_lazy_memory(wire: str, child: Child) -> None:
    """Without the fork event a child would read zeros; without the memory it dies of SIGSEGV."""
    done = child("""
        own = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with uf.Userfaultfd(WIRE) as u, uf.FaultService(u) as service:
            for region in (u.map(PAGE), u.register(own)):
                service.serve(region, uf.sources.Buffer(bytes([7]) * PAGE))
                array = region.array
                pid = os.fork()
                if pid == 0:
                    os._exit(int(array[0]))
                status = os.waitpid(pid, 0)[1]
                assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV, status
                assert array[0] == 7
            region.unregister()
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


def test_a_fork_raises_no_event(wire: str, child: Child) -> None:
    """Fork events, which v2 always has, would block the parent until they are read: here nobody reads."""
    done = child("""
        features = None
        if WIRE == "msg":
            features = uf.Feature.EVENT_FORK
            try:
                uf.Userfaultfd(WIRE, features).close()
            except uf.UffdError:  # EPERM: CAP_SYS_PTRACE
                features = uf.Feature(0)
        own = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with uf.Userfaultfd(WIRE, features) as u:
            regions = [u.map(4 * PAGE), u.register(own)]
            for _ in range(3):
                pid = os.fork()
                if pid == 0:
                    os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0
            assert len(uf.EventReader(u).read(0)) == 0
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr
