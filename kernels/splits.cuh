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
    // Sixteen loads of a part are on their way together, for which there are registers.
    constexpr int TOGETHER = 16;
#pragma unroll
    for (int first = 0; first < QUADS; first += TOGETHER) {
#pragma unroll 1
        for (int part = 0; part < splits; part++) {
            const float4* of_part = of_tile + size_t(part) * QUADS * SUMMERS;
#pragma unroll
            for (int i = first; i < first + TOGETHER && i < QUADS; i++) {
                float4 more = of_part[i * SUMMERS];
                float* sum = sums + 4 * i;
                if (part == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
                sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w;
            }
        }
    }
    return true;
}
