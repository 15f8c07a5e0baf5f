"""A tebibyte of numbers, each of which is computed when it is first looked at.

    python examples/virtual_array.py                                        # touches 256 MiB of them
    python examples/virtual_array.py --touch 1073741824 --memory 67108864   # 1 GiB, in 64 MiB of memory

a[i] is the i-th number of SplitMix64 (Steele, Lea and Flood, 2014): random numbers that need no state, so
that everybody who opens the array sees the same. The function that computes them is compiled by numba: the
thread that waits for a page may hold the GIL, so Python code could not run.
"""

import argparse
import sys
import time

import numpy as np

import userfault as uf

try:
    import numba
except ModuleNotFoundError:
    sys.exit("this example compiles a function with numba: pip install numba")

MIB = 1 << 20
NBYTES = 1 << 40

STEP, FIRST, SECOND = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix64(i):  # type: ignore[no-untyped-def]
    """The i-th number; of a np.uint64 or an array of them."""
    z = (i + np.uint64(1)) * STEP
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    return z ^ (z >> np.uint64(31))


compiled = numba.njit(splitmix64)


@numba.cfunc("int32(voidptr, uint64, voidptr, uint64)")
def fill(ctx, offset, dst, length):  # type: ignore[no-untyped-def]
    """Write the bytes [offset, offset + length) of the array to dst. 0, or -errno."""
    numbers = numba.carray(dst, length // 8, np.uint64)
    first = offset // np.uint64(8)
    for i in range(len(numbers)):
        numbers[i] = compiled(first + np.uint64(i))
    return 0


def main(touch: int, memory: int | None, piece: int = MIB) -> None:
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    a = uf.lazy_array(uf.sources.Native(fill, nbytes=NBYTES), dtype=np.uint64, memory_limit=memory)
    opened = time.perf_counter()
    print(f"{a.nbytes:,} bytes opened in {(opened - started) * 1e3:.1f} ms")
    waited = checked = 0.0
    for first in rng.integers(0, len(a) - piece // 8, max(1, touch // piece)):
        before = time.perf_counter()
        numbers = a[first : first + piece // 8]
        numbers.max()
        touched = time.perf_counter()
        index = np.arange(first, first + piece // 8, dtype=np.uint64)
        if not np.array_equal(numbers, splitmix64(index)):
            sys.exit(f"wrong numbers from {first} on")
        waited += touched - before
        checked += time.perf_counter() - touched
    stats = a.stats()
    print(f"{touch / MIB:,.0f} MiB touched in {waited:.2f} s, compared with numpy's in {checked:.2f} s")
    print(f"{stats['records']:,} faults, {stats['pages']:,} pages computed, {stats['evicted']:,} let go of")
    started = time.perf_counter()
    a.close()
    del a, numbers
    print(f"closed in {(time.perf_counter() - started) * 1e3:.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Look at random places of a tebibyte of computed numbers.")
    parser.add_argument("--touch", type=int, default=256 * MIB, help="how many bytes of it (%(default)s)")
    parser.add_argument("--memory", type=int, help="how many bytes of it may be in memory (no limit)")
    given = parser.parse_args()
    main(given.touch, given.memory)
