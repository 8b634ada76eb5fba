/* Faults on demand, between a process and its libc (LD_PRELOAD). See faults.py, class Shim.
 *
 * The control file (TEST_FAULTS) is mapped shared: 256 bytes with the clock's error in nanoseconds at their
 * beginning, then 15 rules of 256 bytes. Each function below asks `strike` before it does its work. All work
 * is done by raw system calls, so nothing has to be looked up and nothing recurses.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum call { WRITE, SYNC, TRUNCATE, RENAME, UNLINK, OPEN, MKDIR, ALLOCATE };

struct rule {
    uint32_t on, call;
    int32_t error;
    uint32_t length, skip, times, hits;
    char path[228];
};

struct control {
    int64_t clock;
    char unused[248];
    struct rule rules[15];
};

_Static_assert(sizeof(struct control) == 4096, "as faults.py packs it");

static struct control none;
static struct control *control = &none;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("TEST_FAULTS");
    int fd = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0) : -1;
    if (fd < 0)
        return;
    void *found = mmap(NULL, sizeof none, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (found != MAP_FAILED)
        control = found;
}

/* Take one from a counter that is not yet zero. */
static int take(uint32_t *counter)
{
    uint32_t seen = __atomic_load_n(counter, __ATOMIC_SEQ_CST);
    while (seen > 0)
        if (__atomic_compare_exchange_n(counter, &seen, seen - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return 1;
    return 0;
}

/* The rule that strikes this call on this path, or NULL. */
static struct rule *strike_path(enum call call, const char *path)
{
    for (int i = 0; i < 15; i++) {
        struct rule *rule = &control->rules[i];
        if (!__atomic_load_n(&rule->on, __ATOMIC_SEQ_CST) || rule->call != call || !strstr(path, rule->path))
            continue;
        if (take(&rule->skip))
            return NULL;
        if (!take(&rule->times))
            continue;
        __atomic_add_fetch(&rule->hits, 1, __ATOMIC_SEQ_CST);
        return rule;
    }
    return NULL;
}

static struct rule *strike(enum call call, int fd)
{
    char link[64], path[4096];
    int armed = 0;
    for (int i = 0; i < 15; i++)
        armed |= control->rules[i].on;
    if (!armed)
        return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int saved = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    path[length < 0 ? 0 : length] = 0;
    return strike_path(call, path);
}

#define FAIL(found)                        \
    do {                                   \
        struct rule *struck = (found);     \
        if (struck && struck->error) {     \
            errno = struck->error;         \
            return -1;                     \
        }                                  \
    } while (0)

/* How many bytes may be written; -1 with errno set where the call fails. */
static ssize_t allowed(int fd, size_t wanted)
{
    struct rule *rule = strike(WRITE, fd);
    FAIL(rule);
    return rule && rule->length < wanted ? rule->length : wanted;
}

ssize_t write(int fd, const void *data, size_t size)
{
    ssize_t room = allowed(fd, size);
    return room < 0 ? -1 : syscall(SYS_write, fd, data, room);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
    ssize_t room = allowed(fd, size);
    return room < 0 ? -1 : syscall(SYS_pwrite64, fd, data, room, offset);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }

/* A short vector write is one of its first part alone. */
ssize_t writev(int fd, const struct iovec *parts, int count)
{
    size_t size = 0;
    for (int i = 0; i < count; i++)
        size += parts[i].iov_len;
    ssize_t room = allowed(fd, size);
    if (room < 0)
        return -1;
    if ((size_t)room == size)
        return syscall(SYS_writev, fd, parts, count);
    size_t first = parts[0].iov_len;
    return syscall(SYS_write, fd, parts[0].iov_base, (size_t)room < first ? (size_t)room : first);
}

int fsync(int fd) { FAIL(strike(SYNC, fd)); return syscall(SYS_fsync, fd); }
int fdatasync(int fd) { FAIL(strike(SYNC, fd)); return syscall(SYS_fdatasync, fd); }
int syncfs(int fd) { FAIL(strike(SYNC, fd)); return syscall(SYS_syncfs, fd); }
int ftruncate64(int fd, off64_t size) { FAIL(strike(TRUNCATE, fd)); return syscall(SYS_ftruncate, fd, size); }
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

/* These two return the error instead of setting errno. */
int posix_fallocate64(int fd, off64_t start, off64_t size)
{
    struct rule *rule = strike(ALLOCATE, fd);
    if (rule && rule->error)
        return rule->error;
    return syscall(SYS_fallocate, fd, 0, start, size) ? errno : 0;
}
int posix_fallocate(int fd, off_t start, off_t size) { return posix_fallocate64(fd, start, size); }

int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    FAIL(strike_path(RENAME, new));
    return syscall(SYS_renameat2, from, old, to, new, flags);
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int at, const char *path, int flags)
{
    FAIL(strike_path(UNLINK, path));
    return syscall(SYS_unlinkat, at, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int at, const char *path, mode_t mode)
{
    FAIL(strike_path(MKDIR, path));
    return syscall(SYS_mkdirat, at, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

static int open_at(int at, const char *path, int flags, va_list more)
{
    mode_t mode = flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(more, mode_t) : 0;
    FAIL(strike_path(OPEN, path));
    return syscall(SYS_openat, at, path, flags, mode);
}

#define OPEN_BODY(at)                          \
    va_list more;                              \
    va_start(more, flags);                     \
    int fd = open_at(at, path, flags, more);   \
    va_end(more);                              \
    return fd

int open(const char *path, int flags, ...) { OPEN_BODY(AT_FDCWD); }
int open64(const char *path, int flags, ...) { OPEN_BODY(AT_FDCWD); }
int openat(int at, const char *path, int flags, ...) { OPEN_BODY(at); }
int openat64(int at, const char *path, int flags, ...) { OPEN_BODY(at); }

/* ---- the clock ---- */

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (failed || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE))
        return failed;
    int64_t whole = (int64_t)now->tv_sec * 1000000000 + now->tv_nsec + control->clock;
    now->tv_sec = whole / 1000000000;
    now->tv_nsec = whole % 1000000000;
    if (now->tv_nsec < 0) {
        now->tv_nsec += 1000000000;
        now->tv_sec--;
    }
    return 0;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec found;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &found))
        return -1;
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out)
{
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (out)
        *out = found.tv_sec;
    return found.tv_sec;
}
