"""The line on stderr that says why a page of a lazy array cannot be had, before its thread is killed for it.

It is written by the engine's threads, with neither the GIL nor malloc.
"""

from libc.stdint cimport uint64_t
from libc.stdio cimport snprintf

import os

from userfault._abi cimport add_int, c_write
from userfault._served cimport hold_t, served_t

DEF ERRNOS = 134    # errnos end at 133 (EHWPOISON)
DEF MOST_LINES = 20
DEF WORDS = 1024
DEF LONGEST = 1536

cdef list kept = []
cdef const char *texts[ERRNOS]


cdef int fill_in() except -1:
    cdef bytes text
    cdef int i
    for i in range(ERRNOS):
        text = os.strerror(i).encode()
        kept.append(text)
        texts[i] = <const char *>text
    return 0


fill_in()


cdef void say(hold_t *hold, const char *what, uint64_t offset, int error, const char *words,
              int *lines) noexcept nogil:
    """One line: the array, the offset in it in bytes, what is wrong, and the error (0: that says it all), or
    better `words` for it (or NULL).

    `lines` counts those of its kind, which become no more than 20."""
    cdef char line[LONGEST]
    cdef const char *text = "unknown error"
    cdef const char *colon = ": "
    cdef const char *end = ""
    cdef int n, so_far = add_int(lines, 1)
    if so_far > MOST_LINES:
        return
    if words != NULL:
        text = words
    elif error == 0:
        colon = text = ""
    elif 0 < error < ERRNOS:
        text = texts[error]
    if so_far == MOST_LINES:
        end = " (no more is said of it)"
    offset -= min(offset, hold.first_byte)
    n = snprintf(line, LONGEST, "userfault: %s: byte %llu %s%s%s%s\n", hold.name, <unsigned long long>offset,
                 what, colon, text, end)
    c_write(2, line, min(n, LONGEST - 1))


cdef void say_why(served_t *served, const char *what, uint64_t offset, int error, int *lines) noexcept nogil:
    """`say` of an error of the source, in its own words if it has any."""
    cdef char words[WORDS]
    cdef bint told = served.source.words != NULL and served.source.words(
        served.source.ctx, error, served.source.start + offset, words, WORDS)
    say(served.hold, what, offset, error, words if told else NULL, lines)
