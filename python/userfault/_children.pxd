from userfault._books cimport event_t
from userfault._regions cimport RegionTable
from userfault._tree cimport tree_t


cdef class ForkBatch:
    cdef readonly object agreement   # the parent's
    cdef object records              # the reader's array, whose memory this exports
    cdef list children               # (descriptor number, RegionTable) of those that nobody has taken
    cdef object ending
    cdef object __weakref__

    cdef object adopt(self, int fd, RegionTable parent)

cdef int forking    # os.fork() calls in progress

cdef size_t follow(tree_t *tree, int fd, int wire, bint hears_moves, bint hears_unmap, const char *records,
                   size_t i, size_t n, event_t *event) noexcept nogil
