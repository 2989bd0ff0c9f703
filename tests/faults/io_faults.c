/* An LD_PRELOAD library: the n-th operation that changes a file under a folder fails, is cut short, or is the last thing
 * the process does. Built and loaded by tests/faults/writes.py; does nothing until io_faults_arm is called.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { FAIL, SHORT, KILL_BEFORE, KILL_AFTER, KILL_MIDDLE };

static char folder[PATH_MAX];
static long fail_at; /* 0: count only */
static int what, error, from_then_on;
static atomic_long seen;
static atomic_int armed;

/* Operations from now on are counted; number `at` (from 1) meets `kind`, with `forever` all after it too. */
void io_faults_arm(const char* under, long at, int kind, int error_number, int forever) {
  snprintf(folder, sizeof folder, "%s", under);
  fail_at = at;
  what = kind;
  error = error_number;
  from_then_on = forever;
  seen = 0;
  armed = 1;
}

long io_faults_disarm(void) {
  armed = 0;
  return seen;
}

static int ours(const char* path) { return path && strncmp(path, folder, strlen(folder)) == 0; }

static int ours_fd(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return ours(path);
}

/* Whether this operation is the one; dies here if it is to die before. */
static int hit(void) {
  const long n = ++seen;
  if (!fail_at || (from_then_on ? n < fail_at : n != fail_at)) return 0;
  if (what == KILL_BEFORE) kill(getpid(), SIGKILL);
  return 1;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define SIMPLE(applies, call)                               \
  const int wrong = armed && applies && hit();              \
  if (wrong && what == FAIL) {                              \
    errno = error;                                          \
    return -1;                                              \
  }                                                         \
  const int result = call;                                  \
  if (wrong && what >= KILL_AFTER) kill(getpid(), SIGKILL); \
  return result

#define WRITE(fd, data, n, whole, part)                        \
  if (!(armed && ours_fd(fd) && hit())) return whole;          \
  if (what == FAIL) {                                          \
    errno = error;                                             \
    return -1;                                                 \
  }                                                            \
  const size_t half = what == KILL_AFTER || n < 2 ? n : n / 2; \
  const ssize_t done = part;                                   \
  if (what >= KILL_AFTER) kill(getpid(), SIGKILL);             \
  return done

ssize_t write(int fd, const void* data, size_t n) {
  REAL(write);
  WRITE(fd, data, n, real(fd, data, n), real(fd, data, half));
}

ssize_t pwrite(int fd, const void* data, size_t n, off_t at) {
  REAL(pwrite);
  WRITE(fd, data, n, real(fd, data, n, at), real(fd, data, half, at));
}

ssize_t pwrite64(int fd, const void* data, size_t n, off64_t at) {
  REAL(pwrite64);
  WRITE(fd, data, n, real(fd, data, n, at), real(fd, data, half, at));
}

int fsync(int fd) {
  REAL(fsync);
  SIMPLE(ours_fd(fd), real(fd));
}

int fdatasync(int fd) {
  REAL(fdatasync);
  SIMPLE(ours_fd(fd), real(fd));
}

int ftruncate(int fd, off_t n) {
  REAL(ftruncate);
  SIMPLE(ours_fd(fd), real(fd, n));
}

int ftruncate64(int fd, off64_t n) {
  REAL(ftruncate64);
  SIMPLE(ours_fd(fd), real(fd, n));
}

int rename(const char* from, const char* to) {
  REAL(rename);
  SIMPLE(ours(to), real(from, to));
}

int renameat(int a, const char* from, int b, const char* to) {
  REAL(renameat);
  SIMPLE(ours(to), real(a, from, b, to));
}

int unlink(const char* path) {
  REAL(unlink);
  SIMPLE(ours(path), real(path));
}

int unlinkat(int at, const char* path, int flags) {
  REAL(unlinkat);
  SIMPLE((at == AT_FDCWD ? ours(path) : ours_fd(at)), real(at, path, flags));
}

int mkdir(const char* path, mode_t mode) {
  REAL(mkdir);
  SIMPLE(ours(path), real(path, mode));
}

int rmdir(const char* path) {
  REAL(rmdir);
  SIMPLE(ours(path), real(path));
}

/* Opening for writing; reading is not what this is about. */
#define OPEN(name, parameters, ...)                                                         \
  int name parameters {                                                                     \
    REAL(name);                                                                             \
    va_list list;                                                                           \
    va_start(list, flags);                                                                  \
    const mode_t mode = flags & O_CREAT ? va_arg(list, mode_t) : 0;                         \
    va_end(list);                                                                           \
    SIMPLE((flags & (O_WRONLY | O_RDWR | O_CREAT)) && ours(path), real(__VA_ARGS__, mode)); \
  }
OPEN(open, (const char* path, int flags, ...), path, flags)
OPEN(open64, (const char* path, int flags, ...), path, flags)
OPEN(openat, (int at, const char* path, int flags, ...), at, path, flags)
OPEN(openat64, (int at, const char* path, int flags, ...), at, path, flags)

/* The descriptor is gone in any case; what had been written may be too. */
int close(int fd) {
  REAL(close);
  const int wrong = armed && (fcntl(fd, F_GETFL) & (O_WRONLY | O_RDWR)) && ours_fd(fd) && hit();
  const int result = real(fd);
  if (wrong && what >= KILL_AFTER) kill(getpid(), SIGKILL);
  if (!wrong || what != FAIL) return result;
  errno = error;
  return -1;
}
