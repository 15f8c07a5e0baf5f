"""Write protection: its records, what lifts it, and the bit of it that /proc/self/pagemap shows."""

from __future__ import annotations

import mmap

import pytest

import userfault as uf
from areas import (
    KINDS,
    MADV_PAGEOUT,
    F,
    M,
    Toucher,
    advise,
    area,
    ends,
    fault,
    opened,
    page_of,
    protected,
)
from support import PAGE, Child, pending, touching

WP = uf._consts.UFFD_PAGEFAULT_FLAG_WP
WRITE = uf._consts.UFFD_PAGEFAULT_FLAG_WRITE

pytestmark = pytest.mark.usefixtures("needs_uffd")
kinds = pytest.mark.parametrize("kind", KINDS)


# -- records -------------------------------------------------------------------------------------------


@kinds
def test_a_write_to_a_protected_page_waits_for_the_monitor(kind: str) -> None:
    """Reads go through; the write goes through once it is lifted, and changes nothing else."""
    with opened(KINDS[kind] | F.PAGEFAULT_FLAG_WP) as u:
        memory, _ = area(kind, 3)
        for page in range(3):
            memory[page * PAGE : (page + 1) * PAGE] = page_of(page)
        region, reader = u.register(memory, mode=M.WP), uf.EventReader(u)
        assert uf.Ioctl.WRITEPROTECT in region.ioctls
        u.writeprotect(region.start, region.length)
        assert Toucher(region.array, 1).ends() == 2
        writer, flags = fault(region, reader, 1, write=9)
        assert flags == WP | WRITE
        assert memory[PAGE] == 2
        u.writeprotect(region.start + PAGE, PAGE, protect=False)
        writer.ends()
        assert memory[: 3 * PAGE] == page_of(0) + b"\11" + page_of(1)[1:] + page_of(2)
        # The others are protected still; lifted without a wake, the sleeper sleeps on.
        writer, _ = fault(region, reader, 2, write=9)
        u.writeprotect(region.start, region.length, protect=False, wake=False)
        assert writer.asleep()
        u.wake(region.start, region.length)
        writer.ends()
        assert memory[2 * PAGE] == 9
        Toucher(region.array, 0, write=9).ends()
        assert pending(u) == 0


@kinds
def test_a_copied_page_may_come_protected(kind: str) -> None:
    """The writer takes two faults: the page is missing, and then it is protected."""
    with opened(KINDS[kind] | F.PAGEFAULT_FLAG_WP) as u:
        memory, _ = area(kind, 2)
        region, reader = u.register(memory, mode=M.MISSING | M.WP), uf.EventReader(u)
        writer, flags = fault(region, reader, 1, write=9)
        assert flags == WRITE
        u.copy(region.start + PAGE, page_of(1), write_protect=True)
        (record,) = reader.read(30)
        assert (record["flags"], record["address"]) == (WP | WRITE, region.start + PAGE)
        assert memory[PAGE : 2 * PAGE] == page_of(1)
        u.writeprotect(region.start + PAGE, PAGE, protect=False)
        writer.ends()
        assert memory[PAGE : 2 * PAGE] == b"\11" + page_of(1)[1:]
        # Without it, the writer takes one.
        writer, _ = fault(region, reader, 0, write=9)
        u.copy(region.start, page_of(0))
        writer.ends()
        assert pending(u) == 0


def test_the_zero_page_is_protected_too() -> None:
    """What was only read is mapped to the zero page, that all share."""
    with opened(F.PAGEFAULT_FLAG_WP) as u:
        memory, _ = area("anon", 2)
        region, reader = u.register(memory, mode=M.MISSING | M.WP), uf.EventReader(u)
        u.zeropage(region.start, 2 * PAGE)
        u.writeprotect(region.start, 2 * PAGE)
        assert Toucher(region.array, 0).ends() == 0
        writer, flags = fault(region, reader, 0, write=9)
        assert flags == WP | WRITE
        u.writeprotect(region.start, PAGE, protect=False)
        writer.ends()
        assert memory[: 2 * PAGE] == b"\11" + bytes(2 * PAGE - 1)


@kinds
def test_many_writers_of_one_page(kind: str) -> None:
    with opened(KINDS[kind] | F.PAGEFAULT_FLAG_WP) as u:
        memory, _ = area(kind, 1)
        memory[:] = page_of(1)
        region, reader = u.register(memory, mode=M.WP), uf.EventReader(u)
        u.writeprotect(region.start, PAGE)
        writers = [touching(region, [0], write=True) for _ in range(8)]
        seen = 0
        while seen < len(writers):
            records = reader.read(30)
            assert (records["flags"] == WP | WRITE).all()
            seen += len(records)
        u.writeprotect(region.start, PAGE, protect=False)
        for writer in writers:
            writer.join(30)
            assert not writer.is_alive()
        assert memory[:2] == b"\7\2"


def test_with_wp_async_the_kernel_lifts_it_by_itself() -> None:
    """No record: what was written is read off the pagemap."""
    with opened(F.PAGEFAULT_FLAG_WP | F.WP_UNPOPULATED | F.WP_ASYNC) as u:
        memory, _ = area("anon", 4)
        memory[:PAGE] = page_of(0)
        region = u.register(memory, mode=M.WP)
        for _ in range(2):
            u.writeprotect(region.start, region.length)
            for page in (0, 2):
                Toucher(region.array, page, write=9).ends()
            assert [protected(region, page) for page in range(4)] == [False, True, False, True]
        assert len(uf.EventReader(u).read(0)) == 0
        assert memory[: PAGE + 1] == b"\11" + page_of(0)[1:] + b"\0"


# -- pages that are not there --------------------------------------------------------------------------


def test_pages_that_are_not_there_can_be_protected() -> None:
    """WP_UNPOPULATED: a marker stands in the place of the page, until it is lifted, or dropped."""
    with opened(F.PAGEFAULT_FLAG_WP | F.WP_UNPOPULATED) as u:
        memory, _ = area("anon", 2)
        region, reader = u.register(memory, mode=M.WP), uf.EventReader(u)
        u.writeprotect(region.start, PAGE)
        assert protected(region)
        u.writeprotect(region.start, PAGE, protect=False)
        assert not protected(region)
        u.writeprotect(region.start, PAGE)
        advise(region, mmap.MADV_DONTNEED, 0, 1)
        assert not protected(region)
        Toucher(region.array, 0, write=1).ends()
        assert not protected(region)
        # A read brings the zero page, protected; a write is reported.
        advise(region, mmap.MADV_DONTNEED, 0, 1)
        u.writeprotect(region.start, region.length)
        assert Toucher(region.array, 0).ends() == 0
        assert protected(region)
        for page in range(2):
            writer, flags = fault(region, reader, page, write=9)
            assert flags == WP | WRITE
            u.writeprotect(region.start + page * PAGE, PAGE, protect=False)
            writer.ends()
        assert memory[:] == (b"\11" + bytes(PAGE - 1)) * 2


def test_without_the_feature_only_what_is_there_is_protected() -> None:
    with opened(F.PAGEFAULT_FLAG_WP) as u:
        memory, _ = area("anon", 2)
        memory[0] = 1
        region, reader = u.register(memory, mode=M.WP), uf.EventReader(u)
        u.writeprotect(region.start, region.length)
        assert [protected(region, page) for page in range(2)] == [True, False]
        Toucher(region.array, 1, write=9).ends()
        assert len(reader.read(0)) == 0


def test_shared_pages_stay_protected_when_they_are_unmapped() -> None:
    """The page cache may drop a mapping at any time; a marker remembers."""
    with opened(KINDS["shmem"] | F.PAGEFAULT_FLAG_WP) as u:
        memory, _ = area("shmem", 1)
        memory[:] = page_of(1)
        region, reader = u.register(memory, mode=M.WP), uf.EventReader(u)
        u.writeprotect(region.start, PAGE)
        advise(region, mmap.MADV_DONTNEED)
        assert protected(region)
        assert Toucher(region.array, 0).ends() == 2
        writer, flags = fault(region, reader, 0, write=9)
        assert flags == WP | WRITE
        u.writeprotect(region.start, PAGE, protect=False)
        writer.ends()
        assert memory[:] == b"\11" + page_of(1)[1:]


# -- the pagemap's bit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_pages", [1, 512])
def test_the_pagemap_tells_what_is_protected(n_pages: int) -> None:
    """Of single pages and of a huge page, and also of what is paged out where there is swap."""
    with opened(F.PAGEFAULT_FLAG_WP) as u:
        region = u.map(512 * PAGE, M.WP)
        if n_pages > 1:
            advise(region, mmap.MADV_HUGEPAGE)
        region.array[:] = 1
        u.writeprotect(region.start, n_pages * PAGE)
        assert [protected(region, page) for page in (0, n_pages - 1)] == [True, True]
        assert protected(region, 511) == (n_pages == 512)
        advise(region, MADV_PAGEOUT, 0, n_pages)
        assert protected(region)
        u.writeprotect(region.start, PAGE, protect=False)
        bits = [protected(region, page) for page in range(n_pages)]
        assert bits == [False, *[True] * (n_pages - 1)]
        Toucher(region.array, 0, write=2).ends()
        assert not protected(region)
        region.unregister()
        assert not any(protected(region, page) for page in range(n_pages))
        assert region.array[:PAGE].tolist() == [2, *[1] * (PAGE - 1)]


@kinds
@pytest.mark.parametrize("there", [True, False])
def test_a_fork_child_is_not_protected(child: Child, kind: str, there: bool) -> None:
    """One that got the memory, against our advice: without fork events nobody would lift it there."""
    code = """
        memory, _ = area(kind, 1)
        region = u.register(memory, mode=M.WP)
        advise(region, mmap.MADV_DOFORK)
        if there:
            memory[:] = page_of(1)
        u.writeprotect(region.start, PAGE)
        assert protected(region)
        pid = os.fork()
        if pid == 0:
            held = protected(region)
            memory[0] = 9
            os._exit(10 + held)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 10
        assert protected(region)
        """
    ends(child, code, KINDS[kind] | F.PAGEFAULT_FLAG_WP | F.WP_UNPOPULATED, kind=kind, there=there)


def test_memory_that_was_moved_elsewhere_is_not_protected(child: Child) -> None:
    """Without remap events mremap(2) leaves the registration behind, and with it the protection."""
    code = """
        LIBC.mremap.restype = ctypes.c_void_p
        LIBC.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
        room = anonymous(2 * PAGE)
        region = u.map(2 * PAGE, M.WP)
        region.array[:] = 1
        u.writeprotect(region.start, 2 * PAGE)
        MAYMOVE_FIXED = 3
        to = LIBC.mremap(region.start, 2 * PAGE, 2 * PAGE, MAYMOVE_FIXED, room.ctypes.data)
        assert to == room.ctypes.data
        room[0] = 9
        assert room[:PAGE + 1].tolist() == [9] + [1] * PAGE
        print("end", flush=True)
        os._exit(0)  # what knows of the region's old place ends with it
        """
    ends(child, code, F.PAGEFAULT_FLAG_WP)


# -- the end -------------------------------------------------------------------------------------------


@kinds
def test_protected_pages_are_open_after_close(child: Child, kind: str) -> None:
    """The data is there: nobody is left who wants to know of the write."""
    code = """
        memory, _ = area(kind, 2)
        region, reader = u.register(memory, mode=M.MISSING | M.WP), uf.EventReader(u)
        u.copy(region.start, page_of(0) + page_of(1), write_protect=True)
        writer, _ = fault(region, reader, 0, write=9)
        u.close()
        writer.ends()
        memory[PAGE] = 8
        assert memory[:] == bytes([9]) + page_of(0)[1:] + bytes([8]) + page_of(1)[1:]
        """
    ends(child, code, KINDS[kind] | F.PAGEFAULT_FLAG_WP, kind=kind)
