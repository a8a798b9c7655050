// Attention for sm_90a: that of attention.cu, with tiles that are loaded by TMA and multiplied by wgmma. The kernels
// are empty for other architectures. Those use attention.cu, as do causal masks and heads of other widths. Heads of 512
// channels are attention_hopper_wide.cu's.
//
// A block belongs to one head of one image. All warpgroups but the last have 64 queries each; one thread of the last is
// the producer. Scores are a product of operands in shared memory, S = Q K^T. They become weights in the registers in
// which they are, and as fp16 these are the left operand of the next product, P V. A tile is the queries of all
// warpgroups of a block; the block iterates over tiles with the stride of the grid's width.
//
// Keys and values pass through a ring of stages of KEYS tokens (_ring). With at most 80 keys, as from a text prompt,
// one stage holds all of them: it is loaded once and stays, while tiles of queries pass (_held). Channels lie in spans
// of 64, the 128 bytes of a swizzle. TMA pads with zeros beyond the head's channels, the last key and the last query.
// Results are stored by TMA too, which leaves out what is outside.
//
//            consumer    stages   shared memory   cycles of 64 queries by a stage, on a multiprocessor: exp2,
//   WIDTH    warpgroups  x KEYS      (KiB)         16 per cycle; tensor cores, 4 per 16 x 8 of a product
//     40         3         4 x 128      176           512      192 + 160
//     64         3         4 x 128      176           512      256 + 256
//     80         2         2 x 128      192           512      320 + 320
//    160         2         2 x  64      192           256      320 + 320
//     40         3         1 x  80       92           320      120 + 100
//     64         3         1 x  80       92           320      160 + 160
//     80         2         1 x  80      136           320      200 + 200
//    160         2         1 x  80      204           320      400 + 400
//
// Bound: exp2 up to 64 channels, the tensor cores above. To keep both busy at once, a warpgroup issues the scores of
// the next stage together with the weighted sums of the last one, and computes the softmax of the former while the
// latter are in flight. The warpgroups also take turns at issuing, which keeps them out of phase: while one computes
// its softmax, another multiplies. At 40 channels a stage is some 460 instructions of a warp, 64 of which are exp2 at 8
// cycles: issuing takes nearly as long as exp2.
//
// The last round of tiles leaves multiprocessors idle: 352 tiles of 192 queries (16 heads of 40 with 4096 queries) are
// 2.67 rounds of 132, 440 tiles (20 heads of 64) are 3.33. Distributing groups of 64 queries would even that out, with
// two warpgroups at work in a block's last tile instead of three. But the prototype took 42.5 us for a tile of two
// warpgroups, against 44.7 us for one of three, at 40 channels, and 39.3 against 49.9 us at 64. So distributing a
// head's 64 groups over 8 blocks as 3 + 3 + 2 instead of 3 + 3 + 3 would save 2 % at 40, and 3 + 3 + 3 + 2 for 20 heads
// 5 % at 64: a tenth of a millisecond of SDXL's step, and nothing at 1024 queries, whose tiles come out even. That is
// not worth warpgroups that only keep step with the others.
//
// Memory traffic: q once, the output once; k and v once for each tile of a block's queries, or once per block where
// they are held. At 40 channels a stage is 20 KiB for the 1536 cycles that three warpgroups' exp2 takes, far below what
// L2 delivers.
//
// Measured on an H200, less the 4 us between two events: 141 us for 2x8 heads of 40 with 4096 keys, 200 us for 2x10
// heads of 64 with 4096 and 29 us for 2x20 heads of 64 with 1024; with 77 keys 7.4, 9.4 and 5.1 us. A scheduler issues
// an instruction every 1.85 cycles.
//
// Results do not depend on the number of warpgroups, blocks or images: the number of keys alone determines the order of
// summation, from the last stage, which may be partly masked, to the first.
#include "attention_hopper.cuh"

namespace attention_hopper {

template <int WIDTH_, int GROUPS_, int STAGES_, int KEYS_> struct Tile {
    static constexpr int WIDTH = WIDTH_, GROUPS = GROUPS_, STAGES = STAGES_, KEYS = KEYS_;
    static constexpr int THREADS = 128 * (GROUPS + 1);
    // True if there is a single stage, which is held for all of the block's queries; the next queries are then loaded
    // while the current ones are processed.
    static constexpr bool HELD = STAGES == 1;
    static constexpr int QUERY_SLOTS = HELD ? 2 : 1;
    static constexpr int SPANS = (WIDTH + 63) / 64;
    // Registers of a thread of the consumer warpgroups, and of the producer's warpgroup; a multiprocessor has 64 Ki
    // registers.
    static constexpr int MANY = GROUPS == 3 ? 160 : 232, FEW = GROUPS == 3 ? 32 : 40;
    // Bytes of a warpgroup's queries (and of its results), and of a stage's keys (and of its values).
    static constexpr int Q = SPANS * ROWS * SPAN, K = SPANS * KEYS * SPAN;
    // Offsets in shared memory; the last are those of pairs of barriers, "full" and "empty".
    static constexpr int K_AT = GROUPS * QUERY_SLOTS * Q, V_AT = K_AT + STAGES * K, OUT_AT = V_AT + STAGES * K;
    static constexpr int Q_PAIRS = OUT_AT + GROUPS * Q, K_PAIRS = Q_PAIRS + GROUPS * QUERY_SLOTS * 16;
    static constexpr int V_PAIRS = K_PAIRS + STAGES * 16;
    static constexpr int SHARED = Q_PAIRS + 256;
    static_assert(V_PAIRS + STAGES * 16 <= SHARED, "the barriers do not fit");
};

#ifdef PTX_HOPPER
// Fetches ROWS tokens from `token` on into a slot as soon as it is empty.
template <int ROWS, int SPANS>
PTX_FN void fetch(const CUtensorMap& map, uint32_t slot, uint32_t pair, int parity, int token) {
    mbar_wait(pair + 8, parity);
    mbar_expect_tx(pair, SPANS * ROWS * SPAN);
    fill<ROWS, SPANS>(map, slot, pair, token);
}

// The producer thread.
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

// Turns scores into weights in place; only the first `count` keys of the stage exist. Then waits for all products, and
// rescales the accumulators of rows whose reference was raised.
template <class T, bool MASKED>
PTX_FN void softmax_stage(float (&scores)[T::KEYS / 2], float (&out)[T::WIDTH / 2], Rows& rows, int count,
                          float exponent) {
    if constexpr (MASKED) mask(scores, count);
    float factor[2];
    bool raised = raise_references(scores, rows, factor, exponent);
    exponentiate(scores, rows, exponent);
    wgmma_hold(scores);
    // The factor of a row that was not raised is 1, so it does not matter which other rows make the warp multiply. The
    // branch serves a second purpose: it keeps the compiler from moving the wait that follows it to before the
    // exponentials, which it does where nothing else is in the way.
    if (__any_sync(ALL_LANES, raised)) {
        wgmma_wait<0>();
        wgmma_hold(out);
#pragma unroll
        for (int i = 0; i < T::WIDTH / 2; i++) out[i] *= factor[i / 2 % 2];
    }
    wgmma_wait<0>();
    wgmma_hold(out);
}

template <class T> PTX_FN void consume(const AttentionHopperParams& p, uint32_t shared, int tiles, int stages) {
    int group = threadIdx.x / 128;
    bool arrives = threadIdx.x % 32 == 0;
    Ring<T::QUERY_SLOTS> q = {0, 0};
    // Values are read one stage later than their keys.
    Ring<T::STAGES> k = {0, 0}, v = {0, 0};
    auto scores_of_stage = [&](float (&scores)[T::KEYS / 2], uint32_t queries) {
        mbar_wait(shared + T::K_PAIRS + k.slot * 16, k.parity);
        wgmma_hold(scores);
        wgmma_fence();
        multiply<T::WIDTH, T::KEYS>(scores, queries, shared + T::K_AT + k.slot * T::K);
        wgmma_commit();
    };
    auto sums_of_stage = [&](float (&out)[T::WIDTH / 2], const Weights<T::KEYS>& weights) {
        mbar_wait(shared + T::V_PAIRS + v.slot * 16, v.parity);
        wgmma_hold(out);
        wgmma_fence();
        add_weighted<T::WIDTH, T::KEYS>(out, weights, shared + T::V_AT + v.slot * T::K);
        wgmma_commit();
    };
    // Releases the stage's keys, or values, which have been read.
    auto release = [&](Ring<T::STAGES>& ring, int pairs) {
        if (T::HELD) return;
        if (arrives) mbar_arrive(shared + pairs + ring.slot * 16 + 8);
        ring.advance();
    };
    // The warpgroups take turns: each waits at barrier 4 + its own number, and then lets the next one proceed.
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
        softmax_stage<T, true>(scores, out, rows, p.keys - (stages - 1) * T::KEYS, p.exponent);
        round_weights(scores, weights, rows);
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
                softmax_stage<T, false>(scores, out, rows, T::KEYS, p.exponent);
                release(v, T::V_PAIRS);
                round_weights(scores, weights, rows);
            }
        }
        if (arrives) mbar_arrive(pair + 8);
        q.advance();
        sums_of_stage(out, weights);
        wgmma_wait<0>();
        wgmma_hold(out);
        release(v, T::V_PAIRS);
        float inverse[2];
        invert_sums(rows, inverse);
        // Wait until the last store has read the shared memory.
        if (threadIdx.x % 128 == 0) tma_store_wait<0>();
        named_bar_sync(1 + group, 128);
        store_rows(p.out, out, inverse, T::OUT_AT + group * T::Q, 1 + group, (tile * T::GROUPS + group) * ROWS);
        // wgmma needs converged warps: wait for the thread that stored.
        __syncwarp();
    }
    if (threadIdx.x % 128 == 0) tma_store_wait<0>();
}

// A block handles the tiles of queries of one head (y) of one image (z), from tile x on with the stride of the grid's
// width.
template <class T> PTX_FN void attend(const AttentionHopperParams& p) {
    griddep_launch_dependents();
    uint32_t shared = smem_u32(dyn_smem());
    if (threadIdx.x == 0) {
        // One lane of each warp arrives.
        init_pairs(shared + T::Q_PAIRS, T::GROUPS * T::QUERY_SLOTS, 4);
        init_pairs(shared + T::K_PAIRS, T::STAGES, 4 * T::GROUPS);
        init_pairs(shared + T::V_PAIRS, T::STAGES, 4 * T::GROUPS);
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

#endif
}  // namespace attention_hopper

#ifdef PTX_HOPPER
#define ATTENTION_HOPPER_BODY(...) attention_hopper::attend<attention_hopper::Tile<__VA_ARGS__>>(p);
#else
#define ATTENTION_HOPPER_BODY(...)
#endif
// Channels of a head, consumer warpgroups, stages, keys per stage.
#define ATTENTION_HOPPER(name, ...)                                          \
    KERNEL __launch_bounds__(attention_hopper::Tile<__VA_ARGS__>::THREADS, 1) \
    name(const __grid_constant__ AttentionHopperParams p) {                  \
        ATTENTION_HOPPER_BODY(__VA_ARGS__)                                   \
    }                                                                        \
    EXPORT_TILE(name, 1, attention_hopper::Tile<__VA_ARGS__>)
ATTENTION_HOPPER(attention_hopper_40_ring, 40, 3, 4, 128)
ATTENTION_HOPPER(attention_hopper_64_ring, 64, 3, 4, 128)
ATTENTION_HOPPER(attention_hopper_80_ring, 80, 2, 2, 128)
ATTENTION_HOPPER(attention_hopper_160_ring, 160, 2, 2, 64)
ATTENTION_HOPPER(attention_hopper_40_held, 40, 3, 1, 80)
ATTENTION_HOPPER(attention_hopper_64_held, 64, 3, 1, 80)
ATTENTION_HOPPER(attention_hopper_80_held, 80, 2, 1, 80)
ATTENTION_HOPPER(attention_hopper_160_held, 160, 2, 1, 80)
