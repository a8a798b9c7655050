// Split-K: several blocks compute the same tile, each over a part of the depth, and the last block to finish adds up
// their partial sums.
#pragma once
#include "numeric.cuh"

constexpr int SUM_THREADS = 256;  // threads of a block that hold accumulators, the first ones

// Called by all SUM_THREADS threads. Each block writes its partial sums to memory. The last block of a tile to arrive
// receives the sums of all parts, added in the order of the depth rather than of arrival, and true; the others receive
// false. `partial` is [tiles][splits][QUADS][SUM_THREADS]; `counters` has one counter per tile, which is 0 before and
// after. The word of shared memory at `ticket` may be in use until all threads have arrived here. Uses named barrier 3.
template <int QUADS>
PTX_FN bool add_splits(float (&sums)[4 * QUADS], float4* partial, uint32_t* counters, int tile, int splits, int split,
                       unsigned char* ticket) {
    float4* tile_sums = partial + size_t(tile) * splits * QUADS * SUM_THREADS + threadIdx.x;
    float4* own = tile_sums + size_t(split) * QUADS * SUM_THREADS;
#pragma unroll
    for (int i = 0; i < QUADS; i++)
        own[i * SUM_THREADS] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    __threadfence();
    named_bar_sync(3, SUM_THREADS);
    uint32_t* arrived = reinterpret_cast<uint32_t*>(ticket);
    if (threadIdx.x == 0) {
        *arrived = atomicAdd(counters + tile, 1u);
        // All parts have arrived: reset the counter.
        if (*arrived == splits - 1) counters[tile] = 0;
    }
    named_bar_sync(3, SUM_THREADS);
    bool last = *arrived == splits - 1;
    // Every thread has read the ticket before another ticket is drawn or its memory is reused.
    named_bar_sync(3, SUM_THREADS);
    if (!last) return false;
    __threadfence();
    // Sixteen loads of a part are in flight together; there are registers for that many.
    constexpr int IN_FLIGHT = 16;
#pragma unroll
    for (int first = 0; first < QUADS; first += IN_FLIGHT) {
#pragma unroll 1
        for (int part = 0; part < splits; part++) {
            const float4* part_sums = tile_sums + size_t(part) * QUADS * SUM_THREADS;
#pragma unroll
            for (int i = first; i < first + IN_FLIGHT && i < QUADS; i++) {
                float4 more = part_sums[i * SUM_THREADS];
                float* sum = sums + 4 * i;
                if (part == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
                sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w;
            }
        }
    }
    return true;
}
