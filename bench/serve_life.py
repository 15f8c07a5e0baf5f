"""Whole regions filled, an idle service, and close() under load."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

import rivals
import userfault as uf
from compare import Row
from serve_contenders import BACKINGS, PATIENCE, Data, Offsets, served, touch
from serve_turns import Setting, Turn, cost, in_order, judged, rows_of, scattered, turns

HUGE = 2 << 20
COPY = "memcpy"
CLOSE_MS = 50
CLOSE_THREADS = 16
HUNG: list[Offsets] = []  # of threads that never ended, and may yet go on


# -- A whole region --------------------------------------------------------------------------------------


def fill(setting: Setting) -> Iterator[Row]:
    """All of it, touched in order by one thread, or materialized; beside a memcpy into fresh huge pages."""
    data, length = setting.data, setting.sizes.data
    contenders: dict[str, Turn] = {COPY: partial(copied, data)}
    for name, page_bytes in (("", uf.PAGE_SIZE), (", 2 MiB", HUGE)):
        contenders[f"touched{name}"] = partial(touched, data, page_bytes)
        contenders[f"materialize{name}"] = partial(materialized, data, page_bytes)
    result = turns(contenders, setting.rounds)
    rows = rows_of(result, length // uf.PAGE_SIZE, workload="fill", backing="memory", touchers=1)
    for name in contenders:
        if name != COPY:
            rows[name]["figures"].append(cost(result, name, COPY, 1.15))
    yield from rows.values()


def copied(data: Data) -> float:
    took: int = rivals.serve_library().copy_into_huge(data.memory.ctypes.data, data.memory.nbytes)
    if took < 0:
        raise RuntimeError("no memory that may have huge pages, or a wrong byte in it")
    return took * 1e-9


def touched(data: Data, page_bytes: int) -> float:
    offsets = in_order(data.memory.nbytes // uf.PAGE_SIZE, 1)
    with served(data, "memory", data.memory.nbytes, page_bytes=page_bytes) as (_, region):
        took = touch(region, offsets, data.memory[offsets], 1)
        data.check(region)
    return took


def materialized(data: Data, page_bytes: int) -> float:
    with served(data, "memory", data.memory.nbytes, page_bytes=page_bytes) as (service, region):
        start = time.perf_counter()
        service.materialize(region)
        took = time.perf_counter() - start
        data.check(region)
    return took


# -- Idle --------------------------------------------------------------------------------------------------


def idle(setting: Setting) -> Iterator[Row]:
    """What an open service with nothing to do costs the process: CPU time, and threads that wake up."""
    offsets = scattered(setting.sizes.data, setting.sizes.touches)
    for placement in ("spin", "any", "pair"):
        with served(setting.data, "memory", setting.sizes.data, placement) as (_, region):
            touch(region, offsets, setting.data.memory[offsets], 1)
            time.sleep(setting.sizes.idle)
            before = others()
            time.sleep(setting.sizes.idle)
            after = others()
        both = before.keys() & after.keys()
        cpu, switches = (sum(after[number][i] - before[number][i] for number in both) for i in range(2))
        ms = cpu / 1e6 / setting.sizes.idle
        yield {
            "workload": "idle",
            "backing": "memory",
            "touchers": 0,
            "contender": f"ours, {placement}",
            "unit": "ms/s",
            "best": ms,
            "median": ms,
            "figures": [
                judged(f"CPU ms a second, {placement}", ms, ("<=", 0)),
                judged(f"context switches, {placement}", switches, ("<=", 0)),
            ],
        }


def others() -> dict[int, tuple[int, int]]:
    """Nanoseconds of CPU time, and context switches, of each thread but this one."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        number = int(task.name)
        if number == threading.get_native_id():
            continue
        with contextlib.suppress(OSError):  # it has just ended
            cpu = time.clock_gettime_ns(~number << 3 | 6)  # a thread's CPU clock, as Linux numbers them
            lines = (task / "status").read_text().splitlines()
            found[number] = cpu, sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return found


# -- close() -----------------------------------------------------------------------------------------------


def close(setting: Setting) -> Iterator[Row]:
    """How long close() takes while threads write(2) the region's pages, and what becomes of these."""
    if uf.probe().user_mode_only:
        print("close: not measured, for want of privilege (see userfault doctor)", file=sys.stderr)
        return
    for backing in BACKINGS:
        found = [closed(setting.data, backing) for _ in range(setting.rounds)]
        ms = np.array([took for took, _ in found]) * 1e3
        right, wrong, refused = (int(n) for n in np.sum([counts for _, counts in found], axis=0))
        hung = setting.rounds * setting.data.memory.nbytes // uf.PAGE_SIZE - right - wrong - refused
        yield {
            "workload": "close",
            "backing": backing,
            "touchers": CLOSE_THREADS,
            "contender": "ours",
            "unit": "ms",
            "best": float(ms.min()),
            "median": float(np.median(ms)),
            "figures": [
                judged("slowest close(), ms", float(ms.max()), ("<=", CLOSE_MS)),
                judged("pages that came", right),
                judged("pages that failed closed", refused),
                judged("pages that were wrong", wrong, ("<=", 0)),
                judged("pages never answered", hung, ("<=", 0)),
            ],
        }


def closed(data: Data, backing: str) -> tuple[float, tuple[int, int, int]]:
    """Close when a quarter of the pages have come: seconds, and the pages right, wrong, and refused."""
    length, library = data.memory.nbytes, rivals.serve_library()
    offsets = scattered(length, length // uf.PAGE_SIZE) & np.uint64(-uf.PAGE_SIZE % (1 << 64))
    source = data.memory.ctypes.data
    counts = (ctypes.c_long * 3)()
    with served(data, backing, length) as (service, region):
        writers = library.writers_start(
            region.start, offsets.ctypes.data, source, offsets.size, CLOSE_THREADS
        )
        if not writers:
            raise RuntimeError(f"{CLOSE_THREADS} threads could not be started (ulimit -u)")
        deadline = time.monotonic() + PATIENCE
        while service.stats()["pages"] < offsets.size // 4:
            if time.monotonic() > deadline:
                raise TimeoutError("the pages do not come")
            time.sleep(1e-3)
        start = time.perf_counter()
        service.close()
        took = time.perf_counter() - start
        library.writers_join(writers, PATIENCE, counts)
    right, wrong, refused = counts
    if right + wrong + refused < offsets.size:
        HUNG.append(offsets)
    return took, (right, wrong, refused)
