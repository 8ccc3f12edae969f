/* Loaded before libc (LD_PRELOAD): counts the calls that touch files below one folder, and lets one of them fail.

   call_fail() arms it. The `position`-th counted call fails with an errno, before it is done or after; or the process
   dies there. Every counted call is written to a log, "NAME PATH", so that a first run tells how many there are. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BEFORE, AFTER, KILL_BEFORE, KILL_AFTER };
#define MOST_FILES 4096

static char root[PATH_MAX];
static size_t root_length;
static int armed, position, failure, mode, sticky, log_file = -1, trace_data;
static int calls; /* counted so far */
static char names[MOST_FILES][512];
static unsigned char is_below[MOST_FILES];
static long clock_offset;

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int below(int folder, const char *path, char *full) {
  char text[2 * PATH_MAX];
  if (!armed || !path) return 0;
  if (path[0] == '/') snprintf(text, sizeof text, "%s", path);
  else if (folder == AT_FDCWD) {
    if (syscall(SYS_getcwd, text, PATH_MAX) < 0) return 0;
    size_t length = strlen(text);
    snprintf(text + length, sizeof text - length, "/%s", path);
  } else if (folder >= 0 && folder < MOST_FILES && is_below[folder])
    snprintf(text, sizeof text, "%s/%s", names[folder], path);
  else return 0;
  if (strncmp(text, root, root_length) || (text[root_length] != '/' && text[root_length])) return 0;
  snprintf(full, 512, "%s", text);
  return 1;
}

static void record(const char *name, const char *path, const char *second) {
  char line[1200];
  if (log_file < 0) return;
  int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", name, path, second);
  syscall(SYS_write, log_file, line, length < (int)sizeof line ? length : (int)sizeof line - 1);
}

/* Return whether this call is the one. */
static int due(const char *name, const char *path, const char *second) {
  int mine = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
  record(name, path, second);
  int now = position && (mine == position || (sticky && mine > position));
  if (now && mode == KILL_BEFORE) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
  return now;
}

#define FAILING(result_type, is_counted, name, path, second, call) \
  if (!(armed && (is_counted))) return call; \
  int now = due(name, path, second); \
  if (now && mode == BEFORE) { errno = failure; return (result_type)-1; } \
  result_type result = call; \
  if (now && mode == KILL_AFTER) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); \
  if (now && mode == AFTER) { errno = failure; return (result_type)-1; } \
  return result

void call_fail(const char *folder, int place, int number, int how, int stays, int log, int data) {
  snprintf(root, sizeof root, "%s", folder);
  root_length = strlen(root);
  position = place, failure = number, mode = how, sticky = stays, log_file = log, trace_data = data;
  calls = 0;
  armed = 1;
}
int calls_counted(void) { armed = 0; return calls; }
void shift_clock(long seconds) { clock_offset = seconds; }

int clock_gettime(clockid_t which, struct timespec *now) {
  int result = syscall(SYS_clock_gettime, which, now);
  if (clock_offset && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += clock_offset;
  return result;
}

static int opened(int folder, const char *path, int flags, mode_t permission) {
  char full[512];
  int counted = below(folder, path, full);
  int descriptor;
  if (counted) {
    int now = due("open", full, flags & O_CREAT ? "create" : "");
    if (now && mode == BEFORE) { errno = failure; return -1; }
    descriptor = syscall(SYS_openat, folder, path, flags, permission);
    if (now && mode == KILL_AFTER) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    if (now && mode == AFTER) { if (descriptor >= 0) syscall(SYS_close, descriptor); errno = failure; return -1; }
  } else descriptor = syscall(SYS_openat, folder, path, flags, permission);
  if (descriptor >= 0 && descriptor < MOST_FILES) {
    is_below[descriptor] = counted;
    if (counted) memcpy(names[descriptor], full, 512);
  }
  return descriptor;
}
#define PERMISSION mode_t permission = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); permission = va_arg(rest, mode_t); va_end(rest); }
int open(const char *path, int flags, ...) { PERMISSION return opened(AT_FDCWD, path, flags, permission); }
int open64(const char *path, int flags, ...) { PERMISSION return opened(AT_FDCWD, path, flags, permission); }
int openat(int folder, const char *path, int flags, ...) { PERMISSION return opened(folder, path, flags, permission); }
int openat64(int folder, const char *path, int flags, ...) { PERMISSION return opened(folder, path, flags, permission); }

#define OURS(d) ((d) >= 0 && (d) < MOST_FILES && is_below[d])
ssize_t read(int d, void *to, size_t n) { FAILING(ssize_t, OURS(d), "read", names[d], "", syscall(SYS_read, d, to, n)); }
ssize_t write(int d, const void *from, size_t n) {
  char second[64] = "";
  if (armed && OURS(d) && trace_data) {
    snprintf(second, sizeof second, "%ld %zu", (long)syscall(SYS_lseek, d, 0, SEEK_CUR), n);
  }
  FAILING(ssize_t, OURS(d), "write", names[d], second, syscall(SYS_write, d, from, n));
}
int fsync(int d) { FAILING(int, OURS(d), "fsync", names[d], "", syscall(SYS_fsync, d)); }
int fdatasync(int d) { FAILING(int, OURS(d), "fsync", names[d], "", syscall(SYS_fdatasync, d)); }
int fchmod(int d, mode_t m) { FAILING(int, OURS(d), "fchmod", names[d], "", syscall(SYS_fchmod, d, m)); }
int ftruncate(int d, off_t n) { FAILING(int, OURS(d), "ftruncate", names[d], "", syscall(SYS_ftruncate, d, n)); }
int ftruncate64(int d, off64_t n) { FAILING(int, OURS(d), "ftruncate", names[d], "", syscall(SYS_ftruncate, d, n)); }
int flock(int d, int how) { FAILING(int, OURS(d), "flock", names[d], "", syscall(SYS_flock, d, how)); }
static int closed(int d) { if (d >= 0 && d < MOST_FILES) is_below[d] = 0; return syscall(SYS_close, d); }
int close(int d) {
  char name[512] = "";
  int counted = armed && OURS(d);
  if (!counted) return closed(d);
  memcpy(name, names[d], 512);
  int now = due("close", name, "");
  int result = closed(d); /* Linux closes it whatever it reports */
  if (now && mode == KILL_AFTER) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
  if (now && mode <= AFTER) { errno = failure; return -1; }
  return result;
}

#define ONE(name, real_call, folder, path) \
  char full[512]; FAILING(int, below(folder, path, full), name, full, "", real_call)
int mkdir(const char *p, mode_t m) { ONE("mkdir", syscall(SYS_mkdirat, AT_FDCWD, p, m), AT_FDCWD, p); }
int mkdirat(int f, const char *p, mode_t m) { ONE("mkdir", syscall(SYS_mkdirat, f, p, m), f, p); }
int unlink(const char *p) { ONE("unlink", syscall(SYS_unlinkat, AT_FDCWD, p, 0), AT_FDCWD, p); }
int rmdir(const char *p) { ONE("rmdir", syscall(SYS_unlinkat, AT_FDCWD, p, AT_REMOVEDIR), AT_FDCWD, p); }
int unlinkat(int f, const char *p, int flags) { ONE("unlink", syscall(SYS_unlinkat, f, p, flags), f, p); }
int chmod(const char *p, mode_t m) { ONE("chmod", syscall(SYS_fchmodat, AT_FDCWD, p, m), AT_FDCWD, p); }
int fchmodat(int f, const char *p, mode_t m, int flags) { ONE("chmod", syscall(SYS_fchmodat, f, p, m, flags), f, p); }
#define TWO(name, real_call, from_folder, from, to_folder, to) \
  char first[512] = "", second[512] = ""; \
  int counted = below(from_folder, from, first) | below(to_folder, to, second); \
  FAILING(int, counted, name, first, second, real_call)
int rename(const char *a, const char *b) { TWO("rename", syscall(SYS_renameat2, AT_FDCWD, a, AT_FDCWD, b, 0), AT_FDCWD, a, AT_FDCWD, b); }
int renameat(int f, const char *a, int g, const char *b) { TWO("rename", syscall(SYS_renameat2, f, a, g, b, 0), f, a, g, b); }
int link(const char *a, const char *b) { TWO("link", syscall(SYS_linkat, AT_FDCWD, a, AT_FDCWD, b, 0), AT_FDCWD, a, AT_FDCWD, b); }
int linkat(int f, const char *a, int g, const char *b, int flags) { TWO("link", syscall(SYS_linkat, f, a, g, b, flags), f, a, g, b); }

DIR *opendir(const char *path) {
  REAL(opendir);
  char full[512];
  if (armed && below(AT_FDCWD, path, full) && due("opendir", full, "") && mode <= AFTER) { errno = failure; return NULL; }
  return real(path);
}
DIR *fdopendir(int d) {
  REAL(fdopendir);
  if (armed && OURS(d) && due("opendir", names[d], "") && mode <= AFTER) { errno = failure; return NULL; }
  return real(d);
}
#define STAT(name, structure, flags) \
  int name(const char *path, structure *found) { \
    REAL(name); char full[512]; \
    FAILING(int, below(AT_FDCWD, path, full), "stat", full, "", real(path, found)); }
STAT(stat, struct stat, 0)
STAT(stat64, struct stat64, 0)
STAT(lstat, struct stat, 0)
STAT(lstat64, struct stat64, 0)
int fstat(int d, struct stat *found) { REAL(fstat); FAILING(int, OURS(d), "fstat", names[d], "", real(d, found)); }
int fstat64(int d, struct stat64 *found) { REAL(fstat64); FAILING(int, OURS(d), "fstat", names[d], "", real(d, found)); }
int access(const char *p, int how) { ONE("access", syscall(SYS_faccessat, AT_FDCWD, p, how), AT_FDCWD, p); }
