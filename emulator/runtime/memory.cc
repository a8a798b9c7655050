// Global memory between guard pages, shared memory in front of one, and checks of every access to global memory.
#include "runtime.h"
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <sys/mman.h>

namespace emu {

constexpr size_t PAGE = 4096, GUARD = 1 << 20;

static unsigned char* map_guarded(size_t bytes) {
    void* m = mmap(nullptr, bytes + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED || mprotect((char*)m + GUARD, bytes, PROT_READ | PROT_WRITE)) {
        fprintf(stderr, "the emulator cannot map %zu bytes\n", bytes);
        abort();
    }
    return (unsigned char*)m;
}

static size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// ---- shared memory: one mapping per block, of which launches use the end -----------------------

unsigned char* map_shared() { return map_guarded(pages(SHARED_MOST)); }
unsigned char* fit_shared(unsigned char* mapping, uint32_t bytes) {
    return mapping + GUARD + pages(SHARED_MOST) - (bytes + 1023) / 1024 * 1024;     // aligned as kernels may expect
}

// ---- global memory ----------------------------------------------------------------------------

struct Buffer {
    const unsigned char *start = nullptr, *end = nullptr;   // of the usable bytes
    bool written = false;                                   // the list of launches records it as written
};
static std::mutex lock;
static std::map<const unsigned char*, Buffer> buffers;      // by start address

// Buffers that this launch has used, by address. Buffers are 2 MB apart, so slots for every 2 MB rarely collide.
static thread_local Buffer cache[64];

void forget_buffers() { std::fill(cache, cache + 64, Buffer{}); }

static bool nearest(const unsigned char* p, Buffer& found) {
    std::lock_guard<std::mutex> hold(lock);
    auto after = buffers.upper_bound(p + GUARD);
    // The buffer that holds p, or whose guard pages do.
    for (int i = 0; i < 2 && after != buffers.begin(); i++) {
        const Buffer& b = (--after)->second;
        if (p < b.end + GUARD && p + GUARD >= b.start) {
            found = b;
            if (p >= b.start) return true;
        }
    }
    return found.start != nullptr;
}

static std::string relation(const unsigned char* p) {
    Buffer b;
    if (cur) {
        ptrdiff_t offset = p - self()->shared;
        if (offset >= (ptrdiff_t)self()->shared_bytes && offset < (ptrdiff_t)(SHARED_MOST + GUARD))
            return printed("%td bytes past the end of the block's %u bytes of shared memory",
                           offset - self()->shared_bytes, self()->shared_bytes);
        if (offset < 0 && offset >= -(ptrdiff_t)(SHARED_MOST + GUARD))
            return printed("%td bytes before the block's shared memory", -offset);
    }
    if (!nearest(p, b)) return printed("address %p, in no buffer", (const void*)p);
    if (p >= b.end) return printed("%td bytes past the end of a %td-byte global buffer", p - b.end, b.end - b.start);
    if (p < b.start) return printed("%td bytes before a %td-byte global buffer", b.start - p, b.end - b.start);
    return printed("%td bytes into a %td-byte global buffer", p - b.start, b.end - b.start);
}

static bool inside(const Buffer& b, const unsigned char* p, size_t bytes) { return p >= b.start && p + bytes <= b.end; }

// Finds the buffer; returns false if the address is read and is one of the program's constants.
static __attribute__((noinline)) bool look_up(const unsigned char* p, size_t bytes, bool write, const Site& site,
                                              Buffer& slot) {
    Buffer b;
    if (nearest(p, b) && inside(b, p, bytes)) {
        slot = b;
        return true;
    }
    Dl_info info;
    if (!write && dladdr(p, &info)) return false;
    fail_at(site, "out of bounds: %zu bytes of global memory %s, %s", bytes, write ? "written" : "read",
            relation(p).c_str());
}

static __attribute__((noinline)) void note_write(Buffer& b) {
    std::lock_guard<std::mutex> hold(worker->launch->list->lock);
    worker->launch->list->written.insert(b.start);
    b.written = true;
}

// Earlier launches may still be running: they may still use memory that is written here, and their own writes are not
// there yet.
static __attribute__((noinline)) void early_access(const Buffer& b, const unsigned char* p, size_t bytes, bool write,
                                                   const Site& site) {
    List& list = *worker->launch->list;
    std::lock_guard<std::mutex> hold(list.lock);
    if (write || list.written.count(b.start))
        fail_at(site,
                "missing griddep_wait: %zu bytes of global memory %s, %s, while launches before this one may still run",
                bytes, write ? "written" : "read", relation(p).c_str());
}

void global_access(const void* pointer, size_t bytes, bool write, const Site& site) {
    auto* p = (const unsigned char*)pointer;
    Buffer& slot = cache[(uintptr_t)p >> 21 & 63];
    if (__builtin_expect(!inside(slot, p, bytes), 0) && !look_up(p, bytes, write, site, slot)) return;
    if (__builtin_expect(!self()->waited, 0)) early_access(slot, p, bytes, write, site);
    if (__builtin_expect(write && !slot.written, 0)) note_write(slot);
}

// ---- memory faults that no check anticipated --------------------------------------------------

static thread_local bool guarding;
static struct sigaction previous;

static void on_fault(int signal, siginfo_t* info, void*) {
    if (!guarding) {    // not ours: the previous handler takes it when the instruction faults again
        sigaction(signal, &previous, nullptr);
        return;
    }
    worker->error = "memory fault: out of bounds: " + relation((const unsigned char*)info->si_addr);
    siglongjmp(worker->escape, 1);
}

bool run_guarded(void (*body)()) {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &previous);
    });
    // The fault may be a stack overflow, so the handler needs another stack.
    static thread_local char stack[64 << 10];
    stack_t ours = {}, theirs;
    ours.ss_sp = stack;
    ours.ss_size = sizeof stack;
    sigaltstack(&ours, &theirs);
    guarding = true;
    bool fine = !sigsetjmp(worker->escape, 0);
    if (fine) body();
    guarding = false;
    sigaltstack(&theirs, nullptr);
    return fine;
}

}  // namespace emu

using namespace emu;

// Filled with ones (poison), its end as close to the guard page as 16-byte alignment allows.
extern "C" void* emu_malloc(size_t bytes) {
    size_t body = pages(bytes), used = (bytes + 15) / 16 * 16;
    unsigned char* m = map_guarded(body);
    unsigned char* start = m + GUARD + body - used;
    memset(m + GUARD, 0xff, body);
    std::lock_guard<std::mutex> hold(lock);
    buffers[start] = {start, start + bytes};
    return start;
}

extern "C" void emu_free(void* p) {
    std::lock_guard<std::mutex> hold(lock);
    auto found = buffers.find((unsigned char*)p);
    if (found == buffers.end()) return;
    size_t bytes = found->second.end - found->second.start, body = pages(bytes), used = (bytes + 15) / 16 * 16;
    munmap((unsigned char*)p - (body - used) - GUARD, body + 2 * GUARD);
    buffers.erase(found);
}
