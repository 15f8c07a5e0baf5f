from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

def touch(memory: Buffer | npt.NDArray[Any], offsets: npt.NDArray[np.uint64]) -> int: ...
