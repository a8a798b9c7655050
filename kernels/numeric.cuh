// Vectors of eight halves, activation functions, and sums over a warp.
#pragma once
#include "ptx.cuh"

// 16 bytes, the unit that a thread moves at a time. It is copied as one word, because the compiler would make four
// loads of a copy pair by pair.
union __align__(16) Half8 {
    uint4 word;
    __half2 pairs[4];

    __device__ __forceinline__ Half8() {}
    __device__ __forceinline__ Half8(const Half8& v) : word(v.word) {}
    __device__ __forceinline__ Half8& operator=(const Half8& v) {
        word = v.word;
        return *this;
    }
};

// Reinterprets two halves as one register, and back.
PTX_FN uint32_t bits_of(__half2 pair) {
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

PTX_FN __half2 pair_of(uint32_t bits) {
    __half2 pair;
    memcpy(&pair, &bits, 4);
    return pair;
}

__device__ __forceinline__ void unpack(Half8 v, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 f = __half22float2(v.pairs[i]);
        x[2 * i] = f.x;
        x[2 * i + 1] = f.y;
    }
}

__device__ __forceinline__ Half8 pack(const float (&x)[8]) {
    Half8 v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.pairs[i] = to_halves(x[2 * i], x[2 * i + 1]);
    return v;
}

__device__ __forceinline__ void unpack(__half v, float (&x)[1]) { x[0] = __half2float(v); }

// W consecutive halves in memory. W is 8 (aligned to 16 bytes) or 1: the vector path and the scalar path of the same
// kernel.
template <int W> struct HalvesOf;
template <> struct HalvesOf<8> { using Type = Half8; };
template <> struct HalvesOf<1> { using Type = __half; };
template <int W> using Halves = typename HalvesOf<W>::Type;

template <int W> __device__ __forceinline__ Halves<W> load_halves(const __half* from) {
    return *reinterpret_cast<const Halves<W>*>(from);
}

template <int W> __device__ __forceinline__ void store_halves(__half* to, const float (&x)[W]) {
    if constexpr (W == 8) *reinterpret_cast<Half8*>(to) = pack(x);
    else *to = to_half(x[0]);
}

// Loads W floats, likewise.
template <int W> __device__ __forceinline__ void load_floats(const float* from, float (&x)[W]) {
    if constexpr (W == 8) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float4 v = reinterpret_cast<const float4*>(from)[i];
            x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
        }
    } else {
        x[0] = from[0];
    }
}

// By the approximations of one instruction each: __expf and __fdividef would add eight that handle subnormal numbers,
// and epilogues consist of code that is executed once, so that their time is that of fetching it. The sigmoid is 0
// where e^-x exceeds 2^126, that is for x below about -87; there it is 0 in fp16 as well.
__device__ __forceinline__ float sigmoid(float x) { return rcp_approx(1.0f + exp2_approx(-1.44269504f * x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// The upper tail probability of the standard normal distribution, P(X > x) = erfc(x / sqrt 2) / 2, for x >= 0. It is a
// polynomial in 1 / (1 + 0.36 x) times e^(-x^2 / 2), of the form of Abramowitz and Stegun's 7.1.26; the coefficients
// were fitted for the least relative error up to x = 6. That error is 8.6e-6, a fiftieth of fp16's rounding. erff would
// take twice as many instructions.
__device__ __forceinline__ float normal_tail(float x) {
    float t = rcp_approx(fmaf(0.36f, x, 1.0f));
    float sum = fmaf(-0.096583882f, t, 0.24767736f);
    sum = fmaf(sum, t, 0.044021903f), sum = fmaf(sum, t, 0.16307065f), sum = fmaf(sum, t, 0.14180967f);
    return sum * t * exp2_approx(-0.72134752f * x * x);
}
// x times P(X < x). The second term makes NaN stay NaN.
__device__ __forceinline__ float gelu(float x) { return fmaxf(x, 0.0f) - fabsf(x) * normal_tail(fabsf(x)); }
__device__ __forceinline__ float quick_gelu(float x) { return x * sigmoid(1.702f * x); }
// NaN does not compare less, so it is kept.
__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }

// graph::Activation, in its order.
enum Activation { NONE, SILU, GELU, QUICK_GELU, GEGLU, RELU, SOFT_CLAMP, TO_UNIT, FROM_UNIT };

__device__ __forceinline__ float activation_of(float x, int activation) {
    switch (activation) {
        case SILU: return silu(x);
        case GELU: return gelu(x);
        case QUICK_GELU: return quick_gelu(x);
        case RELU: return relu(x);
        case SOFT_CLAMP: return fmaf(6.0f, sigmoid(x * (2.0f / 3.0f)), -3.0f);
        case TO_UNIT: return fmaf(0.5f, x, 0.5f);
        case FROM_UNIT: return fmaf(2.0f, x, -1.0f);
        default: return x;
    }
}

// The derivative of activation_of.
__device__ __forceinline__ float slope_of(float x, int activation) {
    // The derivative of x * sigmoid(a * x).
    auto gated = [](float a, float x) {
        float s = sigmoid(a * x);
        return s * (1.0f + a * x * (1.0f - s));
    };
    switch (activation) {
        case SILU: return gated(1.0f, x);
        case QUICK_GELU: return gated(1.702f, x);
        case GELU: {
            float tail = normal_tail(fabsf(x));
            return (x > 0.0f ? 1.0f - tail : tail) + x * 0.39894228040143268f * __expf(-0.5f * x * x);
        }
        case RELU: return x > 0.0f ? 1.0f : relu(x);
        case SOFT_CLAMP: {
            float s = sigmoid(x * (2.0f / 3.0f));
            return 4.0f * s * (1.0f - s);
        }
        case TO_UNIT: return 0.5f;
        case FROM_UNIT: return 2.0f;
        default: return 1.0f;
    }
}

// The sum over each LANES adjacent lanes of a warp, all of whose lanes must call it.
template <int LANES> __device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
__device__ __forceinline__ float warp_sum(float x) { return lanes_sum<32>(x); }
