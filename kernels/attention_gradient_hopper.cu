// The gradient of attention for sm_90a: that of attention_gradient.cu, with its formulas, its statistics and its two
// kernels, with tiles that are loaded by TMA and multiplied by wgmma. The kernels are empty for other architectures.
//
// A block belongs to one head of one image. Each of its first two warpgroups has 64 rows of two tensors (OWN): queries
// and their results' gradients, or keys and values. The rows of the other two tensors (OTHERS) pass through a ring that
// one thread of the third warpgroup fills. Own rows are the rows of both products with others, scores and dP. What
// these become in registers is the left operand of the next products, and no numbers are exchanged between warps:
//
//   by_query  own q, dO, others k, v: a pass for statistics of S = q k^T and dP = dO v^T, another one for dq += dS k
//   by_key    own k, v, others q, dO and statistics: one pass, with S^T and dP^T, for dk += dS^T q and dv += P^T dO
//
// The scores of a stage are issued right behind the accumulating products of the previous stage, and one wait covers
// both. While one warpgroup computes weights, the other multiplies: they take turns. Results leave through the shared
// memory of own rows.
//
//   WIDTH  OTHERS  STAGES  shared (KiB)   cycles of 64 rows by a stage: of exp2; of the tensor cores, with
//                                         instructions of a warp in parentheses, for statistics, for dq, and by key
//     40     64      4        100         256     192 (330)   272 (296)   352 (306)
//     64     64      4        100         256     256 (345)   384 (317)   512 (338)
//     80     64      4        196         256     320 (360)   480 (331)   640 (353)
//    160     32      4        194         128     320 (270)   480 (301)   640 (321)
//
// Scores of 32 columns read their left operand from shared memory too often: 24 cycles for every 16, so those at width
// 160 take half as long again. They could not be wider, since 160 accumulators per thread leave no registers for more;
// UNets have such heads at 256 tokens and fewer.
//
// Two warpgroups, not three: with 128 own rows per block, fewer multiprocessors idle in the last round (4096 queries of
// 16 heads are 512 tiles, 3.9 rounds of 132), and a thread has 240 registers, all of which by_key needs at width 160.
// Bound: instruction issue for the statistics up to width 80 and for dq at 40, the tensor cores elsewhere. Memory
// traffic: own rows once, others once or twice for every 128 own rows, which asks L2 for no more than 32 bytes per
// cycle.
//
// Measured on an H200: 0.30 ms for 8 heads of 40 with 4096 tokens. Predicted: 0.65 to 0.85 ms for 2x10 heads of 64.
//
// No sum is split and none uses atomics: the order of others is that of their numbers.
#include "attention_gradient.cuh"
#include "attention_hopper.cuh"

struct AttentionGradientHopperParams {
    // {channels of a head, heads, tokens, images}, in boxes of 64 channels of one head by 64 own rows or OTHERS others.
    // By query: q, dO, k, v, dq and unused; by key: k, v, q, dO, dk, dv.
    CUtensorMap own_first, own_second, other_first, other_second, out_first, out_second;
    // By key: {8 halves, queries, heads of all images}, in boxes of OTHERS queries.
    CUtensorMap statistics_tiles;
    // As in AttentionGradientParams; by query, and null where keys want no gradient.
    float4* statistics;
    int32_t own, others;
    // exp(scale * s) = exp2(exponent * s).
    float exponent, scale;
    int32_t padding[26];
};
LAYOUT(AttentionGradientHopperParams, own_first, own_second, other_first, other_second, out_first, out_second,
       statistics_tiles, statistics, own, others, exponent, scale, padding)

namespace attention_hopper {

constexpr int GROUPS = 2, THREADS = 128 * (GROUPS + 1);

#ifdef PTX_HOPPER
template <int WIDTH_, int OTHERS_, int STAGES_> struct Tile {
    static constexpr int WIDTH = WIDTH_, OTHERS = OTHERS_, STAGES = STAGES_, SPANS = (WIDTH + 63) / 64;
    // Bytes of one tensor's rows: a warpgroup's own, a stage's others; then of a stage's statistics.
    static constexpr int OWN = SPANS * ROWS * SPAN, OTHER = SPANS * OTHERS * SPAN, STATISTICS = OTHERS * 16;
    // Offsets in shared memory; the last are those of barriers.
    static constexpr int OTHERS_AT = GROUPS * 2 * OWN, STATISTICS_AT = OTHERS_AT + STAGES * 2 * OTHER;
    static constexpr int OWN_FULL = STATISTICS_AT + STAGES * STATISTICS, PAIRS = OWN_FULL + GROUPS * 8;
    static constexpr int THREADS = attention_hopper::THREADS, SHARED = OWN_FULL + 256;
    static_assert(PAIRS + STAGES * 16 <= SHARED, "the barriers do not fit");
};

// The producer thread; streams the others `passes` times, with statistics if BY_KEY.
template <class T, bool BY_KEY>
PTX_FN void produce(const AttentionGradientHopperParams& p, uint32_t shared, int passes) {
    for (int group = 0; group < GROUPS; group++) {
        uint32_t own = shared + group * 2 * T::OWN, full = shared + T::OWN_FULL + group * 8;
        int token = (blockIdx.x * GROUPS + group) * ROWS;
        mbar_expect_tx(full, 2 * T::OWN);
        fill<ROWS, T::SPANS>(p.own_first, own, full, token);
        fill<ROWS, T::SPANS>(p.own_second, own + T::OWN, full, token);
    }
    Ring<T::STAGES> ring = {0, 1};
    for (int pass = 0; pass < passes; pass++) {
        for (int first = 0; first < p.others; first += T::OTHERS) {
            uint32_t others = shared + T::OTHERS_AT + ring.slot * 2 * T::OTHER;
            uint32_t pair = shared + T::PAIRS + ring.slot * 16;
            mbar_wait(pair + 8, ring.parity);
            mbar_expect_tx(pair, 2 * T::OTHER + (BY_KEY ? T::STATISTICS : 0));
            fill<T::OTHERS, T::SPANS>(p.other_first, others, pair, first);
            fill<T::OTHERS, T::SPANS>(p.other_second, others + T::OTHER, pair, first);
            if (BY_KEY)
                tma_load_3d(shared + T::STATISTICS_AT + ring.slot * T::STATISTICS, &p.statistics_tiles, pair, 0, first,
                            blockIdx.z * gridDim.y + blockIdx.y);
            ring.advance();
        }
    }
}

// The state of a consumer warpgroup.
template <class T> struct Worker {
    uint32_t shared;
    int group;
    // The next stage, and the first one that may still be read.
    Ring<T::STAGES> ring, unreleased;

    // Waits for this warpgroup's turn to issue products; passes the turn to the other warpgroup.
    __device__ __forceinline__ void begin_turn() const { named_bar_sync(1 + GROUPS + group, 256); }
    __device__ __forceinline__ void end_turn() const { named_bar_arrive(1 + GROUPS + (group + 1) % GROUPS, 256); }

    __device__ __forceinline__ void release() {
        // All of the warp's lanes have read the statistics.
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbar_arrive(shared + T::PAIRS + unreleased.slot * 16 + 8);
        unreleased.advance();
    }
};

// A warpgroup's pass over `count` others. For each stage it calls use(scores, slopes, number of others from the stage's
// first on, slot), and then begin(address of the stage's first tensor), which may issue products; they are complete
// when `use` is called again, or when this function returns.
template <class T, class Use, class Begin> PTX_FN void pass_over(Worker<T>& w, int count, Use use, Begin begin) {
    uint32_t own = w.shared + w.group * 2 * T::OWN;
    w.begin_turn();
    for (int first = 0; first < count; first += T::OTHERS) {
        uint32_t others = w.shared + T::OTHERS_AT + w.ring.slot * 2 * T::OTHER;
        float scores[T::OTHERS / 2], slopes[T::OTHERS / 2];
        mbar_wait(w.shared + T::PAIRS + w.ring.slot * 16, w.ring.parity);
        wgmma_hold(scores);
        wgmma_hold(slopes);
        wgmma_fence();
        multiply<T::WIDTH, T::OTHERS>(scores, own, others);
        multiply<T::WIDTH, T::OTHERS>(slopes, own + T::OWN, others + T::OTHER);
        wgmma_commit();
        w.end_turn();
        wgmma_wait<0>();
        wgmma_hold(scores);
        wgmma_hold(slopes);
        if (first > 0) w.release();
        use(scores, slopes, count - first, w.ring.slot);
        w.begin_turn();
        begin(others);
        w.ring.advance();
    }
    w.end_turn();
    wgmma_wait<0>();
    w.release();
    // All threads of the warpgroup are done with own rows, whose memory holds the results after the last pass.
    named_bar_sync(1 + w.group, 128);
}

// One block handles 128 queries (x) of one head (y) of one image (z).
template <class T> PTX_FN void by_query(const AttentionGradientHopperParams& p, Worker<T>& w) {
    using Numbers = float[T::OTHERS / 2];
    int lane = threadIdx.x % 32, token = (blockIdx.x * GROUPS + w.group) * ROWS;
    auto nothing = [](uint32_t) {};
    QueryStats stats[2] = {{NO_SCORE, 0.0f, 0.0f}, {NO_SCORE, 0.0f, 0.0f}};
    pass_over<T>(w, p.others, [&](Numbers& scores, const Numbers& slopes, int count, int) {
        if (count < T::OTHERS) mask(scores, count);
        update_statistics<T::OTHERS>(stats, scores, slopes, p.exponent);
    }, nothing);

    float4 statistics[2];
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        statistics[h] = statistics_of(stats[h]);
        int query = token + threadIdx.x / 32 % 4 * 16 + h * 8 + lane / 4;
        if (p.statistics && lane % 4 == 0 && query < p.own)
            p.statistics[(int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * p.own + query] = statistics[h];
        // Here weights are relative to the greatest one, and are divided by their sum at the end.
        factor[h] = p.scale / P_SCALE * statistics[h].y;
        statistics[h].y = 1.0f;
    }

    float dq[T::WIDTH / 2] = {};
    Weights<T::OTHERS> weights, steps;
    pass_over<T>(w, p.others, [&](Numbers& scores, const Numbers& slopes, int count, int) {
        if (count < T::OTHERS) mask(scores, count);
        make_factors<T::OTHERS>(&weights[0][0], &steps[0][0], scores, slopes, p.exponent,
                         [&](int h, int) { return statistics[h]; });
    }, [&](uint32_t keys) {
        wgmma_hold(dq);
        wgmma_fence();
        add_weighted<T::WIDTH, T::OTHERS>(dq, steps, keys);
        wgmma_commit();
    });
    wgmma_hold(dq);
    store_rows(p.out_first, dq, factor, w.group * 2 * T::OWN, 1 + w.group, token);
}

// One block handles 128 keys (x) of one head (y) of one image (z).
template <class T> PTX_FN void by_key(const AttentionGradientHopperParams& p, Worker<T>& w) {
    using Numbers = float[T::OTHERS / 2];
    float dk[T::WIDTH / 2] = {}, dv[T::WIDTH / 2] = {};
    // Without this, ptxas sets the zeros while the first scores are in flight, and then serialises the products.
    wgmma_hold(dk);
    wgmma_hold(dv);
    Weights<T::OTHERS> weights, steps;
    pass_over<T>(w, p.others, [&](const Numbers& scores, const Numbers& slopes, int, int slot) {
        // Queries that do not exist have statistics of zero, which makes P zero.
        auto of = reinterpret_cast<const float4*>(dyn_smem() + T::STATISTICS_AT + slot * T::STATISTICS);
        make_factors<T::OTHERS>(&weights[0][0], &steps[0][0], scores, slopes, p.exponent,
                         [&](int, int column) { return of[column]; });
    }, [&](uint32_t queries) {
        wgmma_hold(dk);
        wgmma_hold(dv);
        wgmma_fence();
        add_weighted<T::WIDTH, T::OTHERS>(dk, steps, queries);
        add_weighted<T::WIDTH, T::OTHERS>(dv, weights, queries + T::OTHER);
        wgmma_commit();
    });
    wgmma_hold(dk);
    wgmma_hold(dv);
    const float by_key[2] = {p.scale / P_SCALE, p.scale / P_SCALE}, by_value[2] = {1.0f / P_SCALE, 1.0f / P_SCALE};
    int own = w.group * 2 * T::OWN, token = (blockIdx.x * GROUPS + w.group) * ROWS;
    store_rows(p.out_first, dk, by_key, own, 1 + w.group, token);
    store_rows(p.out_second, dv, by_value, own + T::OWN, 1 + w.group, token);
}

template <class T, bool BY_KEY> PTX_FN void differentiate(const AttentionGradientHopperParams& p) {
    griddep_launch_dependents();
    uint32_t shared = smem_u32(dyn_smem());
    if (threadIdx.x == 0) {
        for (int group = 0; group < GROUPS; group++) mbar_init(shared + T::OWN_FULL + group * 8, 1);
        // One lane of each warp arrives.
        init_pairs(shared + T::PAIRS, T::STAGES, 4 * GROUPS);
        fence_mbar_init();
    }
    __syncthreads();
    griddep_wait();
    if (threadIdx.x >= 128 * GROUPS) {
        reg_dec<24>();
        if (threadIdx.x == 128 * GROUPS) produce<T, BY_KEY>(p, shared, BY_KEY ? 1 : 2);
    } else {
        reg_inc<240>();
        Worker<T> w = {shared, int(threadIdx.x) / 128, {0, 0}, {0, 0}};
        // The first turn belongs to the first warpgroup, which also takes the last one, since nobody else would.
        if (w.group == GROUPS - 1) w.end_turn();
        mbar_wait(shared + T::OWN_FULL + w.group * 8, 0);
        if constexpr (BY_KEY) by_key<T>(p, w);
        else by_query<T>(p, w);
        if (w.group == 0) w.begin_turn();
        if (threadIdx.x % 128 == 0) tma_store_wait<0>();
    }
}
#endif
}  // namespace attention_hopper

#ifdef PTX_HOPPER
#define ATTENTION_GRADIENT_HOPPER_BODY(by_key, ...) \
    attention_hopper::differentiate<attention_hopper::Tile<__VA_ARGS__>, by_key>(p);
#else
#define ATTENTION_GRADIENT_HOPPER_BODY(...)
#endif
#define ATTENTION_GRADIENT_HOPPER(name, by_key, ...)                     \
    KERNEL __launch_bounds__(attention_hopper::THREADS, 1)               \
    name(const __grid_constant__ AttentionGradientHopperParams p) {      \
        ATTENTION_GRADIENT_HOPPER_BODY(by_key, __VA_ARGS__)              \
    }                                                                    \
    EXPORT_TILE(name, 1, attention_hopper::Tile<__VA_ARGS__>)
// by_key; channels of a head, others per stage, stages.
ATTENTION_GRADIENT_HOPPER(attention_gradient_hopper_40_by_query, false, 40, 64, 4)
ATTENTION_GRADIENT_HOPPER(attention_gradient_hopper_64_by_query, false, 64, 64, 4)
ATTENTION_GRADIENT_HOPPER(attention_gradient_hopper_80_by_query, false, 80, 64, 4)
ATTENTION_GRADIENT_HOPPER(attention_gradient_hopper_160_by_query, false, 160, 32, 4)
ATTENTION_GRADIENT_HOPPER(attention_gradient_hopper_40_by_key, true, 40, 64, 4)
ATTENTION_GRADIENT_HOPPER(attention_gradient_hopper_64_by_key, true, 64, 64, 4)
ATTENTION_GRADIENT_HOPPER(attention_gradient_hopper_80_by_key, true, 80, 64, 4)
ATTENTION_GRADIENT_HOPPER(attention_gradient_hopper_160_by_key, true, 160, 32, 4)
