"""RegionTable.lookup() and dispatch() beside numpy.searchsorted and beside bisect."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

import userfault as uf
from compare import Row, main, take_turns
from sources import page_faults

REGIONS = (1, 1_000, 100_000, 1_000_000)
ADDRESSES = 65_536

Ids = npt.NDArray[np.int64]


class Layout:
    """`n` regions of 1 to 16 pages, 0 to 8 pages apart, and random addresses over all of them.

    About two addresses of three are in a region. Region i is the i-th in address order, so that the number
    that searchsorted and bisect find is the id.
    """

    def __init__(self, n: int) -> None:
        random = np.random.default_rng(n)
        lengths = random.integers(1, 17, n) * uf.PAGE_SIZE
        gaps = random.integers(0, 9, n) * uf.PAGE_SIZE
        starts = (1 << 44) + np.cumsum(gaps + lengths) - lengths
        ends = starts + lengths
        self.addresses = random.integers(
            starts[0] - uf.PAGE_SIZE, ends[-1] + uf.PAGE_SIZE, ADDRESSES, dtype=np.uint64
        )
        self.records = page_faults("msg", self.addresses)
        self.starts = starts.astype(np.uint64)
        self.ends = ends.astype(np.uint64)
        self.table = uf.RegionTable()
        self.table.add_many(self.starts, lengths.astype(np.uint64))
        self.lists: list[list[int]] = [a.tolist() for a in (self.addresses, self.starts, self.ends)]

    def lookup_ours(self) -> Ids:
        return self.table.lookup(self.addresses)

    def lookup_searchsorted(self) -> Ids:
        found = self.starts.searchsorted(self.addresses, side="right") - 1
        # An address below the first region has found -1, which is the answer as well.
        return np.where(self.addresses < self.ends[found], found, -1)

    def lookup_bisect(self) -> list[int]:
        addresses, starts, ends = self.lists
        return [i if a < ends[i := bisect_right(starts, a) - 1] else -1 for a in addresses]

    def dispatch_ours(self) -> tuple[Ids, Ids]:
        return self.table.dispatch(self.records)

    def dispatch_searchsorted(self) -> tuple[Ids, Ids]:
        addresses = self.records["address"]
        found = self.starts.searchsorted(addresses, side="right") - 1
        held = (found >= 0) & (addresses < self.ends[found])
        offsets = (addresses - self.starts[found]).view(np.int64)
        return np.where(held, found, -1), np.where(held, offsets, -1)


def contenders(layout: Layout) -> dict[str, dict[str, Callable[[], object]]]:
    """By question: addresses to ids, and records to ids and offsets."""
    return {
        "lookup": {
            "ours": layout.lookup_ours,
            "searchsorted": layout.lookup_searchsorted,
            "bisect": layout.lookup_bisect,
        },
        "dispatch": {"ours": layout.dispatch_ours, "searchsorted": layout.dispatch_searchsorted},
    }


def measure(rounds: int) -> list[Row]:
    """Nanoseconds an address of each contender (the best round), and how many times faster ours is."""
    rows = []
    for n in REGIONS:
        for question, rivals in contenders(Layout(n)).items():
            result = take_turns(rivals, rounds)
            row: Row = {"question": question, "regions": n}
            for name in ("ours", "searchsorted", "bisect"):
                row[f"{name}_ns"] = result.best(name) / ADDRESSES * 1e9 if name in rivals else None
            row["searchsorted_to_ours"] = result.ratio_of_bests("searchsorted", "ours")
            row["median_searchsorted_to_ours"] = result.median_of_ratios("searchsorted", "ours")
            rows.append(row)
    return rows


if __name__ == "__main__":
    main(__doc__, measure, rounds=50)
