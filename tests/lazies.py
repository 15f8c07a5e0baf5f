"""Lazy arrays in children: what their code finds, and a page source in C that can be slow and fail."""

from __future__ import annotations

import subprocess
from pathlib import Path
from textwrap import dedent

from support import Child

# `data` is 64 pages without a zero. LIBRARY is the path of what `built` built, FILE that of a file to write.
SET_UP = """
import errno, subprocess

N = 64
data = np.random.default_rng(0).integers(1, 256, N * PAGE, dtype=np.uint8)

def written():
    "A file of the data, of which nothing waits to be written to the disk."
    if not os.path.exists(FILE):
        with open(FILE, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    return FILE

def native(first=0, end=0, times=2**62, error=errno.EIO, ns=0, **options):
    "The data by a C function, which so many times does not give pages of [first, end); and its ctx."
    ctx = np.array([data.ctypes.data, first * PAGE, end * PAGE, times, -error, ns, 0])
    library = ctypes.CDLL(LIBRARY)
    return uf.sources.Native(library.give, ctx, data.nbytes, write=library.take, **options), ctx

def same(array, first=0, end=N):
    return bool((array[first * PAGE:end * PAGE] == data[first * PAGE:end * PAGE]).all())

def by_system_call(array, page):
    "A page's bytes as a system call reads them, or the errno."
    read, write = os.pipe()
    try:
        os.write(write, array[page * PAGE:(page + 1) * PAGE])
        return os.read(read, PAGE)
    except OSError as error:
        return error.errno
    finally:
        os.close(read)
        os.close(write)
"""


def built(folder: Path) -> Path:
    """native/lazy.c as a library."""
    library = folder / "lazy.so"
    source = Path(__file__).parent / "native/lazy.c"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True, timeout=300)
    return library


def run(
    child: Child, code: str, library: Path, file: Path, timeout: float = 60, **names: object
) -> subprocess.CompletedProcess[str]:
    """Run the code after SET_UP, with these names set."""
    given = {"LIBRARY": str(library), "FILE": str(file), **names}
    lines = [f"{name} = {value!r}" for name, value in given.items()]
    return child("\n".join([*lines, SET_UP, dedent(code)]), timeout=timeout)
