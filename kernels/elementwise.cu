// Small operations: one read of each input and one write, memory bound.
#include "numeric.cuh"

struct ActivateParams {
    const __half* x;
    __half* out;
    uint64_t length;
    int32_t activation;
    int32_t unused;
};

// out = activation(x). A thread takes eight numbers; the last ones of an odd length one by one.
KERNEL __launch_bounds__(256) activate(const __grid_constant__ ActivateParams p) {
    uint64_t i = (uint64_t(blockIdx.x) * 256 + threadIdx.x) * 8;
    if (i + 8 <= p.length) {
        float x[8];
        unpack(*reinterpret_cast<const Half8*>(p.x + i), x);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = activation_of(x[j], p.activation);
        *reinterpret_cast<Half8*>(p.out + i) = pack(x);
    } else {
        for (; i < p.length; i++) p.out[i] = to_half(activation_of(__half2float(p.x[i]), p.activation));
    }
}
EXPORT(activate)

// The kernels below are a network's first and last rows: kilobytes, so that a launch is all they cost. A thread has W
// channels of a row; `columns` of them make the row.
struct RowParams {
    const __half* x;
    const float* index;
    const __half* table;
    const __half* positions;
    const float* class_token;
    __half* out;
    int64_t rows;  // of the result
    int32_t tokens;  // of an image, in the result for class_token, else in the input
    int32_t channels;
};

struct RowPlace {
    int64_t row;
    int channel;
};

// False past the last row.
template <int W> __device__ __forceinline__ bool row_place(const RowParams& p, RowPlace& place) {
    int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    int columns = p.channels / W;
    place = {i / columns, int(i % columns) * W};
    return place.row < p.rows;
}

template <int W> __device__ __forceinline__ void add_and_store(const RowParams& p, RowPlace at, float (&x)[W], int position) {
    float y[W];
    load_halves(p.positions + int64_t(position) * p.channels + at.channel, y);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] += y[j];
    store_halves(p.out + at.row * p.channels + at.channel, x);
}

// out[row] = table[index[row]] + positions[row's place in its image]. Indices are whole and inside the table.
template <int W> __device__ __forceinline__ void embed(const RowParams& p) {
    RowPlace at;
    if (!row_place<W>(p, at)) return;
    float x[W];
    load_halves(p.table + int64_t(p.index[at.row]) * p.channels + at.channel, x);
    add_and_store(p, at, x, at.row % p.tokens);
}

// A learnt token, then those of x; positions added to all.
template <int W> __device__ __forceinline__ void class_token(const RowParams& p) {
    RowPlace at;
    if (!row_place<W>(p, at)) return;
    int64_t image = at.row / p.tokens;
    int token = at.row % p.tokens;
    float x[W];
    if (token == 0) {
#pragma unroll
        for (int j = 0; j < W; j++) x[j] = p.class_token[at.channel + j];
    } else {
        load_halves(p.x + (at.row - image - 1) * p.channels + at.channel, x);
    }
    add_and_store(p, at, x, token);
}

// out[image] = x[image, index[image]].
template <int W> __device__ __forceinline__ void select_token(const RowParams& p) {
    RowPlace at;
    if (!row_place<W>(p, at)) return;
    float x[W];
    load_halves(p.x + (at.row * p.tokens + int64_t(p.index[at.row])) * p.channels + at.channel, x);
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
    int32_t unused;
};

// Sines and cosines of x at frequencies that fall from 1 to about 1e-4, a thread a pair. In f64 as on the CPU, angles being
// up to a thousand radians: the result is exact but for its rounding to fp16.
KERNEL __launch_bounds__(256) sinusoid(const __grid_constant__ SinusoidParams p) {
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
