/* The handlers that serve.py compares with, and the threads that touch. Compiled by rivals.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE ((uint64_t)4096)
#define HUGE ((uint64_t)2 << 20)
#define MOST_RECORDS 256

static long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC_RAW, &time);
    return time.tv_sec * 1000000000L + time.tv_nsec;
}

static int start_thread(pthread_t *thread, void *(*run)(void *), void *argument, size_t stack, int cpu)
{
    pthread_attr_t attributes;
    cpu_set_t one;
    int error;
    pthread_attr_init(&attributes);
    if (stack)
        pthread_attr_setstacksize(&attributes, stack);
    if (cpu >= 0) {
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        pthread_attr_setaffinity_np(&attributes, sizeof(one), &one);
    }
    error = pthread_create(thread, &attributes, run, argument);
    pthread_attr_destroy(&attributes);
    return error;
}

/* -- Handlers: the example of userfaultfd(2), with one record a read() as there, or with many. ---------- */

struct handler {
    pthread_t thread;
    int fd;
    long batch;
    const char *memory;
    const char *source;
    struct uffd_msg records[MOST_RECORDS];
};

static void copy_page(const struct handler *handler, uint64_t address)
{
    uint64_t page = address & -PAGE;
    uint64_t offset = page - (uint64_t)handler->memory;
    struct uffdio_copy copy = {.dst = page, .src = (uint64_t)handler->source + offset, .len = PAGE};
    struct uffdio_range range = {.start = page, .len = PAGE};
    if (ioctl(handler->fd, UFFDIO_COPY, &copy) == 0)
        return;
    if (errno != EEXIST || ioctl(handler->fd, UFFDIO_WAKE, &range)) {
        perror("serve_rivals: UFFDIO_COPY");
        _exit(1);
    }
}

static void *handle(void *argument)
{
    struct handler *handler = argument;
    struct pollfd ready = {.fd = handler->fd, .events = POLLIN};
    for (;;) {
        poll(&ready, 1, -1);
        ssize_t got = read(handler->fd, handler->records, handler->batch * sizeof(struct uffd_msg));
        if (got < 0 && errno != EAGAIN) {
            perror("serve_rivals: read");
            _exit(1);
        }
        for (ssize_t i = 0; i < got / (ssize_t)sizeof(struct uffd_msg); i++)
            copy_page(handler, handler->records[i].arg.pagefault.address);
    }
    return NULL;
}

/*
 * Serve the memory from `source`, on a thread of its own, on `cpu` (-1: on any), with up to `batch` records
 * a read(). NULL for a bad batch, or want of memory or a thread.
 */
struct handler *handler_start(int fd, const char *memory, const char *source, long batch, int cpu)
{
    struct handler *handler;
    if (batch < 1 || batch > MOST_RECORDS || !(handler = calloc(1, sizeof(*handler))))
        return NULL;
    handler->fd = fd;
    handler->batch = batch;
    handler->memory = memory;
    handler->source = source;
    if (start_thread(&handler->thread, handle, handler, 0, cpu)) {
        free(handler);
        return NULL;
    }
    return handler;
}

void handler_stop(struct handler *handler)
{
    pthread_cancel(handler->thread); /* in poll(), while nobody faults */
    pthread_join(handler->thread, NULL);
    free(handler);
}

/* -- The same in the thread that touches the page: UFFD_FEATURE_SIGBUS ----------------------------------- */

static struct handler in_thread;
static struct sigaction before;

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
    int saved = errno;
    (void)signal;
    (void)context;
    copy_page(&in_thread, (uint64_t)info->si_addr);
    errno = saved;
}

/* Serve the memory from `source` in a handler of SIGBUS; 0, or -1. One at a time. */
int sigbus_start(int fd, const char *memory, const char *source)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART};
    in_thread = (struct handler){.fd = fd, .memory = memory, .source = source};
    return sigaction(SIGBUS, &action, &before);
}

void sigbus_stop(void)
{
    sigaction(SIGBUS, &before, NULL);
}

/* -- The threads that touch ----------------------------------------------------------------------------- */

struct toucher {
    struct crowd *crowd;
    pthread_t thread;
    long number, start, end, right, wrong, refused;
};

struct crowd {
    pthread_barrier_t barrier;
    const char *memory;
    const uint64_t *offsets;
    const unsigned char *expected; /* a byte for each offset */
    const char *source;            /* or what the whole memory should hold */
    long n, threads;
    struct toucher touchers[];
};

static void *touch(void *argument)
{
    struct toucher *me = argument;
    const struct crowd *crowd = me->crowd;
    pthread_barrier_wait(&me->crowd->barrier);
    me->start = now();
    for (long i = me->number; i < crowd->n; i += crowd->threads) {
        unsigned char got = *(const volatile unsigned char *)(crowd->memory + crowd->offsets[i]);
        me->wrong += got != crowd->expected[i];
    }
    me->end = now();
    return NULL;
}

/* write(2) each page to a file in memory: one that fails closed is an EFAULT, and no signal. */
static void *write_pages(void *argument)
{
    struct toucher *me = argument;
    const struct crowd *crowd = me->crowd;
    char copy[PAGE];
    int file = memfd_create("serve_rivals", MFD_CLOEXEC);
    pthread_barrier_wait(&me->crowd->barrier);
    for (long i = me->number; i < crowd->n; i += crowd->threads) {
        ssize_t got = pwrite(file, crowd->memory + crowd->offsets[i], PAGE, 0);
        if (got < 0 && errno == EFAULT)
            me->refused++;
        else if (got == PAGE && pread(file, copy, PAGE, 0) == PAGE
                 && memcmp(copy, crowd->source + crowd->offsets[i], PAGE) == 0)
            me->right++;
        else
            me->wrong++;
    }
    close(file);
    return NULL;
}

/* Start the threads; thread i has every offset from the i-th on in steps of `threads`. */
static long crowd_start(struct crowd *crowd, void *(*run)(void *), int cpu)
{
    pthread_barrier_init(&crowd->barrier, NULL, crowd->threads);
    for (long i = 0; i < crowd->threads; i++) {
        struct toucher *toucher = &crowd->touchers[i];
        toucher->crowd = crowd;
        toucher->number = i;
        if (start_thread(&toucher->thread, run, toucher, PTHREAD_STACK_MIN + 16384, cpu))
            return -1; /* those started wait for ever: the caller gives up */
    }
    return 0;
}

/* Wait for the threads, `seconds` at the most; the number that ended. */
static long crowd_join(struct crowd *crowd, long seconds)
{
    struct timespec deadline;
    long joined = 0;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += seconds;
    while (joined < crowd->threads
           && pthread_timedjoin_np(crowd->touchers[joined].thread, NULL, &deadline) == 0)
        joined++;
    return joined;
}

static struct crowd *crowd_new(const char *memory, const uint64_t *offsets, long n, long threads)
{
    struct crowd *crowd = calloc(1, sizeof(*crowd) + threads * sizeof(struct toucher));
    if (crowd) {
        crowd->memory = memory;
        crowd->offsets = offsets;
        crowd->n = n;
        crowd->threads = threads;
    }
    return crowd;
}

static void crowd_free(struct crowd *crowd)
{
    pthread_barrier_destroy(&crowd->barrier);
    free(crowd);
}

/*
 * Read memory[offset] for each of n offsets, from `threads` threads at once, on `cpu` (-1: on any).
 * Nanoseconds from the first start to the last end; -1 for want of threads, -2 when they do not end within
 * `seconds`. `wrong` counts the bytes that are not those expected.
 */
long touch_all(const char *memory, const uint64_t *offsets, const unsigned char *expected, long n,
               long threads, int cpu, long seconds, long *wrong)
{
    struct crowd *crowd = crowd_new(memory, offsets, n, threads);
    long start = LONG_MAX, end = 0;
    if (!crowd)
        return -1;
    crowd->expected = expected;
    if (crowd_start(crowd, touch, cpu))
        return -1;
    if (crowd_join(crowd, seconds) < threads)
        return -2;
    *wrong = 0;
    for (struct toucher *toucher = crowd->touchers; toucher < crowd->touchers + threads; toucher++) {
        start = toucher->start < start ? toucher->start : start;
        end = toucher->end > end ? toucher->end : end;
        *wrong += toucher->wrong;
    }
    crowd_free(crowd);
    return end - start;
}

/* Write the page at each offset, from `threads` threads; NULL for want of threads. */
struct crowd *writers_start(const char *memory, const uint64_t *offsets, const char *source, long n,
                            long threads)
{
    struct crowd *crowd = crowd_new(memory, offsets, n, threads);
    if (!crowd)
        return NULL;
    crowd->source = source;
    return crowd_start(crowd, write_pages, -1) ? NULL : crowd;
}

/* Wait for the writers; counts: the pages that were right, wrong, and refused with EFAULT. */
void writers_join(struct crowd *crowd, long seconds, long counts[3])
{
    long ended = crowd_join(crowd, seconds);
    memset(counts, 0, 3 * sizeof(counts[0]));
    for (struct toucher *toucher = crowd->touchers; toucher < crowd->touchers + ended; toucher++) {
        counts[0] += toucher->right;
        counts[1] += toucher->wrong;
        counts[2] += toucher->refused;
    }
    if (ended == crowd->threads)
        crowd_free(crowd);
}

/* -- Whole regions -------------------------------------------------------------------------------------- */

/* Whether two ranges hold different bytes. */
long differ(const char *one, const char *other, size_t length)
{
    return memcmp(one, other, length) != 0;
}

/* Nanoseconds of a memcpy into fresh memory of huge pages; -1 when there is none, or a byte is wrong. */
long copy_into_huge(const char *source, size_t length)
{
    char *room = mmap(NULL, length + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *memory = (char *)(((uint64_t)room + HUGE - 1) & -HUGE);
    long took;
    if (room == MAP_FAILED || madvise(memory, length, MADV_HUGEPAGE))
        return -1;
    took = now();
    memcpy(memory, source, length);
    took = now() - took;
    if (differ(memory, source, length))
        took = -1;
    munmap(room, length + HUGE);
    return took;
}
