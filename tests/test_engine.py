"""The engine as a whole: materialize, workers, shards, statistics, placement, and stopping under load."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import userfault as uf
from support import LAB, Child, has, only, touching, wait_for

PAGE = uf.PAGE_SIZE
HUGE = 512  # pages
# To share. The lab's are emulated, and too slow for a lease to be worth it.
TWO_PROCESSORS = len(os.sched_getaffinity(0)) > 1 and not LAB


def noise(pages: int) -> np.ndarray:
    return np.random.default_rng(pages).integers(1, 256, pages * PAGE, dtype=np.uint8)


def huge_pages(region: uf.Region) -> int:
    """How many huge pages are mapped in it."""
    with open("/proc/self/smaps") as smaps:
        inside = False
        for line in smaps:
            if "-" in line.split()[0]:
                start = int(line.split("-")[0], 16)
                inside = start <= region.start < int(line.split()[0].split("-")[1], 16)
            elif inside and line.startswith("AnonHugePages:"):
                return int(line.split()[1]) // 2048
    raise AssertionError("the region is not mapped")


# -- materialize ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [1, 63, 3 * HUGE + 7])
@pytest.mark.parametrize("readahead", [0, "adaptive"])
def test_materialize_fills_what_is_missing(
    u: uf.Userfaultfd, service: uf.FaultService, pages: int, readahead: object
) -> None:
    data = noise(pages)
    region = u.map(len(data))
    service.serve(region, uf.sources.Buffer(data), readahead=readahead)  # type: ignore[arg-type]
    assert region.array[pages // 2 * PAGE] == data[pages // 2 * PAGE]
    seen: list[tuple[int, int]] = []
    service.materialize(region, progress=lambda done, total: seen.append((done, total)))
    assert service.resident(region).all()
    assert seen[-1] == (len(data), len(data))
    assert seen == sorted(seen)
    records = service.stats()["records"]
    assert (region.array == data).all()
    assert service.stats()["records"] == records


def test_materialize_in_the_background(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    data = noise(2000)
    regions = [u.map(len(data)) for _ in range(5)]
    for region in regions:
        service.serve(region, uf.sources.Buffer(data))
        service.materialize(region, wait=False)
    deadline = time.monotonic() + 60
    while not all(service.resident(region).all() for region in regions):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert all((region.array == data).all() for region in regions)


def test_materialize_of_what_cannot_be_had(
    u: uf.Userfaultfd, service: uf.FaultService, tmp_path: Path
) -> None:
    """The good pages come, the bad ones stay missing until they are touched, and the error says why."""
    data = noise(100)
    path = tmp_path / "data"
    path.write_bytes(data.tobytes())
    region = u.map(len(data))
    service.serve(region, uf.sources.File(path))
    os.truncate(path, 70 * PAGE)
    with pytest.raises(uf.SourceError, match="No data available"):
        service.materialize(region)
    assert service.resident(region)[:70].all()
    assert not service.resident(region)[70:].any()
    assert not service.failures()
    assert (region.array[: 70 * PAGE] == data[: 70 * PAGE]).all()


def test_materialize_of_a_region_that_is_given_up(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    region = u.map(PAGE)
    with pytest.raises(uf.ClosedError, match="not served"):
        service.materialize(region)
    service.serve(region, uf.sources.Zero())
    region.close()
    with pytest.raises(uf.ClosedError, match="not served"):
        service.materialize(region)


# -- huge pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "mapped file", "file"])
def test_huge_pages_are_moved_into_place(needs_uffd: None, tmp_path: Path, kind: str) -> None:
    data = noise(4 * HUGE)
    path = tmp_path / "data"
    path.write_bytes(data.tobytes())
    sources = {
        "memory": lambda: uf.sources.Buffer(data),
        "mapped file": lambda: uf.sources.Buffer(np.memmap(path, np.uint8, "r")),
        "file": lambda: uf.sources.File(path),
    }
    with uf.Userfaultfd() as u, uf.FaultService(u) as service:
        region = u.map(len(data))
        service.serve(region, sources[kind](), readahead=0, page_bytes=2 << 20)
        touching(region, [0, HUGE, 3 * HUGE + 17]).join(60)
        if has(uf.Feature.MOVE):
            wait_for(service, "moved", 3 * HUGE)
            assert huge_pages(region) == 3
        service.materialize(region)
        assert (region.array == data).all()
        region.array[:] = 5  # it is the region's own memory
        assert (data != 5).any()


def test_a_page_that_is_there_does_not_stop_the_others(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    data = noise(2 * HUGE)
    region = u.map(len(data))
    service.serve(region, uf.sources.Buffer(data), page_bytes=2 << 20)
    for page in (7, HUGE + 511):
        u.copy(region.start + page * PAGE, data[page * PAGE : (page + 1) * PAGE])
    touching(region, [0, HUGE]).join(60)
    service.materialize(region)
    assert (region.array == data).all()


# -- workers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_every_byte_with_workers(wire: str, workers: int) -> None:
    """Touched at random by some, scanned by others, materialized meanwhile."""
    data = noise(4096)
    with uf.Userfaultfd(wire) as u, uf.FaultService(u, workers=workers) as service:
        region = u.map(len(data))
        service.serve(region, uf.sources.Buffer(data))
        random = np.random.default_rng(3).permutation(4096)
        threads = [touching(region, random[i::4]) for i in range(4)] + [touching(region, range(4096))]
        service.materialize(region)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert (region.array == data).all()


def tasks() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def ended(before: set[str]) -> None:
    """A thread has done its last work a moment before the kernel has forgotten it."""
    deadline = time.monotonic() + 30
    while tasks() - before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_threads_come_when_needed_and_go_with_the_service(needs_uffd: None, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(PAGE))
    before = tasks()
    with uf.Userfaultfd() as u:
        with uf.FaultService(u) as service:
            service.serve(u.map(PAGE), uf.sources.Zero())
            assert len(tasks() - before) == 1
            service.serve(u.map(PAGE), uf.sources.File(path))
            assert len(tasks() - before) == 2
        ended(before)
        with uf.FaultService(u, workers=4):
            assert len(tasks() - before) == 5
    ended(before)


# -- shards --------------------------------------------------------------------------------------------


def test_regions_spread_over_shards(wire: str) -> None:
    data = noise(64)
    before = len(os.listdir("/proc/self/fd"))
    with uf.Userfaultfd(wire) as u:
        with uf.FaultService(u, shards=3) as service:
            regions = [service.map(len(data)) for _ in range(9)]
            for region in regions:
                service.serve(region, uf.sources.Buffer(data))
            owners = [region._userfaultfd for region in regions]
            assert [owners.count(owner) for owner in service._shards] == [3, 3, 3]
            threads = [touching(region, range(64)) for region in regions]
            for thread in threads:
                thread.join(60)
            assert all((region.array == data).all() for region in regions)
            assert wait_for(service, "pages", 9 * 64)["pages"] == 9 * 64
            mine = u.map(PAGE)
            service.serve(mine, uf.sources.Zero())
            assert mine.array[0] == 0
        kept = regions[0].array if regions[0]._userfaultfd is u else regions[3].array
        assert (kept == data).all()
        assert sum(1 for region in regions if not region._closed) == 3  # the shards' own went with them
        with pytest.raises(uf.ClosedError):
            service.map(PAGE)
    del regions, region, owners, mine, kept, threads, service, thread
    # Those of u stay until it is collected: the userfaultfd, two eventfds, and the engine's pagemap.
    assert len(os.listdir("/proc/self/fd")) <= before + 4


# -- statistics ----------------------------------------------------------------------------------------


def test_what_is_counted_for_a_region(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    data = noise(100)
    one, two = u.map(len(data)), u.map(len(data))
    for region in (one, two):
        service.serve(region, uf.sources.Buffer(data), readahead=0)
    touching(one, range(0, 100, 2)).join(60)
    touching(two, range(10)).join(60)
    deadline = time.monotonic() + 30
    while service.stats(two)["latency"].sum() < 10 and time.monotonic() < deadline:
        time.sleep(0.001)
    first, second = service.stats(one), service.stats(two)
    assert (first["pages"], second["pages"]) == (50, 10)
    assert (first["bytes"], second["bytes"]) == (50 * PAGE, 10 * PAGE)
    assert first["runs"] == 50
    assert first["latency"].sum() == first["records"] >= 50
    total = service.stats()
    for name in ("records", "pages", "bytes", "runs", "duplicates", "ahead", "moved"):
        assert total[name] == first[name] + second[name], name
    assert total["errors"].sum() == 0
    with pytest.raises(uf.RangeError), uf.Userfaultfd(u.api) as other:
        service.stats(other.map(PAGE))


# -- placement -----------------------------------------------------------------------------------------


def switches(service: uf.FaultService) -> int:
    with open(f"/proc/self/task/{service._engines[0].native_id}/status") as status:
        return sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)


@pytest.mark.parametrize("placement", ["spin", "any", "pair"])
def test_every_placement_serves_and_then_sleeps(wire: str, placement: uf.Placement) -> None:
    data = noise(500)
    with uf.Userfaultfd(wire) as u:
        if placement == "pair" and wire != "msg":
            with pytest.raises(uf.UnsupportedError, match="THREAD_ID"):
                uf.FaultService(u, placement=placement)
            return
        with uf.FaultService(u, placement=placement) as service:
            region = u.map(len(data))
            service.serve(region, uf.sources.Buffer(data), readahead=0)
            touching(region, np.random.default_rng(0).permutation(500)).join(60)
            assert (region.array == data).all()
            time.sleep(1.2 if placement == "pair" else 0.1)
            before = switches(service)
            time.sleep(0.2)
            assert switches(service) == before


if TWO_PROCESSORS:

    @only("msg")
    def test_a_pair_shares_a_processor_and_gives_it_back(wire: str) -> None:
        data = noise(4000)
        mine = os.sched_getaffinity(0)
        with uf.Userfaultfd(wire) as u, uf.FaultService(u, placement="pair") as service:
            region = u.map(len(data))
            service.serve(region, uf.sources.Buffer(data), readahead=0)
            seen = []

            def touch() -> None:
                offsets = np.random.default_rng(0).permutation(4000).astype(np.uint64) * np.uint64(PAGE)
                for some in np.array_split(offsets, 20):
                    uf.touch(region.array, some)
                    # While this thread waits for a processor the pair may be parted, and is one again soon.
                    seen.append([os.sched_getaffinity(pid) for pid in (0, service._engines[0].native_id)])
                time.sleep(0.2)
                seen.append([os.sched_getaffinity(0)])

            thread = threading.Thread(target=touch)
            thread.start()
            thread.join(60)
            *shared, (after,) = seen
            assert any(len(mine) == 1 and mine == its for mine, its in shared), shared
            assert after == mine
            assert os.sched_getaffinity(service._engines[0].native_id) == mine
            assert (region.array == data).all()


# -- stopping ------------------------------------------------------------------------------------------


def test_closing_under_full_load_loses_no_page(wire: str, child: Child) -> None:
    """Every page that is read through a system call holds the right byte, or is EFAULT: none hangs."""
    done = child("""
        data = np.arange(20_000 * PAGE // 8, dtype=np.uint64).view(np.uint8) | 1
        u = uf.Userfaultfd(WIRE)
        service = uf.FaultService(u)
        region = u.map(len(data))
        service.serve(region, uf.sources.Buffer(data), readahead=0)
        a = region.array
        right = [0] * 8
        failed = [0] * 8
        def read(k):
            r, w = os.pipe()
            for page in np.random.default_rng(k).permutation(20_000)[k::8].tolist():
                try:
                    os.write(w, a[page * PAGE:page * PAGE + 1])
                    assert os.read(r, 1)[0] == data[page * PAGE], page
                    right[k] += 1
                except OSError:
                    failed[k] += 1
        threads = [threading.Thread(target=read, args=(k,)) for k in range(8)]
        for t in threads: t.start()
        while sum(right) < 1000:
            time.sleep(0.001)
        service.close()
        for t in threads: t.join()
        assert sum(right) + sum(failed) == 20_000, (right, failed)
        assert sum(failed) > 1000
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr
