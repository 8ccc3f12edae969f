/* Loaded before libc (LD_PRELOAD) in a tool that copies: kills it with its children before its n-th change of a disk.

   $DIES_AT is n; 0 counts alone. Children that are forked count on. Before a write half of it is done. $CHANGES names a
   file that is given one byte for each change. $DIES_ALONE spares the others of the process group. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <dlfcn.h>

static int *changes, dies_at, alone, log_file = -1;

__attribute__((constructor)) static void armed(void) {
  const char *place = getenv("DIES_AT"), *log = getenv("CHANGES");
  dies_at = place ? atoi(place) : 0;
  alone = getenv("DIES_ALONE") != NULL;
  if (log) log_file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  changes = mmap(NULL, sizeof *changes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

static int due(void) {
  if (log_file >= 0) syscall(SYS_write, log_file, ".", 1);
  return __atomic_add_fetch(changes, 1, __ATOMIC_SEQ_CST) == dies_at;
}
static void die(void) {
  syscall(SYS_kill, alone ? syscall(SYS_getpid) : 0, SIGKILL);
  for (;;) syscall(SYS_pause);
}
#define CHANGE if (due()) die()

static int opened(int folder, const char *path, int flags, mode_t permission) {
  if (flags & O_CREAT) CHANGE;
  return syscall(SYS_openat, folder, path, flags, permission);
}
#define PERMISSION mode_t permission = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); permission = va_arg(rest, mode_t); va_end(rest); }
int open(const char *path, int flags, ...) { PERMISSION return opened(AT_FDCWD, path, flags, permission); }
int open64(const char *path, int flags, ...) { PERMISSION return opened(AT_FDCWD, path, flags, permission); }
int openat(int folder, const char *path, int flags, ...) { PERMISSION return opened(folder, path, flags, permission); }
int openat64(int folder, const char *path, int flags, ...) { PERMISSION return opened(folder, path, flags, permission); }

static int (*real(const char *name))(char *) { return (int (*)(char *))dlsym(RTLD_NEXT, name); }
int mkstemp(char *name) { CHANGE; return real("mkstemp")(name); }
int mkstemp64(char *name) { CHANGE; return real("mkstemp64")(name); }

ssize_t write(int file, const void *from, size_t length) {
  struct stat found;
  if (fstat(file, &found) == 0 && S_ISREG(found.st_mode) && due()) {
    syscall(SYS_write, file, from, length / 2);
    die();
  }
  return syscall(SYS_write, file, from, length);
}
int ftruncate(int file, off_t length) { CHANGE; return syscall(SYS_ftruncate, file, length); }
int ftruncate64(int file, off64_t length) { CHANGE; return syscall(SYS_ftruncate, file, length); }
int mkdir(const char *path, mode_t mode) { CHANGE; return syscall(SYS_mkdirat, AT_FDCWD, path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { CHANGE; return syscall(SYS_mkdirat, folder, path, mode); }
int unlink(const char *path) { CHANGE; return syscall(SYS_unlinkat, AT_FDCWD, path, 0); }
int rmdir(const char *path) { CHANGE; return syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR); }
int unlinkat(int folder, const char *path, int flags) { CHANGE; return syscall(SYS_unlinkat, folder, path, flags); }
int rename(const char *from, const char *to) { CHANGE; return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { CHANGE; return syscall(SYS_renameat2, a, from, b, to, 0); }
int chmod(const char *path, mode_t mode) { CHANGE; return syscall(SYS_fchmodat, AT_FDCWD, path, mode); }
int fchmod(int file, mode_t mode) { CHANGE; return syscall(SYS_fchmod, file, mode); }
int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
  CHANGE;
  return syscall(SYS_utimensat, folder, path, times, flags);
}
