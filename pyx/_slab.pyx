"""The memory of a tree's nodes, for threads that may not call malloc.

A fork() holds malloc's locks while it waits for an engine's thread to read its event: were that thread to
call malloc, both would wait for ever. So blocks are cut from chunks that are mapped here. A block that is
given back waits for the next of its size; the chunks go all at once.
"""

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int PROT_READ, PROT_WRITE
    int MAP_PRIVATE, MAP_ANONYMOUS

cdef extern from *:
    int __builtin_clzll(unsigned long long) nogil

DEF LINE = 64              # blocks begin at cache lines
DEF SMALL = 4096           # up to it each odd number of lines is a class, above it each power of two
DEF FIRST_CHUNK = 16384    # most tables hold a region or two
DEF CHUNK = 262144

ctypedef struct chunk_t:
    void *next
    size_t size


cdef inline int class_of(size_t *size) noexcept nogil:
    """The number of the size class; the size becomes the class's."""
    cdef int bits
    if size[0] <= SMALL:
        # Odd, so that what lies at one place in each of many blocks is spread over all sets of a cache.
        size[0] = ((size[0] + LINE - 1) // LINE | 1) * LINE
        return size[0] // LINE // 2
    bits = 64 - __builtin_clzll(size[0] - 1)
    size[0] = <size_t>1 << bits
    return SMALL // LINE // 2 + bits - 12


cdef bint grow(slab_t *slab, size_t size) noexcept nogil:
    """Map a chunk with room for a block of the size: a quarter of all so far, so that there are few."""
    cdef size_t wanted = FIRST_CHUNK if slab.chunks == NULL else max(<size_t>CHUNK, slab.mapped // 4)
    cdef chunk_t *chunk
    wanted = (max(wanted, LINE + size) + SMALL - 1) // SMALL * SMALL
    chunk = <chunk_t *>mmap(NULL, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if <void *>chunk == <void *>-1:
        return False
    chunk.next = slab.chunks
    chunk.size = wanted
    slab.chunks = chunk
    slab.mapped += wanted
    slab.room = <char *>chunk + LINE
    slab.end = <char *>chunk + wanted
    return True


cdef void *slab_alloc(slab_t *slab, size_t size) noexcept nogil:
    """A block of the size, of any content, at the start of a cache line; NULL when there is no memory."""
    cdef int number = class_of(&size)
    cdef void *block = slab.free[number]
    if block != NULL:
        slab.free[number] = (<void **>block)[0]
        return block
    if <size_t>(slab.end - slab.room) < size and not grow(slab, size):
        return NULL
    block = slab.room
    slab.room += size
    return block


cdef void slab_free(slab_t *slab, void *block, size_t size) noexcept nogil:
    """Take a block back that was asked for with this size; NULL is none."""
    cdef int number
    if block != NULL:
        number = class_of(&size)
        (<void **>block)[0] = slab.free[number]
        slab.free[number] = block


cdef void slab_unmap(slab_t *slab) noexcept nogil:
    """Give all memory back; no block may be in use."""
    cdef chunk_t *chunk
    while slab.chunks != NULL:
        chunk = <chunk_t *>slab.chunks
        slab.chunks = chunk.next
        munmap(chunk, chunk.size)
