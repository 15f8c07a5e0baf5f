# Every C declaration of the project: the kernel's records and ioctl structures, and its constants by
# value. Distribution headers lag behind kernels (Debian 12's lacks MOVE and POISON), so nothing here
# needs <linux/userfaultfd.h>; tests/test_abi.py compares the values with the header where it has them.
#
# Sources: ioctl_userfaultfd(2), include/uapi/linux/userfaultfd.h, and for v1 and v2 the RFC series
# "uffd: Introduce the v2 API" (linux-kernel, 18 March 2015).

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef USERFAULT_ABI
    #define USERFAULT_ABI
    #include <stdint.h>

    struct uf_v1_record { uint64_t arg; };
    struct uf_v2_record { uint64_t type; uint64_t arg; };
    /* struct uffd_msg with its union laid flat under the names of a page fault. */
    struct uf_msg_record {
        uint8_t event; uint8_t reserved1; uint16_t reserved2; uint32_t reserved3;
        uint64_t flags; uint64_t address; uint64_t ptid;
    };
    _Static_assert(sizeof(struct uf_v1_record) == 8, "v1 records are 8 bytes");
    _Static_assert(sizeof(struct uf_v2_record) == 16, "v2 records are 16 bytes");
    _Static_assert(sizeof(struct uf_msg_record) == 32, "uffd_msg is 32 bytes");

    struct uf_api { uint64_t api; uint64_t features; uint64_t ioctls; };
    struct uf_range { uint64_t start; uint64_t length; };
    struct uf_register { struct uf_range range; uint64_t mode; uint64_t ioctls; };
    struct uf_writeprotect { struct uf_range range; uint64_t mode; };
    /* UFFDIO_ZEROPAGE, UFFDIO_CONTINUE and UFFDIO_POISON share one layout. */
    struct uf_fill { struct uf_range range; uint64_t mode; int64_t done; };
    /* UFFDIO_COPY and UFFDIO_MOVE share one layout. */
    struct uf_transfer { uint64_t dst; uint64_t src; uint64_t length; uint64_t mode; int64_t done; };
    /* PAGEMAP_SCAN (Linux 6.7): struct pm_scan_arg and struct page_region. */
    struct uf_scan {
        uint64_t size; uint64_t flags; uint64_t start; uint64_t end; uint64_t walk_end; uint64_t vec;
        uint64_t vec_len; uint64_t max_pages; uint64_t category_inverted; uint64_t category_mask;
        uint64_t category_anyof_mask; uint64_t return_mask;
    };
    struct uf_scanned { uint64_t start; uint64_t end; uint64_t categories; };
    _Static_assert(sizeof(struct uf_scan) == 96, "pm_scan_arg");
    _Static_assert(sizeof(struct uf_api) == 24, "uffdio_api");
    _Static_assert(sizeof(struct uf_register) == 32, "uffdio_register");
    _Static_assert(sizeof(struct uf_writeprotect) == 24, "uffdio_writeprotect");
    _Static_assert(sizeof(struct uf_fill) == 32, "uffdio_zeropage");
    _Static_assert(sizeof(struct uf_transfer) == 40, "uffdio_copy");
    #endif
    """
    ctypedef struct v1_record "struct uf_v1_record":
        uint64_t arg

    ctypedef struct v2_record "struct uf_v2_record":
        uint64_t type
        uint64_t arg

    ctypedef struct msg_record "struct uf_msg_record":
        uint8_t event
        uint8_t reserved1
        uint16_t reserved2
        uint32_t reserved3
        uint64_t flags
        uint64_t address
        uint64_t ptid

    ctypedef struct uffdio_api "struct uf_api":
        uint64_t api
        uint64_t features
        uint64_t ioctls

    ctypedef struct uffdio_range "struct uf_range":
        uint64_t start
        uint64_t length

    ctypedef struct uffdio_register "struct uf_register":
        uffdio_range range
        uint64_t mode
        uint64_t ioctls

    ctypedef struct uffdio_writeprotect "struct uf_writeprotect":
        uffdio_range range
        uint64_t mode

    ctypedef struct uffdio_fill "struct uf_fill":
        uffdio_range range
        uint64_t mode
        int64_t done

    ctypedef struct uffdio_transfer "struct uf_transfer":
        uint64_t dst
        uint64_t src
        uint64_t length
        uint64_t mode
        int64_t done

    ctypedef struct pm_scan_arg "struct uf_scan":
        uint64_t size
        uint64_t flags
        uint64_t start
        uint64_t end
        uint64_t walk_end
        uint64_t vec
        uint64_t vec_len
        uint64_t max_pages
        uint64_t category_inverted
        uint64_t category_mask
        uint64_t category_anyof_mask
        uint64_t return_mask

    ctypedef struct page_region "struct uf_scanned":
        uint64_t start
        uint64_t end
        uint64_t categories

# Declared by hand: libc's own declaration differs between glibc and musl.
cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLIN, POLLERR, POLLNVAL
    int ppoll(pollfd *fds, unsigned long n, const timespec *timeout, const void *mask)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *now)

cdef inline int64_t now() noexcept nogil:
    """CLOCK_MONOTONIC in nanoseconds."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t count)
    ssize_t c_write "write"(int fd, const void *data, size_t count)
    int c_close "close"(int fd)
    ssize_t pread(int fd, void *data, size_t count, long offset)
    long sysconf(int name)
    int getpid()
    int usleep(unsigned int microseconds)
    int _SC_PAGESIZE

cdef extern from *:
    """
    #define uf_load(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
    #define uf_store(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
    #define uf_add(p, v) __atomic_add_fetch((p), (v), __ATOMIC_SEQ_CST)
    #define uf_swap_if(p, old, new) __sync_bool_compare_and_swap((p), (old), (new))
    #define uf_or(p, v) __atomic_or_fetch((p), (v), __ATOMIC_SEQ_CST)
    #define uf_and(p, v) __atomic_and_fetch((p), (v), __ATOMIC_SEQ_CST)
    #define uf_fetch_or(p, v) __atomic_fetch_or((p), (v), __ATOMIC_SEQ_CST)
    #define uf_fetch_and(p, v) __atomic_fetch_and((p), (v), __ATOMIC_SEQ_CST)
    #define uf_count(p, v) ((void)__atomic_fetch_add((p), (v), __ATOMIC_RELAXED))
    """
    int load_int "uf_load"(int *p) nogil
    void store_int "uf_store"(int *p, int v) nogil
    bint swap_int_if "uf_swap_if"(int *p, int old, int new) nogil
    bint swap_u64_if "uf_swap_if"(uint64_t *p, uint64_t old, uint64_t new) nogil
    uint64_t load_u64 "uf_load"(uint64_t *p) nogil
    void store_u64 "uf_store"(uint64_t *p, uint64_t v) nogil
    int64_t load_i64 "uf_load"(int64_t *p) nogil
    int add_int "uf_add"(int *p, int v) nogil
    int64_t add_i64 "uf_add"(int64_t *p, int64_t v) nogil
    uint64_t add_u64 "uf_add"(uint64_t *p, uint64_t v) nogil
    void or_u64 "uf_or"(uint64_t *p, uint64_t v) nogil
    void and_u64 "uf_and"(uint64_t *p, uint64_t v) nogil
    uint64_t fetch_or_u64 "uf_fetch_or"(uint64_t *p, uint64_t v) nogil
    uint64_t fetch_and_u64 "uf_fetch_and"(uint64_t *p, uint64_t v) nogil
    void count "uf_count"(uint64_t *p, uint64_t v) nogil
    void *load_ptr "uf_load"(void **p) nogil
    void store_ptr "uf_store"(void **p, void *v) nogil

cdef enum wire_t:
    WIRE_V1 = 1
    WIRE_V2 = 2
    WIRE_MSG = 3

cdef enum:
    # `api` values. An RFC kernel takes 0xAA for v1; mainline takes it for msg.
    UFFD_API = 0xAA
    UFFD_API_V2 = 0xAB

    # RFC: low bits of a page-fault argument, and v2's record types. UFFD_API_V2_BITS announces type t
    # as bit (t - 1), shifted left by 12.
    UFFD_BIT_WRITE = 1 << 0
    UFFD_BIT_WP = 1 << 1
    UFFD_PAGEFAULT = 0x1
    UFFD_FORK = 0x2
    UFFD_V2_TYPE_SHIFT = 12

    # Mainline's record types, and the flags of a page fault.
    UFFD_EVENT_PAGEFAULT = 0x12
    UFFD_EVENT_FORK = 0x13
    UFFD_EVENT_REMAP = 0x14
    UFFD_EVENT_REMOVE = 0x15
    UFFD_EVENT_UNMAP = 0x16
    UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
    UFFD_PAGEFAULT_FLAG_WP = 1 << 1
    UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2

    UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
    UFFD_FEATURE_EVENT_FORK = 1 << 1
    UFFD_FEATURE_EVENT_REMAP = 1 << 2
    UFFD_FEATURE_EVENT_REMOVE = 1 << 3
    UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4
    UFFD_FEATURE_MISSING_SHMEM = 1 << 5
    UFFD_FEATURE_EVENT_UNMAP = 1 << 6
    UFFD_FEATURE_SIGBUS = 1 << 7
    UFFD_FEATURE_THREAD_ID = 1 << 8
    UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9
    UFFD_FEATURE_MINOR_SHMEM = 1 << 10
    UFFD_FEATURE_EXACT_ADDRESS = 1 << 11
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
    UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
    UFFD_FEATURE_POISON = 1 << 14
    UFFD_FEATURE_WP_ASYNC = 1 << 15
    UFFD_FEATURE_MOVE = 1 << 16

    UFFDIO_REGISTER_MODE_MISSING = 1 << 0
    UFFDIO_REGISTER_MODE_WP = 1 << 1
    UFFDIO_REGISTER_MODE_MINOR = 1 << 2

    # Mode bits. DONTWAKE is bit 0 for COPY, ZEROPAGE, CONTINUE, POISON and MOVE, bit 1 for WRITEPROTECT.
    UFFDIO_MODE_DONTWAKE = 1 << 0
    UFFDIO_COPY_MODE_WP = 1 << 1
    UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0
    UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1
    UFFDIO_CONTINUE_MODE_WP = 1 << 1
    UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES = 1 << 1

    # Numbers of the ioctls, as the `ioctls` bit masks count them.
    NR_REGISTER = 0x00
    NR_UNREGISTER = 0x01
    NR_WAKE = 0x02
    NR_COPY = 0x03
    NR_ZEROPAGE = 0x04
    NR_MOVE = 0x05
    NR_WRITEPROTECT = 0x06
    NR_CONTINUE = 0x07
    NR_POISON = 0x08
    NR_API = 0x3F

    UFFD_USER_MODE_ONLY = 1


cdef enum ioctl_request:
    USERFAULTFD_IOC_NEW = 0x0000AA00
    UFFDIO_API = 0xC018AA3F
    UFFDIO_REGISTER = 0xC020AA00
    UFFDIO_UNREGISTER = 0x8010AA01
    UFFDIO_WAKE = 0x8010AA02
    UFFDIO_COPY = 0xC028AA03
    UFFDIO_ZEROPAGE = 0xC020AA04
    UFFDIO_MOVE = 0xC028AA05
    UFFDIO_WRITEPROTECT = 0xC018AA06
    UFFDIO_CONTINUE = 0xC020AA07
    UFFDIO_POISON = 0xC020AA08
    PAGEMAP_SCAN = 0xC0606610

cdef enum:
    PAGE_IS_HUGE = 1 << 6
