"""What the kernel's own tests of userfaultfd try, through this library: docs/kernel-selftests.md lists it."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import signal
import threading

import pytest

import userfault as uf
from areas import (
    KINDS,
    MADV_GUARD_INSTALL,
    F,
    M,
    Toucher,
    advise,
    area,
    dies,
    fault,
    opened,
    page_of,
)
from support import PAGE, Child, pending
from userfault import _ioctl, opening

pytestmark = pytest.mark.usefixtures("needs_uffd")
kinds = pytest.mark.parametrize("kind", KINDS)


# -- opening -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["device", "syscall", "user-mode-only"])
def test_the_handshake(way: str) -> None:
    """A version or a feature that the kernel lacks, and a second handshake, are refused; the first holds."""
    try:
        fd = opening._WAYS[way]()
    except OSError as error:
        pytest.skip(f"{way}: {error}")
    try:
        for version, features in ((0xA9, 0), (0xAA, 1 << 63)):
            with pytest.raises(uf.UffdError) as caught:
                _ioctl.api(fd, version, features)
            assert caught.value.errno == errno.EINVAL
        answered, ioctls = _ioctl.api(fd, 0xAA, 0)
        assert answered & F.THREAD_ID
        assert ioctls & uf.Ioctl.REGISTER
        with pytest.raises(uf.UffdError):
            _ioctl.api(fd, 0xAA, int(F.THREAD_ID))
    finally:
        os.close(fd)


def test_user_mode_only_leaves_system_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the kernel is EFAULT at once, and no record; one in user mode is a record."""
    monkeypatch.setattr(opening, "_WAYS", {"user-mode-only": opening._WAYS["user-mode-only"]})
    with opened(F(0)) as u:
        region, reader = u.map(PAGE), uf.EventReader(u)
        assert u.opened_by == "user-mode-only"
        assert system_call(region, 0) == errno.EFAULT
        assert len(reader.read(0)) == 0
        toucher, _ = fault(region, reader, 0)
        u.copy(region.start, page_of(1))
        assert toucher.ends() == 2
        assert system_call(region, 0) == 0


def system_call(region: uf.Region, page: int, write: bool = False) -> int:
    """The errno with which the kernel reads (or writes) the page's first byte."""
    ends = os.pipe()
    view = region.array[page * PAGE :][:1]
    try:
        if write:
            os.write(ends[1], b"\t")
            os.readv(ends[0], [view])
        else:
            os.write(ends[1], view)
    except OSError as error:
        return error.errno or -1
    finally:
        for end in ends:
            os.close(end)
    return 0


# -- registering ---------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("modes", list(itertools.product([M(0), M.MISSING], [M(0), M.WP], [M(0), M.MINOR])))
def test_the_ioctls_of_a_registered_range(kind: str, modes: tuple[uf.RegisterMode, ...]) -> None:
    mode = modes[0] | modes[1] | modes[2]
    with opened(KINDS[kind] | F.PAGEFAULT_FLAG_WP) as u:
        memory, _ = area(kind, 1)
        if mode == 0 or (kind == "anon" and M.MINOR in mode):
            with pytest.raises(uf.UffdError) as caught:
                u.register(memory, mode=mode)
            assert caught.value.errno == errno.EINVAL
            return
        region = u.register(memory, mode=mode)
        granted = region.ioctls
        assert uf.Ioctl.WAKE | uf.Ioctl.COPY | uf.Ioctl.ZEROPAGE in granted
        assert (uf.Ioctl.WRITEPROTECT in granted) == (M.WP in mode)
        assert (uf.Ioctl.CONTINUE in granted) == (M.MINOR in mode)


def test_unregistering_wakes_who_sleeps() -> None:
    with opened(F(0)) as u:
        region, reader = u.map(2 * PAGE), uf.EventReader(u)
        array = region.array
        sleepers = [fault(region, reader, 0)[0], Toucher(array, 1)]  # one read, one perhaps still pending
        region.unregister()
        assert [sleeper.ends() for sleeper in sleepers] == [0, 0]


def test_a_dropped_page_is_missing_again() -> None:
    with opened(F(0)) as u:
        region, reader = u.map(2 * PAGE), uf.EventReader(u)
        u.copy(region.start, page_of(0) + page_of(1))
        advise(region, mmap.MADV_DONTNEED, 1, 1)
        assert Toucher(region.array, 0).ends() == 1
        toucher, _ = fault(region, reader, 1)
        u.copy(region.start + PAGE, page_of(7))
        assert toucher.ends() == 8


# -- filling -------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("first", ["copy", "zeropage"])
def test_a_page_that_is_there_is_not_filled_again(kind: str, first: str) -> None:
    """Nor through another mapping of it: who comes second gets EEXIST, and changes nothing."""
    with opened(KINDS[kind]) as u:
        memory, other = area(kind, 2)
        regions = [u.register(memory)]
        if kind == "shmem" and other is not None:
            regions.append(u.register(other))
        start, expected = regions[0].start, page_of(1) if first == "copy" else bytes(PAGE)
        if first == "copy":
            assert u.copy(start, expected) == PAGE
        else:
            assert u.zeropage(start, PAGE) == PAGE
        for region in regions:
            for again in (lambda at: u.copy(at, page_of(5)), lambda at: u.zeropage(at, PAGE)):
                with pytest.raises(uf.PageExistsError) as caught:
                    again(region.start)
                assert caught.value.done == 0
            assert region.array[:PAGE].tobytes() == expected


@kinds
def test_zeropage_where_it_may_not_be(kind: str) -> None:
    with opened(KINDS[kind]) as u:
        memory, _ = area(kind, 2)
        region = u.register(memory)
        start = region.start
        for wrong in ((start + 1, PAGE), (start, PAGE - 1), (start, 0)):
            with pytest.raises(uf.RangeError):
                u.zeropage(*wrong)
        region.unregister()
        with pytest.raises(uf.NotRegisteredError):
            u.zeropage(start, PAGE)


def test_a_copy_into_read_only_memory_leaves_it_read_only(child: Child) -> None:
    """A page that comes dirty must not come writable."""
    code = """
        memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
        region = u.register(np.frombuffer(memory, np.uint8).ctypes.data, PAGE)
        u.copy(region.start, page_of(1))
        assert memory[:] == page_of(1)
        print("before", flush=True)
        ctypes.memset(region.start, 9, 1)
        """
    dies(child, code, F(0), signal.SIGSEGV)


def test_guard_pages_are_no_missing_pages(child: Child) -> None:
    """MADV_GUARD_INSTALL (Linux 6.13): SIGSEGV, and no record. A copy would take the guard's place."""
    with opened(F(0)) as u:
        try:
            advise(u.map(PAGE), MADV_GUARD_INSTALL)
        except OSError as error:
            pytest.skip(str(error))
    code = """
        service = uf.FaultService(u)
        region = u.map(4 * PAGE)
        service.serve(region, uf.sources.Constant(7), readahead=0)
        advise(region, MADV_GUARD_INSTALL, 1, 1)
        assert region.array[0] == region.array[2 * PAGE] == 7
        print("before", flush=True)
        region.array[PAGE]
        """
    dies(child, code, F(0), signal.SIGSEGV)


# -- SIGBUS and poison ---------------------------------------------------------------------------------


@kinds
def test_sigbus_instead_of_records(kind: str, needs_privilege: None) -> None:
    """Feature.SIGBUS: whoever touches a missing or a protected page gets the error, and no one is asked."""
    with opened(KINDS[kind] | F.SIGBUS | F.PAGEFAULT_FLAG_WP) as u:
        memory, _ = area(kind, 4)
        region = u.register(memory, mode=M.MISSING | M.WP)
        for page in range(4):
            assert system_call(region, page) == errno.EFAULT
            u.copy(region.start + page * PAGE, page_of(page), write_protect=True)
            assert system_call(region, page) == 0
            assert system_call(region, page, write=True) == errno.EFAULT
            u.writeprotect(region.start + page * PAGE, PAGE, protect=False)
            assert system_call(region, page, write=True) == 0
            assert memory[page * PAGE : (page + 1) * PAGE] == b"\t" + page_of(page)[1:]
        assert pending(u) == 0
        assert len(uf.EventReader(u).read(0)) == 0


@kinds
def test_sigbus_kills_who_touches_a_missing_page(kind: str, child: Child) -> None:
    code = """
        memory, _ = area(kind, 1)
        region = u.register(memory)
        print("before", flush=True)
        memory[0]
        """
    dies(child, code, KINDS[kind] | F.SIGBUS, signal.SIGBUS, kind=kind)


@kinds
def test_poisoned_pages_among_good_ones(kind: str, needs_privilege: None) -> None:
    n_pages = 32
    with opened(KINDS[kind] | F.POISON) as u:
        memory, _ = area(kind, n_pages)
        region, reader = u.register(memory), uf.EventReader(u)
        assert uf.Ioctl.COPY | uf.Ioctl.POISON in region.ioctls

        def monitor() -> None:
            for _ in range(n_pages):
                (address,) = reader.read(30)["address"].tolist()
                if (address - region.start) // PAGE % 2:
                    u.copy(address, page_of(1))
                else:
                    u.poison(address, PAGE)

        thread = threading.Thread(target=monitor, daemon=True)
        thread.start()
        answers = [system_call(region, page) for page in range(n_pages)]
        thread.join(30)
        assert answers == [errno.EFAULT, 0] * (n_pages // 2)
        # Poison stays until the page is dropped, and what is there is not poisoned.
        for page in (0, 1):
            with pytest.raises(uf.PageExistsError):
                u.poison(region.start + page * PAGE, PAGE)
        assert system_call(region, 0) == errno.EFAULT
        advise(region, mmap.MADV_DONTNEED, 0, 1)
        u.copy(region.start, page_of(3))
        assert region.array[0] == 4
