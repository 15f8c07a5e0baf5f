"""Shared memory: missing pages, minor faults, a service, and what keeps it apart from anonymous memory."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import userfault as uf
from areas import (
    DEFAULT,
    KINDS,
    LIBC,
    MADV_COLLAPSE,
    SHARED,
    F,
    M,
    Toucher,
    advise,
    anonymous,
    area,
    dies,
    ends,
    fault,
    flags,
    opened,
    page_of,
)
from support import PAGE, Child, pending

MINOR = uf._consts.UFFD_PAGEFAULT_FLAG_MINOR
WP = uf._consts.UFFD_PAGEFAULT_FLAG_WP
WRITE = uf._consts.UFFD_PAGEFAULT_FLAG_WRITE
SHMEM = ("shmem", "shmem-private")
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000  # Python does not name them

pytestmark = pytest.mark.usefixtures("needs_uffd")


# -- what may be registered ----------------------------------------------------------------------------


def by_another_way(way: str) -> mmap.mmap:
    """Four pages of shared memory."""
    if way == "anonymous":
        return mmap.mmap(-1, 4 * PAGE)
    path = Path("/dev/shm", f"userfault-test-{os.getpid()}")
    if not path.parent.is_dir():
        pytest.skip("no /dev/shm")
    with open(path, "w+b") as file:
        path.unlink()
        file.truncate(4 * PAGE)
        return mmap.mmap(file.fileno(), 4 * PAGE)


@pytest.mark.parametrize("way", ["anonymous", "/dev/shm"])
def test_shared_memory_of_every_origin(way: str) -> None:
    with opened(SHARED) as u:
        memory = by_another_way(way)
        region = u.register(memory)
        toucher, _ = fault(region, uf.EventReader(u), 2)
        u.copy(region.start + 2 * PAGE, page_of(2))
        assert toucher.ends() == 3
        assert memory[2 * PAGE] == 3


@pytest.mark.parametrize("kind", SHMEM)
@pytest.mark.parametrize(
    ("mode", "feature"),
    [(M.MISSING, F.MISSING_SHMEM), (M.MINOR, F.MINOR_SHMEM), (M.WP, F.WP_HUGETLBFS_SHMEM)],
)
def test_the_feature_that_is_wanting_is_named(kind: str, mode: uf.RegisterMode, feature: uf.Feature) -> None:
    memory, _ = area(kind, 1)
    with opened(SHARED & ~feature) as u:
        with pytest.raises(uf.UnsupportedError, match=rf"shared memory: open with .* {feature.name}$"):
            u.register(memory, mode=mode)
        with pytest.raises(uf.UnsupportedError, match=rf" {feature.name}$"):
            u.register(memory, mode=M.MISSING | M.WP | M.MINOR)
        assert len(u.regions) == 0
    with opened(feature) as u:
        region = u.register(memory, mode=mode)
        assert region.mode == mode


def test_files_and_huge_pages_stay_refused(tmp_path: Path) -> None:
    with opened(SHARED) as u:
        file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(file, PAGE)
        for how in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            with pytest.raises(uf.UnsupportedError, match=r"a mapping of .*/file"):
                u.register(mmap.mmap(file, PAGE, flags=how))
        os.close(file)
        huge = os.memfd_create("userfault-test", os.MFD_HUGETLB)
        os.ftruncate(huge, 2 << 20)
        # There need be no huge page to be had.
        memory = mmap.mmap(huge, 2 << 20, flags=mmap.MAP_SHARED | MAP_NORESERVE)
        with pytest.raises(uf.UnsupportedError, match="hugetlbfs"):
            u.register(memory)
        os.close(huge)


def test_what_may_not_be_written_is_refused() -> None:
    """A copy would write to the file."""
    with opened(SHARED) as u:
        fd = os.memfd_create("userfault-test")
        os.ftruncate(fd, PAGE)
        read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        memory = mmap.mmap(read_only, PAGE, prot=mmap.PROT_READ)
        with pytest.raises(uf.UffdError) as caught:
            u.register(np.frombuffer(memory, np.uint8).ctypes.data, PAGE)
        assert caught.value.errno == errno.EPERM
        os.close(fd)
        os.close(read_only)


@pytest.mark.parametrize("kind", KINDS)
def test_what_fork_children_never_got_they_do_not_get_back(kind: str) -> None:
    with opened(KINDS[kind]) as u:
        memory, _ = area(kind, 4)
        memory.madvise(mmap.MADV_DONTFORK, PAGE, 2 * PAGE)
        whole = u.register(memory)
        address = whole.start
        assert all("dc" in one for one in flags(whole))
        whole.unregister()
        assert ["dc" in one for one in flags(whole)] == [False, True, False]
        # A part of it, and one that the kernel refuses after it was kept from children.
        part = u.register(address, 2 * PAGE)
        part.unregister()
        with pytest.raises(uf.UffdError):
            u.register(memory, mode=M(0))
        assert ["dc" in one for one in flags(whole)] == [False, True, False]


# -- missing pages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHMEM)
def test_missing_pages_are_filled(kind: str) -> None:
    with opened(SHARED) as u:
        memory, other = area(kind, 4)
        region, reader = u.register(memory), uf.EventReader(u)
        toucher, flag = fault(region, reader, 1)
        assert flag == 0
        assert u.copy(region.start + PAGE, page_of(1)) == PAGE
        assert toucher.ends() == 2
        toucher, flag = fault(region, reader, 2, write=7)
        assert flag == WRITE
        assert u.zeropage(region.start + 2 * PAGE, PAGE) == PAGE
        toucher.ends()
        assert memory[2 * PAGE : 3 * PAGE] == b"\7" + bytes(PAGE - 1)
        # What is copied into a private mapping is a page of its own.
        assert other[1 * PAGE] == (2 if kind == "shmem" else 0)
        region.unregister()


def test_what_is_in_the_page_cache_is_not_missing() -> None:
    with opened(SHARED) as u:
        memory, other = area("shmem", 2)
        region = u.register(memory)
        other[:PAGE] = page_of(7)
        assert Toucher(region.array, 0).ends() == 8
        for fill in (lambda: u.copy(region.start, page_of(1)), lambda: u.zeropage(region.start, PAGE)):
            with pytest.raises(uf.PageExistsError):
                fill()
        assert memory[:PAGE] == page_of(7)
        assert pending(u) == 0


@pytest.mark.parametrize("give_up_by", [mmap.MADV_REMOVE, mmap.MADV_DONTNEED])
def test_pages_that_were_given_up_are_missing_again(give_up_by: int) -> None:
    """MADV_REMOVE punches a hole; MADV_DONTNEED forgets only where the page is mapped."""
    with opened(SHARED) as u:
        memory, _ = area("shmem", 2)
        region, reader = u.register(memory), uf.EventReader(u)
        u.copy(region.start, page_of(1))
        advise(region, give_up_by, 0, 1)
        if give_up_by == mmap.MADV_DONTNEED:
            assert Toucher(region.array, 0).ends() == 2
            return
        toucher, _ = fault(region, reader, 0)
        u.copy(region.start, page_of(5))
        assert toucher.ends() == 6


# -- minor faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHMEM)
def test_a_minor_fault_lets_the_monitor_change_the_page_first(kind: str) -> None:
    n_pages = 16
    with opened(F.MINOR_SHMEM) as u:
        memory, other = area(kind, n_pages)
        assert other is not None
        region, reader = u.register(memory, mode=M.MINOR), uf.EventReader(u)
        assert uf.Ioctl.CONTINUE in region.ioctls
        for page in range(n_pages):
            other[page * PAGE : (page + 1) * PAGE] = page_of(page)
        assert pending(u) == 0  # not through the mapping that is registered
        for page in range(n_pages):
            toucher, flag = fault(region, reader, page)
            assert flag == MINOR
            flipped = bytes(byte ^ 0xFF for byte in page_of(page))
            other[page * PAGE : (page + 1) * PAGE] = flipped
            assert u.continue_(region.start + page * PAGE, PAGE) == PAGE
            with pytest.raises(uf.PageExistsError) as caught:
                u.continue_(region.start + page * PAGE, PAGE)
            assert caught.value.done == 0
            assert toucher.ends() == flipped[0]
            assert memory[page * PAGE : (page + 1) * PAGE] == flipped
        region.unregister()


def test_a_page_that_is_missing_is_no_minor_fault() -> None:
    """Of both modes each page gets the record of its own state."""
    with opened(SHARED) as u:
        memory, other = area("shmem", 2)
        region, reader = u.register(memory, mode=M.MISSING | M.MINOR), uf.EventReader(u)
        other[:PAGE] = page_of(1)
        minor, flag = fault(region, reader, 0)
        assert flag == MINOR
        missing, flag = fault(region, reader, 1)
        assert flag == 0
        with pytest.raises(uf.UffdError) as caught:
            u.continue_(region.start + PAGE, PAGE)
        assert caught.value.errno == errno.EFAULT
        u.continue_(region.start, PAGE)
        u.copy(region.start + PAGE, page_of(2))
        assert (minor.ends(), missing.ends()) == (2, 3)


def test_a_continued_page_may_come_write_protected() -> None:
    with opened(SHARED | F.PAGEFAULT_FLAG_WP | F.WP_UNPOPULATED) as u:
        memory, other = area("shmem", 1)
        region, reader = u.register(memory, mode=M.MINOR | M.WP), uf.EventReader(u)
        other[:] = page_of(1)
        toucher, _ = fault(region, reader, 0)
        u.continue_(region.start, PAGE, write_protect=True)
        assert toucher.ends() == 2
        writer, flag = fault(region, reader, 0, write=9)
        assert flag == WP | WRITE
        assert other[0] == 2
        u.writeprotect(region.start, PAGE, protect=False)
        writer.ends()
        assert other[:2] == bytes([9, 2])


def test_continued_pages_can_be_collapsed() -> None:
    """MADV_COLLAPSE makes a huge page of them; what they hold stays."""
    n_pages, huge = 512, 2 << 20
    with opened(F.MINOR_SHMEM) as u:
        # Where a huge page fits: the page cache's are aligned in the file, and so must be the mapping.
        fd = os.memfd_create("userfault-test")
        os.ftruncate(fd, huge)
        other, room = mmap.mmap(fd, huge), anonymous(2 * huge)
        start = -(-room.ctypes.data // huge) * huge
        prot, how = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED
        assert LIBC.mmap(start, huge, prot, how, fd, 0) == start
        os.close(fd)
        region = u.register(start, huge, M.MINOR)
        other[:] = b"".join(map(page_of, range(n_pages)))
        u.continue_(region.start, region.length)
        advise(region, mmap.MADV_HUGEPAGE)  # register() forbade them
        try:
            advise(region, MADV_COLLAPSE)
        except OSError as error:
            pytest.skip(f"MADV_COLLAPSE: {error}")
        for page in range(n_pages):
            assert Toucher(region.array, page).ends() == page % 255 + 1
        assert (region.array == np.frombuffer(other, np.uint8)).all()
        assert pending(u) == 0
        region.unregister()


@pytest.mark.parametrize("flag", [MINOR, WP])
def test_unregistering_wakes_those_who_sleep_in_any_fault(flag: int) -> None:
    """UFFDIO_UNREGISTER itself wakes only for ranges that were registered for missing pages."""
    with opened(SHARED | F.PAGEFAULT_FLAG_WP) as u:
        memory, other = area("shmem", 1)
        other[:] = page_of(1)
        region, reader = u.register(memory, mode=M.MINOR if flag == MINOR else M.WP), uf.EventReader(u)
        if flag == WP:
            u.writeprotect(region.start, PAGE)
        toucher, flags_seen = fault(region, reader, 0, write=9)
        assert flags_seen & flag
        region.unregister()
        toucher.ends()
        assert other[:2] == bytes([9, 2])


# -- a service -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHMEM)
def test_a_service_fills_shared_memory(kind: str) -> None:
    """By copies: nothing can be moved there, and no huge page is asked for."""
    n_pages = 2048
    data = np.random.default_rng(5).integers(1, 256, n_pages * PAGE, dtype=np.uint8)
    with opened(SHARED | DEFAULT) as u, uf.FaultService(u) as service:
        memory, other = area(kind, n_pages)
        region = u.register(memory)
        service.serve(region, uf.sources.Buffer(data))
        for page in (0, 1, 1700, 5):
            assert region.array[page * PAGE + 3] == data[page * PAGE + 3]
        service.materialize(region)
        assert (region.array == data).all()
        stats = service.stats(region)
        assert (stats["moved"], stats["failed"], stats["pages"]) == (0, 0, n_pages)
        assert not service.failures()
        assert not any("hg" in one for one in flags(region))
        assert (np.frombuffer(other, np.uint8) == data).all() == (kind == "shmem")
        region.unregister()


def test_a_service_follows_what_other_mappings_do() -> None:
    data = np.random.default_rng(6).integers(1, 256, 64 * PAGE, dtype=np.uint8)
    with opened(SHARED) as u, uf.FaultService(u) as service:
        memory, other = area("shmem", 64)
        region = u.register(memory)
        service.serve(region, uf.sources.Buffer(data), readahead=0)
        other[:PAGE] = page_of(7)
        service.materialize(region)
        assert memory[:PAGE] == page_of(7)
        assert (region.array[PAGE:] == data[PAGE:]).all()
        assert service.stats(region)["existing"] == 1
        # Holes are filled again; what is only not mapped any more is not.
        advise(region, mmap.MADV_REMOVE, 0, 32)
        advise(region, mmap.MADV_DONTNEED, 32, 32)
        assert (region.array == data).all()
        advise(region, mmap.MADV_DONTNEED)
        service.materialize(region)
        assert (region.array == data).all()


def test_a_service_has_no_missing_pages_past_the_end_of_the_file(child: Child) -> None:
    """The kernel raises SIGBUS there before it asks anybody."""
    code = """
        fd = os.memfd_create("x")
        os.ftruncate(fd, 4 * PAGE)
        service = uf.FaultService(u)
        region = u.register(mmap.mmap(fd, 4 * PAGE))
        service.serve(region, uf.sources.Constant(7), readahead=4)
        os.ftruncate(fd, 2 * PAGE)
        assert region.array[PAGE] == 7
        print("before", flush=True)
        region.array[3 * PAGE]
        """
    dies(child, code, F.MISSING_SHMEM, signal.SIGBUS)


# -- the end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHMEM)
@pytest.mark.parametrize("served", [True, False])
def test_missing_pages_fail_closed(child: Child, kind: str, served: bool) -> None:
    code = """
        memory, _ = area(kind, 4)
        region = u.register(memory)
        if served:
            service = uf.FaultService(u)
            service.serve(region, uf.sources.Constant(7), readahead=0)
        else:
            u.copy(region.start, bytes([7]) * PAGE)
        assert memory[0] == 7
        u.close()
        assert memory[1] == 7
        print("before", flush=True)
        memory[PAGE]
        """
    dies(child, code, F.MISSING_SHMEM, signal.SIGBUS, signal.SIGSEGV, kind=kind, served=served)


@pytest.mark.parametrize("asleep", [True, False])
def test_minor_faults_fail_closed(child: Child, asleep: bool) -> None:
    """Nobody is left to say that what is in the page cache is what should be there."""
    code = """
        memory, other = area("shmem", 2)
        other[:] = page_of(1) * 2
        region = u.register(memory, mode=M.MINOR)
        array = region.array
        u.continue_(region.start, PAGE)
        if asleep:
            fault(region, uf.EventReader(u), 1)
        assert memory[0] == 2
        print("before", flush=True)
        u.close()
        uf.touch(array, np.array([PAGE], np.uint64))
        """
    dies(child, code, F.MINOR_SHMEM, signal.SIGBUS, signal.SIGSEGV, asleep=asleep)


def test_a_fork_child_does_not_get_it(child: Child) -> None:
    """It would read, and leave in the page cache, zeros."""
    code = """
        memory, other = area("shmem", 2)
        region = u.register(memory)
        pid = os.fork()
        if pid == 0:
            ctypes.string_at(region.start, 1)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSEGV
        toucher, _ = fault(region, uf.EventReader(u), 0)
        u.copy(region.start, page_of(1))
        assert toucher.ends() == 2
        """
    ends(child, code, F.MISSING_SHMEM)
