// Attention for sm_90a: that of attention.cu, with tiles that TMA fetches and wgmma multiplies. Empty for other
// architectures, whose attention is attention.cu's, as is that under a causal mask, of heads of other widths, and of
// 512 channels.
//
// A block belongs to one head of one image. The warpgroups but the last have 64 queries each; of the last one thread
// fetches. Scores are a product out of shared memory, S = Q K^T; they become weights in the registers where they are,
// and as fp16 these are the left side of the next product, P V. Queries are tiles of the block's, which walks over them
// with the grid's width.
//
// Keys and values pass through a ring of stages of KEYS tokens (_ring). With at most 80 keys, which is what a text has,
// one stage is all of them: it is fetched once, and queries pass by (_held). Channels lie in spans of 64, the 128 bytes
// of a swizzle, and TMA fills up with zeros: behind the head's channels, behind the last key, behind the last query.
// Results are stored by TMA too, which leaves out what is outside.
//
//            multiplying   stages   shared memory   cycles of 64 queries by a stage, on a multiprocessor: exp2,
//   WIDTH    warpgroups    x KEYS      (KiB)         16 a cycle; tensor cores, 4 for 16 x 8 of a product
//     40         3         4 x 128      176           512      192 + 160
//     64         3         4 x 128      176           512      256 + 256
//     80         2         2 x 128      192           512      320 + 320
//    160         2         2 x  64      192           256      320 + 320
//     40         3         1 x  80       92           320      120 + 100
//     64         3         1 x  80       92           320      160 + 160
//     80         2         1 x  80      136           320      200 + 200
//    160         2         1 x  80      204           320      400 + 400
//
// Bound: exp2 up to 64 channels, the tensor cores above. So that both have work at once, a warpgroup begins the scores
// of the next stage together with the sums of the last, and softens the former while the latter are under way; and the
// warpgroups take turns at beginning, which keeps them apart: while one softens, another multiplies. At 40 channels a
// stage is some 460 instructions of a warp, 64 of which are exp2 at 8 cycles: issuing takes nearly as long as exp2.
//
// Memory: q once, out once; k and v once for each tile of a block's queries, or once for the block where they stay. At
// 40 channels a stage is 20 KiB for the 1536 cycles that three warpgroups' exp2 takes, far below what L2 gives.
//
// Not measured yet. A prototype of this loop took, on an H100, 134 us for 2x8 heads of 40 with 4096 keys, 200 us for
// 2x10 heads of 64 with 4096 and 29 us for 2x20 heads of 64 with 1024; and with 77 keys 11.1, 10.9 and 6.8 us.
// Predicted is about that: here a text's keys are fetched once for a block, and sums really are under way while exp2 is
// computed (see `soften`), whereas the prototype's compiler had it wait first; but sums of rounded weights take two
// conversions more for two scores.
//
// Results do not depend on how many warpgroups, blocks or images there are: the keys' number decides the order of sums,
// from the last stage, which may be partly masked, to the first.
#include "numeric.cuh"

struct AttentionHopperParams {
    // {channels of a head, heads, tokens, images}, in boxes of 64 channels of one head by 64 queries, or by KEYS keys.
    CUtensorMap q, k, v, out;
    int32_t queries, keys;
    // scale * log2(e), positive: exp(scale * s) = exp2(exponent * s).
    float exponent;
    int32_t padding[13];
};
LAYOUT(AttentionHopperParams, q, k, v, out, queries, keys, exponent, padding)

namespace attention_hopper {

constexpr int ROWS = 64;   // queries of a warpgroup
constexpr int SPAN = 128;  // bytes of 64 channels

template <int WIDTH_, int GROUPS_, int STAGES_, int KEYS_> struct Tile {
    static constexpr int WIDTH = WIDTH_, GROUPS = GROUPS_, STAGES = STAGES_, KEYS = KEYS_;
    static constexpr int THREADS = 128 * (GROUPS + 1);
    // As in attention.cu: how much log2 of a weight may exceed the reference before the reference is raised.
    static constexpr float HEADROOM = 8.0f;
    // True if there is one stage, which stays for all of the block's queries; the next of these are fetched meanwhile.
    static constexpr bool HELD = STAGES == 1;
    static constexpr int QUERY_SLOTS = HELD ? 2 : 1;
    static constexpr int SPANS = (WIDTH + 63) / 64;
    // Registers of a thread that multiplies, and of one of the fetching warpgroup: 64 Ki of them are a
    // multiprocessor's.
    static constexpr int MANY = GROUPS == 3 ? 160 : 232, FEW = GROUPS == 3 ? 32 : 40;
    // Bytes of a warpgroup's queries, or results, and of a stage's keys, or values.
    static constexpr int Q = SPANS * ROWS * SPAN, K = SPANS * KEYS * SPAN;
    // Offsets in shared memory; that of a pair of barriers: the slot is full, it is empty.
    static constexpr int K_AT = GROUPS * QUERY_SLOTS * Q, V_AT = K_AT + STAGES * K, OUT_AT = V_AT + STAGES * K;
    static constexpr int Q_PAIRS = OUT_AT + GROUPS * Q, K_PAIRS = Q_PAIRS + GROUPS * QUERY_SLOTS * 16;
    static constexpr int V_PAIRS = K_PAIRS + STAGES * 16;
};

// A place in a ring of N slots, and the parity of the phase that is waited for there.
template <int N> struct Ring {
    int slot, parity;

    __device__ __forceinline__ void advance() {
        if (++slot == N) slot = 0, parity ^= 1;
    }
};

// Fetches ROWS tokens of the block's head from `token` on into a slot, as soon as that is empty.
template <int ROWS, int SPANS>
PTX_FN void fetch(const CUtensorMap& map, uint32_t slot, uint32_t pair, int parity, int token) {
    mbar_wait(pair + 8, parity);
    mbar_expect_tx(pair, SPANS * ROWS * SPAN);
#pragma unroll
    for (int i = 0; i < SPANS; i++)
        tma_load_4d(slot + i * ROWS * SPAN, &map, pair, i * 64, blockIdx.y, token, blockIdx.z);
}

// The fetching thread.
template <class T> PTX_FN void produce(const AttentionHopperParams& p, uint32_t shared, int tiles, int stages) {
    Ring<T::QUERY_SLOTS> q = {0, 1};
    Ring<T::STAGES> ring = {0, 1};
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        for (int group = 0; group < T::GROUPS; group++) {
            int slot = group * T::QUERY_SLOTS + q.slot;
            fetch<ROWS, T::SPANS>(p.q, shared + slot * T::Q, shared + T::Q_PAIRS + slot * 16, q.parity,
                                  (tile * T::GROUPS + group) * ROWS);
        }
        q.advance();
        if (T::HELD && tile != blockIdx.x) continue;
        for (int stage = stages - 1; stage >= 0; stage--) {
            uint32_t k = shared + T::K_AT + ring.slot * T::K, v = shared + T::V_AT + ring.slot * T::K;
            fetch<T::KEYS, T::SPANS>(p.k, k, shared + T::K_PAIRS + ring.slot * 16, ring.parity, stage * T::KEYS);
            fetch<T::KEYS, T::SPANS>(p.v, v, shared + T::V_PAIRS + ring.slot * 16, ring.parity, stage * T::KEYS);
            ring.advance();
        }
    }
}

// Begins the scores of a warpgroup's queries with a stage's keys.
template <class T> PTX_FN void begin_scores(float (&scores)[T::KEYS / 2], uint32_t queries, uint32_t keys) {
    uint64_t a = wg_desc_sw128(queries, 16, 8 * SPAN), b = wg_desc_sw128(keys, 16, 8 * SPAN);
    wgmma_hold(scores);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < (T::WIDTH + 15) / 16; i++) {
        // 16 channels are 32 bytes of a span; descriptors count in 16.
        uint64_t of_a = a + (i / 4 * ROWS * SPAN + i % 4 * 32) / 16;
        uint64_t of_b = b + (i / 4 * T::KEYS * SPAN + i % 4 * 32) / 16;
        if constexpr (T::KEYS == 64) wgmma_m64n64k16<0>(scores, of_a, of_b, i > 0);
        if constexpr (T::KEYS == 80) wgmma_m64n80k16<0>(scores, of_a, of_b, i > 0);
        if constexpr (T::KEYS == 128) wgmma_m64n128k16<0>(scores, of_a, of_b, i > 0);
    }
    wgmma_commit();
}

template <int KEYS> using Weights = uint32_t[KEYS / 16][4];

// Begins to add a stage's weighted values.
template <class T>
PTX_FN void begin_sums(float (&out)[T::WIDTH / 2], const Weights<T::KEYS>& weights, uint32_t values) {
    uint64_t b = wg_desc_sw128(values, T::KEYS * SPAN, 8 * SPAN);
    wgmma_hold(out);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < T::KEYS / 16; i++) {
        uint64_t of_b = b + i * 16 * SPAN / 16;
        if constexpr (T::WIDTH == 40) wgmma_m64n40k16_rs<1>(out, weights[i], of_b, 1);
        if constexpr (T::WIDTH == 64) wgmma_m64n64k16_rs<1>(out, weights[i], of_b, 1);
        if constexpr (T::WIDTH == 80) wgmma_m64n80k16_rs<1>(out, weights[i], of_b, 1);
        if constexpr (T::WIDTH == 160) wgmma_m64n160k16_rs<1>(out, weights[i], of_b, 1);
    }
    wgmma_commit();
}

// Of a lane's two rows: lane / 4 of the warp's 16, and 8 below it.
struct Rows {
    // log2 of what weights are relative to.
    float reference[2];
    // Of the weights of this lane's keys, as rounded.
    float sum[2];
};

// Scores become weights, where they are; of the stage's keys only the first `count` exist. Then all products are waited
// for. Where a reference had to rise, which is seldom, what was summed is brought to the new one.
template <class T, bool MASKED>
PTX_FN void soften(float (&scores)[T::KEYS / 2], float (&out)[T::WIDTH / 2], Rows& rows, int count, float exponent) {
    if constexpr (MASKED) {
#pragma unroll
        for (int i = 0; i < T::KEYS / 2; i++)
            if (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 >= count) scores[i] = -INFINITY;
    }
    bool raised = false;
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        // Two chains, of even and of odd keys.
        float even = scores[2 * h], odd = scores[2 * h + 1];
#pragma unroll
        for (int i = 1; i < T::KEYS / 8; i++) {
            even = fmaxf(even, scores[4 * i + 2 * h]);
            odd = fmaxf(odd, scores[4 * i + 2 * h + 1]);
        }
        float top = fmaxf(even, odd);
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        top *= exponent;
        bool raise = top > rows.reference[h] + T::HEADROOM;
        factor[h] = raise ? exp2_approx(rows.reference[h] - top) : 1.0f;
        if (raise) rows.reference[h] = top;
        raised |= raise;
    }
#pragma unroll
    for (int i = 0; i < T::KEYS / 2; i++)
        scores[i] = exp2_approx(fmaf(scores[i], exponent, -rows.reference[i / 2 % 2]));
    wgmma_hold(scores);
    // A row's factor is 1 unless it was raised: whether the others make the warp multiply does not show. The branch has
    // another use: no compiler moves the wait behind it to before the exponentials, which it does where nothing else is
    // in the way.
    if (__any_sync(0xffffffffu, raised)) {
        wgmma_wait<0>();
        wgmma_hold(out);
#pragma unroll
        for (int h = 0; h < 2; h++) rows.sum[h] *= factor[h];
#pragma unroll
        for (int i = 0; i < T::WIDTH / 2; i++) out[i] *= factor[i / 2 % 2];
    }
    wgmma_wait<0>();
    wgmma_hold(out);
}

// The weights as fp16.
template <class T> PTX_FN void round(const float (&scores)[T::KEYS / 2], Weights<T::KEYS>& weights, Rows& rows) {
#pragma unroll
    for (int i = 0; i < T::KEYS / 4; i++) {
        __half2 pair = __floats2half2_rn(scores[2 * i], scores[2 * i + 1]);
        float2 rounded = __half22float2(pair);
        weights[i / 4][i % 4] = bits_of(pair);
        rows.sum[i % 2] += rounded.x + rounded.y;
    }
}

// A warpgroup's results: sums over sums of weights, through shared memory.
template <class T>
PTX_FN void store(const AttentionHopperParams& p, const float (&out)[T::WIDTH / 2], const Rows& rows, uint32_t shared,
                  int group, int token) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = rows.sum[h];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        inverse[h] = 1.0f / sum;
    }
    bool stores = threadIdx.x % 128 == 0;
    // The last store has read the memory.
    if (stores) tma_store_wait<0>();
    named_bar_sync(1 + group, 128);
    int at = T::OUT_AT + group * T::Q;
#pragma unroll
    for (int i = 0; i < T::WIDTH / 4; i++) {
        int chunk = i / 2, h = i % 2;
        int to = at + chunk / 8 * ROWS * SPAN + (row + h * 8) * SPAN + ((chunk % 8 ^ row % 8) << 4) + lane % 4 * 4;
        *reinterpret_cast<__half2*>(dyn_smem() + to) = to_halves(out[2 * i] * inverse[h], out[2 * i + 1] * inverse[h]);
    }
    fence_proxy_async();
    named_bar_sync(1 + group, 128);
    if (!stores) return;
#pragma unroll
    for (int i = 0; i < T::SPANS; i++)
        tma_store_4d(&p.out, shared + at + i * ROWS * SPAN, i * 64, blockIdx.y, token, blockIdx.z);
    tma_store_commit();
}

template <class T> PTX_FN void consume(const AttentionHopperParams& p, uint32_t shared, int tiles, int stages) {
    int group = threadIdx.x / 128;
    bool arrives = threadIdx.x % 32 == 0;
    Ring<T::QUERY_SLOTS> q = {0, 0};
    // Values are read a stage after their keys.
    Ring<T::STAGES> k = {0, 0}, v = {0, 0};
    auto scores_of_stage = [&](float (&scores)[T::KEYS / 2], uint32_t queries) {
        mbar_wait(shared + T::K_PAIRS + k.slot * 16, k.parity);
        begin_scores<T>(scores, queries, shared + T::K_AT + k.slot * T::K);
    };
    auto sums_of_stage = [&](float (&out)[T::WIDTH / 2], const Weights<T::KEYS>& weights) {
        mbar_wait(shared + T::V_PAIRS + v.slot * 16, v.parity);
        begin_sums<T>(out, weights, shared + T::V_AT + v.slot * T::K);
    };
    // The stage's keys, or values, have been read.
    auto release = [&](Ring<T::STAGES>& ring, int pairs) {
        if (T::HELD) return;
        if (arrives) mbar_arrive(shared + pairs + ring.slot * 16 + 8);
        ring.advance();
    };
    // Turns: a warpgroup waits at barrier 4 and its own number, and then lets the next one go on.
    if (group == T::GROUPS - 1 && stages > 1) named_bar_arrive(4, 256);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int slot = group * T::QUERY_SLOTS + q.slot;
        uint32_t queries = shared + slot * T::Q, pair = shared + T::Q_PAIRS + slot * 16;
        float scores[T::KEYS / 2], out[T::WIDTH / 2] = {};
        Weights<T::KEYS> weights;
        Rows rows = {{-INFINITY, -INFINITY}};
        mbar_wait(pair, q.parity);
        scores_of_stage(scores, queries);
        wgmma_wait<0>();
        wgmma_hold(scores);
        release(k, T::K_PAIRS);
        soften<T, true>(scores, out, rows, p.keys - (stages - 1) * T::KEYS, p.exponent);
        round<T>(scores, weights, rows);
        if constexpr (!T::HELD) {
            for (int stage = stages - 2; stage >= 0; stage--) {
                named_bar_sync(4 + group, 256);
                scores_of_stage(scores, queries);
                sums_of_stage(out, weights);
                bool last = group == T::GROUPS - 1 && stage == 0 && tile + gridDim.x >= tiles;
                if (!last) named_bar_arrive(4 + (group + 1) % T::GROUPS, 256);
                wgmma_wait<1>();
                wgmma_hold(scores);
                release(k, T::K_PAIRS);
                soften<T, false>(scores, out, rows, T::KEYS, p.exponent);
                release(v, T::V_PAIRS);
                round<T>(scores, weights, rows);
            }
        }
        if (arrives) mbar_arrive(pair + 8);
        q.advance();
        sums_of_stage(out, weights);
        wgmma_wait<0>();
        wgmma_hold(out);
        release(v, T::V_PAIRS);
        store<T>(p, out, rows, shared, group, (tile * T::GROUPS + group) * ROWS);
        // wgmma is for whole warps: the thread that stored catches up.
        __syncwarp();
    }
    if (threadIdx.x % 128 == 0) tma_store_wait<0>();
}

// A block: of a head (y) of an image (z) the queries' tiles from x on, the grid's width apart.
template <class T> PTX_FN void attend(const AttentionHopperParams& p) {
    griddep_launch_dependents();
    uint32_t shared = smem_u32(dyn_smem());
    if (threadIdx.x == 0) {
        auto pairs = [&](int at, int count, int readers) {
            for (int i = 0; i < count; i++) {
                mbar_init(shared + at + i * 16, 1);
                mbar_init(shared + at + i * 16 + 8, readers);
            }
        };
        // A warp arrives by one of its lanes.
        pairs(T::Q_PAIRS, T::GROUPS * T::QUERY_SLOTS, 4);
        pairs(T::K_PAIRS, T::STAGES, 4 * T::GROUPS);
        pairs(T::V_PAIRS, T::STAGES, 4 * T::GROUPS);
        fence_mbar_init();
    }
    __syncthreads();
    griddep_wait();
    constexpr int QUERIES = ROWS * T::GROUPS;
    int tiles = (p.queries + QUERIES - 1) / QUERIES, stages = (p.keys + T::KEYS - 1) / T::KEYS;
    if (threadIdx.x >= 128 * T::GROUPS) {
        reg_dec<T::FEW>();
        if (threadIdx.x == 128 * T::GROUPS) produce<T>(p, shared, tiles, stages);
    } else {
        reg_inc<T::MANY>();
        consume<T>(p, shared, tiles, stages);
    }
}

}  // namespace attention_hopper

#ifdef PTX_HOPPER
#define ATTENTION_HOPPER_BODY(...) attention_hopper::attend<attention_hopper::Tile<__VA_ARGS__>>(p);
#else
#define ATTENTION_HOPPER_BODY(...)
#endif
// Channels of a head, warpgroups that multiply, stages, keys of a stage.
#define ATTENTION_HOPPER(name, ...)                                          \
    KERNEL __launch_bounds__(attention_hopper::Tile<__VA_ARGS__>::THREADS, 1) \
    name(const __grid_constant__ AttentionHopperParams p) {                  \
        ATTENTION_HOPPER_BODY(__VA_ARGS__)                                   \
    }                                                                        \
    EXPORT(name)
ATTENTION_HOPPER(attention_hopper_40_ring, 40, 3, 4, 128)
ATTENTION_HOPPER(attention_hopper_64_ring, 64, 3, 4, 128)
ATTENTION_HOPPER(attention_hopper_80_ring, 80, 2, 2, 128)
ATTENTION_HOPPER(attention_hopper_160_ring, 160, 2, 2, 64)
ATTENTION_HOPPER(attention_hopper_40_held, 40, 3, 1, 80)
ATTENTION_HOPPER(attention_hopper_64_held, 64, 3, 1, 80)
ATTENTION_HOPPER(attention_hopper_80_held, 80, 2, 1, 80)
ATTENTION_HOPPER(attention_hopper_160_held, 160, 2, 1, 80)
