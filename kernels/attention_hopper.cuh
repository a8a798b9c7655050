// Shared by the kernels of attention for sm_90a: rings of slots that TMA fills, products of rows stored in spans, and a
// softmax that works on the accumulators where wgmma leaves them.
//
// Rows of channels lie in shared memory as TMA writes them: in spans of 64 channels, which are the 128 bytes of a
// swizzle, with the first spans of all rows before the second spans of all rows. A warpgroup has 64 rows; of each
// warp's 16 a lane holds two: lane / 4, and 8 below it.
#pragma once
#include "numeric.cuh"

struct AttentionHopperParams {
    // {channels of a head, heads, tokens, images}, in boxes of 64 channels of one head by 64 queries, or by KEYS keys.
    CUtensorMap q, k, v, out;
    int32_t queries, keys;
    // scale * log2(e), positive: exp(scale * s) = exp2(exponent * s).
    float exponent;
    int32_t padding[29];
};
LAYOUT(AttentionHopperParams, q, k, v, out, queries, keys, exponent, padding)

namespace attention_hopper {

constexpr int ROWS = 64;   // rows of a warpgroup
constexpr int SPAN = 128;  // bytes of a span, 64 channels

#ifdef PTX_HOPPER
constexpr uint32_t ALL_LANES = 0xffffffffu;

// ---- rings: each slot has a pair of mbarriers of 8 bytes, "full" and "empty" ----

// A position in a ring of N slots, and the parity of the phase to wait for there.
template <int N> struct Ring {
    int slot, parity;

    __device__ __forceinline__ void advance() {
        if (++slot == N) slot = 0, parity ^= 1;
    }
};

// Initialises pairs of barriers. A slot becomes full by one thread's arrival and the bytes it announces, and empty by
// the arrivals of `readers` threads.
PTX_FN void init_pairs(uint32_t pairs, int count, int readers) {
    for (int i = 0; i < count; i++) {
        mbar_init(pairs + i * 16, 1);
        mbar_init(pairs + i * 16 + 8, readers);
    }
}

// Fetches COUNT tokens of the block's head (y) and image (z), from `token` on, into an empty slot: SPANS spans of their
// channels, from `span` on. They count at the barrier `full`, which has been told their bytes.
template <int COUNT, int SPANS>
PTX_FN void fill(const CUtensorMap& map, uint32_t slot, uint32_t full, int token, int span = 0) {
#pragma unroll
    for (int i = 0; i < SPANS; i++)
        tma_load_4d(slot + i * COUNT * SPAN, &map, full, (span + i) * 64, blockIdx.y, token, blockIdx.z);
}

// ---- products; the caller issues fence, commit and wait ----

// Scores of a warpgroup's rows with COLUMNS others, both of WIDTH channels; added to `scores` if `add`.
template <int WIDTH, int COLUMNS>
PTX_FN void multiply(float (&scores)[COLUMNS / 2], uint32_t rows, uint32_t columns, bool add = false) {
    uint64_t a = wg_desc_sw128(rows, 16, 8 * SPAN), b = wg_desc_sw128(columns, 16, 8 * SPAN);
#pragma unroll
    for (int i = 0; i < (WIDTH + 15) / 16; i++) {
        // 16 channels are 32 bytes of a span; descriptors count in units of 16 bytes.
        uint64_t of_a = a + (i / 4 * ROWS * SPAN + i % 4 * 32) / 16;
        uint64_t of_b = b + (i / 4 * COLUMNS * SPAN + i % 4 * 32) / 16;
        if constexpr (COLUMNS == 32) wgmma_m64n32k16<0>(scores, of_a, of_b, add || i > 0);
        if constexpr (COLUMNS == 64) wgmma_m64n64k16<0>(scores, of_a, of_b, add || i > 0);
        if constexpr (COLUMNS == 80) wgmma_m64n80k16<0>(scores, of_a, of_b, add || i > 0);
        if constexpr (COLUMNS == 128) wgmma_m64n128k16<0>(scores, of_a, of_b, add || i > 0);
    }
}

// Weights of COUNT others in fp16, as fragments of A.
template <int COUNT> using Weights = uint32_t[COUNT / 16][4];

// Adds the WIDTH channels of the others, weighted, to a warpgroup's accumulators.
template <int WIDTH, int COUNT>
PTX_FN void add_weighted(float (&sums)[WIDTH / 2], const Weights<COUNT>& weights, uint32_t others) {
    uint64_t b = wg_desc_sw128(others, COUNT * SPAN, 8 * SPAN);
#pragma unroll
    for (int i = 0; i < COUNT / 16; i++) {
        uint64_t of_b = b + i * 16 * SPAN / 16;
        if constexpr (WIDTH == 40) wgmma_m64n40k16_rs<1>(sums, weights[i], of_b, 1);
        if constexpr (WIDTH == 64) wgmma_m64n64k16_rs<1>(sums, weights[i], of_b, 1);
        if constexpr (WIDTH == 80) wgmma_m64n80k16_rs<1>(sums, weights[i], of_b, 1);
        if constexpr (WIDTH == 160) wgmma_m64n160k16_rs<1>(sums, weights[i], of_b, 1);
    }
}

// ---- softmax ----

// Lazy rescaling as in attention.cu: the reference is raised only when log2 of a weight would exceed it by more than
// this.
constexpr float HEADROOM = 8.0f;

// Softmax state of a lane's two rows.
struct Rows {
    // log2 of the number that the weights are relative to.
    float reference[2];
    // Sum of the fp16-rounded weights of this lane's keys.
    float sum[2];
};

// Masks the columns from `count` on.
template <int R> PTX_FN void mask(float (&scores)[R], int count) {
#pragma unroll
    for (int i = 0; i < R; i++)
        if (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 >= count) scores[i] = -INFINITY;
}

// Raises the references of rows whose scores require it, which is seldom, and rescales their sums of weights. Returns
// true if any was raised; the caller then multiplies the accumulators by `factor`.
template <int R>
PTX_FN bool raise_references(const float (&scores)[R], Rows& rows, float (&factor)[2], float exponent) {
    bool raised = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        // Two chains, of even and of odd columns.
        float even = scores[2 * h], odd = scores[2 * h + 1];
#pragma unroll
        for (int i = 1; i < R / 4; i++) {
            even = fmaxf(even, scores[4 * i + 2 * h]);
            odd = fmaxf(odd, scores[4 * i + 2 * h + 1]);
        }
        float top = fmaxf(even, odd);
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
        top *= exponent;
        bool raise = top > rows.reference[h] + HEADROOM;
        factor[h] = raise ? exp2_approx(rows.reference[h] - top) : 1.0f;
        if (raise) rows.reference[h] = top;
        rows.sum[h] *= factor[h];
        raised |= raise;
    }
    return raised;
}

// Turns scores into weights in place.
template <int R> PTX_FN void exponentiate(float (&scores)[R], const Rows& rows, float exponent) {
#pragma unroll
    for (int i = 0; i < R; i++) scores[i] = exp2_approx(fmaf(scores[i], exponent, -rows.reference[i / 2 % 2]));
}

// Rounds the weights to fp16 and adds them to the row sums.
template <int R> PTX_FN void round_weights(const float (&scores)[R], uint32_t (&weights)[R / 8][4], Rows& rows) {
#pragma unroll
    for (int i = 0; i < R / 2; i++) {
        __half2 pair = __floats2half2_rn(scores[2 * i], scores[2 * i + 1]);
        float2 rounded = __half22float2(pair);
        weights[i / 4][i % 4] = bits_of(pair);
        rows.sum[i % 2] += rounded.x + rounded.y;
    }
}

// Inverts the sums of weights of a lane's rows, over all columns.
PTX_FN void invert_sums(const Rows& rows, float (&inverse)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = rows.sum[h];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        inverse[h] = 1.0f / sum;
    }
}

// ---- results ----

// Stores a warpgroup's accumulators times its rows' factors, as tokens from `token` on of the block's head and image
// and as channels from span `span` on; TMA leaves out what is outside. They pass through shared memory at offset `at`,
// which must be free. One thread of the warpgroup issues the store and has to wait for it; the others meet it at a
// named barrier.
template <int R>
PTX_FN void store_rows(const CUtensorMap& map, const float (&sums)[R], const float (&factor)[2], int at, int barrier,
                       int token, int span = 0) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < R / 2; i++) {
        int chunk = i / 2, h = i % 2;
        int to = at + chunk / 8 * ROWS * SPAN + (row + h * 8) * SPAN + ((chunk % 8 ^ row % 8) << 4) + lane % 4 * 4;
        *reinterpret_cast<__half2*>(dyn_smem() + to) = to_halves(sums[2 * i] * factor[h], sums[2 * i + 1] * factor[h]);
    }
    fence_proxy_async();
    named_bar_sync(barrier, 128);
    if (threadIdx.x % 128 != 0) return;
#pragma unroll
    for (int i = 0; i < (R + 31) / 32; i++)
        tma_store_4d(&map, smem_u32(dyn_smem()) + at + i * ROWS * SPAN, (span + i) * 64, blockIdx.y, token, blockIdx.z);
    tma_store_commit();
}

#endif
}  // namespace attention_hopper
