"""`Post`: the pager's side of the memory that it shares with the process it fills for (see _post.pxd)."""

from libc.errno cimport EIO, errno
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset

from userfault._abi cimport count, load_int, store_int
from userfault._errno cimport error_for

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int c_madvise "madvise"(void *address, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MADV_DONTFORK

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long argument)
    int PR_SET_PDEATHSIG

cdef extern from "<signal.h>" nogil:
    int SIGKILL

DEF MOST_ERRNO = 4095

cdef tuple REQUESTS = (None, "read", "write", "flush")  # READ, WRITE, SYNC


def end_with_parent():
    """Have the kernel kill this process when the thread that started it ends, also while it is stopped."""
    if prctl(PR_SET_PDEATHSIG, SIGKILL) != 0:
        raise error_for("prctl(PR_SET_PDEATHSIG)", errno)


cdef class Post:
    """Takes requests out of the shared memory `fd`, made for so many slots, and answers them.

    It stays mapped until the process ends, and its children do not have it. Raises OSError.
    """

    cdef char *memory
    cdef head_t *head
    cdef readonly int n_slots

    def __cinit__(self, int fd, int n_slots):
        if not 1 <= n_slots <= MOST_SLOTS:
            raise ValueError(f"a pager has 1 to {MOST_SLOTS} slots, not {n_slots}")
        self.n_slots = n_slots
        self.memory = <char *>mmap(NULL, bytes_of(n_slots), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if <void *>self.memory == <void *>-1:
            raise error_for("mmap of the memory shared with the process", errno)
        c_madvise(self.memory, bytes_of(n_slots), MADV_DONTFORK)
        self.head = <head_t *>self.memory

    def ready(self, uint64_t nbytes, uint64_t chunk_bytes, bint writable, bint buffers):
        """Say that requests can be taken, and what the source is like; `buffers`: it has a flush()."""
        self.head.nbytes = nbytes
        self.head.chunk_bytes = chunk_bytes
        self.head.writable = writable
        self.head.buffers = buffers
        store_int(&self.head.phase, READY)
        futex_wake(&self.head.phase)

    def failed(self, int error, str words not None):
        """Say that there is no source, and why."""
        self.head.error = error
        put(self.head.words, words)
        store_int(&self.head.phase, FAILED)
        futex_wake(&self.head.phase)

    def wait(self, int i):
        """Wait, without the GIL, for a request in slot i: ("read", "write" or "flush", offset, length)."""
        cdef slot_t *slot = slot_of(self.memory, i)
        cdef int state
        with nogil:
            state = load_int(&slot.state)
            while state != ASKED:
                futex_wait(&slot.state, state, -1)
                state = load_int(&slot.state)
        return REQUESTS[slot.what], slot.offset, min(slot.length, <uint64_t>SLOT_BYTES)

    def data(self, int i):
        """The memory of slot i: a memoryview of bytes."""
        if not 0 <= i < self.n_slots:
            raise IndexError(f"there is no slot {i}")
        return memoryview(<unsigned char[:SLOT_BYTES]><unsigned char *>data_of(self.memory, self.n_slots, i))

    def answer(self, int i, int error=0, str words not None=""):
        """The request in slot i is done, or failed with an errno and in the source's own words."""
        cdef slot_t *slot = slot_of(self.memory, i)
        slot.result = -error if 0 <= error <= MOST_ERRNO else -EIO
        put(slot.words, words)
        if error == 0 and slot.what != SYNC:
            count(&self.head.answered, 1)
        store_int(&slot.state, DONE)
        futex_wake(&slot.state)

    def tally(self, uint64_t read_bytes, uint64_t written_bytes):
        """Count a call of the source, and the bytes that it gave or took."""
        count(&self.head.reads if read_bytes else &self.head.writes, 1)
        count(&self.head.read_bytes, read_bytes)
        count(&self.head.written_bytes, written_bytes)


cdef int put(char *words, str text) except -1:
    # One line, without what a terminal obeys, and without half a character at its end.
    cdef str line = "".join([c if c.isprintable() else "?" for c in " ".join(text.split())[:WORDS]])
    cdef bytes data = line.encode()[:WORDS - 1].decode(errors="ignore").encode()
    memset(words, 0, WORDS)
    memcpy(words, <const char *>data, len(data))
    return 0
