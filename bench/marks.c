/* Where callgrind's counters start, and where they are written down. Compiled by counted.py. */
#include <valgrind/callgrind.h>

void count_from_here(void)
{
    CALLGRIND_START_INSTRUMENTATION; /* only the first has an effect */
    CALLGRIND_ZERO_STATS;
}

void count_to_here(const char *name)
{
    CALLGRIND_DUMP_STATS_AT(name);
}
