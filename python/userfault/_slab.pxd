cdef enum:
    CLASSES = 64

# All zeros: no memory yet. Its owner's lock guards it.
cdef struct slab_t:
    void *chunks            # mapped, linked; each begins with its chunk_t
    char *room              # what is left of the newest
    char *end
    size_t mapped           # bytes
    void *free[CLASSES]     # blocks given back, by size class

cdef void *slab_alloc(slab_t *slab, size_t size) noexcept nogil
cdef void slab_free(slab_t *slab, void *block, size_t size) noexcept nogil
cdef void slab_unmap(slab_t *slab) noexcept nogil
