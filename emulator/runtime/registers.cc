// setmaxnreg: a block's warps release registers to a pool of the block, and take others from it.
#include <algorithm>

#include "runtime.h"

namespace emu {

// The registers that nvcc gives a thread of a kernel that uses setmaxnreg: its share of the multiprocessor's, rounded
// down to a multiple of 8.
int registers_at_start(int threads) { return std::min(65536 / threads / 8 * 8, 248); }

void set_registers(int count, bool more, const char* f, int l) {
    Site site(f, l);
    Thread& me = *self();
    Block& b = *me.block;
    warp_sync(ALL_LANES, f, l);
    if (b.threads < (me.warp / 4 + 1) * 128) fail_at(site, "setmaxnreg: the warpgroup has fewer than 128 threads");
    if (more ? count < me.registers : count > me.registers)
        fail_at(site, "setmaxnreg.%s to %d of a thread that has %d registers", more ? "inc" : "dec", count,
                me.registers);
    while (count - me.registers > b.spare_registers) wait_in(b.wanting, {Wait::Registers, site, (uint32_t)count});
    b.spare_registers -= count - me.registers;
    me.registers = count;
    if (!more) wake(b, b.wanting);
}

}  // namespace emu
