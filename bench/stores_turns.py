"""How stores.py measures: contenders take turns, and each says what it took, time and memory."""

from __future__ import annotations

import gc
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import userfault as uf
from compare import Comparison
from userfault.cli import machine


class Watch:
    """What one turn took: `seconds` of a contender in a case; `beside`: bytes of a helper process."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = {}
        self.beside = 0

    @contextmanager
    def timing(self, case: str, contender: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[case, contender] = time.perf_counter() - start


Turn = Callable[[Watch], None]


class Turns:
    """What all contenders took, each once a round."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._peaks: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))

    def note(self, watch: Watch, nbytes: int) -> None:
        for (case, contender), seconds in watch.seconds.items():
            self._seconds[case][contender].append(seconds)
            self._peaks[case][contender].append(nbytes)

    def of(self, case: str) -> Comparison:
        return Comparison({name: np.array(seconds) for name, seconds in self._seconds[case].items()})

    def peak(self, case: str, contender: str) -> float:
        """The bytes by which memory grew at the most: the median of the rounds."""
        return float(np.median(self._peaks[case][contender]))


def take_turns(contenders: Mapping[str, Turn], rounds: int, pretouch: int) -> Turns:
    """Every contender once a round, in shuffled order, with memory that the host need not hand out first."""
    shuffle = random.Random(0)
    turns = Turns()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in shuffle.sample(list(contenders), len(contenders)):
                gc.collect()
                touch(pretouch)
                watch = Watch()
                before = restart_peak()
                contenders[name](watch)
                turns.note(watch, peak() - before + watch.beside)
    finally:
        if collecting:
            gc.enable()
    return turns


def touch(nbytes: int) -> None:
    """Have so much memory, and give it back. A virtual machine tells its host of what has been free for some
    seconds, and having that again costs five times as much."""
    room = np.empty(min(nbytes, machine.memory()["MemAvailable"] // 2), np.uint8)
    room[:: uf.PAGE_SIZE] = 1


def restart_peak() -> int:
    """Count the peak from now on; the bytes of memory that the process has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _bytes("self", "VmRSS")


def peak(pid: int | str = "self") -> int:
    """The most bytes of memory that a process had."""
    return _bytes(pid, "VmHWM")


def _bytes(pid: int | str, field: str) -> int:
    return int(machine.fields(f"/proc/{pid}/status")[field].removesuffix(" kB")) << 10
