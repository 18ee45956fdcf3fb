/* Notes what a loss of power would leave of POWER_ROOT: the contents of files as of their last fsync, the names in folders
   as of the folder's last fsync, and at each step the names that there are. Records go to POWER_RECORDS, in order. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int step;
static FILE *listing;

/* A number of an inode is given out again, with another time of birth. */
static int identity(const char *path, char *out, size_t length, char *kind) {
    struct statx found;
    if (statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_BTIME | STATX_INO | STATX_TYPE, &found)) return -1;
    snprintf(out, length, "%llu-%lld-%u", (unsigned long long)found.stx_ino, (long long)found.stx_btime.tv_sec,
             found.stx_btime.tv_nsec);
    *kind = S_ISDIR(found.stx_mode) ? 'd' : S_ISLNK(found.stx_mode) ? 'l' : 'f';
    return 0;
}

static FILE *record(const char *what, const char *key) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%06d %s %s", getenv("POWER_RECORDS"), step, what, key);
    return fopen(path, "wb");
}

static void entry(FILE *file, const char *path, const char *name) {
    char key[80], kind;
    if (!identity(path, key, sizeof key, &kind)) fprintf(file, "%c %s %s\n", kind, key, name);
}

static int visit(const char *path, const struct stat *found, int type, struct FTW *walk) {
    const char *root = getenv("POWER_ROOT");
    if (strcmp(path, root)) entry(listing, path, path + strlen(root) + 1);
    return 0;
}

static void names_now(void) {
    step++;
    if (!(listing = record("names", "now"))) return;
    nftw(getenv("POWER_ROOT"), visit, 16, FTW_PHYS);
    fclose(listing);
}

static void keep(int descriptor) {
    char link[64], path[4096], key[80], kind, block[65536], inner[8192];
    const char *root = getenv("POWER_ROOT");
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return;
    path[length] = 0;
    if (strncmp(path, root, strlen(root)) || identity(path, key, sizeof key, &kind)) return;
    pthread_mutex_lock(&lock);
    names_now();
    if (kind == 'd') {
        FILE *file = record(strcmp(path, root) ? "folder" : "root", key);
        DIR *folder = opendir(path);
        for (struct dirent *one; folder && file && (one = readdir(folder));) {
            if (!strcmp(one->d_name, ".") || !strcmp(one->d_name, "..")) continue;
            snprintf(inner, sizeof inner, "%s/%s", path, one->d_name);
            entry(file, inner, one->d_name);
        }
        if (folder) closedir(folder);
        if (file) fclose(file);
    } else {
        FILE *file = record("file", key);
        int reading = open(path, O_RDONLY);
        for (ssize_t got; file && reading >= 0 && (got = read(reading, block, sizeof block)) > 0;)
            fwrite(block, 1, got, file);
        if (reading >= 0) close(reading);
        if (file) fclose(file);
    }
    pthread_mutex_unlock(&lock);
}

static int synced(int descriptor, long call) {
    struct stat found;
    const char *refused = getenv("POWER_FOLDER_ERRNO"), *failing = getenv("POWER_FILE_ERRNO");
    if (!fstat(descriptor, &found)) {
        if (S_ISDIR(found.st_mode) ? refused : failing) {
            errno = atoi(S_ISDIR(found.st_mode) ? refused : failing);
            return -1;
        }
    }
    int result = syscall(call, descriptor);
    if (!result && getenv("POWER_ROOT")) keep(descriptor);
    return result;
}

int fsync(int descriptor) { return synced(descriptor, SYS_fsync); }
int fdatasync(int descriptor) { return synced(descriptor, SYS_fdatasync); }

static int renamed(int result) {
    if (!result && getenv("POWER_ROOT")) {
        pthread_mutex_lock(&lock);
        names_now();
        pthread_mutex_unlock(&lock);
    }
    return result;
}

int rename(const char *from, const char *to) {
    return renamed(syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}
int renameat(int a, const char *from, int b, const char *to) { return renamed(syscall(SYS_renameat2, a, from, b, to, 0)); }
