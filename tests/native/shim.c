/* LD_PRELOADed: an ioctl(2) whose userfaultfd requests fail, or wait, when a test says so.

   A rule is about one request, and calls whose range starts in [start, end). The first rule that matches a
   call lets `skip` of them pass, answers `times`, and is spent. To fail is to return -1 and `error` with
   `field` in the structure's last field, where the kernel tells its progress; above 0, so many bytes are
   really done before. LEAVE leaves the field as the caller had it. To hold is to let the call go on, to the
   next rule or to the kernel, when shim_release() is called.
*/

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LEAVE INT64_MIN
#define MOST_RULES 64
#define SIZE(request) ((request) >> 16 & 0x3fff) /* of its structure; 0: it has none */

struct rule {
    unsigned long request;
    int error, holds;
    int64_t field;
    uint64_t skip, times, start, end, hits;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t released = PTHREAD_COND_INITIALIZER;
static struct rule rules[MOST_RULES];
static int n_rules, n_held, releases;
static uint64_t calls[64]; /* by the request's number */

static int add(struct rule rule)
{
    int index;
    pthread_mutex_lock(&lock);
    index = n_rules < MOST_RULES ? n_rules++ : -1;
    if (index >= 0)
        rules[index] = rule;
    pthread_mutex_unlock(&lock);
    return index;
}

/* The rule's number, for shim_hits; -1: there are too many. */
int shim_fail(unsigned long request, int error, int64_t field, uint64_t skip, uint64_t times, uint64_t start,
              uint64_t end)
{
    struct rule rule = {request, error, 0, field, skip, times, start, end, 0};
    return add(rule);
}

/* The next call waits. */
int shim_hold(unsigned long request, uint64_t start, uint64_t end)
{
    struct rule rule = {request, 0, 1, LEAVE, 0, 1, start, end, 0};
    return add(rule);
}

/* Every rule is spent; who is held stays so. */
void shim_stop(void)
{
    int i;
    pthread_mutex_lock(&lock);
    for (i = 0; i < n_rules; i++)
        rules[i].times = 0;
    pthread_mutex_unlock(&lock);
}

void shim_release(void)
{
    pthread_mutex_lock(&lock);
    releases++;
    pthread_cond_broadcast(&released);
    pthread_mutex_unlock(&lock);
}

/* How many calls wait now. */
int shim_held(void)
{
    int held;
    pthread_mutex_lock(&lock);
    held = n_held;
    pthread_mutex_unlock(&lock);
    return held;
}

/* How many calls a rule has answered, or held. */
uint64_t shim_hits(int index)
{
    uint64_t hits;
    pthread_mutex_lock(&lock);
    hits = rules[index].hits;
    pthread_mutex_unlock(&lock);
    return hits;
}

/* How many calls of a request there were. */
uint64_t shim_calls(unsigned long request)
{
    uint64_t made;
    pthread_mutex_lock(&lock);
    made = calls[request & 63];
    pthread_mutex_unlock(&lock);
    return made;
}

/* A page source without a `prompt` way: workers fill from it. `memory` is all of it. */
int shim_source(const char *memory, uint64_t offset, void *to, size_t length)
{
    memcpy(to, memory + offset, length);
    return 0;
}

static int find(unsigned long request, const uint64_t *words, struct rule *found)
{
    struct rule *rule;
    for (rule = rules; rule < rules + n_rules; rule++) {
        if (rule->request != request || rule->times == 0)
            continue;
        if (SIZE(request) && (words[0] < rule->start || words[0] >= rule->end))
            continue;
        if (rule->skip) {
            rule->skip--;
            return 0;
        }
        rule->times--;
        rule->hits++;
        *found = *rule;
        return 1;
    }
    return 0;
}

/* COPY and MOVE are {to, from, length, mode, done}; the others {start, length, mode, done}. */
static int refuse(int fd, const struct rule *rule, uint64_t *words)
{
    int length = SIZE(rule->request) == 40 ? 2 : 1, result;
    uint64_t whole;
    if (rule->field > 0) {
        whole = words[length];
        words[length] = (uint64_t)rule->field;
        result = (int)syscall(SYS_ioctl, fd, rule->request, words);
        words[length] = whole;
        if (result != 0)
            return result;
    }
    if (rule->field != LEAVE)
        words[SIZE(rule->request) / 8 - 1] = (uint64_t)rule->field;
    errno = rule->error;
    return -1;
}

int ioctl(int fd, unsigned long request, ...)
{
    struct rule rule;
    uint64_t *words;
    int matched, before;
    va_list more;
    va_start(more, request);
    words = va_arg(more, uint64_t *);
    va_end(more);
    if ((request >> 8 & 0xff) != 0xaa)
        return (int)syscall(SYS_ioctl, fd, request, words);
    pthread_mutex_lock(&lock);
    calls[request & 63]++;
    while ((matched = find(request, words, &rule)) && rule.holds) {
        before = releases;
        n_held++;
        while (releases == before)
            pthread_cond_wait(&released, &lock);
        n_held--;
    }
    pthread_mutex_unlock(&lock);
    if (matched)
        return refuse(fd, &rule, words);
    return (int)syscall(SYS_ioctl, fd, request, words);
}
