"""The arrays of stores.py: what is in them, and how they are opened."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import numpy.typing as npt
import zarr

import userfault as uf
from stores_turns import Watch, peak
from userfault.stores.zarr import open_zarr

Indices = tuple[npt.NDArray[np.intp], ...]

LEVEL = 1  # of zstd
SIDE = 512  # elements of a chunk in two dimensions
CHUNK = 1 << 20  # bytes
LEAST = 4 << 20  # bytes that have more than one chunk in each dimension
STRETCH = 16  # chunks that are written at a time
ELEMENTS = 1_000  # or one a MiB, if that is less


@dataclass(frozen=True)
class Stored:
    """A zarr array in a folder, and what it should be read as."""

    name: str
    path: str
    total: Any
    elements: npt.NDArray[Any]

    @cached_property
    def zarr(self) -> zarr.Array[Any]:
        return zarr.open_array(self.path, mode="r")

    @property
    def indices(self) -> Indices:
        """Where the `elements` lie."""
        return scattered(self.zarr.shape, len(self.elements))

    def about(self) -> dict[str, Any]:
        """For the report."""
        array = self.zarr
        return {
            "name": self.name,
            "shape": array.shape,
            "chunks": array.chunks,
            "dtype": str(array.dtype),
            "nbytes": array.nbytes,
            "compressed": array.nbytes / array.nbytes_stored(),
        }

    @contextmanager
    def lazy(self, watch: Watch) -> Iterator[uf.LazyArray]:
        """A new lazy array with its own pager, whose memory `watch` is told."""
        with open_zarr(self.path) as array:
            pager = array._lazy().source
            assert isinstance(pager, uf.Pager)
            yield array
            watch.beside = peak(pager.pid)

    def fresh(self) -> zarr.Array[Any]:
        return zarr.open_array(self.path, mode="r")

    def dask(self) -> Any:
        return dask.array.from_zarr(self.path)


def scattered(shape: tuple[int, ...], n: int) -> Indices:
    """Random elements, in random order."""
    return np.unravel_index(np.random.default_rng(n).integers(0, math.prod(shape), n), shape)


@contextmanager
def arrays(nbytes: int) -> Iterator[dict[str, Stored]]:
    """One of one dimension and one of two, with some `nbytes` each, which the page cache holds.

    They are random walks in steps of a quarter, in chunks of 1 MiB that zstd compressed.
    """
    if nbytes < LEAST:
        raise ValueError(f"the arrays have {LEAST} bytes at the least, not {nbytes}")
    walk = np.cumsum(np.random.default_rng(0).standard_normal(STRETCH * CHUNK // 8))
    line = np.round(4 * walk) / 4
    side = math.isqrt(nbytes // 4) // SIDE * SIDE
    steps = np.random.default_rng(1).standard_normal((SIDE, side), np.float32)
    plane = np.round(4 * np.cumsum(steps, axis=1)) / 4
    n = min(ELEMENTS, nbytes // CHUNK)
    with tempfile.TemporaryDirectory(prefix="userfault-bench-") as folder:
        yield {
            "1-D": _written(folder, "1-D", line, nbytes // CHUNK * CHUNK // 8, (CHUNK // 8,), n),
            "2-D": _written(folder, "2-D", plane, side, (SIDE, SIDE), n),
        }


def _written(
    folder: str, name: str, block: npt.NDArray[Any], length: int, chunks: tuple[int, ...], n: int
) -> Stored:
    """An array of that length, of blocks one after the other: each differs from the others by its number."""
    path = str(Path(folder) / name)
    array = zarr.create_array(
        path,
        shape=(length, *block.shape[1:]),
        chunks=chunks,
        dtype=block.dtype,
        compressors=zarr.codecs.ZstdCodec(level=LEVEL),
    )
    for number, at in enumerate(range(0, length, len(block))):
        end = min(at + len(block), length)
        array[at:end] = block[: end - at] + number
    whole = np.asarray(array[:])
    return Stored(name, path, whole.sum(), whole[scattered(array.shape, n)])
