"""Page sources as a cimporting module sees them: fill, prompt, solid, and sources of its own functions."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import weakref
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import userfault as uf
from native.forms import by_key
from support import PAGE
from userfault.sources import Buffer, Constant, File, Pattern, Zero


def test_sources_without_an_end_have_their_bytes_at_once(client: ModuleType) -> None:
    for source, expected in (
        (Constant(9), lambda offset, length: bytes([9]) * length),
        (Pattern(2), lambda offset, length: Pattern(2).expected(offset, length).tobytes()),
    ):
        assert source.nbytes == 2**64 - 1
        assert client.prompt(source) == (True, True)
        for offset, length in ((0, 64 * PAGE), (5 * PAGE, PAGE), (2**40, 3), (2**63, 2 * PAGE - 1)):
            assert client.ask(source, offset, length) == (0, expected(offset, length))
    assert Zero().nbytes == 2**64 - 1


def test_the_owner_of_a_cimported_function_lives_as_long_as_the_source(client: ModuleType) -> None:
    keyed = client.Keyed(5)
    held = weakref.ref(keyed)
    source = keyed.source(PAGE)
    del keyed
    gc.collect()
    assert held() is not None
    assert client.ask(source, 0, PAGE) == (0, by_key(5, PAGE).tobytes())
    del source
    gc.collect()
    assert held() is None
    with pytest.raises(uf.SourceError, match="NULL"):
        client.null()


def small() -> np.ndarray:
    return np.ones(100, np.uint8)


def large() -> np.ndarray:
    return np.ones(64 << 20, np.uint8)


def anonymous() -> mmap.mmap:
    return mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def shared() -> mmap.mmap:
    return mmap.mmap(-1, 4 * PAGE)


def of_a_file(path: Path, flags: int) -> mmap.mmap:
    path.write_bytes(b"\7" * 4 * PAGE)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 4 * PAGE, flags=flags)


def half_of_a_file(path: Path) -> tuple[mmap.mmap, np.ndarray]:
    """Anonymous pages, with the file's over the third."""
    path.write_bytes(b"\7" * PAGE)
    memory = anonymous()
    array = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    map_fixed = 0x10
    with path.open("rb") as file:
        where = array.ctypes.data + 2 * PAGE
        done = libc.mmap(
            ctypes.c_void_p(where),
            ctypes.c_size_t(PAGE),
            mmap.PROT_READ,
            mmap.MAP_PRIVATE | map_fixed,
            file.fileno(),
            ctypes.c_long(0),
        )
    assert done == where
    return memory, array


def test_which_memory_no_file_is_under(client: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "data"
    for make in (small, large, anonymous):
        assert client.solid(Buffer(make())), make
    assert not client.solid(Buffer(shared()))
    for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
        assert not client.solid(Buffer(of_a_file(path, flags)))
    _, array = half_of_a_file(path)
    assert client.solid(Buffer(array[: 2 * PAGE]))
    assert client.solid(Buffer(array[3 * PAGE :]))
    for part in (array, array[PAGE : 3 * PAGE], array[2 * PAGE : 3 * PAGE], array[3 * PAGE - 1 :]):
        assert not client.solid(Buffer(part))
    for source in (Zero(), Constant(1), Pattern(), File(__file__)):
        assert not client.solid(source)


def nowait(path: Path) -> bool:
    """Whether the file system can say what would have to wait."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def is_version(link: Path) -> bool:
    # The number of iterdir's own descriptor is gone when it comes up.
    return link.is_symlink() and link.readlink() == Path("/proc/version")


def evict(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_a_file_answers_promptly_what_is_cached(client: ModuleType, tmp_path: Path) -> None:
    data = np.random.default_rng(8).integers(1, 256, 4 * PAGE + 10, dtype=np.uint8).tobytes()
    path = tmp_path / "data"
    path.write_bytes(data)
    if not nowait(path):
        pytest.skip(f"the file system of {tmp_path} has no RWF_NOWAIT")
    source = File(path, offset=10)
    assert client.prompt(source) == (True, False)
    for offset, length in ((0, 4 * PAGE), (PAGE, PAGE), (3 * PAGE, 5)):
        expected = data[10 + offset :][:length]
        assert client.ask(source, offset, length) == (0, expected)
        assert client.ask(source, offset, length, prompt=True) == (0, expected)
    # A reader that came in between may have cached it again.
    for _ in range(100):
        evict(path)
        result, _ = client.ask(source, 0, 4 * PAGE, prompt=True)
        if result:
            break
    assert result == -errno.EAGAIN
    assert client.ask(source, 0, 4 * PAGE) == (0, data[10:])
    assert client.ask(source, 0, 4 * PAGE, prompt=True) == (0, data[10:])
    # Short: what is missing is for fill() to say.
    os.truncate(path, PAGE + 10)
    assert client.ask(source, 0, 2 * PAGE, prompt=True)[0] == -errno.EAGAIN
    assert client.ask(source, 0, 2 * PAGE)[0] == -errno.ENODATA
    assert client.ask(source, 0, PAGE, prompt=True)[0] == 0


def test_a_file_system_that_cannot_say_is_asked_once(client: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"\7" * PAGE)
    if not nowait(path):
        pytest.skip(f"the file system of {tmp_path} has no RWF_NOWAIT")
    source = File("/proc/version")
    (number,) = (link.name for link in Path("/proc/self/fd").iterdir() if is_version(link))
    assert client.ask(source, 0, 5, prompt=True)[0] == -errno.EAGAIN
    assert client.ask(source, 0, 5) == (0, b"Linux")
    # Another file under its number would answer: nobody asks it.
    fd = os.open(path, os.O_RDONLY)
    os.dup2(fd, int(number))
    os.close(fd)
    assert client.ask(source, 0, 5) == (0, b"\7" * 5)
    assert client.ask(source, 0, 5, prompt=True)[0] == -errno.EAGAIN
