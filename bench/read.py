"""EventReader.read() beside a C loop over the same descriptor, and beside os.read + struct.iter_unpack."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import rivals
import userfault as uf
from compare import Row, argument_parser, show, take_turns
from sources import Crowd, Pipe
from userfault._consts import DTYPES

WIRES = ("v1", "v2", "msg")
PIPE_BATCHES = (1, 8, 64, 512, 4096)
UFFD_BATCHES = (1, 8, 64, 512, 1024)
UFFD_PENDING = 1024
FORMATS = {"v1": "<Q", "v2": "<QQ", "msg": "<B7xQQI4x"}
ADDRESS_FIELD = {"v1": 0, "v2": 1, "msg": 2}


class Contender(Protocol):
    """Reads records in calls of one batch each, from a descriptor where they are pending."""

    def drain(self, calls: int) -> None: ...

    def addresses(self) -> list[int]:
        """The addresses in the records of the last call."""


class Reader:
    """Ours."""

    def __init__(self, fd: int, api: str, batch: int) -> None:
        self.reader = uf.EventReader(fd, capacity=batch, api=api)
        self.records: npt.NDArray[np.void] = np.zeros(0, DTYPES[api])

    def drain(self, calls: int) -> None:
        read, records = self.reader.read, self.records
        for _ in range(calls):
            records = read(0)
        self.records = records

    def addresses(self) -> list[int]:
        addresses: list[int] = uf.as_v2(self.records)["arg"].tolist()
        return addresses


class CLoop:
    """read(2) in C, into page-aligned memory, which the kernel copies to the fastest."""

    def __init__(self, fd: int, api: str, batch: int) -> None:
        self.fd = fd
        self.read_loop = rivals.library().read_loop
        self.bytes = batch * DTYPES[api].itemsize
        self.records = np.frombuffer(mmap.mmap(-1, self.bytes), DTYPES[api])
        self.address = self.records.ctypes.data

    def drain(self, calls: int) -> None:
        if self.read_loop(self.fd, self.address, self.bytes, calls) != calls * self.bytes:
            raise RuntimeError("the C loop came up short")

    def addresses(self) -> list[int]:
        addresses: list[int] = uf.as_v2(self.records)["arg"].tolist()
        return addresses


class Struct:
    """os.read and struct.iter_unpack: every record becomes a tuple."""

    def __init__(self, fd: int, api: str, batch: int) -> None:
        self.fd = fd
        self.format = struct.Struct(FORMATS[api])
        self.bytes = self.format.size * batch
        self.address = ADDRESS_FIELD[api]
        self.records: list[tuple[Any, ...]] = []

    def drain(self, calls: int) -> None:
        read, unpack, fd, size = os.read, self.format.iter_unpack, self.fd, self.bytes
        records = self.records
        for _ in range(calls):
            records = list(unpack(read(fd, size)))
        self.records = records

    def addresses(self) -> list[int]:
        return [record[self.address] for record in self.records]


CONTENDERS: dict[str, Callable[[int, str, int], Contender]] = {"ours": Reader, "c": CLoop, "struct": Struct}


def compare(source: Pipe | Crowd, batch: int, calls: int, rounds: int) -> Row:
    """Nanoseconds a call of each contender (the best round), and how far ours is from the C loop."""
    contenders = {name: make(source.fd, source.api, batch) for name, make in CONTENDERS.items()}

    def drain(name: str) -> Callable[[], None]:
        return lambda: contenders[name].drain(calls)

    result = take_turns({name: drain(name) for name in contenders}, rounds, source.refill)
    row: Row = {"source": type(source).__name__.lower(), "api": source.api, "batch": batch}
    row |= {f"{name}_ns": result.best(name) / calls * 1e9 for name in contenders}
    row["ours_ns_per_record"] = row["ours_ns"] / batch
    row["above_c_ns"] = row["ours_ns"] - row["c_ns"]
    row["median_above_c_ns"] = (result.median("ours") - result.median("c")) / calls * 1e9
    row["ours_to_c"] = result.ratio_of_bests("ours", "c")
    row["median_ours_to_c"] = result.median_of_ratios("ours", "c")
    row["struct_to_ours"] = result.ratio_of_bests("struct", "ours")
    return row


def measure(rounds: int, wires: Sequence[str] = WIRES, batches: Sequence[int] = PIPE_BATCHES) -> list[Row]:
    """Every wire and batch over a pipe, then those wires that the kernel speaks on a userfaultfd.

    There 1,024 faults are pending, or one batch when that has more.
    """
    rows = []
    for api in wires:
        for batch in batches:
            with Pipe(api, batch) as pipe:
                rows.append(compare(pipe, batch, pipe.calls, rounds) | {"pending": pipe.addresses.size})
    spoken = uf.probe().apis
    for api in (api for api in wires if api in spoken):
        for threads in sorted({max(UFFD_PENDING, batch) for batch in batches}):
            with Crowd(threads, api) as crowd:
                for batch in (batch for batch in batches if max(UFFD_PENDING, batch) == threads):
                    row = compare(crowd, batch, threads // batch, rounds)
                    rows.append(row | {"pending": threads // batch * batch})
    return rows


if __name__ == "__main__":
    parser = argument_parser(__doc__, rounds=50)
    parser.add_argument("--wires", default=",".join(WIRES), help="default: %(default)s")
    parser.add_argument(
        "--batches", default=",".join(map(str, PIPE_BATCHES)), help="records a call; default: %(default)s"
    )
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    show(measure(options.rounds, options.wires.split(","), batches), options.json)
