// Packs weights from the form in which a checkpoint's file has them into the forms that the other kernels read. Every
// form is a strided copy of the file's tensor: a matrix [out, in, taps] becomes [out, taps, in], a mirrored one [in,
// taps reversed, out], and the rows of a gated one are interleaved, values on even and gates on odd places. For a
// convolution of an upsampled source, a tap is the sum of one, two or four taps of the file. So one kernel does all of
// them, and src/cuda/weights alone knows the forms.
//
// A block copies one line of the result: its threads take adjacent numbers of it, 128 at a time.
//
// Where a matrix W multiplies a layer norm's result, the norm's scale and shift are folded into it. Its numbers become
// W' = fp16(scale[k] W[c][k]), and for each column c the block accumulates S[c] = sum of W'[c][k], over the rounded
// numbers, and T[c] = sum of shift[k] W[c][k]. Then W (scale (x - mean) / deviation + shift) = (W' x - mean S) /
// deviation + T. A file that holds the matrix transposed is packed in pieces of inputs, whose sums accumulate from
// launch to launch.
//
// Memory traffic: each number is read once (1 to 8 bytes) and written once (2 or 4). The numbers of a 3x3 kernel's line
// are nine apart in the file, so a line of it is fetched from L2 nine times; those of mirrored kernels are rows apart,
// and 32 bytes are fetched for each number.
//
// Bound: the copy to the device, some 25 to 50 GB/s, which runs before it in the stream; the kernel should take a tenth
// of that time, which no GPU has measured yet.
#include "numeric.cuh"

struct PackParams {
    // Numbers as in the file.
    const unsigned char* from;
    // fp16, or fp32 if `full`.
    unsigned char* to;
    // Set to 1 if a number is NaN or infinite.
    uint32_t* fault;
    // Scale of the norm that is folded into the matrix, from the first number's input on; or null.
    const float* norm_scale;
    // Shift likewise, and S and T of the first line's column; null if the sums are not wanted.
    const float* norm_shift;
    float2* sums;
    // Strides in numbers from one line (x), group of lines (y) and element (z) to the next, in the source and in the
    // destination.
    int64_t from_line;
    int64_t from_group;
    int64_t from_element;
    int64_t to_line;
    int64_t to_group;
    int64_t to_element;
    // Elements per line.
    int32_t length;
    // A Format.
    int32_t format;
    int32_t full;
    // Taps that are summed, in rows and columns of a 3x3 kernel; 1 and 1 for a copy.
    int32_t down;
    int32_t across;
    // True if a line's elements are inputs, false if the lines are; and columns from one line to the next.
    int32_t inputs_across;
    int32_t column_line;
    // Multiplies every number of the file.
    float scale;
};
LAYOUT(PackParams, from, to, fault, norm_scale, norm_shift, sums, from_line, from_group, from_element, to_line,
       to_group, to_element, length, format, full, down, across, inputs_across, column_line, scale)

// weights::Format, in its order.
enum Format { F16, BF16, F32, F64, F8_E4M3, F8_E5M2 };

// Four bits of exponent with a bias of 7 and three of mantissa; no infinities, and NaN if all of them are set.
__device__ __forceinline__ float from_e4m3(uint32_t byte) {
    uint32_t sign = (byte & 0x80) << 24, exponent = byte >> 3 & 15, mantissa = byte & 7;
    if ((byte & 0x7f) == 0x7f) return __uint_as_float(sign | 0x7fc00000);
    float x = exponent ? __uint_as_float((exponent + 120) << 23 | mantissa << 20) : float(mantissa) / 512;
    return sign ? -x : x;
}

__device__ __forceinline__ float number_at(const unsigned char* from, int64_t index, int format) {
    switch (format) {
        case F16: return __half2float(reinterpret_cast<const __half*>(from)[index]);
        case BF16: return __uint_as_float(uint32_t(reinterpret_cast<const uint16_t*>(from)[index]) << 16);
        case F32: return reinterpret_cast<const float*>(from)[index];
        case F8_E4M3: return from_e4m3(from[index]);
        // The upper half of a number in fp16.
        case F8_E5M2: return __half2float(__ushort_as_half(uint16_t(from[index]) << 8));
        default: return float(reinterpret_cast<const double*>(from)[index]);
    }
}

// Adds the threads' partial sums of S and T to those of the line's column.
__device__ __forceinline__ void add_sums(const PackParams& p, float2 sums) {
    float2* by_warp = reinterpret_cast<float2*>(dyn_smem());
    sums = make_float2(warp_sum(sums.x), warp_sum(sums.y));
    if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = sums;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < 4; warp++) sums.x += by_warp[warp].x, sums.y += by_warp[warp].y;
    float2* column = p.sums + int64_t(blockIdx.x) * p.column_line;
    *column = make_float2(column->x + sums.x, column->y + sums.y);
}

KERNEL __launch_bounds__(128) pack_weights(const __grid_constant__ PackParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int64_t from = blockIdx.x * p.from_line + blockIdx.y * p.from_group;
    int64_t to = blockIdx.x * p.to_line + blockIdx.y * p.to_group;
    bool finite = true;
    float2 sums = {};
    for (int i = threadIdx.x; i < p.length; i += 128) {
        int64_t place = from + i * p.from_element;
        float x = __fmul_rn(number_at(p.from, place, p.format), p.scale);
        for (int k = 1; k < p.down * p.across; k++)
            x += __fmul_rn(number_at(p.from, place + k / p.across * 3 + k % p.across, p.format), p.scale);
        finite = finite && fabsf(x) < INFINITY;
        if (p.norm_scale) {
            int64_t input = p.inputs_across ? i : int64_t(blockIdx.x);
            if (p.sums) sums.y = fmaf(x, p.norm_shift[input], sums.y);
            x *= p.norm_scale[input];
            sums.x += __half2float(to_half(x));
        }
        int64_t at = to + i * p.to_element;
        if (p.full) reinterpret_cast<float*>(p.to)[at] = x;
        else reinterpret_cast<__half*>(p.to)[at] = to_half(x);
    }
    // Every thread that writes it writes the same value.
    if (!finite) *p.fault = 1;
    if (p.sums) add_sums(p, sums);
}
EXPORT(pack_weights)
