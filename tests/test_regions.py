"""RegionTable against a naive model, its errors, and lookups while another thread changes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import userfault as uf
from support import LAB, Child
from userfault import _regions

PAGE = uf.PAGE_SIZE
SEARCHES = range(_regions.BEST_SEARCH + 1)  # plain, AVX2, AVX-512: those that this processor has


@pytest.fixture(params=SEARCHES)
def each_search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(_regions, "_search", request.param)
    return int(request.param)


class Model:
    """Pages to (id, offset), one dictionary entry a page."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, int]] = {}
        self.next_id = 0

    def add(self, start: int, n: int) -> int | None:
        if any(page in self.pages for page in range(start, start + n)):
            return None
        for page in range(start, start + n):
            self.pages[page] = (self.next_id, page - start)
        self.next_id += 1
        return self.next_id - 1

    def remove(self, start: int, n: int) -> int:
        return sum(self.pages.pop(page, None) is not None for page in range(start, start + n))


class TableMachine(RuleBasedStateMachine):
    """Random changes in a small space, where ranges touch, split and leave gaps all the time."""

    starts = st.integers(0, 1200)
    lengths = st.integers(1, 12)

    def __init__(self) -> None:
        super().__init__()
        self.table = uf.RegionTable()
        self.model = Model()

    @initialize(step=st.integers(1, 7), n=st.integers(0, 400))
    def fill(self, step: int, n: int) -> None:
        """Enough single pages for several leaves."""
        starts = [step * i for i in range(n) if step * i < 1200]
        ids = self.table.add_many([page * PAGE for page in starts], [PAGE] * len(starts))
        assert ids.tolist() == [self.model.add(page, 1) for page in starts]

    @rule(start=starts, n=lengths)
    def add(self, start: int, n: int) -> None:
        expected = self.model.add(start, n)
        if expected is None:
            with pytest.raises(uf.OverlapError):
                self.table.add(start * PAGE, n * PAGE)
        else:
            assert self.table.add(start * PAGE, n * PAGE) == expected

    @rule(ranges=st.lists(st.tuples(starts, lengths), max_size=8))
    def add_many(self, ranges: list[tuple[int, int]]) -> None:
        pages = [page for start, n in ranges for page in range(start, start + n)]
        starts, lengths = [s * PAGE for s, _ in ranges], [n * PAGE for _, n in ranges]
        if len(set(pages)) < len(pages) or any(page in self.model.pages for page in pages):
            with pytest.raises(uf.OverlapError):
                self.table.add_many(starts, lengths)
        else:
            expected = [self.model.add(start, n) for start, n in ranges]
            assert self.table.add_many(starts, lengths).tolist() == expected

    @rule(start=starts, n=st.integers(1, 300))
    def remove(self, start: int, n: int) -> None:
        taken = self.model.remove(start, n)
        if taken:
            assert self.table.remove(start * PAGE, n * PAGE) == taken * PAGE
        else:
            with pytest.raises(uf.RangeError, match="no region holds"):
                self.table.remove(start * PAGE, n * PAGE)

    @invariant()
    def lookups_agree(self) -> None:
        pages = np.arange(1300, dtype=np.uint64)
        expected = [self.model.pages.get(int(page), (-1, -1)) for page in pages]
        for search in SEARCHES:
            _regions._search = search
            for inside in (0, PAGE - 1):
                ids, offsets = self.table.dispatch(pages * np.uint64(PAGE) + np.uint64(inside))
                assert ids.tolist() == [number for number, _ in expected]
                assert offsets.tolist() == [
                    -1 if number < 0 else offset * PAGE + inside for number, offset in expected
                ]

    @invariant()
    def ranges_agree(self) -> None:
        held = {}
        for start, length, number, offset in self.table.ranges().tolist():
            for page in range(length // PAGE):
                held[start // PAGE + page] = (number, offset // PAGE + page)
        assert held == self.model.pages


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=5 if LAB else 40, stateful_step_count=30)


@pytest.mark.parametrize("n", [1, 2, 64, 65, 1000, 100_000])
def test_lookup_equals_searchsorted(each_search: int, n: int) -> None:
    rng = np.random.default_rng(n)
    edges = np.sort(rng.choice(8 * n, 2 * n, replace=False)).astype(np.uint64) * np.uint64(PAGE)
    starts, ends = edges[0::2], edges[1::2]
    table = uf.RegionTable()
    order = rng.permutation(n)
    ids = table.add_many(starts[order], (ends - starts)[order])
    addresses = rng.integers(0, 8 * n * PAGE + 3 * PAGE, 65_536).astype(np.uint64)
    place = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
    held = (place >= 0) & (addresses < ends[place])
    by_place = np.empty(n, np.int64)
    by_place[order] = ids
    assert (table.lookup(addresses) == np.where(held, by_place[place], -1)).all()
    got, offsets = table.dispatch(addresses)
    assert (got == table.lookup(addresses)).all()
    assert (offsets == np.where(held, (addresses - starts[place]).astype(np.int64), -1)).all()
    strided = np.repeat(addresses, 3)[::3]
    assert (table.lookup(strided) == got).all()
    assert (table.lookup(addresses[::-1]) == got[::-1]).all()


def test_one_by_one_at_full_size() -> None:
    """10^5 single adds and removes in random order, checked against searchsorted at the end."""
    n = 100_000
    rng = np.random.default_rng(7)
    table = uf.RegionTable()
    for page in rng.permutation(n).tolist():
        table.add(2 * page * PAGE, PAGE)
    gone = rng.permutation(n)[: n // 2]
    for page in gone.tolist():
        assert table.remove(2 * page * PAGE, PAGE) == PAGE
    assert len(table) == n - len(gone)
    held = np.ones(n, bool)
    held[gone] = False
    found = table.lookup(np.arange(2 * n, dtype=np.uint64) * np.uint64(PAGE)) >= 0
    assert (found[0::2] == held).all()
    assert not found[1::2].any()


@given(address=st.integers(0, 2**64 - 1))
def test_any_address_may_be_asked(address: int) -> None:
    table = uf.RegionTable()
    table.add(PAGE, PAGE)
    top = 2**63 - 2 * PAGE
    table.add(top, PAGE)
    expected = 0 if PAGE <= address < 2 * PAGE else 1 if top <= address < top + PAGE else -1
    assert table.lookup(address) == expected
    assert table.lookup(np.array([address] * 3, np.uint64)).tolist() == [expected] * 3


def test_records_of_each_wire() -> None:
    table = uf.RegionTable()
    table.add(16 * PAGE, 4 * PAGE)
    v1 = np.array([(17 * PAGE | 1,), (3 * PAGE,)], uf.V1_DTYPE)
    v2 = np.array([(1, 17 * PAGE | 3), (2, 17 * PAGE), (9, 17 * PAGE)], uf.V2_DTYPE)
    msg = np.zeros(3, uf.MSG_DTYPE)
    msg["event"] = [0x12, 0x14, 0x12]
    msg["address"] = [17 * PAGE + 5, 17 * PAGE, 99 * PAGE]
    assert [column.tolist() for column in table.dispatch(v1)] == [[0, -1], [PAGE, -1]]
    assert [column.tolist() for column in table.dispatch(v2)] == [[0, -1, -1], [PAGE, -1, -1]]
    assert [column.tolist() for column in table.dispatch(msg)] == [[0, -1, -1], [PAGE + 5, -1, -1]]
    assert [column.tolist() for column in table.dispatch(msg[::2])] == [[0, -1], [PAGE + 5, -1]]
    assert table.dispatch(17 * PAGE) == (0, PAGE)
    assert table.dispatch(uf.PAGE_SIZE) == (-1, -1)


def test_a_region_split_by_removal_keeps_its_id_and_offsets() -> None:
    table = uf.RegionTable()
    table.add(0x100000, 8 * PAGE)
    assert table.remove(0x100000 + 3 * PAGE, 2 * PAGE) == 2 * PAGE
    assert table.ranges().tolist() == [
        (0x100000, 3 * PAGE, 0, 0),
        (0x100000 + 5 * PAGE, 3 * PAGE, 0, 5 * PAGE),
    ]
    assert table.dispatch(0x100000 + 6 * PAGE) == (0, 6 * PAGE)
    assert table.lookup(0x100000 + 4 * PAGE) == -1
    assert table.add(0x100000 + 3 * PAGE, 2 * PAGE) == 1


@pytest.mark.parametrize(
    ("start", "length", "match"),
    [
        (0, 0, "empty"),
        (1, PAGE, "not page-aligned"),
        (PAGE, PAGE + 1, "not page-aligned"),
        (2**64 - PAGE, 2 * PAGE, "end of the address space"),
        (2**63 - PAGE, 2 * PAGE, "end of the address space"),
    ],
)
def test_bad_ranges_change_nothing(start: int, length: int, match: str) -> None:
    table = uf.RegionTable()
    table.add(PAGE, PAGE)
    before = table.ranges().tolist()
    calls: list[Callable[..., Any]] = [
        table.add,
        table.remove,
        lambda s, n: table.add_many([8 * PAGE, s], [PAGE, n]),
    ]
    for call in calls:
        with pytest.raises(uf.RangeError, match=match):
            call(start, length)
    assert table.ranges().tolist() == before
    assert table.add(4 * PAGE, PAGE) == 1


def test_overlap_names_both_ranges() -> None:
    table = uf.RegionTable()
    table.add(0x10000, 4 * PAGE)
    with pytest.raises(uf.OverlapError, match=r"0x13000.*region 0 at \[0x10000"):
        table.add(0x13000, PAGE)
    with pytest.raises(uf.OverlapError, match=r"0x10000"):
        table.add_many([0x40000, 0x11000], [PAGE, PAGE])
    assert len(table) == 1


def test_bad_arrays() -> None:
    table = uf.RegionTable()
    table.add(PAGE, PAGE)
    for wrong in (
        np.zeros(3, np.int64),
        np.zeros(3),
        np.zeros(3, [("a", "<u8")]),
        np.zeros((2, 2), np.uint64),
    ):
        with pytest.raises(uf.RecordError):
            table.lookup(wrong)
    with pytest.raises(TypeError):
        table.lookup([1.5])
    for call in (lambda: table.lookup([-1]), lambda: table.lookup([2**64]), lambda: table.add(-PAGE, PAGE)):
        with pytest.raises(uf.RangeError, match="no address"):
            call()
    with pytest.raises(ValueError, match="equally long"):
        table.add_many([PAGE], [PAGE, PAGE])
    assert table.lookup(np.zeros(0, np.uint64)).tolist() == []
    assert table.lookup([PAGE, 0]).tolist() == [0, -1]


def test_lookups_see_each_change_wholly_or_not_at_all() -> None:
    """Holes come and go in the middle of regions; what lies beside the holes must never be missed."""
    table = uf.RegionTable()
    n = 2000
    for i in range(n):
        table.add(16 * i * PAGE, 8 * PAGE)
    # First and last page of each region: never removed.
    always = np.concatenate([np.arange(n) * 16, np.arange(n) * 16 + 7]).astype(np.uint64) * np.uint64(PAGE)
    expected = np.concatenate([np.arange(n), np.arange(n)])
    stop = threading.Event()
    wrong: list[int] = []

    def look() -> None:
        while not stop.is_set():
            ids, offsets = table.dispatch(always)
            first = offsets[:n]
            wrong.extend(
                np.flatnonzero((ids != expected) | (np.concatenate([first, offsets[n:]]) < 0)).tolist()
            )

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(3)
    for i in rng.integers(0, n, 6000).tolist():
        hole = (16 * i + 2) * PAGE
        table.remove(hole, 3 * PAGE)
        # The hole is filled by a region of its own, which goes again: leaves split, shrink and vanish.
        table.add(hole, PAGE)
        table.remove(hole, PAGE)
        filler = table.add(hole, 3 * PAGE)
        assert table.lookup(hole) == filler
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_threads_change_one_table_while_others_look() -> None:
    """Each owns every second range; single pages come and go while blocks of pages are added at once."""
    table = uf.RegionTable()
    n = 20 if LAB else 200
    kept = table.add_many(np.arange(n, dtype=np.uint64) * np.uint64(64 * PAGE), np.full(n, PAGE, np.uint64))
    always = np.arange(n, dtype=np.uint64) * np.uint64(64 * PAGE)
    stop = threading.Event()
    wrong: list[object] = []

    def change(own: int) -> None:
        for turn in range(10):
            for i in range(n):
                start = (64 * i + 2 + 20 * own) * PAGE
                number = table.add(start, 10 * PAGE)
                if table.dispatch(start + 5 * PAGE) != (number, 5 * PAGE):
                    wrong.append(("lost", own, turn, i))
            first = (1 << 40) + own * (1 << 30)
            starts = [first + 2 * k * PAGE for k in range(50)]
            ids = table.add_many(starts, [PAGE] * len(starts))
            if table.lookup(starts).tolist() != ids.tolist():
                wrong.append(("lost many", own, turn))
            held = table.remove(first, 100 * PAGE)
            for i in range(n):
                held += table.remove((64 * i + 2 + 20 * own) * PAGE, 10 * PAGE)
            if held != (50 + 10 * n) * PAGE:
                wrong.append(("held", own, turn, held))

    def look() -> None:
        while not stop.is_set():
            if (table.lookup(always) != kept).any() or len(table.ranges()) < n:
                wrong.append("lookup")

    looking = threading.Thread(target=look)
    changing = [threading.Thread(target=change, args=(own,)) for own in range(2)]
    for thread in (looking, *changing):
        thread.start()
    for thread in changing:
        thread.join()
    stop.set()
    looking.join()
    assert not wrong
    assert table.ranges()["start"].tolist() == always.tolist()


def test_a_table_gives_its_memory_back(child: Child) -> None:
    """What is mapped for 10^5 ranges goes with the table; a table of few ranges has little mapped."""
    done = child("""
        def mapped():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[0]) * mmap.PAGESIZE

        def one(n):
            before = mapped()
            table = uf.RegionTable()
            for i in range(n):
                table.add(2 * i * PAGE, PAGE)
            full = mapped() - before
            # What was removed is used again.
            for i in range(n):
                table.remove(2 * i * PAGE, PAGE)
                table.add(2 * i * PAGE, PAGE)
            assert mapped() - before < 1.3 * full + (1 << 20), (full, mapped() - before)
            return full

        one(100_000)
        before = mapped()
        sizes = [one(100_000) for _ in range(2)]
        assert min(sizes) > 4 << 20, sizes
        assert mapped() <= before, (before, mapped())

        tables = [uf.RegionTable() for _ in range(1000)]
        for table in tables:
            for _ in range(20):
                table.add(PAGE, PAGE)
                table.remove(PAGE, PAGE)
            table.add(PAGE, PAGE)
        assert mapped() - before < 1000 * 20480, mapped() - before
        del table, tables
        assert mapped() - before < 1 << 20, mapped() - before
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


def test_a_fork_child_has_tables_of_its_own(child: Child) -> None:
    """A child drops one and changes another while a thread of its parent changes both: neither sees it."""
    done = child("""
        kept, dropped = uf.RegionTable(), uf.RegionTable()
        for table in (kept, dropped):
            table.add_many([4 * i * PAGE for i in range(5000)], [PAGE] * 5000)
        stop = threading.Event()

        def change():
            while not stop.is_set():
                for table in (kept, dropped):
                    table.add(2 * PAGE, PAGE)
                    table.remove(2 * PAGE, PAGE)

        thread = threading.Thread(target=change)
        thread.start()
        for turn in range(5):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    del dropped, table
                    gc.collect()
                    for i in range(1000):
                        kept.add((4 * i + 3) * PAGE, PAGE)
                        assert kept.remove(4 * i * PAGE, PAGE) == PAGE
                    assert kept.lookup(3 * PAGE) >= 5000 and kept.lookup(0) == -1
                    assert kept.lookup(4 * 4999 * PAGE) == 4999
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0)[1] == 0, turn
        stop.set()
        thread.join()
        for table in (kept, dropped):
            assert table.ranges()["id"].tolist() == list(range(5000))
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


def test_a_table_out_of_mappings_loses_nothing(child: Child) -> None:
    done = child("""
        import resource
        table = uf.RegionTable()
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * mmap.PAGESIZE
        unlimited = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (8 << 20), unlimited[1]))
        n, refused = 0, []
        try:
            while n < 10**6:
                table.add(2 * n * PAGE, PAGE)
                n += 1
        except MemoryError:
            refused.append("add")
        try:
            table.add_many([(1 << 40) + 2 * i * PAGE for i in range(20_000)], [PAGE] * 20_000)
        except MemoryError:
            refused.append("add_many")
        try:
            tables = [uf.RegionTable() for _ in range(1000)]
        except MemoryError:
            refused.append("RegionTable")
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        assert refused == ["add", "add_many", "RegionTable"], refused
        assert len(table) == n > 10_000
        assert table.ranges()["start"].tolist() == [2 * i * PAGE for i in range(n)]
        assert table.add(2 * n * PAGE, PAGE) == n
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr
