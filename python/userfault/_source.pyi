from typing import Any

import numpy.typing as npt
from _typeshed import StrOrBytesPath
from typing_extensions import Buffer as SupportsBuffer

class Source:
    @property
    def nbytes(self) -> int: ...

class Zero(Source): ...

class Buffer(Source):
    def __init__(self, data: SupportsBuffer | npt.NDArray[Any]) -> None: ...
    def overlaps(self, start: int, end: int) -> bool: ...

class File(Source):
    def __init__(self, path: StrOrBytesPath, offset: int = 0) -> None: ...

def refuse_live_buffers(start: int, end: int) -> None: ...
