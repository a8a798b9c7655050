// Races in shared memory: accesses of two threads to the same two bytes, one of them a write, must be ordered.
//
// The method is vector clocks: a thread's clock records up to which release of each other thread it has synchronised;
// barriers of all kinds pass clocks on. Each pair of bytes remembers its last write and three reads. Tensor cores and
// TMA have race threads of their own, numbered after the block's threads. (FastTrack, Flanagan and Freund 2009, with a
// few reads in place of all.)
#include "runtime.h"
#include <cstdio>

namespace emu {

constexpr int MBARRIER_THREADS = 55, EXTRA = WARPGROUPS_MOST + 1 + MBARRIER_THREADS;
constexpr uint32_t COUNT_BITS = 20, COUNT = (1 << COUNT_BITS) - 1;  // an entry of a cell: thread, then count; never 0

static int tensor_core(const Block& b, const Warpgroup& w) { return b.threads + (int)(&w - b.warpgroups); }
static int tma_stores(const Block& b) { return b.threads + WARPGROUPS_MOST; }

void races_start(Block& b) {
    if (!racing()) return;
    b.race_threads = 0;
    b.store_clock = 0;
    b.cells.assign(b.shared_bytes / 2 + 1, Cell{});
    for (int i = 0; i < b.threads; i++) {
        Clocks& c = b.all[i]->clocks;
        c.generic.assign(b.threads + EXTRA, 0);
        c.async = c.generic;
        c.generic[i] = 1;
    }
}

int race_thread_for_mbarrier(Block& b) { return b.threads + WARPGROUPS_MOST + 1 + b.race_threads++ % MBARRIER_THREADS; }

// ---- clocks -----------------------------------------------------------------------------------

static void join(Clock& to, const Clock& from) {
    if (to.size() < from.size()) to.resize(from.size());
    uint32_t* a = to.data();
    const uint32_t* b = from.data();
    for (size_t i = 0, n = from.size(); i < n; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
}

static void join_at(Clock& to, size_t thread, uint32_t count) {
    if (to.size() <= thread) to.resize(thread + 1);
    if (to[thread] < count) to[thread] = count;
}

void release(Thread& t, Clocks& to) {
    if (!racing()) return;
    join(to.generic, t.clocks.generic);
    join(to.async, t.clocks.async);
    t.clocks.generic[t.index]++;
}

void acquire(Thread& t, const Clocks& from) {
    if (!racing()) return;
    join(t.clocks.generic, from.generic);
    join(t.clocks.async, from.async);
}

void clear(Clocks& c) {
    c.generic.clear();
    c.async.clear();
}

bool knows(const Thread& t, const Clocks& c) {
    for (size_t i = 0; i < c.generic.size(); i++)
        if (c.generic[i] > t.clocks.generic[i]) return false;
    return true;
}

void sync_lanes(Block& b, int warp, uint32_t lanes) {
    if (!racing()) return;
    Clocks all;
    for (uint32_t m = lanes; m; m &= m - 1) release(*b.all[warp * WARP + __builtin_ctz(m)], all);
    for (uint32_t m = lanes; m; m &= m - 1) acquire(*b.all[warp * WARP + __builtin_ctz(m)], all);
}

void proxy_fence(Thread& t) {
    if (racing()) t.clocks.async[t.index] = t.clocks.generic[t.index];
}

// ---- accesses ---------------------------------------------------------------------------------

static std::string name(const Block& b, int thread) {
    if (thread < b.threads) return printed("thread %d", thread);
    if (thread < tma_stores(b)) return printed("the tensor core of warpgroup %d", thread - b.threads);
    return thread == tma_stores(b) ? "a TMA store" : "a TMA load";
}

static const char* const CODE = (const char*)&fail_at;  // addresses of call-outs are kept relative to this

static std::string writer(const Cell& c) {
    if (c.line) return printed(" (line %d)", c.line);
    return c.pc ? " (" + Site((const void*)(CODE + c.pc)).text() + ")" : "";
}

struct Access {
    Block& block;
    int thread;
    uint32_t count;
    const Clock& known;
    const Clock* async;     // for the asynchronous proxy: what is visible to it
    bool write;
    const Site& site;
};

[[noreturn]] static void report(const Access& a, const Cell& c, uint32_t earlier, bool earlier_write, bool proxy,
                                uint32_t at) {
    std::string by = name(a.block, earlier >> COUNT_BITS) + (earlier_write ? writer(c) : "");
    fail_at(a.site, "%s: smem+0x%x %s by %s, earlier %s by %s, %s",
            proxy ? "missing fence.proxy.async" : "shared-memory race", at, a.write ? "written" : "read",
            name(a.block, a.thread).c_str(), earlier_write ? "written" : "read", by.c_str(),
            proxy ? "not made visible to the asynchronous proxy" : "is not ordered before it");
}

static void access(const Access& a, uint32_t offset, uint32_t bytes) {
    uint32_t entry = a.thread << COUNT_BITS | (a.count & COUNT);
    auto ordered = [&](uint32_t e, const Clock& clock) {
        return !e || e >> COUNT_BITS == (uint32_t)a.thread || clock[e >> COUNT_BITS] >= (e & COUNT);
    };
    for (uint32_t i = offset / 2; i <= (offset + bytes - 1) / 2; i++) {
        Cell& c = a.block.cells[i];
        if (!ordered(c.write, a.known)) report(a, c, c.write, true, false, i * 2);
        if (a.async && c.write >> COUNT_BITS < (uint32_t)a.block.threads && !ordered(c.write, *a.async))
            report(a, c, c.write, true, true, i * 2);
        if (!a.write) {
            int slot = 0;
            while (slot < 3 && c.reads[slot] && c.reads[slot] >> COUNT_BITS != (uint32_t)a.thread) slot++;
            c.reads[slot < 3 ? slot : worker->random() % 3] = entry;
            continue;
        }
        for (uint32_t r : c.reads)
            if (!ordered(r, a.known)) report(a, c, r, false, false, i * 2);
        c = {entry, {0, 0, 0}, a.site.line, a.site.pc ? (int32_t)((const char*)a.site.pc - CODE) : 0};
    }
}

void shared_access(Thread& t, uint32_t offset, uint32_t bytes, bool write, const Site& site) {
    if (!racing() || !bytes) return;
    const Clock& clock = t.clocks.generic;
    access({*t.block, t.index, clock[t.index], clock, nullptr, write, site}, offset, bytes);
}

// With respect to earlier accesses a TMA load writes when it is issued, and it lasts until its mbarrier completes.
uint32_t tma_write(Thread& issuer, MBarrier& m, uint32_t offset, uint32_t bytes, const Site& site) {
    if (!racing()) return 0;
    access({*issuer.block, m.race_thread, ++m.race_clock, issuer.clocks.generic, nullptr, true, site}, offset, bytes);
    return m.race_clock;
}

void tma_written(MBarrier& m, uint32_t clock) {
    if (racing()) join_at(m.gathered.generic, m.race_thread, clock);
}

uint32_t tma_read(Thread& issuer, uint32_t offset, uint32_t bytes, const Site& site) {
    if (!racing()) return 0;
    Block& b = *issuer.block;
    access({b, tma_stores(b), ++b.store_clock, issuer.clocks.generic, &issuer.clocks.async, false, site}, offset,
           bytes);
    return b.store_clock;
}

void tma_read_waited(Thread& t, uint32_t clock) {
    if (racing()) join_at(t.clocks.generic, tma_stores(*t.block), clock);
}

// A product may rely on what all its threads know: the minimum over the four warps.
void product_issued(Thread& t, Product& p) {
    if (!racing() || t.lane) return;
    if (p.known.generic.empty()) {
        p.known = t.clocks;
        return;
    }
    auto least = [](Clock& a, const Clock& b) {
        for (size_t i = 0; i < b.size(); i++) a[i] = a[i] < b[i] ? a[i] : b[i];
    };
    least(p.known.generic, t.clocks.generic);
    least(p.known.async, t.clocks.async);
}

void product_reads(Block& b, Warpgroup& w, Product& p, uint32_t offset, uint32_t bytes) {
    if (!racing()) return;
    if (!p.race_clock) p.race_clock = ++w.race_clock;
    access({b, tensor_core(b, w), p.race_clock, p.known.generic, &p.known.async, false, p.site}, offset, bytes);
}

// The thread has waited for the first `count` products; another thread of the warpgroup may have waited for more. Every
// product reads shared memory, so their clocks are their numbers, from 1.
void products_waited(Thread& t, Warpgroup& w, uint32_t count) {
    if (racing()) join_at(t.clocks.generic, tensor_core(*t.block, w), count);
}

}  // namespace emu
