"""The userfaultfd system call by ctypes: just enough to check a kernel.

Own declarations on purpose: a check must not lean on the library it is to vouch
for. Faults are raised inside ctypes calls, which release the GIL, so that other
threads of the check go on running while one sleeps in its fault.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import mmap
import os
import struct
import threading
import time

PAGE = mmap.PAGESIZE
WRITE, WP, LOW_BITS = 1, 2, PAGE - 1
PAGEFAULT, FORK = 1, 2
MISSING, REGISTER_WP, MINOR = 1, 2, 4
NR_USERFAULTFD = 323  # x86_64
USER_MODE_ONLY = 1
PROT_NONE = 0
EVENT_FORK = 1 << 1  # mainline's feature bits
THREAD_ID = 1 << 8
API_IOCTLS = 1 << 0x3F | 1 << 1 | 1 << 0

APIS = {"v1": 0xA1, "v2": 0xAB, "msg": 0xAA}
SIZES = {"v1": 8, "v2": 16, "msg": 32}

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.read.restype = ctypes.c_ssize_t


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | 0xAA << 8 | number


UFFDIO_API = _iowr(0x3F, 24)
UFFDIO_REGISTER = _iowr(0x00, 32)
UFFDIO_WAKE = 2 << 30 | 16 << 16 | 0xAA << 8 | 0x02
UFFDIO_COPY = _iowr(0x03, 40)
UFFDIO_WRITEPROTECT = _iowr(0x06, 24)
UFFDIO_CONTINUE = _iowr(0x07, 32)


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of any wire: the RFC's type and address, or the raw event."""

    type: int
    arg: int


def open_uffd(flags: int = os.O_NONBLOCK) -> int:
    fd: int = libc.syscall(NR_USERFAULTFD, flags | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    return fd


def negotiate(fd: int, api: int, bits: int = 0) -> tuple[int, tuple[int, int, int]]:
    """UFFDIO_API: its errno (0 when it worked) and the three words it left."""
    words = bytearray(struct.pack("<3Q", api, bits, 0x5A5A))
    try:
        fcntl.ioctl(fd, UFFDIO_API, words)
    except OSError as error:
        return error.errno or -1, struct.unpack("<3Q", words)
    return 0, struct.unpack("<3Q", words)


def opened(wire: str, flags: int = os.O_NONBLOCK) -> int:
    """A descriptor that speaks `wire`."""
    fd = open_uffd(flags)
    assert negotiate(fd, APIS[wire])[0] == 0
    return fd


def anonymous(pages: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> int:
    """The address of fresh private memory; it lives as long as the process."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address: int = libc.mmap(None, pages * PAGE, protection, flags, -1, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    return address


def register(fd: int, start: int, pages: int, mode: int = MISSING) -> int:
    words = bytearray(struct.pack("<4Q", start, pages * PAGE, mode, 0))
    fcntl.ioctl(fd, UFFDIO_REGISTER, words)
    ioctls: int = struct.unpack("<4Q", words)[3]
    return ioctls


def copy(fd: int, page: int, fill: int, mode: int = 0) -> None:
    """Resolve a missing page with 4 KiB of one byte."""
    source = ctypes.create_string_buffer(bytes([fill]) * PAGE, PAGE)
    request = struct.pack("<4Qq", page, ctypes.addressof(source), PAGE, mode, 0)
    fcntl.ioctl(fd, UFFDIO_COPY, bytearray(request))


def wake(fd: int, start: int, pages: int) -> None:
    fcntl.ioctl(fd, UFFDIO_WAKE, bytearray(struct.pack("<2Q", start, pages * PAGE)))


def write_protect(fd: int, page: int, on: bool) -> None:
    words = struct.pack("<3Q", page, PAGE, 1 if on else 0)
    fcntl.ioctl(fd, UFFDIO_WRITEPROTECT, bytearray(words))


def decode(wire: str, data: bytes) -> list[Record]:
    assert len(data) % SIZES[wire] == 0
    if wire == "v1":
        return [Record(PAGEFAULT, arg) for (arg,) in struct.iter_unpack("<Q", data)]
    if wire == "v2":
        return [Record(*words) for words in struct.iter_unpack("<2Q", data)]
    words = struct.iter_unpack("<B7x3Q", data)
    return [Record(event, address | flags) for event, flags, address, _ in words]


def read(fd: int, wire: str, size: int = 4096) -> list[Record]:
    return decode(wire, os.read(fd, size))


def read_at(fd: int, address: int, size: int) -> tuple[int, int]:
    """read() into any address, good or bad: its result and errno."""
    ctypes.set_errno(0)
    done = libc.read(fd, address, size)
    return done, ctypes.get_errno() if done < 0 else 0


def errno_of(fd: int, size: int) -> str:
    """The name of read()'s error."""
    try:
        os.read(fd, size)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "no error"


def fdinfo(fd: int) -> dict[str, str]:
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        pairs = (line.split(":", 1) for line in lines)
        return {name: value.strip() for name, value in pairs}


def await_pending(fd: int, count: int) -> None:
    """Wait until that many threads sleep in an unread fault."""
    end = time.monotonic() + 20
    while (seen := int(fdinfo(fd)["pending"])) != count:
        assert time.monotonic() < end, f"{seen} faults pending, expected {count}"
        time.sleep(0.005)


def touch(address: int, write: bool = False) -> threading.Thread:
    """Fault on one address in a thread of its own, outside the GIL."""
    byte = ctypes.create_string_buffer(1)
    target = libc.memset if write else libc.memcmp
    args = (address, 0x77, 1) if write else (address, ctypes.addressof(byte), 1)
    thread = threading.Thread(target=lambda keep=byte: target(*args), daemon=True)
    thread.start()
    return thread
