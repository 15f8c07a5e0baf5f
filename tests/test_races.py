"""What goes wrong only in an unlucky order: other threads, late closes, and the corners of the tree."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

import userfault as uf
from support import Child
from userfault import _regions
from userfault._served import Served

PAGE = uf.PAGE_SIZE


@pytest.mark.parametrize("n", [0, 1, 2, 65, 100_000])
def test_addresses_at_the_edges_of_the_number_line(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding of the tree's nodes is 2^63 - 1: that address must not be taken for a key."""
    table = uf.RegionTable()
    table.add_many(np.arange(n, dtype=np.uint64) * np.uint64(2 * PAGE), np.full(n, PAGE, np.uint64))
    edges = [2**63 - 2, 2**63 - 1, 2**63, 2**64 - 1]
    for search in range(_regions.BEST_SEARCH + 1):
        monkeypatch.setattr(_regions, "_search", search)
        assert table.lookup(np.array(edges, np.uint64)).tolist() == [-1] * 4
        assert [table.lookup(edge) for edge in edges] == [-1] * 4


def test_a_refused_lookup_does_not_stay_inside(needs_uffd: None) -> None:
    with uf.Userfaultfd() as u, uf.FaultService(u) as service:
        region = u.map(PAGE)
        service.serve(region, uf.sources.Zero())
        for wrong in (-1, 2**64):
            with pytest.raises(uf.RangeError, match="no address"):
                u.regions.lookup(wrong)
        region.close()  # waits until no reader of the table is inside


def in_threads(*calls: object, seconds: float = 1.0) -> list[BaseException]:
    """Call each over and over in a thread of its own; what they raised."""
    raised: list[BaseException] = []
    end = time.monotonic() + seconds

    def repeat(call: object) -> None:
        try:
            while time.monotonic() < end:
                call()  # type: ignore[operator]
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


def test_one_piece_and_two_in_turn(needs_uffd: None) -> None:
    """A table of one region has a search of its own; the region that stays is found all the same."""
    table = uf.RegionTable()
    table.add(64 * PAGE, PAGE)
    address = np.full(512, 64 * PAGE, np.uint64)
    missed: list[int] = []

    def change() -> None:
        table.add(16 * PAGE, PAGE)
        table.remove(16 * PAGE, PAGE)

    def look() -> None:
        missed.extend(np.flatnonzero(table.lookup(address) != 0).tolist())

    assert not in_threads(change, look)
    assert not missed


def test_adding_many_while_others_add_one() -> None:
    table = uf.RegionTable()
    table.add_many(np.arange(5000, dtype=np.uint64) * np.uint64(4 * PAGE), np.full(5000, PAGE, np.uint64))
    ones, many = iter(range(10**9)), iter(range(10**9))

    def add_one() -> None:
        start = (1 << 40) + next(ones) % 1000 * 4 * PAGE
        try:
            table.add(start, PAGE)
        except uf.OverlapError:
            table.remove(start, PAGE)

    def add_many() -> None:
        table.add_many([(1 << 41) + next(many) * 2 * PAGE], [PAGE])

    assert not in_threads(add_one, add_many)
    ranges = table.ranges()
    assert (np.diff(ranges["start"].astype(np.int64)) > 0).all()
    assert len(np.unique(ranges["id"])) == len(ranges)


def test_half_made_objects() -> None:
    for kind in (uf.EventReader, uf.sources.Source):
        if kind is uf.EventReader:
            with pytest.raises(TypeError):
                kind.__new__(kind)
    for call in (
        lambda: uf.FaultService(None),  # type: ignore[arg-type]
        lambda: uf.EventReader("x", api="v2"),  # type: ignore[arg-type]
        lambda: uf.RegionTable().add(4096.7, PAGE),  # type: ignore[arg-type]
        lambda: uf.sources.File(__file__, 1.5),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError):
            call()


def test_arguments_of_the_wrong_kind(needs_uffd: None) -> None:
    with uf.Userfaultfd() as u:
        region = u.map(PAGE, 1)  # type: ignore[arg-type]
        assert region.mode is uf.RegisterMode.MISSING
        assert "MISSING" in repr(region)
        for call in (
            lambda: u.map(8192.9),  # type: ignore[arg-type]
            lambda: u.copy(region.start, np.zeros(512, object)),
            lambda: uf.FaultService(u).serve(None, uf.sources.Zero()),  # type: ignore[arg-type]
            lambda: __import__("copy").copy(u),
            lambda: __import__("copy").copy(region),
        ):
            with pytest.raises(TypeError):
                call()
        for call in (lambda: u.map(-PAGE), lambda: u.zeropage(-PAGE, PAGE), lambda: u.map(2**64)):
            with pytest.raises(uf.RangeError):
                call()
        for wrong, name in (
            ({"workers": 0}, "workers"),
            ({"shards": 65}, "shards"),
            ({"placement": "left"}, "placement"),
        ):
            with pytest.raises(ValueError, match=name):
                uf.FaultService(u, **wrong)  # type: ignore[arg-type]
        if u.api == uf.Api.MSG and uf.Api.V1 not in uf.probe().apis:
            with pytest.raises(ValueError, match="does not speak v1"):
                uf.EventReader(u.fileno(), api="v1")
    with pytest.raises(uf.UffdError):
        uf.EventReader(2**40, api="v2")


def test_memory_that_has_pages_is_not_served(needs_uffd: None) -> None:
    """Looked at once, it holds the zero page, and would read zeros where the source has data."""
    import mmap

    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint8)
    assert array[PAGE] == 0
    with uf.Userfaultfd() as u, uf.FaultService(u) as service:
        region = u.register(array.ctypes.data, 4 * PAGE)
        with pytest.raises(uf.SourceError, match=f"{array.ctypes.data + PAGE:#x}"):
            service.serve(region, uf.sources.Buffer(bytes([7]) * 4 * PAGE))
        region.unregister()


def test_registered_memory_can_be_had_back_after_close(needs_uffd: None) -> None:
    import mmap

    def once() -> None:
        memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with uf.Userfaultfd() as u:
            region = u.register(memory)
            u.zeropage(region.start, PAGE)
        region.unregister()
        with pytest.raises(uf.ClosedError):
            region.unregister()

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    once()
    settled = time.monotonic() + 30
    before = counts()
    for _ in range(20):
        once()
    while counts() > before and time.monotonic() < settled:
        time.sleep(0.01)
    assert counts() <= before


def test_a_source_outlives_the_table_that_leads_to_it(needs_uffd: None) -> None:
    """The region is dropped: first the table forgets the source, then the source may go."""
    with uf.Userfaultfd() as u, uf.FaultService(u) as service:
        region = u.map(PAGE)
        number, start = region.id, region.start
        service.serve(region, uf.sources.Zero())
        del region
        with pytest.raises(uf.RangeError):
            service._engines[0].attach(start, PAGE, Served(uf.sources.Zero(), number, 1, 1, 0, False))
        other = u.map(PAGE)
        if other.start == start:
            # The address is another region's now: the old number reaches nothing.
            with pytest.raises(uf.RangeError):
                service._engines[0].attach(start, PAGE, Served(uf.sources.Zero(), number, 1, 1, 0, False))


def test_a_reader_that_waits_and_a_service(needs_uffd: None) -> None:
    with uf.Userfaultfd() as u:
        reader = uf.EventReader(u)
        waiting = threading.Thread(target=lambda: reader.read(0.5))
        waiting.start()
        time.sleep(0.1)
        with pytest.raises(uf.BusyError, match=r"in read\(\)"):
            uf.FaultService(u)
        waiting.join(30)
        uf.FaultService(u).close()


CLOSINGS = {
    # Another thread maps a region just as close() has found the table empty.
    "map while closing": """
        def churn():
            while time.monotonic() < end:
                u.map(PAGE)
        def work():
            while time.monotonic() < end:
                with uf.FaultService(u) as s:
                    r = u.map(PAGE); s.serve(r, uf.sources.Zero()); assert r.array[0] == 0
        """,
    # Two threads want the one service.
    "two services": """
        def work():
            while time.monotonic() < end:
                try:
                    with uf.FaultService(u) as s:
                        r = u.map(PAGE); s.serve(r, uf.sources.Zero()); assert r.array[0] == 0
                except uf.BusyError:
                    pass
        churn = work
        """,
    # Views die, and with them the keeper, while the next service opens.
    "a keeper that leaves": """
        def work():
            while time.monotonic() < end:
                with uf.FaultService(u) as s:
                    r = u.map(PAGE); s.serve(r, uf.sources.Zero()); view = r.array[1:]
                    del r
                del view
        def churn():
            time.sleep(0)
        """,
}


@pytest.mark.parametrize("what", CLOSINGS)
def test_services_come_and_go(needs_uffd: None, child: Child, what: str) -> None:
    done = child(
        """
        sys.setswitchinterval(1e-5)
        u = uf.Userfaultfd()
        end = time.monotonic() + 3
        """
        + CLOSINGS[what]
        + """
        threads = [threading.Thread(target=f) for f in (churn, work)]
        for t in threads: t.start()
        for t in threads: t.join()
        u.close()
        print(len(u.regions), "good")
        """
    )
    assert done.stdout == "0 good\n", done.stderr


def test_two_threads_close(needs_uffd: None, child: Child) -> None:
    done = child("""
        sys.setswitchinterval(1e-5)
        before = len(os.listdir("/proc/self/task"))
        for _ in range(200):
            u = uf.Userfaultfd()
            view = u.map(PAGE).array
            threads = [threading.Thread(target=u.close) for _ in range(2)]
            for t in threads: t.start()
            for t in threads: t.join()
            del view, u
        end = time.monotonic() + 10
        while len(os.listdir("/proc/self/task")) > before and time.monotonic() < end:
            time.sleep(0.01)
        print(len(os.listdir("/proc/self/task")) - before)
        """)
    assert done.stdout == "0\n", done.stderr


def test_a_write_protected_page_after_close(wire: str, child: Child) -> None:
    done = child(f"""
        u = uf.Userfaultfd({wire!r})
        region = u.map(PAGE, uf.RegisterMode.MISSING | uf.RegisterMode.WP)
        a = region.array
        u.copy(region.start, b"x" * PAGE, write_protect=True)
        u.close()
        a[0] = 7
        print(a[0], chr(a[1]))
        """)
    assert done.stdout == "7 x\n", (done.returncode, done.stderr)


def test_more_failed_pages_than_mappings(needs_privilege: None, child: Child, tmp_path: object) -> None:
    """Without POISON each failed page splits the mapping; past vm.max_map_count the whole region goes."""
    done = child(f"""
        import dataclasses
        if int(open("/proc/sys/vm/max_map_count").read()) > 100_000:
            print("end"); sys.exit()
        u = uf.Userfaultfd()
        left = int(u.agreement.available) & ~int(uf.Feature.POISON)
        u.agreement = dataclasses.replace(u.agreement, available=uf.Feature(left))
        n = 140_000
        path = {str(tmp_path)!r} + "/sparse"
        open(path, "wb").truncate(n * PAGE)
        region = u.map(n * PAGE)
        service = uf.FaultService(u)
        service.serve(region, uf.sources.File(path))
        os.truncate(path, 0)
        a = region.array
        read, write = os.pipe()
        for page in range(0, n, 2):
            try:
                os.write(write, a[page * PAGE:page * PAGE + 1])
                sys.exit("page read as something")
            except OSError:
                pass
        print("end")
        """)
    assert done.stdout == "end\n", (done.returncode, done.stderr[-500:])


def test_the_partial_page_of_a_mapping_that_was_truncated(needs_privilege: None, tmp_path: object) -> None:
    path = f"{tmp_path}/data"
    with open(path, "wb") as file:
        file.write(b"\7" * (PAGE + 100))
    with uf.Userfaultfd() as u, uf.FaultService(u) as service:
        region = u.map(2 * PAGE)
        service.serve(region, uf.sources.Buffer(np.memmap(path, np.uint8, "r")))
        os.truncate(path, 0)
        read, write = os.pipe()
        for page in range(2):
            with pytest.raises(OSError, match="Bad address"):
                os.write(write, region.array[page * PAGE :][:1])
        os.close(read)
        os.close(write)


def test_an_interrupted_close_is_completed_by_the_next(needs_uffd: None, child: Child) -> None:
    done = child("""
        u = uf.Userfaultfd()
        service = uf.FaultService(u)
        region = u.map(PAGE)
        service.serve(region, uf.sources.Zero())
        real = time.sleep
        def interrupted(seconds):
            time.sleep = real
            raise KeyboardInterrupt
        time.sleep = interrupted
        try:
            service.close()
        except KeyboardInterrupt:
            pass
        time.sleep = real
        service.close()
        assert service.closed
        with uf.FaultService(u):
            pass
        region.close()
        u.close()
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


def test_a_child_really_closes_its_copy(needs_uffd: None, child: Child) -> None:
    done = child("""
        r, w = os.pipe2(os.O_NONBLOCK)
        bare = uf.EventReader(r, api="v2")
        u = uf.Userfaultfd()
        service = uf.FaultService(u)
        region = u.map(PAGE)
        service.serve(region, uf.sources.Zero())
        reader = uf.EventReader(u)
        number = u.fileno()
        pid = os.fork()
        if pid == 0:
            code = 0
            for made_before in (reader, bare):
                try:
                    made_before.read(0)
                    code |= 1
                except uf.ForkedError:
                    pass
            u.close()
            code |= 2 * os.path.exists(f"/proc/self/fd/{number}")
            os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert region.array[0] == 0
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


def test_a_fault_that_comes_while_its_page_is_filled_for_another(needs_uffd: None, child: Child) -> None:
    """Pages that come with a unit are there when their own fault is read: its thread must be woken too."""
    done = child("""
        u = uf.Userfaultfd()
        service = uf.FaultService(u)
        end = time.monotonic() + 4
        rounds = 0
        while time.monotonic() < end:
            one, two = u.map(128 * PAGE), u.map(128 * PAGE)
            for region in (one, two):
                service.serve(region, uf.sources.Constant(7), readahead=0, page_bytes=64 * PAGE)
            order = np.random.default_rng(rounds)
            threads = []
            for k in range(8):
                pages = order.permutation(128).astype(np.uint64) * np.uint64(PAGE)
                threads.append(threading.Thread(target=uf.touch, args=((one, two)[k % 2].array, pages)))
            for t in threads: t.start()
            for t in threads: t.join()
            one.close(); two.close()
            rounds += 1
        print("good")
        """)
    assert done.stdout == "good\n", (done.returncode, done.stderr)


def test_close_while_regions_die(needs_uffd: None, child: Child) -> None:
    done = child("""
        sys.setswitchinterval(1e-5)
        for _ in range(150):
            u = uf.Userfaultfd()
            service = uf.FaultService(u, shards=2)
            regions = [service.map(PAGE) for _ in range(20)]
            for region in regions:
                service.serve(region, uf.sources.Zero())
            threads = [threading.Thread(target=region.close) for region in regions]
            closing = threading.Thread(target=service.close)
            for t in (*threads[:10], closing, *threads[10:]): t.start()
            for t in (*threads, closing): t.join()
            assert service.closed
            assert not any(engine.keep for engine in service._engines)
            u.close()
        print("good")
        """)
    assert done.stdout == "good\n", (done.returncode, done.stderr)


def test_a_service_in_a_fork_child(needs_uffd: None, child: Child) -> None:
    done = child("""
        u = uf.Userfaultfd()
        service = uf.FaultService(u)
        region = u.map(PAGE)
        service.serve(region, uf.sources.Zero())
        pid = os.fork()
        if pid == 0:
            code = 0
            for call in (lambda: service.materialize(region), service.failures,
                         lambda: service.resident(region), lambda: service.map(PAGE)):
                try:
                    call()
                    code = 1
                except uf.ForkedError:
                    pass
            os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        service.materialize(region)
        print("good")
        """)
    assert done.stdout == "good\n", (done.returncode, done.stderr)
