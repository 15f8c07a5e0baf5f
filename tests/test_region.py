"""Memory: map, register, and what becomes of it."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import time

import pytest

import userfault as uf
from support import PAGE, Child, addresses, touching


def anonymous(n_pages: int) -> mmap.mmap:
    return mmap.mmap(-1, n_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


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
    with pytest.raises(uf.RangeError):
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
    assert addresses(uf.EventReader(u).read(30)) == [region.start + PAGE]
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
    with uf.Userfaultfd(u.api) as other, pytest.raises(OSError, match="another userfaultfd") as caught:
        other.register(region.start, PAGE)
    assert caught.value.errno == errno.EBUSY
    assert "dc" in vm_flags(region.start)  # the refusal did not hand the other's memory to fork children
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


def test_memory_of_the_heap_and_the_stack_is_refused(u: uf.Userfaultfd) -> None:
    with open("/proc/self/maps") as maps:
        lines = [line for line in maps if line.rstrip().endswith(("[heap]", "[stack]"))]
    assert lines
    for line in lines:
        with pytest.raises(uf.UnsupportedError, match=r"memory of the (heap|stack)"):
            u.register(int(line.split("-")[0], 16), PAGE)


def test_out_of_mappings_names_the_sysctl(wire: str, child: Child) -> None:
    done = child("""
        limit = int(open("/proc/sys/vm/max_map_count").read())
        if limit > 200_000:
            sys.exit("max_map_count is too high to exhaust")
        room = mmap.mmap(-1, (2 * limit + 4096) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = np.frombuffer(room, np.uint8).ctypes.data
        u = uf.Userfaultfd(WIRE)
        from userfault import _ioctl
        try:
            for i in range(limit):
                _ioctl.register(u.fileno(), start + 2 * i * PAGE, PAGE, uf.RegisterMode.MISSING)
        except OSError as error:
            print(error)
        """)
    assert "max_map_count" in done.stdout + done.stderr


def test_closed(wire: str) -> None:
    u = uf.Userfaultfd(wire)
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


def test_nothing_leaks(wire: str) -> None:
    def once() -> None:
        with uf.Userfaultfd(wire) as u:
            region = u.map(4 * PAGE)
            with uf.FaultService(u) as service:
                service.serve(region, uf.sources.Zero())
                assert not region.array.any()
            uf.EventReader(u)

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    once()
    gc.collect()  # what other tests left
    before = counts()
    for _ in range(20):
        once()
    deadline = time.monotonic() + 30
    while counts() > before and time.monotonic() < deadline:
        time.sleep(0.001)  # the kernel takes a moment to let a thread go
    assert counts() <= before
