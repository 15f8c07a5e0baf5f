"""Which pages an index selects: compared with an array of every element's offset, which numpy indexes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import PAGE
from userfault import selection
from userfault.selection import pages_of

# Less than a page, more, one that no page is a multiple of, and two of which some pages hold no beginning.
DTYPES = ("u1", "<f8", "V3", "V1000", "V4097", "V9000")
ITEMSIZES = tuple(np.dtype(dtype).itemsize for dtype in DTYPES)
MOST_BYTES = 1 << 18

Array = npt.NDArray[Any]


def offsets_of(array: Array, start: int) -> npt.NDArray[np.int64]:
    """Of each element its first byte's distance from `start`, in an array of the same shape."""
    offsets = np.full(array.shape, array.__array_interface__["data"][0] - start)
    for axis, (n, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
        offsets += (np.arange(n) * stride).reshape(n, *[1] * (array.ndim - axis - 1))
    return offsets


def expected(array: Array, start: int, key: Any) -> set[int]:
    """Every page that holds a byte of an element of array[key], and no other."""
    pages: set[int] = set()
    for offset in np.unique(offsets_of(array, start)[key]).tolist():
        pages.update(range(offset // PAGE, (offset + array.itemsize - 1) // PAGE + 1))
    return pages


def found(array: Array, start: int, key: Any) -> set[int]:
    """What `pages_of` says, if its pairs are as it promises."""
    firsts, ends = pages_of(array, start, key)
    assert firsts.dtype == ends.dtype == np.uint64
    assert firsts.shape == ends.shape == (len(firsts),)
    assert (firsts < ends).all()
    assert (ends[:-1] < firsts[1:]).all(), "they overlap, touch or go back"
    pages = zip(firsts.tolist(), ends.tolist(), strict=True)
    return {page for first, end in pages for page in range(first, end)}


def agree(array: Array, start: int, key: Any) -> None:
    """The same pages, or both raise IndexError."""
    try:
        pages = expected(array, start, key)
    except IndexError:
        with pytest.raises(IndexError):
            pages_of(array, start, key)
    else:
        assert found(array, start, key) == pages


# -- any array, any key ----------------------------------------------------------------------------------


@st.composite
def slices(draw: st.DrawFn, n: int) -> slice:
    """Of an axis of n, mostly with something in them."""
    bounds = st.none() | st.integers(-n - 2, n + 2)
    steps = st.none() | st.integers(1, 7) | st.integers(-7, -1)
    return slice(draw(bounds), draw(bounds), draw(steps))


@st.composite
def arrays(draw: st.DrawFn) -> tuple[Array, int]:
    """A view, with steps and its axes in any order, of memory that is never looked at; and the address from
    which its pages count."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        room = MOST_BYTES // (dtype.itemsize * max(1, int(np.prod(shape))))
        most = max(1, min(room, draw(st.sampled_from((3, 20, 300, 20_000)))))
        shape.append(draw(st.integers(min(1, draw(st.integers(0, 9))), most)))
    first = draw(st.integers(0, 2 * PAGE))
    nbytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(first + nbytes, np.uint8)
    array: Array = np.ndarray(shape, dtype, memory, first, order=draw(st.sampled_from("CF")))
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    if draw(st.booleans()):
        array = array[(*(draw(slices(n)) for n in array.shape), ...)]
    return array, memory.ctypes.data


@st.composite
def keys(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """What may stand between brackets; now and then it does not fit."""
    items: list[Any] = []
    axis = 0
    common = draw(st.integers(1, 5))  # arrays of indices are broadcast together
    while axis < len(shape) and draw(st.integers(0, 9)):
        n = shape[axis]
        kind = draw(st.sampled_from(("slice", "slice", "integer", "integers", "mask", "none", "wide")))
        if kind == "none":
            items.append(None)
            continue
        if kind == "slice":
            items.append(draw(slices(n)))
        elif kind == "integer":
            items.append(draw(st.integers(-n - draw(st.sampled_from((0, 0, 0, 1))), max(n - 1, 0))))
            if draw(st.booleans()):
                items[-1] = np.int64(items[-1])
        elif kind == "integers":
            size = draw(st.sampled_from(((common,), (1,), (3, common), (common, 1), (0,), (2,))))
            items.append(draw(st.integers(0, 2**32)))
            items[-1] = np.random.default_rng(items[-1]).integers(-n, max(n, 1), size)
            if draw(st.booleans()):
                items[-1] = items[-1].tolist()
        else:
            axes = min(2, len(shape) - axis) if kind == "wide" else 1
            size = shape[axis : axis + axes]
            if not draw(st.integers(0, 9)):
                size = (size[0] + 1, *size[1:])
            rng = np.random.default_rng(draw(st.integers(0, 2**32)))
            items.append(rng.random(size) < draw(st.sampled_from((0, 0.01, 0.5, 1))))
            axis += axes - 1
        axis += 1
    if draw(st.booleans()):
        # What is left before it belongs to the last axes.
        items.insert(draw(st.integers(0, len(items))), ...)
    if not draw(st.integers(0, 19)):
        items += [0] * draw(st.integers(1, 5))
    if len(items) == 1 and draw(st.booleans()):
        return items[0]
    return tuple(items)


@given(st.data())
@settings(max_examples=600)
def test_any_key_of_any_array(data: st.DataObject) -> None:
    array, start = data.draw(arrays())
    key = data.draw(keys(array.shape))
    try:
        agree(array, start, key)
    except IndexError:
        # numpy lets an index pass that is out of bounds when it is broadcast to nothing.
        assert not expected(array, start, key)


# -- by hand ---------------------------------------------------------------------------------------------

CUBE = np.empty((5, 6, 700), "<f8")
KEYS = {
    "nothing": (),
    "an ellipsis": ...,
    "more axes than there are": (0, 0, 0, 0),
    "two ellipses": (..., 0, ...),
    "new axes": (None, 2, None, ..., None),
    "out of bounds": (0, 6),
    "out of bounds below": (0, -7),
    "out of bounds of what selects nothing": (slice(0, 0), 6),
    "out of bounds, in an array": (0, [1, 6]),
    "an integer that no machine has": 2**70,
    "a numpy integer": np.uint8(4),
    "an array of no dimensions": (np.array(2), 1),
    "no integers": [],
    "no integers of an axis": (slice(None), []),
    "floats": 1.5,
    "an array of floats": np.array([1.0]),
    "an empty array of floats": np.array([]),
    "text": "field",
    "a list is an array, not a tuple": [0, 2, 4],
    "arrays broadcast together": ([[0], [4]], [0, 5]),
    "arrays with a slice between": ([0, 4], slice(1, 3), [0, 699]),
    "arrays that do not fit each other": ([0, 1], [0, 1, 2]),
    "true": True,
    "false": False,
    "a numpy bool": np.True_,
    "a mask of no dimensions": (np.array(False), 1),
    "bools between": (1, True, 2),
    "a mask": np.arange(5) % 2 == 0,
    "a mask of two axes": np.arange(30).reshape(5, 6) % 7 == 0,
    "a mask of all axes": np.arange(21_000).reshape(5, 6, 700) % 1000 == 999,
    "a mask as lists": [True, False, False, False, True],
    "a mask of the wrong size": np.ones(4, np.bool_),
    "a mask of an axis that it does not fit": (0, np.ones(5, np.bool_)),
    "a mask after an ellipsis": (..., np.arange(700) == 600),
    "a mask of the wrong size after an ellipsis": (..., np.ones(3, np.bool_)),
    "a mask before an ellipsis": (np.arange(5) == 3, ..., 1),
    "a mask and integers": (np.arange(5) > 2, [0, 5]),
    "a mask with an integer": (np.arange(5) > 2, 1, slice(None, None, -600)),
    "a mask of too many dimensions": np.ones((5, 6, 700, 1), np.bool_),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key(key: Any) -> None:
    for array in (CUBE, CUBE.T, CUBE[::-2, 1:, ::3]):
        agree(array, CUBE.ctypes.data, key)


def test_an_array_of_no_dimensions() -> None:
    array = np.empty((), "V5000")
    for key in ((), ..., None, True, False, 0, (..., None), slice(None)):
        agree(array, array.ctypes.data - 10, key)


@pytest.mark.parametrize("step", [-2, -1, 1, 2])
@pytest.mark.parametrize("gap", [-1, 0, 1, PAGE - 1, PAGE, PAGE + 1])
def test_gaps_of_about_a_page(gap: int, step: int) -> None:
    """Rows of 100 bytes, between which just less or more than a whole page may lie."""
    memory = np.empty(40 * 2 * PAGE, np.uint8)
    rows = memory[: (100 + gap) * 32].reshape(32, 100 + gap)[:, :100]
    for first in (0, 1, 2000, PAGE - 100, PAGE - 1):
        agree(rows, rows.ctypes.data - first, (slice(None, None, step),))


def test_elements_that_share_their_bytes() -> None:
    memory = np.empty(64 * PAGE, np.uint8)
    for shape, strides in {((30, 9), (0, 5000)), ((9, 30), (5000, 100)), ((20, 20), (6000, 6000))}:
        array = np.lib.stride_tricks.as_strided(memory, shape, strides)
        for key in (..., (slice(None, None, -2), slice(1, None, 3)), ([3, 5],), (2, 4)):
            agree(array, memory.ctypes.data, key)


def test_elements_of_no_bytes() -> None:
    array = np.empty((3, 4), "V0")
    assert found(array, array.ctypes.data, ...) == set()
    with pytest.raises(IndexError):
        pages_of(array, array.ctypes.data, 3)


def test_too_many_runs_are_taken_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then pages between may come too, but none before the first or after the last."""
    array = np.empty((64, 3 * PAGE), np.uint8)
    key = (slice(3, 60), slice(10, 20))
    exact = expected(array, array.ctypes.data, key)
    assert found(array, array.ctypes.data, key) == exact
    monkeypatch.setattr(selection, "_MOST_RUNS", 10)
    assert found(array, array.ctypes.data, key) == set(range(min(exact), max(exact) + 1))


def test_nothing_is_looked_at() -> None:
    """Not an element of an array of a million gigabytes, nor every one of its rows."""
    memory = np.empty(1, np.uint8)
    array = np.lib.stride_tricks.as_strided(memory, (1 << 20, 1 << 30), (1 << 30, 1))
    pages = (1 << 50) // PAGE
    start = memory.ctypes.data - memory.ctypes.data % PAGE
    for key in (..., slice(None, None, -1), (slice(None), slice(None, None, 100))):
        firsts, ends = pages_of(array, start, key)
        assert firsts.tolist() == [0]
        assert int(ends[0]) in (pages, pages + 1)
    assert [pair.tolist() for pair in pages_of(array, start, (5, slice(0, 1)))] == [
        [5 << 18],
        [(5 << 18) + 1],
    ]
