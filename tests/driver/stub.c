// A libcuda.so.1 in which every function succeeds and does nothing, but for what kernels/cuda/driver.py relies on: a
// context for each of two devices, the current one, and a log on stderr of what is set and launched.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *current;
static int nothing(void) { return 0; }
static int driver_version(int *version) { return *version = 13000, 0; }
static int device_count(int *count) { return *count = 2, 0; }
static int device_get(int *device, int ordinal) { return *device = ordinal, 0; }
static int retain(void **context, int device) { return *context = (void *)(uintptr_t)(0x1000 + device), 0; }
static int get_current(void **context) { return *context = current, 0; }
static int library(void **library) { return *library = (void *)0x2000, 0; }
static int kernel(void **kernel) { return *kernel = (void *)0x3000, 0; }
static int stream_context(void *stream, void **context) { return *context = current, 0; }

static int device_attribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 1;  // sm_90, 132 multiprocessors
    return 0;
}

static int set_current(void *context) {
    fprintf(stderr, "current %p\n", context);
    current = context;
    return 0;
}

static int current_device(int *device) {
    *device = (int)((uintptr_t)current - 0x1000);
    return current ? 0 : 201;  // CUDA_ERROR_INVALID_CONTEXT
}

static int is_capturing(void *stream, int *status) {
    *status = stream == (void *)0xca;
    return stream == (void *)0xcb ? 906 : 0;  // CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
}

static int set_attribute(int attribute, int value, void *kernel, int device) {
    fprintf(stderr, "attribute %d %d device %d\n", attribute, value, device);
    return value == 230000;
}

struct config {
    unsigned grid[3], block[3], shared;
    void *stream;
    struct { int id; char padding[4]; unsigned cluster[3]; } *attributes;
    unsigned count;
};

static int launch(struct config *config, void *kernel, void **words, void **extra) {
    unsigned cluster = config->count ? config->attributes->cluster[0] : 1;
    fprintf(stderr, "launch grid %u cluster %u block %u shared %u stream %p word %lld current %p\n", config->grid[0],
            cluster, config->block[0], config->shared, config->stream, *(long long *)words[0], current);
    return 0;
}

static int active_clusters(int *count, void *kernel, struct config *config) {
    unsigned cluster = config->attributes->cluster[0];
    const char *most = getenv("STUB_LARGEST_CLUSTER"), *error = getenv("STUB_CLUSTER_ERROR");
    fprintf(stderr, "room for cluster %u grid %u block %u shared %u kernel %p current %p\n", cluster, config->grid[0],
            config->block[0], config->shared, kernel, current);
    *count = !most || cluster <= (unsigned)atoi(most);
    return error ? atoi(error) : 0;
}

static const struct { const char *name; void *function; } functions[] = {
    {"cuDriverGetVersion", driver_version}, {"cuDeviceGetCount", device_count}, {"cuDeviceGet", device_get},
    {"cuDeviceGetAttribute", device_attribute}, {"cuDevicePrimaryCtxRetain", retain}, {"cuCtxGetCurrent", get_current},
    {"cuCtxSetCurrent", set_current}, {"cuCtxGetDevice", current_device}, {"cuStreamIsCapturing", is_capturing},
    {"cuLibraryLoadData", library}, {"cuLibraryGetKernel", kernel}, {"cuStreamGetCtx", stream_context},
    {"cuOccupancyMaxActiveClusters", active_clusters}, {"cuKernelSetAttribute", set_attribute}, {"cuLaunchKernelEx", launch},
};

int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    *function = nothing;
    for (size_t k = 0; k < sizeof functions / sizeof *functions; k++)
        if (!strcmp(symbol, functions[k].name))
            *function = functions[k].function;
    if (status)
        *status = 0;
    return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return driver_version(version); }
