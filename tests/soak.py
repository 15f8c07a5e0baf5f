"""A soak test: threads use served memory in every way there is, all at once, and every byte is checked.

    python tests/soak.py --seconds 60 --seed 7

Each region has a known source, whose bytes are not zero (but for `Zero`). In most regions nobody writes:
they hold what their source does at any moment, whatever else goes on there. In the others each thread has
pages of its own, and remembers what it wrote. Dropped pages (MADV_DONTNEED) hold the source's bytes again.
One region's file became shorter: its pages are errors, and never zeros.

A service follows no remap events, so there are two legal ways to remap, and both are used: mremap with
MREMAP_DONTUNMAP, which takes the pages and leaves the region registered, and missing them as after DONTNEED;
and mremap of memory that was unregistered before, which is then emptied, registered and served anew.

Wrong bytes, a page that failed closed, a hang, a signal, and a descriptor, thread or registration left over
make it fail. It then prints the seed and the last operations of each thread. The seed decides what each
thread does; not when, nor what it finds then.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import faulthandler
import gc
import json
import mmap
import os
import random
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import userfault as uf
from soak_memory import BROKEN_PAGES, PAGE, Materials, Piece, call
from soak_threads import Thread, WrongError
from userfault.procmaps import registered

STALL_SECONDS = 200 if "LAB_KERNEL" in os.environ else 30
ROWS, ROW_BYTES = 24, 160
COUNTED = ("reads", "records", "pages", "ahead", "moved", "handed", "coming", "existing", "parked", "failed")


class Log:
    """The last operations of each thread, in memory that a killed process leaves to its parent."""

    def __init__(self, threads: int) -> None:
        self.memory = mmap.mmap(-1, threads * ROWS * ROW_BYTES)

    def note(self, thread: int, number: int, text: str) -> None:
        at = (thread * ROWS + number % ROWS) * ROW_BYTES
        row = f"{time.monotonic():.6f} thread {thread} #{number} {text}".encode()
        self.memory[at : at + ROW_BYTES] = row[:ROW_BYTES].ljust(ROW_BYTES)

    def rows(self) -> list[str]:
        rows = (self.memory[at : at + ROW_BYTES] for at in range(0, len(self.memory), ROW_BYTES))
        return sorted(row.decode(errors="replace").rstrip() for row in rows if row.strip(b"\0"))


class Soak:
    """One run: rounds, each with a service of its own, and now and then another userfaultfd."""

    def __init__(self, options: argparse.Namespace, folder: Path, log: Log) -> None:
        self.options, self.log, self.notes = options, log, 0
        self.choose = random.Random(options.seed)
        self.materials = Materials(folder, options.seed)
        self.lock, self.forking = threading.Lock(), threading.Lock()
        self.pieces: list[Piece] = []
        self.failure: str | None = None
        self.stopping = False
        self.operations: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self.counted = dict.fromkeys(COUNTED, 0)
        self.bytes_checked = self.rounds = 0
        self.service: uf.FaultService
        self.open()

    def run(self, until: float) -> None:
        while time.monotonic() < until or not self.rounds:
            self.round(min(until, time.monotonic() + self.choose.uniform(0.3, 3)))
            self.rounds += 1
            if self.choose.random() < 0.3:
                self.leave()
                self.open()
        self.leave()
        # Nothing may hold what is counted at the end.
        del self.u, self.service, self.broken, self.materials

    def open(self) -> None:
        self.u = uf.Userfaultfd(self.options.api)
        self.broken = Piece(self.u.map(BROKEN_PAGES * PAGE), self.materials.make_broken(), 0, None)

    def round(self, until: float) -> None:
        placements = ["spin", "any"]
        if self.u.api == "msg" and uf.Feature.THREAD_ID in uf.Feature(self.u.features):
            placements.append("pair")
        workers, shards = self.choose.randint(1, 4), self.choose.randint(1, 3)
        placement: Any = self.choose.choice(placements)
        self.note(f"round {self.rounds}: workers={workers} shards={shards} placement={placement}")
        self.service = uf.FaultService(self.u, workers, shards=shards, placement=placement)
        before = self.service.stats()  # of the services on it until now
        for piece in (self.broken, *self.pieces):
            self.serve(self.choose, piece)
        self.stopping = False
        threads = [Thread(self, number) for number in range(self.options.threads)]
        for thread in threads:
            thread.start()
        self.watch(threads, until)
        for thread in threads:
            self.operations.update(thread.done)
            self.bytes_checked += thread.bytes_checked
        self.end(before)

    def watch(self, threads: list[Thread], until: float) -> None:
        """Until they are through, or one of them has found something or does nothing any more."""
        seen = dict.fromkeys(threads, (-1, 0.0))
        while any(thread.is_alive() for thread in threads):
            now = time.monotonic()
            # Should this thread not come back for want of the GIL: all the others' traces, and the end.
            faulthandler.dump_traceback_later(STALL_SECONDS + 5, exit=True)
            self.stopping = self.stopping or now >= until
            for thread in threads:
                if thread.number_of_ops != seen[thread][0] or not thread.is_alive():
                    seen[thread] = thread.number_of_ops, now
                elif now - seen[thread][1] > STALL_SECONDS:
                    sys.stderr.write(f"{Path(f'/proc/self/fdinfo/{self.u.fileno()}').read_text()}\n")
                    sys.stderr.write(f"{self.service.stats()}\n{self.service.failures()}\n")
                    faulthandler.dump_traceback()
                    raise WrongError(f"thread {thread.number} hangs")
            if self.failure:
                raise WrongError(self.failure)
            time.sleep(0.02)

    def end(self, before: np.void) -> None:
        """Everything is checked once more, and the service is closed."""
        checker = Thread(self, 0)
        for piece in self.pieces:
            self.note(f"check {piece}")
            checker.same(piece, 0, piece.pages, "at the end of the round")
            if not self.service.resident(piece.region).all():
                raise WrongError(f"{piece}: pages are there, and resident() does not know")
        if self.choose.random() < 0.5:
            self.materials.chill()
        # Missing when the service closes, and touched again only when there is another one. Memory of our own
        # is served anew only when none of it is there.
        missing = [piece for piece in self.pieces if piece.memory is not None or self.choose.random() < 0.5]
        for piece in missing:
            end = self.choose.randint(1, piece.pages) if piece.memory is None else piece.pages
            self.note(f"drop {end} pages of {piece}")
            piece.drop(0, end)
            if piece.memory is None and self.choose.random() < 0.5:
                self.service.materialize(piece.region, wait=False)
        self.note("close the service")
        self.service.close()
        self.count(before)
        for piece in list(self.pieces):
            if piece not in missing:
                checker.same(piece, 0, piece.pages, "after the service was closed")
            if piece.owner is not self.u:  # a shard of the service, which is closed with it
                self.pieces.remove(piece)
                piece.region.close()
        self.bytes_checked += checker.bytes_checked

    def count(self, before: np.void) -> None:
        stats = self.service.stats()
        for name in COUNTED:
            self.counted[name] += int(stats[name] - before[name])
        for number, n in enumerate((stats["errors"] - before["errors"]).tolist()):
            self.errors[errno.errorcode.get(number, str(number))] += n
        start, n_bytes = self.broken.at(0, BROKEN_PAGES)
        failed = [told for told in self.service.failures() if not start <= told.address < start + n_bytes]
        if failed or stats["unknown"]:
            raise WrongError(f"pages failed closed: {failed[:5]}; {stats['unknown']} unknown records")

    def leave(self) -> None:
        """Close the userfaultfd, and let go of all memory."""
        self.note("close the userfaultfd")
        self.u.close()
        for piece in self.pieces:
            if piece.memory is not None:
                piece.region.unregister()
                call("munmap", piece.memory, piece.pages * PAGE)
        self.pieces.clear()

    def serve(self, choose: random.Random, piece: Piece) -> None:
        """Serve it, one way or another."""
        unit = PAGE * choose.choice((1, 1, 1, 1, 2, 3, 5, 16, 64, 512, 513, 1024))
        ahead: Any = choose.choice(("adaptive", "adaptive", 0, 0, 1, 7, 64, 600))
        piece.options = {"readahead": ahead, "page_bytes": unit}
        self.service.serve(piece.region, piece.made.source, readahead=ahead, page_bytes=unit)

    def note(self, text: str) -> None:
        self.notes += 1
        self.log.note(self.options.threads, self.notes, text)

    def summary(self, seconds: float) -> dict[str, Any]:
        return {
            "seed": self.options.seed,
            "seconds": round(seconds, 1),
            "rounds": self.rounds,
            "operations": dict(sorted(self.operations.items())),
            "bytes_checked": self.bytes_checked,
            "faults_per_second": round(self.counted["records"] / seconds),
            **self.counted,
            "errors": {name: n for name, n in sorted(self.errors.items()) if n},
        }


def census() -> tuple[list[str], int]:
    """The descriptors and the number of threads of this process."""
    opened = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            opened.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return sorted(opened), len(os.listdir("/proc/self/task"))


def soak(options: argparse.Namespace, folder: Path, log: Log) -> int:
    """The run, in a process of its own; its exit status."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(STALL_SECONDS + 5, exit=True)
    before, begun = census(), time.monotonic()
    run = Soak(options, folder, log)
    try:
        run.run(begun + options.seconds)
        deadline = time.monotonic() + STALL_SECONDS / 2
        while (after := census()) != before and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        if after != before:
            raise WrongError(f"left over: {before} became {after}")
        if registered(0, 1 << 47):
            raise WrongError("memory is still registered")
    except BaseException:
        traceback.print_exc()
        return 1
    told = run.summary(time.monotonic() - begun)
    lines = [json.dumps(told)] if options.json else [f"{name}: {value}" for name, value in told.items()]
    print(*lines, sep="\n", flush=True)
    return 0


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--threads", type=int, default=6)
    parser.add_argument("--api", default="auto", help="v1, v2 or msg")
    parser.add_argument("--json", action="store_true", help="one line, for programs")
    options = parser.parse_args()
    log = Log(options.threads + 1)
    with tempfile.TemporaryDirectory(prefix="userfault-soak-") as name:
        Materials.prepare(Path(name))
        pid = os.fork()
        if pid == 0:
            os._exit(soak(options, Path(name), log))
        ended = os.pidfd_open(pid)
        if not select.select([ended], [], [], options.seconds + 3 * STALL_SECONDS)[0]:
            sys.stderr.write("soak: it does not end\n")
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        why = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        rows = "\n".join(log.rows())
        sys.stderr.write(f"{rows}\nsoak failed: {why}; --seed {options.seed} --threads {options.threads}\n")
    sys.exit(bool(status))


if __name__ == "__main__":
    main()
