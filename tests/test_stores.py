"""zarr, fsspec, .npy and dask: the bytes are those of the library itself, and errors are the store's own."""

from __future__ import annotations

import functools
import gc
import io
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault as uf
from http_store import Store, serving
from userfault.stores import boxes as bx

zarr = pytest.importorskip("zarr")
pytest.importorskip("aiohttp")
fsspec = pytest.importorskip("fsspec")

from userfault.stores import open_fsspec, open_npy, open_zarr  # noqa: E402
from userfault.stores.fsspec import FsspecSource  # noqa: E402
from userfault.stores.zarr import ZarrSource, cache_bytes_for  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
needs_pager = pytest.mark.skipif(not hasattr(uf, "Pager"), reason="the pager is not there yet")
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Store]:
    """It runs in this process: whoever touches a page holds the GIL, which it needs. `prefetch` does not."""
    with serving(tmp_path) as store:
        yield store


def read(source: Any, step: int = 0, threads: int = 8) -> bytes:
    """All bytes, by requests of so many chunks' bytes, from several threads."""
    step = step or 3 * source.chunk_bytes
    starts = range(0, source.nbytes, step)
    pieces = [bytearray(min(step, source.nbytes - start)) for start in starts]

    def one(start: int, piece: bytearray) -> None:
        source.read_into(start, memoryview(piece))
        piece.append(0)  # BufferError, should anybody still hold it
        piece.pop()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, starts, pieces))
    return b"".join(pieces)


def numbers(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Elements of any dtype, none of which is all zeros by rule."""
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(7)
    n = math.prod(shape)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.names:
        made = np.empty(shape, dtype)
        for name in dtype.names:
            made[name] = numbers(shape, dtype[name])
        return made
    if dtype.kind in "SU":
        return np.array([f"{i}"[-3:] for i in range(n)], dtype).reshape(shape)
    return rng.integers(1, 100 if dtype == "f2" or dtype == "u1" else 30_000, shape).astype(dtype)


def store_of(folder: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any, **how: Any) -> Any:
    z = zarr.create_array(folder / "a.zarr", shape=shape, chunks=chunks, dtype=dtype, **how)
    z[...] = numbers(shape, dtype)
    return z


def c_bytes(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (3, 1, 2, 5)])
def test_boxes_are_the_run(shape: tuple[int, ...]) -> None:
    whole = np.arange(math.prod(shape)).reshape(shape)
    for first in range(whole.size):
        for end in range(first + 1, whole.size + 1):
            found = list(bx.boxes(shape, first, end))
            parts = [whole[box].ravel() for box in found]
            assert np.array_equal(np.concatenate(parts), np.arange(first, end))
            assert len(found) <= max(1, 2 * len(shape))


# Contiguous chunks, and not; ends that are no whole chunk; items that straddle any power of two.
SHAPES = [
    ((10_000,), (1_000,), {}),
    ((10_000,), (3_333,), {}),
    ((12, 500), (1, 250), {}),
    ((12, 500), (1, 300), {}),
    ((12, 500), (5, 500), {}),
    ((130, 250), (50, 60), {}),
    ((20, 30, 40), (7, 9, 40), {}),
    ((20, 30, 40), (7, 9, 11), {}),
    ((4_000,), (100,), {"shards": (1_000,)}),
    ((60, 80), (10, 10), {"shards": (30, 40)}),
]


@pytest.mark.parametrize(("shape", "chunks", "how"), SHAPES, ids=str)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_layouts(
    tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], how: dict[str, Any], zarr_format: int
) -> None:
    if how and zarr_format == 2:
        pytest.skip("format 2 has no shards")
    z = store_of(tmp_path, shape, chunks, "f8", zarr_format=zarr_format, **how)
    source = ZarrSource(z.store_path)
    assert source.nbytes == z.nbytes
    assert read(source) == c_bytes(z[:])
    assert read(source, 4096) == c_bytes(z[:])
    assert read(ZarrSource(z.store_path, cache_bytes=0), 4096, 2) == c_bytes(z[:])


@pytest.mark.parametrize(
    ("shape", "chunks", "expected"),
    [
        ((10_000,), (1_000,), 8_000),
        ((12, 500), (1, 250), 2_000),
        ((12, 500), (5, 500), 20_000),
        ((12, 500), (1, 300), 4_096),  # a row has a chunk and a part of one
        ((4096, 8192), (512, 512), 4_096),
        ((4096, 8192), (512, 3000), 16_384),
        ((64, 64, 128), (8, 8, 128), 8_192),
    ],
)
def test_zarr_chunk_bytes(
    tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], expected: int
) -> None:
    z = zarr.create_array(tmp_path / "a.zarr", shape=shape, chunks=chunks, dtype="f8")
    assert ZarrSource(z.store_path).chunk_bytes == expected


def test_zarr_caches_a_band_of_chunks() -> None:
    z = zarr.create_array({}, shape=(1 << 20, 1 << 20), chunks=(1 << 10, 1 << 10), dtype="u1")
    assert cache_bytes_for(z) == 3 << 29
    z = zarr.create_array({}, shape=(1 << 20,), chunks=(1 << 10,), dtype="u1")
    assert cache_bytes_for(z) == 256 * MIB


DTYPES = [
    *("?", "u1", ">i2", ">f8", "f2", "c16", "M8[ns]", "m8[s]", "S5", "U3"),
    [("a", "i2"), ("b", "f8"), ("c", "S3")],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_dtypes(tmp_path: Path, dtype: Any, zarr_format: Any) -> None:
    z = store_of(tmp_path, (90, 70), (40, 30), dtype, zarr_format=zarr_format)
    z = zarr.open_array(z.store_path)  # format 3 has byte order in the codecs, not in the dtype
    source = ZarrSource(z.store_path)
    assert read(source) == c_bytes(z[:])
    assert read(source, 1000) == c_bytes(z[:])  # items lie in two requests
    assert np.array_equal(np.frombuffer(read(source), z.dtype).reshape(z.shape), numbers((90, 70), dtype))


def test_zarr_order_f_fill_value_and_no_dimension(tmp_path: Path) -> None:
    z = zarr.create_array(
        tmp_path / "a", shape=(40, 50), chunks=(15, 20), dtype="i4", fill_value=-7, zarr_format=2, order="F"
    )
    z[:20] = numbers((20, 50), "i4")
    assert read(ZarrSource(z.store_path)) == c_bytes(z[:])
    assert z[39, 49] == -7
    scalar = zarr.create_array(tmp_path / "b", shape=(), dtype="f4")
    scalar[...] = 2.5
    assert np.frombuffer(read(ZarrSource(scalar.store_path)), "f4") == 2.5


@pytest.mark.parametrize(("shape", "chunks"), [((5_000,), (700,)), ((60, 90), (25, 40))])
def test_zarr_writes(tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
    """Any run of bytes, and what is cached of it is not read again."""
    z = store_of(tmp_path, shape, chunks, "i4")
    source = ZarrSource(z.store_path, mode="r+", cache_bytes=MIB)
    copy = bytearray(c_bytes(z[:]))
    rng = np.random.default_rng(1)
    for _ in range(8):
        start = int(rng.integers(0, len(copy) - 1))
        new = rng.bytes(int(rng.integers(1, len(copy) - start)))
        source.read_into(start // 4 * 4, memoryview(bytearray(8))[: len(copy) - start // 4 * 4])
        source.write_from(start, memoryview(new))
        copy[start : start + len(new)] = new
        assert read(source, 4096, 2) == bytes(copy)
    assert c_bytes(zarr.open_array(z.store_path)[:]) == bytes(copy)


def test_zarr_gets_each_chunk_once(http: Store, tmp_path: Path) -> None:
    """Of a scan, in many small requests from many threads."""
    z = store_of(tmp_path, (100, 1200), (40, 50), "f8")
    source = ZarrSource(f"{http.url}/a.zarr")
    http.gets.clear()
    assert read(source, 4096) == c_bytes(z[:])
    chunks = [path for path, _ in http.gets if "/c/" in path]
    assert len(chunks) == len(set(chunks)) == 3 * 24


@pytest.mark.parametrize("fail", ["500", "cut"])
@pytest.mark.parametrize("chunks", [(1_000,), (50, 30)], ids=["side by side", "apart"])
def test_zarr_errors_are_the_stores(http: Store, tmp_path: Path, fail: str, chunks: tuple[int, ...]) -> None:
    shape = (10_000,) if len(chunks) == 1 else (100, 60)
    store_of(tmp_path, shape, chunks, "f8")
    source = ZarrSource(f"{http.url}/a.zarr")
    http.fail = lambda path: fail if "/c/1" in path else None
    with pytest.raises(Exception, match=r"500, message='Internal Server Error'|payload") as e:
        read(source)
    assert str(e.value)


def test_zarr_refusals(tmp_path: Path) -> None:
    strings = zarr.create_array(tmp_path / "s", shape=(3,), dtype=str)
    with pytest.raises(uf.SourceError, match="whose elements have no fixed size"):
        ZarrSource(strings.store_path)
    z = store_of(tmp_path, (10,), (5,), "f8")
    with pytest.raises(uf.SourceError, match=r"was .*float32.* when opened"):
        ZarrSource(z.store_path, expected=((10,), np.dtype("f4")))
    in_memory = zarr.create_array({}, shape=(3,), dtype="f8")
    with pytest.raises(uf.SourceError, match="lives in this process, the pager would change a copy"):
        open_zarr(in_memory, mode="r+")
    elsewhere = zarr.create_array("memory://stores", shape=(3,), dtype="f8")
    for store in (elsewhere, "memory://stores"):
        with pytest.raises(uf.SourceError, match="the pager cannot see it"):
            open_zarr(store)
    with zarr.storage.ZipStore(tmp_path / "z.zip", mode="w") as zipped:
        zarr.create_array(zipped, shape=(3,), dtype="f8")
        with pytest.raises(uf.SourceError, match="a zip file"):
            open_zarr(zipped, mode="r+")
    with pytest.raises(FileNotFoundError):
        open_zarr(tmp_path / "nothing")


@needs_pager
def test_open_zarr(needs_privilege: None, tmp_path: Path) -> None:
    z = store_of(tmp_path, (200, 300), (70, 90), ">f4", zarr_format=2)
    with open_zarr(z) as a:
        assert (a.shape, a.dtype) == (z.shape, np.dtype(">f4"))
        assert not a.resident.any()
        assert np.array_equal(a, z[:])
        with pickle.loads(pickle.dumps(a)) as again:
            assert np.array_equal(again, z[:])
    with open_zarr(tmp_path / "a.zarr", mode="r+", workers=2, cache_bytes=MIB) as a:
        a[10:20] = 5
    assert (z[10:20] == 5).all()


@needs_pager
def test_open_zarr_in_memory_is_a_copy(needs_privilege: None) -> None:
    z = zarr.create_array({}, shape=(1_000,), chunks=(100,), dtype="i8")
    z[:] = numbers((1_000,), "i8")
    before = z[:]
    with open_zarr(z, mode="c") as a:
        z[:] = 0
        assert np.array_equal(a, before)
        a[:] = 3
        assert (a == 3).all()
    empty = zarr.create_array({}, shape=(0, 5), dtype="i8")
    with open_zarr(empty) as a:
        assert a.shape == (0, 5)


@needs_pager
def test_open_zarr_says_what_the_store_says(needs_privilege: None, http: Store, tmp_path: Path) -> None:
    store_of(tmp_path, (10_000,), (1_000,), "f8")
    http.fail = lambda path: "500" if "/c/9" in path else None
    with open_zarr(f"{http.url}/a.zarr") as a:
        a.prefetch(0)
        assert a[0] > 0
        with pytest.raises(uf.SourceError, match="500, message='Internal Server Error'"):
            a.materialize()


@pytest.fixture
def blob(tmp_path: Path) -> bytes:
    data = np.random.default_rng(3).bytes(5 * MIB // 2 + 11)
    (tmp_path / "blob").write_bytes(data)
    return data


def test_fsspec_one_request_a_call(http: Store, blob: bytes) -> None:
    source = FsspecSource(f"{http.url}/blob", chunk_bytes=256 * KIB)
    assert source.nbytes == len(blob)
    http.gets.clear()
    http.nbytes = 0
    assert read(source, MIB) == blob
    assert sorted(asked for _, asked in http.gets) == sorted(
        f"bytes={start}-{min(start + MIB, len(blob)) - 1}" for start in range(0, len(blob), MIB)
    )
    assert http.nbytes == len(blob)


def test_fsspec_other_filesystems(blob: bytes, tmp_path: Path) -> None:
    """One that says nothing of threads: a folder of a zip file."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("blob", blob)
    assert read(FsspecSource(f"zip://blob::{tmp_path}/z.zip"), 256 * KIB) == blob


def test_fsspec_refuses(http: Store, blob: bytes) -> None:
    url = f"{http.url}/blob"
    http.ranges = False
    with pytest.raises(uf.SourceError, match="its server does not do ranges"):
        FsspecSource(url)
    http.ranges, http.sizes = True, False
    with pytest.raises(uf.SourceError, match="does not tell its size"):
        FsspecSource(url)
    with pytest.raises(FileNotFoundError, match="nothing"):
        FsspecSource(f"{http.url}/nothing")
    with pytest.raises(uf.SourceError, match="cannot be written to by ranges"):
        open_fsspec(url, mode="r+")


def test_fsspec_object_that_changes(http: Store, blob: bytes, tmp_path: Path) -> None:
    source = FsspecSource(f"{http.url}/blob")
    (tmp_path / "blob").write_bytes(blob[::-1])
    with pytest.raises(uf.SourceError, match="was changed since it was opened"):
        read(source)


@pytest.mark.parametrize(
    ("fail", "says"), [("500", "500, message='Internal Server"), ("cut", "payload|data")]
)
def test_fsspec_errors_are_the_servers(http: Store, blob: bytes, fail: str, says: str) -> None:
    source = FsspecSource(f"{http.url}/blob", storage_options={"headers": {"X-Who": "me"}})
    http.fail = lambda path: fail
    with pytest.raises(Exception, match=says):
        read(source)
    http.fail = lambda path: None
    assert read(source) == blob


def test_open_fsspec_here(needs_privilege: None, blob: bytes, tmp_path: Path) -> None:
    """Files and memory:// without a pager, writable."""
    for url in (tmp_path / "blob", f"file://{tmp_path}/blob"):
        with open_fsspec(url, 1_000, "u2", offset=4) as a:
            assert a.tobytes() == blob[4:2004]
    with open_fsspec(tmp_path / "blob", mode="r+") as a:
        a[:3] = 9
    assert (tmp_path / "blob").read_bytes() == b"\t\t\t" + blob[3:]
    files = fsspec.filesystem("memory")
    files.pipe("/stores/blob", blob)
    with open_fsspec("memory://stores/blob", mode="r+") as a:
        assert a.tobytes() == blob
        a[:3] = 9
    del a
    gc.collect()
    assert files.cat("/stores/blob") == b"\t\t\t" + blob[3:]
    files.rm("/stores/blob")
    with pytest.raises(FileNotFoundError):
        open_fsspec("memory://stores/blob")


@needs_pager
def test_open_fsspec(needs_privilege: None, http: Store, blob: bytes) -> None:
    with open_fsspec(f"{http.url}/blob", chunk_bytes=64 * KIB, workers=3) as a:
        http.nbytes = 0
        a.prefetch(MIB)
        assert a[MIB] == blob[MIB]
        assert 0 < http.nbytes <= MIB
        a.materialize()
        assert a.tobytes() == blob


NPY = [
    np.arange(5_000, dtype=">f4").reshape(50, 100),
    np.asfortranarray(numbers((30, 70), "i8")),
    numbers((40,), [("a", "i2"), ("β", "f8")]),  # version 3
    np.array(2.5),
    np.empty((0, 3), "u2"),
    np.zeros(3, [(f"{'name' * 20}{i}", "u1") for i in range(60)]),
]


def npy_bytes(array: np.ndarray[Any, Any], version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
@pytest.mark.parametrize("array", NPY, ids=lambda array: f"{array.shape}")
@pytest.mark.parametrize("version", [None, (2, 0), (3, 0)], ids=str)
def test_open_npy(needs_privilege: None, tmp_path: Path, array: Any, version: Any) -> None:
    if version == (2, 0) and "β" in (array.dtype.names or ()):
        pytest.skip("version 2 has no such names")
    path = tmp_path / "a.npy"
    path.write_bytes(npy_bytes(array, version))
    with open_npy(path) as a:
        assert (a.shape, a.dtype) == (array.shape, array.dtype)
        assert a.flags.f_contiguous == array.flags.f_contiguous
        assert np.array_equal(a, array)
    with open_npy(f"file://{path}", mode="r+") as a:
        a[...] = np.zeros((), a.dtype)
    assert np.array_equal(np.load(path), np.zeros_like(array))


def test_open_npy_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([None]), allow_pickle=True)
    with pytest.raises(uf.SourceError, match="holds Python objects"):
        open_npy(path)
    path.write_bytes(b"no numbers")
    with pytest.raises(ValueError, match="magic"):
        open_npy(path)
    path.write_bytes(b"\x93NUMPY\x09\x00" + bytes(64))
    with pytest.raises(ValueError, match=r"version \(9, 0\)"):
        open_npy(path)


@needs_pager
def test_open_npy_of_a_url(needs_privilege: None, http: Store, tmp_path: Path) -> None:
    array = np.asfortranarray(numbers((300, 500), "f8"))
    (tmp_path / "a.npy").write_bytes(npy_bytes(array))
    with open_npy(f"{http.url}/a.npy", chunk_bytes=64 * KIB) as a:
        assert a.flags.f_contiguous
        a.materialize()
        assert np.array_equal(a, array)


@pytest.fixture
def lazy(needs_privilege: None, tmp_path: Path) -> Iterator[uf.LazyArray]:
    numbers((512, 1024), "f8").tofile(tmp_path / "numbers")
    with uf.lazy_array(tmp_path / "numbers", (512, 1024), "f8", readahead=0) as a:
        yield a


@pytest.mark.filterwarnings("default")  # what dask's own processes warn of
@pytest.mark.parametrize("scheduler", ["threads", "synchronous", "processes"])
def test_to_dask(lazy: uf.LazyArray, scheduler: str) -> None:
    pytest.importorskip("dask.array")
    import dask

    with dask.config.set(scheduler=scheduler, num_workers=2):
        check_to_dask(lazy, scheduler)


def check_to_dask(lazy: uf.LazyArray, scheduler: str) -> None:
    d = lazy.to_dask((128, 256))
    again = lazy.to_dask()
    assert d.name != again.name
    assert d.chunks == ((128,) * 4, (256,) * 4)
    assert (d.shape, d.dtype) == (lazy.shape, lazy.dtype)
    assert not lazy.resident.any()
    expected = numbers((512, 1024), "f8")
    assert d[:3, :512].sum().compute() == expected[:3, :512].sum()
    came = lazy.resident.reshape(512, 2)
    if scheduler == "processes":
        assert not came.any()  # they opened their own
        return
    assert came[:3, 0].all()
    assert came.sum() == 3
    assert d.sum().compute() == expected.sum()
    assert type(d[0].compute()) is np.ndarray


def test_to_dask_refuses(needs_privilege: None, tmp_path: Path, lazy: uf.LazyArray) -> None:
    pytest.importorskip("dask.array")
    with uf.lazy_array(tmp_path / "numbers", (512, 1024), "f8", mode="c") as a:
        a[0, 0] = 1
        with pytest.raises(TypeError, match="changes that are this process's own"):
            pickle.dumps(a.to_dask(256).dask)
    with pytest.raises(uf.ClosedError):
        a.to_dask()


def test_to_dask_source_error(needs_privilege: None, tmp_path: Path) -> None:
    """A source that fails is an exception in the task, not SIGBUS."""
    pytest.importorskip("dask.array")
    path = tmp_path / "short"
    path.write_bytes(bytes(MIB))
    with uf.lazy_array(path, readahead=0) as a:
        path.write_bytes(b"")
        with pytest.raises(uf.SourceError):
            a.to_dask(256 * KIB).sum().compute(scheduler="threads")


@pytest.mark.parametrize(
    ("name", "module"), [("open_zarr", "zarr"), ("open_fsspec", "fsspec"), ("open_npy", "fsspec")]
)
def test_without_the_extra(tmp_path: Path, name: str, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("raise ModuleNotFoundError('no', name=__name__)\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport userfault.stores\n"
        f"try:\n userfault.stores.{name}('http://nowhere')\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"{name}" in done.stdout, done.stderr
    assert f"needs {module}: pip install 'userfault[{module}]'" in done.stdout


def test_sources_pickle(tmp_path: Path) -> None:
    """As the factories that they are sent to the pager as."""
    z = store_of(tmp_path, (10,), (5,), "f8")
    factory = functools.partial(ZarrSource, str(tmp_path / "a.zarr"), expected=((10,), z.dtype))
    assert read(pickle.loads(pickle.dumps(factory))()) == c_bytes(z[:])


def test_an_empty_array_takes_all_options(needs_privilege: None, tmp_path: Path) -> None:
    store_of(tmp_path, (0, 3), (5, 3), "f8")
    with open_zarr(tmp_path / "a.zarr", workers=2, restarts=1) as a:
        assert (a.shape, a.dtype) == ((0, 3), np.dtype("f8"))
