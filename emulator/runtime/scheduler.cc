// Chooses the thread that runs next, and describes the threads of a deadlock.
#include "runtime.h"
#include <map>

namespace emu {

constexpr int YIELDS_MOST = 1 << 20;

static uint32_t nth_bit(uint32_t bits, uint32_t n) { return __builtin_ctz(_pdep_u32(1u << n, bits)); }

void make_ready(Block& b, int warp, uint32_t lanes) {
    b.ready[warp] |= lanes;
    b.ready_warps |= 1u << warp;
}

void wake(Block& b, Waiting& waiting) {
    for (int w = 0; w < b.warps; w++)
        if (waiting.lanes[w]) {
            make_ready(b, w, waiting.lanes[w]);
            waiting.lanes[w] = 0;
        }
}

static void land(size_t i) {
    auto& flights = worker->flights;
    Flight flight = std::move(flights[i]);
    flights[i] = std::move(flights.back());
    flights.pop_back();
    worker->counters.asynchronous++;
    flight.land();
}

static Thread* take(Block& b, uint32_t warp, uint32_t lane) {
    b.current_warp = warp;
    b.ready[warp] &= ~(1u << lane);
    if (!b.ready[warp]) b.ready_warps &= ~(1u << warp);
    return b.all[warp * WARP + lane].get();
}

// Runs the same warp as long as it can run, then the next.
static Thread* pick_in_order(Block& b) {
    uint32_t w = b.current_warp;
    if (!b.ready[w]) {
        uint32_t after = w < 31 ? b.ready_warps >> (w + 1) << (w + 1) : 0;
        w = __builtin_ctz(after ? after : b.ready_warps);
    }
    return take(b, w, __builtin_ctz(b.ready[w]));
}

static Thread* pick_any(Block& b) {
    uint32_t w = nth_bit(b.ready_warps, worker->random() % __builtin_popcount(b.ready_warps));
    return take(b, w, nth_bit(b.ready[w], worker->random() % __builtin_popcount(b.ready[w])));
}

// Warps have random priorities, occasionally reassigned: one runs as far ahead as the barriers let it.
static Thread* pick_by_priority(Block& b) {
    if ((worker->random() & 255) == 0) b.priority[worker->random() % b.warps] = worker->random();
    uint32_t w = __builtin_ctz(b.ready_warps);
    for (uint32_t m = b.ready_warps; m; m &= m - 1)
        if (b.priority[__builtin_ctz(m)] > b.priority[w]) w = __builtin_ctz(m);
    return take(b, w, b.priority[w] & 1 ? __builtin_ctz(b.ready[w]) : 31 - __builtin_clz(b.ready[w]));
}

static Block* pick_block() {
    auto& blocks = worker->blocks;
    size_t n = blocks.size(), first = worker->current_block;
    if (n > 1 && worker->config.order != ORDERED) first = worker->random() % n;
    for (size_t i = 0; i < n; i++) {
        size_t j = (first + i) % n;
        if (blocks[j]->ready_warps) {
            worker->current_block = j;
            return blocks[j].get();
        }
    }
    return nullptr;
}

Thread* pick() {
    Worker& k = *worker;
    for (;;) {
        if (k.config.landing == SOMETIMES && !k.flights.empty() && (k.random() & 7) == 0)
            land(k.random() % k.flights.size());
        if (Block* b = pick_block()) {
            switch (k.config.order) {
            case ORDERED: return pick_in_order(*b);
            case RANDOM: return pick_any(*b);
            default: return pick_by_priority(*b);
            }
        }
        // No thread can run: now the latest asynchronous results must land, and threads that only poll look again.
        bool landed = !k.flights.empty();
        if (landed) land(k.config.order == ORDERED ? 0 : k.random() % k.flights.size());
        for (auto& b : k.blocks) wake(*b, b->yielded);
        if (!landed && !pick_block()) return nullptr;
    }
}

static void run_next() {
    Thread* next = pick();
    if (next) return switch_to(next);
    worker->error = deadlock();
    leave();
}

void wait_for(const Reason& reason) {
    self()->reason = reason;
    run_next();
}

void wait_in(Waiting& waiting, const Reason& reason) {
    waiting.lanes[self()->warp] |= 1u << self()->lane;
    wait_for(reason);
}

void yield_now() {
    if (++self()->yields > YIELDS_MOST)
        fail_at(Site(),
                "deadlock: the thread has yielded %d times; what it waits for does not come (too few resident blocks?)",
                YIELDS_MOST);
    wait_in(self()->block->yielded, {});
}

void griddep_wait() { self()->waited = true; }

void run_thread() {
    for (;;) {
        worker->launch->kernel->call(worker->launch->params);
        Thread& t = *self();
        if (!t.waited)
            fail_at(Site(), "missing griddep_wait: the thread exits without it, so that waiting for this launch would "
                            "not cover those before it");
        copies_at_exit(t);
        stores_at_exit(t);
        t.done = true;
        if (--t.block->alive == 0) leave();
        else run_next();
        // The next thread that runs on this stack belongs to another block of the grid.
    }
}

// ---- deadlocks --------------------------------------------------------------------------------

static std::string describe(const Thread& t) {
    const Reason& r = t.reason;
    switch (r.on) {
    case Wait::Barrier: {
        const NamedBarrier& b = t.block->barriers[r.which];
        const char* name = r.which ? "named barrier" : "__syncthreads, barrier";
        return printed("%s %u: %d of %d threads arrived", name, r.which, b.arrived, b.expected);
    }
    case Wait::MBarrier: {
        const MBarrier* m = find_mbarrier(*t.block, r.which);
        if (!m) return "an mbarrier that was invalidated";
        return printed(
            "mbarrier smem+0x%x parity %u (initialised at %s; phase %u, %d of %d arrivals pending, tx-count %d bytes "
            "pending)",
            r.which - SHARED_START, r.detail, m->site.text().c_str(), m->phase, m->pending, m->count, m->tx_bytes);
    }
    case Wait::Meeting: return printed("the other lanes of %s, mask 0x%08x", r.what, r.detail);
    case Wait::Wgmma: return "wgmma.wait_group: not all 128 threads of the warpgroup issued the wgmma";
    case Wait::Registers:
        return printed("setmaxnreg.inc to %u: the block has %d registers to spare", r.which, t.block->spare_registers);
    case Wait::Nothing: break;
    }
    return "its turn";
}

std::string deadlock() {
    struct Group {
        int threads = 0;
        const Thread* first = nullptr;
    };
    std::map<std::string, Group> groups;
    int exited = 0;
    for (auto& b : worker->blocks)
        for (int i = 0; i < b->threads; i++) {
            const Thread& t = *b->all[i];
            if (t.done) {
                exited++;
                continue;
            }
            std::string where =
                printed("block(%u,%u,%u) at %s waiting for ", t.bid.x, t.bid.y, t.bid.z, t.reason.site.text().c_str());
            Group& g = groups[where + describe(t)];
            if (!g.threads++) g.first = &t;
        }
    std::string out = "deadlock: no thread can run and no asynchronous operation is in flight\n";
    for (auto& [what, g] : groups)
        out += printed("  %d threads (first: thread %d, warp %d) in %s\n", g.threads, g.first->index, g.first->warp,
                       what.c_str());
    return out + printed("  %d threads have exited", exited);
}

}  // namespace emu
