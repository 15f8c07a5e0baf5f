from userfault._abi cimport pthread_mutex_t
from userfault._ahead cimport loop_t
from userfault._descriptor cimport Descriptor
from userfault._fill cimport worker_t
from userfault._regions cimport RegionTable

cdef enum:
    VISITORS = 16   # threads of the program's that fill at the same time


cdef class Engine:
    cdef Descriptor descriptor
    cdef RegionTable table
    cdef readonly dict keep      # Served by region: what must live while the engine may use it
    cdef object buffers          # registered memory of the user's, alive as long as the thread
    cdef readonly bint finished  # the threads have ended, or never began
    cdef readonly int native_id
    cdef readonly int error      # errno that ended the loop, 0
    cdef readonly bint can_move
    cdef readonly bint hears_forks
    cdef object __weakref__
    cdef readonly int pid
    cdef loop_t loop
    cdef worker_t visitors[VISITORS]  # each of whichever thread has its lock
    cdef pthread_mutex_t visiting[VISITORS]

    cdef void finish(self) noexcept
    cdef int let_go(self, kept) except -1
