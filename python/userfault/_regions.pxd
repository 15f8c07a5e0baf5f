from libc.stdint cimport int64_t, uint64_t

from userfault._tree cimport tree_t


cdef class RegionTable:
    cdef tree_t tree      # what _tree.pxd offers works on it
    cdef int64_t next_id

    cdef tuple search(self, what, bint with_offsets)


cdef uint64_t give_payload(tree_t *tree, uint64_t start, uint64_t end, int64_t id, void *payload) except? 0
cdef size_t drop_payloads(tree_t *tree) except? 0
cdef int quiesce(tree_t *tree) except -1
