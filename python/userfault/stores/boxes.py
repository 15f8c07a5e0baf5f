"""Where a run of elements lies in an array of several dimensions: its boxes, and their parts in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

Box = tuple[slice, ...]


def boxes(shape: tuple[int, ...], first: int, end: int) -> Iterator[Box]:
    """The elements [first, end) of a C-order array as boxes, in order: at most two for each dimension."""
    if not shape:
        yield ()
        return
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    at = first
    while at < end:
        # The outermost dimension along which there is a whole step to go.
        axis = next(k for k, step in enumerate(steps) if at % step == 0 and at + step <= end)
        where = [at // step % size for step, size in zip(steps, shape, strict=True)]
        n = min((end - at) // steps[axis], shape[axis] - where[axis])
        fixed = (slice(i, i + 1) for i in where[:axis])
        whole = (slice(0, size) for size in shape[axis + 1 :])
        yield (*fixed, slice(where[axis], where[axis] + n), *whole)
        at += n * steps[axis]


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(side.stop - side.start for side in box)


def chunks_of(box: Box, chunk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The places in the grid of those chunks that have a part of the box."""
    return product(
        *(range(side.start // size, -(-side.stop // size)) for side, size in zip(box, chunk, strict=True))
    )


def chunk_box(place: tuple[int, ...], chunk: tuple[int, ...], shape: tuple[int, ...]) -> Box:
    """The elements of the chunk at that place of the grid."""
    return tuple(
        slice(i * size, min((i + 1) * size, end)) for i, size, end in zip(place, chunk, shape, strict=True)
    )


def overlap(box: Box, place: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[Box, Box]:
    """What a box and the chunk at that place have in common, as a part of each."""
    of_box, of_chunk = [], []
    for side, i, size in zip(box, place, chunk, strict=True):
        begin = i * size
        start, stop = max(side.start, begin), min(side.stop, begin + size)
        of_box.append(slice(start - side.start, stop - side.start))
        of_chunk.append(slice(start - begin, stop - begin))
    return tuple(of_box), tuple(of_chunk)
