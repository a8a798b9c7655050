// Attention for sm_90a with one head of 512 channels, as VAEs have: that of attention_hopper.cu with another division
// of work. The kernel is empty for other architectures.
//
// The accumulators of 64 queries by 512 channels would be 256 registers for each thread of a warpgroup, more than there
// are. The scores, 512 channels deep, are half of the work, so two warpgroups should not both compute them. Hence a
// block has 64 queries, and each of its warpgroups has its own role:
//
//   0, 1  add weighted values, 256 channels each, in 128 registers per thread;
//   2     multiplies queries by keys and turns the scores into weights. It passes them on through shared memory, in
//         fp16, with the factors by which accumulators are multiplied first; these are 1 unless a reference was raised.
//
// So the scores of a stage of 64 keys are computed while the previous stage's values are added. There is no producer
// warpgroup: with four warpgroups ptxas gives a thread 128 registers, which the accumulators of wgmma alone take. One
// thread of each warpgroup loads what that warpgroup reads, into a slot that the whole warpgroup is done with.
//
//                contents                 slots x KiB
//   queries      64 x 512                   1 x 64      results leave through it
//   keys         64 x 256 channels          2 x 32      the first and second half of the scores' depth
//   values       32 x 256 channels          4 x 16      two halves of the stage's keys for each of the two warpgroups
//   weights      64 x 64, and 64 factors    2 x  8.25
//                                             209 KiB in all; 168 registers per thread
//
// A stage takes 2048 cycles of a multiprocessor's tensor cores, 1024 for either product, and 256 cycles of exp2 behind
// some 450 instructions of one warpgroup, during which the tensor cores idle unless values are waiting. Bound: L2. The
// keys and values of a stage are 128 KiB, 64 bytes per cycle at the full rate of the tensor cores; multiprocessors that
// all read the same data at about the same time were measured to get 60 to 70. There are no registers for more queries
// per key.
//
// Memory traffic: q once, the output once, k and v once for every 64 queries. Measured on an H200: 1.15 ms for 16384
// queries and keys (256 blocks, two rounds on 132 multiprocessors) and 0.13 ms for 4096 (64 blocks, half of the card: a
// fortieth of a decode, for which a second kernel that merges halves of the keys would not pay).
//
// The order of summation is that of attention_hopper.cu: a function of the number of keys alone.
#include "attention_hopper.cuh"

namespace attention_hopper {

constexpr int THREADS = 384;

#ifdef PTX_HOPPER
constexpr int KEYS = 64;
// Bytes of half a stage's keys or values, and of a stage's weights.
constexpr int HALF = 32 << 10, WEIGHTS = ROWS * SPAN;
// Offsets in shared memory. Factors, and the inverse sums of all weights, are one float per query.
constexpr int K_AT = 2 * HALF, V_AT = K_AT + 2 * HALF, WEIGHTS_AT = V_AT + 2 * HALF;
constexpr int FACTORS_AT = WEIGHTS_AT + 2 * WEIGHTS, INVERSE_AT = FACTORS_AT + 2 * ROWS * 4;
// Barriers: those of full slots, and pairs for weights.
constexpr int Q_FULL = INVERSE_AT + ROWS * 4, K_FULL = Q_FULL + 8, V_FULL = K_FULL + 16, WEIGHTS_PAIRS = V_FULL + 32;

struct Tile {
    static constexpr int THREADS = attention_hopper::THREADS, SHARED = Q_FULL + 128;
    static_assert(WEIGHTS_PAIRS + 2 * 16 <= SHARED, "the barriers do not fit");
};

// Publishes a stage's weights and factors and, with the last stage, the inverse row sums.
PTX_FN void publish_weights(const Weights<KEYS>& weights, const float (&factor)[2], const Rows& rows, uint32_t shared,
                            int slot, bool last) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    // Of stmatrix's four matrices, two are 8 rows below the others, and two are 8 keys to the right.
    int row = warp * 16 + lane % 16, chunk = lane / 16;
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++)
        stmatrix_x4(shared + WEIGHTS_AT + slot * WEIGHTS + row * SPAN + ((i * 2 + chunk ^ row % 8) << 4), weights[i]);
    float* factors = reinterpret_cast<float*>(dyn_smem() + FACTORS_AT) + slot * ROWS + warp * 16 + lane / 4;
    if (lane % 4 == 0) factors[0] = factor[0], factors[8] = factor[1];
    if (last) {
        float inverse[2];
        invert_sums(rows, inverse);
        float* all = reinterpret_cast<float*>(dyn_smem() + INVERSE_AT) + warp * 16 + lane / 4;
        if (lane % 4 == 0) all[0] = inverse[0], all[8] = inverse[1];
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbar_arrive(shared + WEIGHTS_PAIRS + slot * 16);
}

// The warpgroup that computes weights.
PTX_FN void make_weights(const AttentionHopperParams& p, uint32_t shared, int stages) {
    bool fetches = threadIdx.x % 128 == 0;
    auto fetch_keys = [&](int stage, int half) {
        mbar_expect_tx(shared + K_FULL + half * 8, HALF);
        fill<KEYS, 4>(p.k, shared + K_AT + half * HALF, shared + K_FULL + half * 8, stage * KEYS, half * 4);
    };
    if (fetches) {
        mbar_expect_tx(shared + Q_FULL, 2 * HALF);
        fill<ROWS, 8>(p.q, shared, shared + Q_FULL, blockIdx.x * ROWS);
        fetch_keys(stages - 1, 0);
        fetch_keys(stages - 1, 1);
    }
    __syncwarp();
    Ring<2> ring = {0, 1};
    Rows rows = {{-INFINITY, -INFINITY}};
    mbar_wait(shared + Q_FULL, 0);
    int parity = 0;
    for (int stage = stages - 1; stage >= 0; stage--, parity ^= 1) {
        float scores[KEYS / 2], factor[2];
        Weights<KEYS> weights;
        wgmma_hold(scores);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            mbar_wait(shared + K_FULL + half * 8, parity);
            // One fence per wait: otherwise ptxas inserts it itself, and then serialises the products.
            wgmma_fence();
            multiply<256, KEYS>(scores, shared + half * HALF, shared + K_AT + half * HALF, half > 0);
            wgmma_commit();
        }
        // All threads have read the keys of a half: load the next stage's.
        auto refill = [&](int half) {
            named_bar_sync(1, 128);
            if (fetches && stage > 0) fetch_keys(stage - 1, half);
            __syncwarp();
        };
        wgmma_wait<1>();
        refill(0);
        wgmma_wait<0>();
        wgmma_hold(scores);
        refill(1);
        if (stage == stages - 1) mask(scores, p.keys - stage * KEYS);
        raise_references(scores, rows, factor, p.exponent);
        exponentiate(scores, rows, p.exponent);
        round_weights(scores, weights, rows);
        mbar_wait(shared + WEIGHTS_PAIRS + ring.slot * 16 + 8, ring.parity);
        publish_weights(weights, factor, rows, shared, ring.slot, stage == 0);
        ring.advance();
    }
}

// A warpgroup that adds values, to the channels from `part` * 256 on.
PTX_FN void add_values(const AttentionHopperParams& p, uint32_t shared, int stages, int part) {
    int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, barrier = 2 + part;
    bool fetches = threadIdx.x % 128 == 0;
    uint32_t slots = shared + V_AT + part * HALF, full = shared + V_FULL + part * 16;
    auto fetch_values = [&](int stage, int half) {
        mbar_expect_tx(full + half * 8, HALF / 2);
        fill<KEYS / 2, 4>(p.v, slots + half * HALF / 2, full + half * 8, stage * KEYS + half * KEYS / 2, part * 4);
    };
    if (fetches) {
        fetch_values(stages - 1, 0);
        fetch_values(stages - 1, 1);
    }
    __syncwarp();
    // This lane's two rows are the first and the ninth.
    auto floats = [&](int at) { return reinterpret_cast<const float*>(dyn_smem() + at) + row; };
    float out[128] = {};
    Ring<2> ring = {0, 0};
    int parity = 0;
    for (int stage = stages - 1; stage >= 0; stage--, parity ^= 1) {
        uint32_t pair = shared + WEIGHTS_PAIRS + ring.slot * 16;
        mbar_wait(pair, ring.parity);
        const float* factors = floats(FACTORS_AT) + ring.slot * ROWS;
        float factor[2] = {factors[0], factors[8]};
        if (__any_sync(ALL_LANES, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < 128; i++) out[i] *= factor[i / 2 % 2];
        }
        uint64_t a = wg_desc_sw128(shared + WEIGHTS_AT + ring.slot * WEIGHTS, 16, 8 * SPAN);
        uint64_t b = wg_desc_sw128(slots, KEYS / 2 * SPAN, 8 * SPAN);
        wgmma_hold(out);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            mbar_wait(full + half * 8, parity);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 2; i++)
                wgmma_m64n256k16<1>(out, a + (half * 2 + i) * 32 / 16, b + (half * HALF / 2 + i * 16 * SPAN) / 16, 1);
            wgmma_commit();
        }
        auto refill = [&](int half) {
            named_bar_sync(barrier, 128);
            if (fetches && stage > 0) fetch_values(stage - 1, half);
            __syncwarp();
        };
        wgmma_wait<1>();
        refill(0);
        wgmma_wait<0>();
        wgmma_hold(out);
        refill(1);
        if (threadIdx.x % 32 == 0) mbar_arrive(pair + 8);
        ring.advance();
    }
    const float inverse[2] = {floats(INVERSE_AT)[0], floats(INVERSE_AT)[8]};
    store_rows(p.out, out, inverse, part * HALF, barrier, blockIdx.x * ROWS, part * 4);
    if (fetches) tma_store_wait<0>();
}

// One block handles 64 queries (x) of one head (y) of one image (z).
PTX_FN void attend(const AttentionHopperParams& p) {
    griddep_launch_dependents();
    uint32_t shared = smem_u32(dyn_smem());
    if (threadIdx.x == 0) {
        for (int i = 0; i < 7; i++) mbar_init(shared + Q_FULL + i * 8, 1);
        // One lane of each warp arrives, when weights are written and when they have been read.
        for (int slot = 0; slot < 2; slot++) {
            mbar_init(shared + WEIGHTS_PAIRS + slot * 16, 4);
            mbar_init(shared + WEIGHTS_PAIRS + slot * 16 + 8, 8);
        }
        fence_mbar_init();
    }
    __syncthreads();
    griddep_wait();
    int stages = (p.keys + KEYS - 1) / KEYS, group = threadIdx.x / 128;
    if (group == 2) {
        make_weights(p, shared, stages);
    } else {
        add_values(p, shared, stages, group);
    }
}
#endif
}  // namespace attention_hopper

KERNEL __launch_bounds__(attention_hopper::THREADS, 1)
attention_hopper_512(const __grid_constant__ AttentionHopperParams p) {
#ifdef PTX_HOPPER
    attention_hopper::attend(p);
#endif
}
EXPORT_TILE(attention_hopper_512, 1, attention_hopper::Tile)
