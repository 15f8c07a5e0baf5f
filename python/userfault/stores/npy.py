"""`open_npy`: numpy's .npy files as lazy arrays."""

from __future__ import annotations

import ast
import os
import struct
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.lib import format as npy

from userfault._source import File
from userfault.errors import SourceError
from userfault.lazy import LazyArray, Mode, lazy_array

_LONGEST_HEADER = 10_000  # as numpy's: parsing a longer one may exhaust the memory

Layout = tuple[tuple[int, ...], np.dtype[Any], Literal["C", "F"], int]


def open_npy(
    path_or_url: str | os.PathLike[str],
    *,
    mode: Mode = "r",
    storage_options: dict[str, Any] | None = None,
    **options: Any,
) -> LazyArray:
    """The array of a .npy file as a lazy array: a file on this machine in place, a URL's by ranges.

    Args:
        path_or_url: a path, or a URL of fsspec's.
        mode: as for `lazy_array`.
        storage_options: of the URL's filesystem.
        options: of `lazy_array`; for a URL also of `open_fsspec`.

    Raises ValueError when it is no .npy file, SourceError when it holds Python objects, and what `lazy_array`
    and `open_fsspec` raise.
    """
    name = os.fspath(path_or_url)
    if "://" not in name and "::" not in name:
        with open(name, "rb") as file:
            shape, dtype, order, offset = _header(file, name)
        source = File(name, writable=mode == "r+")
        return lazy_array(source, shape, dtype, order, mode=mode, offset=offset, **options)
    try:
        import fsspec
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "open_npy of a URL needs fsspec: pip install 'userfault[fsspec]'", name="fsspec"
        ) from None
    from userfault.stores.fsspec import open_fsspec

    filesystem, path = fsspec.url_to_fs(name, **(storage_options or {}))
    with filesystem.open(path, block_size=1 << 16) as file:
        shape, dtype, order, offset = _header(file, name)
    return open_fsspec(
        name, shape, dtype, order=order, offset=offset, storage_options=storage_options, mode=mode, **options
    )


def _header(file: BinaryIO, name: str) -> Layout:
    """What a .npy file says of its array, and where that begins."""
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = npy.read_array_header_2_0(file)
    elif version == (3, 0):
        shape, fortran, dtype = _header_3_0(file)
    else:
        raise ValueError(f"{name}: version {version} of the .npy format is not known")
    if dtype.hasobject:
        raise SourceError(
            f"{name} holds Python objects ({dtype}), not bytes: numpy.load(…, allow_pickle=True)"
        )
    return shape, dtype, "F" if fortran else "C", file.tell()


def _header_3_0(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """As version 2.0, in UTF-8; numpy has no public function for it."""
    (length,) = struct.unpack("<I", file.read(4))
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header of {length} bytes is too long to be parsed safely")
    header = ast.literal_eval(file.read(length).decode())
    return header["shape"], header["fortran_order"], npy.descr_to_dtype(header["descr"])
