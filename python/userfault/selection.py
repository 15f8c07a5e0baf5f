"""Which pages hold the elements that an index selects, without looking at any of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault._consts import PAGE_SIZE

_MOST_RUNS = 1 << 20

Pages = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]


def pages_of(array: npt.NDArray[Any], start: int, key: Any = ...) -> Pages:
    """The pages of the elements array[key], counted from the address `start`: [first, end) of each pair.

    Shape (n,) each, ascending, without overlaps. Raises IndexError as numpy does.
    """
    offsets = np.zeros(1, np.int64)
    steps: list[tuple[int, int]] = []  # (stride in bytes, count) of what is selected by slices
    items, advanced = _expand(array, key)
    for axis, item in enumerate(items):
        n, stride = array.shape[axis], array.strides[axis]
        if isinstance(item, slice):
            first, _, step = item.indices(n)
            offsets = offsets + first * stride
            steps.append((step * stride, len(range(*item.indices(n)))))
        else:
            chosen = np.asarray(item, np.int64)
            if chosen.size and not (-n <= int(chosen.min()) and int(chosen.max()) < n):
                raise IndexError(f"index out of bounds for axis {axis} with size {n}")
            advanced.append(np.where(chosen < 0, chosen + n, chosen) * stride)
    if advanced:
        try:
            offsets = offsets + np.ravel(sum(np.broadcast_arrays(*advanced)))
        except ValueError as error:
            raise IndexError(str(error)) from None
    if not offsets.size or any(count == 0 for _, count in steps) or not array.itemsize:
        return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    offsets = offsets + (array.__array_interface__["data"][0] - start)
    length = array.itemsize
    for stride, count in sorted(steps, key=lambda step: abs(step[0])):
        if stride < 0:
            offsets = offsets + stride * (count - 1)
            stride = -stride
        # Gaps of less than a page leave no page out; and what would be too many runs is taken as one.
        if stride < length + PAGE_SIZE or offsets.size * count > _MOST_RUNS:
            length += stride * (count - 1)
        else:
            offsets = (offsets[:, np.newaxis] + stride * np.arange(count)).ravel()
    return merge(offsets // PAGE_SIZE, (offsets + length - 1) // PAGE_SIZE + 1)


def _expand(array: npt.NDArray[Any], key: Any) -> tuple[list[Any], list[npt.NDArray[np.int64]]]:
    """One slice or array of integers for each axis; and arrays of no axis, for masks without dimensions."""
    items = [_checked(item) for item in (key if isinstance(key, tuple) else (key,)) if item is not None]
    ellipses = sum(item is Ellipsis for item in items)
    left = array.ndim - sum(_axes(item) for item in items)
    if left < 0 or ellipses > 1:
        raise IndexError(f"too many indices for an array of {array.ndim} dimensions")
    expanded: list[Any] = []
    lone = []
    for item in items if ellipses else [*items, Ellipsis]:
        if item is Ellipsis:
            expanded += [slice(None)] * left
        elif not _is_mask(item):
            expanded.append(item)
        elif item.ndim == 0:
            lone.append(np.zeros(int(item), np.int64))
        else:
            shape = array.shape[len(expanded) : len(expanded) + item.ndim]
            if item.shape != shape:
                raise IndexError(f"a mask of shape {item.shape} does not fit axes of {shape}")
            expanded += item.nonzero()
    return expanded, lone


def _checked(item: Any) -> Any:
    """An ellipsis, a slice, a mask, or integers."""
    if item is Ellipsis or isinstance(item, slice):
        return item
    chosen = np.asarray(item)
    if chosen.dtype == np.bool_:
        return chosen
    if chosen.dtype.kind in "iu" or (chosen.size == 0 and not isinstance(item, np.ndarray)):
        return chosen.astype(np.int64)
    raise IndexError("an index is integers, slices, masks, None or an ellipsis")


def _axes(item: Any) -> int:
    if item is Ellipsis:
        return 0
    return int(item.ndim) if _is_mask(item) else 1


def _is_mask(item: Any) -> bool:
    return isinstance(item, np.ndarray) and item.dtype == np.bool_


def merge(firsts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Pages:
    """Sorted, with those joined that touch or overlap."""
    if len(firsts) == 0:
        return firsts.astype(np.uint64), ends.astype(np.uint64)
    order = np.argsort(firsts, kind="stable")
    firsts, ends = firsts[order], np.maximum.accumulate(ends[order])
    begins = np.ones(len(firsts), np.bool_)
    begins[1:] = firsts[1:] > ends[:-1]
    lasts = np.append(np.flatnonzero(begins)[1:] - 1, len(ends) - 1)
    return firsts[begins].astype(np.uint64), ends[lasts].astype(np.uint64)


def parts_of(pages: Pages, step: int) -> Iterator[Pages]:
    """The runs one by one, cut at multiples of `step` pages."""
    for first, end in zip(*(bounds.tolist() for bounds in pages), strict=True):
        while first < end:
            stop = min(first - first % step + step, end)
            yield np.array([first], np.uint64), np.array([stop], np.uint64)
            first = stop
