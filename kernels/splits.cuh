// A product's depth in parts: blocks that make the same tile from a part of the depth each, and one of which adds up.
#pragma once
#include "numeric.cuh"

constexpr int SUMMERS = 256;  // threads of a block that hold sums, the first ones

// Called by all of these. Each block leaves its sums in memory. The last of a tile's blocks to come gets the sums of
// all parts, added in the order of the depth and not in that of coming, and true; the others get false.
// `partial` is [tiles][splits][QUADS][SUMMERS]; `counters` has one for each tile, 0 before and after. The word of
// shared memory at `ticket` may be in use until all threads are here. Uses named barrier 3.
template <int QUADS>
PTX_FN bool add_splits(float (&sums)[4 * QUADS], float4* partial, uint32_t* counters, int tile, int splits, int split,
                       unsigned char* ticket) {
    float4* of_tile = partial + size_t(tile) * splits * QUADS * SUMMERS + threadIdx.x;
    float4* own = of_tile + size_t(split) * QUADS * SUMMERS;
#pragma unroll
    for (int i = 0; i < QUADS; i++)
        own[i * SUMMERS] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    __threadfence();
    named_bar_sync(3, SUMMERS);
    uint32_t* came = reinterpret_cast<uint32_t*>(ticket);
    if (threadIdx.x == 0) {
        *came = atomicAdd(counters + tile, 1u);
        // Everybody has come: the counter is as it was found.
        if (*came == splits - 1) counters[tile] = 0;
    }
    named_bar_sync(3, SUMMERS);
    bool last = *came == splits - 1;
    // The ticket has been read before another is drawn, or its place is used otherwise.
    named_bar_sync(3, SUMMERS);
    if (!last) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        float4 sum = of_tile[i * SUMMERS];
        for (int k = 1; k < splits; k++) {
            float4 more = of_tile[(size_t(k) * QUADS + i) * SUMMERS];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        sums[4 * i] = sum.x, sums[4 * i + 1] = sum.y, sums[4 * i + 2] = sum.z, sums[4 * i + 3] = sum.w;
    }
    return true;
}
