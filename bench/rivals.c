/* What the benchmarks compare with, and a crowd of threads that fault. Compiled by rivals.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/mman.h>
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

struct share {
    pthread_barrier_t *start;
    char *pages;
    size_t page_size;
    long n;
    long end;
};

static long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC_RAW, &time);
    return time.tv_sec * 1000000000L + time.tv_nsec;
}

static void *touch_share(void *argument)
{
    struct share *share = argument;
    pthread_barrier_wait(share->start);
    for (long i = 0; i < share->n; i++)
        (void)*(volatile char *)(share->pages + i * share->page_size);
    share->end = now();
    return NULL;
}

/*
 * Drop n pages, then let each of `count` (64 at the most) threads touch its share of them, in order.
 * They have real-time priority (which takes root): on one CPU all of them fault before anybody serves one.
 * Nanoseconds from the start of all to the end of the last; -1 for bad arguments or want of threads.
 */
long touch_again(char *pages, size_t page_size, long n, long count)
{
    struct sched_param priority = {.sched_priority = 1};
    struct share shares[64];
    pthread_t threads[64];
    pthread_attr_t attributes;
    pthread_barrier_t start;
    long begin, end = 0, i;
    if (count < 1 || count > 64 || n % count || madvise(pages, n * page_size, MADV_DONTNEED))
        return -1;
    pthread_barrier_init(&start, NULL, count + 1);
    pthread_attr_init(&attributes);
    pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
    pthread_attr_setschedpolicy(&attributes, SCHED_FIFO);
    pthread_attr_setschedparam(&attributes, &priority);
    for (i = 0; i < count; i++) {
        shares[i] = (struct share){&start, pages + i * (n / count) * page_size, page_size, n / count, 0};
        if (pthread_create(&threads[i], &attributes, touch_share, &shares[i]))
            return -1; /* those started wait for ever: the caller gives up */
    }
    pthread_attr_destroy(&attributes);
    begin = now();
    pthread_barrier_wait(&start);
    for (i = 0; i < count; i++) {
        pthread_join(threads[i], NULL);
        end = shares[i].end > end ? shares[i].end : end;
    }
    pthread_barrier_destroy(&start);
    return end - begin;
}
