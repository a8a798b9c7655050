// mbarriers live in a table. Shared memory holds a magic word in their place, so that overwriting one is noticed.
#include "runtime.h"

namespace emu {

static uint64_t magic(uint32_t address) { return 0xe3b0c44298fc0000ull | (address & 0xffff); }

MBarrier* find_mbarrier(Block& b, uint32_t address) {
    for (auto& m : b.mbarriers)
        if (m->address == address) return m.get();
    return nullptr;
}

MBarrier* get_mbarrier(uint32_t address, const Site& site) {
    Thread& me = *self();
    unsigned char* word = shared_at(*me.block, address, 8, 8, "mbarrier", site);
    MBarrier* m = find_mbarrier(*me.block, address);
    uint32_t offset = address - SHARED_START;
    if (!m) fail_at(site, "mbarrier at smem+0x%x is used before mbarrier.init", offset);
    uint64_t there;
    memcpy(&there, word, 8);
    if (there != magic(address)) fail_at(site, "mbarrier at smem+0x%x was overwritten by ordinary stores", offset);
    if (racing() && !knows(me, m->initialised))
        fail_at(
            site,
            "race: mbarrier at smem+0x%x used, but its initialisation at %s does not happen before (missing barrier)",
            offset, m->site.text().c_str());
    return m;
}

void mbar_init(uint32_t address, uint32_t count, const char* f, int l) {
    Thread& me = *self();
    Block& b = *me.block;
    Site site(f, l);
    unsigned char* word = shared_at(b, address, 8, 8, "mbarrier.init", site);
    if (!count || count >= 1 << 20) fail_at(site, "mbarrier.init with count %u", count);
    if (MBarrier* old = find_mbarrier(b, address))
        fail_at(site, "mbarrier at smem+0x%x initialised twice, first at %s (no mbarrier.inval between)",
                address - SHARED_START, old->site.text().c_str());
    auto m = std::make_unique<MBarrier>();
    m->address = address;
    m->count = m->pending = count;
    m->site = site;
    m->race_thread = race_thread_for_mbarrier(b);
    release(me, m->initialised);
    b.mbarriers.push_back(std::move(m));
    uint64_t word_there = magic(address);
    memcpy(word, &word_there, 8);
}

void mbar_inval(uint32_t address, const char* f, int l) {
    MBarrier* m = get_mbarrier(address, {f, l});
    Block& b = *self()->block;
    for (uint32_t lanes : m->waiting.lanes)
        if (lanes) fail_at({f, l}, "mbarrier.inval at smem+0x%x while threads wait on it", address - SHARED_START);
    for (auto& each : b.mbarriers)
        if (each.get() == m) {
            std::swap(each, b.mbarriers.back());
            b.mbarriers.pop_back();
            break;
        }
    memset(b.shared + (address - SHARED_START), 0xff, 8);
}

void mbarrier_progress(Block& b, MBarrier& m) {
    if (m.pending || m.tx_bytes) return;
    m.phase++;
    m.pending = m.count;
    if (racing()) {
        m.released = m.gathered;
        clear(m.gathered);
    }
    wake(b, m.waiting);
}

void mbar_arrive(uint32_t address, uint32_t count, uint32_t tx_bytes, const char* f, int l) {
    Site site(f, l);
    MBarrier* m = get_mbarrier(address, site);
    if (m->pending < (int)count)
        fail_at(site, "mbarrier smem+0x%x: more arrivals in this phase than its count %d", address - SHARED_START,
                m->count);
    release(*self(), m->gathered);
    m->tx_bytes += tx_bytes;
    m->pending -= count;
    mbarrier_progress(*self()->block, *m);
}

bool mbar_test(uint32_t address, uint32_t parity, const char* f, int l) {
    MBarrier* m = get_mbarrier(address, {f, l});
    bool complete = (m->phase & 1) != (parity & 1);
    if (complete) acquire(*self(), m->released);
    return complete;
}

void mbar_wait(uint32_t address, uint32_t parity, const char* f, int l) {
    Site site(f, l);
    MBarrier* m = get_mbarrier(address, site);
    while ((m->phase & 1) == (parity & 1)) wait_in(m->waiting, {Wait::MBarrier, site, address, parity});
    acquire(*self(), m->released);
}

void fence_proxy_async() { proxy_fence(*self()); }

}  // namespace emu
