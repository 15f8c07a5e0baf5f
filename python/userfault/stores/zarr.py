"""`open_zarr`: zarr arrays (formats 2 and 3) as lazy arrays."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from userfault._consts import PAGE_SIZE
from userfault._source import Zero
from userfault.chunks import Cache
from userfault.errors import SourceError
from userfault.lazy import LazyArray, Mode, lazy_array
from userfault.pager import PagerOptions
from userfault.stores.boxes import Box, box_shape, boxes, chunk_box, chunks_of, overlap

try:
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import FsspecStore, LocalStore, MemoryStore, StorePath, WrapperStore, ZipStore
except ModuleNotFoundError as error:
    if error.name != "zarr":
        raise
    raise ModuleNotFoundError("open_zarr needs zarr: pip install 'userfault[zarr]'", name="zarr") from None

_CACHE_BYTES = 256 << 20
# Chunks that one request may be waiting for: what zarr itself does at a time, and some more for far stores.
_LOADS = 16


class ZarrSource:
    """A zarr array's bytes, in C order. For the pager's process, whose threads share it.

    Chunks whose elements lie side by side in the array are read straight from the store: `chunk_bytes` are a
    chunk's. Of others a request has small parts; they are decoded once and kept while parts of them are
    missing elsewhere, `cache_bytes` at the most.

    Args:
        store, path, zarr_format, storage_options: as for zarr.open_array.
        mode: "r" or "r+".
        cache_bytes: bytes of decoded chunks; None: `cache_bytes_for` the array.
        expected: the shape and dtype that it must have.

    Raises what zarr raises, SourceError for elements that are no plain bytes and for unexpected ones.
    """

    def __init__(
        self,
        store: Any,
        path: str | None = None,
        *,
        mode: Literal["r", "r+"] = "r",
        zarr_format: Literal[2, 3] | None = None,
        storage_options: dict[str, Any] | None = None,
        cache_bytes: int | None = None,
        expected: tuple[tuple[int, ...], np.dtype[Any]] | None = None,
    ) -> None:
        self._array = array = _open(store, path, mode, zarr_format, storage_options)
        self._dtype = _plain(array)
        if expected not in (None, (array.shape, self._dtype)):
            raise SourceError(
                f"{array.store_path} was {expected} when opened, and is {(array.shape, self._dtype)} now"
            )
        self.nbytes = math.prod(array.shape) * self._dtype.itemsize
        self._chunk = tuple(max(1, min(c, n)) for c, n in zip(array.chunks, array.shape, strict=True))
        self._straight = _lie_in_order(array.shape, self._chunk)
        self.chunk_bytes = _chunk_bytes(array.shape, self._chunk, self._dtype.itemsize, self._straight)
        self._decoder = _Decoder.of(array)
        if not self._straight:
            self._cache: Cache[npt.NDArray[Any]] = Cache(
                cache_bytes_for(array) if cache_bytes is None else cache_bytes
            )
            self._pool = ThreadPoolExecutor(
                len(os.sched_getaffinity(0)) if self._decoder else _LOADS, "zarr_chunks"
            )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the array's bytes from `offset` on."""
        first, end = self._elements(offset, len(buffer))
        if self._decoder and not (offset % self._dtype.itemsize or len(buffer) % self._dtype.itemsize):
            self._read(first, np.frombuffer(buffer, self._dtype))
            return
        # The buffer is lent, and zarr's own threads let go of what they are given a little later.
        elements = np.empty(end - first, self._dtype)
        self._read(first, elements)
        skipped = offset - first * self._dtype.itemsize
        buffer[:] = elements.view(np.uint8).data[skipped : skipped + len(buffer)]

    def write_from(self, offset: int, buffer: memoryview) -> None:
        """Write the bytes to the array, from `offset` on. Chunks of which they are a part are read first."""
        first, end = self._elements(offset, len(buffer))
        size = self._dtype.itemsize
        elements = np.empty(end - first, self._dtype)
        if offset % size:
            self._read(first, elements[:1])
        if (offset + len(buffer)) % size:
            self._read(end - 1, elements[-1:])
        skipped = offset - first * size
        elements.view(np.uint8).data[skipped : skipped + len(buffer)] = buffer
        for box, part in self._boxes(first, elements):
            try:
                self._array.set_basic_selection(box, part)
            finally:
                if not self._straight:
                    for place in chunks_of(box, self._chunk):
                        self._cache.drop(place)

    def _elements(self, offset: int, nbytes: int) -> tuple[int, int]:
        """The elements that have some of the bytes."""
        size = self._dtype.itemsize
        return offset // size, -(-(offset + nbytes) // size)

    def _boxes(self, first: int, elements: npt.NDArray[Any]) -> list[tuple[Box, npt.NDArray[Any]]]:
        """The boxes of the array that the elements from `first` on are, each with its part of them."""
        found, at = [], 0
        for box in boxes(self._array.shape, first, first + len(elements)):
            shape = box_shape(box)
            n = math.prod(shape)
            found.append((box, elements[at : at + n].reshape(shape)))
            at += n
        return found

    def _read(self, first: int, elements: npt.NDArray[Any]) -> None:
        parts = self._boxes(first, elements)
        if self._straight:
            for box, part in parts:
                self._get(box, part)
            return
        copies = [(place, box, part) for box, part in parts for place in chunks_of(box, self._chunk)]
        far = {place for place, _, _ in copies if self._cache.first([place]) is None}
        missing = [copy for copy in copies if copy[0] in far]
        if len(missing) == 1:
            self._copy(*missing[0])
        elif missing:  # at once
            for _ in self._pool.map(self._copy, *zip(*missing, strict=True)):
                pass
        for copy in copies:
            if copy[0] not in far:
                self._copy(*copy)

    def _get(self, box: Box, part: npt.NDArray[Any]) -> None:
        """Fill the part with the elements of the box."""
        if self._decoder is None:
            part[...] = self._array.get_basic_selection(box)
            return
        for place in chunks_of(box, self._chunk):
            of_part, of_chunk = overlap(box, place, self._chunk)
            part[of_part] = self._decoder.chunk(place)[of_chunk]

    def _load(self, place: tuple[int, ...]) -> npt.NDArray[Any]:
        """A chunk's elements."""
        box = chunk_box(place, self._chunk, self._array.shape)
        if self._decoder:
            return self._decoder.chunk(place)[tuple(map(slice, box_shape(box)))]
        return np.asarray(self._array.get_basic_selection(box))

    def _copy(self, place: tuple[int, ...], box: Box, part: npt.NDArray[Any]) -> None:
        """Fill what the part of the array has in common with the chunk."""
        of_part, of_chunk = overlap(box, place, self._chunk)
        to = part[of_part]
        to[...] = self._cache.get(place, partial(self._load, place), to.nbytes)[of_chunk]


class _Decoder:
    """Reads and decodes a chunk in the thread that asks for it.

    zarr itself hands each on to two threads of its own, which costs as much as decoding a small one does.
    """

    def __init__(self, array: zarr.Array[Any]) -> None:
        asynchronous: Any = array.async_array
        self._store = array.store_path
        self._key = array.metadata.encode_chunk_key
        self._prototype = default_buffer_prototype()
        self._spec = asynchronous.metadata.get_chunk_spec(
            (0,) * array.ndim, asynchronous.config, self._prototype
        )
        self._fill = np.broadcast_to(np.asarray(array.fill_value, array.dtype), array.chunks)
        pipeline = asynchronous.codec_pipeline
        codecs = (*pipeline.array_array_codecs, pipeline.array_bytes_codec, *pipeline.bytes_bytes_codecs)
        self._decoders = [codec._decode_sync for codec in reversed(codecs)]
        self._plain = len(codecs) == 1 + len(pipeline.bytes_bytes_codecs)

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> _Decoder | None:
        """None where the store, the format or this zarr has no such way."""
        if array.metadata.zarr_format != 3 or array.shards or not isinstance(array.store, LocalStore):
            return None
        try:
            decoder = cls(array)
        except (AttributeError, TypeError):
            return None
        return decoder if decoder._plain and hasattr(array.store_path, "get_sync") else None

    def chunk(self, place: tuple[int, ...]) -> npt.NDArray[Any]:
        """The elements of the chunk at that place of the grid, with those beyond the array's edge."""
        data: Any = (self._store / self._key(place)).get_sync(prototype=self._prototype)
        if data is None:
            return self._fill
        for decode in self._decoders:
            data = decode(data, self._spec)
        return np.asarray(data.as_ndarray_like())


def open_zarr(
    store: Any,
    path: str | None = None,
    *,
    mode: Mode = "r",
    storage_options: dict[str, Any] | None = None,
    cache_bytes: int | None = None,
    **options: Any,
) -> LazyArray:
    """A zarr array as a lazy array: its chunks are fetched and decoded when they are touched.

    The array is in C order, whatever the order inside the chunks, and has the store's shape and dtype, byte
    order included. A chunk that the store does not have is the fill value, as in zarr.

    Args:
        store: what zarr opens (a path, a URL of fsspec's, a zarr store), or an open zarr.Array. The pager
            opens it anew. Of a MemoryStore it has a copy, made now.
        path: of the array in the store.
        mode: as for `lazy_array`. "r+": changes go through zarr, which reads and writes whole chunks.
        storage_options: of the URL's filesystem.
        cache_bytes: bytes of chunks, of which only a part was asked for so far, that the pager keeps; None:
            256 MiB, or half as much again as a scan of the array needs.
        options: of `lazy_array`, and through it of the `Pager`: `workers` are the requests at a time, by
            default 8, and for files one more than there are processors.

    Raises what zarr raises when it opens the array; SourceError for variable-length strings and objects, for
    stores that another process cannot see, and for "r+" on those that it cannot change.
    """
    zarr_format: Literal[2, 3] | None = None
    if isinstance(store, zarr.Array):
        zarr_format = store.metadata.zarr_format
        store = store.store_path
    if isinstance(store, StorePath):
        store, path = store.store, "/".join(filter(None, (store.path, path)))
    if isinstance(store, str | os.PathLike):
        store = os.fspath(store)
        if "://" not in store and "::" not in store:
            store = os.path.abspath(store)  # the pager may be in another folder
    how: Literal["r", "r+"] = "r+" if mode == "r+" else "r"
    array = _open(store, path, how, zarr_format, storage_options)
    dtype = _plain(array)
    if array.nbytes == 0:
        of_array: Any = {k: v for k, v in options.items() if k not in PagerOptions.__annotations__}
        return lazy_array(Zero(), array.shape, dtype, mode=mode, **of_array)
    if cache_bytes is None:
        cache_bytes = cache_bytes_for(array)
    if isinstance(array.store, LocalStore):
        options.setdefault("workers", len(os.sched_getaffinity(0)) + 1)  # what they do is decoding
    factory = partial(
        ZarrSource,
        store if isinstance(store, str) else _for_another_process(array.store),
        path,
        mode=how,
        zarr_format=array.metadata.zarr_format,
        storage_options=storage_options,
        cache_bytes=cache_bytes,
        expected=(array.shape, dtype),
    )
    _check_reach(array.store, how)
    return lazy_array(factory, array.shape, dtype, mode=mode, cache_bytes=cache_bytes, **options)


def cache_bytes_for(array: zarr.Array[Any]) -> int:
    """Bytes of decoded chunks that a scan in C order needs to have each decoded once, and some more."""
    axis = next((k for k, n in enumerate(array.chunks) if min(n, array.shape[k]) > 1), 0)
    band = math.prod((*array.chunks[axis : axis + 1], *array.shape[axis + 1 :])) * array.dtype.itemsize
    return max(_CACHE_BYTES, band * 3 // 2)


def _open(
    store: Any,
    path: str | None,
    mode: Literal["r", "r+"],
    zarr_format: Literal[2, 3] | None,
    storage_options: dict[str, Any] | None,
) -> zarr.Array[Any]:
    try:
        return zarr.open_array(
            store, path=path or "", mode=mode, zarr_format=zarr_format, storage_options=storage_options
        )
    except ModuleNotFoundError as error:
        if error.name != "fsspec":
            raise
        raise ModuleNotFoundError(
            "open_zarr of a URL needs fsspec: pip install 'userfault[zarr,fsspec]'", name="fsspec"
        ) from None


def _plain(array: zarr.Array[Any]) -> np.dtype[Any]:
    """The dtype of its elements, which are plain bytes."""
    dtype: np.dtype[Any] = array.dtype
    if dtype.hasobject:
        raise SourceError(
            f"{array.store_path} holds {dtype}, whose elements have no fixed size: read it with zarr"
        )
    return dtype


def _check_reach(store: Any, mode: Literal["r", "r+"]) -> None:
    """Raise SourceError for what the pager, another process, cannot see or change."""
    while isinstance(store, WrapperStore):
        store = store._store
    if isinstance(store, FsspecStore) and _is_memory(store.fs):
        raise SourceError(
            f"{store} lives in this process, the pager cannot see it: use a zarr.storage.MemoryStore, of "
            "which it gets a copy, or a folder"
        )
    if mode == "r+" and isinstance(store, MemoryStore):
        raise SourceError(
            f'{store} lives in this process, the pager would change a copy of it: use mode="c", or a folder'
        )
    if mode == "r+" and isinstance(store, ZipStore):
        raise SourceError(f"{store}: a zip file has its directory only when it is closed: use a folder")


def _is_memory(filesystem: Any) -> bool:
    from fsspec.implementations.memory import MemoryFileSystem

    return isinstance(getattr(filesystem, "sync_fs", filesystem), MemoryFileSystem)


def _for_another_process(store: Any) -> Any:
    return str(store.root.absolute()) if isinstance(store, LocalStore) else store


def _lie_in_order(shape: tuple[int, ...], chunk: tuple[int, ...]) -> bool:
    """Whether the chunks are, one after the other, runs of the array's elements."""
    axis = next((k for k, n in enumerate(chunk) if n > 1), len(chunk) - 1)
    if chunk[axis + 1 :] != shape[axis + 1 :]:
        return False
    return math.prod(shape[:axis]) == 1 or shape[axis] % chunk[axis] == 0


def _chunk_bytes(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int, straight: bool) -> int:
    """What is asked for together: a chunk, or so much that one row of a chunk is not asked for twice."""
    if straight:
        return math.prod(chunk) * itemsize
    run = itemsize
    for size, end in zip(reversed(chunk), reversed(shape), strict=True):
        run *= size
        if size < end:
            break
    return max(PAGE_SIZE, 1 << (run.bit_length() - 1))
