"""`open_fsspec`: the bytes of whatever fsspec reaches, by ranges, as lazy arrays."""

from __future__ import annotations

import contextlib
import os
import threading
from functools import partial
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from userfault._source import Buffer, File
from userfault.errors import SourceError
from userfault.lazy import LazyArray, Mode, lazy_array

try:
    import fsspec
    from fsspec.utils import get_protocol
except ModuleNotFoundError as error:
    if error.name != "fsspec":
        raise
    raise ModuleNotFoundError(
        "open_fsspec needs fsspec: pip install 'userfault[fsspec]'", name="fsspec"
    ) from None

_CHUNK_BYTES = 1 << 20
_PRECONDITION_FAILED = 412


class FsspecSource:
    """A remote object's bytes, one request for each range. For the pager's process, whose threads share it.

    Args:
        url, storage_options: as for fsspec.open.
        chunk_bytes: what is asked for together.

    Raises what the filesystem raises, SourceError when it does not tell the size or has no ranges.
    """

    def __init__(
        self, url: str, *, chunk_bytes: int = _CHUNK_BYTES, storage_options: dict[str, Any] | None = None
    ) -> None:
        self._url = url
        self._filesystem, self._path = fsspec.url_to_fs(url, **(storage_options or {}))
        info = self._filesystem.info(self._path)
        if info.get("size") is None:
            raise SourceError(f"{url}: its server does not tell its size")
        self.nbytes = int(info["size"])
        self.chunk_bytes = chunk_bytes
        # What runs on fsspec's event loop may be called by several threads; of others nobody says so.
        self._one_at_a_time: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if self._filesystem.async_impl else threading.Lock()
        )
        self._request: dict[str, Any] = {}
        if "http" in _protocols(self._filesystem):
            self._request["headers"] = self._headers(info.get("ETag", ""))
            self._try_range(info)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the object's bytes from `offset` on. SourceError when it was changed."""
        end = offset + len(buffer)
        try:
            with self._one_at_a_time:
                data = self._filesystem.cat_file(self._path, offset, end, **self._request)
        except Exception as error:
            if getattr(error, "status", None) == _PRECONDITION_FAILED:
                raise SourceError(f"{self._url} was changed since it was opened") from error
            raise
        if len(data) != len(buffer):
            raise SourceError(
                f"{self._url} gave {len(data)} bytes for bytes {offset} to {end}: was it changed meanwhile?"
            )
        buffer[:] = data

    def _headers(self, etag: str) -> dict[str, str]:
        """Of each request: those of the user, no compression, and only if it is still the same object."""
        headers = {**self._filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        if etag and not etag.startswith("W/"):  # a weak one matches nothing
            headers["If-Match"] = etag
        return headers

    def _try_range(self, info: dict[str, Any]) -> None:
        """Ask for the last byte: a server that has no ranges would send everything each time."""
        if not self.nbytes:
            return
        try:
            if info.get("partial") is False:
                raise ValueError("it says so")
            with self._filesystem.open(
                self._path, cache_type="none", size=self.nbytes, **self._request
            ) as file:
                file.seek(self.nbytes - 1)
                last = file.read(1)
        except ValueError as error:
            raise SourceError(f"{self._url}: its server does not do ranges ({error}): download it") from error
        if len(last) != 1:
            raise SourceError(f"{self._url}: its server gave {len(last)} bytes for a range of one")


def _protocols(filesystem: Any) -> tuple[str, ...]:
    names = filesystem.protocol
    return (names,) if isinstance(names, str) else tuple(names)


def open_fsspec(
    url: str | os.PathLike[str],
    shape: SupportsIndex | tuple[SupportsIndex, ...] | None = None,
    dtype: npt.DTypeLike = np.uint8,
    *,
    offset: int = 0,
    chunk_bytes: int = _CHUNK_BYTES,
    storage_options: dict[str, Any] | None = None,
    mode: Mode = "r",
    **options: Any,
) -> LazyArray:
    """The bytes of whatever fsspec reaches (HTTP, S3, …) as a lazy array: ranges come when they are touched.

    Files on this machine and memory:// are served in this process, all else by a pager.

    Args:
        url, storage_options: as for fsspec.open.
        shape, dtype, offset: which bytes it is, as for `lazy_array`.
        chunk_bytes: what is asked for together, from the object's first byte on; neighbours in one request.
        mode: as for `lazy_array`; "r+" for files and memory:// only.
        options: of `lazy_array`, and through it of the `Pager`: `workers` are the requests at a time.

    Raises SourceError for "r+" elsewhere, for a server that does not tell the size or has no ranges. An HTTP
    object with a strong ETag may not change while it is open: what is missing cannot be read then.
    """
    url = os.fspath(url)
    where = get_protocol(url)
    if where in ("file", "local", "memory"):
        return lazy_array(
            _here(url, where, mode, storage_options), shape, dtype, offset=offset, mode=mode, **options
        )
    if mode == "r+":
        raise SourceError(f'{url} cannot be written to by ranges: use mode="c", or a file')
    factory = partial(FsspecSource, url, chunk_bytes=chunk_bytes, storage_options=storage_options)
    return lazy_array(factory, shape, dtype, offset=offset, mode=mode, **options)


def _here(url: str, where: str, mode: Mode, storage_options: dict[str, Any] | None) -> File | Buffer:
    """What needs no pager."""
    filesystem, path = fsspec.url_to_fs(url, **(storage_options or {}))
    if where != "memory":
        return File(path, writable=mode == "r+")
    return Buffer(filesystem.open(path).getbuffer())
