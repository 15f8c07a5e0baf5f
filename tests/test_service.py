"""FaultService on the real kernel: every byte right, the GIL rule, and the sources."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import userfault as uf
from support import Child, only, touching, wait_for
from userfault._engine import STATS_DTYPE

PAGE = uf.PAGE_SIZE


def noise(n_bytes: int) -> np.ndarray:
    return np.random.default_rng(n_bytes).integers(1, 256, n_bytes, dtype=np.uint8)


def in_random_order(region: uf.Region, threads: int) -> None:
    pages = np.random.default_rng(5).permutation(region.length // PAGE)
    touchers = [touching(region, pages[i::threads]) for i in range(threads)]
    for toucher in touchers:
        toucher.join(60)
        assert not toucher.is_alive()


@pytest.mark.parametrize("threads", [1, 8])
def test_every_byte_of_a_buffer(u: uf.Userfaultfd, service: uf.FaultService, threads: int) -> None:
    data = noise(512 * PAGE)
    region = u.map(len(data))
    service.serve(region, uf.sources.Buffer(data), readahead=0)
    in_random_order(region, threads)
    assert (region.array == data).all()
    wait_for(service, "pages", 512)
    service.close()  # the last fault's thread goes on before the engine has counted it
    stats = service.stats()
    assert stats["pages"] == 512
    assert stats["bytes"] == 512 * PAGE
    assert stats["records"] >= 512
    assert stats["reads"] <= stats["records"]
    assert stats["latency"]["count"].sum() == stats["records"]
    assert stats["failed"] == stats["unknown"] == 0


@pytest.mark.parametrize("extra", [0, 1, PAGE - 1])
def test_every_byte_of_a_file(
    u: uf.Userfaultfd, service: uf.FaultService, tmp_path: Path, extra: int
) -> None:
    data = noise(100 * PAGE + extra)
    path = tmp_path / "data"
    path.write_bytes(bytes(123) + data.tobytes())
    region = u.map(100 * PAGE + (PAGE if extra else 0))
    service.serve(region, uf.sources.File(path, offset=123))
    in_random_order(region, 4)
    assert (region.array[: len(data)] == data).all()
    assert not region.array[len(data) :].any()


def test_zeros_and_the_partial_page_of_a_buffer(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    zeros, odd = u.map(4 * PAGE), u.map(2 * PAGE)
    data = noise(PAGE + 7)
    service.serve(zeros, uf.sources.Zero())
    service.serve(odd, uf.sources.Buffer(data))
    assert not zeros.array.any()
    assert (odd.array[: len(data)] == data).all()
    assert not odd.array[len(data) :].any()


def test_pages_come_when_touched_and_not_before(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    region = u.map(1024 * PAGE)
    service.serve(region, uf.sources.Buffer(noise(1024 * PAGE)))
    touched = [3, 500, 1023, 17]
    for page in touched:
        assert region.array[page * PAGE] != 0
    present = resident(region)
    assert np.flatnonzero(present).tolist() == sorted(touched)


def resident(region: uf.Region) -> np.ndarray:
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(region.start // PAGE * 8)
        entries = np.frombuffer(pagemap.read(region.length // PAGE * 8), np.uint64)
    return entries >> np.uint64(63) == 1


def test_neighbours_in_one_batch_are_one_run(wire: str) -> None:
    """Faults that wait when the service opens are read together, sorted, and filled with one ioctl."""
    with uf.Userfaultfd(wire) as u:
        region = u.map(32 * PAGE)
        data = noise(32 * PAGE)
        source = uf.sources.Buffer(data)
        service = uf.FaultService(u)
        service.serve(region, source, readahead=0)
        # The engine sleeps in poll while 32 threads fault: whatever it reads together it must merge.
        touchers = [touching(region, [page]) for page in np.random.default_rng(0).permutation(32)]
        for toucher in touchers:
            toucher.join(30)
        stats = wait_for(service, "pages", 32)
        # One ioctl a run, and one more to wake all the threads of a read.
        assert stats["runs"] <= stats["ioctls"] <= stats["runs"] + stats["reads"]
        assert stats["runs"] <= 32
        assert (region.array == data).all()
        service.close()


def test_the_toucher_may_hold_the_gil(wire: str, child: Child) -> None:
    done = child("""
        data = np.arange(64 * PAGE, dtype=np.uint8) | 1
        with uf.Userfaultfd(WIRE) as u, uf.FaultService(u) as service:
            region = u.map(64 * PAGE)
            service.serve(region, uf.sources.Buffer(data))
            a = region.array
            assert a[4096] == data[4096]
            assert bytes(a[8192:8200]) == bytes(data[8192:8200])
            assert memoryview(a)[3 * PAGE] == data[3 * PAGE]
            assert a[4 * PAGE:8 * PAGE].sum() == data[4 * PAGE:8 * PAGE].sum()
            seen = []
            signal.signal(signal.SIGALRM, lambda *_: seen.append(int(a[20 * PAGE])))
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            while not seen:
                pass
            assert seen == [data[20 * PAGE]]
            assert (a[np.arange(63, -1, -1) * PAGE] == data[np.arange(63, -1, -1) * PAGE]).all()
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


def test_system_calls_on_missing_pages(
    needs_privilege: None, u: uf.Userfaultfd, service: uf.FaultService
) -> None:
    data = noise(8 * PAGE)
    region = u.map(len(data))
    service.serve(region, uf.sources.Buffer(data))
    read, write = os.pipe()
    assert os.write(write, region.array) == len(data)
    assert os.read(read, len(data)) == data.tobytes()
    os.close(read)
    os.close(write)


def test_pages_that_somebody_else_brought(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    """user-side copies race the engine's over the same pages: one wins each page, nobody sleeps on."""
    data = noise(256 * PAGE)
    region = u.map(len(data))
    service.serve(region, uf.sources.Buffer(data))

    def bring() -> None:
        for page in range(256):
            try:
                u.copy(region.start + page * PAGE, data[page * PAGE : (page + 1) * PAGE])
            except uf.PageExistsError:
                u.wake(region.start + page * PAGE, PAGE)

    rival = threading.Thread(target=bring)
    rival.start()
    in_random_order(region, 4)
    rival.join(60)
    assert (region.array == data).all()


def test_a_region_given_up_while_it_is_served(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    data = noise(64 * PAGE)
    for _ in range(50):
        region = u.map(64 * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        assert (region.array[: 8 * PAGE] == data[: 8 * PAGE]).all()
        region.close()
    assert len(u.regions) == 0
    assert not service._engines[0].keep  # no source is left behind
    region = u.map(PAGE)
    service.serve(region, uf.sources.Buffer(data[:PAGE]))
    assert region.array[0] == data[0]
    region.unregister()
    with pytest.raises(uf.RangeError):
        service.serve(region, uf.sources.Zero())


def test_a_run_that_lies_in_two_mappings(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    """madvise splits the mapping under the region: COPY never crosses the seam, the engine does."""
    data = noise(64 * PAGE)
    region = u.map(len(data))
    service.serve(region, uf.sources.Buffer(data))
    libc = ctypes.CDLL(None)
    madv_dontdump = 16
    for page in range(0, 64, 2):
        assert (
            libc.madvise(ctypes.c_void_p(region.start + page * PAGE), ctypes.c_size_t(PAGE), madv_dontdump)
            == 0
        )
    in_random_order(region, 16)
    assert (region.array == data).all()
    assert service.stats()["failed"] == 0


def test_idle_costs_nothing(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    def switches() -> list[str]:
        with open(f"/proc/self/task/{service._engines[0].native_id}/status") as status:
            return [line for line in status if "ctxt_switches" in line]

    region = u.map(PAGE)
    service.serve(region, uf.sources.Zero())
    assert region.array[0] == 0
    time.sleep(0.05)
    before = switches()
    time.sleep(0.3)
    assert switches() == before


# -- bad input -----------------------------------------------------------------------------------------


def test_what_cannot_be_served(u: uf.Userfaultfd, service: uf.FaultService, tmp_path: Path) -> None:
    region = u.map(2 * PAGE)
    with pytest.raises(uf.SourceError, match="GIL"):
        service.serve(region, lambda offset, buffer: None)  # type: ignore[arg-type]
    with pytest.raises(uf.SourceError, match="not a page source"):
        service.serve(region, b"bytes")  # type: ignore[arg-type]
    with pytest.raises(uf.SourceError, match=r"has 4096 bytes, the region 8192"):
        service.serve(region, uf.sources.Buffer(bytes(PAGE)))
    with uf.Userfaultfd(u.api) as other:
        foreign = other.map(PAGE)
        with pytest.raises(uf.RangeError, match="is not registered with this"):
            service.serve(foreign, uf.sources.Zero())
    service.serve(region, uf.sources.Zero())
    with pytest.raises(uf.SourceError, match="served already"):
        service.serve(region, uf.sources.Zero())
    with pytest.raises(uf.BusyError):
        uf.FaultService(u)
    with pytest.raises(uf.BusyError, match="FaultService"):
        uf.EventReader(u).read(0)
    with pytest.raises(uf.UnsupportedError, match="missing pages only"):
        u.map(PAGE, uf.RegisterMode.MISSING | uf.RegisterMode.WP)
    service.close()
    with pytest.raises(uf.ClosedError):
        service.serve(u.map(PAGE), uf.sources.Zero())


def test_sources_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(10))
    for offset in (-1, 11):
        with pytest.raises(uf.SourceError, match="outside"):
            uf.sources.File(path, offset=offset)
    os.mkfifo(tmp_path / "fifo")
    for special in ("/dev/zero", tmp_path / "fifo", tmp_path):
        with pytest.raises(uf.SourceError, match="regular file"):
            uf.sources.File(special)
    with pytest.raises(FileNotFoundError):
        uf.sources.File(tmp_path / "none")
    with pytest.raises(uf.SourceError, match="contiguous"):
        uf.sources.Buffer(np.zeros((8, 8))[:, ::2])
    with pytest.raises(TypeError):
        uf.sources.Buffer(5)


def test_lazy_memory_as_the_source_of_another_is_refused(u: uf.Userfaultfd) -> None:
    """Its engine would wait for a page that only it can bring."""
    lazy = u.map(4 * PAGE)
    with pytest.raises(uf.SourceError, match="registered"):
        uf.sources.Buffer(lazy.array[100:200])
    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    source = uf.sources.Buffer(memory)
    with pytest.raises(uf.SourceError, match="Buffer source"):
        u.register(memory)
    del source
    region = u.register(memory)
    with pytest.raises(uf.SourceError, match="registered"):
        uf.sources.Buffer(memory)
    region.unregister()
    uf.sources.Buffer(memory)


@only("msg")
def test_features_that_a_service_cannot_have(wire: str) -> None:
    with uf.Userfaultfd("msg", uf.Feature.SIGBUS) as u, pytest.raises(uf.UnsupportedError, match="SIGBUS"):
        uf.FaultService(u)
    with uf.Userfaultfd("msg") as u:
        region = u.map(PAGE, uf.RegisterMode.MISSING | uf.RegisterMode.WP)
        with pytest.raises(uf.UnsupportedError, match="unregister"):
            uf.FaultService(u)
        region.unregister()


def test_latency_percentile() -> None:
    stats = np.zeros((), STATS_DTYPE)
    assert np.isnan(uf.latency_percentile(stats, 50))
    stats["latency"]["from_ns"] = np.arange(496) * 10
    stats["latency"]["count"][[3, 7]] = [99, 1]
    assert uf.latency_percentile(stats, 50) == 40
    assert uf.latency_percentile(stats, 99) == 40
    assert uf.latency_percentile(stats, 100) == 80
    for wrong in (-1, 101):
        with pytest.raises(ValueError, match="between 0 and 100"):
            uf.latency_percentile(stats, wrong)


def test_latency_buckets_rise_by_an_eighth(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    starts = service.stats()["latency"]["from_ns"]
    assert (np.diff(starts.astype(np.float64)) > 0).all()
    steps = np.diff(starts[16:100].astype(np.int64)) / starts[16:99]
    assert (steps <= 1 / 8 + 1e-9).all()
