"""The stage: one huge page a thread, into which sources are read, and whether they would wait for that."""

from libc.errno cimport EFAULT, EIO, ENODATA, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from userfault cimport _abi
from userfault._abi cimport PAGE_IS_HUGE, PAGEMAP_SCAN, ioctl, iovec, page_region, pm_scan_arg
from userfault._fill cimport STAGE_BYTES, worker_t
from userfault._ioctl cimport PAGE_SIZE
from userfault._served cimport HUGE_PAGES, served_t
from userfault._source cimport fill_t, source_t

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int mprotect(void *address, size_t length, int protection)
    int c_madvise "madvise"(void *address, size_t length, int advice)
    int mincore(void *address, size_t length, unsigned char *pages)
    int PROT_NONE, PROT_READ, PROT_WRITE
    int MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    int MADV_DONTFORK, MADV_HUGEPAGE

cdef extern from "<sys/uio.h>" nogil:
    ssize_t process_vm_readv(int pid, const iovec *local, unsigned long n_local, const iovec *remote,
                             unsigned long n_remote, unsigned long flags)

DEF MOST_ERRNO = 4096


cdef int new_stage(worker_t *worker) noexcept nogil:
    """Map the stage, with a guard after it: a fill() that writes too much ends with SIGSEGV. 0 or -errno."""
    cdef uint64_t huge = STAGE_BYTES, head
    cdef char *room = <char *>mmap(NULL, 2 * huge + PAGE_SIZE, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if <void *>room == <void *>-1:
        return -errno
    head = -<uint64_t>room % huge
    if head:
        munmap(room, head)
    munmap(room + head + huge + PAGE_SIZE, huge - head)
    worker.stage = room + head
    mprotect(worker.stage + huge, PAGE_SIZE, PROT_NONE)
    # A stage that a fork shares cannot be moved from (EBUSY).
    c_madvise(worker.stage, huge + PAGE_SIZE, MADV_DONTFORK)
    c_madvise(worker.stage, huge, MADV_HUGEPAGE)
    return 0


cdef void free_stage(worker_t *worker) noexcept nogil:
    if worker.stage != NULL:
        munmap(worker.stage, STAGE_BYTES + PAGE_SIZE)
        worker.stage = NULL


cdef bint stage_is_huge(worker_t *worker) noexcept nogil:
    """Have the stage's memory; whether it is one huge page. Linux 6.7 and later can tell."""
    cdef pm_scan_arg scan
    cdef page_region found
    worker.stage[0] = 1
    memset(&scan, 0, sizeof(scan))
    scan.size = sizeof(scan)
    scan.start = <uintptr_t>worker.stage
    scan.end = scan.start + STAGE_BYTES
    scan.vec = <uintptr_t>&found
    scan.vec_len = 1
    scan.category_mask = scan.return_mask = PAGE_IS_HUGE
    return (ioctl(worker.space.pagemap, PAGEMAP_SCAN, &scan) == 1
            and found.end - found.start == STAGE_BYTES)


cdef bint is_prompt(const served_t *served, uint64_t first, uint64_t end) noexcept nogil:
    """Whether filling the pages [first, end) can be tried at once: the source will wait for nothing."""
    cdef const source_t *source = &served.source
    cdef unsigned char cached[HUGE_PAGES + 1]
    cdef uint64_t start, length, i
    if source.direct == NULL:
        return source.zero or source.prompt != NULL
    if source.solid or first * PAGE_SIZE >= source.size:
        return True
    # A mapped file: what is in the page cache is there at once.
    start = <uintptr_t>source.direct + first * PAGE_SIZE
    length = min(end * PAGE_SIZE, source.size) - first * PAGE_SIZE + start % PAGE_SIZE
    start -= start % PAGE_SIZE
    if length > HUGE_PAGES * PAGE_SIZE or mincore(<void *>start, length, cached) != 0:
        return False
    for i in range((length + PAGE_SIZE - 1) // PAGE_SIZE):
        if not cached[i] & 1:
            return False
    return True


cdef int read_own(void *to, const void *source, size_t length) noexcept nogil:
    """memcpy that answers -EFAULT where the source is a mapping of a file that became shorter."""
    cdef iovec local, remote
    cdef ssize_t got
    local.iov_base = to
    remote.iov_base = <void *>source
    local.iov_len = remote.iov_len = length
    got = process_vm_readv(_abi.getpid(), &local, 1, &remote, 1, 0)
    if got == <ssize_t>length:
        return 0
    if got >= 0 or errno == EFAULT:
        return -EFAULT
    memcpy(to, source, length)  # forbidden here, by seccomp or the kernel's configuration
    return 0


cdef int bring(worker_t *worker, const source_t *source, uint64_t offset, uint64_t length,
               bint may_wait) noexcept nogil:
    """The bytes [offset, +length) of the source into the stage. 0, -errno, or -EAGAIN: it would wait."""
    cdef fill_t fill = source.fill if may_wait else source.prompt
    cdef int result
    if source.direct != NULL:
        if not source.solid:
            return read_own(worker.stage, source.direct + offset, length)
        memcpy(worker.stage, source.direct + offset, length)
        return 0
    result = fill(source.ctx, source.start + offset, worker.stage, length)
    if result > 0:
        return -ENODATA  # a short fill
    return result if result > -MOST_ERRNO else -EIO
