from typing import Final, Self

import numpy as np
import numpy.typing as npt

from userfault._budget import Budget
from userfault._source import Source

LATENCY_BUCKETS: Final[int]
REGION_STATS_DTYPE: Final[np.dtype[np.void]]

class Served:
    def __new__(
        cls,
        source: Source,
        region: int,
        n_pages: int,
        unit: int,
        readahead: int,
        huge: bool,
        start: int = 0,
    ) -> Self: ...
    @property
    def source(self) -> Source: ...
    @property
    def resident(self) -> npt.NDArray[np.bool_]: ...
    @property
    def may_wait(self) -> bool: ...
    @property
    def budget(self) -> Budget | None: ...
    @property
    def changed(self) -> npt.NDArray[np.bool_]: ...
    def hold_to(
        self,
        budget: Budget,
        base: int,
        fd: int,
        written: bool,
        first_byte: int,
        end_byte: int,
        patience: float,
        name: bytes,
    ) -> None: ...
    def leave_budget(self) -> None: ...
    def advance(self, first: int, end: int) -> int: ...
    def fill(self, first: int, end: int) -> None: ...
    def resync(self, pagemap: int, base: int, first: int, end: int) -> bool: ...
    def take_errors(self) -> tuple[int, int]: ...
    def count(self, first: int, end: int) -> tuple[int, int]: ...
    def missing(self, firsts: npt.NDArray[np.uint64], ends: npt.NDArray[np.uint64]) -> int: ...
    def stats(self) -> np.void: ...
