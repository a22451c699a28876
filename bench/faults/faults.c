/* Counts the file operations of a process under one folder, and lets the nth fail.
 *
 * Preloaded (LD_PRELOAD), it stands before libc. `faults_arm` starts the count, for this process and
 * those that it forks. What goes round libc's functions is not seen: system calls of assembler or
 * `syscall`, io_uring, stores to mapped files, and the flush of a stdio stream that is not one of
 * fwrite, fputs, fputc, fprintf, fflush or fclose.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CHANGES = 1, READS = 2 };
enum { SPACE = true, NO_SPACE = false }; /* whether an operation takes space on the disk */
enum mode {
    COUNT,
    FAIL_ONCE,   /* the nth operation */
    FAIL_ON,     /* the nth, and all later ones that take space, as on a full disk */
    KILL_BEFORE, /* the nth */
    KILL_AFTER   /* the nth, of a write half */
};
enum verdict { GO, FAIL, HALF, DIE }; /* HALF: a write gets half of its bytes, all else fails */

static char folder[PATH_MAX];
static int classes, error_number, log_file = -1;
static enum mode mode;
static long target;
static atomic_long *count; /* shared with forked processes */

static void die(void) { syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); }

/* Counts operations of `counted_classes` under `path` from now on, and appends each to `log_path`;
 * the `nth` fails with `error`, an errno, or ends the process, as `how` says. */
void faults_arm(const char *path, int counted_classes, int how, int error, long nth,
                const char *log_path) {
    count = mmap(NULL, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    log_file = (int)syscall(SYS_openat, AT_FDCWD, log_path,
                            O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    mode = (enum mode)how, error_number = error, target = nth, classes = counted_classes;
    snprintf(folder, sizeof folder, "%s", path);
}

/* Stops counting; returns the number of operations. */
long faults_disarm(void) {
    classes = 0;
    return count == NULL ? 0 : atomic_load(count);
}

static bool is_inside(const char *path) {
    size_t length = strlen(folder);
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* The path of an open file, or of the current folder for AT_FDCWD. */
static bool path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

/* Counts an operation on `name` as seen from the folder `fd`, or on the file `fd` if there is none,
 * and decides what becomes of it. Sets errno if that is FAIL. */
static enum verdict step(int class, bool takes_space, const char *what, int fd, const char *name) {
    if (!(classes & class))
        return GO;
    int before = errno;
    char path[2 * PATH_MAX];
    if (name != NULL && name[0] == '/')
        snprintf(path, sizeof path, "%s", name);
    else if (!path_of(fd, path))
        return errno = before, GO;
    else if (name != NULL && name[0] != 0)
        snprintf(path + strlen(path), PATH_MAX, "/%s", name);
    errno = before;
    if (!is_inside(path))
        return GO;
    long n = atomic_fetch_add(count, 1) + 1;
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", n, what, path + strlen(folder));
    syscall(SYS_write, log_file, line, (size_t)length);
    errno = before;
    if (n == target && mode == KILL_BEFORE)
        die();
    if (n == target && mode == KILL_AFTER)
        return DIE;
    bool fails = n == target && (mode == FAIL_ONCE || mode == FAIL_ON);
    if (!fails && !(n > target && mode == FAIL_ON && takes_space))
        return GO;
    errno = error_number;
    return fails && mode == FAIL_ON ? HALF : FAIL;
}

#define REAL(name) \
    ({ \
        static __typeof__(&name) found; \
        if (found == NULL) \
            found = (__typeof__(&name))dlsym(RTLD_NEXT, #name); \
        found; \
    })

/* Returns `failure`, or the result of `call`. */
#define GUARDED(type, failure, decision, call) \
    do { \
        enum verdict fate = decision; \
        if (fate == FAIL || fate == HALF) \
            return failure; \
        type result = call; \
        if (fate == DIE) \
            die(); \
        return result; \
    } while (0)

/* The same of a call that ends in any case, as close does. */
#define GUARDED_END(failure, decision, call) \
    do { \
        enum verdict fate = decision; \
        int error = errno, result = call; \
        if (fate == DIE) \
            die(); \
        if (fate == FAIL || fate == HALF) \
            return errno = error, failure; \
        return result; \
    } while (0)

static bool writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

static enum verdict step_open(int fd, const char *path, int flags) {
    return writes(flags) ? step(CHANGES, SPACE, "open-write", fd, path)
                         : step(READS, NO_SPACE, "open", fd, path);
}

static enum verdict step_close(int fd) {
    if (!classes)
        return GO;
    int before = errno;
    long flags = syscall(SYS_fcntl, fd, F_GETFL);
    errno = before;
    return flags >= 0 && writes((int)flags) ? step(CHANGES, NO_SPACE, "close", fd, NULL) : GO;
}

#define OPTIONAL_MODE \
    mode_t mode_ = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list list; \
        va_start(list, flags); \
        mode_ = (mode_t)va_arg(list, int); \
        va_end(list); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        OPTIONAL_MODE \
        GUARDED(int, -1, step_open(AT_FDCWD, path, flags), REAL(name)(path, flags, mode_)); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int fd, const char *path, int flags, ...) { \
        OPTIONAL_MODE \
        GUARDED(int, -1, step_open(fd, path, flags), REAL(name)(fd, path, flags, mode_)); \
    }
OPENAT(openat)
OPENAT(openat64)

int __open_2(const char *path, int flags);
int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags);
int __open64_2(const char *path, int flags) { return open64(path, flags); }

#define CREAT(name) \
    int name(const char *path, mode_t bits) { \
        GUARDED(int, -1, step(CHANGES, SPACE, "open-write", AT_FDCWD, path), \
                REAL(name)(path, bits)); \
    }
CREAT(creat)
CREAT(creat64)

int close(int fd) { GUARDED_END(-1, step_close(fd), REAL(close)(fd)); }

/* The write that fills the disk, and one that is killed, get as far as half of the bytes. */
#define WRITE(name, what, parameters, arguments_half, arguments) \
    ssize_t name parameters { \
        enum verdict verdict = step(CHANGES, SPACE, what, fd, NULL); \
        if (verdict == GO) \
            return REAL(name) arguments; \
        ssize_t done = verdict == FAIL || size < 2 ? -1 : REAL(name) arguments_half; \
        if (verdict == DIE) \
            die(); \
        return done; \
    }
WRITE(write, "write", (int fd, const void *data, size_t size), (fd, data, size / 2),
      (fd, data, size))
WRITE(pwrite, "write", (int fd, const void *data, size_t size, off_t at),
      (fd, data, size / 2, at), (fd, data, size, at))
WRITE(pwrite64, "write", (int fd, const void *data, size_t size, off64_t at),
      (fd, data, size / 2, at), (fd, data, size, at))
WRITE(writev, "write", (int fd, const struct iovec *data, int size), (fd, data, size / 2),
      (fd, data, size))
WRITE(pwritev, "write", (int fd, const struct iovec *data, int size, off_t at),
      (fd, data, size / 2, at), (fd, data, size, at))

#define READ(name, parameters, arguments) \
    ssize_t name parameters { \
        GUARDED(ssize_t, -1, step(READS, NO_SPACE, "read", fd, NULL), REAL(name) arguments); \
    }
READ(read, (int fd, void *data, size_t size), (fd, data, size))
READ(pread, (int fd, void *data, size_t size, off_t at), (fd, data, size, at))
READ(pread64, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at))
READ(readv, (int fd, const struct iovec *data, int size), (fd, data, size))

#define CHANGE(what, name, space, fd, path, parameters, arguments) \
    int name parameters { \
        GUARDED(int, -1, step(CHANGES, space, what, fd, path), REAL(name) arguments); \
    }
#define AT AT_FDCWD
CHANGE("truncate", ftruncate, SPACE, fd, NULL, (int fd, off_t size), (fd, size))
CHANGE("truncate", ftruncate64, SPACE, fd, NULL, (int fd, off64_t size), (fd, size))
CHANGE("truncate", truncate, SPACE, AT, path, (const char *path, off_t size), (path, size))
CHANGE("allocate", fallocate, SPACE, fd, NULL, (int fd, int how, off_t at, off_t size),
       (fd, how, at, size))
CHANGE("sync", fsync, NO_SPACE, fd, NULL, (int fd), (fd))
CHANGE("sync", fdatasync, NO_SPACE, fd, NULL, (int fd), (fd))
CHANGE("rename", rename, NO_SPACE, AT, from, (const char *from, const char *to), (from, to))
CHANGE("rename", renameat, NO_SPACE, fd, from,
       (int fd, const char *from, int to_fd, const char *to), (fd, from, to_fd, to))
CHANGE("rename", renameat2, NO_SPACE, fd, from,
       (int fd, const char *from, int to_fd, const char *to, unsigned how),
       (fd, from, to_fd, to, how))
CHANGE("link", link, SPACE, AT, to, (const char *from, const char *to), (from, to))
CHANGE("link", linkat, SPACE, to_fd, to,
       (int fd, const char *from, int to_fd, const char *to, int how), (fd, from, to_fd, to, how))
CHANGE("link", symlink, SPACE, AT, to, (const char *from, const char *to), (from, to))
CHANGE("link", symlinkat, SPACE, fd, to, (const char *from, int fd, const char *to),
       (from, fd, to))
CHANGE("unlink", unlink, NO_SPACE, AT, path, (const char *path), (path))
CHANGE("unlink", unlinkat, NO_SPACE, fd, path, (int fd, const char *path, int how),
       (fd, path, how))
CHANGE("unlink", remove, NO_SPACE, AT, path, (const char *path), (path))
CHANGE("rmdir", rmdir, NO_SPACE, AT, path, (const char *path), (path))
CHANGE("mkdir", mkdir, SPACE, AT, path, (const char *path, mode_t bits), (path, bits))
CHANGE("mkdir", mkdirat, SPACE, fd, path, (int fd, const char *path, mode_t bits),
       (fd, path, bits))
CHANGE("chmod", chmod, NO_SPACE, AT, path, (const char *path, mode_t bits), (path, bits))
CHANGE("chmod", fchmod, NO_SPACE, fd, NULL, (int fd, mode_t bits), (fd, bits))
CHANGE("chmod", fchmodat, NO_SPACE, fd, path, (int fd, const char *path, mode_t bits, int how),
       (fd, path, bits, how))
CHANGE("touch", utimensat, NO_SPACE, fd, path,
       (int fd, const char *path, const struct timespec times[2], int how), (fd, path, times, how))
CHANGE("touch", futimens, NO_SPACE, fd, NULL, (int fd, const struct timespec times[2]),
       (fd, times))

/* They return the error. */
#define ALLOCATE(name, offset) \
    int name(int fd, offset at, offset size) { \
        GUARDED(int, errno, step(CHANGES, SPACE, "allocate", fd, NULL), REAL(name)(fd, at, size)); \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

ssize_t copy_file_range(int from, off64_t *from_at, int fd, off64_t *at, size_t size, unsigned how) {
    GUARDED(ssize_t, -1, step(CHANGES, SPACE, "copy", fd, NULL),
            REAL(copy_file_range)(from, from_at, fd, at, size, how));
}
#define SENDFILE(name, offset) \
    ssize_t name(int fd, int from, offset *at, size_t size) { \
        GUARDED(ssize_t, -1, step(CHANGES, SPACE, "copy", fd, NULL), \
                REAL(name)(fd, from, at, size)); \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

#define MMAP(name, offset) \
    void *name(void *place, size_t size, int access, int flags, int fd, offset at) { \
        enum verdict found = GO; \
        if (fd >= 0) \
            found = (flags & MAP_SHARED) && (access & PROT_WRITE) \
                          ? step(CHANGES, SPACE, "map-write", fd, NULL) \
                          : step(READS, NO_SPACE, "map", fd, NULL); \
        GUARDED(void *, MAP_FAILED, found, \
                REAL(name)(place, size, access, flags, fd, at)); \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)
CHANGE("sync", msync, NO_SPACE, -1, NULL, (void *place, size_t size, int how), (place, size, how))

#define LOOK(name, fd, path, parameters, arguments) \
    int name parameters { \
        GUARDED(int, -1, step(READS, NO_SPACE, "stat", fd, path), REAL(name) arguments); \
    }
LOOK(stat, AT, path, (const char *path, struct stat *found), (path, found))
LOOK(stat64, AT, path, (const char *path, struct stat64 *found), (path, found))
LOOK(lstat, AT, path, (const char *path, struct stat *found), (path, found))
LOOK(lstat64, AT, path, (const char *path, struct stat64 *found), (path, found))
LOOK(fstat, fd, NULL, (int fd, struct stat *found), (fd, found))
LOOK(fstat64, fd, NULL, (int fd, struct stat64 *found), (fd, found))
LOOK(fstatat, fd, path, (int fd, const char *path, struct stat *found, int how),
     (fd, path, found, how))
LOOK(fstatat64, fd, path, (int fd, const char *path, struct stat64 *found, int how),
     (fd, path, found, how))
LOOK(statx, fd, path,
     (int fd, const char *path, int how, unsigned mask, struct statx *found),
     (fd, path, how, mask, found))
LOOK(access, AT, path, (const char *path, int how), (path, how))
LOOK(faccessat, fd, path, (int fd, const char *path, int bits, int how), (fd, path, bits, how))

/* Of libraries that were built against a glibc before 2.33. */
int __xstat64(int version, const char *path, struct stat64 *found);
int __lxstat64(int version, const char *path, struct stat64 *found);
int __fxstat64(int version, int fd, struct stat64 *found);
LOOK(__xstat64, AT, path, (int version, const char *path, struct stat64 *found),
     (version, path, found))
LOOK(__lxstat64, AT, path, (int version, const char *path, struct stat64 *found),
     (version, path, found))
LOOK(__fxstat64, fd, NULL, (int version, int fd, struct stat64 *found), (version, fd, found))

ssize_t readlink(const char *path, char *found, size_t size) {
    GUARDED(ssize_t, -1, step(READS, NO_SPACE, "readlink", AT, path),
            REAL(readlink)(path, found, size));
}
ssize_t readlinkat(int fd, const char *path, char *found, size_t size) {
    GUARDED(ssize_t, -1, step(READS, NO_SPACE, "readlink", fd, path),
            REAL(readlinkat)(fd, path, found, size));
}
DIR *opendir(const char *path) {
    GUARDED(DIR *, NULL, step(READS, NO_SPACE, "open", AT, path), REAL(opendir)(path));
}
struct dirent64 *readdir64(DIR *listed) {
    GUARDED(struct dirent64 *, NULL, step(READS, NO_SPACE, "list", dirfd(listed), NULL),
            REAL(readdir64)(listed));
}
struct dirent *readdir(DIR *listed) {
    GUARDED(struct dirent *, NULL, step(READS, NO_SPACE, "list", dirfd(listed), NULL),
            REAL(readdir)(listed));
}

/* stdio calls the kernel without libc's public functions, so its own are counted. */
static enum verdict step_stream(const char *what, FILE *stream) {
    if (!classes)
        return GO;
    int fd = fileno_unlocked(stream);
    long flags = fd < 0 ? -1 : syscall(SYS_fcntl, fd, F_GETFL);
    return flags >= 0 && writes((int)flags) ? step(CHANGES, SPACE, what, fd, NULL) : GO;
}

#define FOPEN(name) \
    FILE *name(const char *path, const char *how) { \
        bool written = strpbrk(how, "wa+") != NULL; \
        GUARDED(FILE *, NULL, \
                written ? step(CHANGES, SPACE, "open-write", AT, path) \
                        : step(READS, NO_SPACE, "open", AT, path), \
                REAL(name)(path, how)); \
    }
FOPEN(fopen)
FOPEN(fopen64)

size_t fwrite(const void *data, size_t size, size_t number, FILE *stream) {
    GUARDED(size_t, 0, step_stream("write", stream), REAL(fwrite)(data, size, number, stream));
}
int fputs(const char *text, FILE *stream) {
    GUARDED(int, EOF, step_stream("write", stream), REAL(fputs)(text, stream));
}
int fputc(int character, FILE *stream) {
    GUARDED(int, EOF, step_stream("write", stream), REAL(fputc)(character, stream));
}
int vfprintf(FILE *stream, const char *format, va_list list) {
    GUARDED(int, -1, step_stream("write", stream), REAL(vfprintf)(stream, format, list));
}
int fprintf(FILE *stream, const char *format, ...) {
    va_list list;
    va_start(list, format);
    int written = vfprintf(stream, format, list);
    va_end(list);
    return written;
}
int fflush(FILE *stream) {
    GUARDED(int, EOF, stream == NULL ? GO : step_stream("write", stream), REAL(fflush)(stream));
}
int fclose(FILE *stream) {
    GUARDED_END(EOF, step_stream("close", stream), REAL(fclose)(stream));
}
size_t fread(void *data, size_t size, size_t number, FILE *stream) {
    GUARDED(size_t, 0,
            classes ? step(READS, NO_SPACE, "read", fileno_unlocked(stream), NULL) : GO,
            REAL(fread)(data, size, number, stream));
}
