from libc.stdint cimport uint64_t

# The raw faces: 0 or -errno, EINTR retried. `done` receives the bytes completed, never a negative.
cdef int uffd_api(int fd, uint64_t api, uint64_t features, uint64_t *bits, uint64_t *ioctls) noexcept nogil
cdef int uffd_register(int fd, uint64_t start, uint64_t length, uint64_t mode,
                       uint64_t *ioctls) noexcept nogil
cdef int uffd_unregister(int fd, uint64_t start, uint64_t length) noexcept nogil
cdef int uffd_wake(int fd, uint64_t start, uint64_t length) noexcept nogil
cdef int uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode,
                   uint64_t *done) noexcept nogil
cdef int uffd_move(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode,
                   uint64_t *done) noexcept nogil
cdef int uffd_zeropage(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil
cdef int uffd_continue(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil
cdef int uffd_poison(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil
cdef int uffd_writeprotect(int fd, uint64_t start, uint64_t length, uint64_t mode) noexcept nogil

cdef uint64_t PAGE_SIZE
cdef uint64_t as_u64(value) except? 0
cpdef uint64_t check_range(start, length) except? 0
