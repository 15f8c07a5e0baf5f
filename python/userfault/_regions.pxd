from libc.stdint cimport int64_t

from userfault._tree cimport tree_t


cdef class RegionTable:
    cdef tree_t tree      # what _tree.pxd offers works on it
    cdef int64_t next_id

    cdef tuple search(self, what, bint with_offsets)
    cdef int quiesce(self) except -1
