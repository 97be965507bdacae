/* Faults in file operations, for LD_PRELOAD.
 *
 * All processes of a command share one struct Plan, mapped from the file that FAULTS_PLAN names. Operations that touch
 * what lies below the plan's root are counted over all of them, and the one with the plan's number goes wrong: the
 * process is killed, or the call fails. A write that goes wrong has written the first half of its bytes, as on a disk
 * that fills up. Waiting for the disk is counted, but not done: what a killed process has written stays. preload.py has
 * the same struct. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h> /* one of its calls passes by the functions below */
#include <sys/uio.h>
#include <unistd.h>

enum Kind { NONE, COUNT, KILL, FULL, BROKEN, UNREADABLE };

/* What an operation does decides which kinds of fault it can meet. */
enum Operation { TAKES_SPACE, CHANGES, READS, OPERATIONS };

struct Plan {
  int64_t kind;
  int64_t at;                 /* number of the operation that goes wrong, from 1 */
  int64_t lasting;            /* whether all later ones do, too */
  int64_t counts[OPERATIONS]; /* operations so far, of each sort */
  int64_t met;                /* those that this kind can meet */
  int64_t fired;              /* those that went wrong */
  char root[1024];
  char what[1024]; /* the first operation that went wrong */
};

static struct Plan *plan;

__attribute__((constructor)) static void find_plan(void) {
  const char *path = getenv("FAULTS_PLAN");
  if (path == NULL) return;
  int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
  if (file < 0) return;
  void *place = mmap(NULL, sizeof(struct Plan), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (place != MAP_FAILED) plan = place;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int armed(void) { return plan != NULL && plan->kind != NONE; }

static int is_below_root(const char *path) {
  if (strstr(path, "/pymp-") != NULL) return 0; /* Python's own folder, which multiprocessing makes and removes */
  size_t length = strlen(plan->root);
  return strncmp(path, plan->root, length) == 0 && (path[length] == '/' || path[length] == '\0');
}

/* The absolute path behind a descriptor; "" if there is none. */
static void path_of(int descriptor, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length < 0 ? 0 : length] = '\0';
}

static void absolute(int folder, const char *path, char *result) {
  if (path[0] == '/') {
    snprintf(result, PATH_MAX, "%s", path);
    return;
  }
  char base[PATH_MAX];
  if (folder == AT_FDCWD) {
    if (getcwd(base, sizeof base) == NULL) base[0] = '\0';
  } else {
    path_of(folder, base);
  }
  size_t length = strlen(base);
  snprintf(result, PATH_MAX, "%s", base);
  snprintf(result + length, PATH_MAX - length, "/%s", path);
}

static int applies(enum Operation operation) {
  switch (plan->kind) {
    case COUNT: return 0;
    case FULL: return operation == TAKES_SPACE;
    case UNREADABLE: return operation == READS;
    default: return operation != READS;
  }
}

/* 0, or the kind of fault that this operation has to meet. */
static int64_t meets(enum Operation operation, const char *name, const char *path) {
  if (!is_below_root(path)) return NONE;
  __atomic_add_fetch(&plan->counts[operation], 1, __ATOMIC_SEQ_CST);
  if (!applies(operation)) return NONE;
  int64_t number = __atomic_add_fetch(&plan->met, 1, __ATOMIC_SEQ_CST);
  if (plan->lasting ? number < plan->at : number != plan->at) return NONE;
  if (__atomic_fetch_add(&plan->fired, 1, __ATOMIC_SEQ_CST) == 0) {
    snprintf(plan->what, sizeof plan->what, "%s %.900s", name, path);
  }
  return plan->kind;
}

/* Whether the call has to fail, with errno set; a killed process does not return. */
static int fails(int64_t kind) {
  if (kind == NONE) return 0;
  if (kind == KILL) kill(getpid(), SIGKILL);
  errno = kind == FULL ? ENOSPC : EIO;
  return 1;
}

static int fails_at(enum Operation operation, const char *name, int folder, const char *path) {
  if (!armed() || path == NULL) return 0;
  char whole[PATH_MAX];
  absolute(folder, path, whole);
  return fails(meets(operation, name, whole));
}

static int fails_on(enum Operation operation, const char *name, int descriptor) {
  if (!armed()) return 0;
  char path[PATH_MAX];
  path_of(descriptor, path);
  return fails(meets(operation, name, path));
}

/* As fails_on, for a write: the first half of the bytes is written all the same. */
static int64_t meets_writing(const char *name, int descriptor) {
  if (!armed()) return NONE;
  char path[PATH_MAX];
  path_of(descriptor, path);
  return meets(TAKES_SPACE, name, path);
}

static enum Operation opening(int flags) {
  if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) return TAKES_SPACE;
  return (flags & O_ACCMODE) == O_RDONLY ? READS : CHANGES;
}

#define MODE(flags)                                                  \
  mode_t mode = 0;                                                   \
  if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {         \
    va_list rest;                                                    \
    va_start(rest, flags);                                           \
    mode = va_arg(rest, mode_t);                                     \
    va_end(rest);                                                    \
  }

#define OPEN(name)                                                             \
  int name(const char *path, int flags, ...) {                                 \
    MODE(flags)                                                                \
    return fails_at(opening(flags), "open", AT_FDCWD, path) ? -1 : REAL(name)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                        \
  int name(int folder, const char *path, int flags, ...) {                  \
    MODE(flags)                                                             \
    return fails_at(opening(flags), "open", folder, path) ? -1 : REAL(name)(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                       \
  FILE *name(const char *path, const char *mode) {                                        \
    enum Operation operation = mode[0] == 'r' && !strchr(mode, '+') ? READS : TAKES_SPACE; \
    return fails_at(operation, "fopen", AT_FDCWD, path) ? NULL : REAL(name)(path, mode);  \
  }
FOPEN(fopen)
FOPEN(fopen64)

#define LIST(name, parameters, arguments, failing) \
  DIR *name parameters { return failing ? NULL : REAL(name) arguments; }
LIST(opendir, (const char *path), (path), fails_at(READS, "opendir", AT_FDCWD, path))
LIST(fdopendir, (int descriptor), (descriptor), fails_on(READS, "fdopendir", descriptor))

#define READ(name, parameters, arguments)                                   \
  ssize_t name parameters {                                                 \
    return fails_on(READS, #name, descriptor) ? -1 : REAL(name) arguments; \
  }
READ(read, (int descriptor, void *bytes, size_t length), (descriptor, bytes, length))
READ(pread, (int descriptor, void *bytes, size_t length, off_t offset), (descriptor, bytes, length, offset))
READ(pread64, (int descriptor, void *bytes, size_t length, off64_t offset), (descriptor, bytes, length, offset))

ssize_t write(int descriptor, const void *bytes, size_t length) {
  int64_t kind = meets_writing("write", descriptor);
  if (kind != NONE && length > 1) {
    ssize_t written = REAL(write)(descriptor, bytes, length / 2);
    if (kind == FULL && plan->lasting) return written; /* the next one fails */
  }
  return fails(kind) ? -1 : REAL(write)(descriptor, bytes, length);
}

#define PWRITE(name, offset_type)                                                           \
  ssize_t name(int descriptor, const void *bytes, size_t length, offset_type offset) {      \
    int64_t kind = meets_writing(#name, descriptor);                                        \
    if (kind != NONE && length > 1) REAL(name)(descriptor, bytes, length / 2, offset);      \
    return fails(kind) ? -1 : REAL(name)(descriptor, bytes, length, offset);                \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  int64_t kind = meets_writing("writev", descriptor);
  if (kind != NONE && count > 1) REAL(writev)(descriptor, parts, count / 2);
  return fails(kind) ? -1 : REAL(writev)(descriptor, parts, count);
}

size_t fwrite(const void *bytes, size_t size, size_t items, FILE *file) {
  int64_t kind = file == stdout || file == stderr ? NONE : meets_writing("fwrite", fileno(file));
  size_t half = 0;
  if (kind != NONE && items > 1) half = REAL(fwrite)(bytes, size, items / 2, file);
  return fails(kind) ? half : REAL(fwrite)(bytes, size, items, file);
}

#define SENDFILE(name, offset_type)                                                    \
  ssize_t name(int target, int source, offset_type *offset, size_t length) {           \
    return fails_on(TAKES_SPACE, #name, target) ? -1 : REAL(name)(target, source, offset, length); \
  }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int source, off64_t *from, int target, off64_t *to, size_t length, unsigned flags) {
  return fails_on(TAKES_SPACE, "copy_file_range", target)
             ? -1
             : REAL(copy_file_range)(source, from, target, to, length, flags);
}

#define ON_DESCRIPTOR(operation, name, parameters, arguments) \
  int name parameters { return fails_on(operation, #name, descriptor) ? -1 : REAL(name) arguments; }
ON_DESCRIPTOR(TAKES_SPACE, ftruncate, (int descriptor, off_t length), (descriptor, length))
ON_DESCRIPTOR(TAKES_SPACE, ftruncate64, (int descriptor, off64_t length), (descriptor, length))

#define SYNC(name) \
  int name(int descriptor) { return fails_on(TAKES_SPACE, #name, descriptor) ? -1 : 0; }
SYNC(fsync)
SYNC(fdatasync)

#define FALLOCATE(name, type)                                                                \
  int name(int descriptor, type offset, type length) { /* gives the error instead of errno */ \
    return fails_on(TAKES_SPACE, #name, descriptor) ? errno : REAL(name)(descriptor, offset, length); \
  }
FALLOCATE(posix_fallocate, off_t)
FALLOCATE(posix_fallocate64, off64_t)

int close(int descriptor) {
  if (armed()) {
    int flags = fcntl(descriptor, F_GETFL);
    if (flags != -1 && (flags & O_ACCMODE) != O_RDONLY && fails_on(CHANGES, "close", descriptor)) {
      int error = errno;
      REAL(close)(descriptor); /* as Linux does: the descriptor is free whatever close says */
      errno = error;
      return -1;
    }
  }
  return REAL(close)(descriptor);
}

int fclose(FILE *file) {
  int fail = armed() && fileno(file) > 2 && fails_on(CHANGES, "fclose", fileno(file));
  int error = errno, result = REAL(fclose)(file);
  if (!fail) return result;
  errno = error;
  return EOF;
}

#define ON_PATH(operation, name, folder, path, parameters, arguments) \
  int name parameters { return fails_at(operation, #name, folder, path) ? -1 : REAL(name) arguments; }
ON_PATH(TAKES_SPACE, mkdir, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(TAKES_SPACE, mkdirat, folder, path, (int folder, const char *path, mode_t mode), (folder, path, mode))
ON_PATH(TAKES_SPACE, rename, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(TAKES_SPACE, renameat, folder, to, (int old, const char *from, int folder, const char *to),
        (old, from, folder, to))
ON_PATH(TAKES_SPACE, link, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(TAKES_SPACE, symlink, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(TAKES_SPACE, truncate, AT_FDCWD, path, (const char *path, off_t length), (path, length))
ON_PATH(CHANGES, unlink, AT_FDCWD, path, (const char *path), (path))
ON_PATH(CHANGES, unlinkat, folder, path, (int folder, const char *path, int flags), (folder, path, flags))
ON_PATH(CHANGES, rmdir, AT_FDCWD, path, (const char *path), (path))
ON_PATH(CHANGES, chmod, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(CHANGES, utimensat, folder, path,
        (int folder, const char *path, const struct timespec times[2], int flags), (folder, path, times, flags))
ON_PATH(READS, stat, AT_FDCWD, path, (const char *path, struct stat *found), (path, found))
ON_PATH(READS, stat64, AT_FDCWD, path, (const char *path, struct stat64 *found), (path, found))
ON_PATH(READS, lstat, AT_FDCWD, path, (const char *path, struct stat *found), (path, found))
ON_PATH(READS, lstat64, AT_FDCWD, path, (const char *path, struct stat64 *found), (path, found))
ON_PATH(READS, fstatat, folder, path, (int folder, const char *path, struct stat *found, int flags),
        (folder, path, found, flags))
ON_PATH(READS, fstatat64, folder, path, (int folder, const char *path, struct stat64 *found, int flags),
        (folder, path, found, flags))
