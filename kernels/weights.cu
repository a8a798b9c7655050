// Weights on their way from a checkpoint's file to the forms that the other kernels read. Every form is a strided copy
// of the file's tensor: a matrix [out, in, taps] becomes [out, taps, in], a mirrored one [in, taps reversed, out], and
// a gated one has its rows dealt to even and odd places. For a convolution of a doubled source, a tap is the sum of
// one, two or four of the file's. So one kernel does all of them, and src/cuda/weights.rs alone knows the forms.
//
// A block copies one line of the result: its threads take neighbouring numbers of it, 128 at a time.
//
// Memory: each number is read once (2 to 8 bytes) and written once (2 or 4). A 3x3 kernel's numbers are nine apart in
// the file, so that a line of it is fetched from L2 nine times; mirrored ones are rows apart, 32 bytes fetched for
// each.
// Bound: the copy to the device, some 25 to 50 GB/s, which runs before it in the stream; the kernel should take a tenth
// of that time, which no GPU has measured yet.
#include "numeric.cuh"

struct PackParams {
    // Numbers as the file has them.
    const unsigned char* from;
    // fp16, or fp32 if `full`.
    unsigned char* to;
    // Becomes 1 if a number is NaN or infinite.
    uint32_t* fault;
    // Numbers from one line (x), group of lines (y) and element (z) to the next, where they are read and where they go.
    int64_t from_line;
    int64_t from_group;
    int64_t from_element;
    int64_t to_line;
    int64_t to_group;
    int64_t to_element;
    // Elements of a line.
    int32_t length;
    // A Format.
    int32_t format;
    int32_t full;
    // Numbers that are added up, in rows and columns of a 3x3 kernel; 1 and 1 for a copy.
    int32_t down;
    int32_t across;
    int32_t padding;
};
LAYOUT(PackParams, from, to, fault, from_line, from_group, from_element, to_line, to_group, to_element, length, format,
       full, down, across, padding)

// weights::Format, in its order.
enum Format { F16, BF16, F32, F64 };

__device__ __forceinline__ float number_at(const unsigned char* from, int64_t index, int format) {
    switch (format) {
        case F16: return __half2float(reinterpret_cast<const __half*>(from)[index]);
        case BF16: return __uint_as_float(uint32_t(reinterpret_cast<const uint16_t*>(from)[index]) << 16);
        case F32: return reinterpret_cast<const float*>(from)[index];
        default: return float(reinterpret_cast<const double*>(from)[index]);
    }
}

KERNEL __launch_bounds__(128) pack_weights(const __grid_constant__ PackParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int64_t from = blockIdx.x * p.from_line + blockIdx.y * p.from_group;
    int64_t to = blockIdx.x * p.to_line + blockIdx.y * p.to_group;
    bool finite = true;
    for (int i = threadIdx.x; i < p.length; i += 128) {
        int64_t place = from + i * p.from_element;
        float x = number_at(p.from, place, p.format);
        for (int k = 1; k < p.down * p.across; k++)
            x += number_at(p.from, place + k / p.across * 3 + k % p.across, p.format);
        finite = finite && fabsf(x) < INFINITY;
        int64_t at = to + i * p.to_element;
        if (p.full) reinterpret_cast<float*>(p.to)[at] = x;
        else reinterpret_cast<__half*>(p.to)[at] = to_half(x);
    }
    // Whoever writes it writes the same.
    if (!finite) *p.fault = 1;
}
EXPORT(pack_weights)
