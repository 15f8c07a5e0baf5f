"""`Mapping`: anonymous memory that lives exactly as long as somebody can see it.

Arrays over it hold it through the buffer protocol, so the last view's death unregisters and unmaps.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport EAGAIN, ENOMEM, errno
from libc.stdint cimport int64_t, uint64_t

from userfault._abi cimport getpid, load_int, usleep
from userfault._descriptor cimport Descriptor
from userfault._errno cimport error_for
from userfault._ioctl cimport check_range, uffd_unregister
from userfault._regions cimport RegionTable, quiesce
from userfault._served cimport served_t
from userfault._tree cimport cut, entry_t, list_range, lock_tree, unlock_tree

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int munlock(const void *address, size_t length)
    int mprotect(void *address, size_t length, int protection)
    int c_madvise "madvise"(void *address, size_t length, int advice)
    int PROT_NONE, PROT_READ, PROT_WRITE
    int MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    int MADV_DONTFORK, MADV_DOFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE

cdef extern from *:
    """
    #if PY_VERSION_HEX >= 0x030D0000
    #define uf_is_finalizing Py_IsFinalizing
    #else
    #define uf_is_finalizing _Py_IsFinalizing
    #endif
    """
    bint is_finalizing "uf_is_finalizing"()

cdef uint64_t HUGE = 2 << 20


@cython.no_gc
cdef class Mapping:
    """`length` bytes of private anonymous memory, 2 MiB-aligned and absent from fork children.

    Raises RangeError for a length that is not whole pages, UffdError (ENOMEM) when there is no room.
    """

    def __cinit__(self, bytes_wanted):
        cdef uint64_t length = check_range(0, bytes_wanted)
        check_range(HUGE, length + HUGE)
        # Room for the alignment, cut off again below. NORESERVE: regions may be larger than memory.
        # Not accessible at first: mlockall(MCL_FUTURE) would fill it with zeros before it is registered.
        cdef char *room = <char *>mmap(NULL, length + HUGE, PROT_NONE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if <void *>room == <void *>-1:
            raise error_for(f"mmap of {length} bytes", errno)
        cdef uint64_t head = -<uint64_t>room % HUGE
        if head:
            munmap(room, head)
        munmap(room + head + length, HUGE - head)
        self.start = <uint64_t>room + head
        self.length = length
        self.pid = getpid()
        munlock(<void *>self.start, length)
        if mprotect(<void *>self.start, length, PROT_READ | PROT_WRITE) != 0:
            raise error_for("mprotect", errno)
        # A child of a fork would read zeros where pages are missing; without the memory it faults.
        if c_madvise(<void *>self.start, length, MADV_DONTFORK) != 0:
            raise error_for("madvise(MADV_DONTFORK)", errno)

    def attach(self, Descriptor descriptor not None, RegionTable table not None, int64_t region):
        """Take note that the memory is registered, as this region: the end of the mapping takes it back."""
        descriptor.hold()
        self.descriptor = descriptor
        self.table = table
        self.region = region
        # After registering, so that khugepaged cannot have filled the range with zeros before. A kernel
        # without transparent huge pages answers EINVAL and has no khugepaged to keep away.
        c_madvise(<void *>self.start, self.length, MADV_NOHUGEPAGE)

    def detach(self):
        """Take note that the memory was unregistered. Nothing happens when it was not attached."""
        if self.descriptor is not None:
            self.descriptor.release()
            self.descriptor = None
            self.table = None

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.start, self.length, 0, flags)

    def __dealloc__(self):
        cdef entry_t piece
        cdef uint64_t at = self.start, end = self.start + self.length, taken
        cdef size_t found = 1
        if self.start == 0 or is_finalizing():
            # A process that ends: threads that are no Python threads may still be at it.
            return
        # A fork child leaves the memory, if it has it, to its end: there may be other memory at the address.
        if getpid() == self.pid:
            if self.descriptor is None:
                munmap(<void *>self.start, self.length)
            # Somebody may have moved or unmapped it, and have other memory there by now: what the table says
            # is still ours.
            while self.descriptor is not None and found:
                lock_tree(&self.table.tree)
                found = list_range(&self.table.tree, at, end, &piece, 1)
                if found and piece.id == self.region and piece.base == self.start:
                    # Without memory the table goes on naming what is gone, where no page can miss.
                    cut(&self.table.tree, piece.start, piece.end, &taken)
                unlock_tree(&self.table.tree)
                if found and piece.id == self.region and piece.base == self.start:
                    # First unregister: with the unmap event on, munmap would wait for a reader.
                    uffd_unregister(self.descriptor.fd, piece.start, piece.end - piece.start)
                    # No fault that an engine has read here may be taken for one of what comes here next.
                    quiesce(&self.table.tree)
                    if piece.payload != NULL:
                        # Whoever should have detached it was interrupted: nobody may still be filling it.
                        while load_int(&(<served_t *>piece.payload).users):
                            usleep(20)
                    munmap(<void *>piece.start, piece.end - piece.start)
                at = piece.end
        if self.descriptor is not None:
            self.descriptor.kick()
            self.descriptor.release()


cdef class ReadOnly:
    """A mapping's bytes for those who may not write to them. (numpy looks through a read-only memoryview.)"""

    cdef Mapping mapping

    def __cinit__(self, Mapping mapping not None):
        self.mapping = mapping

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.mapping.start, self.mapping.length, 1, flags)


def keep_from_children(uint64_t start, uint64_t length):
    """MADV_DONTFORK and MADV_NOHUGEPAGE, as a Mapping has them. Raises UffdError."""
    if c_madvise(<void *>start, length, MADV_DONTFORK) != 0:
        # madvise(2) says EAGAIN where there are no more mappings to be had, and other calls ENOMEM.
        raise error_for("madvise(MADV_DONTFORK)", ENOMEM if errno == EAGAIN else errno)
    c_madvise(<void *>start, length, MADV_NOHUGEPAGE)


def give_to_children(uint64_t start, uint64_t length):
    """MADV_DOFORK. Memory that is gone by now has nothing to give."""
    c_madvise(<void *>start, length, MADV_DOFORK)


def allow_huge_pages(uint64_t start, uint64_t length):
    """MADV_HUGEPAGE, for registered memory: huge pages can be moved into it. False: the kernel has none."""
    return c_madvise(<void *>start, length, MADV_HUGEPAGE) == 0
