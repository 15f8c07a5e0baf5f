"""Any bytes of a source that is asked for whole chunks: its calls, threads, errors."""

from __future__ import annotations

import errno
import gc
import itertools
import pickle
import re
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import PAGE
from userfault import SourceError, chunks
from userfault.chunks import Cache, Chunked

SOON = 30  # seconds that nothing here takes


class Store:
    """Bytes, and a record of the calls."""

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(np.random.default_rng(7).bytes(nbytes))
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> int | None:
        self.reads.append((offset, len(buffer)))
        buffer[:] = self.data[offset : offset + len(buffer)]
        return len(buffer)

    def write_from(self, offset: int, buffer: memoryview) -> None:
        self.writes.append((offset, len(buffer)))
        self.data[offset : offset + len(buffer)] = buffer


class Answering:
    """A source that does as it is told."""

    def __init__(self, answer: Callable[[int, memoryview], Any]) -> None:
        self.calls = 0
        self.answer = answer

    def read_into(self, offset: int, buffer: memoryview) -> Any:
        self.calls += 1
        return self.answer(offset, buffer)

    write_from = read_into


class BrokenError(Exception):
    """An exception that can be referred to weakly."""


def read(chunked: Chunked, offset: int, length: int) -> bytes:
    """What is read. Nothing around the buffer may change, and no view of it may be left."""
    memory = bytearray(b"\xee" * (length + 64))
    with memoryview(memory) as whole, whole[32 : 32 + length] as buffer:
        chunked.read(offset, buffer)
    found = bytes(memory[32:-32])
    assert memory[:32] == memory[-32:] == b"\xee" * 32
    memory.clear()  # BufferError where a view is left
    return found


def start(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call it in a thread that a failing test does not wait for."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def asked(cache: Cache[Any], key: int) -> int:
    """Bytes of a value that is being loaded, that threads wait for."""
    return cache._loading[key].used if key in cache._loading else 0


def there(cache: Cache[Any], key: int) -> bool:
    return cache.first([key]) is not None


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@st.composite
def sessions(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[bool, int, int]]]:
    nbytes = draw(st.integers(1, 60_000))
    chunk_bytes = draw(
        st.sampled_from([1, 7, 512, 1000, PAGE, 5000, 2 * PAGE, 100_000]) | st.integers(1, 20_000)
    )
    cache_bytes = draw(st.sampled_from([0, PAGE, 15_000, 1 << 20]))
    bounds = st.integers(0, nbytes) | st.integers(0, nbytes // PAGE).map(lambda page: page * PAGE)
    operations = st.tuples(st.booleans(), bounds, bounds).map(lambda o: (o[0], *sorted(o[1:])))
    return nbytes, chunk_bytes, cache_bytes, draw(st.lists(operations, max_size=12))


@given(sessions())
def test_any_bytes_from_whole_chunks(session: tuple[int, int, int, list[tuple[bool, int, int]]]) -> None:
    nbytes, chunk_bytes, cache_bytes, operations = session
    store = Store(nbytes)
    expected = bytearray(store.data)
    chunked = Chunked(store, nbytes, chunk_bytes, cache_bytes)
    for turn, (writes, begin, end) in enumerate(operations):
        if writes:
            expected[begin:end] = new = bytes([turn + 1]) * (end - begin)
            chunked.write(begin, memoryview(new))
            assert store.writes.pop() == (begin, end - begin)
        else:
            assert read(chunked, begin, end - begin) == expected[begin:end]
        assert chunked._cache._nbytes <= cache_bytes
    assert store.data == expected
    for offset, length in store.reads:
        assert length > 0
        assert offset % chunk_bytes == 0
        assert length % chunk_bytes == 0 or offset + length == nbytes


@pytest.mark.parametrize("chunk_bytes", [PAGE, 5000, 3 * PAGE, 40_000, 1 << 20])
def test_page_by_page_each_chunk_is_read_once(chunk_bytes: int) -> None:
    store = Store(30 * PAGE + 5)
    chunked = Chunked(store, len(store.data), chunk_bytes, 1 << 20)
    for offset in range(0, len(store.data), PAGE):
        length = min(PAGE, len(store.data) - offset)
        assert read(chunked, offset, length) == store.data[offset : offset + length]
    assert store.reads == [
        (offset, min(chunk_bytes, len(store.data) - offset))
        for offset in range(0, len(store.data), chunk_bytes)
    ]
    assert not chunked._cache._kept  # all was used
    assert chunked._cache._nbytes == 0


def test_whole_neighbours_are_read_by_one_call_into_the_buffer() -> None:
    places: list[tuple[int, int, int]] = []

    def answer(offset: int, buffer: memoryview) -> None:
        places.append((offset, len(buffer), np.frombuffer(buffer, np.uint8).ctypes.data))

    chunked = Chunked(Answering(answer), 1 << 20, 10_000, 1 << 20)
    memory = np.empty(95_000, np.uint8)
    chunked.read(5_000, memory.data)
    # Its first chunk is a part of one. The rest, to the end of the buffer, is whole.
    assert [place[:2] for place in places] == [(0, 10_000), (10_000, 90_000)]
    assert places[1][2] == memory.ctypes.data + 5_000
    # What is in the cache parts them; its last bytes are used, and it goes.
    places.clear()
    chunked.read(35_000, memory[:1].data)
    chunked.read(20_000, memory[:30_000].data)
    assert [place[:2] for place in places] == [(30_000, 10_000), (20_000, 10_000), (40_000, 10_000)]
    assert list(chunked._cache._kept) == [0]
    # The last chunk is whole where the source ends.
    places.clear()
    chunked.read((1 << 20) - 18_576, memory[:18_576].data)
    assert places == [(1_030_000, 18_576, memory.ctypes.data)]


def test_small_chunks_are_read_several_at_a_time() -> None:
    store = Store(3 * PAGE)
    chunked = Chunked(store, 3 * PAGE, 1000, 1 << 20)
    assert read(chunked, PAGE, PAGE) == store.data[PAGE : 2 * PAGE]
    assert store.reads == [(0, 5000), (5000, 5000)]
    with pytest.raises(ValueError, match="at least 1"):
        Chunked(store, 3 * PAGE, 0, 1 << 20)


@pytest.mark.parametrize(("offset", "length"), [(0, PAGE + 1), (PAGE, 1), (-1, 1), (PAGE + 1, 0)])
def test_bytes_outside_the_source_do_not_reach_it(offset: int, length: int) -> None:
    source = Answering(lambda offset, buffer: None)
    chunked = Chunked(source, PAGE, PAGE, 0)
    for method in (chunked.read, chunked.write):
        error = start(method, offset, memoryview(bytearray(length))).exception(SOON)
        assert type(error) is ValueError
        assert f"not within the source's {PAGE}" in str(error)
    assert source.calls == 0


def test_the_cache_keeps_what_was_asked_for_last() -> None:
    cache: Cache[memoryview] = Cache(30)
    loads: list[int] = []

    def get(key: int, size: int = 10, used: int = 1) -> memoryview:
        return cache.get(key, lambda: (loads.append(key), memoryview(bytes(size)))[1], used)

    for key in (1, 2, 3, 1, 4, 1, 2):
        assert get(key).nbytes == 10
    assert loads == [1, 2, 3, 4, 2]
    assert [there(cache, key) for key in (1, 2, 3, 4)] == [True, True, False, True]
    # One that is too large drives nobody out.
    assert get(5, 31).nbytes == 31
    assert not there(cache, 5)
    assert cache._nbytes == 30
    get(6, 20)
    assert list(cache._kept) == [2, 6]


def test_what_was_used_up_is_let_go_of() -> None:
    cache: Cache[np.ndarray] = Cache(1 << 20)
    value = cache.get(1, lambda: np.zeros(100, np.uint8), 60)
    alive = weakref.ref(value)
    assert cache.get(1, lambda: pytest.fail("it is there"), 39) is value
    assert there(cache, 1)
    assert cache.get(1, lambda: pytest.fail("it is there"), 1) is value
    with no_collector():
        del value
        assert alive() is None
    cache.get(2, lambda: np.zeros(100, np.uint8), 100)
    assert not there(cache, 2)
    assert cache._nbytes == 0


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_threads_that_ask_for_pages_of_one_chunk_share_it(cache_bytes: int) -> None:
    pages, n_threads = 64, 8
    store = Store(pages * PAGE)
    go_on = threading.Event()

    class Slow(Store):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            assert go_on.wait(SOON)
            store.read_into(offset, buffer)

    chunked = Chunked(Slow(0), pages * PAGE, 8 * PAGE, cache_bytes)
    for chunk in range(pages // 8):
        go_on.clear()
        offsets = [(chunk * 8 + thread) * PAGE for thread in range(n_threads)]
        found = [start(read, chunked, offset, PAGE) for offset in offsets]
        until(lambda chunk=chunk: asked(chunked._cache, chunk) == n_threads * PAGE)
        go_on.set()
        for offset, future in zip(offsets, found, strict=True):
            assert future.result(SOON) == store.data[offset : offset + PAGE]
    assert store.reads == [(chunk * 8 * PAGE, 8 * PAGE) for chunk in range(pages // 8)]
    assert not chunked._cache._kept


def test_a_chunk_that_is_being_read_is_not_read_with_its_neighbours() -> None:
    store = Store(12 * PAGE)
    go_on = threading.Event()

    def answer(offset: int, buffer: memoryview) -> None:
        store.read_into(offset, buffer)
        assert go_on.wait(SOON)

    chunked = Chunked(Answering(answer), 12 * PAGE, 4 * PAGE, 1 << 20)
    page = start(read, chunked, 4 * PAGE, PAGE)
    until(lambda: asked(chunked._cache, 1))
    everything = start(read, chunked, 0, 12 * PAGE)
    until(lambda: len(store.reads) == 2)
    go_on.set()
    assert page.result(SOON) == store.data[4 * PAGE : 5 * PAGE]
    assert everything.result(SOON) == store.data
    assert store.reads == [(page * PAGE, 4 * PAGE) for page in (4, 0, 8)]


def test_threads_at_random() -> None:
    """Without writes and without letting go: a chunk twice would be a race."""
    store = Store(300 * PAGE + 9)
    chunked = Chunked(store, len(store.data), 5000, 1 << 30)
    order = np.random.default_rng(3).permutation(301).tolist()
    turn = threading.Barrier(8)

    def run(mine: list[int]) -> None:
        turn.wait(SOON)
        for page in mine:
            length = min(PAGE, len(store.data) - page * PAGE)
            assert read(chunked, page * PAGE, length) == store.data[page * PAGE : page * PAGE + length]

    for future in [start(run, order[thread::8]) for thread in range(8)]:
        future.result(SOON)
    assert sorted(store.reads) == [
        (o, min(5000, len(store.data) - o)) for o in range(0, len(store.data), 5000)
    ]
    assert not chunked._cache._kept
    assert not chunked._cache._loading


def test_reads_of_different_chunks_run_together() -> None:
    together = threading.Barrier(4)
    chunked = Chunked(Answering(lambda offset, buffer: (together.wait(SOON), None)[1]), 4 * PAGE, PAGE, 0)
    for future in [start(read, chunked, page * PAGE, PAGE) for page in range(4)]:
        future.result(SOON)


def test_a_load_that_was_dropped_serves_only_those_who_wait() -> None:
    cache: Cache[memoryview] = Cache(1 << 20)
    values = [memoryview(b"old bytes"), memoryview(b"new bytes")]
    events = [threading.Event(), threading.Event()]

    def load(turn: int) -> memoryview:
        assert events[turn].wait(SOON)
        return values[turn]

    early = [start(cache.get, 1, lambda: load(0), 1) for _ in range(2)]
    until(lambda: asked(cache, 1) == 2)
    cache.drop(1)
    assert not there(cache, 1)
    late = [start(cache.get, 1, lambda: load(1), 1) for _ in range(2)]
    until(lambda: asked(cache, 1) == 2)
    events[0].set()
    assert [future.result(SOON) for future in early] == [values[0]] * 2
    assert asked(cache, 1) == 2  # the old one's end is not the new one's
    events[1].set()
    assert [future.result(SOON) for future in late] == [values[1]] * 2
    assert cache.get(1, lambda: pytest.fail("it is there"), 1) is values[1]
    cache.drop(1)
    cache.drop(1)
    assert not there(cache, 1)
    assert cache._nbytes == 0


def test_an_exception_reaches_all_who_wait_and_is_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    cache: Cache[memoryview] = Cache(100)
    calls = []

    def fail() -> memoryview:
        calls.append(go_on.wait(SOON))
        raise BrokenError("no such chunk")

    monkeypatch.setattr(chunks, "FAILED_SECONDS", 1000)
    found = [start(cache.get, 1, fail, 1) for _ in range(8)]
    until(lambda: asked(cache, 1) == 8)
    go_on.set()
    errors = {future.exception(SOON) for future in found}
    assert len(errors) == 1
    depths = set()
    for _ in range(20):
        with pytest.raises(BrokenError, match="no such chunk") as caught:
            cache.get(1, fail, 1)
        depths.add(len(traceback.extract_tb(caught.value.__traceback__)))
        assert any(frame.name == "fail" for frame in caught.traceback)
    assert len(depths) == 1  # it does not grow
    assert there(cache, 1)
    assert len(calls) == 1
    cache.drop(1)
    assert cache.get(1, lambda: memoryview(b"well"), 1) == b"well"

    monkeypatch.setattr(chunks, "FAILED_SECONDS", 0)
    for _ in range(2):
        with pytest.raises(BrokenError):
            cache.get(2, fail, 1)
    assert len(calls) == 3
    assert cache.get(2, lambda: memoryview(b"well"), 1) == b"well"
    assert not cache._failed


def test_an_exception_is_let_go_of_without_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "FAILED_SECONDS", 1000)
    made: list[weakref.ref[BaseException]] = []

    def fail(offset: int, buffer: memoryview) -> None:
        error = BrokenError()
        made.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    chunked = Chunked(Answering(fail), 8 * PAGE, 4 * PAGE, 1 << 20)
    with no_collector():
        for _ in range(3):
            with suppress(BrokenError):
                chunked.read(PAGE, memoryview(bytearray(PAGE)))
        assert len(made) == 1
        assert made[0]() is not None
        next(iter(chunked._cache._failed.values())).until = 0
        assert not there(chunked._cache, 5)  # whoever asks for any finds what is over
        assert made[0]() is None


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, StopIteration, GeneratorExit, OSError])
def test_whatever_the_source_raises_comes_out_and_nothing_stays_locked(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "FAILED_SECONDS", 0)
    store = Store(8 * PAGE)
    broken = True

    def answer(offset: int, buffer: memoryview) -> None:
        array = np.frombuffer(buffer, np.uint8)
        if broken:
            raise kind(array[0])
        del array
        store.read_into(offset, buffer)

    chunked = Chunked(Answering(answer), 8 * PAGE, 4 * PAGE, 1 << 20)
    for length in (PAGE, 8 * PAGE, PAGE, 8 * PAGE):
        memory = bytearray(length)
        for method in (chunked.read, chunked.read, chunked.write):
            assert type(start(method, 0, memoryview(memory)).exception(SOON)) is kind
    broken = False
    chunked._source = store
    found = start(lambda: (chunked.write(3, memoryview(b"new")), read(chunked, 0, 8 * PAGE))[1])
    assert found.result(SOON) == store.data
    assert store.data[3:6] == b"new"


@pytest.mark.parametrize("length", [PAGE, 4 * PAGE])
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (4 * PAGE + 1, "returned 16385 for 16384 bytes"),
        (-1, "returned -1 for"),
        (-4 * PAGE, "returned -16384 for"),
        ("all", "returned 'all' for"),
        (4.0 * PAGE, "returned 16384.0 for"),
    ],
)
def test_wrong_answers(answer: object, says: str, length: int) -> None:
    chunked = Chunked(Answering(lambda offset, buffer: answer), 8 * PAGE, 4 * PAGE, 1 << 20)
    with pytest.raises(SourceError, match=re.escape(f"Answering.read_into {says}")):
        chunked.read(4 * PAGE, memoryview(bytearray(length)))
    with pytest.raises(SourceError, match=re.escape(f"Answering.write_from {says}")):
        chunked.write(4 * PAGE, memoryview(bytearray(4 * PAGE)))


@pytest.mark.parametrize("length", [PAGE, 4 * PAGE])
@pytest.mark.parametrize("done", [0, 1, 4 * PAGE - 1, np.int64(77), False])
def test_short_answers(done: int, length: int) -> None:
    chunked = Chunked(Answering(lambda offset, buffer: done), 8 * PAGE, 4 * PAGE, 1 << 20)
    says = f"came up short: {int(done)} of 16384 bytes from 16384"
    with pytest.raises(OSError, match=says) as caught:
        chunked.read(4 * PAGE, memoryview(bytearray(length)))
    assert caught.value.errno == errno.ENODATA
    with pytest.raises(OSError, match=says) as caught:
        chunked.write(4 * PAGE, memoryview(bytearray(4 * PAGE)))
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("answer", [None, 4 * PAGE, np.int64(4 * PAGE)])
def test_right_answers(answer: object) -> None:
    chunked = Chunked(Answering(lambda offset, buffer: answer), 8 * PAGE, 4 * PAGE, 1 << 20)
    chunked.read(0, memoryview(bytearray(5 * PAGE)))
    chunked.write(0, memoryview(bytearray(4 * PAGE)))


@pytest.mark.parametrize(
    "keep",
    [
        lambda buffer: np.frombuffer(buffer, np.uint8),
        lambda buffer: np.frombuffer(buffer, np.uint8)[7:].view("u1"),
        lambda buffer: buffer[1:2],
        pickle.PickleBuffer,
    ],
    ids=["array", "view", "slice", "export"],
)
@pytest.mark.parametrize("length", [PAGE, 4 * PAGE])
def test_a_source_may_not_keep_its_buffer(
    length: int, keep: Callable[[memoryview], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "KEPT_SECONDS", 0.01)
    kept: list[object] = []
    source = Answering(lambda offset, buffer: kept.append(keep(buffer)))
    chunked = Chunked(source, 4 * PAGE, 4 * PAGE, 0)
    with pytest.raises(SourceError, match=r"Answering\.read_into keeps its buffer"):
        chunked.read(0, memoryview(bytearray(length)))
    with pytest.raises(SourceError, match=r"Answering\.write_from keeps its buffer"):
        chunked.write(0, memoryview(bytearray(length)))


def test_a_source_may_keep_the_view_itself_which_is_dead() -> None:
    kept: list[memoryview] = []
    chunked = Chunked(Answering(lambda offset, buffer: kept.append(buffer)), PAGE, PAGE, 0)
    chunked.read(0, memoryview(bytearray(PAGE)))
    with pytest.raises(ValueError, match="released"):
        kept[0][0] = 1


def test_a_source_may_let_go_of_its_buffer_a_little_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of a pool, and exceptions that are kept in a variable, still hold pieces of it."""
    monkeypatch.setattr(chunks, "KEPT_SECONDS", SOON)
    store = Store(16 * PAGE)

    def piece(offset: int, buffer: memoryview) -> None:
        try:
            raise BrokenError
        except BrokenError as caught:
            error = caught  # noqa: F841 (a cycle: it refers to this frame)
        store.read_into(offset, buffer)

    with ThreadPoolExecutor(2) as pool:

        def answer(offset: int, buffer: memoryview) -> int:
            offsets = range(0, len(buffer), PAGE)
            list(pool.map(lambda at: piece(offset + at, buffer[at : at + PAGE]), offsets))
            return len(buffer)

        chunked = Chunked(Answering(answer), 16 * PAGE, 4 * PAGE, 0)
        with no_collector():
            for _ in range(10):
                assert read(chunked, 0, 16 * PAGE) == store.data


def test_a_source_may_release_its_buffer_and_not_change_what_it_writes() -> None:
    def answer(offset: int, buffer: memoryview) -> int:
        readonly.append(buffer.readonly)
        with buffer:
            return len(buffer)

    readonly: list[bool] = []
    chunked = Chunked(Answering(answer), 4 * PAGE, PAGE, 0)
    assert len(read(chunked, 10, 3 * PAGE)) == 3 * PAGE
    chunked.write(10, memoryview(bytearray(PAGE)))
    assert readonly == [False, False, False, True]


def test_a_write_is_alone_and_reads_are_not() -> None:
    """Two threads write one number after the other; each must be there when the write has returned."""
    n_pages, seconds = 8, 0.4
    data = bytearray(n_pages * PAGE)
    lock = threading.Lock()
    reading = writing = 0
    overlaps: list[str] = []

    class Source:
        def read_into(self, offset: int, buffer: memoryview) -> None:
            nonlocal reading
            with lock:
                reading += 1
                if writing:
                    overlaps.append("a read in a write")
            buffer[:] = data[offset : offset + len(buffer)]
            time.sleep(0.0002)
            with lock:
                reading -= 1

        def write_from(self, offset: int, buffer: memoryview) -> None:
            self.change(offset, bytes(buffer))

        def flush(self) -> None:
            self.change(0, b"")

        def change(self, offset: int, new: bytes) -> None:
            nonlocal writing
            with lock:
                writing += 1
                if reading or writing > 1:
                    overlaps.append(f"a write in {reading} reads, {writing - 1} writes")
            time.sleep(0.0002)
            data[offset : offset + len(new)] = new
            with lock:
                writing -= 1

    chunked = Chunked(Source(), len(data), 4 * PAGE, 1 << 20)
    ends = time.monotonic() + seconds
    written = [0] * n_pages

    def turns() -> Iterator[int]:
        return itertools.takewhile(lambda turn: turn < 20 or time.monotonic() < ends, itertools.count(1))

    def reads(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in turns():
            page = int(random.integers(n_pages))
            least = written[page]
            assert int.from_bytes(read(chunked, page * PAGE, PAGE)[:8], "little") >= least

    def writes(parity: int) -> None:
        for turn in turns():
            page = turn * 2 % n_pages + parity
            chunked.write(page * PAGE, memoryview(turn.to_bytes(8, "little") * (PAGE // 8)))
            written[page] = turn
            chunked.flush()

    threads = [start(reads, seed) for seed in range(4)] + [start(writes, parity) for parity in range(2)]
    for future in threads:
        future.result(SOON)
    assert overlaps == []


def test_a_write_that_waits_goes_before_reads_that_come_later() -> None:
    """And what was asked for while it ran is read after it."""
    store = Store(8 * PAGE)
    events = {name: threading.Event() for name in ("reading", "go on")}
    order: list[str] = []

    def answer(offset: int, buffer: memoryview) -> None:
        if not buffer.readonly:
            order.append(f"read {offset // PAGE}")
            if offset == 0:
                events["reading"].set()
                assert events["go on"].wait(SOON)
            store.read_into(offset, buffer)
        else:
            order.append("write")
            store.write_from(offset, buffer)

    chunked = Chunked(Answering(answer), 8 * PAGE, 4 * PAGE, 1 << 20)
    first = start(read, chunked, 0, PAGE)
    assert events["reading"].wait(SOON)
    write = start(chunked.write, 4 * PAGE, memoryview(b"\x07" * PAGE))
    until(chunked._gate._door.locked)
    later = start(read, chunked, 4 * PAGE, PAGE)
    until(lambda: asked(chunked._cache, 1))
    events["go on"].set()
    first.result(SOON)
    write.result(SOON)
    assert later.result(SOON) == b"\x07" * PAGE
    assert order == ["read 0", "write", "read 4"]


@pytest.mark.parametrize("cached", [False, True])
def test_what_was_read_before_a_write_is_not_kept_after_it(cached: bool) -> None:
    """Also where the read's call is over, and its chunk not yet in the cache."""
    store = Store(4 * PAGE)
    called, go_on = threading.Event(), threading.Event()
    chunked = Chunked(store, 4 * PAGE, 4 * PAGE, 1 << 20)
    read_chunk = chunked._chunk

    def late(offset: int) -> Any:
        chunk = read_chunk(offset)
        called.set()
        assert go_on.wait(SOON)
        return chunk

    chunked._chunk = late  # type: ignore[method-assign]
    if cached:
        go_on.set()
    before = bytes(store.data)
    early = start(read, chunked, 0, PAGE)
    assert called.wait(SOON)
    if cached:
        assert early.result(SOON) == before[:PAGE]
    start(chunked.write, 0, memoryview(b"\x07" * 2 * PAGE)).result(SOON)
    go_on.set()
    assert read(chunked, PAGE, PAGE) == b"\x07" * PAGE
    assert early.result(SOON) == before[:PAGE]
    assert read(chunked, PAGE, PAGE) == b"\x07" * PAGE
    assert len(store.reads) == 2


def test_what_was_read_just_before_a_write_began_is_not_kept_after_it() -> None:
    store = Store(4 * PAGE)
    chunked = Chunked(store, 4 * PAGE, 4 * PAGE, 1 << 20)
    enter = chunked._gate.write

    @contextmanager
    def write() -> Iterator[None]:
        read(chunked, 0, PAGE)
        with enter():
            yield

    chunked._gate.write = write  # type: ignore[method-assign]
    chunked.write(0, memoryview(b"\x07" * PAGE))
    assert read(chunked, 0, PAGE) == b"\x07" * PAGE


def test_flush_is_the_sources_own() -> None:
    calls: list[str] = []

    class Flushed(Store):
        def flush(self) -> None:
            calls.append("flush")

    Chunked(Store(1), 1, 1, 0).flush()
    Chunked(Flushed(1), 1, 1, 0).flush()
    assert calls == ["flush"]
