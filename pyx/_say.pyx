"""The line on stderr that says why a page of a lazy array cannot be had, before its thread is killed for it.

It is written by the engine's threads, with neither the GIL nor malloc.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport strlen

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


cdef int printable(const unsigned char *text) noexcept nogil:
    """The bytes of the character that NUL-ended text begins with; 0: it is none of UTF-8, or a control."""
    cdef uint32_t first = text[0], point, least
    cdef int size = 2, i
    if first < 0x80:
        return 32 <= first < 127
    if first < 0xC2 or first > 0xF4:
        return 0
    least = 0xA0
    if first >= 0xE0:
        size, least = (3, 0x800) if first < 0xF0 else (4, 0x10000)
    point = first & (0x7F >> size)
    for i in range(1, size):
        if text[i] & 0xC0 != 0x80:
            return 0
        point = point << 6 | (text[i] & 0x3F)
    return size if least <= point <= 0x10FFFF and not 0xD800 <= point < 0xE000 else 0


cdef void make_printable(char *text) noexcept nogil:
    """What no terminal should be given becomes "?": controls, and bytes that are no character of UTF-8."""
    cdef int size
    while text[0]:
        size = printable(<const unsigned char *>text)
        if size == 0:
            text[0] = b"?"
            size = 1
        text += size


cdef void say(hold_t *hold, const char *what, uint64_t offset, int error, const char *words,
              int *lines) noexcept nogil:
    """One line: the array, the offset in it in bytes, what is wrong, and the error (0: that says it all), or
    better `words` for it (or NULL).

    `lines` counts those of its kind, which become no more than 20."""
    cdef char line[LONGEST]
    cdef const char *text = "unknown error"
    cdef const char *colon = ": "
    cdef const char *end = ""
    cdef int so_far = add_int(lines, 1)
    cdef size_t n
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
    snprintf(line, LONGEST - 1, "userfault: %s: byte %llu %s%s%s%s", hold.name, <unsigned long long>offset,
             what, colon, text, end)
    make_printable(line)
    n = strlen(line)
    line[n] = b"\n"
    c_write(2, line, n + 1)


cdef void say_why(served_t *served, const char *what, uint64_t offset, int error, int *lines) noexcept nogil:
    """`say` of an error of the source, in its own words if it has any."""
    cdef char words[WORDS]
    cdef bint told = served.source.words != NULL and served.source.words(
        served.source.ctx, error, served.source.start + offset, words, WORDS)
    say(served.hold, what, offset, error, words if told else NULL, lines)
