"""Which pages hold the elements that an index selects, without looking at any of them."""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault._consts import PAGE_SIZE

_MOST_RUNS = 1 << 26

Pages = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]


def pages_of(array: npt.NDArray[Any], start: int, key: Any = ...) -> Pages:
    """The pages of the elements array[key], counted from the address `start`: [first, end) of each pair.

    Shape (n,) each, ascending, without overlaps. Raises IndexError as numpy does.
    """
    offsets = np.zeros(1, np.int64)
    steps: list[tuple[int, int]] = []  # (stride in bytes, count) of what is selected by slices
    advanced = []
    for axis, item in enumerate(_expand(array, key)):
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
        offsets = offsets + np.ravel(sum(np.broadcast_arrays(*advanced)))
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
    return _merge(offsets // PAGE_SIZE, (offsets + length - 1) // PAGE_SIZE + 1)


def _expand(array: npt.NDArray[Any], key: Any) -> list[Any]:
    """One slice or array of integers for each axis."""
    items: list[Any] = []
    for item in key if isinstance(key, tuple) else (key,):
        if item is None:
            continue
        if item is Ellipsis or isinstance(item, slice):
            items.append(item)
        elif isinstance(item, (int, np.integer)) and not isinstance(item, bool):
            items.append(index(item))
        else:
            chosen = np.asarray(item)
            if chosen.dtype == np.bool_:
                axis = sum(1 for known in items if known is not Ellipsis)
                if chosen.shape != array.shape[axis : axis + chosen.ndim] and Ellipsis not in items:
                    raise IndexError(f"a mask of shape {chosen.shape} does not fit {array.shape}")
                items.extend(chosen.nonzero())
            elif chosen.dtype.kind in "iu" or chosen.size == 0:
                items.append(chosen.astype(np.int64))
            else:
                raise IndexError("an index is integers, slices, masks, None or an ellipsis")
    known = sum(1 for item in items if item is not Ellipsis)
    if known > array.ndim or known < len(items) - 1:
        raise IndexError(f"too many indices for an array of {array.ndim} dimensions")
    full = [slice(None)] * (array.ndim - known)
    for i, item in enumerate(items):
        if item is Ellipsis:
            return items[:i] + full + items[i + 1 :]
    return items + full


def _merge(firsts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Pages:
    """Sorted, with those joined that touch or overlap."""
    order = np.argsort(firsts, kind="stable")
    firsts, ends = firsts[order], np.maximum.accumulate(ends[order])
    begins = np.ones(len(firsts), np.bool_)
    begins[1:] = firsts[1:] > ends[:-1]
    lasts = np.append(np.flatnonzero(begins)[1:] - 1, len(ends) - 1)
    return firsts[begins].astype(np.uint64), ends[lasts].astype(np.uint64)
