from libc.stdint cimport int64_t, uint64_t

from userfault._descriptor cimport Descriptor
from userfault._regions cimport RegionTable


cdef class Mapping:
    cdef readonly uint64_t start
    cdef readonly uint64_t length
    cdef int pid
    cdef int64_t region          # as it is registered
    cdef Descriptor descriptor
    cdef RegionTable table
    cdef object __weakref__
