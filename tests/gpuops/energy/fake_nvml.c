/* A scripted libnvidia-ml.so.1, so that the real nvidia-ml-py runs on a machine with no GPU.
 *
 * FAKE_NVML names a text file that every call reads again; tests change it between two readings:
 *   init RC                               what nvmlInitWithFlags answers (0 if there is no such line)
 *   gpu UUID NAME MIG ENERGY_MJ RC PIDS   one line a board; MIG is 0, 1 or "-" (symbol says not supported);
 *                                         RC is what the energy call answers; PIDS is 12,34, or "-" for none, or "?" for not supported
 * Only what gpuops.energy calls is here. Never install it where there is a driver.
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };

typedef struct {
    char uuid[80], name[64], mig[8], pids[128];
    unsigned long long energy_mj;
    int rc;
} board;

typedef struct { /* nvmlProcessInfo_t */
    unsigned int pid;
    unsigned long long used;
    unsigned int gpu_instance, compute_instance;
} process;

/* Copies board `wanted` if there is one; returns how many there are, or -1 if the script cannot be read. */
static int script(int wanted, board *out, int *init_rc) {
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    int count = 0;
    if (!file) return -1;
    while (fgets(line, sizeof line, file)) {
        board b;
        if (init_rc && sscanf(line, "init %d", init_rc) == 1) continue;
        if (sscanf(line, "gpu %79s %63s %7s %llu %d %127s", b.uuid, b.name, b.mig, &b.energy_mj, &b.rc, b.pids) == 6)
            if (count++ == wanted && out) *out = b;
    }
    fclose(file);
    return count;
}

/* A handle is the board's index plus one, so that NULL is none. */
static int find(void *device, board *out) { return script((int)(size_t)device - 1, out, NULL) >= (int)(size_t)device; }

API int nvmlInitWithFlags(unsigned int flags) {
    int rc = 0;
    (void)flags;
    return script(-1, NULL, &rc) < 0 ? DRIVER_NOT_LOADED : rc;
}

API const char *nvmlErrorString(int rc) { return rc == 999 ? "Unknown Error" : "Scripted Error"; }

API int nvmlDeviceGetCount_v2(unsigned int *count) {
    *count = (unsigned)script(-1, NULL, NULL);
    return SUCCESS;
}

API int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
    *device = (void *)(size_t)(index + 1);
    return find(*device, NULL) ? SUCCESS : INVALID_ARGUMENT;
}

static int text(void *device, char *out, unsigned int size, size_t offset) {
    board b;
    if (!find(device, &b)) return INVALID_ARGUMENT;
    snprintf(out, size, "%s", (char *)&b + offset);
    return SUCCESS;
}

API int nvmlDeviceGetUUID(void *d, char *out, unsigned int n) { return text(d, out, n, offsetof(board, uuid)); }
API int nvmlDeviceGetName(void *d, char *out, unsigned int n) { return text(d, out, n, offsetof(board, name)); }

API int nvmlDeviceGetMigMode(void *device, unsigned int *current, unsigned int *pending) {
    board b;
    if (!find(device, &b)) return INVALID_ARGUMENT;
    if (!strcmp(b.mig, "-")) return NOT_SUPPORTED;
    *current = *pending = (unsigned)atoi(b.mig);
    return SUCCESS;
}

API int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy_mj) {
    board b;
    if (!find(device, &b)) return INVALID_ARGUMENT;
    *energy_mj = b.energy_mj;
    return b.rc;
}

API int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, process *out) {
    board b;
    unsigned int room = *count, found = 0;
    if (!find(device, &b)) return INVALID_ARGUMENT;
    if (!strcmp(b.pids, "?")) return NOT_SUPPORTED;
    for (char *p = strtok(b.pids, ",-"); p; p = strtok(NULL, ",-"), found++)
        if (found < room && out) out[found] = (process){(unsigned)atoi(p), 1 << 20, ~0u, ~0u};
    *count = found;
    return found <= room ? SUCCESS : INSUFFICIENT_SIZE;
}
