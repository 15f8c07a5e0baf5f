"""What a service counted: sums over its shards, and percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def total(stats: Sequence[Any]) -> np.void:
    """The sum of several `FaultService.stats()`."""
    result: np.void = stats[0].copy()
    for more in stats[1:]:
        for name in result.dtype.names or ():
            if name == "latency":
                result[name]["count"] += more[name]["count"]
            else:
                result[name] += more[name]
    return result


def latency_percentile(stats: Any, percent: float) -> float:
    """Nanoseconds within which `percent` % of the faults of `FaultService.stats()` were resolved.

    Exact to the bucket, an eighth of an octave; its upper end is returned. NaN when nothing was served.
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"a percentage is between 0 and 100, not {percent}")
    latency = stats["latency"]
    reached = np.cumsum(latency["count"])
    if reached[-1] == 0:
        return float("nan")
    bucket = int(np.searchsorted(reached, max(1, np.ceil(reached[-1] * percent / 100))))
    return float(latency["from_ns"][min(bucket + 1, len(latency) - 1)])
