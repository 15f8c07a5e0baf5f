"""An array that lies compressed in a file, and is decompressed where it is looked at.

    python examples/decompress.py                        # 64 MiB, compressed into a temporary file
    python examples/decompress.py --bytes 1073741824

The file holds chunks of 64 KiB, each compressed by zlib. The array's page_bytes are as many: touching a page
brings its whole chunk. The function that does it calls uncompress() of libz; compiled by numba, it needs no
Python.
"""

import argparse
import ctypes
import ctypes.util
import errno
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

import userfault as uf

try:
    import numba
except ModuleNotFoundError:
    sys.exit("this example compiles a function with numba: pip install numba")

CHUNK = 64 << 10
MIB = 1 << 20

uncompress = ctypes.CDLL(ctypes.util.find_library("z") or "libz.so.1").uncompress
uncompress.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong]
uncompress.restype = ctypes.c_int
CORRUPT = -errno.EILSEQ


@numba.cfunc("int32(CPointer(uint64), uint64, voidptr, uint64)")
def fill(where, offset, dst, length):  # type: ignore[no-untyped-def]
    """Write the bytes [offset, offset + length) of the array to dst. 0, or -errno."""
    begin, end = np.int64(offset), np.int64(offset + length)
    addresses = numba.carray(where, (end - 1) // CHUNK + 2)  # of each chunk, and where the last ends
    to = numba.carray(dst, length, np.uint8)
    chunk, size = np.empty(CHUNK, np.uint8), np.empty(1, np.uint64)
    at = begin
    while at < end:
        k = at // CHUNK
        size[0] = CHUNK
        n = addresses[k + 1] - addresses[k]
        if uncompress(chunk.ctypes, size.ctypes, addresses[k], n) != 0 or size[0] != CHUNK:
            return CORRUPT
        # Where others have brought a part of the chunk already, the rest is asked for.
        stop = min((k + 1) * CHUNK, end)
        to[at - begin : stop - begin] = chunk[at % CHUNK : at % CHUNK + stop - at]
        at = stop
    return 0


def compress(data: np.ndarray, path: Path) -> np.ndarray:
    """Write the chunks; where in the file each begins, and the last ends."""
    chunks = [zlib.compress(chunk, 1) for chunk in data.view(np.uint8).reshape(-1, CHUNK)]
    path.write_bytes(b"".join(chunks))
    return np.cumsum([0, *map(len, chunks)], dtype=np.uint64)


def main(nbytes: int, folder: str) -> None:
    nbytes -= nbytes % CHUNK
    data = np.cumsum(np.random.default_rng(0).integers(-1, 2, nbytes // 8))
    path = Path(folder, "chunks.z")
    offsets = compress(data, path)
    compressed = np.memmap(path, np.uint8, "r")
    print(f"{nbytes / MIB:.0f} MiB compressed to {path.stat().st_size / MIB:.1f}")
    where = offsets + np.uint64(compressed.ctypes.data)
    source = uf.sources.Native(fill, where, nbytes)
    with uf.lazy_array(source, dtype=data.dtype, page_bytes=CHUNK) as a:
        started = time.perf_counter()
        value = a[len(a) // 2]
        seconds = time.perf_counter() - started
        assert value == data[len(a) // 2]
        came = int(a.resident.sum()) * uf.PAGE_SIZE
        print(f"one number: {came >> 10} KiB decompressed in {seconds * 1e6:.0f} µs")
        started = time.perf_counter()
        equal = np.array_equal(a, data)
        print(f"all of it in {time.perf_counter() - started:.2f} s: {'right' if equal else 'WRONG'}")
    sys.exit(not equal)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read an array that lies compressed in a file.")
    parser.add_argument("--bytes", type=int, default=64 * MIB, help="how large it is (%(default)s)")
    with tempfile.TemporaryDirectory() as made:
        main(parser.parse_args().bytes, made)
