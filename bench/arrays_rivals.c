/* What arrays.py compares with, and its compressed source. Compiled by arrays_contenders.py. */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PAGE 4096

/* As zlib.h declares it: the library is often there without its header. */
int uncompress(unsigned char *dst, unsigned long *dst_length, const unsigned char *src, unsigned long length);

/* -- Whole pages, read in whichever order ---------------------------------------------------------------- */

/* Copy the page at each of n offsets from memory; the sum of their first numbers, all of them whole. */
long copy_pages(const char *memory, const uint64_t *offsets, long n)
{
    double page[PAGE / sizeof(double)];
    long total = 0;
    for (long i = 0; i < n; i++) {
        memcpy(page, memory + offsets[i], PAGE);
        __asm__ volatile("" : : "r"(page) : "memory"); /* all of it, not the one that is looked at */
        total += (long)page[0];
    }
    return total;
}

/* The same with pread(2) from a file; -1 when it fails. */
long pread_pages(int file, const uint64_t *offsets, long n)
{
    double page[PAGE / sizeof(double)];
    long total = 0;
    for (long i = 0; i < n; i++) {
        if (pread(file, page, PAGE, offsets[i]) != PAGE)
            return -1;
        total += (long)page[0];
    }
    return total;
}

/* -- A source of chunks that are compressed one by one --------------------------------------------------- */

struct chunks {
    const unsigned char *data;
    const uint64_t *starts; /* of each chunk, and the end of the last */
    uint64_t chunk, nbytes; /* uncompressed */
};

/* userfault's fill function: what is asked for may begin and end within a chunk. */
int inflate_chunks(void *ctx, uint64_t offset, void *dst, size_t length)
{
    const struct chunks *chunks = ctx;
    unsigned char *to = dst, *scratch = NULL;
    int result = 0;
    while (length && result == 0) {
        uint64_t number = offset / chunks->chunk, skip = offset % chunks->chunk;
        uint64_t left = chunks->nbytes - number * chunks->chunk;
        unsigned long size = left < chunks->chunk ? left : chunks->chunk;
        size_t n = length < size - skip ? length : size - skip;
        unsigned char *into = to;
        if (n < size && !scratch && !(scratch = malloc(chunks->chunk)))
            return -ENOMEM;
        if (n < size)
            into = scratch;
        if (uncompress(into, &size, chunks->data + chunks->starts[number],
                       chunks->starts[number + 1] - chunks->starts[number]))
            result = -EIO;
        else if (into == scratch)
            memcpy(to, scratch + skip, n);
        to += n;
        offset += n;
        length -= n;
    }
    free(scratch);
    return result;
}
