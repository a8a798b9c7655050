// An NVIDIA driver for tests of what talks to one: it keeps count of what it hands out, does copies at once, and knows
// one kernel, which doubles numbers. Compiled with -D for each kind of trouble.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef VERSION
#define VERSION 12040
#endif
#ifndef INIT
#define INIT 0
#endif
#ifndef CAPABILITY
#define CAPABILITY 90
#endif
#define MEMORY (64 << 20)

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, NOT_FOUND = 500 };
typedef void* Handle;
typedef struct { uint64_t x, out, length; } Doubling;
typedef struct { int capturing; int launches; Doubling taken[8]; } Stream;

static _Atomic int live, failures, early;
static int context, set_shared;
static size_t used;
static void* take(size_t bytes) { live++; return calloc(1, bytes); }
static int give(void* what) { if (!what) return INVALID_VALUE; live--; free(what); return 0; }
static void doubled(Doubling d) {
    for (uint64_t i = 0; i < d.length; i++) ((float*)d.out)[i] = 2 * ((float*)d.x)[i];
}

// Counts calls that fail: tools such as compute-sanitizer report them, so that normal work should make none.
static int told(int code) { failures += code != 0; return code; }

int failed_calls(void) { return failures; }
int live_objects(void) { return live + context; }
int cuDriverGetVersion(int* v) { *v = INIT == 34 ? 0 : VERSION; return INIT == 34 ? INIT : 0; }
int cuInit(unsigned flags) { return flags ? INVALID_VALUE : INIT; }
int cuGetErrorName(int code, const char** text) { *text = "CUDA_ERROR_OF_TEST"; return code == 999 ? INVALID_VALUE : 0; }
int cuGetErrorString(int code, const char** text) { *text = "test"; return code == 999 ? INVALID_VALUE : 0; }
int cuDeviceGetCount(int* n) { *n = 1; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int n, int device) { strncpy(name, "Test GPU", n); return device; }
int cuDeviceTotalMem_v2(size_t* n, int device) { *n = MEMORY; return device; }
int cuDeviceGetAttribute(int* value, int which, int device) {
    *value = which == 75 ? CAPABILITY / 10 : which == 76 ? CAPABILITY % 10 : which == 16 ? 132 : which == 97 ? 227 << 10 : -1;
    return device;
}
#ifndef RETAIN
#define RETAIN 0
#endif
int cuDevicePrimaryCtxRetain(Handle* c, int device) { if (RETAIN) return RETAIN; context++; *c = &context; return device; }
int cuDevicePrimaryCtxRelease_v2(int device) { context--; return device; }
int cuCtxSetCurrent(Handle c) { return c == &context ? 0 : INVALID_VALUE; }
int cuMemGetInfo_v2(size_t* f, size_t* total) { *f = MEMORY - used; *total = MEMORY; return 0; }
int cuMemAlloc_v2(uint64_t* p, size_t n) {
    if (!n) return INVALID_VALUE;
    // What empties the cache is more than this GPU has; it is let through.
    if (n != 256 << 20 && used + n > MEMORY) return OUT_OF_MEMORY;
    *p = (uint64_t)take(n);
    return 0;
}
int cuMemFree_v2(uint64_t p) { return give((void*)p); }
int cuMemsetD8Async(uint64_t p, unsigned char c, size_t n, Handle s) { memset((void*)p, c, n); return 0; }
int cuMemAllocHost_v2(Handle* p, size_t n) { *p = take(n); return 0; }
int cuMemFreeHost(Handle p) { return give(p); }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t n, Handle s) {
    if (((Stream*)s)->capturing) return INVALID_VALUE;
    memcpy((void*)to, from, n);
    return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, Handle s) { memcpy(to, (void*)from, n); return 0; }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, Handle s) { memcpy((void*)to, (void*)from, n); return 0; }
int cuStreamCreate(Handle* s, unsigned flags) { *s = take(sizeof(Stream)); return flags == 1 ? 0 : INVALID_VALUE; }
int cuStreamDestroy_v2(Handle s) { return give(s); }
int cuStreamSynchronize(Handle s) { return s && !((Stream*)s)->capturing ? 0 : INVALID_VALUE; }
#ifndef NO_CAPTURE
int cuStreamBeginCapture_v2(Handle s, int mode) { ((Stream*)s)->capturing = 1; return mode == 1 ? 0 : INVALID_VALUE; }
#endif
int cuStreamEndCapture(Handle s, Handle* graph) {
    Stream* stream = s;
    if (!stream->capturing) return INVALID_VALUE;
    stream->capturing = 0;
    *graph = take(sizeof(Stream));
    memcpy(*graph, stream, sizeof(Stream));
    stream->launches = 0;
    return 0;
}
int cuGraphInstantiateWithFlags(Handle* e, Handle g, unsigned long long flags) {
    *e = take(sizeof(Stream));
    memcpy(*e, g, sizeof(Stream));
    return flags ? INVALID_VALUE : 0;
}
int cuGraphDestroy(Handle g) { return give(g); }
int cuGraphUpload(Handle e, Handle s) { return e && s ? 0 : INVALID_VALUE; }
int cuGraphLaunch(Handle e, Handle s) {
    for (int i = 0; i < ((Stream*)e)->launches; i++) doubled(((Stream*)e)->taken[i]);
    return 0;
}
int cuGraphExecDestroy(Handle e) { return give(e); }
int cuEventCreate(Handle* e, unsigned flags) { *e = take(1); return flags; }
int cuEventDestroy_v2(Handle e) { return give(e); }
int cuEventRecord(Handle e, Handle s) { return e && s ? 0 : INVALID_VALUE; }
int cuEventSynchronize(Handle e) { return e ? 0 : INVALID_VALUE; }
int cuEventElapsedTime(float* ms, Handle start, Handle end) { *ms = 1.5f; return start == end ? INVALID_VALUE : 0; }
int cuModuleLoadData(Handle* m, const void* image) {
    if (memcmp(image, "image", 5)) return told(INVALID_IMAGE);
    *m = take(1);
    return 0;
}
int cuModuleUnload(Handle m) { return give(m); }
int cuModuleGetFunction(Handle* f, Handle m, const char* name) { *f = m; return told(strcmp(name, "twice") ? NOT_FOUND : 0); }
int cuFuncSetAttribute(Handle f, int which, int value) {
    if (which == 8) set_shared = value;
    return told(which == 8 || (which == 9 && value == 100) ? 0 : INVALID_VALUE);
}
#if VERSION >= 12040
int cuFuncGetParamInfo(Handle f, size_t index, size_t* offset, size_t* size) {
    *offset = 0, *size = sizeof(Doubling);
    return told(index ? INVALID_VALUE : 0);
}
#endif
int cuTensorMapEncodeTiled(uint64_t* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const unsigned* tile, const unsigned* steps, int interleave,
                           int swizzle, int promotion, int fill) {
    if ((uint64_t)map % 64) return INVALID_VALUE;
    // What was asked for, in turn.
    uint64_t seen[16] = {type, rank, (uint64_t)address, sizes[0], sizes[1], strides[0], tile[0], tile[1],
                         steps[0], steps[1], interleave, swizzle, promotion, fill};
    memcpy(map, seen, sizeof seen);
    return 0;
}
typedef struct { int id; char pad[4]; union { char bytes[64]; int allowed; } value; } Attribute;
typedef struct { unsigned grid[3], block[3], shared; Handle stream; Attribute* attributes; unsigned count; } Config;
// Counts launches that may begin before the one before them ends: the one attribute that is known.
int early_launches(void) { return early; }
int cuLaunchKernelEx(const Config* c, Handle f, void** params, void** extra) {
    const unsigned *g = c->grid, *b = c->block;
    if (!f || !g[0] || !g[1] || !g[2] || !b[0] || b[1] != 1 || b[2] != 1 || extra || c->shared > (unsigned)set_shared)
        return told(INVALID_VALUE);
    if ((uint64_t)params[0] % 64) return told(INVALID_VALUE);
    if (c->count > 1 || (c->count && (c->attributes->id != 6 || c->attributes->value.allowed != 1))) return told(INVALID_VALUE);
    // Older GPUs lack them, older drivers in graphs.
    if (c->count && (CAPABILITY < 90 || VERSION < 12030)) return told(INVALID_VALUE);
    early += c->count;
    Stream* stream = c->stream;
    if (stream->capturing) stream->taken[stream->launches++] = *(Doubling*)params[0];
    else doubled(*(Doubling*)params[0]);
    return 0;
}
