"""What a lazy array has in common with numpy.memmap, and with every other ndarray over the same bytes."""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import os
import pickle
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import userfault as uf
from support import PAGE, Child, needs
from userfault import procmaps
from userfault.sources import Buffer, Constant, File, Native, Pattern, Source, Zero

pytestmark = pytest.mark.usefixtures("needs_uffd")
writes = needs(uf.Feature.PAGEFAULT_FLAG_WP)  # modes "c" and "r+"

N = 40
SIZE = N * PAGE + 1234
DATA = np.random.default_rng(0).integers(1, 256, SIZE, dtype=np.uint8)
DTYPES: tuple[Any, ...] = (
    *("u1", "?", "<i2", ">i4", "<f8", ">c16", "S7", "U3", "V5000", "M8[ns]"),
    np.dtype([("tag", "u1"), ("value", ">f4"), ("place", "<i2", (3,))]),
    np.dtype([("x", "<f8"), ("y", "<i4")], align=True),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of DATA, which is not whole pages."""
    file = tmp_path / "data"
    file.write_bytes(DATA.tobytes())
    return file


def regions() -> int:
    """How many there are, of all the lazy arrays of this process."""
    gc.collect()
    return len(uf.lazy_array(Zero(), 0)._lazy()._service._userfaultfd.regions)


def untouched(array: uf.LazyArray) -> bool:
    return int(array.stats()["pages"]) == 0


def came(array: uf.LazyArray, n: int) -> bool:
    """Whether n pages have come, all in all. A thread is awake a moment before its page is counted."""
    deadline = time.monotonic() + 10
    while int(array.stats()["pages"]) != n and time.monotonic() < deadline:
        time.sleep(0.001)
    return int(array.stats()["pages"]) == n


def same(array: npt.NDArray[Any], expected: npt.NDArray[Any]) -> bool:
    """Shape, type and every byte, in the same order in memory."""
    alike = (array.shape, array.strides, array.dtype) == (expected.shape, expected.strides, expected.dtype)
    return alike and array.tobytes("A") == expected.tobytes("A")


# -- layout ----------------------------------------------------------------------------------------------


@given(st.data())
def test_any_layout_of_the_same_bytes(data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    offset = data.draw(st.sampled_from((0, 1, 100, PAGE, PAGE + 3, 5 * PAGE, 17 * PAGE - 1)))
    left = (SIZE - offset) // dtype.itemsize
    shape: list[int] = []
    for _ in range(data.draw(st.integers(0, 3))):
        most = left // max(1, math.prod(shape))
        shape.append(data.draw(st.integers(0, most) | st.just(most)))
    order = data.draw(st.sampled_from("CF"))
    mode = data.draw(st.sampled_from("rc"))
    array = uf.lazy_array(
        Buffer(DATA),
        tuple(shape),
        dtype,
        order,
        mode=mode,
        offset=offset,
        page_bytes=PAGE * data.draw(st.sampled_from((1, 2, 16, 64))),
        readahead=data.draw(st.sampled_from(("adaptive", 0, 3))),
    )
    expected: npt.NDArray[Any] = np.ndarray(shape, dtype, DATA, offset, order=order)
    assert type(array) is uf.LazyArray
    assert untouched(array)
    for flag in ("C_CONTIGUOUS", "F_CONTIGUOUS", "OWNDATA"):
        assert array.flags[flag] == expected.flags[flag]
    assert array.flags.writeable == (mode == "c")
    assert same(array, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [7, (7,), (2, 3), (), (0,), (3, 0, 2), [2, 2], np.int64(3), (np.int8(2), 1)]
)
def test_shapes_as_numpy_memmap_has_them(path: Path, dtype: Any, shape: Any) -> None:
    for order in ("C", "F"):
        array = uf.lazy_array(path, shape, dtype, order, offset=10)
        size = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
        assert same(array, np.ndarray(size, dtype, DATA, 10, order=order))
        if array.size:
            assert same(array, np.memmap(path, dtype, "r", 10, size, order))


@pytest.mark.parametrize(("dtype", "offset"), [("u1", 0), ("u1", SIZE), ("<u2", 2 * PAGE), (">u4", 174)])
def test_without_a_shape_it_is_all_that_the_source_has(path: Path, dtype: str, offset: int) -> None:
    array = uf.lazy_array(path, dtype=dtype, offset=offset)
    assert same(array, np.frombuffer(DATA[offset:], dtype))


def test_a_source_without_end_needs_a_shape() -> None:
    for source in (Zero(), Constant(1), Pattern()):
        with pytest.raises(ValueError, match="give a shape"):
            uf.lazy_array(source)


def test_an_endless_source_far_along() -> None:
    array = uf.lazy_array(Pattern(5), 3 * PAGE, offset=(1 << 40) + 9)
    assert (array == Pattern(5).expected((1 << 40) + 9, 3 * PAGE)).all()


def test_larger_than_memory() -> None:
    """Only what is touched comes."""
    array = uf.lazy_array(Pattern(1), (1 << 14, 1 << 25), readahead=0)
    assert array.nbytes == 1 << 39
    for row, column in ((0, 0), (1 << 13, 12345), ((1 << 14) - 1, (1 << 25) - 1)):
        assert array[row, column] == Pattern(1).expected((row << 25) + column, 1)[0]
    assert came(array, 3)


def test_the_last_page_ends_with_the_source(path: Path) -> None:
    for unit in (1, 4, 64):
        array = uf.lazy_array(path, page_bytes=unit * PAGE)
        assert array[-1] == DATA[-1]
        assert (array[-PAGE:] == DATA[-PAGE:]).all()
        assert array.shape == (SIZE,)


@pytest.mark.parametrize("offset", [0, 1, 7 * PAGE, 9 * PAGE + 5])
def test_page_bytes_count_from_the_sources_first_byte(path: Path, offset: int) -> None:
    array = uf.lazy_array(path, offset=offset, page_bytes=8 * PAGE, readahead=0)
    assert array[0] == DATA[offset]
    unit = offset // (8 * PAGE)
    # What is there is the unit of the source that the first element lies in, from that element on.
    there = np.arange(offset // PAGE, -(-SIZE // PAGE)) // 8 == unit
    assert array.resident.tolist() == there.tolist()
    assert (array == DATA[offset:]).all()


# -- modes -----------------------------------------------------------------------------------------------


def test_mode_r_cannot_be_made_writeable(path: Path) -> None:
    array = uf.lazy_array(path)
    structured = uf.lazy_array(path, 10, [("a", "u1"), ("b", "<i4")])
    views = (array, array[5:], array.view(np.ndarray), np.asarray(array), array.T, structured["b"])
    for view in views:
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.setflags(write=True)
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True
    for view in views[:-1]:
        assert memoryview(view).readonly
        with pytest.raises(TypeError, match=r"readonly|read-only|not writable"):
            ctypes.c_char.from_buffer(view)
        assert not np.frombuffer(view, np.uint8).flags.writeable
        with open(path, "rb") as file, pytest.raises((TypeError, ValueError, BufferError)):
            file.readinto(view)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read-only"):
        array += 1
    with pytest.raises(ValueError, match="read-only"):
        array.sort()
    assert (array == DATA).all()
    assert not array.dirty.any()


@writes
def test_mode_c_leaves_the_source_alone(path: Path) -> None:
    array, other = uf.lazy_array(path, mode="c"), uf.lazy_array(path, mode="c")
    expected = DATA.copy()
    for changed in (array, expected):
        changed[PAGE - 3 : PAGE + 3] = 0
        changed[10 * PAGE :: 1000] += 1
        changed[:PAGE].sort()
    assert (array == expected).all()
    assert (other == DATA).all()
    array.flush()
    array.close()
    assert path.read_bytes() == DATA.tobytes()


@writes
@pytest.mark.parametrize("end", ["flush", "close", "with", "the last view"])
def test_mode_r_plus_changes_the_source(path: Path, end: str) -> None:
    array = uf.lazy_array(path, (N, 100), "<u2", "F", mode="r+", offset=77)
    expected = DATA.copy()
    for changed in (array, np.ndarray((N, 100), "<u2", expected, 77, order="F")):
        changed[3:5] = 258
        changed[:, -1] ^= 1
    if end == "flush":
        array.flush()
        assert not array.dirty.any()
    elif end == "close":
        array.close()
    elif end == "with":
        with array:
            pass
    else:
        view = array[::2, 1:].T
        del array, changed
        gc.collect()
        assert path.read_bytes() != expected.tobytes()
        del view
        gc.collect()
    assert path.read_bytes() == expected.tobytes()


@writes
def test_modes_and_what_they_are_called(path: Path) -> None:
    for mode in ("r", "c", "r+"):
        array = uf.lazy_array(path, mode=mode)
        assert array.mode == array[3:].mode == mode
        assert array.flags.writeable == (mode != "r")
    for wrong in ("w+", "rw", "w", "", "R", "readonly", "copyonwrite", None):
        with pytest.raises(ValueError, match=r"mode is one of r, c, r\+"):
            uf.lazy_array(path, mode=wrong)  # type: ignore[arg-type]


# -- lifetime --------------------------------------------------------------------------------------------


class Interface:
    """What only knows `__array_interface__`."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


VIEWS: dict[str, Callable[[uf.LazyArray], Any]] = {
    "a slice": lambda array: array[5:],
    "every other one": lambda array: array[::-2],
    "another shape": lambda array: array[: N * PAGE].reshape(N, PAGE).T,
    "another type": lambda array: array[: N * PAGE].view(">u4"),
    "a plain array": lambda array: array.view(np.ndarray),
    "asarray": np.asarray,
    "a memoryview": memoryview,
    "a part of a memoryview": lambda array: memoryview(array)[100:],
    "a memoryview's array": lambda array: np.asarray(memoryview(array)),
    "frombuffer": lambda array: np.frombuffer(array, np.uint8, offset=9),
    "the interface": lambda array: np.asarray(Interface(array)),
    "strides": lambda array: np.lib.stride_tricks.as_strided(array, (N,), (PAGE,)),
    "a window": lambda array: np.lib.stride_tricks.sliding_window_view(array, 10),
    "a broadcast": lambda array: np.broadcast_to(array, (2, SIZE)),
    "an iterator": lambda array: array.flat,
    "a pickle buffer": pickle.PickleBuffer,
    "fields": lambda array: array[: N * PAGE].view([("a", "u1"), ("b", "u1")])["b"],
    "a record array": lambda array: array[: N * PAGE].view([("a", "u1"), ("b", "u1")]).view(np.recarray).b,
    "masked": lambda array: np.ma.masked_array(array, fill_value=0),
    "a closure": lambda array: lambda: array,
    "a cycle": lambda array: (knot := [array], knot.append(knot))[0],  # type: ignore[func-returns-value]
}


def first_byte(view: Any) -> int:
    """Read it, however the view lets one."""
    if callable(view):
        view = view()
    if isinstance(view, list):
        view = view[0]
    if isinstance(view, pickle.PickleBuffer):
        view = view.raw()
    if isinstance(view, np.flatiter | memoryview):
        return int(view[0])
    return int(np.asarray(view).ravel("K").view(np.uint8)[0]) if view.ndim else int(view)


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_keeps_the_memory_and_its_end_takes_it(path: Path, kind: str) -> None:
    before = regions()
    assert first_byte(VIEWS[kind](uf.lazy_array(path))) == first_byte(VIEWS[kind](DATA))
    array = uf.lazy_array(path)
    address = array.__array_interface__["data"][0]
    ends = address, address + array._lazy().n_pages * PAGE
    view = VIEWS[kind](array)
    del array
    assert regions() == before + 1
    assert procmaps.registered(*ends)
    assert first_byte(view) == first_byte(VIEWS[kind](DATA))
    del view
    assert regions() == before
    assert not procmaps.registered(*ends)


def test_what_is_gone_is_unmapped() -> None:
    """And the source is let go of."""
    data = bytearray(64 << 20)
    array = uf.lazy_array(Buffer(data))
    with pytest.raises(BufferError):
        data.append(0)
    ends = (start := array._lazy().start), start + len(data)
    array.materialize()
    (mapped,) = (vma for vma in procmaps.vmas(*ends))
    assert (mapped.start, mapped.end) == ends
    del array
    assert ends not in [(vma.start, vma.end) for vma in procmaps.vmas(*ends)]
    data.append(0)


def test_a_hundred_arrays_leave_nothing_behind(path: Path) -> None:
    def some(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            array = uf.lazy_array(path, mode="r", memory_limit=1 << 20)
            assert array[N * PAGE] == DATA[N * PAGE]
            del array
        counted = regions()
        return counted, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    assert some(5) == some(100)


# -- what is computed ------------------------------------------------------------------------------------


def test_what_is_computed_is_an_ordinary_array(path: Path) -> None:
    array = uf.lazy_array(path, (N, 500), "<u2")
    expected = np.ndarray((N, 500), "<u2", DATA)
    made: dict[str, Callable[[Any], Any]] = {
        "a + 1": lambda a: a + 1,
        "1 + a": lambda a: 1 + a,
        "-a": lambda a: -a,
        "a == a": lambda a: a == a,
        "a + a.T": lambda a: a[:, :N] + a[:, :N].T,
        "sqrt": np.sqrt,
        "divmod": lambda a: np.divmod(a, 7)[1],
        "outer": lambda a: np.multiply.outer(a[0], a[1]),
        "accumulate": lambda a: np.add.accumulate(a, 1),
        "reduceat": lambda a: np.add.reduceat(a[0], [0, 100, 200]),
        "sum of an axis": lambda a: a.sum(axis=0),
        "max of an axis": lambda a: a.max(axis=1),
        "mean": lambda a: np.mean(a, axis=0),
        "cumsum": lambda a: np.asarray(np.cumsum(a)),
        "matmul": lambda a: a[:, :N] @ a[:, :N],
        "an array of indices": lambda a: a[[3, 1, 1]],
        "indices of both": lambda a: a[[3, 1], [0, -1]],
        "a mask": lambda a: a[a > 30_000],
        "a mask of rows": lambda a: a[np.arange(N) % 2 == 0, 3:],
        "where": lambda a: np.where(a > 9, a, 0),
        "concatenate": lambda a: np.concatenate([a, a]),
        "stack": lambda a: np.stack([a, a], axis=-1),
        "sort": lambda a: np.asarray(np.sort(a)),
        "argsort": lambda a: np.asarray(a.argsort()),
        "unique": np.unique,
        "array": np.array,
        "bincount": lambda a: np.bincount(a[0]),
        "an array's own": lambda a: np.arange(500, dtype="<u2") * a,
    }
    for name, make in made.items():
        result, right = make(array), make(expected)
        assert type(result) is np.ndarray, name
        assert not np.may_share_memory(result, array), name
        assert result.dtype == right.dtype, name
        assert (result == right).all(), name
    for scalar in (array.sum(), array[3, 4], np.dot(array[0], array[1]), array.max(), np.median(array)):
        assert isinstance(scalar, np.generic)
    assert array.sum() == expected.sum()


@pytest.mark.parametrize(
    "make", [lambda a: a.copy(), lambda a: a.astype("f4"), copy.copy, copy.deepcopy, lambda a: a.take([1, 2])]
)
def test_a_copy_is_in_memory(path: Path, make: Callable[[Any], Any]) -> None:
    array = uf.lazy_array(path, (N, 500), "<u2")
    copied = make(array)
    assert not np.may_share_memory(copied, array)
    assert copied.flags.writeable
    assert (copied == make(np.ndarray((N, 500), "<u2", DATA))).all()
    assert "lazy" not in repr(copied).lower()
    assert repr(copied) == repr(np.asarray(copied))
    assert (pickle.loads(pickle.dumps(copied)) == copied).all()
    address, before = copied.ctypes.data, regions()
    array.close()
    del array
    assert regions() == before - 1  # a copy holds nothing of it
    copied[:] = 1
    assert copied.ctypes.data == address
    for call in ("materialize", "prefetch", "evict", "flush", "close", "stats"):
        if isinstance(copied, uf.LazyArray):
            with pytest.raises(uf.ClosedError, match="ordinary array in memory"):
                getattr(copied, call)()
    with open(path, "wb") as file:
        copied.tofile(file)
    assert path.read_bytes() == copied.tobytes()


@writes
def test_results_that_are_put_into_it(path: Path) -> None:
    array, expected = uf.lazy_array(path, mode="c"), DATA.copy()
    assert np.add(array, 1, out=array) is array
    expected += 1
    array[: 2 * PAGE] *= 3
    expected[: 2 * PAGE] *= 3
    assert type(array) is uf.LazyArray
    np.cumsum(DATA[:PAGE], out=array[-PAGE:])
    np.cumsum(DATA[:PAGE], out=expected[-PAGE:])
    np.copyto(array[PAGE : 2 * PAGE], 7)
    expected[PAGE : 2 * PAGE] = 7
    np.random.default_rng(3).shuffle(array[:100])
    np.random.default_rng(3).shuffle(expected[:100])
    array[[1, 5000]] = array[array < 10][:2] = 9
    expected[[1, 5000]] = 9
    assert (array == expected).all()


def test_views_are_lazy_and_have_its_methods(path: Path) -> None:
    array = uf.lazy_array(path, readahead=0, memory_limit=1 << 20)
    view = array[: 8 * PAGE].reshape(8, PAGE)[2:4]
    assert type(view) is uf.LazyArray
    assert len(view.resident) == 2
    view.materialize()
    assert np.flatnonzero(array.resident).tolist() == [2, 3]
    assert view.stats() == array.stats()
    assert array[8 * PAGE :].evict() == 0
    assert len(array[: 8 * PAGE : PAGE * 3].resident) == 7
    view.close()
    assert array.closed


def test_an_empty_view_has_its_methods(path: Path) -> None:
    """Whoever goes through an array piece by piece may come to a piece of nothing."""
    array = uf.lazy_array(path, (N, 500), "<u4")
    for view in (array[5:5], array[:, :0].T, array[0:0, ::2]):
        assert type(view) is uf.LazyArray
        view.materialize()
        assert view.evict() == 0
        assert len(view.resident) == 0
        assert pickle.loads(pickle.dumps(view)).shape == view.shape
    assert untouched(array)


def test_it_cannot_be_made_by_its_class() -> None:
    with pytest.raises(TypeError, match="lazy_array"):
        uf.LazyArray((3,), np.uint8)
    # An ordinary array looked at as one is ordinary.
    disguised = np.arange(4).view(uf.LazyArray)
    assert repr(disguised) == repr(np.arange(4))
    with pytest.raises(uf.ClosedError, match="ordinary"):
        disguised.prefetch()


def test_looking_at_its_form_touches_nothing(path: Path) -> None:
    array = uf.lazy_array(path, (N, PAGE))
    views: tuple[Any, ...] = (array, array[3:], array[::-1].T, array.view("<u2"), array[2, 5:9])
    for view in views:
        text = repr(view)
        assert text.startswith("<LazyArray ")
        assert str(view.shape) in text
        assert str(view.dtype) in text
        assert "File(" in text
        _ = view.shape, view.flags, view.strides, view.nbytes, view.resident, view.dirty, view.mode, len(view)
        _ = view.__array_interface__, np.may_share_memory(view, array), memoryview(view).nbytes
    assert untouched(array)
    array.close()
    assert "closed" in repr(array)
    assert "closed" in repr(views[1])


# -- pickling --------------------------------------------------------------------------------------------

RECIPES: dict[str, Callable[[Path], Source]] = {
    "File": File,
    "a part of a File": lambda path: File(path, 1000),
    "Zero": lambda _: Zero(),
    "Constant": lambda _: Constant(77),
    "Pattern": lambda _: Pattern(-3),
}
CUTS: dict[str, Callable[[Any], Any]] = {
    "all": lambda a: a,
    "a slice": lambda a: a[3:9],
    "strides": lambda a: a[::-2, 5::7],
    "transposed": lambda a: a[1:, ::3].T,
    "an element": lambda a: a[4:5, 6:7].reshape(()),
    "other bytes": lambda a: a[2].view(">u8"),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pickle_is_a_recipe(path: Path, recipe: str, cut: str) -> None:
    source = RECIPES[recipe](path)
    whole = uf.lazy_array(source, (N - 1, 500), "<u4", "F" if cut == "all" else "C", offset=123)
    array = CUTS[cut](whole)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps(array, protocol)
        assert len(pickled) < 2000
        again = pickle.loads(pickled)
        assert type(again) is uf.LazyArray
        assert again.ctypes.data != array.ctypes.data or not array.size
        assert untouched(again)
        assert again.flags.writeable == array.flags.writeable
        assert repr(again) == repr(array)
        assert same(again, np.asarray(array))


def test_a_pickle_in_another_process(path: Path, child: Child) -> None:
    array = uf.lazy_array(path, (N, 500), ">u2", page_bytes=4 * PAGE, readahead=0, memory_limit=1 << 20)
    # Out-of-band buffers are not made of it: what is sent is the recipe.
    outside: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps([array, array[::2, 1::3]], 5, buffer_callback=outside.append)
    assert not outside
    done = child(f"""
        import pickle
        whole, part = pickle.loads({pickled!r})
        assert type(whole) is type(part) is uf.LazyArray
        assert whole._lazy().page_bytes == 4 * PAGE and whole._lazy().budget.nbytes == 1 << 20
        expected = np.fromfile({str(path)!r}, ">u2", {N * 500}).reshape({N}, 500)
        assert (whole == expected).all() and (part == expected[::2, 1::3]).all()
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_multiprocessing_takes_it(path: Path, child: Child, method: str) -> None:
    """A pool's arguments are pickled, whichever way its processes are made."""
    done = child(
        f"""
        import multiprocessing, operator
        array = uf.lazy_array({str(path)!r}, ({N}, 500), "<u2")
        with multiprocessing.get_context({method!r}).Pool(2) as pool:
            sums = pool.map(operator.methodcaller("sum"), [array, array[3], array[::2].T])
        assert sums == [array.sum(), array[3].sum(), array[::2].sum()], sums
        print("good")
        """,
        timeout=120,
    )
    assert done.stdout == "good\n", done.stderr


@writes
def test_pickling_writes_changes_back_first(path: Path) -> None:
    array = uf.lazy_array(path, mode="r+")
    array[3 * PAGE] ^= 255
    again = pickle.loads(pickle.dumps(array[1:]))
    assert again.mode == "r+"
    assert not array.dirty.any()
    assert again[3 * PAGE - 1] == array[3 * PAGE]
    assert path.read_bytes() == array.tobytes()


@writes
def test_pickling_refuses_changes_that_nobody_else_has(path: Path) -> None:
    array = uf.lazy_array(path, mode="c")
    again = pickle.loads(pickle.dumps(array))
    assert again.mode == "c"
    assert again.flags.writeable
    array[0] += 1
    with pytest.raises(TypeError, match=r"numpy\.array"):
        pickle.dumps(array)
    assert pickle.loads(pickle.dumps(np.array(array)))[0] == array[0]


def test_pickling_what_is_of_this_process(path: Path) -> None:
    for source in (Buffer(DATA), Native(ctypes.CDLL(None).getpid)):
        array = uf.lazy_array(source, 10)
        with pytest.raises(TypeError, match=f"{type(source).__name__} source .* cannot be pickled"):
            pickle.dumps(array)
    array = uf.lazy_array(path)
    array.close()
    with pytest.raises(uf.ClosedError):
        pickle.dumps(array)


# -- what is refused -------------------------------------------------------------------------------------


def test_arguments_that_are_refused(path: Path, tmp_path: Path) -> None:
    def refuses(
        error: type[Exception], match: str | None, source: Any = path, *rest: Any, **options: Any
    ) -> None:
        with pytest.raises(error, match=match):
            uf.lazy_array(source, *rest, **options)

    before = regions()
    for order in ("A", "K", "f", None, ""):
        refuses(ValueError, "order is", path, 3, "u1", order)
    for dtype in ("O", [("x", "O")], [("x", "u1"), ("y", [("z", "O", 2)])]):
        refuses(ValueError, "Python objects", path, 3, dtype)
    refuses(TypeError, None, path, 3, "no such type")
    for shape in (-1, (3, -1), (-(2**70),)):
        refuses(ValueError, "negative", path, shape)
    for shape in (1.5, (2.0, 3), "3", "12", (None,)):
        refuses(TypeError, None, path, shape)
    for dtype in ("<u8", "V0", "S0"):
        refuses(ValueError, "give a shape", path, None, dtype)
    for offset in (-1, SIZE + 1, 2**70, -(2**70)):
        refuses(ValueError, "outside", offset=offset)
    for offset in (1.0, "1", None):
        refuses(TypeError, None, offset=offset)
    refuses(uf.SourceError, "needs", path, SIZE + 1)
    refuses(uf.SourceError, "needs", path, SIZE, offset=1)
    refuses(uf.SourceError, "needs", path, (2**40, 2**40), "f8")
    for unit in (0, 1, -PAGE, PAGE + 1, PAGE // 2):
        refuses(ValueError, "page_bytes", page_bytes=unit)
    for ahead in (-1, "much"):
        refuses(ValueError, "readahead", readahead=ahead)
    for limit in (-1, 0, PAGE, (1 << 20) - 1, 2**63):
        refuses(ValueError, "limit", memory_limit=limit)
    refuses(TypeError, None, memory_limit="1 MiB")
    refuses(ValueError, "16 times page_bytes", memory_limit=1 << 20, page_bytes=32 * PAGE)
    refuses(ValueError, "16 times page_bytes", memory_limit=uf.Budget(1 << 20), page_bytes=32 * PAGE)
    for how in ("", "raise", None):
        refuses(ValueError, "on_error", on_error=how)
    refuses(ValueError, "placement", placement="there")
    for no_source in (b"bytes", DATA, None, 3, lambda *_: 0):
        refuses(uf.SourceError, "not a page source", no_source)
    refuses(FileNotFoundError, None, tmp_path / "none")
    refuses(uf.SourceError, "regular file", tmp_path)
    for source, remedy in ((File(path), "writable=True"), (Zero(), "write"), (Buffer(b"ab"), "write")):
        refuses(uf.SourceError, remedy, source, 1, mode="r+")
    assert regions() == before


@writes
def test_a_file_that_may_not_be_written_to(path: Path, child: Child) -> None:
    """Mode "r+" opens a path for writing; the others do not."""
    path.chmod(0o444)
    path.parent.chmod(0o755)
    done = child(f"""
        os.chdir({str(path.parent)!r})
        os.setuid(65534)
        for mode in ("r+",):
            try:
                uf.lazy_array("data", mode=mode)
            except PermissionError:
                print("refused")
        uf.sources.File("data")
        """)
    assert done.stdout == "refused\n", done.stderr


@writes
def test_an_array_of_nothing(tmp_path: Path) -> None:
    """Has all the methods, and no pages."""
    (tmp_path / "empty").write_bytes(b"")
    for mode in ("r", "c", "r+"):
        for array in (uf.lazy_array(tmp_path / "empty", mode=mode), uf.lazy_array(Zero(), (3, 0))):
            array.materialize()
            array.prefetch()
            array.flush()
            assert array.evict() == 0
            assert array.resident.tolist() == array.dirty.tolist() == []
            assert untouched(array)
            assert array.tobytes() == b""
            assert pickle.loads(pickle.dumps(array)).shape == array.shape


@writes
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_an_array_of_nothing_knows_its_mode(tmp_path: Path, mode: Any) -> None:
    (tmp_path / "empty").write_bytes(b"")
    array = uf.lazy_array(tmp_path / "empty", mode=mode)
    assert array.mode == pickle.loads(pickle.dumps(array)).mode == mode


# -- closed ----------------------------------------------------------------------------------------------


@writes
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_closed_array(path: Path, mode: Any) -> None:
    with uf.lazy_array(path, mode=mode) as array:
        assert not array.closed
        assert (array[: 3 * PAGE] == DATA[: 3 * PAGE]).all()
        view = array[PAGE:]
    assert array.closed
    assert view.closed
    array.close()
    view.close()
    calls: tuple[Callable[[], Any], ...] = (
        *(array.stats, array.materialize, array.prefetch, array.evict, array.flush, view.stats),
        *(lambda: array.resident, lambda: view.dirty, lambda: pickle.dumps(view), lambda: array.prefetch(3)),
    )
    for call in calls:
        with pytest.raises(uf.ClosedError, match="closed"):
            call()
    assert (view[: 2 * PAGE] == DATA[PAGE : 3 * PAGE]).all()  # what was there stays
    assert array.mode == mode
    assert view.shape == (SIZE - PAGE,)
    before = regions()
    array = view = calls = call = None  # type: ignore[assignment]
    assert regions() < before


# -- bringing and letting go -----------------------------------------------------------------------------


def test_prefetch_brings_what_the_key_selects(path: Path) -> None:
    array = uf.lazy_array(path, (N, PAGE), readahead=0)
    for key, rows in (
        (3, {3}),
        ((slice(5, 7), slice(9, 10)), {5, 6}),
        ([11, 13], {11, 13}),
        ((..., 0), set(range(N))),
    ):
        array.evict()
        array.prefetch(key)
        assert set(np.flatnonzero(array.resident).tolist()) == rows
    assert came(array, 1 + 2 + 2 + N)
    array.prefetch()
    array.prefetch([])
    with pytest.raises(IndexError):
        array.prefetch(N)
    assert (array == DATA[: N * PAGE].reshape(N, PAGE)).all()
    assert came(array, 1 + 2 + 2 + N)


def test_evict_lets_go_and_it_comes_again(path: Path) -> None:
    array = uf.lazy_array(path, memory_limit=8 << 20, readahead=0)
    array.materialize()
    assert array.resident.all()
    assert array.evict(slice(2 * PAGE, 4 * PAGE)) == 2 * PAGE
    assert np.flatnonzero(~array.resident).tolist() == [2, 3]
    assert array.evict(slice(2 * PAGE, 4 * PAGE)) == 0
    assert array.stats()["evicted"] == 2
    assert (array == DATA).all()
    assert array.resident.all()
    assert array[10:20].evict() == PAGE  # whole pages
    assert array.evict() == N * PAGE
    with pytest.raises(IndexError):
        array.evict((0, 0))


@writes
def test_evict_writes_back_or_leaves_changes(path: Path) -> None:
    for mode in ("c", "r+"):
        array = uf.lazy_array(path, mode=mode, readahead=0)
        array.materialize()
        array[5 * PAGE] ^= 255
        assert np.flatnonzero(array.dirty).tolist() == [5]
        assert array.evict() == (N + 1 - (mode == "c")) * PAGE
        assert np.flatnonzero(array.resident).tolist() == ([5] if mode == "c" else [])
        assert array[5 * PAGE] == DATA[5 * PAGE] ^ 255
        array.close()
    assert np.flatnonzero(np.fromfile(path, np.uint8) != DATA).tolist() == [5 * PAGE]


def test_materialize_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    array = uf.lazy_array(Pattern(), 64 << 20)
    assert array.materialize(lambda there, total: told.append((there, total))) is None
    assert told
    assert told[-1] == (64 << 20, 64 << 20)
    assert [total for _, total in told] == [64 << 20] * len(told)
    assert told == sorted(told)
    assert array.resident.all()
    assert (array == Pattern().expected(0, 64 << 20)).all()
    assert came(array, 64 << 8)


def test_materialize_with_a_bar(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="the extra cli")
    array = uf.lazy_array(Pattern(), 1 << 20)
    array.materialize(True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "lazy array" in err
    assert array.resident.all()
    array.evict()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ModuleNotFoundError, match=r"userfault\[cli\]"):
        array.prefetch(3, progress=True)


def test_a_progress_that_raises_stops_it() -> None:
    def stop(there: int, total: int) -> None:
        raise KeyboardInterrupt

    array = uf.lazy_array(Pattern(), 8 << 20)
    with pytest.raises(KeyboardInterrupt):
        array.materialize(stop)
    array.materialize()
    assert (array == Pattern().expected(0, 8 << 20)).all()


def test_prefetch_of_more_than_the_limit() -> None:
    array = uf.lazy_array(Pattern(), 4 << 20, memory_limit=1 << 20)
    with pytest.raises(uf.LimitError, match="memory_limit"):
        array.materialize()
    array.prefetch(slice(1 << 19))
    assert (array == Pattern().expected(0, 4 << 20)).all()
    assert array.resident.sum() <= 1 << 8


def test_stats(path: Path) -> None:
    array = uf.lazy_array(path, readahead=0)
    names = array.stats().dtype.names
    assert names is not None
    assert {"records", "pages", "bytes", "changed", "written", "evicted", "latency"} <= set(names)
    assert not any(np.any(array.stats()[name]) for name in names)
    for page in (3, 9):
        assert array[page * PAGE] == DATA[page * PAGE]
    assert came(array, 2)
    assert array[5:].stats()["bytes"] == 2 * PAGE


# -- what others do with it ------------------------------------------------------------------------------

USES: dict[str, Callable[[npt.NDArray[np.uint8]], Any]] = {
    "bytes": bytes,
    "tobytes": lambda a: a.tobytes(),
    "bytearray": bytearray,
    "tolist": lambda a: a[::9].tolist(),
    "memoryview": lambda a: memoryview(a)[5:-5].tobytes(),
    "join": lambda a: b"-".join([a[:10], a[-10:]]),  # type: ignore[list-item]
    "crc32": zlib.crc32,
    "iteration": lambda a: [int(x) for x in a[:: PAGE // 2]],
    "in": lambda a: (0 in a, 255 in a),
    "concatenate": lambda a: np.concatenate([a[5:], a[:5]]).tobytes(),
    "flat": lambda a: a.flat[::1000].tobytes(),
    "einsum": lambda a: np.einsum("i,i->", a, a, dtype=np.int64),
    "searchsorted": lambda a: a[:100].searchsorted(7, sorter=a[:100].argsort()),
    "unpackbits": lambda a: np.unpackbits(a).sum(),
    "pad": lambda a: np.pad(a, 3).tobytes(),
    "byteswap": lambda a: a[: 8 * PAGE].view("<u4").byteswap().tobytes(),
    "array2string": lambda a: np.array2string(a, threshold=10),
    "str": str,
    "format": lambda a: f"{a[:4]} {a[7]:03d}",
}


@pytest.mark.parametrize("use", USES)
def test_what_others_do_with_it(needs_privilege: None, path: Path, use: str) -> None:
    array = uf.lazy_array(path)
    assert USES[use](array) == USES[use](DATA)


@pytest.mark.parametrize("order", ["C", "F"])
def test_files_that_numpy_writes(needs_privilege: None, path: Path, tmp_path: Path, order: Any) -> None:
    array = uf.lazy_array(path, (N, 300), ">u2", order, offset=1)
    expected = np.ndarray((N, 300), ">u2", DATA, 1, order=order)
    np.save(tmp_path / "a.npy", array)
    loaded = np.load(tmp_path / "a.npy")
    assert same(loaded, expected)
    np.savez(tmp_path / "a.npz", a=array[::2])
    with np.load(tmp_path / "a.npz") as several:
        assert (several["a"] == expected[::2]).all()
    array.evict()
    array.tofile(tmp_path / "raw")
    assert (np.fromfile(tmp_path / "raw", ">u2").reshape(N, 300) == expected).all()
    array[:1, :4].tofile(tmp_path / "text", sep=",", format="%d")
    assert (tmp_path / "text").read_text() == ",".join(map(str, expected[0, :4].tolist()))
    # And of what numpy wrote it can be made again: the header is 128 bytes.
    header = (tmp_path / "a.npy").stat().st_size - array.nbytes
    again = uf.lazy_array(tmp_path / "a.npy", array.shape, array.dtype, order, offset=header)
    assert same(again, expected)


def test_a_path_in_any_form(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    for form in (str(path), path, "data", Path("data")):
        array = uf.lazy_array(form)
        monkeypatch.chdir("/")
        assert (pickle.loads(pickle.dumps(array)) == DATA).all()  # wherever one is by then
        monkeypatch.chdir(path.parent)


def test_many_arrays_of_one_source(path: Path) -> None:
    source = File(path)
    arrays = [uf.lazy_array(source, 3 * PAGE, offset=i * 1111) for i in range(40)]
    order = np.random.default_rng(1).permutation(40)
    for i in order:
        assert (arrays[i] == DATA[i * 1111 :][: 3 * PAGE]).all()
        assert came(arrays[i], -(-(i * 1111 % PAGE + 3 * PAGE) // PAGE))
