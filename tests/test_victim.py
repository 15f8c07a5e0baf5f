"""The books of a userfaultfd against /proc/PID/smaps, while processes do what they like to their memory.

After each step each victim's `regions` are what the kernel says is registered (the VmFlags um and uw), and
each page that was filled holds what its region and its offset in it say, wherever it was moved since.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import userfault as uf
from support import Child, only
from victim import (
    ARENA,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MOST_VICTIMS,
    MOVE,
    MREMAP_DONTUNMAP,
    PAGE,
    PAGES,
    PRIVATE,
    PROT_NONE,
    PROT_READ,
    PROT_READ_WRITE,
    Monitor,
    Victim,
    Vma,
    mappings,
)

MODES = [None, uf.RegisterMode.MISSING, uf.RegisterMode.MISSING | uf.RegisterMode.WP]
ADVICE = {
    "DONTNEED": 4,
    "FREE": 8,
    "REMOVE": 9,
    "DONTFORK": 10,
    "DOFORK": 11,
    "WIPEONFORK": 18,
    "KEEPONFORK": 19,
}

ROOM = PAGES * PAGE
WITHOUT_UNMAP = uf.Feature.EVENT_FORK | uf.Feature.EVENT_REMAP | uf.Feature.EVENT_REMOVE

CI = os.environ.get("CI") == "true"


def hears_unmap(machine: VictimMachine) -> bool:
    return machine.hears_unmap


class VictimMachine(RuleBasedStateMachine):
    """Pages are numbered from the start of the arena. Calls that the kernel refuses are part of it."""

    victims = st.integers(0, MOST_VICTIMS - 1)
    pages = st.integers(0, PAGES - 1)
    lengths = st.integers(1, 10)
    # A mapping by its number, a page in it, and how many from there.
    parts = st.tuples(st.integers(0, 11), st.integers(0, 9), st.integers(0, 9))

    @initialize(
        gaps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=3),
        hears_unmap=st.sampled_from([True, True, False]),
    )
    def start(self, gaps: list[tuple[int, int]], hears_unmap: bool) -> None:
        """Without unmap events a remap must tell all, and what nothing tells is not done."""
        self.hears_unmap = hears_unmap
        self.monitor = Monitor("all" if hears_unmap else WITHOUT_UNMAP)
        regions, end = [], 0
        for gap, n in gaps:
            regions.append((end + gap, end + gap + n))
            end += gap + n
        self.monitor.begin(regions)

    def victim(self, number: int) -> Victim:
        return self.monitor.victims[number % len(self.monitor.victims)]

    def part(self, victim: Victim, part: tuple[int, int, int]) -> tuple[Vma, int, int] | None:
        """A mapping, and a range in it: its start and its length. None: nothing is mapped."""
        vmas = list(mappings(victim.pid))
        if not vmas:
            return None
        vma = vmas[part[0] % len(vmas)]
        first = part[1] % vma.pages
        return vma, vma.start + first * PAGE, (1 + part[2] % (vma.pages - first)) * PAGE

    def call(self, victim: Victim, name: str, *arguments: int) -> bool:
        return int(self.monitor.order(victim, name, *arguments)) >= 0

    @rule(number=victims, page=pages, n=lengths, mode=st.sampled_from(MODES), over=st.booleans())
    def map(self, number: int, page: int, n: int, mode: uf.RegisterMode | None, over: bool) -> None:
        """Over whatever is there, or where nothing is."""
        victim, start, length = self.victim(number), ARENA + page * PAGE, min(n, PAGES - page) * PAGE
        flags = PRIVATE | (MAP_FIXED if over and self.hears_unmap else MAP_FIXED_NOREPLACE)
        if self.call(victim, "mmap", start, length, PROT_READ_WRITE, flags, -1, 0) and mode:
            before = victim.uffd.regions.ranges()["id"]
            number = victim.uffd.register(start, length, mode).id
            assert number not in before, f"{victim} has two regions {number}"

    @precondition(hears_unmap)
    @rule(number=victims, page=pages, n=lengths)
    def unmap(self, number: int, page: int, n: int) -> None:
        """Parts of mappings, several, and holes."""
        self.call(self.victim(number), "munmap", ARENA + page * PAGE, min(n, PAGES - page) * PAGE)

    @rule(number=victims, which=parts, to=pages, grow=st.integers(-4, 6))
    def move(self, number: int, which: tuple[int, int, int], to: int, grow: int) -> None:
        """To where nothing is, or over whatever is there; grown or shrunk on the way.

        A remap does not tell by how much: without unmap events what it grew over stays in the books.
        """
        victim = self.victim(number)
        found = self.part(victim, which)
        if found and (self.hears_unmap or (found[0].registered and grow == 0)):
            _, start, length = found
            length = min(length, (PAGES - to) * PAGE)
            new = min(max(length + grow * PAGE, PAGE), (PAGES - to) * PAGE)
            self.call(victim, "mremap", start, length, new, MOVE, ARENA + to * PAGE)

    @rule(number=victims, which=parts, to=pages)
    def move_pages(self, number: int, which: tuple[int, int, int], to: int) -> None:
        """The old range stays mapped and registered."""
        victim = self.victim(number)
        found = self.part(victim, which)
        if found and (self.hears_unmap or found[0].registered):
            _, start, length = found
            length = min(length, (PAGES - to) * PAGE)
            flags = MOVE | MREMAP_DONTUNMAP
            self.call(victim, "mremap", start, length, length, flags, ARENA + to * PAGE)

    @precondition(hears_unmap)
    @rule(number=victims, which=parts, n=lengths)
    def shrink(self, number: int, which: tuple[int, int, int], n: int) -> None:
        victim = self.victim(number)
        if found := self.part(victim, which):
            _, start, length = found
            self.call(victim, "mremap", start, length, min(n * PAGE, length), 0, 0)

    @rule(number=victims, which=parts, n=lengths, to=st.none() | pages)
    def grow(self, number: int, which: tuple[int, int, int], n: int, to: int | None) -> None:
        """In place, of which no event tells: then touched, or moved, and so found."""
        victim = self.victim(number)
        found = self.part(victim, which)
        if not found or not found[0].readable or not (self.hears_unmap or found[0].registered):
            return
        vma, start, _ = found
        length = vma.end - start
        new = min(length + n * PAGE, ROOM - start + ARENA)
        if not self.call(victim, "mremap", start, length, new, 0, 0):
            return
        moved = (
            to is not None
            and to * PAGE + new <= ROOM
            and self.call(victim, "mremap", start, new, new, MOVE, ARENA + to * PAGE)
        )
        if not moved and new > length and vma.registered:
            self.monitor.order(victim, "read", vma.end)

    @rule(number=victims, page=pages, n=lengths, advice=st.sampled_from(sorted(ADVICE)))
    def advise(self, number: int, page: int, n: int, advice: str) -> None:
        length = min(n, PAGES - page) * PAGE
        self.call(self.victim(number), "madvise", ARENA + page * PAGE, length, ADVICE[advice])

    @rule(
        number=victims,
        page=pages,
        n=lengths,
        protection=st.sampled_from([PROT_NONE, PROT_READ, PROT_READ_WRITE]),
    )
    def protect(self, number: int, page: int, n: int, protection: int) -> None:
        length = min(n, PAGES - page) * PAGE
        self.call(self.victim(number), "mprotect", ARENA + page * PAGE, length, protection)

    @rule(number=victims, which=parts)
    def touch(self, number: int, which: tuple[int, int, int]) -> None:
        victim = self.victim(number)
        found = self.part(victim, which)
        if found and found[0].registered and found[0].readable:
            _, start, length = found
            self.monitor.order(victim, "read", *range(start, start + length, PAGE))

    @precondition(lambda self: len(self.monitor.victims) < MOST_VICTIMS)
    @rule(number=victims, page=pages, n=lengths, then=st.booleans())
    def fork(self, number: int, page: int, n: int, then: bool) -> None:
        unmap = ["munmap", ARENA + page * PAGE, min(n, PAGES - page) * PAGE]
        self.monitor.fork(self.victim(number), unmap if then and self.hears_unmap else [])

    @precondition(lambda self: len(self.monitor.victims) > 1)
    @rule(number=victims)
    def exit(self, number: int) -> None:
        self.monitor.end(self.victim(number))

    @invariant()
    def the_books_are_right(self) -> None:
        for victim in self.monitor.victims:
            self.monitor.check(victim)

    def teardown(self) -> None:
        if hasattr(self, "monitor"):
            self.monitor.close()
            del self.monitor  # hypothesis keeps the machine for a while, and so descriptors


def run() -> None:
    """What the test does, in a process of its own: os.fork() with threads, and hangs that must end."""
    run_state_machine_as_test(
        VictimMachine,
        settings=settings(
            # In CI the same ones each time: what is new is found by those who look for it.
            max_examples=150 if CI else 400,
            derandomize=CI,
            stateful_step_count=40,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def run_forks() -> None:
    monitor = Monitor("all")
    monitor.begin([(0, 8), (10, 12)])
    (parent,) = monitor.victims
    monitor.order(parent, "madvise", ARENA + 2 * PAGE, 2 * PAGE, ADVICE["DONTFORK"])
    for _ in range(100):
        monitor.fork(parent, ["munmap", ARENA + 10 * PAGE, PAGE])
        youngest = monitor.victims[-1]
        monitor.check(youngest)
        monitor.end(youngest)
    monitor.close()


@pytest.fixture
def needs_fork_events(needs_privilege: None) -> None:
    with uf.Userfaultfd("msg", "all") as u:
        if uf.Feature.EVENT_FORK in uf.Feature(u.features):
            return
    if CI:
        pytest.fail("CI must hear forks")
    pytest.skip("fork events need CAP_SYS_PTRACE")


def run_alone(child: Child, function: Callable[[], None]) -> None:
    code = f"""
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_victim
        test_victim.{function.__name__}()
        print("good")
    """
    try:
        done = child(code, timeout=600)
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"not done in time: {late.stderr!r}")
    assert done.stdout == "good\n", done.stderr


@only("msg")
def test_the_books_are_what_the_kernel_says(needs_fork_events: None, wire: str, child: Child) -> None:
    run_alone(child, run)


@only("msg")
def test_children_that_change_their_memory_at_once(needs_fork_events: None, wire: str, child: Child) -> None:
    """The kernel does not say what they have, until their events are read."""
    run_alone(child, run_forks)
