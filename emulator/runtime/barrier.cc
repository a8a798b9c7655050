// Barriers of a block: __syncthreads is barrier 0.
#include "runtime.h"

namespace emu {

static void arrive(int id, int threads, bool wait, const Site& site) {
    Thread& me = *self();
    Block& b = *me.block;
    // A partly filled last warp counts as a whole one, as on the device.
    if (id < 0 || id > 15 || threads <= 0 || threads > b.warps * WARP || (id && threads % WARP))
        fail_at(site, "bad named barrier: id %d, %d threads, in a block of %d", id, threads, b.threads);
    NamedBarrier& bar = b.barriers[id];
    if (bar.arrived == 0) {
        bar.expected = threads;
        bar.site = site;
    } else if (bar.expected != threads) {
        fail_at(site, "divergent barrier: barrier %d used with count %d while others wait with count %d at %s", id,
                threads, bar.expected, bar.site.text().c_str());
    } else if (id == 0 && !(bar.site == site)) {
        fail_at(site, "divergent barrier: __syncthreads meets threads waiting in another __syncthreads at %s",
                bar.site.text().c_str());
    }
    release(me, bar.gathered);
    if (++bar.arrived == threads) {
        bar.arrived = 0;
        worker->counters.barriers++;
        if (racing()) {
            bar.released = bar.gathered;
            clear(bar.gathered);
        }
        wake(b, bar.waiting);
    } else if (wait) {
        wait_in(bar.waiting, {Wait::Barrier, site, (uint32_t)id});
    }
    if (wait) acquire(me, bar.released);
}

void syncthreads(const char* f, int l) { arrive(0, self()->block->threads, true, {f, l}); }
void named_bar(int id, int threads, bool wait, const char* f, int l) { arrive(id, threads, wait, {f, l}); }

}  // namespace emu
