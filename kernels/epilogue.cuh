// The epilogue of a matrix product: bias, per-image row, activation or gate, residual, scale, and RespoDiff's shift.
#pragma once
#include "numeric.cuh"

// out = scale * (activation(gain * sum + bias_gain * bias + per_image) + residual). With GEGLU, the columns of the
// product alternate between values and gates, and value * gelu(gate) takes the place of the activation. RELU follows
// the residual. Where a layer norm is folded into the weights, the T of the column is added to the sum first.
struct Epilogue {
    const float* bias;  // null if there is none, as are the other inputs below
    const float2* folded;  // S and T of each column of the product, see weights.cu
    const __half* per_image;  // one row per image, `per_image_width` apart
    const __half* residual;
    void* out;
    const __half* shift;  // added to images from `first_shifted` on; the sum is a second result
    __half* shifted;
    int32_t channels;  // of the result
    int32_t per_image_width;
    int32_t pixels;  // per image
    int32_t activation;
    int32_t full;  // 1 if the result is fp32
    int32_t first_shifted;
    float gain, bias_gain, scale;
    int32_t padding;
};
LAYOUT(Epilogue, bias, folded, per_image, residual, out, shift, shifted, channels, per_image_width, pixels, activation,
       full, first_shifted, gain, bias_gain, scale, padding)

PTX_FN void read8(const float* from, int count, bool aligned, float (&x)[8]) {
    if (aligned) {
        const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = i < count ? from[i] : 0.0f;
    }
}

PTX_FN void read8(const __half* from, int count, bool aligned, float (&x)[8]) {
    if (aligned) {
        unpack(*reinterpret_cast<const Half8*>(from), x);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = i < count ? __half2float(from[i]) : 0.0f;
    }
}

PTX_FN void write8(float* to, int count, bool aligned, const float (&x)[8]) {
    if (aligned) {
        *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
        *reinterpret_cast<float4*>(to + 4) = make_float4(x[4], x[5], x[6], x[7]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count) to[i] = x[i];
    }
}

PTX_FN void write8(__half* to, int count, bool aligned, const float (&x)[8]) {
    if (aligned) {
        *reinterpret_cast<Half8*>(to) = pack(x);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count) to[i] = to_half(x[i]);
    }
}

// Applies the epilogue to eight channels of one row of the result and stores them.
PTX_FN void finish(const Epilogue& e, float (&x)[8], float (&gate)[8], int row, int channel) {
    const bool gated = e.activation == GEGLU;
    const bool aligned = e.channels % 8 == 0;
    const int count = min(8, e.channels - channel);
    const int image = row / e.pixels;
    const size_t at = size_t(row) * e.channels + channel;
    float more[8];
    float bias[8] = {};
    if (e.folded) {
        const float2* folded = e.folded + (gated ? 2 * channel : channel);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i >= count) break;
            x[i] += folded[gated ? 2 * i : i].y;
            if (gated) gate[i] += folded[2 * i + 1].y;
        }
    }
    if (e.bias) read8(e.bias + channel, count, aligned, bias);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = fmaf(x[i], e.gain, e.bias_gain * bias[i]);
    if (e.per_image) {
        // The row may begin anywhere, since several layers share it.
        const __half* from = e.per_image + size_t(image) * e.per_image_width + channel;
        read8(from, count, aligned && uintptr_t(from) % 16 == 0, more);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += more[i];
    }
    if (gated) {
        if (e.bias) read8(e.bias + e.channels + channel, count, aligned, bias);
#pragma unroll
        for (int i = 0; i < 8; i++) gate[i] = fmaf(gate[i], e.gain, e.bias_gain * bias[i]);
    }
    if (e.activation != NONE && e.activation != RELU) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float y = activation_of(gated ? gate[i] : x[i], gated ? GELU : e.activation);
            x[i] = gated ? x[i] * y : y;
        }
    }
    if (e.residual) {
        read8(e.residual + at, count, aligned, more);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += more[i];
    }
    if (e.activation == RELU) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = relu(x[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= e.scale;
    if (e.full)
        write8(static_cast<float*>(e.out) + at, count, aligned, x);
    else
        write8(static_cast<__half*>(e.out) + at, count, aligned, x);
    if (e.shifted) {
        if (image >= e.first_shifted) {
            read8(e.shift + at - size_t(e.first_shifted) * e.pixels * e.channels, count, aligned, more);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] += more[i];
        }
        write8(e.shifted + at, count, aligned, x);
    }
}
