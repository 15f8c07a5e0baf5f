# The memory that a process shares with its pager, and how one wakes the other.
#
# A request fills in a slot and sets its state to ASKED. Whichever pager runs, also one that was started
# since, sees it there, does it, and sets DONE: so nothing is lost with a pager, and no message can be cut
# short. A pager writes what it likes there; who reads it checks it.

from libc.stdint cimport uint64_t

from userfault._ioctl cimport PAGE_SIZE

cdef enum:
    SLOT_BYTES = 2097152  # of data: as much as an engine's stage holds
    WORDS = 512           # of a message, with the NUL
    MOST_SLOTS = 64

    # head_t.phase
    STARTING = 0
    READY = 1
    FAILED = 2            # the source could not be made
    ENDED = 3             # no pager is started any more

    # slot_t.state
    IDLE = 0
    ASKED = 1
    DONE = 2

    READ = 1
    WRITE = 2
    SYNC = 3

ctypedef struct head_t:
    int phase             # a futex
    int error             # FAILED: errno
    int writable
    int buffers           # what was written is durable after SYNC only
    uint64_t nbytes
    uint64_t chunk_bytes
    uint64_t answered     # READs that were given their bytes, and WRITEs that were done
    uint64_t reads        # calls of the source, and bytes that it gave and took
    uint64_t read_bytes
    uint64_t writes
    uint64_t written_bytes
    char words[WORDS]

ctypedef struct slot_t:
    int state             # a futex
    int what
    int result            # 0 or -errno
    uint64_t offset
    uint64_t length
    char words[WORDS]     # why it failed

# Where it lies: the head has a page, each slot has one, and then comes each slot's data.

cdef extern from *:
    """
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>
    #include <limits.h>
    #ifndef UF_FUTEX
    #define UF_FUTEX
    /* Wait while *word is value, for ms at the most (-1: no limit). Not FUTEX_PRIVATE: processes share it. */
    static inline void uf_futex_wait(int *word, int value, int ms) {
        struct timespec limit = { ms / 1000, ms % 1000 * 1000000L };
        syscall(SYS_futex, word, FUTEX_WAIT, value, ms < 0 ? NULL : &limit, NULL, 0);
    }
    static inline void uf_futex_wake(int *word) {
        syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
    #endif
    """
    void futex_wait "uf_futex_wait"(int *word, int value, int ms) nogil
    void futex_wake "uf_futex_wake"(int *word) nogil

cdef inline slot_t *slot_of(char *memory, int i) noexcept nogil:
    return <slot_t *>(memory + PAGE_SIZE * (1 + i))

cdef inline char *data_of(char *memory, int n_slots, int i) noexcept nogil:
    return memory + PAGE_SIZE * (1 + n_slots) + <uint64_t>SLOT_BYTES * i

cdef inline uint64_t bytes_of(int n_slots) noexcept nogil:
    return PAGE_SIZE * (1 + n_slots) + <uint64_t>SLOT_BYTES * n_slots
