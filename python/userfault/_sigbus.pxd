cdef int take_sigbus() noexcept nogil
