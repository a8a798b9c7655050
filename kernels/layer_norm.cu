// Layer normalisation and its gradient. Memory bound.
//
// * layer_norm: a row stays in the registers of one warp (of several beyond 1280 channels): one read, one write, 2 x 2
//   bytes per element. Where only matrix products read the result, scale and shift are folded into their weights; where
//   these products and the one that computed the input are conv_hopper.cu's, there is no launch at all.
// * layer_norm_gradient: the gradient by the input, which recomputes the statistics. With d the gradient by the result,
//   x^ the normalised input and u = d times what the norm multiplies x by, it is u - mean(u) - x^ mean(u x^), with
//   means over a row. A row of x and of d stays in registers: two reads, one write, 3 x 2 bytes per element.
#include "numeric.cuh"

struct LayerNormParams {
    const __half* x;
    const __half* d;  // for a gradient
    const float* weight;  // null if it is folded into the products that read the norm
    const float* bias;  // of the norm itself, likewise
    __half* out;
    int64_t rows;
    int32_t channels;
    int32_t warps;  // per row
    float eps;
    int32_t padding;
};
LAYOUT(LayerNormParams, x, d, weight, bias, out, rows, channels, warps, eps, padding)

// Columns of a row that one thread holds.
constexpr int SLOTS = 5;

// Sums x over the warps of the thread's row.
__device__ __forceinline__ float row_sum(float x, int warps) {
    x = warp_sum(x);
    if (warps == 1) return x;
    float* by_warp = reinterpret_cast<float*>(dyn_smem());
    if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < warps; warp++) sum += by_warp[threadIdx.x / (32 * warps) * warps + warp];
    __syncthreads();
    return sum;
}

// Passes a compile-time constant to a generic lambda.
template <bool V> struct Constant {
    static constexpr bool value = V;
};

// If GRADIENT, p.out is the gradient by x, else the norm of x.
template <int W, bool GRADIENT> __device__ __forceinline__ void layer_norm_kernel(const LayerNormParams& p) {
    griddep_launch_dependents();
    griddep_wait();
    int threads = 32 * p.warps;
    int64_t row = int64_t(blockIdx.x) * (blockDim.x / threads) + threadIdx.x / threads;
    // Threads beyond the last row stay for the barriers.
    int columns = row < p.rows ? p.channels / W : 0;
    int column = threadIdx.x % threads;
    Halves<W> kept[SLOTS], kept_d[GRADIENT ? SLOTS : 1];
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
        int64_t at = row * p.channels + (column + i * threads) * W;
        if (column + i * threads < columns) kept[i] = load_halves<W>(p.x + at);
        if (GRADIENT && column + i * threads < columns) kept_d[i] = load_halves<W>(p.d + at);
    }
    // Calls f(first channel, channels of x) for each column that this thread holds.
    auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            if (column + i * threads >= columns) break;
            float x[W];
            unpack(kept[i], x);
            f((column + i * threads) * W, x);
        }
    };
    float sum = 0.0f, squares = 0.0f;
    each([&](int, float(&x)[W]) {
#pragma unroll
        for (int j = 0; j < W; j++) sum += x[j];
    });
    float mean = row_sum(sum, p.warps) / p.channels;
    each([&](int, float(&x)[W]) {
#pragma unroll
        for (int j = 0; j < W; j++) squares += (x[j] - mean) * (x[j] - mean);
    });
    float inverse = rsqrtf(row_sum(squares, p.warps) / p.channels + p.eps);
    if constexpr (GRADIENT) {
        // Compiled separately with and without a scale: a test for each number would make registers spill.
        auto gradient = [&](auto scaled) {
            // Calls f(first channel, x^, u).
            auto each_pair = [&](auto f) {
#pragma unroll
                for (int i = 0; i < SLOTS; i++) {
                    if (column + i * threads >= columns) break;
                    int channel = (column + i * threads) * W;
                    float x[W], u[W], weight[W];
                    unpack(kept[i], x);
                    unpack(kept_d[i], u);
#pragma unroll
                    for (int j = 0; j < W; j++) weight[j] = 1.0f;
                    if constexpr (decltype(scaled)::value) load_floats(p.weight + channel, weight);
#pragma unroll
                    for (int j = 0; j < W; j++) {
                        x[j] = (x[j] - mean) * inverse;
                        u[j] *= weight[j] * inverse;
                    }
                    f(channel, x, u);
                }
            };
            float product = 0.0f;
            sum = 0.0f;
            each_pair([&](int, float(&x)[W], float(&u)[W]) {
#pragma unroll
                for (int j = 0; j < W; j++) {
                    sum += u[j];
                    product += u[j] * x[j];
                }
            });
            float mean_u = row_sum(sum, p.warps) / p.channels, mean_product = row_sum(product, p.warps) / p.channels;
            each_pair([&](int channel, float(&x)[W], float(&u)[W]) {
#pragma unroll
                for (int j = 0; j < W; j++) u[j] -= mean_u + x[j] * mean_product;
                store_halves(p.out + row * p.channels + channel, u);
            });
        };
        if (p.weight) gradient(Constant<true>());
        else gradient(Constant<false>());
    } else {
        each([&](int channel, float(&x)[W]) {
#pragma unroll
            for (int j = 0; j < W; j++) x[j] = (x[j] - mean) * inverse;
            if (p.weight) {
                float weight[W], bias[W];
                load_floats(p.weight + channel, weight);
                load_floats(p.bias + channel, bias);
#pragma unroll
                for (int j = 0; j < W; j++) x[j] = x[j] * weight[j] + bias[j];
            }
            store_halves(p.out + row * p.channels + channel, x);
        });
    }
}

// A block is four rows of one warp each, or one row of up to 32 warps.
#define LAYER_NORM(name, W, GRADIENT)                                                             \
    KERNEL __launch_bounds__(1024) name##_##W(const __grid_constant__ LayerNormParams p) { \
        layer_norm_kernel<W, GRADIENT>(p);                                                        \
    }                                                                                             \
    EXPORT(name##_##W)
LAYER_NORM(layer_norm, 8, false)
LAYER_NORM(layer_norm, 1, false)
LAYER_NORM(layer_norm_gradient, 8, true)
LAYER_NORM(layer_norm_gradient, 1, true)
