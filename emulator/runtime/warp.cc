// Shuffles, votes, __syncwarp, ldmatrix and stmatrix.
#include "warp.h"

namespace emu {

static const char *SHFL = "shfl", *VOTE = "vote", *SYNCWARP = "__syncwarp", *LDMATRIX = "ldmatrix",
                  *STMATRIX = "stmatrix";

Meeting& find_meeting(const char* what, uint32_t mask, bool aligned, const Site& site) {
    Thread& me = *self();
    if (!(mask >> me.lane & 1)) fail_at(site, "%s: the calling lane is not in the mask 0x%08x", what, mask);
    Meeting* empty = nullptr;
    for (Meeting& m : me.block->meetings[me.warp]) {
        if (!m.arrived) {
            if (!empty) empty = &m;
        } else if (m.mask == mask) {
            if (m.what != what || (aligned && !(m.site == site)))
                fail_at(site, "divergent warp: lane %d is in %s while other lanes wait in %s at %s", me.lane, what,
                        m.what, m.site.text().c_str());
            return m;
        } else if (m.mask & mask) {
            fail_at(site, "divergent warp: %s with mask 0x%08x overlaps mask 0x%08x, still waiting in %s at %s", what,
                    mask, m.mask, m.what, m.site.text().c_str());
        }
    }
    if (!empty) fail_at(site, "divergent warp: more than four groups of lanes wait for each other");
    empty->mask = mask;
    empty->what = what;
    empty->site = site;
    return *empty;
}

uint64_t warp_shfl(uint32_t mask, uint64_t value, int lane, int mode, int width, const char* f, int l) {
    struct Lane {
        uint64_t given, got;
        int operand;
    } mine{value, value, lane};
    Site site(f, l);
    if (width <= 0 || width > WARP || (width & (width - 1)))
        fail_at(site, "shfl: width %d is no power of two up to 32", width);
    meet(SHFL, mask, false, &mine, site, [&](Meeting& m) {
        each_lane(mask, [&](int i) {
            Lane& to = *(Lane*)m.lanes[i];
            int segment = i & ~(width - 1), from = 0;
            switch (mode) {
            case SHUFFLE_INDEX: from = segment + (to.operand & (width - 1)); break;
            case SHUFFLE_XOR: from = i ^ to.operand; break;
            case SHUFFLE_DOWN: from = i + to.operand; break;
            case SHUFFLE_UP: from = i - to.operand; break;
            }
            if (from < segment || from >= segment + width) from = i;
            if (!(mask >> from & 1))
                fail_at(site, "shfl: lane %d reads lane %d, which is not in the mask 0x%08x", i, from, mask);
            to.got = ((Lane*)m.lanes[from])->given;
        });
    });
    return mine.got;
}

uint32_t warp_vote(uint32_t mask, bool predicate, const char* f, int l) {
    struct Lane {
        bool predicate;
        uint32_t all;
    } mine{predicate, 0};
    meet(VOTE, mask, false, &mine, {f, l}, [&](Meeting& m) {
        uint32_t all = 0;
        each_lane(mask, [&](int i) { all |= (uint32_t)((Lane*)m.lanes[i])->predicate << i; });
        each_lane(mask, [&](int i) { ((Lane*)m.lanes[i])->all = all; });
    });
    return mine.all;
}

void warp_sync(uint32_t mask, const char* f, int l) {
    meet(SYNCWARP, mask, false, nullptr, {f, l}, [&](Meeting&) { sync_lanes(*self()->block, self()->warp, mask); });
}

// The rows of matrix i are addressed by lanes 8i..8i+7; lane j holds two halves of row j / 4, or of column j / 4.
struct MatrixLane {
    uint32_t* registers;
    uint32_t address;
};

void ldmatrix(uint32_t* r, int count, bool trans, uint32_t address, const char* f, int l) {
    MatrixLane mine{r, address};
    Site site(f, l);
    meet(LDMATRIX, ALL_LANES, true, &mine, site, [&](Meeting& m) {
        Thread& me = *self();
        Block& b = *me.block;
        for (int i = 0; i < count; i++) {
            alignas(16) uint16_t rows[8][8];
            uint8_t banks[8] = {}, worst = 0;
            for (int row = 0; row < 8; row++) {
                int lane = i * 8 + row;
                uint32_t a = ((MatrixLane*)m.lanes[lane])->address;
                memcpy(rows[row], shared_at(b, a, 16, 16, LDMATRIX, site), 16);
                if (racing()) shared_access(*b.all[me.warp * WARP + lane], a - SHARED_START, 16, false, site);
                uint8_t n = ++banks[a >> 4 & 7];
                worst = n > worst ? n : worst;
            }
            worker->counters.ldmatrix_phases++;
            worker->counters.ldmatrix_conflicts += worst - 1;
            for (int lane = 0; lane < WARP; lane++) {
                int major = lane >> 2, minor = (lane & 3) * 2;
                uint32_t low = trans ? rows[minor][major] : rows[major][minor];
                uint32_t high = trans ? rows[minor + 1][major] : rows[major][minor + 1];
                ((MatrixLane*)m.lanes[lane])->registers[i] = low | high << 16;
            }
        }
    });
}

void stmatrix(uint32_t address, const uint32_t* r, int count, bool trans, const char* f, int l) {
    MatrixLane mine{const_cast<uint32_t*>(r), address};
    Site site(f, l);
    meet(STMATRIX, ALL_LANES, true, &mine, site, [&](Meeting& m) {
        Thread& me = *self();
        Block& b = *me.block;
        for (int i = 0; i < count; i++) {
            uint16_t rows[8][8];
            for (int lane = 0; lane < WARP; lane++) {
                int major = lane >> 2, minor = (lane & 3) * 2;
                uint32_t v = ((MatrixLane*)m.lanes[lane])->registers[i];
                (trans ? rows[minor][major] : rows[major][minor]) = (uint16_t)v;
                (trans ? rows[minor + 1][major] : rows[major][minor + 1]) = (uint16_t)(v >> 16);
            }
            for (int row = 0; row < 8; row++) {
                int lane = i * 8 + row;
                uint32_t a = ((MatrixLane*)m.lanes[lane])->address;
                memcpy(shared_at(b, a, 16, 16, STMATRIX, site), rows[row], 16);
                if (racing()) shared_access(*b.all[me.warp * WARP + lane], a - SHARED_START, 16, true, site);
            }
        }
    });
}

}  // namespace emu
