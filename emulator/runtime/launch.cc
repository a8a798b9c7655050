// A launch: distributes its blocks to workers.
#include "runtime.h"
#include <algorithm>
#include <cstdio>
#include <mutex>
#include <thread>

namespace emu {

static Kernel* kernels;
Kernel::Kernel(const char* name, size_t params_bytes, void (*call)(const void*), const Layout* layout,
               Occupancy occupancy)
    : name(name), params_bytes(params_bytes), call(call), layout(layout), occupancy(occupancy), next(kernels) {
    kernels = this;
}

static const Layout* layouts;
Layout::Layout(const char* name, size_t bytes, size_t count, const Field* fields)
    : name(name), bytes(bytes), count(count), fields(fields), next(layouts) {
    layouts = this;
}

unsigned char* smem_base() { return self()->shared; }

uint32_t smem_addr(const void* p, const char* f, int l) {
    size_t offset = (const unsigned char*)p - self()->shared;
    if (offset > self()->shared_bytes) fail_at({f, l}, "out of bounds: smem_u32 of a pointer outside shared memory");
    return (uint32_t)offset + SHARED_START;
}

// ---- blocks -----------------------------------------------------------------------------------

static void start_thread(Block& b, Thread& t, const Launch& launch, uint3 block_index) {
    t.tid = {(unsigned)t.index, 0, 0};
    t.bid = block_index;
    t.bdim = dim3(launch.threads);
    t.gdim = launch.grid;
    t.shared = b.shared;
    t.shared_bytes = b.shared_bytes;
    t.params = (const unsigned char*)launch.params;
    t.params_bytes = launch.kernel->params_bytes;
    t.done = false;
    t.waited = !launch.dependent;
    t.copy_group = t.store_group = t.yields = 0;
    t.products = t.product_groups = 0;
    t.wgmma_fenced = false;
    t.registers = registers_at_start(launch.threads);
}

static void start_block(Worker& w, uint32_t number) {
    const Launch& launch = *w.launch;
    if (w.idle.empty()) {
        w.idle.push_back(std::make_unique<Block>());
        w.idle.back()->mapping = map_shared();
    }
    std::unique_ptr<Block> kept = std::move(w.idle.back());
    w.idle.pop_back();
    Block& b = *kept;
    b.threads = b.alive = launch.threads;
    b.warps = (launch.threads + WARP - 1) / WARP;
    b.spare_registers = 0;
    b.shared_bytes = launch.shared_bytes;
    b.shared = fit_shared(b.mapping, b.shared_bytes);
    memset(b.shared, 0xff, b.shared_bytes);
    make_threads(b, launch.threads);
    // A block's random decisions are its own: they are the same on whatever worker it runs.
    if (w.config.resident == 1)
        w.random_state = (launch.config.seed ^ number * 0xd1342543de82ef95ull) * 0x9e3779b97f4a7c15ull | 1;

    b.ready_warps = b.current_warp = 0;
    std::fill(b.ready, b.ready + WARPS_MOST, 0);
    if (w.config.order == PRIORITY)
        for (uint32_t& p : b.priority) p = w.random();
    uint3 index = {number % launch.grid.x, number / launch.grid.x % launch.grid.y,
                   number / launch.grid.x / launch.grid.y};
    for (int i = 0; i < b.threads; i++) {
        start_thread(b, *b.all[i], launch, index);
        make_ready(b, i / WARP, 1u << i % WARP);
    }
    races_start(b);
    w.blocks.push_back(std::move(kept));
}

// Leaves a block in the state that the next one expects. Almost always none of this was used.
static void tidy(Block& b, bool abandoned) {
    b.mbarriers.clear();
    for (Warpgroup& g : b.warpgroups)
        if (g.done || !g.groups.empty() || abandoned) g = Warpgroup();
    if (!abandoned && !racing()) return;
    b.yielded = b.wanting = Waiting();
    for (NamedBarrier& bar : b.barriers) bar = NamedBarrier();
    for (auto& warp : b.meetings)
        for (Meeting& m : warp) m.arrived = 0;
    if (!abandoned) return;
    for (auto& t : b.all) {
        t->fresh = true;
        t->copies.clear();
        t->stores.clear();
    }
}

static std::string left_behind(Block& b) {
    for (Flight& f : worker->flights)
        if (f.block == &b)
            return "the block exits with TMA loads into its shared memory in flight (no wait on their mbarrier)";
    for (int id = 0; id < 16; id++)
        if (b.barriers[id].arrived)
            return b.barriers[id].site.text() + ": the block exits while " +
                   printed("%d of %d threads have arrived at barrier %d", b.barriers[id].arrived,
                           b.barriers[id].expected, id);
    return wgmma_at_exit(b);
}

// ---- workers ----------------------------------------------------------------------------------

static void run_blocks() {
    Worker& w = *worker;
    Launch& launch = *w.launch;
    for (;;) {
        while (w.blocks.size() < (size_t)w.config.resident && !launch.failed) {
            uint64_t i = launch.next++;
            if (i >= launch.order.size()) break;
            start_block(w, launch.order[i]);
        }
        if (w.blocks.empty()) return;
        w.current_block = 0;
        enter(pick());
        if (!w.error.empty()) return;
        for (size_t i = 0; i < w.blocks.size();) {
            Block& b = *w.blocks[i];
            if (b.alive) {
                i++;
                continue;
            }
            w.error = left_behind(b);
            if (!w.error.empty()) return;
            tidy(b, false);
            w.counters.blocks++;
            w.idle.push_back(std::move(w.blocks[i]));
            w.blocks.erase(w.blocks.begin() + i);
        }
    }
}

static std::mutex lock;
static std::vector<std::unique_ptr<Worker>> workers;    // idle

static std::unique_ptr<Worker> work(Launch& launch) {
    std::unique_ptr<Worker> w;
    {
        std::lock_guard<std::mutex> hold(lock);
        if (!workers.empty()) {
            w = std::move(workers.back());
            workers.pop_back();
        }
    }
    if (!w) w = std::make_unique<Worker>();
    w->launch = &launch;
    w->config = launch.config;
    w->counters = {};
    w->error.clear();
    w->random_state = launch.config.seed * 0x9e3779b97f4a7c15ull | 1;
    // A fiber's code may have cached addresses of another OS thread's variables.
    for (auto& b : w->idle)
        for (auto& t : b->all) t->fresh = true;
    worker = w.get();
    forget_buffers();
    run_guarded(run_blocks);
    cur = nullptr;
    if (!w->error.empty()) launch.failed = true;
    for (auto& b : w->blocks) {
        tidy(*b, true);
        w->idle.push_back(std::move(b));
    }
    w->blocks.clear();
    w->flights.clear();
    worker = nullptr;
    return w;
}

static std::string refusal(const Launch& l, const char* name, size_t params_bytes) {
    if (!l.kernel) return printed("unknown kernel: there is none named %s", name);
    if (params_bytes != l.kernel->params_bytes)
        return printed("wrong parameters: %zu bytes where the kernel's structure has %zu", params_bytes,
                       l.kernel->params_bytes);
    if (l.threads < 1 || l.threads > THREADS_MOST)
        return printed("%d threads: a block has 1 to %d", l.threads, THREADS_MOST);
    if (l.shared_bytes > SHARED_MOST)
        return printed("too much shared memory: %u bytes; a block has at most %u", l.shared_bytes, SHARED_MOST);
    if (!l.grid.x || !l.grid.y || !l.grid.z || l.grid.x > 0x7fffffff || l.grid.y > 65535 || l.grid.z > 65535)
        return printed("a grid of %u x %u x %u blocks: 1 to 2147483647 x 65535 x 65535", l.grid.x, l.grid.y, l.grid.z);
    return "";
}

static void add(EmuCounters& to, const EmuCounters& from) {
    auto *a = (uint64_t*)&to, *b = (uint64_t*)&from;
    for (size_t i = 0; i < sizeof to / sizeof *a; i++) a[i] += b[i];
}

}  // namespace emu

using namespace emu;

// All structures and kernels, which have registered themselves before main: the head of each list.
extern "C" const Layout* emu_layouts() { return layouts; }
extern "C" const Kernel* emu_kernels() { return kernels; }

extern "C" List* emu_list_new() { return new List; }
extern "C" void emu_list_free(List* list) { delete list; }

// Runs a kernel as the next launch of a list. Returns 0, or 1 with the first fault in `error`.
extern "C" int emu_launch(List* list, const char* name, const uint32_t grid[3], uint32_t threads, uint32_t shared_bytes,
                          const void* params, size_t params_bytes, const EmuConfig* config, EmuCounters* counters,
                          char* error, size_t error_bytes) {
    Launch launch;
    launch.list = list;
    launch.dependent = list->begun;
    list->begun = true;
    launch.kernel = kernels;
    while (launch.kernel && strcmp(launch.kernel->name, name)) launch.kernel = launch.kernel->next;
    launch.params = params;
    launch.grid = dim3(grid[0], grid[1], grid[2]);
    launch.threads = threads;
    launch.shared_bytes = shared_bytes;
    launch.config = *config;
    launch.config.resident = std::max(config->resident, 1);
    std::string fault = refusal(launch, name, params_bytes);
    *counters = {};
    if (fault.empty()) {
        uint64_t blocks = (uint64_t)grid[0] * grid[1] * grid[2];
        launch.order.resize(blocks);
        for (uint64_t i = 0; i < blocks; i++) launch.order[i] = i;
        uint64_t state = config->seed * 0x9e3779b97f4a7c15ull | 1;
        for (uint64_t i = blocks; config->order != ORDERED && i > 1; i--) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            std::swap(launch.order[i - 1], launch.order[(state >> 33) % i]);
        }
        // A further OS thread pays off from four blocks on: on a busy machine it takes milliseconds to start.
        size_t others = std::min<uint64_t>(std::max(config->threads, 1) - 1, blocks / 4);
        std::vector<std::unique_ptr<Worker>> done(others + 1);
        std::vector<std::thread> running;
        for (size_t i = 1; i <= others; i++) running.emplace_back([&, i] { done[i] = work(launch); });
        done[0] = work(launch);
        for (auto& t : running) t.join();
        std::lock_guard<std::mutex> hold(lock);
        for (auto& w : done) {
            add(*counters, w->counters);
            if (fault.empty()) fault = w->error;
            workers.push_back(std::move(w));
        }
    }
    if (fault.empty()) return 0;
    snprintf(error, error_bytes, "%s", fault.c_str());
    return 1;
}
