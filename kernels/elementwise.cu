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
