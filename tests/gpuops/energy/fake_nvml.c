/* A scripted libnvidia-ml.so.1, so that the real nvidia-ml-py runs on a machine with no GPU.
 *
 * FAKE_NVML names the script, which is read again whenever it changes; one directive a line:
 *   init RC                               what nvmlInitWithFlags answers (0 if there is no such line)
 *   gpu UUID NAME [KEY=VALUE ...]         a board: mig=0|1|- ("-": the symbol says not supported)
 *                                         step_ms=100 the counter and the power readings change only this often
 *                                         energy_mj=0 where the counter starts    rc=0 what the energy call answers
 *                                         instant=0 no instantaneous power    pids=12,34 | - (none) | ? (not supported)
 *   power GPU T_S MILLIWATT [BUSY MIB]    from T_S on (times ascend): power, busy percent, memory used
 *   reset GPU T_S                         the counter starts from 0 again (the driver is reloaded)
 *   fail SYMBOL RC FROM_S TO_S [GPU]      what a call answers in that time
 *   zero NS                               CLOCK_MONOTONIC that is time 0, where there is no clock file
 * FAKE_NVML_CLOCK names a file of one int64, nanoseconds: the time for every process that uses it.
 * Only what gpuops.energy calls is here. Never install it where there is a driver.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, UNKNOWN = 999 };
enum { BOARDS = 16, POINTS = 4096, RESETS = 16, FAILURES = 64, POWER_INSTANT = 186, TYPE_UNSIGNED_INT = 1 };

typedef struct { double t, milliwatt; unsigned busy, mib; } point;
typedef struct {
    char uuid[80], name[64], mig[8], pids[128];
    unsigned long long start_mj;
    double step, reset[RESETS];
    int rc, instant, points, resets, index;
    point point[POINTS];
} board;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu, compute; } process; /* nvmlProcessInfo_t */
typedef struct { unsigned long long total, free, used; } memory;                                 /* nvmlMemory_t */
typedef struct { unsigned int gpu, memory; } rates;                                              /* nvmlUtilization_t */
typedef struct {                                                                                 /* nvmlFieldValue_t */
    unsigned int field, scope;
    long long timestamp, latency;
    unsigned int type;
    int rc;
    union { unsigned int number; unsigned long long wide; double real; } value;
} field;

static board boards[BOARDS];
static struct { char symbol[64]; int rc, gpu; double from, to; } failures[FAILURES];
static int count, failing_rules, init_rc, unreadable;
static int64_t zero_ns;
static volatile int64_t *clock_ns;
static struct stat seen;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static double now(void) {
    struct timespec t;
    if (clock_ns) return (double)__atomic_load_n(clock_ns, __ATOMIC_ACQUIRE) * 1e-9;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)((int64_t)t.tv_sec * 1000000000 + t.tv_nsec - zero_ns) * 1e-9;
}

static int option(board *b, char *word) {
    if (!strncmp(word, "mig=", 4)) return snprintf(b->mig, sizeof b->mig, "%s", word + 4) > 0;
    if (!strncmp(word, "pids=", 5)) return snprintf(b->pids, sizeof b->pids, "%s", word + 5) > 0;
    if (sscanf(word, "step_ms=%lf", &b->step) == 1) return (b->step /= 1e3) > 0;
    return sscanf(word, "energy_mj=%llu", &b->start_mj) == 1 || sscanf(word, "rc=%d", &b->rc) == 1 ||
           sscanf(word, "instant=%d", &b->instant) == 1;
}

static int directive(char *line) {
    char word[32], *rest = line;
    int used = 0, gpu = -1;
    double t, to;
    point p = {0};
    if (sscanf(line, "%31s%n", word, &used) != 1 || word[0] == '#') return 1;
    rest += used;
    if (!strcmp(word, "init")) return sscanf(rest, "%d", &init_rc) == 1;
    if (!strcmp(word, "zero")) return sscanf(rest, "%ld", &zero_ns) == 1;
    if (!strcmp(word, "gpu")) {
        board *b = &boards[count];
        if (count == BOARDS) return 0;
        *b = (board){.mig = "0", .pids = "-", .step = .1, .instant = 1, .index = count++};
        if (sscanf(rest, "%79s %63s%n", b->uuid, b->name, &used) != 2) return 0;
        for (char *next = strtok(rest + used, " \t\n"); next; next = strtok(NULL, " \t\n"))
            if (!option(b, next)) return 0;
        return 1;
    }
    if (!strcmp(word, "fail") && failing_rules < FAILURES) {
        int n = failing_rules++;
        failures[n].gpu = -1;
        if (sscanf(rest, "%63s %d %lf %lf %d", failures[n].symbol, &failures[n].rc, &t, &to, &failures[n].gpu) < 4) return 0;
        failures[n].from = t, failures[n].to = to;
        return 1;
    }
    if (sscanf(rest, "%d %lf%n", &gpu, &p.t, &used) != 2 || gpu < 0 || gpu >= count) return 0;
    if (!strcmp(word, "reset") && boards[gpu].resets < RESETS) return boards[gpu].reset[boards[gpu].resets++] = p.t, 1;
    if (strcmp(word, "power") || boards[gpu].points == POINTS) return 0;
    if (sscanf(rest + used, "%lf %u %u", &p.milliwatt, &p.busy, &p.mib) < 1) return 0;
    boards[gpu].point[boards[gpu].points++] = p;
    return 1;
}

/* Reads the script if it changed, and maps the clock. */
static void refresh(void) {
    const char *path = getenv("FAKE_NVML"), *clock_path = getenv("FAKE_NVML_CLOCK");
    struct stat is;
    char line[1024];
    FILE *file;
    if (clock_path && !clock_ns) {
        int fd = open(clock_path, O_RDONLY);
        void *mapped = fd < 0 ? MAP_FAILED : mmap(NULL, 8, PROT_READ, MAP_SHARED, fd, 0);
        if (mapped != MAP_FAILED) clock_ns = mapped;
        if (fd >= 0) close(fd);
    }
    if (!path || stat(path, &is)) { unreadable = 1; return; }
    if (!unreadable && is.st_size == seen.st_size && is.st_ino == seen.st_ino && is.st_mtim.tv_sec == seen.st_mtim.tv_sec &&
        is.st_mtim.tv_nsec == seen.st_mtim.tv_nsec) return;
    seen = is, count = failing_rules = init_rc = unreadable = 0;
    if (!(file = fopen(path, "r"))) { unreadable = 1; return; }
    while (fgets(line, sizeof line, file))
        if (!directive(line)) { fprintf(stderr, "fake_nvml: cannot read this line: %s", line); unreadable = 1; }
    fclose(file);
}

static int script(void) {
    pthread_mutex_lock(&lock);
    refresh();
    pthread_mutex_unlock(&lock);
    return unreadable;
}

/* A handle is the board's index plus one, so that NULL is none. */
static board *find(void *device) {
    size_t handle = (size_t)device;
    return script() || handle < 1 || handle > (size_t)count ? NULL : &boards[handle - 1];
}
static int failing(const char *symbol, const board *b) {
    double t = now();
    for (int i = 0; i < failing_rules; i++)
        if (!strcmp(failures[i].symbol, symbol) && t >= failures[i].from && t < failures[i].to &&
            (failures[i].gpu < 0 || failures[i].gpu == b->index)) return failures[i].rc;
    return SUCCESS;
}
#define BOARD(symbol) \
    board *b = find(device); \
    if (!b) return INVALID_ARGUMENT; \
    if (failing(symbol, b)) return failing(symbol, b)

/* Energy from `from` to `to`, exact: mW s = mJ. */
static double energy_mj(const board *b, double from, double to) {
    double sum = 0;
    for (int i = 0; i < b->points; i++) {
        double start = b->point[i].t, end = i + 1 < b->points ? b->point[i + 1].t : to;
        if (start < from) start = from;
        if (end > to) end = to;
        if (end > start) sum += b->point[i].milliwatt * (end - start);
    }
    return sum;
}
static double refreshed(const board *b) { return (double)(int64_t)(now() / b->step + 1e-9) * b->step; }
static point at(const board *b, double t) {
    point p = {0};
    for (int i = 0; i < b->points && b->point[i].t <= t; i++) p = b->point[i];
    return p;
}

API int nvmlInitWithFlags(unsigned int flags) { return (void)flags, script() ? DRIVER_NOT_LOADED : init_rc; }
API const char *nvmlErrorString(int rc) { return rc == UNKNOWN ? "Unknown Error" : "Scripted Error"; }
API int nvmlSystemGetDriverVersion(char *out, unsigned int n) { return snprintf(out, n, "580.65.06") < 0; }
API int nvmlDeviceGetCount_v2(unsigned int *n) { return script(), *n = (unsigned)count, SUCCESS; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
    return *device = (void *)(size_t)(index + 1), find(*device) ? SUCCESS : INVALID_ARGUMENT;
}
API int nvmlDeviceGetUUID(void *device, char *out, unsigned int n) {
    BOARD("nvmlDeviceGetUUID");
    return snprintf(out, n, "%s", b->uuid) < 0;
}
API int nvmlDeviceGetName(void *device, char *out, unsigned int n) {
    BOARD("nvmlDeviceGetName");
    return snprintf(out, n, "%s", b->name) < 0;
}
API int nvmlDeviceGetMigMode(void *device, unsigned int *current, unsigned int *pending) {
    BOARD("nvmlDeviceGetMigMode");
    if (!strcmp(b->mig, "-")) return NOT_SUPPORTED;
    return *current = *pending = (unsigned)atoi(b->mig), SUCCESS;
}
API int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *mj) {
    BOARD("nvmlDeviceGetTotalEnergyConsumption");
    double t = refreshed(b), from = 0;
    unsigned long long start = b->start_mj;
    for (int i = 0; i < b->resets; i++)
        if (b->reset[i] <= t) from = b->reset[i], start = 0;
    *mj = start + (unsigned long long)(energy_mj(b, from, t) + 1e-6);
    return b->rc;
}
API int nvmlDeviceGetPowerUsage(void *device, unsigned int *mw) { /* the mean of the last second, as on newer boards */
    BOARD("nvmlDeviceGetPowerUsage");
    double t = refreshed(b), from = t > 1 ? t - 1 : 0;
    return *mw = (unsigned)(t > from ? energy_mj(b, from, t) / (t - from) : at(b, t).milliwatt), SUCCESS;
}
API int nvmlDeviceGetFieldValues(void *device, int n, field *values) {
    BOARD("nvmlDeviceGetFieldValues");
    for (int i = 0; i < n; i++) {
        values[i].rc = values[i].field == POWER_INSTANT && b->instant ? SUCCESS : NOT_SUPPORTED;
        values[i].type = TYPE_UNSIGNED_INT;
        values[i].value.number = (unsigned)at(b, refreshed(b)).milliwatt;
    }
    return SUCCESS;
}
API int nvmlDeviceGetUtilizationRates(void *device, rates *out) {
    BOARD("nvmlDeviceGetUtilizationRates");
    return *out = (rates){at(b, now()).busy, 0}, SUCCESS;
}
API int nvmlDeviceGetMemoryInfo(void *device, memory *out) {
    BOARD("nvmlDeviceGetMemoryInfo");
    unsigned long long used = (unsigned long long)at(b, now()).mib << 20, total = 80ull << 30;
    return *out = (memory){total, total - used, used}, SUCCESS;
}
API int nvmlDeviceGetTemperature(void *device, unsigned int sensor, unsigned int *celsius) {
    BOARD("nvmlDeviceGetTemperature");
    return (void)sensor, *celsius = 45, SUCCESS;
}
API int nvmlDeviceGetClockInfo(void *device, unsigned int clock, unsigned int *mhz) {
    BOARD("nvmlDeviceGetClockInfo");
    return (void)clock, *mhz = 1980, SUCCESS;
}
API int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *n, process *out) {
    unsigned int room = *n, found = 0;
    char pids[128];
    BOARD("nvmlDeviceGetComputeRunningProcesses_v3");
    if (!strcmp(b->pids, "?")) return NOT_SUPPORTED;
    memcpy(pids, b->pids, sizeof pids);
    for (char *rest, *p = strtok_r(pids, ",-", &rest); p; p = strtok_r(NULL, ",-", &rest), found++)
        if (found < room && out) out[found] = (process){(unsigned)atoi(p), 1 << 20, ~0u, ~0u};
    *n = found;
    return found <= room ? SUCCESS : INSUFFICIENT_SIZE;
}
