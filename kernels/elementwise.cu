// Elementwise operations: one read of each input and one write, memory bound.
#include "numeric.cuh"

struct ElementParams {
    const __half* x;
    const __half* y;  // second operand of binary operations
    __half* out;
    // Numbers of the result; for GEGLU and its gradient, pairs of value and gate
    uint64_t length;
    int32_t activation;
    int32_t channels;  // of GEGLU's result
};
LAYOUT(ElementParams, x, y, out, length, activation, channels)

// out = f(x, y). A thread takes eight numbers; the last ones of an odd length are done one by one.
template <bool BINARY, class F> __device__ __forceinline__ void map(const ElementParams& p, F f) {
    griddep_launch_dependents();
    griddep_wait();
    uint64_t i = (uint64_t(blockIdx.x) * 256 + threadIdx.x) * 8;
    if (i + 8 <= p.length) {
        float x[8], y[8] = {};
        unpack(load_halves<8>(p.x + i), x);
        if (BINARY) unpack(load_halves<8>(p.y + i), y);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = f(x[j], y[j]);
        store_halves(p.out + i, x);
    } else {
        for (; i < p.length; i++)
            p.out[i] = to_half(f(__half2float(p.x[i]), BINARY ? __half2float(p.y[i]) : 0.0f));
    }
}

KERNEL __launch_bounds__(256) activate(const __grid_constant__ ElementParams p) {
    map<false>(p, [&](float x, float) { return activation_of(x, p.activation); });
}
EXPORT(activate)

// y is the gradient by activation(x).
KERNEL __launch_bounds__(256) activate_gradient(const __grid_constant__ ElementParams p) {
    map<true>(p, [&](float x, float y) { return y * slope_of(x, p.activation); });
}
EXPORT(activate_gradient)

KERNEL __launch_bounds__(256) add(const __grid_constant__ ElementParams p) {
    map<true>(p, [](float x, float y) { return x + y; });
}
EXPORT(add)

__device__ __forceinline__ float mean(float x, float y) { return 0.5f * (x + y); }

// The mean of two halves of a batch: y is the second half, and vectors of it are aligned only if a half has a multiple
// of eight numbers.
KERNEL __launch_bounds__(256) mean_of_halves_8(const __grid_constant__ ElementParams p) {
    map<true>(p, [](float x, float y) { return mean(x, y); });
}
EXPORT(mean_of_halves_8)

KERNEL __launch_bounds__(256) mean_of_halves_1(const __grid_constant__ ElementParams p) {
    griddep_launch_dependents();
    griddep_wait();
    uint64_t i = uint64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i < p.length) p.out[i] = to_half(mean(__half2float(p.x[i]), __half2float(p.y[i])));
}
EXPORT(mean_of_halves_1)

// Where a thread's W pairs begin: a row of x holds `channels` values and then as many gates. Returns false beyond the
// last.
template <int W> __device__ __forceinline__ bool pair_place(const ElementParams& p, uint64_t& value, uint64_t& result) {
    result = (uint64_t(blockIdx.x) * 256 + threadIdx.x) * W;
    value = result + result / p.channels * p.channels;
    return result < p.length;
}

// out = value * gelu(gate).
template <int W> __device__ __forceinline__ void geglu(const ElementParams& p) {
    griddep_launch_dependents();
    griddep_wait();
    uint64_t value, result;
    if (!pair_place<W>(p, value, result)) return;
    float x[W], gate[W];
    unpack(load_halves<W>(p.x + value), x);
    unpack(load_halves<W>(p.x + value + p.channels), gate);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] *= gelu(gate[j]);
    store_halves(p.out + result, x);
}

// The gradient of GEGLU; y is the gradient by its result. out, like x, holds the gradients by the values and then those
// by the gates.
template <int W> __device__ __forceinline__ void geglu_gradient(const ElementParams& p) {
    griddep_launch_dependents();
    griddep_wait();
    uint64_t value, result;
    if (!pair_place<W>(p, value, result)) return;
    float x[W], gate[W], y[W];
    unpack(load_halves<W>(p.x + value), x);
    unpack(load_halves<W>(p.x + value + p.channels), gate);
    unpack(load_halves<W>(p.y + result), y);
    __half* out = p.out + value;
    // If this were unrolled, the compiler would split both stores into words.
#pragma unroll 1
    for (int gates = 0; gates < 2; gates++, out += p.channels) {
        float z[W];
#pragma unroll
        for (int j = 0; j < W; j++) z[j] = y[j] * (gates ? x[j] * slope_of(gate[j], GELU) : gelu(gate[j]));
        store_halves(out, z);
    }
}

// W divides the channels.
#define PAIRS(name, W) \
    KERNEL __launch_bounds__(256) name##_##W(const __grid_constant__ ElementParams p) { name<W>(p); } \
    EXPORT(name##_##W)
PAIRS(geglu, 8)
PAIRS(geglu, 1)
PAIRS(geglu_gradient, 8)
PAIRS(geglu_gradient, 1)

struct ResizeGradientParams {
    const __half* d;  // [images, from_height, from_width, channels]
    __half* out;      // [images, height, width, channels]
    int64_t pixels;   // of all images of the result
    int32_t from_height, from_width;
    int32_t height, width;
    int32_t channels;
    int32_t padding;
};
LAYOUT(ResizeGradientParams, d, out, pixels, from_height, from_width, height, width, channels, padding)

// The gradient of a nearest-neighbour resize: each pixel is the sum over the pixels that were copied from it; y was
// copied to the rows from ceil(y * from / to) on. One read of the larger image, one write of the smaller; a thread has
// W channels of a pixel.
template <int W> __device__ __forceinline__ void resize_gradient(const ResizeGradientParams& p) {
    griddep_launch_dependents();
    griddep_wait();
    int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    int columns = p.channels / W;
    int64_t pixel = i / columns;
    int channel = i % columns * W;
    if (pixel >= p.pixels) return;
    int x = pixel % p.width, y = pixel / p.width % p.height;
    const __half* image = p.d + pixel / (p.width * p.height) * p.from_height * p.from_width * p.channels + channel;
    auto first = [](int place, int from, int to) { return int((int64_t(place) * from + to - 1) / to); };
    float sum[W] = {};
    for (int fy = first(y, p.from_height, p.height); fy < first(y + 1, p.from_height, p.height); fy++) {
        for (int fx = first(x, p.from_width, p.width); fx < first(x + 1, p.from_width, p.width); fx++) {
            float d[W];
            unpack(load_halves<W>(image + (int64_t(fy) * p.from_width + fx) * p.channels), d);
#pragma unroll
            for (int j = 0; j < W; j++) sum[j] += d[j];
        }
    }
    store_halves(p.out + pixel * p.channels + channel, sum);
}

#define RESIZE_GRADIENT(W) \
    KERNEL __launch_bounds__(256) resize_gradient_##W(const __grid_constant__ ResizeGradientParams p) { \
        resize_gradient<W>(p); \
    } \
    EXPORT(resize_gradient_##W)
RESIZE_GRADIENT(8)
RESIZE_GRADIENT(1)

// The kernels below compute a network's first and last rows: kilobytes, so that the launch is all they cost. A thread
// has W channels of a row, and channels / W threads make up the row.
struct RowParams {
    const __half* x;
    const float* index;
    const __half* table;
    const __half* positions;
    const float* class_token;
    __half* out;
    int64_t rows;  // of the result
    int32_t tokens;  // per image: in the result for class_token, else in the input
    int32_t channels;
};
LAYOUT(RowParams, x, index, table, positions, class_token, out, rows, tokens, channels)

struct RowPlace {
    int64_t row;
    int channel;
};

// Returns false beyond the last row.
template <int W> __device__ __forceinline__ bool row_place(const RowParams& p, RowPlace& place) {
    int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    int columns = p.channels / W;
    place = {i / columns, int(i % columns) * W};
    return place.row < p.rows;
}

template <int W>
__device__ __forceinline__ void add_and_store(const RowParams& p, RowPlace at, float (&x)[W], int position) {
    float y[W];
    unpack(load_halves<W>(p.positions + int64_t(position) * p.channels + at.channel), y);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] += y[j];
    store_halves(p.out + at.row * p.channels + at.channel, x);
}

// out[row] = table[index[row]] + positions[place of the row in its image]. Indices are whole numbers inside the table.
template <int W> __device__ __forceinline__ void embed(const RowParams& p) {
    griddep_launch_dependents();
    griddep_wait();
    RowPlace at;
    if (!row_place<W>(p, at)) return;
    float x[W];
    unpack(load_halves<W>(p.table + int64_t(p.index[at.row]) * p.channels + at.channel), x);
    add_and_store(p, at, x, at.row % p.tokens);
}

// A learnt class token followed by the tokens of x, with positions added to all.
template <int W> __device__ __forceinline__ void class_token(const RowParams& p) {
    griddep_launch_dependents();
    griddep_wait();
    RowPlace at;
    if (!row_place<W>(p, at)) return;
    int64_t image = at.row / p.tokens;
    int token = at.row % p.tokens;
    float x[W];
    if (token == 0) {
#pragma unroll
        for (int j = 0; j < W; j++) x[j] = p.class_token[at.channel + j];
    } else {
        unpack(load_halves<W>(p.x + (at.row - image - 1) * p.channels + at.channel), x);
    }
    add_and_store(p, at, x, token);
}

// out[image] = x[image, index[image]].
template <int W> __device__ __forceinline__ void select_token(const RowParams& p) {
    griddep_launch_dependents();
    griddep_wait();
    RowPlace at;
    if (!row_place<W>(p, at)) return;
    float x[W];
    unpack(load_halves<W>(p.x + (at.row * p.tokens + int64_t(p.index[at.row])) * p.channels + at.channel), x);
    store_halves(p.out + at.row * p.channels + at.channel, x);
}

#define ROWS(name, W) \
    KERNEL __launch_bounds__(256) name##_##W(const __grid_constant__ RowParams p) { name<W>(p); } \
    EXPORT(name##_##W)
ROWS(embed, 8)
ROWS(embed, 1)
ROWS(class_token, 8)
ROWS(class_token, 1)
ROWS(select_token, 8)
ROWS(select_token, 1)

struct SinusoidParams {
    const float* x;
    __half* out;
    int64_t length;  // numbers of x
    int32_t dim;
    int32_t flip_sin_to_cos;
    float freq_shift;
    int32_t padding;
};
LAYOUT(SinusoidParams, x, out, length, dim, flip_sin_to_cos, freq_shift, padding)

// Sines and cosines of x at frequencies that fall from 1 to about 1e-4, one pair per thread. Computed in f64 as on the
// CPU, because angles are up to a thousand radians: the result is exact except for its rounding to fp16.
KERNEL __launch_bounds__(256) sinusoid(const __grid_constant__ SinusoidParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int half = p.dim / 2;
    int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    int64_t number = i / half;
    int k = i % half;
    if (number >= p.length) return;
    constexpr double LOG_10000 = 9.210340371976182736;
    double angle = p.x[number] * exp(-LOG_10000 * k / (half - double(p.freq_shift)));
    double s, c;
    sincos(angle, &s, &c);
    __half* out = p.out + number * p.dim + k;
    out[0] = to_half(float(p.flip_sin_to_cos ? c : s));
    out[half] = to_half(float(p.flip_sin_to_cos ? s : c));
}
EXPORT(sinusoid)
