// A layer between a program and its files, by LD_PRELOAD: while the file that $UNREADABLE names is there, reads of whatever file's path holds the text
// in it fail with EIO, as those of a disk that is going do.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static int fails(int file) {
    const char *named = getenv("UNREADABLE");
    int told = named ? open(named, O_RDONLY | O_CLOEXEC) : -1;
    if (told < 0) return 0;
    char text[PATH_MAX] = "", link[64], path[PATH_MAX] = "";
    long length = syscall(SYS_read, told, text, sizeof text - 1);
    close(told);
    if (length <= 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, path, sizeof path - 1) < 0 || !strstr(path, text)) return 0;
    errno = EIO;
    return 1;
}

#define LAYER(type, name, parameters, arguments, file)                  \
    type name parameters {                                              \
        int before = errno;                                             \
        if (fails(file)) return -1;                                     \
        errno = before;                                                 \
        static type (*next) parameters;                                 \
        if (!next) next = (type(*) parameters)dlsym(RTLD_NEXT, #name);  \
        return next arguments;                                          \
    }

LAYER(ssize_t, read, (int fd, void *to, size_t count), (fd, to, count), fd)
LAYER(ssize_t, pread, (int fd, void *to, size_t count, off_t at), (fd, to, count, at), fd)
LAYER(ssize_t, pread64, (int fd, void *to, size_t count, off64_t at), (fd, to, count, at), fd)
LAYER(ssize_t, readv, (int fd, const struct iovec *to, int count), (fd, to, count), fd)
LAYER(ssize_t, preadv64, (int fd, const struct iovec *to, int count, off64_t at), (fd, to, count, at), fd)
LAYER(ssize_t, sendfile64, (int out, int fd, off64_t *at, size_t count), (out, fd, at, count), fd)
LAYER(ssize_t, copy_file_range, (int fd, off64_t *at, int out, off64_t *to, size_t count, unsigned flags), (fd, at, out, to, count, flags), fd)
