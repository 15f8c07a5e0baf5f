from userfault._ahead cimport loop_t
from userfault._space cimport space_t

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void *ptr
    struct epoll_event:
        unsigned int events
        epoll_data_t data

cdef bint hear(loop_t *loop, space_t *space, const char *record) noexcept nogil
cdef void ask(loop_t *loop) noexcept nogil
cdef void find_room(loop_t *loop) noexcept nogil
cdef space_t *pin_child(loop_t *loop, space_t *last) noexcept nogil
cdef void end_children(loop_t *loop) noexcept nogil
cdef void leave_children(loop_t *loop) noexcept nogil
cdef void enlist(loop_t *loop) noexcept
cdef void delist(loop_t *loop) noexcept
