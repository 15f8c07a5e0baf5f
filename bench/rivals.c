/* What the benchmarks compare with, and a crowd of threads that fault. Compiled by rivals.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

/* Read `calls` times into one buffer; the bytes of all, or -errno of the call that failed. */
long read_loop(int fd, void *buffer, size_t bytes, long calls)
{
    long total = 0;
    while (calls-- > 0) {
        ssize_t got = read(fd, buffer, bytes);
        if (got < 0)
            return -errno;
        total += got;
    }
    return total;
}

static void *touch(void *page)
{
    (void)*(volatile char *)page;
    return NULL;
}

/* Start n threads, of which thread i touches page i; the number that was started. */
long crowd_start(uint64_t *threads, char *pages, size_t page_size, long n)
{
    pthread_attr_t attributes;
    long started = 0;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, PTHREAD_STACK_MIN + 16384);
    while (started < n && pthread_create(&thread, &attributes, touch, pages + started * page_size) == 0)
        threads[started++] = (uint64_t)thread;
    pthread_attr_destroy(&attributes);
    return started;
}

/* Wait for the threads, `seconds` at the most; the number that ended. */
long crowd_join(const uint64_t *threads, long n, long seconds)
{
    struct timespec deadline;
    long joined = 0;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += seconds;
    while (joined < n && pthread_timedjoin_np((pthread_t)threads[joined], NULL, &deadline) == 0)
        joined++;
    return joined;
}
