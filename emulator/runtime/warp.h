// The rendezvous of the lanes of a warp.
#pragma once
#include "runtime.h"

namespace emu {

// The calling lane's meeting under this mask: one in which other lanes wait, or a new one. Fails if the warp has
// diverged.
Meeting& find_meeting(const char* what, uint32_t mask, bool aligned, const Site& site);

// Waits until every lane of `mask` has arrived. The last one calls `all(meeting)`, with what each lane passed in, and
// then all continue. If `aligned`, all lanes must arrive by the same instruction.
template <class All>
inline void meet(const char* what, uint32_t mask, bool aligned, void* mine, const Site& site, All&& all) {
    Thread& me = *self();
    Meeting& m = find_meeting(what, mask, aligned, site);
    uint32_t bit = 1u << me.lane;
    m.lanes[me.lane] = mine;
    m.arrived |= bit;
    if (m.arrived != mask) return wait_for({Wait::Meeting, site, 0, mask, what});
    all(m);
    m.arrived = 0;
    worker->counters.collectives++;
    if (mask != bit) make_ready(*me.block, me.warp, mask & ~bit);
}

template <class Each> inline void each_lane(uint32_t mask, Each&& each) {
    for (; mask; mask &= mask - 1) each(__builtin_ctz(mask));
}

}  // namespace emu
