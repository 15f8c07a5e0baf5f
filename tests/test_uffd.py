"""Opening, negotiation, regions and every ioctl, on the real kernel."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from collections.abc import Iterator

import numpy as np
import pytest

import userfault as uf
from support import Child, pending, touching
from userfault import opening

PAGE = uf.PAGE_SIZE


@pytest.fixture
def u(needs_uffd: None) -> Iterator[uf.Userfaultfd]:
    with uf.Userfaultfd() as opened:
        yield opened


@pytest.fixture
def msg(needs_uffd: None) -> uf.Feature:
    features = uf.probe().features
    if features is None:
        pytest.skip("this kernel has no msg")
    return features


def anonymous(n_pages: int) -> mmap.mmap:
    return mmap.mmap(-1, n_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


# -- opening and negotiation ---------------------------------------------------------------------------


def test_the_first_way_that_works_is_taken(u: uf.Userfaultfd) -> None:
    assert u.opened_by == next(way.name for way in uf.probe().ways if way.works)


@pytest.mark.parametrize("broken", [1, 2])
def test_a_way_that_fails_falls_through_to_the_next(
    needs_uffd: None, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    def refuse() -> int:
        raise PermissionError(errno.EACCES, "no")

    names = list(opening._WAYS)
    monkeypatch.setattr(opening, "_WAYS", {**opening._WAYS, **dict.fromkeys(names[:broken], refuse)})
    with uf.Userfaultfd() as u:
        assert u.opened_by in names[broken:]
    assert [way.works for way in uf.probe().ways[:broken]] == [False] * broken


def test_when_nothing_works_every_reason_and_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> int:
        raise OSError(number, os.strerror(number))

    codes = {"device": errno.EACCES, "syscall": errno.EPERM, "user-mode-only": errno.EINVAL}
    ways = {name: lambda number=number: refuse(number) for name, number in codes.items()}
    monkeypatch.setattr(opening, "_WAYS", ways)
    with pytest.raises(uf.UnavailableError) as caught:
        uf.Userfaultfd()
    for text in ("EACCES", "setfacl", "EPERM", "vm.unprivileged_userfaultfd", "EINVAL", "Linux 5.11"):
        assert text in str(caught.value)
    capabilities = uf.probe()
    assert capabilities.apis == ()
    assert capabilities.features is None


def test_out_of_descriptors_names_the_limit(needs_uffd: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="RLIMIT_NOFILE"):
            uf.Userfaultfd()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_auto_agrees_on_what_the_probe_finds(u: uf.Userfaultfd) -> None:
    apis = uf.probe().apis
    assert u.api == ("v2" if uf.Api.V2 in apis else "msg")
    assert uf.Ioctl.REGISTER in u.ioctls


def test_features(msg: uf.Feature) -> None:
    default = uf.Feature.THREAD_ID | uf.Feature.MOVE | uf.Feature.POISON
    with uf.Userfaultfd(api="msg") as u:
        assert u.features == default & msg
        assert u.agreement.refused == default & ~msg
    with uf.Userfaultfd(api="msg", features="all") as u:
        assert not uf.Feature(u.features) & (uf.Feature.SIGBUS | uf.Feature.WP_ASYNC)
        assert uf.Feature.EVENT_REMAP in uf.Feature(u.features)
    with uf.Userfaultfd(api="msg", features=uf.Feature(0)) as u:
        assert u.features == 0


def test_a_feature_that_the_kernel_lacks(msg: uf.Feature) -> None:
    with pytest.raises(uf.UnsupportedError, match=r"no 0x4000000000000000; this kernel has .*THREAD_ID"):
        uf.Userfaultfd(api="msg", features=uf.Feature(1 << 62))


def test_an_api_that_the_kernel_lacks(needs_uffd: None) -> None:
    for api in uf.Api:
        if api not in uf.probe().apis:
            with pytest.raises(uf.UnsupportedError, match="this kernel has"):
                uf.Userfaultfd(api=api)
    with pytest.raises(ValueError, match="auto, v1, v2 or msg"):
        uf.Userfaultfd(api="v4")


# -- regions -------------------------------------------------------------------------------------------


def test_map(u: uf.Userfaultfd) -> None:
    region = u.map(3 * PAGE)
    assert region.start % (2 << 20) == 0
    assert region.array.shape == (3 * PAGE,)
    assert region.array.ctypes.data == region.start
    assert uf.Ioctl.COPY in region.ioctls
    assert u.regions.lookup(region.start + PAGE) == region.id
    for wrong in (0, 1, PAGE + 1):
        with pytest.raises(uf.RangeError):
            u.map(wrong)
    with pytest.raises(OverflowError):
        u.map(-PAGE)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        u.map(1 << 60)
    assert len(u.regions) == 1


def vm_flags(address: int) -> list[str]:
    here = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if "-" in line.split()[0]:
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                here = start <= address < end
            elif here and line.startswith("VmFlags:"):
                return line.split()[1:]
    return []


def test_views_keep_the_memory_and_the_last_one_gives_it_back(u: uf.Userfaultfd) -> None:
    region = u.map(4 * PAGE)
    start = region.start
    assert "um" in vm_flags(start)
    assert "dc" in vm_flags(start)  # VM_DONTCOPY: not for fork children
    u.zeropage(start, 4 * PAGE)
    view = region.array[PAGE:].reshape(-1, 2)[::2]
    region.close()
    assert "um" in vm_flags(start)
    view[:] = 7
    del view
    assert vm_flags(start) == []
    assert u.regions.lookup(start) == -1
    with pytest.raises(uf.ClosedError):
        _ = region.array


def test_a_dropped_region_is_unmapped(u: uf.Userfaultfd) -> None:
    start = u.map(PAGE).start
    assert vm_flags(start) == []
    assert len(u.regions) == 0


def test_register_a_buffer_and_an_address(u: uf.Userfaultfd) -> None:
    memory = anonymous(4)
    region = u.register(memory)
    assert region.length == 4 * PAGE
    with pytest.raises(BufferError):
        memory.close()  # held until it is unregistered
    thread = touching(region, [1])
    assert uf.EventReader(u).read(30)["address"].tolist() == [region.start + PAGE]
    u.zeropage(region.start, region.length)
    thread.join(30)
    region.unregister()
    assert "um" not in vm_flags(region.start)
    assert "dc" not in vm_flags(region.start)
    by_address = u.register(region.start, 2 * PAGE)
    assert by_address.array.ctypes.data == region.start
    by_address.unregister()
    with pytest.raises(uf.ClosedError):
        by_address.unregister()


def test_memory_that_cannot_be_registered(u: uf.Userfaultfd) -> None:
    region = u.map(4 * PAGE)
    with pytest.raises(uf.OverlapError, match=f"region {region.id}"):
        u.register(region.start + PAGE, PAGE)
    with uf.Userfaultfd() as other, pytest.raises(OSError, match="another userfaultfd") as caught:
        other.register(region.start, PAGE)
    assert caught.value.errno == errno.EBUSY
    with pytest.raises(uf.UnsupportedError, match="shared memory"):
        u.register(mmap.mmap(-1, PAGE))
    with open(__file__, "rb") as file, pytest.raises(uf.UnsupportedError, match="a mapping of"):
        u.register(
            mmap.mmap(file.fileno(), PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        )
    with pytest.raises(TypeError, match="read-only"):
        u.register(bytes(PAGE))
    with pytest.raises(uf.RangeError, match="not page-aligned"):
        u.register(bytearray(PAGE + 1))
    with pytest.raises(uf.RangeError, match="not all mapped"):
        u.register(1 << 45, PAGE)
    with pytest.raises(TypeError, match="length"):
        u.register(1 << 45)
    with pytest.raises(TypeError, match="length"):
        u.register(anonymous(1), PAGE)
    assert len(u.regions) == 1


def test_memory_of_the_heap_is_refused(u: uf.Userfaultfd) -> None:
    with open("/proc/self/maps") as maps:
        heap = next((line for line in maps if "[heap]" in line), None)
    if heap is None:
        pytest.skip("this process has no heap mapping")
    with pytest.raises(uf.UnsupportedError, match="memory of the heap"):
        u.register(int(heap.split("-")[0], 16), PAGE)


def test_out_of_mappings_names_the_sysctl(needs_uffd: None, child: Child) -> None:
    done = child("""
        limit = int(open("/proc/sys/vm/max_map_count").read())
        if limit > 200_000:
            sys.exit("max_map_count is too high to exhaust")
        room = mmap.mmap(-1, (2 * limit + 4096) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = np.frombuffer(room, np.uint8).ctypes.data
        u = uf.Userfaultfd()
        from userfault import _ioctl
        try:
            for i in range(limit):
                _ioctl.register(u.fileno(), start + 2 * i * PAGE, PAGE, uf.RegisterMode.MISSING)
        except OSError as error:
            print(error)
        """)
    assert "max_map_count" in done.stdout + done.stderr


# -- ioctls --------------------------------------------------------------------------------------------


def test_copy_fills_and_wakes(u: uf.Userfaultfd) -> None:
    region = u.map(4 * PAGE)
    data = np.random.default_rng(1).integers(0, 256, 4 * PAGE, dtype=np.uint8)
    thread = touching(region, [3])
    uf.EventReader(u).read(30)
    assert u.copy(region.start, data) == 4 * PAGE
    thread.join(30)
    assert (region.array == data).all()


def test_dontwake_leaves_the_faulter_asleep(u: uf.Userfaultfd) -> None:
    region = u.map(2 * PAGE)
    data = bytes(PAGE)
    fills = (lambda page: u.copy(page, data, wake=False), lambda page: u.zeropage(page, PAGE, wake=False))
    for index, fill in enumerate(fills):
        page = region.start + index * PAGE
        thread = touching(region, [index])
        uf.EventReader(u).read(30)
        assert fill(page) == PAGE
        thread.join(0.1)
        assert thread.is_alive()
        u.wake(page, PAGE)
        thread.join(30)
        assert not thread.is_alive()


def test_progress_is_exact_when_a_page_exists(u: uf.Userfaultfd) -> None:
    region = u.map(8 * PAGE)
    u.zeropage(region.start + 3 * PAGE, PAGE)
    with pytest.raises(uf.PageExistsError, match="wake") as caught:
        u.copy(region.start + 3 * PAGE, bytes(PAGE))
    assert caught.value.done == 0
    with pytest.raises(uf.UffdError) as caught:
        u.copy(region.start, bytes(8 * PAGE))
    assert caught.value.done == 3 * PAGE
    with pytest.raises(uf.UffdError) as caught:
        u.zeropage(region.start, 8 * PAGE)
    assert caught.value.done == 0
    assert caught.value.errno == errno.EEXIST


def test_wake_makes_an_unresolved_fault_come_again(u: uf.Userfaultfd) -> None:
    region = u.map(PAGE)
    thread = touching(region, [0])
    reader = uf.EventReader(u)
    reader.read(30)
    assert len(reader.read(0)) == 0
    u.wake(region.start, PAGE)
    assert reader.read(30)["address"].tolist() == [region.start]
    u.zeropage(region.start, PAGE)
    thread.join(30)


def test_unregistered_ranges(u: uf.Userfaultfd) -> None:
    region = u.map(2 * PAGE)
    region.unregister()
    assert region.array[0] == 0
    for call in (
        lambda: u.copy(region.start + PAGE, bytes(PAGE)),
        lambda: u.zeropage(region.start + PAGE, PAGE),
    ):
        with pytest.raises(uf.NotRegisteredError, match="not registered"):
            call()


def test_writeprotect(u: uf.Userfaultfd, msg: uf.Feature) -> None:
    if uf.Feature.PAGEFAULT_FLAG_WP not in msg:
        pytest.skip("this kernel has no write protection")
    mode = uf.RegisterMode.MISSING | uf.RegisterMode.WP
    region = u.map(PAGE, mode)
    assert region.mode == mode
    u.copy(region.start, bytes(PAGE), write_protect=True)
    assert region.array[0] == 0
    u.writeprotect(region.start, PAGE, protect=False)
    region.array[0] = 9
    assert region.array[0] == 9
    with pytest.raises(uf.RangeError):
        u.writeprotect(region.start + 1, PAGE)


def test_move(u: uf.Userfaultfd, msg: uf.Feature) -> None:
    if uf.Feature.MOVE not in msg:
        pytest.skip("UFFDIO_MOVE needs Linux 6.8")
    region = u.map(4 * PAGE)
    source = anonymous(4)
    view = np.frombuffer(source, np.uint8)
    view[:] = np.arange(4 * PAGE) % 251
    expected = view.copy()
    assert u.move(region.start, view.ctypes.data, 4 * PAGE) == 4 * PAGE
    assert (region.array == expected).all()
    assert not view.any()  # the pages have left
    with pytest.raises(uf.RangeError):
        u.move(region.start, view.ctypes.data + 1, PAGE)


def test_poison(needs_privilege: None, u: uf.Userfaultfd, msg: uf.Feature) -> None:
    if uf.Feature.POISON not in msg:
        pytest.skip("UFFDIO_POISON needs Linux 6.6")
    region = u.map(PAGE)
    assert u.poison(region.start, PAGE) == PAGE
    read, write = os.pipe()
    with pytest.raises(OSError, match="Bad address"):
        os.write(write, region.array)
    os.close(read)
    os.close(write)


def test_continue_needs_a_minor_region(u: uf.Userfaultfd) -> None:
    region = u.map(PAGE)
    with pytest.raises(uf.UffdError) as caught:
        u.continue_(region.start, PAGE)
    assert caught.value.done == 0


def test_misaligned_ranges_are_refused_by_every_ioctl(u: uf.Userfaultfd) -> None:
    region = u.map(2 * PAGE)
    for start, length in ((region.start + 8, PAGE), (region.start, PAGE - 1), (region.start, 0)):
        for call in (u.zeropage, u.wake, u.continue_, u.poison, u.writeprotect):
            with pytest.raises(uf.RangeError):
                call(start, length)
        with pytest.raises(uf.RangeError):
            u.copy(start, bytes(length))
    assert pending(u) == 0


# -- closing, and other processes ----------------------------------------------------------------------


def test_closed(needs_uffd: None) -> None:
    u = uf.Userfaultfd()
    region = u.map(PAGE)
    start = region.start
    reader = uf.EventReader(u)
    u.close()
    u.close()
    for call in (
        u.fileno,
        lambda: u.map(PAGE),
        lambda: u.copy(start, bytes(PAGE)),
        lambda: u.wake(start, PAGE),
        lambda: reader.read(0),
        lambda: uf.EventReader(u),
        lambda: uf.FaultService(u),
        region.unregister,
    ):
        with pytest.raises(uf.ClosedError):
            call()


def test_nothing_leaks(needs_uffd: None) -> None:
    def once() -> None:
        with uf.Userfaultfd() as u:
            region = u.map(4 * PAGE)
            with uf.FaultService(u) as service:
                service.serve(region, uf.sources.Zero())
                assert not region.array.any()
            uf.EventReader(u)

    once()
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(20):
        once()
    assert (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))) == before


def test_a_fork_child_does_nothing_to_its_parent(needs_uffd: None, child: Child) -> None:
    """Each way a child can leave, while the parent's region is served; then the parent's pages still come."""
    done = child("""
        data = np.random.default_rng(0).integers(1, 256, 64 * PAGE, dtype=np.uint8)
        with uf.Userfaultfd() as u, uf.FaultService(u) as service:
            region = u.map(64 * PAGE)
            service.serve(region, uf.sources.Buffer(data))
            touched = 0
            for leave in ("exit block", "close", "sys.exit", "raise", "calls", "drop"):
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        if leave == "exit block":
                            with service, u:
                                pass
                        elif leave == "close":
                            region.close(); service.close(); u.close()
                        elif leave == "sys.exit":
                            with u, service:
                                sys.exit(0)
                        elif leave == "raise":
                            with u, service:
                                raise KeyboardInterrupt
                        elif leave == "calls":
                            for call in (u.fileno, lambda: u.map(PAGE), lambda: u.poison(region.start, PAGE),
                                         lambda: uf.EventReader(u).read(0), region.unregister,
                                         lambda: service.serve(region, uf.sources.Zero())):
                                try:
                                    call()
                                except uf.ForkedError:
                                    continue
                                os._exit(2)
                        elif leave == "drop":
                            del region, service, u
                            gc.collect()
                        code = 0
                    except SystemExit as error:
                        code = error.code
                    except KeyboardInterrupt:
                        code = 0
                    os._exit(code)
                assert os.waitpid(pid, 0)[1] == 0, leave
                page = slice(touched * PAGE, (touched + 1) * PAGE)
                touched += 1
                assert (region.array[page] == data[page]).all(), leave
            assert settles(service, "pages", touched) and not service.failures()
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


def test_a_fork_in_the_middle_of_a_lookup(needs_uffd: None, child: Child) -> None:
    """Forked right after a fault, maybe inside the engine's lookup, a child lets go all the same."""
    done = child("""
        data = bytes(range(1, 256)) * PAGE
        u = uf.Userfaultfd()
        service = uf.FaultService(u)
        region = u.map(255 * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        for page in range(255):
            region.array[page * PAGE]
            pid = os.fork()
            if pid == 0:
                del region, service, u
                gc.collect()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


def test_a_fork_child_faults_where_the_parent_has_lazy_memory(needs_uffd: None, child: Child) -> None:
    """Without the fork event a child would read zeros; without the memory it dies of SIGSEGV."""
    done = child("""
        own = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with uf.Userfaultfd() as u, uf.FaultService(u) as service:
            for region in (u.map(PAGE), u.register(own)):
                service.serve(region, uf.sources.Buffer(bytes([7]) * PAGE))
                array = region.array
                pid = os.fork()
                if pid == 0:
                    os._exit(int(array[0]))
                status = os.waitpid(pid, 0)[1]
                assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV, status
                assert array[0] == 7
            region.unregister()
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr
