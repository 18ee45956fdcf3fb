/* Stands in for libcuda and libnvidia-ml where there is no GPU; signatures as in cuda.h and nvml.h. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define GIB (1ULL << 30)

int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuInit(unsigned int flags) { const char *s = getenv("STUB_INIT"); return flags || !s ? 0 : atoi(s); }
int cuGetErrorString(int error, const char **text) { *text = "stub error"; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal > 1; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Stub GPU", length); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (device ? 20 : 80) * GIB; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    for (int i = 0; i < 16; i++) uuid[i] = device ? 0xff : i;
    return 0;
}
/* A context is more than an int can hold, and tells its device. */
#define CONTEXT 0x1234567890
static size_t current;
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(CONTEXT + device); return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxPushCurrent_v2(void *context) { current = (size_t)context - CONTEXT; return current > 1; }
int cuCtxPopCurrent_v2(void **context) { return 0; }
/* Others hold most of it as long as the file STUB_TAKEN names is there, or where it names none. */
int cuMemGetInfo_v2(size_t *available, size_t *total) {
    const char *taken = getenv("STUB_TAKEN");
    *total = (current ? 20 : 80) * GIB;
    *available = taken && access(taken, F_OK) ? *total : 5 * GIB;
    return 0;
}

typedef struct { unsigned long long total, available, used; } memory_t;
typedef struct { unsigned int version; unsigned long long total, reserved, available, used; } memory_v2_t;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu, compute; } process_t;
static int first, second;

int nvmlInitWithFlags(unsigned int flags) { return flags; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned int length) { strncpy(text, "570.124.06", length); return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    if (!strcmp(uuid, "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f")) { *handle = &first; return 0; }
    if (!strcmp(uuid, "MIG-ffffffff-ffff-ffff-ffff-ffffffffffff")) { *handle = &second; return 0; }
    return 6;
}
int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_v2_t *memory) {
    if (handle != &first || memory->version != (sizeof(memory_v2_t) | 2 << 24)) return 3;
    memory->total = 80 * GIB; memory->reserved = GIB / 2; memory->available = 70 * GIB; memory->used = 19 * GIB / 2;
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory) {
    memory->total = 20 * GIB; memory->available = 19 * GIB; memory->used = GIB;
    return 0;
}
int nvmlDeviceGetTotalEccErrors(void *handle, unsigned int kind, unsigned int since, unsigned long long *count) {
    *count = 3;
    return handle == &first && kind == 1 && since == 0 ? 0 : 3;
}
int nvmlDeviceGetMigMode(void *handle, unsigned int *now, unsigned int *pending) { *now = *pending = 0; return 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned int *count, process_t *found) {
    const char *holder = getenv("STUB_HOLDER");
    if (handle != &first || !holder) { *count = 0; return 0; }
    unsigned int room = *count;
    *count = 70;
    if (room < 70) return 7;
    for (int i = 0; i < 70; i++) {
        found[i].pid = i ? 4000000 + i : atoi(holder);
        found[i].used = i ? ~0ULL : 9 * GIB;
    }
    return 0;
}
