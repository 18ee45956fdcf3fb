/* A file system without flock: NO_FLOCK names the error number that it answers. */
#include <errno.h>
#include <stdlib.h>

int flock(int descriptor, int operation) {
    const char *number = getenv("NO_FLOCK");
    errno = number ? atoi(number) : 38;
    return -1;
}
