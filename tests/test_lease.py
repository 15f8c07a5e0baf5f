"""The affinity lease: when two threads share a CPU, and that everybody gets their own CPUs back.

The test's thread stands for the engine's. Its clock is made up, in milliseconds.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support import Child
from userfault._lease import Lease

MS = 1_000_000
BOTH = set(sorted(os.sched_getaffinity(0))[:2])


# Fork a process with a number of one's choice: clone3, with exit_signal SIGCHLD and set_tid.
CLONE = """
import ctypes
def clone(number):
    number = ctypes.c_int(number)
    arguments = (ctypes.c_uint64 * 10)(0, 0, 0, 0, 17, 0, 0, 0, ctypes.addressof(number), 1)
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.syscall(ctypes.c_long(435), arguments, ctypes.c_long(80)), ctypes.get_errno()
"""


def can_clone() -> bool:
    namespace: dict[str, Any] = {}
    exec(CLONE, namespace)
    return bool(namespace["clone"](1) == (-1, errno.EEXIST))  # else EPERM, or seccomp's ENOSYS


def where(there: bool) -> Callable[[Any], Any]:
    """A test that is not there on other machines."""
    return lambda test: test if there else None


two_cpus = where(len(BOTH) == 2)
two_cpus_and_children = where(len(BOTH) == 2 and Path(f"/proc/self/task/{os.getpid()}/children").exists())
two_cpus_and_numbers = where(len(BOTH) == 2 and can_clone())


class Thread(ThreadPoolExecutor):
    """A thread that does what it is told."""

    def __init__(self) -> None:
        super().__init__(1)
        self.tid = self.do(threading.get_native_id)

    def do(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return self.submit(call, *arguments).result(60)

    def end(self) -> None:
        """A thread that is joined is there for yet a moment."""
        self.shutdown()
        while Path(f"/proc/self/task/{self.tid}").exists():
            time.sleep(0.001)


@pytest.fixture
def lease() -> Iterator[Lease]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, BOTH)
    lease = Lease()
    yield lease
    lease.end()
    os.sched_setaffinity(0, before)


@pytest.fixture
def toucher(lease: Lease) -> Iterator[Thread]:
    with Thread() as thread:
        yield thread


def fault(lease: Lease, tid: int, ms: float = 0, n: int = 16) -> None:
    """The thread's n faults, all within a millisecond."""
    for i in range(n):
        lease.saw(tid, int(ms * MS) + i)


def leased(lease: Lease, toucher: Thread) -> set[int]:
    """Have the thread leased; the mask, which is one CPU."""
    fault(lease, toucher.tid)
    mask = os.sched_getaffinity(toucher.tid)
    assert len(mask) == 1
    assert os.sched_getaffinity(0) == mask
    assert lease.held
    return mask


def masks(*tids: int) -> list[set[int]]:
    return [os.sched_getaffinity(tid) for tid in tids]


@contextlib.contextmanager
def sleeping(by: Thread, *command: str) -> Iterator[int]:
    """A process that the thread creates."""
    process = by.do(subprocess.Popen, command or ("sleep", "60"))
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


class Session:
    """A process and its descendants, killed at the end."""

    def __init__(self, *command: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)

    def ask(self, question: str | None = None) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if question is not None:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:
            pass


@two_cpus
def test_it_takes_a_streak(lease: Lease, toucher: Thread) -> None:
    fault(lease, toucher.tid, n=15)
    assert not lease.held
    assert masks(0, toucher.tid) == [BOTH, BOTH]
    fault(lease, toucher.tid, n=1)
    assert lease.held
    (mask, same) = masks(0, toucher.tid)
    assert mask == same
    assert len(mask) == 1


@two_cpus
@pytest.mark.parametrize("broken_by", ["another", "several", "unknown", "gap"])
def test_a_broken_streak_starts_anew(lease: Lease, toucher: Thread, broken_by: str) -> None:
    with Thread() as other:
        for ms in range(0, 20, 2):
            fault(lease, toucher.tid, ms if broken_by == "gap" else 0, 15)
            if broken_by == "several":
                lease.saw_many(0)
            elif broken_by != "gap":
                fault(lease, other.tid if broken_by == "another" else 0, 0, 15)
        assert not lease.held
        assert masks(0, toucher.tid, other.tid) == [BOTH] * 3


@two_cpus
def test_unknown_threads_make_nobody_wait(lease: Lease, toucher: Thread) -> None:
    fault(lease, 0, n=1000)
    assert not lease.held
    leased(lease, toucher)


@two_cpus
def test_given_back_when_it_is_quiet(lease: Lease, toucher: Thread) -> None:
    mask = leased(lease, toucher)
    fault(lease, toucher.tid, 8)
    lease.expire(18 * MS)
    assert masks(0, toucher.tid) == [mask, mask]
    lease.expire(19 * MS)
    assert masks(0, toucher.tid) == [BOTH, BOTH]
    assert lease.held  # for one more look
    lease.expire(519 * MS)
    assert not lease.held


@two_cpus
def test_given_back_at_the_end(lease: Lease, toucher: Thread) -> None:
    leased(lease, toucher)
    lease.end()
    assert not lease.held
    assert masks(0, toucher.tid) == [BOTH, BOTH]
    leased(lease, toucher)
    lease.expire(11 * MS)
    lease.end()
    leased(lease, toucher)  # it waits for nothing: that is forgotten, too


@two_cpus
@pytest.mark.parametrize("one", ["toucher", "engine"])
def test_a_mask_that_somebody_changed_stays(lease: Lease, toucher: Thread, one: str) -> None:
    tids = (toucher.tid, 0) if one == "toucher" else (0, toucher.tid)
    other = BOTH - leased(lease, toucher)
    os.sched_setaffinity(tids[0], other)
    lease.end()
    assert masks(*tids) == [other, BOTH]


@two_cpus
@pytest.mark.parametrize("one", ["toucher", "engine"])
def test_a_change_ends_a_lease_that_lasts(lease: Lease, toucher: Thread, one: str) -> None:
    tids = (toucher.tid, 0) if one == "toucher" else (0, toucher.tid)
    other = BOTH - leased(lease, toucher)
    os.sched_setaffinity(tids[0], other)
    fault(lease, toucher.tid, 501, n=1)
    assert masks(*tids) == [other, BOTH]


@two_cpus
def test_others_end_it(lease: Lease, toucher: Thread) -> None:
    mask = leased(lease, toucher)
    for i in range(100):  # a third of all batches
        lease.saw(toucher.tid, 2 * i)
        lease.saw(toucher.tid, 2 * i + 1)
        lease.saw_many(2 * i) if i % 2 else lease.saw(0, 2 * i)
    assert masks(0, toucher.tid) == [mask, mask]
    for i in range(16):  # half
        lease.saw(toucher.tid, 1000 + i)
        lease.saw_many(1000) if i % 2 else lease.saw(threading.get_native_id(), 1000)
    assert masks(0, toucher.tid) == [BOTH, BOTH]


@two_cpus
def test_short_leases_become_rare(lease: Lease, toucher: Thread) -> None:
    begins = []
    for ms in range(4000):
        fault(lease, toucher.tid, ms)
        if os.sched_getaffinity(toucher.tid) != BOTH:
            begins.append(ms)
            lease.expire((ms + 11) * MS)
    waits = [end - start - 11 for start, end in itertools.pairwise(begins)]
    assert waits == [20, 40, 80, 160, 320, 640, 1000, 1000]
    # One that was worth it costs no wait.
    fault(lease, toucher.tid, 6000, n=300)
    assert os.sched_getaffinity(toucher.tid) != BOTH
    lease.expire(6011 * MS)
    assert os.sched_getaffinity(toucher.tid) == BOTH
    fault(lease, toucher.tid, 6012)
    assert os.sched_getaffinity(toucher.tid) != BOTH


@two_cpus
def test_who_is_no_thread_of_ours(lease: Lease, toucher: Thread) -> None:
    with sleeping(toucher) as pid, Thread() as ended:
        ended.end()
        for ms, tid in enumerate((0, -1, 2**31 - 1, ended.tid, pid, threading.get_native_id())):
            fault(lease, tid, 2000 * ms)
            assert not lease.held
            assert masks(0, pid, toucher.tid) == [BOTH] * 3


@two_cpus
@pytest.mark.parametrize("cpu", sorted(BOTH))
def test_who_has_one_cpu_is_joined_there(lease: Lease, toucher: Thread, cpu: int) -> None:
    os.sched_setaffinity(toucher.tid, {cpu})
    assert leased(lease, toucher) == {cpu}
    with toucher.do(Thread) as heir:
        lease.end()
        assert masks(0, toucher.tid, heir.tid) == [BOTH, {cpu}, {cpu}]


@two_cpus
def test_no_cpu_in_common(lease: Lease, toucher: Thread) -> None:
    first, second = sorted(BOTH)
    os.sched_setaffinity(0, {first})
    os.sched_setaffinity(toucher.tid, {second})
    fault(lease, toucher.tid)
    assert not lease.held
    os.sched_setaffinity(toucher.tid, BOTH)
    fault(lease, toucher.tid, 10)
    assert not lease.held  # it is not tried again at once
    fault(lease, toucher.tid, 21)
    assert masks(0, toucher.tid) == [{first}, {first}]
    lease.end()
    assert masks(0, toucher.tid) == [{first}, BOTH]


@two_cpus
def test_a_toucher_that_has_ended(lease: Lease) -> None:
    with Thread() as toucher:
        leased(lease, toucher)
        heir = toucher.do(Thread)
        toucher.end()
    with heir:
        lease.expire(11 * MS)
        assert masks(0, heir.tid) == [BOTH, BOTH]


@two_cpus
@pytest.mark.parametrize("name", ["heir", "a) 1 2 3 4 (b"])
def test_threads_inherit_the_toucher_s_mask(lease: Lease, toucher: Thread, name: str) -> None:
    mask = leased(lease, toucher)
    with contextlib.ExitStack() as stack:
        heirs = [stack.enter_context(toucher.do(Thread)) for _ in range(100)]  # several reads full
        heirs.append(stack.enter_context(heirs[0].do(Thread)))
        Path(f"/proc/self/task/{heirs[0].tid}/comm").write_text(name)
        heirs.pop(1).end()
        other = stack.enter_context(toucher.do(Thread))
        os.sched_setaffinity(other.tid, BOTH - mask)
        tids = [heir.tid for heir in heirs]
        assert masks(*tids) == [mask] * len(tids)
        lease.expire(11 * MS)
        assert masks(*tids) == [BOTH] * len(tids)
        assert masks(other.tid) == [BOTH - mask]


@two_cpus_and_children
def test_processes_inherit_the_toucher_s_mask(lease: Lease, toucher: Thread) -> None:
    mask = leased(lease, toucher)
    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(sleeping(toucher)) for _ in range(200)]  # several reads full
        assert masks(*pids) == [mask] * len(pids)
        descriptors = os.listdir("/proc/self/fd")
        lease.expire(11 * MS)
        assert masks(*pids) == [BOTH] * len(pids)
        assert os.listdir("/proc/self/fd") == descriptors


@two_cpus_and_children
def test_forked_trees_inherit_the_toucher_s_mask(child: Child) -> None:
    done = child("""
        from concurrent.futures import ThreadPoolExecutor
        from userfault._lease import Lease
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        both = os.sched_getaffinity(0)
        toucher = ThreadPoolExecutor(1)
        tid = toucher.submit(threading.get_native_id).result()
        lease = Lease()
        for i in range(16):
            lease.saw(tid, i)
        ours, theirs = os.pipe()

        def family(generations):
            # A process with a second thread, and another such process as its child.
            if os.fork() == 0:
                heir = threading.Thread(target=time.sleep, args=(60,), daemon=True)
                heir.start()
                os.write(theirs, b"%d %d " % (os.getpid(), heir.native_id))
                if generations > 1:
                    family(generations - 1)
                time.sleep(60)

        toucher.submit(family, 3).result()
        tids = b""
        while tids.count(b" ") < 6:
            tids += os.read(ours, 100)
        tids = [int(tid) for tid in tids.split()]
        before = [os.sched_getaffinity(tid) for tid in tids]
        lease.end()
        after = [os.sched_getaffinity(tid) for tid in tids]
        os.kill(tids[0], signal.SIGKILL)
        assert all(len(mask) == 1 for mask in before), before
        assert after == [both] * 6, after
    """)
    assert done.returncode == 0, done.stderr


@two_cpus
def test_who_was_pinned_before_stays(lease: Lease, toucher: Thread) -> None:
    with contextlib.ExitStack() as stack:
        tids = [stack.enter_context(Thread()).tid for _ in BOTH]
        pids = [stack.enter_context(sleeping(toucher)) for _ in BOTH]
        for cpu, *pair in zip(BOTH, tids, pids, strict=True):
            for tid in pair:
                os.sched_setaffinity(tid, {cpu})
        time.sleep(0.03)  # start times are multiples of 10 ms
        leased(lease, toucher)
        lease.expire(11 * MS)
        lease.expire(600 * MS)
        assert masks(0, toucher.tid) == [BOTH, BOTH]
        assert masks(*tids) == masks(*pids) == [{cpu} for cpu in BOTH]


@two_cpus
def test_heirs_of_a_lease_that_lasts(lease: Lease) -> None:
    for _ in range(5):
        # These two have started in the tick of the lease, as an heir may.
        with Thread() as toucher, Thread() as engine:
            mask = engine.do(leased, lease, toucher)
            with toucher.do(Thread) as heir:
                engine.do(fault, lease, toucher.tid, 499)
                assert masks(heir.tid) == [mask]
                engine.do(fault, lease, toucher.tid, 501)
                assert masks(engine.tid, toucher.tid, heir.tid) == [mask, mask, BOTH]
            with toucher.do(Thread) as heir:
                engine.do(fault, lease, toucher.tid, 1000)
                engine.do(lease.expire, 1002 * MS)
                assert masks(engine.tid, toucher.tid, heir.tid) == [mask, mask, BOTH]
            engine.do(lease.end)
            assert masks(engine.tid, toucher.tid) == [BOTH, BOTH]


@two_cpus_and_children
@pytest.mark.parametrize("look", ["expire", "end", "begin"])
def test_a_fork_that_lasts_longer_than_the_lease(lease: Lease, toucher: Thread, look: str) -> None:
    mask = leased(lease, toucher)
    lease.expire(11 * MS)
    with sleeping(toucher) as pid, Thread() as thread:
        # This process stands for one whose fork, during the lease, is complete only now. The thread does not.
        for tid in (pid, thread.tid):
            os.sched_setaffinity(tid, mask)
        if look == "expire":
            lease.expire(500 * MS)
            assert masks(pid) == [mask]
            lease.expire(511 * MS)
            assert not lease.held
        elif look == "end":
            lease.end()
        else:
            os.sched_setaffinity(thread.tid, BOTH - mask)
            fault(lease, thread.tid, 100)
            mask = BOTH - mask
        assert masks(pid, thread.tid) == [BOTH, mask]


@two_cpus_and_children
def test_children_of_who_was_there_before_stay(lease: Lease, toucher: Thread) -> None:
    with Session("sh", "-c", "read cpu; sleep 60 & echo $!; wait") as shell:
        time.sleep(0.03)
        mask = leased(lease, toucher)
        os.sched_setaffinity(shell.process.pid, mask)
        pid = int(shell.ask(""))
        lease.end()
        assert masks(shell.process.pid, pid) == [mask, mask]


@two_cpus_and_numbers
def test_another_process_has_its_number_now(lease: Lease) -> None:
    code = """
import os, sys, time
print("ready", flush=True)
number, cpu = map(int, sys.stdin.readline().split())
os.sched_setaffinity(0, [cpu])
while (pid := clone(number)[0]) < 0:
    time.sleep(0.001)  # the number is taken for yet a moment
if pid:
    print("done", flush=True)
time.sleep(60)
"""
    with Session(sys.executable, "-c", CLONE + code) as other, Thread() as toucher:
        assert other.ask() == "ready"
        time.sleep(0.03)
        mask = leased(lease, toucher)
        toucher.end()
        assert other.ask(f"{toucher.tid} {min(mask)}") == "done"
        lease.end()
        assert masks(0, toucher.tid) == [BOTH, mask]


@two_cpus
def test_without_a_descriptor_to_be_had(child: Child) -> None:
    done = child("""
        import resource
        from concurrent.futures import ThreadPoolExecutor
        from userfault._lease import Lease
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        both = os.sched_getaffinity(0)
        toucher = ThreadPoolExecutor(1)
        tid = toucher.submit(threading.get_native_id).result()
        lease = Lease()
        for limit in (0, 1000, 0):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 1000))
            for i in range(16):
                lease.saw(tid, limit * 1000000 + i)
            assert len(os.sched_getaffinity(tid)) == (1 if limit else 2)
            if limit:
                resource.setrlimit(resource.RLIMIT_NOFILE, (0, 1000))
                lease.end()
            assert os.sched_getaffinity(tid) == os.sched_getaffinity(0) == both
    """)
    assert done.returncode == 0, done.stderr
