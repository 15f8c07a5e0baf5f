"""No page ever reads as silent zeros, and nothing hangs: after close, after an error, at exit.

Each case runs in a child that touches a page which should have held data, and must die of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import userfault as uf
from support import Child, has, touching

PAGE = uf.PAGE_SIZE

# As on Linux before 6.6: the engine makes the page PROT_NONE instead.
WITHOUT_POISON = """
import dataclasses
def old_kernel(u):
    left = int(u.agreement.available) & ~int(uf.Feature.POISON)
    u.agreement = dataclasses.replace(u.agreement, available=uf.Feature(left))
"""
WITH_POISON = "def old_kernel(u): pass\n"

SET_UP = """
data = np.arange(8 * PAGE, dtype=np.uint8) | 1
u = uf.Userfaultfd(WIRE)
old_kernel(u)
region = u.map(8 * PAGE)
a = region.array
"""


def died_of(done: subprocess.CompletedProcess[str], *signals: signal.Signals) -> None:
    assert "still here" not in done.stdout, done.stdout + done.stderr
    assert -done.returncode in signals, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == "before\n", done.stdout + done.stderr


CLOSINGS = {
    "the service": "s = uf.FaultService(u); s.serve(region, uf.sources.Buffer(data)); a[0]; s.close()",
    "the userfaultfd": "s = uf.FaultService(u); s.serve(region, uf.sources.Buffer(data)); a[0]; u.close()",
    "the region": "s = uf.FaultService(u); s.serve(region, uf.sources.Buffer(data)); a[0]; region.close()",
    "everything in turn": "s = uf.FaultService(u); s.serve(region, uf.sources.Buffer(data)); a[0]; "
    "region.close(); s.close(); u.close()",
    "by letting go": "s = uf.FaultService(u); s.serve(region, uf.sources.Buffer(data)); a[0]; "
    "del region, s, u; gc.collect()",
    "without a service ever": "u.copy(region.start, data[:PAGE]); u.close()",
    "nothing, but no source serves it": "s = uf.FaultService(u); u.copy(region.start, data[:PAGE])",
}


# Both ways where the kernel has both.
@pytest.mark.parametrize(
    "poison",
    [False, True][: 1 + has(uf.Feature.POISON)],
    ids=["PROT_NONE", "poison"][: 1 + has(uf.Feature.POISON)],
)
@pytest.mark.parametrize("closing", CLOSINGS)
def test_a_missing_page_after_closing(wire: str, child: Child, closing: str, poison: bool) -> None:
    done = child(
        (WITH_POISON if poison else WITHOUT_POISON)
        + SET_UP
        + CLOSINGS[closing]
        + "\nassert (a[:PAGE] == data[:PAGE]).all()"
        + "\nprint('before', flush=True)\nvalue = a[5 * PAGE]\nprint('still here', value, flush=True)"
    )
    died_of(done, signal.SIGBUS if poison and wire == "msg" else signal.SIGSEGV)


def test_memory_of_the_users_own_after_closing(wire: str, child: Child) -> None:
    done = child("""
        memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        a = np.frombuffer(memory, np.uint8)
        with uf.Userfaultfd(WIRE) as u:
            region = u.register(memory)
            u.copy(region.start, b"x" * PAGE)
        assert a[0] == ord("x")
        print("before", flush=True)
        print("still here", a[PAGE], flush=True)
        """)
    died_of(done, signal.SIGBUS, signal.SIGSEGV)


@pytest.mark.parametrize("read", [True, False])
def test_a_thread_that_sleeps_in_a_fault_when_all_is_closed(wire: str, child: Child, read: bool) -> None:
    """A fault that was read and not resolved is not delivered again by itself."""
    done = child(f"""
        u = uf.Userfaultfd(WIRE)
        region = u.map(PAGE)
        a = region.array
        def touch():
            print("still here", uf.touch(a, np.zeros(1, np.uint64)), flush=True)
        thread = threading.Thread(target=touch)
        thread.start()
        reader = uf.EventReader(u)
        if {read}:
            assert len(reader.read(30)) == 1
        else:
            time.sleep(0.2)
        print("before", flush=True)
        u.close()
        thread.join()
        """)
    died_of(done, signal.SIGBUS, signal.SIGSEGV)


def test_a_service_takes_over_faults_that_a_reader_left(wire: str) -> None:
    with uf.Userfaultfd(wire) as u:
        region = u.map(PAGE)
        thread = touching(region, [0])
        assert len(uf.EventReader(u).read(30)) == 1
        u.copy(region.start, b"x" * PAGE, wake=False)  # present, its faulter asleep
        service = uf.FaultService(u)
        thread.join(30)
        assert not thread.is_alive()
        service.close()


def test_a_new_service_takes_the_keeper_over(wire: str) -> None:
    data = np.random.default_rng(2).integers(1, 256, 8 * PAGE, dtype=np.uint8)
    with uf.Userfaultfd(wire) as u:
        region = u.map(8 * PAGE)
        for page in range(8):
            with uf.FaultService(u) as service:
                service.serve(region, uf.sources.Buffer(data))
                assert region.array[page * PAGE] == data[page * PAGE]
        with pytest.raises(uf.BusyError):
            uf.EventReader(u).read(0)
        assert (region.array == data).all()


def tasks() -> set[str]:
    """The threads that the kernel knows; Python does not know the engine's."""
    return set(os.listdir("/proc/self/task"))


def test_closing_stops_the_thread_when_nothing_is_left_to_keep(wire: str) -> None:
    before = tasks()
    with uf.Userfaultfd(wire) as u:
        with uf.FaultService(u) as service:
            region = u.map(PAGE)
            service.serve(region, uf.sources.Zero())
            assert region.array[0] == 0
            view = region.array[1:]
        assert len(tasks() - before) == 1
    assert len(tasks() - before) == 1  # the keeper: a view lives
    del view
    deadline = time.monotonic() + 30
    while tasks() - before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not tasks() - before


# -- sources that fail -------------------------------------------------------------------------------


def test_a_file_that_became_shorter(needs_privilege: None, wire: str, tmp_path: Path) -> None:
    """The bytes that are left come; pages with a byte missing fail closed, and say why."""
    path = tmp_path / "data"
    data = np.random.default_rng(4).integers(1, 256, 8 * PAGE, dtype=np.uint8)
    path.write_bytes(data.tobytes())
    with uf.Userfaultfd(wire) as u, uf.FaultService(u) as service:
        region = u.map(8 * PAGE)
        service.serve(region, uf.sources.File(path))
        os.truncate(path, 5 * PAGE + 10)
        assert (region.array[: 5 * PAGE] == data[: 5 * PAGE]).all()
        read, write = os.pipe()
        for page in (5, 7):
            # A system call fails with EFAULT where a plain touch would be SIGBUS.
            with pytest.raises(OSError, match="Bad address"):
                os.write(write, region.array[page * PAGE : page * PAGE + 1])
        os.close(read)
        os.close(write)
        deadline = time.monotonic() + 30
        while len(service.failures()) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)  # the engine wakes the page's thread a moment before it notes why
        first, second = service.failures()
        assert first.address == region.start + 5 * PAGE
        assert (first.region, first.offset) == (region.id, 5 * PAGE)
        assert "source failed: No data available" in first.why
        assert second.offset == 7 * PAGE
        assert service.stats()["failed"] == 2


def test_a_page_that_failed_kills_its_toucher(wire: str, child: Child, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(8 * PAGE))
    done = child(f"""
        u = uf.Userfaultfd(WIRE)
        region = u.map(8 * PAGE)
        service = uf.FaultService(u)
        service.serve(region, uf.sources.File({str(path)!r}))
        os.truncate({str(path)!r}, 0)
        print("before", flush=True)
        print("still here", region.array[0], flush=True)
        """)
    died_of(done, signal.SIGBUS, signal.SIGSEGV)


# -- exit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", "sys.exit(0)", "os._exit(0)"])
def test_the_interpreter_exits_with_everything_open(wire: str, child: Child, how: str) -> None:
    """Daemon threads go on touching while it exits: they are served, or gone, never killed or hung."""
    done = child(
        """
        data = np.full(4096 * PAGE, 7, np.uint8)
        u = uf.Userfaultfd(WIRE)
        service = uf.FaultService(u)
        region = u.map(4096 * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        a = region.array
        pages = np.random.default_rng(0).permutation(4096).astype(np.uint64) * np.uint64(PAGE)
        for i in range(4):
            threading.Thread(target=uf.touch, args=(a, pages[i::4].copy()), daemon=True).start()
        """
        + how
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stderr == ""
