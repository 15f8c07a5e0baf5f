"""The least that a page source in Python can do. By itself, for the pager to import little."""

from __future__ import annotations

_PAGE = 4096


class Ones:
    """All bytes are 1."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.chunk_bytes = _PAGE
        self._page = b"\1" * _PAGE

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._page * (len(buffer) // _PAGE)
