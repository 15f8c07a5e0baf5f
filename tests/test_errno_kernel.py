"""Every row of the errno table that the running kernel can be made to give, to Python and to the engine.

RECORDED is what it answers to the bare ioctls; tests/test_errno_shim.py plays these answers back.
"""

from __future__ import annotations

import ctypes
import inspect
import mmap
import os
import threading
import time
from collections.abc import Callable
from errno import EAGAIN, EBADF, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM, ENOTTY, EPERM, ESRCH
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import userfault as uf
from support import LAB, PAGE, Child, has, only, touching
from userfault import _errno, _ioctl

LIBC = ctypes.CDLL(None, use_errno=True)
CLASSES = {row[0]: row[2] for row in _errno.ROWS}
MARK = 0x5555
REQUESTS = {
    "API": 0xC018AA3F,
    "REGISTER": 0xC020AA00,
    "WAKE": 0x8010AA02,
    "COPY": 0xC028AA03,
    "ZEROPAGE": 0xC020AA04,
    "MOVE": 0xC028AA05,
    "WRITEPROTECT": 0xC018AA06,
    "CONTINUE": 0xC020AA07,
    "POISON": 0xC020AA08,
}
NEEDED = {"MOVE": uf.Feature.MOVE, "POISON": uf.Feature.POISON}
# Those of the running kernel.
CALLS = [call for call in REQUESTS if call not in NEEDED or has(NEEDED[call])]
MISSING, MINOR = int(uf.RegisterMode.MISSING), int(uf.RegisterMode.MINOR)
PART, WHOLE = 3 * PAGE, 8 * PAGE


class Answer(NamedTuple):
    """An errno, and what the kernel left in the structure's last field; None: what was there before."""

    number: int
    field: int | None


# Linux 6.18 and, but for MOVE and POISON, which it lacks, 6.1.192. "no memory" is of the lab's guest alone.
RECORDED = {
    ("COPY", "the first page is there"): Answer(EEXIST, -EEXIST),
    ("COPY", "the fourth page is there"): Answer(EAGAIN, PART),
    ("COPY", "not registered"): Answer(ENOENT, -ENOENT),
    ("COPY", "unmapped"): Answer(ENOENT, -ENOENT),
    ("COPY", "two mappings"): Answer(ENOENT, -ENOENT),
    ("COPY", "source unreadable"): Answer(EFAULT, -EFAULT),
    ("COPY", "fourth page of the source unreadable"): Answer(EAGAIN, PART),
    ("COPY", "misaligned"): Answer(EINVAL, None),
    ("COPY", "an event is pending"): Answer(EAGAIN, -EAGAIN),
    ("COPY", "the process has exited"): Answer(ESRCH, None),
    ("COPY", "no memory"): Answer(ENOMEM, -ENOMEM),
    ("COPY", "a pipe"): Answer(ENOTTY, None),
    ("COPY", "closed"): Answer(EBADF, None),
    ("ZEROPAGE", "the first page is there"): Answer(EEXIST, -EEXIST),
    ("ZEROPAGE", "the fourth page is there"): Answer(EAGAIN, PART),
    ("ZEROPAGE", "not registered"): Answer(ENOENT, -ENOENT),
    ("ZEROPAGE", "unmapped"): Answer(ENOENT, -ENOENT),
    ("ZEROPAGE", "two mappings"): Answer(ENOENT, -ENOENT),
    ("ZEROPAGE", "misaligned"): Answer(EINVAL, None),
    ("ZEROPAGE", "an event is pending"): Answer(EAGAIN, -EAGAIN),
    ("ZEROPAGE", "the process has exited"): Answer(ESRCH, None),
    ("ZEROPAGE", "a pipe"): Answer(ENOTTY, None),
    ("ZEROPAGE", "closed"): Answer(EBADF, None),
    ("MOVE", "the first page is there"): Answer(EEXIST, -EEXIST),
    ("MOVE", "the fourth page is there"): Answer(EAGAIN, PART),
    ("MOVE", "not registered"): Answer(EINVAL, -EINVAL),
    ("MOVE", "nothing at the source"): Answer(ENOENT, -ENOENT),
    ("MOVE", "source locked"): Answer(EINVAL, -EINVAL),
    ("MOVE", "source shared by a fork"): Answer(EBUSY, -EBUSY),
    ("MOVE", "misaligned"): Answer(EINVAL, None),
    ("MOVE", "an event is pending"): Answer(EAGAIN, -EAGAIN),
    ("MOVE", "a pipe"): Answer(ENOTTY, None),
    ("MOVE", "closed"): Answer(EBADF, None),
    ("POISON", "the first page is there"): Answer(EEXIST, -EEXIST),
    ("POISON", "the fourth page is there"): Answer(EAGAIN, PART),
    ("POISON", "not registered"): Answer(ENOENT, -ENOENT),
    ("POISON", "misaligned"): Answer(EINVAL, None),
    ("POISON", "an event is pending"): Answer(EAGAIN, -EAGAIN),
    ("POISON", "the process has exited"): Answer(ESRCH, None),
    ("POISON", "a pipe"): Answer(ENOTTY, None),
    ("POISON", "closed"): Answer(EBADF, None),
    ("CONTINUE", "registered for missing pages"): Answer(EINVAL, -EINVAL),
    ("CONTINUE", "not in the page cache"): Answer(EFAULT, -EFAULT),
    ("CONTINUE", "in place already"): Answer(EEXIST, -EEXIST),
    ("WRITEPROTECT", "not registered"): Answer(ENOENT, None),
    ("WRITEPROTECT", "an event is pending"): Answer(EAGAIN, None),
    ("WRITEPROTECT", "the process has exited"): Answer(ESRCH, None),
    ("WRITEPROTECT", "a pipe"): Answer(ENOTTY, None),
    ("WAKE", "misaligned"): Answer(EINVAL, None),
    ("WAKE", "a pipe"): Answer(ENOTTY, None),
    ("REGISTER", "another's"): Answer(EBUSY, None),
    ("REGISTER", "a file's"): Answer(EINVAL, None),
    ("REGISTER", "never writable"): Answer(EPERM, None),
    ("REGISTER", "no mapping to be had"): Answer(ENOMEM, None),
    ("API", "unknown feature"): Answer(EINVAL, 0),
    ("API", "fork events without CAP_SYS_PTRACE"): Answer(EPERM, 0),
}


# The same, on 6.1.192 and all kernels before April 2025: where nothing was done, the field is left alone.
UNWRITTEN = Answer(EAGAIN, None)


def ask(fd: int, call: str, start: int, length: int, source: int = 0, mode: int = 0) -> Answer | None:
    """The bare ioctl: how it failed, or None."""
    words = {
        "API": [start, length, MARK],
        "WAKE": [start, length],
        "WRITEPROTECT": [start, length, mode],
        "COPY": [start, source, length, mode, MARK],
        "MOVE": [start, source, length, mode, MARK],
    }.get(call, [start, length, mode, MARK])
    struct = (ctypes.c_int64 * len(words))(*words)
    if LIBC.ioctl(ctypes.c_int(fd), ctypes.c_ulong(REQUESTS[call]), struct) == 0:
        return None
    return Answer(ctypes.get_errno(), None if struct[-1] == words[-1] else struct[-1])


def refuses(answer: Answer, call: Callable[..., object], *arguments: object) -> None:
    """The exception says what the kernel answered."""
    told = None
    try:
        call(*arguments)
    except uf.UffdError as error:
        told = type(error), error.errno, error.done
    assert told == (CLASSES[answer.number], answer.number, max(answer.field or 0, 0)), told


def checked(fd: int, call: str, start: int, length: int, source: int = 0, mode: int = 0) -> None:
    """The function under the method."""
    between = (source,) if call in ("COPY", "MOVE") else ()
    getattr(_ioctl, call.lower())(fd, start, *between, length, *(() if call == "WAKE" else (mode,)))


def anonymous(n_bytes: int, value: int | None = None) -> np.ndarray:
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint8)
    if value is not None:
        array[:] = value
    return array


# The same in a child.
TOOLS = "\n".join(
    [
        "from __future__ import annotations",
        "from errno import *",
        "from typing import NamedTuple",
        "from userfault import _errno, _ioctl",
        "LIBC = ctypes.CDLL(None, use_errno=True)",
        "CLASSES = {row[0]: row[2] for row in _errno.ROWS}",
        f"MARK, REQUESTS, PART, WHOLE = {MARK}, {REQUESTS}, {PART}, {WHOLE}",
        inspect.getsource(Answer),
        f"RECORDED, UNWRITTEN = {RECORDED}, {UNWRITTEN}",
        *map(inspect.getsource, (ask, refuses, checked, anonymous)),
    ]
)


def in_a_child(child: Child, code: str, **given: object) -> None:
    """With the tools, and what is `given`; it must get to its end."""
    lines = [f"{name} = {value!r}" for name, value in given.items()]
    done = child("\n".join([TOOLS, *lines, code, "print('good')"]))
    assert done.stdout == "good\n", (done.returncode, done.stdout, done.stderr)


def those(why: str) -> list[str]:
    """The ioctls that have an answer for it."""
    return [call for call, reason in RECORDED if reason == why and call in CALLS]


# -- one call ------------------------------------------------------------------------------------------


class Ground:
    """Regions of eight pages, and memory of eight pages to fill them from, until the test's end."""

    def __init__(self, u: uf.Userfaultfd) -> None:
        self.u = u
        self.kept: list[object] = []

    def region(self, present: int | None = None) -> int:
        """The start of a region, of which one page may be there."""
        region = self.u.map(WHOLE)
        self.kept.append(region)
        if present is not None:
            self.u.zeropage(region.start + present * PAGE, PAGE)
        return region.start

    def without(self, take: Callable[[int, int], object], first: int = 0) -> int:
        """A region, its pages from `first` on taken away."""
        start = self.region()
        take(start + first * PAGE, WHOLE - first * PAGE)
        return start

    def memory(self, value: int | None = 7) -> int:
        array = anonymous(WHOLE, value)
        self.kept.append(array)
        return int(array.ctypes.data)

    def unreadable(self, first: int) -> int:
        """Memory that cannot be read from page `first` on."""
        start = self.memory()
        libc("mprotect", start + first * PAGE, WHOLE - first * PAGE, 0)  # PROT_NONE
        return start

    def locked(self) -> int:
        start = self.memory()
        libc("mlock", start, WHOLE)
        return start

    def unregister(self, start: int, length: int) -> None:
        _ioctl.unregister(self.u.fileno(), start, length)


def libc(name: str, start: int, length: int, *more: int) -> None:
    assert getattr(LIBC, name)(ctypes.c_void_p(start), ctypes.c_size_t(length), *more) == 0


def unmap(start: int, length: int) -> None:
    """Not by munmap: when the region goes, somebody else's memory could be there."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    LIBC.mmap.restype = ctypes.c_void_p
    where, size = ctypes.c_void_p(start), ctypes.c_size_t(length)
    assert LIBC.mmap(where, size, 0, flags, -1, ctypes.c_long(0)) == start


# Where the region starts, and the source: made anew for each call.
SCENES: dict[str, Callable[[Ground], tuple[int, int]]] = {
    "the first page is there": lambda ground: (ground.region(present=0), ground.memory()),
    "the fourth page is there": lambda ground: (ground.region(present=3), ground.memory()),
    "not registered": lambda ground: (ground.without(ground.unregister), ground.memory()),
    "unmapped": lambda ground: (ground.without(unmap), ground.memory()),
    "two mappings": lambda ground: (ground.without(ground.unregister, 4), ground.memory()),
    "source unreadable": lambda ground: (ground.region(), ground.unreadable(0)),
    "fourth page of the source unreadable": lambda ground: (ground.region(), ground.unreadable(3)),
    "nothing at the source": lambda ground: (ground.region(), ground.memory(None)),
    "source locked": lambda ground: (ground.region(), ground.locked()),
    "registered for missing pages": lambda ground: (ground.region(), 0),
    "misaligned": lambda ground: (ground.region() + 8, ground.memory()),
}

METHODS: dict[str, Callable[[uf.Userfaultfd, int, int], object]] = {
    "COPY": lambda u, start, source: u.copy(start, (ctypes.c_ubyte * WHOLE).from_address(source)),
    "ZEROPAGE": lambda u, start, _: u.zeropage(start, WHOLE),
    "MOVE": lambda u, start, source: u.move(start, source, WHOLE),
    "POISON": lambda u, start, _: u.poison(start, WHOLE),
    "CONTINUE": lambda u, start, _: u.continue_(start, WHOLE),
    "WRITEPROTECT": lambda u, start, _: u.writeprotect(start, WHOLE),
    "WAKE": lambda u, start, _: u.wake(start, WHOLE),
}


@pytest.mark.parametrize(
    ("call", "why"), [(call, why) for call, why in RECORDED if call in CALLS and why in SCENES]
)
def test_what_an_ioctl_answers(u: uf.Userfaultfd, call: str, why: str) -> None:
    ground, scene = Ground(u), SCENES[why]
    start, source = scene(ground)
    assert ask(u.fileno(), call, start, WHOLE, source, int(call == "WRITEPROTECT")) == RECORDED[call, why]
    if why == "misaligned":
        # Python does not let that get to the kernel.
        with pytest.raises(uf.RangeError):
            METHODS[call](u, *scene(ground))
    else:
        refuses(RECORDED[call, why], METHODS[call], u, *scene(ground))


@pytest.mark.parametrize("why", ["a pipe", "closed"])
def test_a_number_that_is_no_userfaultfd(needs_uffd: None, why: str) -> None:
    read, write = os.pipe()
    number = read if why == "a pipe" else 1 << 20
    for call in those(why):
        assert ask(number, call, PAGE, PAGE, PAGE) == RECORDED[call, why]
        refuses(RECORDED[call, why], checked, number, call, PAGE, PAGE, PAGE)
    os.close(read)
    os.close(write)


def test_register_another_ones_memory(u: uf.Userfaultfd, wire: str) -> None:
    with uf.Userfaultfd(wire) as other:
        ground = Ground(other)
        theirs = ground.region()
        answer = RECORDED["REGISTER", "another's"]
        assert ask(u.fileno(), "REGISTER", theirs, WHOLE, mode=MISSING) == answer
        refuses(answer, checked, u.fileno(), "REGISTER", theirs, WHOLE, 0, MISSING)
        refuses(answer, u.register, theirs, WHOLE)
        assert len(u.regions) == 0


@pytest.mark.parametrize("why", ["never writable", "a file's"])
def test_register_memory_that_cannot_be(u: uf.Userfaultfd, why: str) -> None:
    number, flags = os.open(__file__, os.O_RDONLY), mmap.MAP_PRIVATE
    if why == "never writable":
        memory = os.memfd_create("memory")
        os.ftruncate(memory, PAGE)
        os.close(number)
        number, flags = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY), mmap.MAP_SHARED
        os.close(memory)
    mapped = np.frombuffer(mmap.mmap(number, PAGE, flags, mmap.PROT_READ), np.uint8)
    os.close(number)
    start, answer = int(mapped.ctypes.data), RECORDED["REGISTER", why]
    assert ask(u.fileno(), "REGISTER", start, PAGE, mode=MISSING) == answer
    refuses(answer, checked, u.fileno(), "REGISTER", start, PAGE, 0, MISSING)


@only("msg")
def test_continue(wire: str) -> None:
    """Of a page that is not in the page cache, and of one that is mapped already."""
    memory = os.memfd_create("memory")
    os.ftruncate(memory, PAGE)
    mapped = np.frombuffer(mmap.mmap(memory, PAGE), np.uint8)
    start = int(mapped.ctypes.data)
    with uf.Userfaultfd("msg", uf.Feature.MINOR_SHMEM) as u:
        checked(u.fileno(), "REGISTER", start, PAGE, 0, MINOR)
        for why in ("not in the page cache", "in place already"):
            assert ask(u.fileno(), "CONTINUE", start, PAGE) == RECORDED["CONTINUE", why]
            refuses(RECORDED["CONTINUE", why], u.continue_, start, PAGE)
            if why == "not in the page cache":
                os.pwrite(memory, bytes(PAGE), 0)
                assert u.continue_(start, PAGE) == PAGE
        _ioctl.unregister(u.fileno(), start, PAGE)
    os.close(memory)


@only("msg")
def test_features_that_the_kernel_refuses(wire: str, child: Child) -> None:
    in_a_child(
        child,
        """
numbers = [_ioctl.open_by_syscall(os.O_CLOEXEC) for _ in range(2)]
os.setuid(65534)  # without CAP_SYS_PTRACE
for number, why, features in zip(
    numbers,
    ("unknown feature", "fork events without CAP_SYS_PTRACE"),
    (1 << 62, int(uf.Feature.EVENT_FORK)),
):
    assert ask(number, "API", 0xAA, features) == RECORDED["API", why]
    refuses(RECORDED["API", why], _ioctl.api, number, 0xAA, features)
""",
    )


def test_more_memory_than_there_are_addresses(u: uf.Userfaultfd) -> None:
    refuses(Answer(ENOMEM, None), u.map, 1 << 47)


def test_out_of_descriptors(needs_uffd: None, child: Child) -> None:
    in_a_child(
        child,
        """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
refuses(Answer(EMFILE, None), _ioctl.open_by_syscall, os.O_CLOEXEC)
""",
    )


if not LAB:

    def test_out_of_mappings(needs_uffd: None, child: Child) -> None:
        """Registering a part of a mapping splits it."""
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        if limit > 200_000:
            pytest.skip(f"vm.max_map_count is {limit}: too many to use up")
        in_a_child(
            child,
            """
u = uf.Userfaultfd()
memory, many = anonymous(3 * PAGE), anonymous((limit + 2) * PAGE)
start, page, size = memory.ctypes.data + PAGE, many.ctypes.data, ctypes.c_size_t(PAGE)
while LIBC.mprotect(ctypes.c_void_p(page), size, mmap.PROT_READ) == 0:
    page += 2 * PAGE
answer = RECORDED["REGISTER", "no mapping to be had"]
assert ask(u.fileno(), "REGISTER", start, PAGE, mode=1) == answer
refuses(answer, checked, u.fileno(), "REGISTER", start, PAGE, 0, 1)
refuses(answer, u.register, start, PAGE)
assert len(u.regions) == 0
""",
            limit=limit,
        )


def test_a_process_that_has_exited(wire: str, child: Child) -> None:
    """Its userfaultfd, received over a socket, has outlived it."""
    in_a_child(
        child,
        """
import socket
ours, theirs = socket.socketpair()
pid = os.fork()
if pid == 0:
    u = uf.Userfaultfd(WIRE)
    region = u.map(PAGE)
    socket.send_fds(theirs, [region.start.to_bytes(8, "little")], [u.fileno()])
    os._exit(0)
start, (fd,), *_ = socket.recv_fds(ours, 8, 1)
start = int.from_bytes(start, "little")
os.waitpid(pid, 0)
source = anonymous(PAGE, 7).ctypes.data
for call in calls:
    about = fd, call, start, PAGE, source, int(call == "WRITEPROTECT")
    assert ask(*about) == RECORDED[call, "the process has exited"], call
    refuses(RECORDED[call, "the process has exited"], checked, *about)
""",
        calls=those("the process has exited"),
    )


if "MOVE" in CALLS:

    @only("msg")
    def test_moving_what_a_fork_shares(wire: str, child: Child) -> None:
        in_a_child(
            child,
            """
memory = anonymous(PAGE, 7)
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(write)
    os.read(read, 1)
    os._exit(0)
u = uf.Userfaultfd("msg")
region = u.map(PAGE)
answer = RECORDED["MOVE", "source shared by a fork"]
assert ask(u.fileno(), "MOVE", region.start, PAGE, memory.ctypes.data) == answer
refuses(answer, u.move, region.start, memory.ctypes.data, PAGE)
""",
        )


# -- an event that nobody has read ---------------------------------------------------------------------

# What raises the event, and waits until it is read, without the GIL.
EVENTS = {
    "EVENT_REMOVE": "LIBC.madvise(address, size, mmap.MADV_DONTNEED)",
    "EVENT_UNMAP": "LIBC.munmap(address, size)",
    "EVENT_REMAP": "LIBC.mremap(address, size, size, 1 | 2, ctypes.c_void_p(elsewhere))",  # MAYMOVE, FIXED
}
if os.uname().machine == "x86_64":
    # fork(2) by its number, in a thread of C: libc's fork would keep malloc locked, os.fork the GIL.
    EVENTS["EVENT_FORK"] = (
        "LIBC.pthread_create(ctypes.byref(thread), None, LIBC.syscall, 57), LIBC.pthread_join(thread, None)"
    )


@only("msg")
@pytest.mark.parametrize("event", EVENTS)
def test_an_event_that_nobody_has_read(needs_privilege: None, wire: str, child: Child, event: str) -> None:
    in_a_child(
        child,
        """
u = uf.Userfaultfd("msg", uf.Feature(features))
region, changing = u.map(WHOLE, uf.RegisterMode.MISSING | uf.RegisterMode.WP), u.map(PAGE)
u.zeropage(changing.start, PAGE)
elsewhere = anonymous(PAGE).ctypes.data
address, size, thread = ctypes.c_void_p(changing.start), ctypes.c_size_t(PAGE), ctypes.c_ulong()
LIBC.madvise(address, size, 11)  # MADV_DOFORK
waiting = threading.Thread(target=lambda: exec(f"[{change}]", globals()), daemon=True)
waiting.start()
poll = select.poll()
poll.register(u.fileno(), select.POLLIN)
assert poll.poll(30_000)
source = anonymous(PAGE, 7)
methods = {
    "COPY": lambda page: u.copy(page, source),
    "ZEROPAGE": lambda page: u.zeropage(page, PAGE),
    "MOVE": lambda page: u.move(page, source.ctypes.data, PAGE),
    "POISON": lambda page: u.poison(page, PAGE),
    "WRITEPROTECT": lambda page: u.writeprotect(page, PAGE),
}
pages = {call: region.start + index * PAGE for index, call in enumerate(calls)}
for call, page in pages.items():
    answer = RECORDED[call, "an event is pending"]
    told = ask(u.fileno(), call, page, PAGE, source.ctypes.data, int(call == "WRITEPROTECT"))
    assert told in (answer, UNWRITTEN), (call, told)
    refuses(answer, methods[call], page)
assert waiting.is_alive()
assert len(uf.EventReader(u).read(30)) == 1
waiting.join()
for call, page in pages.items():
    assert methods[call](page) in (PAGE, None)
""",
        features=int(uf.Feature[event]) | (int(uf.Feature.MOVE) if "MOVE" in CALLS else 0),
        change=EVENTS[event],
        calls=those("an event is pending"),
    )


@only("msg")
def test_the_engine_while_the_address_space_changes(wire: str, child: Child) -> None:
    """Each DONTNEED raises an event; until its thread goes on after it was read, COPY answers EAGAIN."""
    in_a_child(
        child,
        """
uf.service._EVENTS = uf.Feature(0)  # a service refuses events, which it does not follow yet
data = np.random.default_rng(0).integers(1, 256, 64 * PAGE, dtype=np.uint8)
u = uf.Userfaultfd("msg", uf.Feature.EVENT_REMOVE)
service = uf.FaultService(u)
region = u.map(64 * PAGE)
service.serve(region, uf.sources.Buffer(data), readahead=0)
ends = time.monotonic() + 40

def again_and_again(call, *arguments):
    while not service.stats()["parked"] and time.monotonic() < ends:
        call(*arguments)

page, size = ctypes.c_void_p(region.start + 9 * PAGE), ctypes.c_size_t(PAGE)
threads = [threading.Thread(target=again_and_again, args=(LIBC.madvise, page, size, mmap.MADV_DONTNEED))]
for first in range(4):
    offsets = np.arange(first, 64, 4, dtype=np.uint64) * np.uint64(PAGE)
    threads.append(threading.Thread(target=again_and_again, args=(uf.touch, region.array, offsets)))
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
stats = service.stats()
assert stats["parked"] and stats["errors"][EAGAIN]
assert stats["failed"] == stats["forgotten"] == 0
assert (region.array == data).all()
""",
    )


# -- the engine ----------------------------------------------------------------------------------------


def noise(n_bytes: int) -> np.ndarray:
    return np.random.default_rng(n_bytes).integers(1, 256, n_bytes, dtype=np.uint8)


def settled(service: uf.FaultService, **expected: int) -> np.void:
    """The counters, once they are what they should be: a thread is awake a moment before it is counted."""
    deadline = time.monotonic() + 30
    while True:
        stats = service.stats()
        counted = {name: int(stats[name]) for name in expected}
        if counted == expected or time.monotonic() > deadline:
            break
        time.sleep(0.001)
    assert counted == expected
    return stats


def errors(stats: np.void) -> dict[int, int]:
    return {int(number): int(stats["errors"][number]) for number in np.flatnonzero(stats["errors"])}


def awake(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_the_engine_finds_a_page_in_the_middle(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    data = noise(WHOLE)
    region = u.map(WHOLE)
    service.serve(region, uf.sources.Buffer(data), readahead=0, page_bytes=WHOLE)
    u.copy(region.start + 3 * PAGE, bytes([9]) * PAGE)
    awake([touching(region, [0])])
    # Three pages and EAGAIN, EEXIST, and the rest.
    stats = settled(service, pages=7, existing=1)
    assert errors(stats) == {EAGAIN: 1, EEXIST: 1}
    assert stats["parked"] == stats["failed"] == stats["forgotten"] == 0
    data[3 * PAGE : 4 * PAGE] = 9
    assert (region.array == data).all()


@pytest.mark.parametrize("gone", ["unregistered", "unmapped"])
def test_the_engine_meets_a_run_that_is_half_gone(
    u: uf.Userfaultfd, service: uf.FaultService, gone: str
) -> None:
    data = noise(WHOLE)
    region = u.map(WHOLE)
    service.serve(region, uf.sources.Buffer(data), readahead=0, page_bytes=WHOLE)
    take = unmap if gone == "unmapped" else Ground(u).unregister
    take(region.start + WHOLE // 2, WHOLE // 2)
    awake([touching(region, [0])])
    stats = settled(service, pages=4, forgotten=4)
    assert set(errors(stats)) == {ENOENT}
    assert stats["failed"] == stats["parked"] == 0
    assert (region.array[: WHOLE // 2] == data[: WHOLE // 2]).all()


def test_the_engine_while_its_pages_are_given_up(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    """Behind its back, under load: a page has its bytes, or was unregistered before it came."""
    n_pages = 64 if LAB else 512
    data = noise(n_pages * PAGE)
    random = np.random.default_rng(3)
    for _ in range(2 if LAB else 20):
        region = u.map(len(data))
        service.serve(region, uf.sources.Buffer(data), readahead=0)
        touchers = [touching(region, random.permutation(n_pages)) for _ in range(4)]
        for page in random.permutation(n_pages).tolist():
            _ioctl.unregister(u.fileno(), region.start + page * PAGE, PAGE)
        awake(touchers)
        array = region.array.reshape(n_pages, PAGE)
        came = (array == data.reshape(n_pages, PAGE)).all(axis=1)
        assert (came | ~array.any(axis=1)).all()
        region.close()
    stats = service.stats()
    assert stats["failed"] == stats["parked"] == 0
    assert set(errors(stats)) <= {ENOENT}


def test_the_engine_cannot_read_its_source(
    needs_privilege: None, u: uf.Userfaultfd, service: uf.FaultService
) -> None:
    """The page fails closed, and says why; those about it come."""
    data = anonymous(WHOLE)
    data[:] = noise(WHOLE)
    region = u.map(WHOLE)
    service.serve(region, uf.sources.Buffer(data), readahead=0, page_bytes=WHOLE)
    libc("mprotect", data.ctypes.data + 3 * PAGE, PAGE, 0)
    read, write = os.pipe()
    with pytest.raises(OSError, match="Bad address"):
        os.write(write, region.array[3 * PAGE : 4 * PAGE])
    stats = settled(service, pages=7, failed=1)
    assert errors(stats) == {EAGAIN: 1, EFAULT: 1}
    assert stats["parked"] == stats["forgotten"] == 0
    (failure,) = service.failures()
    assert failure[:4] == (region.start + 3 * PAGE, region.id, 3 * PAGE, EFAULT)
    assert failure.why == "the kernel refused it: Bad address"
    libc("mprotect", data.ctypes.data + 3 * PAGE, PAGE, mmap.PROT_READ)
    there = np.delete(np.arange(8), 3)
    assert (region.array.reshape(8, PAGE)[there] == data.reshape(8, PAGE)[there]).all()
    os.close(read)
    os.close(write)
