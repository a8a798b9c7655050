// Attention: softmax(q k^T * scale) v for each image and head. Scores never leave the registers: a block takes 64 or
// 128 queries, iterates over the keys in tiles, and keeps a running reference and sum for each query (online softmax:
// Milakov and Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691).
//
//   WIDTH   ROWS     KEYS  threads  shared memory (KiB)
//     40    64, 128   64     128     25, 30
//     64    64, 128   64     128     45, 54
//     80    64, 128   64     128     55, 66
//    160    64        32     128     63
//    512    64        32     256    136
//    512    64        16     256     98
//
// A block of sm_80, 90 and 100 may have 163 KiB or more, one of sm_86, 89 and 120 only 99: the last line is for these.
//
// WIDTH is the head dimension padded with zeros; rows in shared memory are an odd number of 16-byte chunks apart, which
// keeps ldmatrix free of bank conflicts. There are four groups of rows (16 or 32 each), with one warp per group. At
// WIDTH 512 each group has two warps, since the 64 x 512 accumulators need 256 threads, and each warp accumulates half
// of the channels. With 32 keys per tile, each of the two computes the scores of half of the keys, and they exchange
// maxima and weights through shared memory. With 16 keys there is no room for that exchange: both compute all scores,
// so that three matrix products are computed in place of two.
//
// Key tiles are copied by cp.async: K and V of the next tile are in flight while this one is computed (two stages). At
// 512, where only one stage fits, V is in flight while scores are computed, and the next K while values are summed. The
// last keys, and under a causal mask all keys, are processed 16 at a time with a mask: 77 keys cost as much as 80.
//
// Memory traffic: q once, the output once, and k and v once for every block of queries of a head (L2 serves all but the
// first of these reads).
//
// Bound: 4 * queries * keys * WIDTH flops on the tensor cores, next to one exp2 per score, at 16 per cycle and
// multiprocessor. WIDTH 40 executes 96 units of tensor-core work for 80 useful ones: the depth of q k^T is padded to
// 48, and the product with v has an extra column of 8 for the row sums. At 40 both limits are about equal, and issuing
// all instructions takes a little longer, so a polynomial in place of exp2 would not pay; from 64 on mma.sync is the
// bound.
//
// Results depend neither on ROWS nor on the contents of other rows: the number of keys and KEYS, which the card
// decides, determine the order of summation.
#include "attention.cuh"

struct AttentionParams {
    // The first head's channels of the first token.
    const __half* q;
    const __half* k;
    const __half* v;
    // [images, queries, heads, head_dim]
    __half* out;
    int32_t queries;
    int32_t keys;
    int32_t head_dim;
    // Channels from one token to the next.
    int32_t q_width;
    int32_t k_width;
    int32_t v_width;
    // 1 if query i sees only keys 0..=i.
    int32_t causal;
    // scale * log2(e), positive: exp(scale * s) = exp2(exponent * s).
    float exponent;
};
LAYOUT(AttentionParams, q, k, v, out, queries, keys, head_dim, q_width, k_width, v_width, causal, exponent)

// Lazy rescaling: a row's reference is raised only when log2 of a weight would exceed it by more than this. So weights
// stay below 2^8, far from the end of fp16's range, and accumulators are hardly ever rescaled.
constexpr float HEADROOM = 8.0f;

template <int WIDTH_, int ROWS_, int KEYS_, bool VECTOR_> struct Tile {
    static constexpr int WIDTH = WIDTH_, ROWS = ROWS_, KEYS = KEYS_;
    static constexpr bool VECTOR = VECTOR_;
    // Warps that share a group of rows, and stages of keys and values.
    static constexpr int SPLIT = WIDTH > 256 ? 2 : 1, STAGES = SPLIT == 1 ? 2 : 1;
    static constexpr int THREADS = 128 * SPLIT;
    // True if warps that share rows divide a tile's keys among them and exchange the weights.
    static constexpr bool EXCHANGE = SPLIT > 1 && KEYS / SPLIT >= 16;
    // 16-row pieces per warp.
    static constexpr int PIECES = ROWS / 64;
    // 16-byte chunks in a row, and from one row to the next.
    static constexpr int CHUNKS = WIDTH / 8, STRIDE = CHUNKS | 1, P_STRIDE = KEYS / 8 | 1;
    // 16-deep steps of the product q k^T; the last may be half empty.
    static constexpr int STEPS = (CHUNKS + 1) / 2;
    // 8-channel columns of a warp, and the number of them that one call multiplies.
    static constexpr int COLUMNS = CHUNKS / SPLIT, AT_ONCE = COLUMNS <= 10 ? COLUMNS : COLUMNS % 8 ? 10 : 8;
    static constexpr int GROUPS = COLUMNS / AT_ONCE;
    // Keys in a masked step.
    static constexpr int TAIL = SPLIT == 1 ? 16 : KEYS;
    // True if the fragments of q fit into registers permanently.
    static constexpr bool KEEP_Q = STEPS * PIECES <= 8;
    // Offsets in shared memory.
    static constexpr int K_AT = ROWS * STRIDE * 16, STAGE = KEYS * STRIDE * 16, V_AT = K_AT + STAGES * STAGE;
    static constexpr int P_AT = V_AT + STAGES * STAGE, TOPS_AT = P_AT + ROWS * P_STRIDE * 16;
    static constexpr int SHARED = EXCHANGE ? TOPS_AT + SPLIT * ROWS * 4 : P_AT;
};

// A warp's state for its rows. In fragments, a lane holds of each piece the rows `lane / 4` and 8 below it.
template <class T> struct State {
    Sums<T> out;
    // log2 of the number that the weights are relative to.
    float reference[T::PIECES][2];
    // Row sums of the fp16-rounded weights, computed by an extra mma against ones: even columns accumulate piece 0, odd
    // ones piece 1. The sum of row h of piece i is sum[h * 2 + i].
    float sum[4];
    uint32_t q[T::KEEP_Q ? T::STEPS : 1][T::PIECES][4];
    // The row group, the index among the warps that share it, and the first row in the tile.
    int group, part, row;
};

template <class T> PTX_FN void load_q(uint32_t (&a)[T::PIECES][4], const State<T>& s, int step) {
    uint32_t at = smem_u32(dyn_smem()) + (s.row + threadIdx.x % 16) * T::STRIDE * 16;
#pragma unroll
    for (int i = 0; i < T::PIECES; i++) load_a<T::CHUNKS>(a[i], at + i * 16 * T::STRIDE * 16, step * 2);
}

// Accumulates KEYS keys, from key `first` of stage `stage` on. If MASKED, row r sees only the stage's first min(count,
// seen + r) keys. `next()` waits until the values are there and starts the copy of the next keys.
template <class T, int KEYS, bool MASKED, class Next>
PTX_FN void attend_keys(State<T>& s, int stage, int first, int count, int seen, float exponent, Next next) {
    // The number of keys whose scores this warp computes: all of them, or its half.
    constexpr int OWN = T::EXCHANGE ? KEYS / T::SPLIT : KEYS;
    uint32_t smem = smem_u32(dyn_smem());
    int lane = threadIdx.x % 32;
    int values_first = first;
    if (T::EXCHANGE) first += s.part * OWN;

    float scores[T::PIECES][OWN / 8][4] = {};
    uint32_t keys = smem + T::K_AT + stage * T::STAGE + first * T::STRIDE * 16;
#pragma unroll
    for (int step = 0; step < T::STEPS; step++) {
        uint32_t b[OWN / 8][2];
        load_b<T, OWN>(b, keys, step);
        if constexpr (T::KEEP_Q) {
            mma_tile<T::PIECES, OWN / 8>(scores, s.q[step], b);
        } else {
            uint32_t a[T::PIECES][4];
            load_q<T>(a, s, step);
            mma_tile<T::PIECES, OWN / 8>(scores, a, b);
        }
    }

    // The rows' maxima, and from them the new references.
    float tops[T::PIECES][2];
    float* shared_tops = reinterpret_cast<float*>(dyn_smem() + T::TOPS_AT);
#pragma unroll
    for (int i = 0; i < T::PIECES; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = s.row + i * 16 + h * 8 + lane / 4;
            float top = -INFINITY;
#pragma unroll
            for (int j = 0; j < OWN / 8 * 2; j++) {
                float& score = scores[i][j / 2][h * 2 + j % 2];
                if (MASKED && first + j / 2 * 8 + lane % 4 * 2 + j % 2 >= min(count, seen + row)) score = -INFINITY;
                top = fmaxf(top, score);
            }
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            tops[i][h] = top;
            if (T::EXCHANGE && lane % 4 == 0) shared_tops[s.part * T::ROWS + row] = top;
        }
    }
    if constexpr (T::EXCHANGE) named_bar_sync(1 + s.group, 32 * T::SPLIT);
    float factors[T::PIECES][2];
    bool raised = false;
#pragma unroll
    for (int i = 0; i < T::PIECES; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = tops[i][h];
            if (T::EXCHANGE) top = fmaxf(top, shared_tops[(1 - s.part) * T::ROWS + s.row + i * 16 + h * 8 + lane / 4]);
            top *= exponent;
            bool raise = top > s.reference[i][h] + HEADROOM;
            factors[i][h] = raise ? exp2_approx(s.reference[i][h] - top) : 1.0f;
            if (raise) s.reference[i][h] = top;
            raised |= raise;
        }
    }
    // The factor of a row that was not raised is 1, so it does not matter which other rows make the warp multiply.
    if (__any_sync(ALL_LANES, raised)) {
#pragma unroll
        for (int i = 0; i < T::PIECES; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) s.sum[h * 2 + i] *= factors[i][h];
#pragma unroll
            for (int j = 0; j < T::COLUMNS * 4; j++)
                s.out[j / 4 / T::AT_ONCE][i][j / 4 % T::AT_ONCE][j % 4] *= factors[i][j % 4 / 2];
        }
    }

    // The weights, as fragments of A: two columns of scores are 16 keys of depth.
    uint32_t weights[OWN / 16][T::PIECES][4];
#pragma unroll
    for (int i = 0; i < T::PIECES; i++) {
#pragma unroll
        for (int j = 0; j < OWN / 8; j++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float x = exp2_approx(fmaf(scores[i][j][h * 2], exponent, -s.reference[i][h]));
                float y = exp2_approx(fmaf(scores[i][j][h * 2 + 1], exponent, -s.reference[i][h]));
                weights[j / 2][i][j % 2 * 2 + h] = bits_of(__floats2half2_rn(x, y));
            }
        }
    }
    uint32_t p = smem + T::P_AT + s.row * T::P_STRIDE * 16;
    if constexpr (T::EXCHANGE) {
        int column = s.part * OWN + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < T::PIECES * OWN / 4; i++) {
            int row = s.row + i / (OWN / 4) * 16 + i % 2 * 8 + lane / 4, j = i / 2 % (OWN / 8);
            unsigned char* at = dyn_smem() + T::P_AT + row * T::P_STRIDE * 16 + (column + j * 8) * 2;
            *reinterpret_cast<uint32_t*>(at) = weights[j / 2][i / (OWN / 4)][j % 2 * 2 + i % 2];
        }
    }
    next();

    uint32_t values = smem + T::V_AT + stage * T::STAGE + values_first * T::STRIDE * 16 + s.part * T::COLUMNS * 16;
#pragma unroll
    for (int depth = 0; depth < KEYS / 16; depth++) {
        uint32_t gathered[T::PIECES][4];
        if constexpr (T::EXCHANGE) {
#pragma unroll
            for (int i = 0; i < T::PIECES; i++)
                load_a<KEYS / 8>(gathered[i], p + (i * 16 + lane % 16) * T::P_STRIDE * 16, depth * 2);
        }
        auto& a = T::EXCHANGE ? gathered : weights[depth % (OWN / 16)];
#pragma unroll
        for (int i = 0; i < T::PIECES; i++) {
            uint32_t ones = lane / 4 % 2 == i ? 0x3c003c00 : 0;
            uint32_t b[2] = {ones, ones};
            mma_m16n8k16(s.sum, a[i], b);
        }
        add_product<T>(s.out, a, values + depth * 16 * T::STRIDE * 16);
    }
}

// Divides by the row sums and writes the rows that exist, passing through the shared memory of q.
template <class T> PTX_FN void finish(State<T>& s, const AttentionParams& p, __half* out, int rows) {
    float inverses[T::PIECES][2];
#pragma unroll
    for (int i = 0; i < T::PIECES * 2; i++) inverses[i / 2][i % 2] = 1.0f / s.sum[i % 2 * 2 + i / 2];
    store_rows<T>(s.out, inverses, 0, s.row, s.part, out, gridDim.y * p.head_dim, rows, p.head_dim);
}

// One block handles ROWS queries (x) of one head (y) of one image (z).
template <class T> PTX_FN void attend(const AttentionParams& p) {
    griddep_launch_dependents();
    int first_query = blockIdx.x * T::ROWS, rows = min(T::ROWS, p.queries - first_query);
    const __half* q = p.q + (int64_t(blockIdx.z) * p.queries + first_query) * p.q_width + blockIdx.y * p.head_dim;
    const __half* k = p.k + int64_t(blockIdx.z) * p.keys * p.k_width + blockIdx.y * p.head_dim;
    const __half* v = p.v + int64_t(blockIdx.z) * p.keys * p.v_width + blockIdx.y * p.head_dim;
    int keys = p.causal ? min(p.keys, first_query + rows) : p.keys;
    // Load the tile of keys, or values, from `first` on, if there is one.
    auto stage_of = [](int first) { return first / T::KEYS % T::STAGES; };
    auto load_keys = [&](int first) {
        if (first >= keys) return;
        const __half* from = k + int64_t(first) * p.k_width;
        load<T, T::KEYS>(T::K_AT + stage_of(first) * T::STAGE, from, p.k_width, keys - first, p.head_dim);
    };
    auto load_values = [&](int first) {
        if (first >= keys) return;
        const __half* from = v + int64_t(first) * p.v_width;
        load<T, T::KEYS>(T::V_AT + stage_of(first) * T::STAGE, from, p.v_width, keys - first, p.head_dim);
    };

    State<T> s = {};
    s.group = threadIdx.x / 32 % 4, s.part = T::SPLIT > 1 ? threadIdx.x / 128 : 0, s.row = s.group * T::PIECES * 16;
#pragma unroll
    for (int i = 0; i < T::PIECES; i++) s.reference[i][0] = s.reference[i][1] = -INFINITY;

    griddep_wait();
    load<T, T::ROWS>(0, q, p.q_width, rows, p.head_dim);
    load_keys(0);
    if (T::STAGES > 1) load_values(0);
    cp_async_commit();
    if constexpr (T::KEEP_Q) {
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < T::STEPS; step++) load_q<T>(s.q[step], s, step);
    }
    for (int tile = 0; tile < keys; tile += T::KEYS) {
        // This tile's keys have landed, and all threads are done with the previous tile.
        cp_async_wait<0>();
        __syncthreads();
        if (T::STAGES > 1) load_keys(tile + T::KEYS);
        load_values(tile + (T::STAGES - 1) * T::KEYS);
        cp_async_commit();
        auto next = [&] {
            if constexpr (T::STAGES == 1) {
                // The values have landed, all weights are written, and all threads are done with the keys.
                cp_async_wait<0>();
                __syncthreads();
                load_keys(tile + T::KEYS);
                cp_async_commit();
            }
        };
        int stage = stage_of(tile), count = keys - tile;
        if (count >= T::KEYS && !p.causal) {
            attend_keys<T, T::KEYS, false>(s, stage, 0, T::KEYS, T::KEYS, p.exponent, next);
        } else {
            int seen = p.causal ? first_query + 1 - tile : T::KEYS;
            for (int first = 0; first < min(count, T::KEYS); first += T::TAIL)
                attend_keys<T, T::TAIL, true>(s, stage, first, count, seen, p.exponent, next);
        }
    }
    finish(s, p, p.out + ((int64_t(blockIdx.z) * p.queries + first_query) * gridDim.y + blockIdx.y) * p.head_dim, rows);
}

// The number after the name is the number of blocks that a multiprocessor's registers must allow; the rest are the
// parameters of Tile.
#define ATTENTION(name, blocks, ...)                                                                                \
    KERNEL __launch_bounds__(Tile<__VA_ARGS__>::THREADS, blocks) name(const __grid_constant__ AttentionParams p) {  \
        attend<Tile<__VA_ARGS__>>(p);                                                                               \
    }                                                                                                               \
    EXPORT_TILE(name, blocks, Tile<__VA_ARGS__>)

ATTENTION(attention_40_128, 3, 40, 128, 64, true)
ATTENTION(attention_40_64, 4, 40, 64, 64, true)
ATTENTION(attention_64_128, 2, 64, 128, 64, true)
ATTENTION(attention_64_64, 4, 64, 64, 64, true)
ATTENTION(attention_80_128, 2, 80, 128, 64, true)
ATTENTION(attention_80_64, 3, 80, 64, 64, true)
ATTENTION(attention_160_64, 1, 160, 64, 32, true)
ATTENTION(attention_512_64, 1, 512, 64, 32, true)
ATTENTION(attention_512_64_16, 1, 512, 64, 16, true)
// Copies number by number, where 16 bytes are not aligned.
ATTENTION(attention_40_64_unaligned, 2, 40, 64, 64, false)
ATTENTION(attention_160_64_unaligned, 1, 160, 64, 32, false)
ATTENTION(attention_512_64_unaligned, 1, 512, 64, 16, false)
