/* A page source that can be slow, fail, and be written to: for tests of lazy arrays. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

struct trouble {
    uint8_t *memory;     /* all of what it has */
    uint64_t start, end; /* the bytes that it has trouble with */
    int64_t times;       /* how often */
    int64_t result;      /* and what it answers then */
    int64_t ns;          /* that every call takes */
    uint64_t refused;    /* how often it answered so */
};

int give(void *ctx, uint64_t offset, void *dst, size_t length)
{
    struct trouble *trouble = ctx;
    struct timespec takes = {trouble->ns / 1000000000, trouble->ns % 1000000000};
    if (trouble->ns)
        nanosleep(&takes, NULL);
    if (offset < trouble->end && trouble->start < offset + length
        && __atomic_sub_fetch(&trouble->times, 1, __ATOMIC_SEQ_CST) >= 0) {
        __atomic_add_fetch(&trouble->refused, 1, __ATOMIC_SEQ_CST);
        memset(dst, 0, length / 2);
        return (int)trouble->result;
    }
    memcpy(dst, trouble->memory + offset, length);
    return 0;
}

int take(void *ctx, uint64_t offset, const void *src, size_t length)
{
    memcpy(((struct trouble *)ctx)->memory + offset, src, length);
    return 0;
}
