/* Page sources in C. Byte o of what they fill is the top byte of key + o * STEP. */

#include <stddef.h>
#include <stdint.h>

#define STEP 0x9E3779B97F4A7C15

static void write_bytes(uint64_t key, uint64_t offset, uint8_t *dst, size_t length)
{
    for (size_t i = 0; i < length; i++)
        dst[i] = (key + (offset + i) * STEP) >> 56;
}

int fill(void *ctx, uint64_t offset, void *dst, size_t length)
{
    write_bytes(ctx ? *(const uint64_t *)ctx : 0, offset, dst, length);
    return 0;
}

struct failure {
    uint64_t offset;
    int64_t result;
};

/* Answers `result` for the page at `offset`, having written half of it. */
int fail(void *ctx, uint64_t offset, void *dst, size_t length)
{
    const struct failure *failure = ctx;
    if (offset <= failure->offset && failure->offset < offset + length) {
        write_bytes(0, offset, dst, length / 2);
        return (int)failure->result;
    }
    write_bytes(0, offset, dst, length);
    return 0;
}

struct calls {
    uint64_t n;
    struct {
        uint64_t offset, length;
    } call[1024];
};

/* Writes down what it was called with. */
int record(void *ctx, uint64_t offset, void *dst, size_t length)
{
    struct calls *calls = ctx;
    uint64_t i = __atomic_fetch_add(&calls->n, 1, __ATOMIC_SEQ_CST);
    if (i < 1024) {
        calls->call[i].offset = offset;
        calls->call[i].length = length;
    }
    write_bytes(0, offset, dst, length);
    return 0;
}
