"""The storm: lazy arrays of all kinds in one small Budget, and threads that do everything to them at once.

Each array of uint64 has a model in ordinary memory. Of what is written to, every eighth word belongs to one
of the eight threads, which alone writes it, and so knows what it must read. In the end, and whenever an array
is closed, its source is compared with the model, and in the end and now and then all of the array.

    python tests/lazy_storm.py --seconds 60 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import userfault as uf
from userfault.lazy import Mode

PAGE = uf.PAGE_SIZE
WORDS = PAGE // 8
THREADS = 8
LIMIT = 2 << 20
PAGES = 300
OFFSET = 5 * PAGE + 40  # where an array begins in its source
N_WORDS = PAGES * WORDS - 77
PRIVATE_PAGES = 16  # of an array in mode "c" that are written to: changes have nowhere to go
STALLED = 120

NATIVE = """
#include <stdint.h>
#include <string.h>
#include <unistd.h>
int fill(void *ctx, uint64_t offset, void *dst, size_t length)
{
    usleep(offset / 4096 % 7 * 20);
    memcpy(dst, (char *)ctx + offset, length);
    return 0;
}
int put(void *ctx, uint64_t offset, const void *src, size_t length)
{
    usleep(offset / 4096 % 5 * 40);
    memcpy((char *)ctx + offset, src, length);
    return 0;
}
"""


class Slot:
    """A place for one array at a time, which is opened anew when it was closed."""

    def __init__(
        self, name: str, mode: Mode, content: np.ndarray, source: Any, stored: Callable[[], bytes] | None
    ) -> None:
        self.name, self.mode, self.source, self.stored = name, mode, source, stored
        self.content = content  # of the whole source; where it is written back, what it must be
        self.model = content[OFFSET // 8 :][:N_WORDS]
        if mode == "c":
            self.model = self.model.copy()
        self.writable = {"r": 0, "c": PRIVATE_PAGES * WORDS, "r+": N_WORDS}[mode]
        self.array: Any = None
        self.users = 0
        self.changing = False
        self.ready = threading.Condition()

    def open(self, choose: random.Random, budget: uf.Budget) -> None:
        if self.mode == "c":
            self.model[:] = self.content[OFFSET // 8 :][:N_WORDS]
        self.array = uf.lazy_array(
            self.source,
            N_WORDS,
            np.uint64,
            mode=self.mode,
            offset=OFFSET,
            page_bytes=choose.choice((1, 1, 4, 16)) * PAGE,
            readahead=choose.choice((0, 5, "adaptive")),
            memory_limit=budget,
            placement=choose.choice(("spin", "any")),
        )

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Nobody closes the array meanwhile. Whoever uses it lets go of it before."""
        with self.ready:
            self.ready.wait_for(lambda: not self.changing)
            self.users += 1
        try:
            yield
        finally:
            with self.ready:
                self.users -= 1
                self.ready.notify_all()

    def reopen(self, choose: random.Random, budget: uf.Budget) -> None:
        with self.ready:
            if self.changing:
                return
            self.changing = True
            self.ready.wait_for(lambda: self.users == 0)
        try:
            self.end(choose)
            self.open(choose, budget)
        finally:
            with self.ready:
                self.changing = False
                self.ready.notify_all()

    def end(self, choose: random.Random) -> None:
        """Close it, or drop the last view of it, which may be an ordinary array or a memoryview."""
        if choose.random() < 0.3:
            assert (self.array == self.model).all(), f"{self.name} before its end"
        how = choose.randrange(4)
        if how == 0:
            self.array.close()
        elif how == 1:
            self.array = memoryview(self.array)[3:9]
        elif how == 2:
            self.array = np.asarray(self.array)[-1:]
        self.array = None
        if choose.random() < 0.2:
            gc.collect()
        self.compare_stored()

    def compare_stored(self) -> None:
        if self.stored is not None:
            there = np.frombuffer(self.stored(), np.uint64)
            wrong = np.flatnonzero(there != self.content)
            assert not len(wrong), f"{self.name}: its source has {len(wrong)} wrong words, first {wrong[:5]}"


def slots(folder: Path, seed: int) -> list[Slot]:
    """One of each kind."""
    rng = np.random.default_rng(seed)
    total = OFFSET // 8 + N_WORDS + 200
    made = []

    def add(name: str, mode: Mode, content: np.ndarray, source: Any, stored: Any = None) -> None:
        made.append(Slot(f"{name} {mode}", mode, content, source, stored))

    def fresh() -> np.ndarray:
        return rng.integers(1, 1 << 62, total, dtype=np.uint64)

    pattern = uf.sources.Pattern(seed)
    add("Pattern", "r", pattern.expected(0, total * 8).view(np.uint64), pattern)
    add("Zero", "c", np.zeros(total, np.uint64), uf.sources.Zero())
    modes: tuple[Mode, ...] = ("r", "c", "r+")
    for mode in modes:
        content = fresh()
        path = folder / f"file {mode}"
        path.write_bytes(content.tobytes())
        # Mode "c" must not write to what can be written to.
        add("File", mode, content, uf.sources.File(path, writable=mode != "r"), path.read_bytes)
        content = fresh()
        memory = content.copy()
        add("Buffer", mode, content, uf.sources.Buffer(memory), memory.tobytes)
    library = folder / "native.so"
    if shutil.which("cc"):
        (folder / "native.c").write_text(NATIVE)
        line = ["cc", "-shared", "-fPIC", "-o", str(library), str(folder / "native.c")]
        subprocess.run(line, check=True, timeout=100)
        native = ctypes.CDLL(str(library))
        for mode in modes:
            content = fresh()
            memory = content.copy()
            source = uf.sources.Native(native.fill, memory, memory.nbytes, write=native.put)
            add("Native", mode, content, source, memory.tobytes)
    return made


class Storm:
    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.budget = uf.Budget(LIMIT)
        self.slots = slots(folder, seed)
        self.done: Counter[str] = Counter()
        self.most_used = 0
        self.errors: list[str] = []
        self.until = 0.0
        choose = random.Random(seed)
        for slot in self.slots:
            slot.open(choose, self.budget)

    def run(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds
        threads = [threading.Thread(target=self.work, args=(i,), daemon=True) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + STALLED)
            if thread.is_alive():
                faulthandler.dump_traceback()
                raise SystemExit("it hangs")
        if self.errors:
            raise SystemExit("\n".join(self.errors))
        for slot in self.slots:
            self.finish(slot)

    def finish(self, slot: Slot) -> None:
        for _ in range(2):
            assert (slot.array == slot.model).all(), f"{slot.name} at the end"
            slot.array.flush()
            slot.compare_stored()
            slot.array.evict()
        slot.array.close()
        slot.compare_stored()
        # All that it had counted is gone with it.
        slot.array = None

    def work(self, number: int) -> None:
        choose = random.Random(f"{self.seed} {number}")
        operations: list[Callable[..., None]] = [self.read, self.write] * 8 + [self.read_own] * 6
        operations += [self.write_by_call] * 2
        operations += [self.evict, self.flush, self.prefetch] * 2 + [self.look, self.reopen]
        try:
            pipe = os.pipe()
            while time.monotonic() < self.until and not self.errors:
                operation = choose.choice(operations)
                slot = choose.choice(self.slots)
                if operation == self.reopen:
                    slot.reopen(choose, self.budget)
                else:
                    with slot.used():
                        if slot.array is None:
                            break  # another thread found an error
                        operation(slot, slot.array, choose, number, pipe)
                self.done[operation.__name__] += 1
                self.most_used = max(self.most_used, self.budget.used)
        except BaseException:
            self.errors.append(f"thread {number}:\n{traceback.format_exc()}")

    @staticmethod
    def part(choose: random.Random, n: int = N_WORDS) -> slice:
        length = min(n, choose.choice((1, 100, 2000, 20000)))
        start = choose.randrange(n - length + 1)
        return slice(start, start + length)

    def reopen(self, *_: Any) -> None:
        """Done by `work`, which may not use the array then."""

    def read(self, slot: Slot, array: Any, choose: random.Random, number: int, pipe: tuple[int, int]) -> None:
        """What nobody writes to, all of it; what others write to, only that it can be had."""
        where = self.part(choose)
        got = np.array(array[where])
        if not slot.writable:
            assert (got == slot.model[where]).all(), f"{slot.name} {where}"

    def own(self, slot: Slot, choose: random.Random, number: int) -> slice:
        """Some of the words that only this thread writes."""
        where = self.part(choose, slot.writable or N_WORDS)
        return slice(where.start + (number - where.start) % THREADS, where.stop, THREADS)

    def read_own(
        self, slot: Slot, array: Any, choose: random.Random, number: int, pipe: tuple[int, int]
    ) -> None:
        where = self.own(slot, choose, number)
        got = np.array(array[where])
        wrong = np.flatnonzero(got != slot.model[where])
        assert not len(wrong), f"{slot.name} {where}: {len(wrong)} wrong words, first {wrong[:5]}"

    def write(
        self, slot: Slot, array: Any, choose: random.Random, number: int, pipe: tuple[int, int]
    ) -> None:
        if slot.writable:
            where = self.own(slot, choose, number)
            values = np.arange(len(range(*where.indices(N_WORDS))), dtype=np.uint64)
            values += np.uint64(choose.getrandbits(60))
            array[where] = values
            slot.model[where] = values
            if slot.mode == "r+" and choose.random() < 0.1:
                # What was written before this began is there when it is done.
                array.flush(fsync=False)
                if slot.stored is not None:
                    stored = np.frombuffer(slot.stored(), np.uint64)[OFFSET // 8 :][where]
                    assert (stored == values).all(), f"{slot.name} {where} after a flush"

    def write_by_call(
        self, slot: Slot, array: Any, choose: random.Random, number: int, pipe: tuple[int, int]
    ) -> None:
        if slot.writable:
            at = choose.randrange(slot.writable // THREADS) * THREADS + number
            value = choose.getrandbits(60)
            os.write(pipe[1], value.to_bytes(8, "little"))
            assert os.readv(pipe[0], [memoryview(array[at : at + 1])]) == 8
            slot.model[at] = value

    def evict(self, slot: Slot, array: Any, choose: random.Random, *_: Any) -> None:
        array.evict(... if choose.random() < 0.1 else self.part(choose))

    def flush(self, slot: Slot, array: Any, choose: random.Random, *_: Any) -> None:
        array.flush(fsync=choose.random() < 0.2)

    def prefetch(self, slot: Slot, array: Any, choose: random.Random, *_: Any) -> None:
        with contextlib.suppress(uf.LimitError):
            array.prefetch(self.part(choose))

    def look(self, slot: Slot, array: Any, choose: random.Random, *_: Any) -> None:
        assert array.resident.shape == array.dirty.shape
        array.stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)
    faulthandler.dump_traceback_later(options.seconds + 2 * STALLED, exit=True)
    with tempfile.TemporaryDirectory() as folder:
        storm = Storm(Path(folder), options.seed)
        storm.run(options.seconds)
        told = {
            "seed": options.seed,
            "operations": dict(storm.done),
            "most_used": storm.most_used,
            "used": storm.budget.used,
        }
    print(json.dumps(told))
    assert storm.budget.used == 0, "all arrays are closed"
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
