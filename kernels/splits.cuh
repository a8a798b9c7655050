// Split-K: several blocks compute the same tile, each over a part of the depth, and the last block to finish adds up
// their partial sums.
#pragma once
#include "numeric.cuh"

constexpr int SUM_THREADS = 256;  // threads of a block that hold accumulators, the first ones

// The partial sums of a tile in memory, [splits][QUADS][SUM_THREADS] of the tile, at the thread's first number.
template <int QUADS> PTX_FN float4* sums_of(float4* partial, int tile, int splits) {
    return partial + size_t(tile) * splits * QUADS * SUM_THREADS + threadIdx.x;
}

// Called by all SUM_THREADS threads of a block: writes its partial sums to memory, and returns true to the last block
// of the tile to arrive. `counters` has one counter per tile, which is 0 before and after. The word of shared memory at
// `ticket` may be in use until all threads have arrived here. Uses named barrier 3.
template <int QUADS>
PTX_FN bool leave_sums(const float (&sums)[4 * QUADS], float4* partial, uint32_t* counters, int tile, int splits,
                       int split, unsigned char* ticket) {
    float4* own = sums_of<QUADS>(partial, tile, splits) + size_t(split) * QUADS * SUM_THREADS;
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
    if (last) __threadfence();
    return last;
}

// For the last block of a tile: the sums of all parts, added in the order of the depth rather than of arrival.
// IN_FLIGHT loads of 16 bytes are under way together, of several parts if one has fewer; the time of this is that of
// waiting for them.
template <int QUADS, int IN_FLIGHT>
PTX_FN void add_parts(float (&sums)[4 * QUADS], float4* partial, int tile, int splits) {
    constexpr int AT_ONCE = QUADS < IN_FLIGHT ? QUADS : IN_FLIGHT, PARTS = IN_FLIGHT / AT_ONCE;
    const float4* tile_sums = sums_of<QUADS>(partial, tile, splits);
#pragma unroll
    for (int i = 0; i < 4 * QUADS; i++) sums[i] = 0.0f;
#pragma unroll
    for (int first = 0; first < QUADS; first += AT_ONCE) {
#pragma unroll 1
        for (int part = 0; part < splits; part += PARTS) {
            float4 more[PARTS][AT_ONCE];
#pragma unroll
            for (int j = 0; j < PARTS; j++)
#pragma unroll
                for (int i = 0; i < AT_ONCE && first + i < QUADS; i++)
                    if (part + j < splits) more[j][i] = tile_sums[((part + j) * QUADS + first + i) * SUM_THREADS];
#pragma unroll
            for (int j = 0; j < PARTS; j++) {
                if (part + j >= splits) break;
#pragma unroll
                for (int i = 0; i < AT_ONCE && first + i < QUADS; i++) {
                    float* sum = sums + 4 * (first + i);
                    sum[0] += more[j][i].x, sum[1] += more[j][i].y, sum[2] += more[j][i].z, sum[3] += more[j][i].w;
                }
            }
        }
    }
}
