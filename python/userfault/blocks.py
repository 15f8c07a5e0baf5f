"""`as_dask`: a dask array whose blocks are parts of a lazy array."""

from __future__ import annotations

import contextlib
import pickle
import threading
import uuid
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from userfault.errors import LimitError

if TYPE_CHECKING:
    from userfault.lazy import LazyArray

_opening = threading.Lock()


class _Blocks:
    """What dask slices: a part is brought in one go when its task runs, and is not copied.

    In another process it opens an array of its own; the last 8 stay open there for the tasks to come.
    """

    def __init__(self, array: LazyArray, name: str) -> None:
        self._array = array
        self._name = name
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        # More than a memory limit comes piece by piece, when it is touched.
        with contextlib.suppress(LimitError):
            self._array.prefetch(key)
        return np.asarray(self._array[key])

    def __reduce__(self) -> Any:
        return _opened, (self._name, pickle.dumps(self._array))


def _opened(name: str, recipe: bytes) -> _Blocks:
    with _opening:  # threads of one process ask for the same one
        return _open(name, recipe)


@lru_cache(maxsize=8)
def _open(name: str, recipe: bytes) -> _Blocks:
    return _Blocks(pickle.loads(recipe), name)


def as_dask(array: LazyArray, chunks: Any) -> Any:
    """What `LazyArray.to_dask` says."""
    try:
        import dask.array
    except ModuleNotFoundError:
        raise ModuleNotFoundError("to_dask needs dask: pip install 'userfault[dask]'", name="dask") from None
    array._lazy().check()
    # A name of its own: dask's would be a hash of all the bytes.
    name = f"lazy-{uuid.uuid4().hex}"
    from_array: Any = dask.array.from_array
    return from_array(
        _Blocks(array, name), chunks, name=name, asarray=True, meta=np.empty((0,) * array.ndim, array.dtype)
    )
