"""The memory limit of lazy arrays: it holds, what is used again and again stays, and nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import userfault as uf
from support import Child

PAGE = uf.PAGE_SIZE
MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("needs_privilege")

SET_UP = """
import contextlib, resource
MIB = 1 << 20
pattern = uf.sources.Pattern(5)

def anonymous():
    # RssAnon in bytes.
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])

class Watch:
    # The most that a Budget had while it was watched, and that the process grew by.
    def __init__(self, budget, *arrays):
        self.budget, self.arrays = budget, arrays
        self.used = self.grown = self.resident = 0
        self.before = anonymous()
        self.stop = False
        self.thread = threading.Thread(target=self.look)

    def look(self):
        while not self.stop:
            self.used = max(self.used, self.budget.used)
            self.grown = max(self.grown, anonymous() - self.before)
            self.resident = max(self.resident, sum(int(a.resident.sum()) for a in self.arrays) * PAGE)
            time.sleep(0.002)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop = True
        self.thread.join()

def warm_up(budget):
    # The engine, its threads' stages and numpy's own, before anything is measured.
    a = uf.lazy_array(pattern, 4 * MIB, memory_limit=budget)
    a.sum()
    a.prefetch(slice(0, MIB // 4))
    a.close()

def same(a, first=0):
    # In pieces: to compare needs memory of its own.
    step = MIB // 2
    return all((a[i:i + step] == pattern.expected(first + i, step)[:len(a) - i]).all()
               for i in range(0, len(a), step))
"""


def run(child: Child, code: str, timeout: float = 40, **names: Any) -> str:
    """Run the code, which must come to its end; what it said on stderr."""
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    done = child(SET_UP + given + textwrap.dedent(code) + '\nprint("good")\n', timeout=timeout)
    assert done.stdout == "good\n", (done.returncode, done.stdout, done.stderr)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return str(done.stderr)


# -- that it holds ---------------------------------------------------------------------------------------

USES = {
    "scanned": """
        for _ in range(2):
            assert same(a)
    """,
    "at random": """
        def touch(k):
            pages = np.random.default_rng(k).integers(0, size // PAGE, 3000).astype(np.uint64)
            uf.touch(np.asarray(a), pages * np.uint64(PAGE))
        threads = [threading.Thread(target=touch, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert same(a[size // 2:], size // 2)
    """,
    "prefetched": """
        for i in range(0, size, limit // 2):
            a.prefetch(slice(i, i + limit // 2))
            assert same(a[i:i + limit // 2], i)
    """,
}


@pytest.mark.parametrize(("use", "mib"), [*((use, 4) for use in USES), ("scanned", 64)])
def test_an_array_ten_times_larger(child: Child, use: str, mib: int) -> None:
    """With 64 MiB it may be mapped huge."""
    code = f"""
        limit, size = mib * MIB, (10 if mib < 64 else 5) * mib * MIB
        budget = uf.Budget(limit)
        warm_up(budget)
        a = uf.lazy_array(pattern, size, memory_limit=budget)
        workers = a._backing._service._engines[0].workers
        with Watch(budget, a) as seen:
            {textwrap.dedent(USES[use]).strip().replace(chr(10), chr(10) + " " * 12)}
        # Each thread that fills may have found the same room: a sixteenth, 2 MiB at the most.
        most = limit + (workers + 1) * min(limit // 16, 2 * MIB)
        assert limit // 2 < seen.used <= most, (seen.used, most)
        assert seen.resident <= most, (seen.resident, most)
        # And a stage each, and what the test itself needs.
        assert seen.grown <= most + (workers + 2) * 2 * MIB + 4 * MIB, (seen.grown, most)
        assert a.stats()["evicted"] >= (size - limit) // PAGE
        assert int(a.resident.sum()) * PAGE <= most
        a.close()
        assert budget.used == 0
        """
    run(child, code, mib=mib)


def test_a_file_that_is_sorted_in_place(child: Child, tmp_path: Path) -> None:
    """Blocks of it, in mode "r+": what is changed goes to the file, and makes room."""
    run(
        child,
        """
        n, limit = 5 * MIB, 4 * MIB  # of 8 bytes
        numbers = np.random.default_rng(0).integers(0, 1 << 60, n)
        numbers.tofile(path)
        budget = uf.Budget(limit)
        warm_up(budget)
        a = uf.lazy_array(path, n, np.int64, mode="r+", memory_limit=budget)
        block = MIB // 8
        with Watch(budget, a) as seen:
            for i in range(0, n, block):
                a[i:i + block].sort()
                a[i:i + block] += 1
        most = limit + 2 * limit // 16
        assert seen.used <= most and seen.resident <= most, (seen.used, seen.resident)
        assert seen.grown <= most + 10 * MIB, seen.grown
        a.close()
        numbers.reshape(-1, block).sort(axis=1)
        numbers += 1
        assert (np.fromfile(path, np.int64) == numbers).all()
        """,
        path=str(tmp_path / "data"),
    )


def memory_cgroup() -> Path:
    """A new memory cgroup below ours, or skip."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        own[kinds] = path.lstrip("/")
    why = "no memory cgroup is mounted"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mounted, kind, options = line.split()[:4]
        if kind == "cgroup" and "memory" in options.split(","):
            parent = Path(mounted, own.get("memory", ""))
        elif kind == "cgroup2":
            # A group that has processes gives its children no controllers: beside ours, then.
            parent = Path(mounted, own.get("", "")).parent if own.get("") else Path(mounted)
        else:
            continue
        if not parent.is_dir():
            parent = Path(mounted)  # ours is not to be seen from here
        made = parent / f"userfault-{os.getpid()}"
        try:
            made.mkdir()
        except OSError as error:
            why = f"no cgroup may be made: {error}"
            continue
        if (made / "memory.max").exists() or (made / "memory.limit_in_bytes").exists():
            return made
        made.rmdir()
        why = "the cgroup has no memory controller"
    pytest.skip(why)


def test_under_a_memory_cgroup(tmp_path: Path) -> None:
    """What the kernel counts: also page tables, and what is let go of but not freed."""
    limit, overhead = 64 * MIB, 64 * MIB
    group = memory_cgroup()
    code = f"""
import os, resource
with open({str(group / "cgroup.procs")!r}, "w") as procs:
    procs.write(str(os.getpid()))
import numpy as np, userfault as uf
size = 10 * {limit}
a = uf.lazy_array(uf.sources.Pattern(5), size, memory_limit={limit})
total = 0
for i in range(0, size, {MIB}):
    total ^= int(np.bitwise_xor.reduce(np.asarray(a[i:i + {MIB}]).view(np.uint64)))
b = uf.lazy_array({str(tmp_path / "data")!r}, mode="r+", memory_limit={limit // 4})
b[:] = 7
pages = np.random.default_rng(0).integers(0, size // {PAGE}, 20000).astype(np.uint64) * np.uint64({PAGE})
uf.touch(np.asarray(a), pages)
b.close()
print("good")
"""
    (tmp_path / "data").write_bytes(bytes(limit // 2))
    try:
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (group / name).exists():
                (group / name).write_text(str(limit + limit // 4 + overhead))
        if (group / "memory.swap.max").exists():
            (group / "memory.swap.max").write_text("0")
        done = subprocess.run(
            [sys.executable, "-c", code], timeout=100, capture_output=True, text=True, check=False
        )
        assert done.stdout == "good\n", (done.returncode, done.stderr)
        events = group / ("memory.events" if (group / "memory.events").exists() else "memory.oom_control")
        killed = [line for line in events.read_text().splitlines() if line.startswith("oom_kill ")]
        assert killed == ["oom_kill 0"]
    finally:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.01)  # its process is only just gone


# -- which pages go --------------------------------------------------------------------------------------


def test_a_scan_does_not_drive_out_what_is_used_again_and_again(child: Child) -> None:
    """A fifth of the limit, used between the blocks of a long scan. First in, first out would bring it anew
    each time that the limit's worth has been scanned."""
    run(
        child,
        """
        limit, size = 8 * MIB, 240 * MIB
        budget = uf.Budget(limit)
        hot = uf.lazy_array(uf.sources.Pattern(6), limit // 5, memory_limit=budget)
        scanned = uf.lazy_array(pattern, size, memory_limit=budget)
        expected = np.add.reduce(uf.sources.Pattern(6).expected(0, limit // 5), dtype=np.uint64)
        for i in range(0, size, MIB // 2):
            assert np.add.reduce(hot, dtype=np.uint64) == expected
            uf.touch(np.asarray(scanned[i:i + MIB // 2]), np.arange(0, MIB // 2, PAGE, dtype=np.uint64))
        assert scanned.stats()["pages"] >= size // PAGE - 512  # counted a moment after they came
        n, once = int(hot.stats()["pages"]), limit // 5 // PAGE
        # First in, first out: some 30 times.
        assert n <= 6 * once, n / once
        """,
    )


def test_huge_pages_go_as_a_whole(child: Child) -> None:
    """Where a part of one stays, none of it is freed."""
    done = run(
        child,
        """
        limit, size = 64 * MIB, 160 * MIB

        def parts():
            there = a.resident.reshape(-1, 512).sum(axis=1)
            return there[(there != 0) & (there != 512)]

        def huge():
            # Of our mapping: Rss and AnonHugePages in bytes.
            told = [0, 0]
            inside = False
            with open("/proc/self/smaps") as lines:
                for line in lines:
                    name, *rest = line.split()
                    if "-" in name:
                        start, end = (int(part, 16) for part in name.split("-"))
                        inside = start < a.ctypes.data + size and a.ctypes.data < end
                    elif inside and name in ("Rss:", "AnonHugePages:"):
                        told[name != "Rss:"] += int(rest[0]) * 1024
            return told

        for _ in range(4):
            a = uf.lazy_array(pattern, size, memory_limit=limit, page_bytes=2 * MIB)
            for i in range(0, size, MIB):
                assert a[i] == pattern.expected(i, 1)[0]
            for i in np.random.default_rng(0).integers(0, size, 100).tolist():
                assert a[i] == pattern.expected(i, 1)[0]
            if a.stats()["moved"] == a.stats()["pages"]:
                break
        else:
            print("huge pages were not to be had", file=sys.stderr)
            print("good", flush=True)
            os._exit(0)
        assert not len(parts()), parts()
        rss, mapped_huge = huge()
        assert 0 < rss == mapped_huge <= limit + 4 * MIB, (rss, mapped_huge)
        i = int(np.flatnonzero(a.resident)[0]) * PAGE
        assert a.evict(i + 5) == 2 * MIB
        assert not len(parts()), parts()
        """,
    )
    if "not to be had" in done:
        pytest.skip(done.strip())


# -- a Budget of several arrays --------------------------------------------------------------------------


def test_arrays_that_share_a_budget(child: Child) -> None:
    """Also on an engine of their own, and with one that is closed meanwhile."""
    run(
        child,
        """
        budget = uf.Budget(2 * MIB)
        arrays = [uf.lazy_array(pattern, 2 * MIB, offset=i * MIB, memory_limit=budget, placement=placement)
                  for i, placement in enumerate(("spin", "any", "spin"))]
        memory = np.zeros(2 * MIB, np.uint8)
        written = uf.lazy_array(uf.sources.Buffer(memory), mode="r+", memory_limit=budget)
        for turn in range(4):
            for i, a in enumerate(arrays):
                assert same(a, i * MIB)
                assert budget.used <= 2 * MIB + 2 * MIB // 8
                assert sum(int(b.resident.sum()) for b in [*arrays, written]) * PAGE <= 2 * MIB + MIB // 4
            written[:] = turn
            if turn == 1:
                there = int(arrays[1].resident.sum()) * PAGE
                before = budget.used
                arrays[1].close()
                assert budget.used == before - there
                del arrays[1], a
                arrays.insert(1, uf.lazy_array(pattern, 2 * MIB, offset=MIB, memory_limit=budget))
        written.close()
        assert (memory == 3).all()
        while arrays:
            arrays.pop().close()
        assert budget.used == 0
        """,
    )


def test_room_that_another_engine_has_to_write_back_first(child: Child) -> None:
    """The reading thread may not wait for that, so there is a worker, also for sources that never wait."""
    run(
        child,
        """
        budget = uf.Budget(MIB)
        memory = bytearray(MIB)
        # Without read-ahead, as two threads that fill may make room for more than comes.
        written = uf.lazy_array(uf.sources.Buffer(memory), mode="r+", memory_limit=budget, placement="any",
                                readahead=0)
        for i, source in enumerate((pattern, uf.sources.Zero(), uf.sources.Constant(3))):
            written[:] = i + 1
            assert written.dirty.all() and budget.used == MIB
            a = uf.lazy_array(source, MIB, memory_limit=budget)
            a.sum()
            assert memory.count(i + 1)
            a.close()
        """,
        timeout=20,
    )


def test_one_that_is_closed_while_room_is_made(child: Child) -> None:
    """Whoever makes room has its blocks in hand, and waits for another's source."""
    run(
        child,
        """
        import tempfile
        budget = uf.Budget(MIB)
        stop = time.monotonic() + 3
        errors = []

        def close_and_open(k):
            try:
                turn = 0
                while time.monotonic() < stop:
                    turn += 1
                    a = uf.lazy_array(pattern, MIB, memory_limit=budget, placement=("spin", "any")[k % 2])
                    a[:: 16 * PAGE].sum()
                    if turn % 2:
                        a.close()
                    del a
            except BaseException as error:
                errors.append(error)

        def change(k):
            try:
                with tempfile.NamedTemporaryFile() as file:
                    file.truncate(2 * MIB)
                    a = uf.lazy_array(file.name, mode="r+", memory_limit=budget)
                    turn = 0
                    while time.monotonic() < stop:
                        turn += 1
                        a[k::PAGE] = turn % 256
                        assert (a[k::PAGE] == turn % 256).all()
                    a.close()
                    assert (np.fromfile(file.name, np.uint8)[k::PAGE] == turn % 256).all()
            except BaseException as error:
                errors.append(error)

        sys.setswitchinterval(1e-4)
        threads = [threading.Thread(target=f, args=(k,)) for f in (close_and_open, change) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert budget.used == 0
        """,
    )


# -- what does not fit -----------------------------------------------------------------------------------


def test_limits_that_are_too_small() -> None:
    for limit in (0, 1, MIB - 1, -5, 2**63):
        with pytest.raises(ValueError, match="1048576 bytes at the least"):
            uf.Budget(limit)
        with pytest.raises(ValueError, match="1048576 bytes at the least"):
            uf.lazy_array(uf.sources.Zero(), MIB, memory_limit=limit)
    with pytest.raises(ValueError, match="16 times page_bytes"):
        uf.lazy_array(uf.sources.Zero(), MIB, memory_limit=MIB, page_bytes=32 * PAGE)
    with pytest.raises(ValueError, match="16 times page_bytes"):
        uf.lazy_array(uf.sources.Zero(), MIB, memory_limit=uf.Budget(2 * MIB), page_bytes=MIB)
    assert uf.Budget(None).nbytes is None
    assert uf.Budget(MIB).nbytes == MIB


def test_more_than_the_limit_cannot_be_brought_at_once(child: Child) -> None:
    run(
        child,
        """
        a = uf.lazy_array(pattern, 3 * MIB, memory_limit=MIB)
        for call in (a.materialize, a.prefetch, lambda: a.prefetch(slice(0, MIB + 1)),
                     lambda: a.prefetch(slice(5, MIB + 4))):
            try:
                call()
                raise AssertionError
            except uf.LimitError as error:
                assert "memory_limit of 1048576" in str(error)
        for first in (0, MIB, 0):
            a.prefetch(slice(first, first + MIB))  # just as much as it may have
            assert a.resident[first // PAGE:][:256].all()
            a.prefetch(slice(first, first + MIB))
        assert same(a)
        """,
    )


def test_changes_that_have_nowhere_to_go(child: Child) -> None:
    """They fill the limit: prefetch says so, and a touch is SIGBUS, with a line on stderr."""
    done = child(
        SET_UP
        + textwrap.dedent("""
        a = uf.lazy_array(pattern, 3 * MIB, mode="c", memory_limit=MIB)
        b = uf.lazy_array(pattern, 3 * MIB, memory_limit=a._backing.budget)
        a[:MIB - 64 * PAGE] = 1
        assert b.sum() and same(b)  # in what is left
        b.evict()
        a[:MIB] = 1
        assert a.dirty[:256].all()
        for array in (a, b):
            try:
                array.prefetch(slice(2 * MIB, 2 * MIB + 1))
                raise AssertionError
            except uf.LimitError as error:
                assert "full of changed pages" in str(error)
        r, w = os.pipe()
        for array in (a, b):
            try:
                os.write(w, array[2 * MIB:2 * MIB + 1])
                raise AssertionError
            except OSError as error:
                assert "Bad address" in str(error)
        assert (a[:MIB] == 1).all()
        print("before", flush=True)
        print("still here", b[2 * MIB + 5 * PAGE])
        """),
        timeout=40,
    )
    assert done.stdout == "before\n", (done.stdout, done.stderr)
    assert done.returncode == -signal.SIGBUS
    line = done.stderr.splitlines()[-1]
    assert "memory_limit is full of changed pages" in line
    assert f"byte {2 * MIB + 5 * PAGE} " in line
    assert "uint8 (3145728,) of Pattern(5)" in line


def test_room_is_had_again_when_changes_go(child: Child) -> None:
    """With the array that they are of."""
    run(
        child,
        """
        budget = uf.Budget(MIB)
        for _ in range(3):
            a = uf.lazy_array(pattern, MIB, mode="c", memory_limit=budget)
            a[:] = 1
            b = uf.lazy_array(pattern, 3 * MIB, memory_limit=budget)
            try:
                b.prefetch(0)
                raise AssertionError
            except uf.LimitError:
                pass
            del a
            assert budget.used == 0
            assert same(b)
            b.close()
        """,
    )


def test_what_is_being_written_back_makes_room_soon(child: Child) -> None:
    """All that could go is in the hands of others, who write it back: that is no full memory_limit."""
    run(
        child,
        """
        budget = uf.Budget(MIB)
        private = uf.lazy_array(pattern, MIB - 40 * PAGE, mode="c", memory_limit=budget)
        private[:] = 1
        memory = np.zeros(8 * MIB, np.uint8)
        a = uf.lazy_array(uf.sources.Buffer(memory), mode="r+", memory_limit=budget)
        stop = time.monotonic() + 2
        failed = []

        def change(k):
            rng = np.random.default_rng(k)
            while time.monotonic() < stop:
                ctypes.memset(a.ctypes.data + int(rng.integers(2048)) * PAGE + k, 1, 1)

        def prefetch():
            rng = np.random.default_rng(99)
            while time.monotonic() < stop:
                i = int(rng.integers(2000)) * PAGE
                try:
                    a.prefetch(slice(i, i + 16 * PAGE))
                except uf.LimitError as error:
                    failed.append(error)

        threads = [threading.Thread(target=change, args=(k,)) for k in range(8)]
        threads.append(threading.Thread(target=prefetch))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        """,
    )


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_nobody_is_left_asleep(child: Child, tmp_path: Path, mode: str) -> None:
    """Many threads at once, each at a page of its own that goes as soon as it has come; workers too."""
    path = tmp_path / "data"
    path.write_bytes(os.urandom(16 * MIB))
    done = child(
        f"""
        how = dict(mode={mode!r}, page_bytes=16 * PAGE, memory_limit=1 << 20, readahead=0)
        a = uf.lazy_array({str(path)!r}, **how)
        descriptor = os.open({str(path)!r}, os.O_RDONLY)
        os.fsync(descriptor)
        threading.stack_size(128 << 10)
        rounds, stop = [0] * 200, False
        def toucher(i):
            offsets = np.full(100, i * 16 * PAGE, np.uint64)
            while not stop:
                uf.touch(a, offsets)
                rounds[i] += 1
        threads = [threading.Thread(target=toucher, args=(i,), daemon=True) for i in range(200)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 50
        for _ in range(20):
            before = list(rounds)
            while any(now == then for now, then in zip(rounds, before)):
                assert time.monotonic() < deadline, sum(now == then for now, then in zip(rounds, before))
                os.posix_fadvise(descriptor, 9 << 20, 0, os.POSIX_FADV_DONTNEED)
                a.evict()
                time.sleep(0.001)
        print("good", flush=True)
        os._exit(0)
        """
    )
    assert done.stdout == "good\n", (done.returncode, done.stderr)
