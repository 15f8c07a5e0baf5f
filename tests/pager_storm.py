"""The storm: pagers of sources that read and write are killed and stopped at any moment, under load.

Threads read an array of words that tell where they are, and let go of what they read. Others write to two
files through arrays with a memory limit, and know what must be in them. One file's source keeps what it is
given until a flush: where that says that changes were lost, they are made again. Every byte is checked.

    python tests/pager_storm.py --kills 200 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pagers
import userfault as uf
from pagers import PAGE, words

PAGES = 2048  # of each array
PART = 32 * PAGE  # what a writer changes at once
STALLED = 120
NEVER = 1_000_000


class File:
    """A file that one thread writes to."""

    def __init__(self, path: Path, buffers: bool) -> None:
        self.path, self.buffers = path, buffers
        path.write_bytes(words(0, PAGES * PAGE).tobytes())
        source = functools.partial(pagers.Store, str(path), buffers=buffers)
        # Many pagers are killed before they can give a page: that is no reason here to give up.
        self.array = uf.lazy_array(source, mode="r+", memory_limit=2 << 20, workers=2, restarts=NEVER)
        self.seeds = dict.fromkeys(range(0, PAGES * PAGE, PART), 0)
        self.unsure: set[int] = set()  # where a pager may have had changes that it had not made durable
        self.told = 0

    def check(self, data: Any, at: int) -> None:
        assert (data == words(at, PART, self.seeds[at])).all(), f"wrong bytes at {at} of {self.path}"

    def change(self, at: int) -> None:
        if at not in self.unsure:
            self.check(self.array[at : at + PART], at)
        self.seeds[at] += 1
        if self.buffers:
            self.unsure.add(at)
        self.array[at : at + PART] = words(at, PART, self.seeds[at])

    def flush(self) -> None:
        while True:
            try:
                self.array.flush()
            except OSError as error:
                if "not yet made durable" not in str(error):
                    raise
                self.told += 1
                for at in self.unsure:
                    self.array[at : at + PART] = words(at, PART, self.seeds[at])
            else:
                self.unsure.clear()
                return

    def check_file(self, at: int) -> None:
        with self.path.open("rb") as file:
            file.seek(at)
            self.check(np.frombuffer(file.read(PART), np.uint8), at)


class Storm:
    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.ending = threading.Event()
        self.read = uf.lazy_array(pagers.Words(PAGES * PAGE, 5 * PAGE + 8), workers=4, restarts=NEVER)
        self.files = [File(folder / "file", False), File(folder / "buffered", True)]
        self.arrays = [self.read, *(file.array for file in self.files)]
        self.pagers = [array._lazy().source for array in self.arrays]

    def choice(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def go_on(self, name: str, step: Callable[..., None], *about: object) -> threading.Thread:
        def run() -> None:
            choose = self.choice(name)
            try:
                while not self.ending.is_set():
                    step(choose, *about)
                    self.counts[step.__name__] += 1
            except BaseException:
                self.failures.append(f"{name}: {traceback.format_exc()}")
                self.ending.set()

        thread = threading.Thread(target=run, name=name)
        thread.start()
        return thread

    def reads(self, choose: random.Random) -> None:
        """A few pages, by touching them or asking for them; now and then many are let go of."""
        first, n = choose.randrange(PAGES - 64), choose.choice((1, 1, 8, 64))
        part = slice(first * PAGE, (first + n) * PAGE)
        if choose.random() < 0.2:
            self.read.prefetch(part)
        assert (self.read[part] == words(part.start, n * PAGE)).all(), f"wrong bytes in {part}"
        self.counts["bytes_checked"] += n * PAGE
        if choose.random() < 0.1:
            self.read.evict(slice(part.start, None))

    def writes(self, choose: random.Random, file: File) -> None:
        """A part; now and then all that is changed, which is in the file then."""
        file.change(choose.choice(list(file.seeds)))
        self.counts["bytes_checked"] += PART
        if choose.random() < 0.2:
            file.flush()
            file.check_file(choose.choice(list(file.seeds)))
            self.counts["bytes_checked"] += PART

    def kill(self, kills: int) -> None:
        """Each pager in turn, at any moment of its life: also while it starts, and while it is stopped."""
        choose = self.choice("kills")
        while self.counts["kills"] < kills and not self.ending.is_set():
            faulthandler.dump_traceback_later(STALLED, exit=True)
            time.sleep(choose.choice((0.0, 0.02, 0.1, 0.2, 0.4)) * choose.random())
            pid = choose.choice(self.pagers).pid
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    if choose.random() < 0.1:
                        os.kill(pid, signal.SIGSTOP)
                        time.sleep(0.02)
                        self.counts["stops"] += 1
                        if choose.random() < 0.5:
                            os.kill(pid, signal.SIGCONT)
                            continue
                    os.kill(pid, signal.SIGKILL)
                    self.counts["kills"] += 1
        self.ending.set()

    def run(self, kills: int) -> None:
        threads = [self.go_on(f"reader {i}", self.reads) for i in range(3)]
        threads += [self.go_on(f"writer {file.path.name}", self.writes, file) for file in self.files]
        self.kill(kills)
        for thread in threads:
            faulthandler.dump_traceback_later(STALLED, exit=True)
            thread.join()
        if self.failures:
            raise AssertionError("\n".join(self.failures))
        assert (self.read == words(0, PAGES * PAGE)).all(), "wrong bytes at the end"
        for file in self.files:
            file.flush()
            for at in file.seeds:
                file.check_file(at)
        self.counts["bytes_checked"] += 3 * PAGES * PAGE
        self.counts["told_lost"] = sum(file.told for file in self.files)
        self.counts["starts"] = sum(pager.stats()["starts"] for pager in self.pagers)
        for array in self.arrays:
            array.close()
        with contextlib.suppress(ChildProcessError):
            raise AssertionError(f"a child is left: {os.waitpid(-1, os.WNOHANG)}")
        faulthandler.cancel_dump_traceback_later()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", file=sys.stderr)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        storm = Storm(arguments.seed, Path(folder))
        storm.run(arguments.kills)
    told = {"seed": arguments.seed, "seconds": round(time.monotonic() - started, 1), **storm.counts}
    print(json.dumps(told) if arguments.json else "\n".join(f"{name:14} {n:,}" for name, n in told.items()))


if __name__ == "__main__":
    main()
