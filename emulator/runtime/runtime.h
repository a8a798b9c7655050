// The internals of the emulator: a launch's blocks and threads, and the interfaces between its parts.
#pragma once
#include "emu.h"
#include <atomic>
#include <csetjmp>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>
#undef memcpy
#undef memset

// Matches lib.rs.
struct EmuConfig {
    uint64_t seed;
    int32_t order, landing, resident, races, threads;
};
struct EmuCounters {
    uint64_t switches, collectives, mma, wgmma, tma_bytes, asynchronous, barriers, blocks;
    uint64_t ldmatrix_phases, ldmatrix_conflicts;
};

namespace emu {

enum Order { ORDERED, RANDOM, PRIORITY };
enum Landing { EAGER, LAZY, SOMETIMES };

constexpr uint32_t SHARED_START = 1024;     // address of dynamic shared memory, as on sm_90
constexpr uint32_t SHARED_MOST = 227 << 10; // bytes that a block may have
constexpr int WARP = 32, WARPS_MOST = 32, WARPGROUPS_MOST = 8, THREADS_MOST = 1024;
constexpr uint32_t ALL_LANES = ~0u;

// The place of an operation: the file and line of a primitive, or the return address of the call-out of a load or
// store.
struct Site {
    const char* file;
    int line;
    const void* pc;
    Site(const char* file = nullptr, int line = 0) : file(file), line(line), pc(nullptr) {}
    explicit Site(const void* pc) : file(nullptr), line(0), pc(pc) {}
    std::string text() const;
    bool operator==(const Site& o) const { return line == o.line && file == o.file; }
};
[[noreturn]] void fail_at(const Site& site, const char* format, ...) __attribute__((format(printf, 2, 3)));
std::string printed(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- races ------------------------------------------------------------------------------------

// A thread's vector clock: the number of releases of each other thread that it has synchronised with. `async` is the
// part that is visible to the asynchronous proxy (TMA, wgmma), which sees a thread's own stores only after a proxy
// fence.
using Clock = std::vector<uint32_t>;
struct Clocks {
    Clock generic, async;
};

// The last write and some of the last reads of two bytes of shared memory, each as a thread and its count.
struct Cell {
    uint32_t write, reads[3];
    int32_t line;       // of the writer, if it was a primitive,
    int32_t pc;         // or of its call-out, relative to the runtime's code
};

// ---- what threads wait on ---------------------------------------------------------------------

struct Waiting {
    uint32_t lanes[WARPS_MOST] = {};
};

struct NamedBarrier {
    int arrived = 0, expected = 0;
    Site site;                  // of the first thread that arrived
    Waiting waiting;
    Clocks gathered, released;  // of the threads that arrived in this round and in the previous one
};

// A rendezvous of a warp's lanes; the last to arrive does the work of all.
struct Meeting {
    uint32_t mask = 0, arrived = 0;
    const char* what = "";
    Site site;
    void* lanes[WARP];
};

struct MBarrier {
    uint32_t address, phase = 0;
    int count, pending, tx_bytes = 0;
    Site site;                  // of its initialisation
    Waiting waiting;
    Clocks gathered, released, initialised;
    int race_thread = 0;        // stands for the TMA loads that complete on it
    uint32_t race_clock = 0;
};

enum class Wait { Nothing, Barrier, MBarrier, Meeting, Wgmma, Registers };
struct Reason {
    Wait on = Wait::Nothing;
    Site site;
    uint32_t which = 0, detail = 0;
    const char* what = "";
};

// ---- wgmma ------------------------------------------------------------------------------------

// A warpgroup's 64 x n accumulators while products into them are in flight; the threads' own copies are poisoned.
struct Accumulators {
    float* registers[128] = {};
    std::vector<float> values;
    int n;
    Site site;
    uint32_t first, last;       // numbers of products
};

struct Product {
    uint64_t da, db;
    int n, scale_d, trans_a, trans_b, arrived = 0;
    const uint32_t* a[128];     // registers, if A comes from registers
    Site site;
    std::shared_ptr<Accumulators> d;
    Clocks known;               // known to all issuing threads
    uint32_t race_clock = 0;
};

struct Warpgroup {
    std::deque<std::unique_ptr<Product>> products;  // not completed yet
    uint32_t done = 0;                              // number of completed products
    std::vector<uint32_t> groups;                   // number of products up to each commit
    std::vector<std::shared_ptr<Accumulators>> in_flight;
    Waiting waiting;
    uint32_t race_clock = 0;
};

// ---- threads and blocks -----------------------------------------------------------------------

struct Copy {                   // cp.async
    uint32_t dst;
    const void* src;
    int bytes, src_bytes, group;
    Site site;
};

struct Store {                  // a TMA store first reads shared memory and later writes global memory
    CUtensorMap map;            // a copy: the kernel's may be gone when it ends
    uint32_t src, bytes;
    int coordinates[5], group;
    bool read;
    std::vector<unsigned char> data;
    Site site;
    uint32_t race_clock;
};

struct Block;

struct Thread : Fiber {
    // Read by every call-out.
    unsigned char *shared, *stack;
    const unsigned char* params;    // of the launch
    uint32_t shared_bytes, params_bytes;
    bool waited;                // has waited for the launches before this one, if there are any in its list

    Block* block;
    int index, warp, lane;
    void* saved;                // stack pointer
    bool fresh, done;           // the stack holds no frames yet; the kernel has returned
    Reason reason;
    std::vector<Copy> copies;
    std::vector<Store> stores;
    int copy_group, store_group, yields;
    uint32_t products, product_groups;
    bool wgmma_fenced;
    int registers;
    Clocks clocks;
};
inline Thread* self() { return static_cast<Thread*>(cur); }

struct Block {
    unsigned char* shared;
    uint32_t shared_bytes;
    int threads, warps, alive;
    std::vector<std::unique_ptr<Thread>> all;       // as many as any launch has needed
    uint32_t ready[WARPS_MOST], ready_warps, current_warp, priority[WARPS_MOST];

    Waiting yielded;            // until no other thread can run
    Waiting wanting;            // for registers
    int spare_registers;        // released by threads
    NamedBarrier barriers[16];
    Meeting meetings[WARPS_MOST][4];
    std::vector<std::unique_ptr<MBarrier>> mbarriers;
    Warpgroup warpgroups[WARPGROUPS_MOST];
    std::vector<Cell> cells;
    int race_threads;           // assigned to mbarriers
    uint32_t store_clock;       // of the race thread that stands for TMA stores
    unsigned char* mapping;     // of shared memory, with its guard pages
};

// A TMA load in flight.
struct Flight {
    Block* block;
    std::function<void()> land;
};

// A list of launches; each except the first may begin while earlier ones still run.
struct List {
    bool begun = false;
    std::mutex lock;
    std::set<const unsigned char*> written;     // start addresses of the buffers that they write
};

// The state that the workers of a launch share.
struct Launch {
    List* list;
    bool dependent;                     // there are earlier launches in the list
    const Kernel* kernel;
    const void* params;
    dim3 grid;
    int threads;
    uint32_t shared_bytes;
    EmuConfig config;
    std::vector<uint32_t> order;        // of blocks
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
};

// Runs blocks on one OS thread. Kept between launches, for its stacks.
struct Worker {
    Launch* launch;
    EmuConfig config;
    EmuCounters counters;
    uint64_t random_state;
    std::string error;
    std::vector<std::unique_ptr<Block>> blocks, idle;   // running, and kept for reuse
    std::vector<Flight> flights;
    size_t current_block;
    void* saved;                                        // stack pointer
    sigjmp_buf escape;                                  // from a memory fault

    uint32_t random() {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        return (uint32_t)(random_state >> 32);
    }
    // True if an asynchronous result is to land later.
    bool later() { return config.landing == LAZY || (config.landing == SOMETIMES && (random() & 1)); }
};
extern __thread Worker* worker __attribute__((tls_model("initial-exec")));

// ---- fiber.cc ----
void make_threads(Block& block, int threads);
void enter(Thread* thread);                         // from the worker
void leave();                                       // to the worker
void switch_to(Thread* thread);                     // from a thread
constexpr size_t STACK = 128 << 10, STACK_GUARD = 4096;
// Stacks begin at different offsets within a page: otherwise 32 lanes would compete for the same few cache lines.
constexpr size_t STACK_COLOURS = 4096, STACK_BYTES = STACK_GUARD + STACK + STACK_COLOURS;
inline bool on_stack(const Thread& t, const void* p) {
    return (size_t)((const unsigned char*)p - t.stack) < STACK_BYTES;
}

// ---- scheduler.cc ----
Thread* pick();
void wake(Block& block, Waiting& waiting);
void make_ready(Block& block, int warp, uint32_t lanes);
void wait_for(const Reason& reason);                // runs other threads until woken
void wait_in(Waiting& waiting, const Reason& reason);
std::string deadlock();
void run_thread();                                  // runs the kernel again and again: the body of a fiber

// ---- memory.cc ----
unsigned char* map_shared();                        // the most that a block may have
unsigned char* fit_shared(unsigned char* mapping, uint32_t bytes);  // flush with the guard page
void global_access(const void* pointer, size_t bytes, bool write, const Site& site);
void forget_buffers();                              // before a launch, since some may have been freed
bool run_guarded(void (*body)());                   // false on a memory fault, described in worker->error

// Returns `bytes` bytes of shared memory, checked.
inline unsigned char* shared_at(Block& b, uint32_t address, uint32_t bytes, uint32_t align, const char* what,
                                const Site& s) {
    uint32_t offset = address - SHARED_START;
    if (__builtin_expect(offset > b.shared_bytes || bytes > b.shared_bytes - offset, 0))
        fail_at(s, "%s: out of bounds: shared address smem+0x%x..+%u is outside the block's %u bytes", what, offset,
                bytes, b.shared_bytes);
    if (__builtin_expect(address & (align - 1), 0))
        fail_at(s, "%s: misaligned: shared address smem+0x%x is not %u-byte aligned", what, offset, align);
    return b.shared + offset;
}

// ---- registers.cc ----
int registers_at_start(int threads);                // per thread

// ---- mbarrier.cc ----
MBarrier* find_mbarrier(Block& block, uint32_t address);
MBarrier* get_mbarrier(uint32_t address, const Site& site);
void mbarrier_progress(Block& block, MBarrier& m);

// ---- ends of threads and blocks: operations still in flight are a fault ----
void copies_at_exit(Thread& thread);
void stores_at_exit(Thread& thread);
std::string wgmma_at_exit(Block& block);

// ---- races.cc: all of these do nothing unless races are detected ----
inline bool racing() { return __builtin_expect(worker->config.races, 0); }
void races_start(Block& block);
int race_thread_for_mbarrier(Block& block);
void release(Thread& thread, Clocks& to);
void acquire(Thread& thread, const Clocks& from);
void clear(Clocks& clocks);
bool knows(const Thread& thread, const Clocks& clocks);
void sync_lanes(Block& block, int warp, uint32_t lanes);
void shared_access(Thread& thread, uint32_t offset, uint32_t bytes, bool write, const Site& site);
uint32_t tma_write(Thread& issuer, MBarrier& m, uint32_t offset, uint32_t bytes, const Site& site);
void tma_written(MBarrier& m, uint32_t clock);
uint32_t tma_read(Thread& issuer, uint32_t offset, uint32_t bytes, const Site& site);
void tma_read_waited(Thread& thread, uint32_t clock);
void product_issued(Thread& thread, Product& p);
void product_reads(Block& block, Warpgroup& w, Product& p, uint32_t offset, uint32_t bytes);
void products_waited(Thread& thread, Warpgroup& w, uint32_t count);
void proxy_fence(Thread& thread);

}  // namespace emu
