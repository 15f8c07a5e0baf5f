/* Other handlers of SIGBUS: for tests of mode "inline". */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

static struct sigaction before;
long calls;

/* Mends what it is called for: a page of sevens. */
static void mend(int signal, siginfo_t *info, void *context)
{
    char *page = (char *)((uintptr_t)info->si_addr & -(uintptr_t)4096);
    (void)signal;
    (void)context;
    calls++;
    mmap(page, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    memset(page, 7, 4096);
}

/* Calls what was there before, as most libraries do. */
static void pass(int signal, siginfo_t *info, void *context)
{
    calls++;
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(signal, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
        before.sa_handler(signal);
    else
        sigaction(SIGBUS, &before, NULL);
}

static void count(int signal)
{
    (void)signal;
    calls++;
}

int install(int which)
{
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_flags = which == 2 ? 0 : SA_SIGINFO | SA_NODEFER;
    if (which == 2)
        action.sa_handler = count;
    else
        action.sa_sigaction = which ? pass : mend;
    return sigaction(SIGBUS, &action, &before);
}
