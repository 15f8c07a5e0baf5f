"""Arrays in the formats and places that have many of them: zarr, whatever fsspec reaches, .npy files.

Each needs its own libraries, and is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from userfault.stores.fsspec import open_fsspec
    from userfault.stores.npy import open_npy
    from userfault.stores.zarr import open_zarr

__all__ = ["open_fsspec", "open_npy", "open_zarr"]

_HOME = {"open_fsspec": "fsspec", "open_npy": "npy", "open_zarr": "zarr"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
