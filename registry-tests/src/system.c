/* Comes between a process and its system, as a file says: the time of day is so many seconds later, a sync fails. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile struct {
    long long seconds_ahead;
    long long error_of_syncs;
} *said;

__attribute__((constructor)) static void begin(void) {
    int file = open(getenv("REGISTRY_TEST_SYSTEM"), O_RDONLY | O_CLOEXEC);
    void *words = mmap(NULL, sizeof *said, PROT_READ, MAP_SHARED, file, 0);
    if (words == MAP_FAILED)
        abort();
    close(file);
    said = words;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && said && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += said->seconds_ahead;
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec fine;
    (void)zone;
    int failed = clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *now) {
    struct timespec fine;
    time_t seconds = clock_gettime(CLOCK_REALTIME, &fine) ? -1 : fine.tv_sec;
    if (now)
        *now = seconds;
    return seconds;
}

static int sync_or_fail(long number, int file) {
    if (said && said->error_of_syncs) {
        errno = said->error_of_syncs;
        return -1;
    }
    return syscall(number, file);
}

int fdatasync(int file) {
    return sync_or_fail(SYS_fdatasync, file);
}

int fsync(int file) {
    return sync_or_fail(SYS_fsync, file);
}
