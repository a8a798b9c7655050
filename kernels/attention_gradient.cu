// The gradient of attention, softmax(q k^T * scale) v, for each image and head. With P the softmax and dO the gradient
// by the result,
//
//   dP = dO V^T,  D = sum over keys of P dP,  dS = P (dP - D) scale,  dQ = dS K,  dK = dS^T Q,  dV = P^T dO
//
// (Dao, arXiv 2307.08691). Neither P nor dP leaves the registers, and nothing but q, k and v is kept from the forward
// pass.
//
// * attention_gradient_by_query: a block has 64 queries and iterates over the keys twice: first for each query's
//   reference (the greatest score), sum of weights and D, which it leaves in memory for the other kernel; then for dQ.
// * attention_gradient_by_key: a block has 64 keys and iterates over the queries once, computing P^T and dS^T, for dK
//   and dV.
//
// Cross-attention needs only the first: its keys come from the prompt.
//
//   WIDTH   OWN   OTHERS   shared memory (KiB)
//     40     64     64       32
//     64     64     64       56
//     80     64     64       68
//    160     64     32       85
//
// WIDTH is the head dimension padded with zeros. A block's OWN rows, from two tensors (q and dO, or k and v), stay in
// shared memory; the OTHERS are copied by cp.async, one tile while the one before is computed. Each of four warps has
// 16 of the block's own rows. The last others are processed 16 at a time: 77 keys cost as much as 80.
//
// Memory traffic: the four tensors once for a block's own rows; k and v twice for every 64 queries, q and dO once for
// every 64 keys, all but the first of these reads from L2. A pair of query and key costs 2 * WIDTH flops of mma.sync
// for each of nine products, five by query and four by key, and three exp2. Bound: shared memory. For 64 x 16 x 16
// multiply-adds, 16 cycles of an A100's tensor cores, ldmatrix brings 2.5 KiB to a warp, which takes 20 cycles. No sum
// is split and none uses atomics: an image gives the same bits in every batch and run.
//
// fp16: dS is stored in the form in which it is multiplied. By query, P is unnormalised (relative to the greatest
// weight), and 1/sum is applied at the end. By key, P is normalised and mostly about one over the number of keys, so it
// is scaled by 2^8, with headroom for dS up to 256.
#include "attention.cuh"
#include "attention_gradient.cuh"

struct AttentionGradientParams {
    // The first head's channels of the first token.
    const __half* q;
    const __half* k;
    const __half* v;
    const __half* d;
    __half* dq;
    __half* dk;
    __half* dv;
    // [images][heads][queries]: reference, 2^8 over the sum of weights, D, unused. Null where keys want no gradient.
    float4* statistics;
    int32_t queries;
    int32_t keys;
    int32_t head_dim;
    // Channels from one token to the next, in that order; `out_width` for all results.
    int32_t q_width;
    int32_t k_width;
    int32_t v_width;
    int32_t d_width;
    int32_t out_width;
    // exp(scale * s) = exp2(exponent * s).
    float exponent;
    float scale;
};
LAYOUT(AttentionGradientParams, q, k, v, d, dq, dk, dv, statistics, queries, keys, head_dim, q_width, k_width, v_width,
       d_width, out_width, exponent, scale)

template <int WIDTH_, bool VECTOR_> struct Tile {
    static constexpr int WIDTH = WIDTH_, THREADS = 128, OWN = 64, OTHERS = WIDTH > 80 ? 32 : 64;
    static constexpr bool VECTOR = VECTOR_;
    static constexpr int PIECES = 1, CHUNKS = WIDTH / 8, STRIDE = CHUNKS | 1, STEPS = (CHUNKS + 1) / 2;
    static constexpr int COLUMNS = CHUNKS, AT_ONCE = COLUMNS <= 10 ? COLUMNS : 10, GROUPS = COLUMNS / AT_ONCE;
    // Others in a masked step.
    static constexpr int TAIL = 16;
    // Bytes of one tensor's rows; then offsets in shared memory of the two stages of others and of their statistics.
    static constexpr int OWN_BYTES = OWN * STRIDE * 16, OTHER_BYTES = OTHERS * STRIDE * 16;
    static constexpr int OTHERS_AT = 2 * OWN_BYTES, STATISTICS_AT = OTHERS_AT + 4 * OTHER_BYTES;
    static constexpr int SHARED = STATISTICS_AT + 2 * OTHERS * 16;
};

// The rows of one head of one image in two tensors.
struct Rows {
    const __half *first, *second;
    int first_width, second_width, count;
};

// Copies a tile of both tensors, from row `from` on.
template <class T, int ROWS> PTX_FN void load_pair(int offset, const Rows& rows, int from, int head_dim) {
    const int count = rows.count - from;
    load<T, ROWS>(offset, rows.first + int64_t(from) * rows.first_width, rows.first_width, count, head_dim);
    load<T, ROWS>(offset + ROWS * T::STRIDE * 16, rows.second + int64_t(from) * rows.second_width, rows.second_width,
                  count, head_dim);
}

// Iterates over `count` others: calls fetch(stage, first row) for each tile, one tile ahead of f(stage, first row).
template <class T, class Fetch, class F> PTX_FN void stream(int count, Fetch fetch, F f) {
    // All threads are done with the previous contents of the stages.
    __syncthreads();
    fetch(0, 0);
    cp_async_commit();
    for (int first = 0, stage = 0; first < count; first += T::OTHERS, stage ^= 1) {
        // This tile has landed, and all threads are done with the one before.
        cp_async_wait<0>();
        __syncthreads();
        if (first + T::OTHERS < count) fetch(stage ^ 1, first + T::OTHERS);
        cp_async_commit();
        f(stage, first);
    }
}

// The two products of a warp's own rows with others: of the first tensors (scores) and of the second ones (dP).
template <int OTHERS> struct Products {
    float scores[1][OTHERS / 8][4], slopes[1][OTHERS / 8][4];
};

// Multiplies by OTHERS others from `first` on in the tile at `offset`, which has `count` of them. Where this is less
// than a whole tile, scores beyond `count` become -infinity.
template <class T, int OTHERS> PTX_FN void multiply(Products<OTHERS>& p, int offset, int first, int count) {
    const int lane = threadIdx.x % 32;
    const uint32_t own = smem_u32(dyn_smem()) + (threadIdx.x / 32 * 16 + lane % 16) * T::STRIDE * 16;
    const uint32_t others = smem_u32(dyn_smem()) + offset + first * T::STRIDE * 16;
    p = {};
#pragma unroll
    for (int step = 0; step < T::STEPS; step++) {
        uint32_t a[1][4], b[OTHERS / 8][2];
        load_a<T::CHUNKS>(a[0], own, step * 2);
        load_b<T, OTHERS>(b, others, step);
        mma_tile<1, OTHERS / 8>(p.scores, a, b);
        load_a<T::CHUNKS>(a[0], own + T::OWN_BYTES, step * 2);
        load_b<T, OTHERS>(b, others + T::OTHER_BYTES, step);
        mma_tile<1, OTHERS / 8>(p.slopes, a, b);
    }
    if (OTHERS < T::OTHERS) {
#pragma unroll
        for (int j = 0; j < OTHERS / 2; j++)
            if (first + j / 4 * 8 + lane % 4 * 2 + j % 2 >= count) p.scores[0][j / 4][j % 4] = -INFINITY;
    }
}

// Calls f(Count of others, first) over a tile with `count` others: once for a whole tile, else TAIL at a time.
template <int N_> struct Count {
    static constexpr int N = N_;
};
template <class T, class F> PTX_FN void each_step(int count, F f) {
    if (count >= T::OTHERS) {
        f(Count<T::OTHERS>(), 0);
    } else {
        for (int first = 0; first < count; first += T::TAIL) f(Count<T::TAIL>(), first);
    }
}

// The head's rows of either kind.
PTX_FN Rows queries_of(const AttentionGradientParams& p) {
    const int64_t first = int64_t(blockIdx.z) * p.queries, head = blockIdx.y * p.head_dim;
    return {p.q + first * p.q_width + head, p.d + first * p.d_width + head, p.q_width, p.d_width, p.queries};
}
PTX_FN Rows keys_of(const AttentionGradientParams& p) {
    const int64_t first = int64_t(blockIdx.z) * p.keys, head = blockIdx.y * p.head_dim;
    return {p.k + first * p.k_width + head, p.v + first * p.v_width + head, p.k_width, p.v_width, p.keys};
}

template <class T> PTX_FN int stage_at(int stage) { return T::OTHERS_AT + stage * 2 * T::OTHER_BYTES; }

// One block handles 64 queries (x) of one head (y) of one image (z).
template <class T> PTX_FN void by_query(const AttentionGradientParams& p) {
    griddep_launch_dependents();
    const Rows own = queries_of(p), others = keys_of(p);
    const int first_own = blockIdx.x * T::OWN, count = min(T::OWN, own.count - first_own);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    auto fetch = [&](int stage, int first) { load_pair<T, T::OTHERS>(stage_at<T>(stage), others, first, p.head_dim); };

    griddep_wait();
    load_pair<T, T::OWN>(0, own, first_own, p.head_dim);
    QueryStats stats[2] = {{NO_SCORE, 0.0f, 0.0f}, {NO_SCORE, 0.0f, 0.0f}};
    stream<T>(others.count, fetch, [&](int stage, int tile) {
        each_step<T>(others.count - tile, [&](auto step, int first) {
            constexpr int N = decltype(step)::N;
            Products<N> products;
            multiply<T>(products, stage_at<T>(stage), first, others.count - tile);
            update_statistics<N>(stats, &products.scores[0][0][0], &products.slopes[0][0][0], p.exponent);
        });
    });
    float4 statistics[2];
    float factors[1][2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        statistics[h] = statistics_of(stats[h]);
        const int own_row = row + h * 8 + lane / 4;
        if (p.statistics && lane % 4 == 0 && own_row < count) {
            const int64_t at = (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * p.queries + first_own + own_row;
            p.statistics[at] = statistics[h];
        }
        // Here weights are relative to the greatest one, and are divided by their sum at the end.
        factors[0][h] = p.scale / P_SCALE * statistics[h].y;
        statistics[h].y = 1.0f;
    }

    Sums<T> dq = {};
    stream<T>(others.count, fetch, [&](int stage, int tile) {
        each_step<T>(others.count - tile, [&](auto step, int first) {
            constexpr int N = decltype(step)::N;
            Products<N> products;
            uint32_t weights[N / 16][1][4], slopes[N / 16][1][4];
            multiply<T>(products, stage_at<T>(stage), first, others.count - tile);
            make_factors<N>(&weights[0][0][0], &slopes[0][0][0], &products.scores[0][0][0],
                            &products.slopes[0][0][0], p.exponent, [&](int h, int) { return statistics[h]; });
            const uint32_t keys = smem_u32(dyn_smem()) + stage_at<T>(stage) + first * T::STRIDE * 16;
#pragma unroll
            for (int i = 0; i < N / 16; i++) add_product<T>(dq, slopes[i], keys + i * 16 * T::STRIDE * 16);
        });
    });
    const int64_t first = int64_t(blockIdx.z) * p.queries + first_own;
    __half* out = p.dq + first * p.out_width + blockIdx.y * p.head_dim;
    store_rows<T>(dq, factors, 0, row, 0, out, p.out_width, count, p.head_dim);
}

// One block handles 64 keys (x) of one head (y) of one image (z).
template <class T> PTX_FN void by_key(const AttentionGradientParams& p) {
    griddep_launch_dependents();
    const Rows own = keys_of(p), others = queries_of(p);
    const int first_own = blockIdx.x * T::OWN, count = min(T::OWN, own.count - first_own), row = threadIdx.x / 32 * 16;
    const float4* statistics = p.statistics + (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * p.queries;
    // Queries that do not exist have statistics of zero, which makes P zero.
    auto fetch = [&](int stage, int first) {
        load_pair<T, T::OTHERS>(stage_at<T>(stage), others, first, p.head_dim);
        const bool in = first + int(threadIdx.x) < others.count;
        if (threadIdx.x < T::OTHERS)
            cp_async16(smem_u32(dyn_smem()) + T::STATISTICS_AT + (stage * T::OTHERS + threadIdx.x) * 16,
                       statistics + (in ? first + threadIdx.x : 0), in);
    };

    griddep_wait();
    load_pair<T, T::OWN>(0, own, first_own, p.head_dim);
    Sums<T> dk = {}, dv = {};
    stream<T>(others.count, fetch, [&](int stage, int tile) {
        each_step<T>(others.count - tile, [&](auto step, int first) {
            constexpr int N = decltype(step)::N;
            Products<N> products;
            uint32_t weights[N / 16][1][4], slopes[N / 16][1][4];
            multiply<T>(products, stage_at<T>(stage), first, others.count - tile);
            auto all = reinterpret_cast<const float4*>(dyn_smem() + T::STATISTICS_AT);
            const float4* of = all + stage * T::OTHERS + first;
            make_factors<N>(&weights[0][0][0], &slopes[0][0][0], &products.scores[0][0][0],
                            &products.slopes[0][0][0], p.exponent, [&](int, int column) { return of[column]; });
            const uint32_t queries = smem_u32(dyn_smem()) + stage_at<T>(stage) + first * T::STRIDE * 16;
#pragma unroll
            for (int i = 0; i < N / 16; i++) {
                add_product<T>(dk, slopes[i], queries + i * 16 * T::STRIDE * 16);
                add_product<T>(dv, weights[i], queries + T::OTHER_BYTES + i * 16 * T::STRIDE * 16);
            }
        });
    });
    const int64_t at = (int64_t(blockIdx.z) * p.keys + first_own) * p.out_width + blockIdx.y * p.head_dim;
    const float by_key[1][2] = {{p.scale / P_SCALE, p.scale / P_SCALE}};
    const float by_value[1][2] = {{1.0f / P_SCALE, 1.0f / P_SCALE}};
    store_rows<T>(dk, by_key, 0, row, 0, p.dk + at, p.out_width, count, p.head_dim);
    store_rows<T>(dv, by_value, T::OWN_BYTES, row, 0, p.dv + at, p.out_width, count, p.head_dim);
}

#define ATTENTION_GRADIENT(name, body, width, vector)                                                         \
    KERNEL __launch_bounds__(128, 2) name(const __grid_constant__ AttentionGradientParams p) {               \
        body<Tile<width, vector>>(p);                                                                         \
    }                                                                                                         \
    EXPORT_TILE(name, 2, Tile<width, vector>)
ATTENTION_GRADIENT(attention_gradient_by_query_40, by_query, 40, true)
ATTENTION_GRADIENT(attention_gradient_by_query_64, by_query, 64, true)
ATTENTION_GRADIENT(attention_gradient_by_query_80, by_query, 80, true)
ATTENTION_GRADIENT(attention_gradient_by_query_160, by_query, 160, true)
ATTENTION_GRADIENT(attention_gradient_by_key_40, by_key, 40, true)
ATTENTION_GRADIENT(attention_gradient_by_key_64, by_key, 64, true)
ATTENTION_GRADIENT(attention_gradient_by_key_80, by_key, 80, true)
ATTENTION_GRADIENT(attention_gradient_by_key_160, by_key, 160, true)
// Copies number by number, where 16 bytes are not aligned.
ATTENTION_GRADIENT(attention_gradient_by_query_40_unaligned, by_query, 40, false)
ATTENTION_GRADIENT(attention_gradient_by_query_160_unaligned, by_query, 160, false)
ATTENTION_GRADIENT(attention_gradient_by_key_40_unaligned, by_key, 40, false)
ATTENTION_GRADIENT(attention_gradient_by_key_160_unaligned, by_key, 160, false)
