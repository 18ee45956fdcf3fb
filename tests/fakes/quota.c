/* A quota that is used up: while the file QUOTA_USED_UP exists, nothing can be written to files below QUOTA_ROOT. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int refused(int descriptor) {
    char link[64], path[4096];
    struct stat found;
    const char *root = getenv("QUOTA_ROOT"), *mark = getenv("QUOTA_USED_UP");
    int before = errno, full;
    if (!root || !mark || access(mark, F_OK) || fstat(descriptor, &found) || !S_ISREG(found.st_mode)) {
        errno = before;
        return 0;
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    full = length > 0 && !strncmp(path, root, strlen(root));
    errno = full ? EDQUOT : before;
    return full;
}

#define GUARDED(result, name, parameters, arguments)                                \
    result name parameters {                                                        \
        static result(*real) parameters;                                            \
        if (!real) real = (result(*) parameters)dlsym(RTLD_NEXT, #name);            \
        return refused(descriptor) ? -1 : real arguments;                           \
    }

GUARDED(ssize_t, write, (int descriptor, const void *data, size_t size), (descriptor, data, size))
GUARDED(ssize_t, pwrite, (int descriptor, const void *data, size_t size, off_t at), (descriptor, data, size, at))
GUARDED(ssize_t, pwrite64, (int descriptor, const void *data, size_t size, off64_t at), (descriptor, data, size, at))
GUARDED(ssize_t, sendfile, (int descriptor, int source, off_t *at, size_t size), (descriptor, source, at, size))
GUARDED(ssize_t, sendfile64, (int descriptor, int source, off64_t *at, size_t size), (descriptor, source, at, size))
GUARDED(ssize_t, writev, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count))
