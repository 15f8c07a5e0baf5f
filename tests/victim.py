"""Victims: processes that map, move and drop memory as they are told, and the monitor that follows them.

A victim runs one command at a time, and says what came of it. Whatever it does to registered memory it sleeps
in, until the monitor has read the event; so the monitor reads the descriptors of all while it waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

import userfault as uf

PAGE = uf.PAGE_SIZE
ARENA = 0x2000_0000_0000  # where nothing else is
PAGES = 40
MOST_VICTIMS = 3
SECONDS = 5  # for one command

PROT_NONE, PROT_READ, PROT_READ_WRITE = 0, 1, 3
PRIVATE = 0x2 | 0x20 | 0x4000  # MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
MAP_FIXED, MAP_FIXED_NOREPLACE = 0x10, 0x100000
MOVE = 1 | 2  # MREMAP_MAYMOVE, MREMAP_FIXED
MREMAP_DONTUNMAP = 4
PR_SET_CHILD_SUBREAPER = 36
PAGEFAULT = 0x12

Range = tuple[int, int]

libc = ctypes.CDLL(None, use_errno=True)
SIZE, INT = ctypes.c_size_t, ctypes.c_int
for name, arguments in {
    "mmap": [SIZE, SIZE, INT, INT, INT, ctypes.c_long],
    "munmap": [SIZE, SIZE],
    "mremap": [SIZE, SIZE, SIZE, INT, SIZE],
    "mprotect": [SIZE, SIZE, INT],
    "madvise": [SIZE, SIZE, INT],
}.items():
    getattr(libc, name).argtypes = arguments
    getattr(libc, name).restype = ctypes.c_ssize_t


def system_call(name: str, *arguments: int) -> int:
    """What it returned, or -errno."""
    result = int(getattr(libc, name)(*arguments))
    return -ctypes.get_errno() if result == -1 else result


def first_word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def last_word(address: int) -> int:
    return ctypes.c_uint64.from_address(address + PAGE - 8).value


def obey(channels: list[socket.socket], slot: int) -> NoReturn:
    """A victim's life."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the victims of a victim
    answer: Any = "here"
    while True:
        channels[slot].send(json.dumps(answer).encode())
        order = channels[slot].recv(1 << 16)
        if not order:  # the monitor is gone
            os._exit(1)
        command, *arguments = json.loads(order)
        if command == "read":
            answer = [(first_word(address), last_word(address)) for address in arguments]
        elif command == "fork":
            answer = os.fork()
            if answer == 0:
                slot, *then = arguments
                answer = system_call(*then) if then else "here"
        elif command == "exit":
            os._exit(0)
        else:
            answer = system_call(command, *arguments)


# -- what the kernel says --------------------------------------------------------------------------------


class Vma(NamedTuple):
    start: int
    end: int
    readable: bool
    registered: bool

    @property
    def pages(self) -> int:
        return (self.end - self.start) // PAGE


_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S)")


def mappings(pid: int) -> Iterator[Vma]:
    """The mappings of the arena, in address order."""
    with open(f"/proc/{pid}/smaps") as smaps:
        for line in smaps:
            if header := _HEADER.match(line):
                start, end, readable = int(header[1], 16), int(header[2], 16), header[3] == "r"
                if start >= ARENA + PAGES * PAGE:
                    return
            elif line.startswith("VmFlags:") and start >= ARENA:
                yield Vma(start, end, readable, bool({"um", "uw"} & set(line.split())))


def present(pid: int) -> set[int]:
    """The addresses of the arena's pages that are there."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(ARENA // PAGE * 8)
        entries = np.frombuffer(pagemap.read(PAGES * 8), np.uint64)
    return {ARENA + int(page) * PAGE for page in np.flatnonzero(entries >> np.uint64(63))}


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Ranges [start, end) in address order, those that touch as one."""
    found: list[Range] = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def in_pages(ranges: Iterable[Range]) -> str:
    """Ranges in pages of the arena, as messages show them."""
    return " ".join(f"{(start - ARENA) // PAGE}-{(end - ARENA) // PAGE}" for start, end in ranges) or "none"


# -- the monitor -----------------------------------------------------------------------------------------


def word(region: int, offset: int) -> int:
    """What a page of a region, filled by the monitor, is full of."""
    return (region + 1) << 32 | offset


class Victim:
    def __init__(self, slot: int, channel: socket.socket, pid: int, uffd: uf.Userfaultfd) -> None:
        self.slot, self.channel, self.pid, self.uffd = slot, channel, pid, uffd
        self.ended = os.pidfd_open(pid)
        self.reader = uf.EventReader(uffd)

    def __repr__(self) -> str:
        return f"victim {self.slot}"

    def has_ended(self) -> bool:
        """Waits for it."""
        poll = select.poll()
        poll.register(self.ended, select.POLLIN)
        return bool(poll.poll(SECONDS * 1000))

    def close(self) -> None:
        """Kill it, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.has_ended()
        with contextlib.suppress(ChildProcessError):  # another victim's child
            os.waitpid(self.pid, 0)
        os.close(self.ended)
        self.reader.close()
        self.uffd.close()


class Monitor:
    """Forks the first victim, and follows it and those that victims fork."""

    def __init__(self, features: uf.Feature | Literal["all"]) -> None:
        self.u = uf.Userfaultfd("msg", features)
        self.regions: list[uf.Region] = []
        self.victims: list[Victim] = []
        self.born: list[uf.Userfaultfd] = []
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(MOST_VICTIMS)]
        self.channels, self.theirs = [ours for ours, _ in pairs], [theirs for _, theirs in pairs]
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)

    def begin(self, regions: Iterable[Range]) -> None:
        """Register memory, by pages of the arena, and fork a victim that gets it."""
        for first, end in regions:
            start, length = ARENA + first * PAGE, (end - first) * PAGE
            flags = PRIVATE | MAP_FIXED_NOREPLACE
            got = system_call("mmap", start, length, PROT_READ_WRITE, flags, -1, 0)
            assert got == start, f"the arena is in use: {got}"
            self.regions.append(self.u.register(start, length, inherit=True))
        self.fork_first()

    def fork_first(self) -> None:
        reader = uf.EventReader(self.u)
        listener = threading.Thread(target=lambda: self.born.extend(uf.take_children(reader.read(SECONDS))))
        listener.start()
        pid = os.fork()
        if pid == 0:
            for channel in self.channels:
                channel.close()
            obey(self.theirs, 0)
        listener.join()
        reader.close()
        self.answer(self.adopt(0, pid), "fork")

    def adopt(self, slot: int, pid: int) -> Victim:
        """The victim whose descriptor came with the fork's record."""
        victim = Victim(slot, self.channels[slot], pid, self.born.pop())
        self.victims.append(victim)
        return victim

    def order(self, victim: Victim, *command: Any) -> Any:
        """Have the victim do something: its answer."""
        victim.channel.send(json.dumps(command).encode())
        return self.answer(victim, command)

    def answer(self, victim: Victim, command: Any) -> Any:
        """What the victim says when it is done; whatever anybody's memory reports meanwhile is served."""
        by_fd = {each.uffd.fileno(): each for each in self.victims}
        poll = select.poll()
        for number in (*by_fd, victim.channel.fileno(), victim.ended):
            poll.register(number, select.POLLIN)
        deadline = time.monotonic() + SECONDS
        while (left := deadline - time.monotonic()) > 0:
            ready = {number for number, _ in poll.poll(left * 1000)}
            for number in ready & by_fd.keys():
                self.serve(by_fd[number])
            if victim.channel.fileno() in ready:
                return json.loads(victim.channel.recv(1 << 16))
            assert victim.ended not in ready, f"{victim} died of {command}"
        os.kill(victim.pid, signal.SIGKILL)
        message = f"{victim} hangs in {command}"
        print(message, file=sys.stderr, flush=True)
        raise AssertionError(message)

    def serve(self, victim: Victim) -> None:
        """Read what a victim's descriptor reports, and fill the pages that are missed."""
        records = victim.reader.read(0)
        self.born += uf.take_children(records)
        faults = records[records["event"] == PAGEFAULT]
        places = victim.uffd.regions.dispatch(faults)
        for address, region, offset in zip(faults["address"].tolist(), *map(list, places), strict=True):
            assert region >= 0, f"{victim} faults at page {(address - ARENA) // PAGE}, of no region"
            self.fill(victim, address & -PAGE, np.full(PAGE // 8, word(region, offset & -PAGE), np.uint64))

    def fill(self, victim: Victim, page: int, data: Any) -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                victim.uffd.copy(page, data)
                return
            except uf.ChangingError:
                time.sleep(1e-4)
        raise AssertionError(f"{victim}: its mappings change for ever")

    def fork(self, victim: Victim, then: list[Any]) -> None:
        """The child makes a system call at once, while its parent's fork() is still being told about."""
        slot = min(set(range(MOST_VICTIMS)) - {each.slot for each in self.victims})
        pid = self.order(victim, "fork", slot, *then)
        if self.born:
            self.answer(self.adopt(slot, pid), then)
        else:
            self.channels[slot].recv(1 << 16)
            registered = any(vma.registered for vma in mappings(pid))
            os.kill(pid, signal.SIGKILL)
            assert not registered, f"no record of the fork of {victim}, whose child has registered memory"

    def end(self, victim: Victim) -> None:
        """Let a victim exit."""
        victim.channel.send(json.dumps(["exit"]).encode())
        assert victim.has_ended(), f"{victim} does not exit"
        self.victims.remove(victim)
        victim.close()

    def check(self, victim: Victim) -> None:
        """The books say what the kernel says, and each page holds what the books say."""
        vmas = list(mappings(victim.pid))
        table = victim.uffd.regions.ranges().tolist()
        kernel = merged((vma.start, vma.end) for vma in vmas if vma.registered)
        books = merged((start, start + length) for start, length, _, _ in table)
        assert books == kernel, f"{victim}: books {in_pages(books)}, kernel {in_pages(kernel)}"
        there = present(victim.pid)
        expected = {
            start + at: word(region, offset + at)
            for start, length, region, offset in table
            for at in range(0, length, PAGE)
        }
        readable = [page for vma in vmas if vma.readable for page in range(vma.start, vma.end, PAGE)]
        pages = [page for page in readable if page in there and page in expected]
        for page, words in zip(pages, self.order(victim, "read", *pages), strict=True):
            assert set(words) == {expected[page]}, (
                f"{victim}: page {(page - ARENA) // PAGE} holds {words[0]:#x}, books say {expected[page]:#x}"
            )

    def close(self) -> None:
        for victim in self.victims:
            victim.close()
        for region in self.regions:
            region.unregister()
            assert system_call("munmap", region.start, region.length) == 0
        for channel in itertools.chain(self.channels, self.theirs):
            channel.close()
        self.u.close()
