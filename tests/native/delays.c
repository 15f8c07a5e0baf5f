/* LD_PRELOADed: one in so many (DELAYS=8) of the calls after which other threads go on returns up to 3 ms late, in
   all threads but the first. What is only right while nobody is late, in the library or in a test, fails.
*/

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define IS_USERFAULTFD(request) (((request) >> 8 & 0xff) == 0xAA)

static void be_late(void)
{
    static __thread uint32_t random;
    static int every;
    int error = errno;
    if (every == 0 && (!getenv("DELAYS") || (every = atoi(getenv("DELAYS"))) < 1))
        every = 8;
    if (gettid() != getpid()) {
        if (random == 0)
            random = (uint32_t)gettid() * 2654435761u ^ (uint32_t)clock();
        random = random * 1664525 + 1013904223;
        if ((random >> 16) % (uint32_t)every == 0) {
            struct timespec late = {0, (random >> 8) % 3000 * 1000};
            nanosleep(&late, NULL);
        }
    }
    errno = error;
}

/* As callers pass what these take, whose declarations have dots. */
int late_ioctl(int fd, unsigned long request, void *argument) __asm__("ioctl");
long late_syscall(long number, long a, long b, long c, long d, long e, long f) __asm__("syscall");

int late_ioctl(int fd, unsigned long request, void *argument)
{
    int result = REAL(ioctl)(fd, request, argument);
    if (IS_USERFAULTFD(request))
        be_late();
    return result;
}

long late_syscall(long number, long a, long b, long c, long d, long e, long f)
{
    long result = REAL(syscall)(number, a, b, c, d, e, f);
    if (number == SYS_futex)
        be_late();
    return result;
}

ssize_t read(int fd, void *data, size_t size)
{
    ssize_t result = REAL(read)(fd, data, size);
    be_late();
    return result;
}

int pthread_cond_signal(pthread_cond_t *condition)
{
    /* On x86-64 there is an older one too, for other condition variables. */
    void *ours = dlvsym(RTLD_NEXT, "pthread_cond_signal", "GLIBC_2.3.2");
    int result = (ours ? (__typeof__(&pthread_cond_signal))ours : REAL(pthread_cond_signal))(condition);
    be_late();
    return result;
}
