// One tiny kernel per wrapper of ptx.cuh, to test that it does what the PTX manual says, on a GPU as on the emulator.
//
// Registers and shared memory go in and out as raw words. Their meaning, the layouts of fragments and tiles, is known
// only to the test (tests/kernels/conformance), which derives it from the manual.
#include "conformance.cuh"

KERNEL conformance_shared(const __grid_constant__ ConformanceParams p) {
    uint32_t start = smem_u32(dyn_smem());
    p.out[threadIdx.x] = smem_u32(shared_words() + p.input[threadIdx.x]) - start;
    if (threadIdx.x == 0) p.out[32] = start % 1024;
}
EXPORT(conformance_shared)

KERNEL conformance_exp2_approx(const __grid_constant__ ConformanceParams p) {
    uint32_t i = blockIdx.x * 32 + threadIdx.x;
    p.out[i] = __float_as_int(exp2_approx(__int_as_float(p.input[i])));
}
EXPORT(conformance_exp2_approx)

KERNEL conformance_rcp_approx(const __grid_constant__ ConformanceParams p) {
    p.out[threadIdx.x] = __float_as_int(rcp_approx(__int_as_float(p.input[threadIdx.x])));
}
EXPORT(conformance_rcp_approx)

// Converts single numbers, then each number and its neighbour as a pair.
KERNEL conformance_to_half(const __grid_constant__ ConformanceParams p) {
    uint32_t lane = threadIdx.x;
    float x = __int_as_float(p.input[lane]), y = __int_as_float(p.input[lane ^ 1]);
    __half2 pair = to_halves(x, y);
    p.out[lane] = __half_as_ushort(to_half(x));
    p.out[32 + lane] = __half_as_ushort(pair.x) | uint32_t(__half_as_ushort(pair.y)) << 16;
}
EXPORT(conformance_to_half)

// Two groups of copies of N bytes per lane, the first with gaps; every lane reads what another lane copied.
template <int N, class Copy> __device__ __forceinline__ void copied(const ConformanceParams& p, Copy copy) {
    constexpr uint32_t WORDS = N / 4;
    uint32_t lane = threadIdx.x, other = shuffled(lane), tile = smem_u32(dyn_smem());
    for (uint32_t group = 0; group < 2; group++) {
        uint32_t word = (group * 32 + lane) * WORDS;
        copy(tile + word * 4, p.input + word, group == 1 || lane % 3 != 0);
        cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    for (uint32_t i = 0; i < WORDS; i++) p.out[lane * WORDS + i] = shared_words()[other * WORDS + i];
    cp_async_wait<0>();
    __syncthreads();
    for (uint32_t i = 0; i < WORDS; i++) p.out[(32 + lane) * WORDS + i] = shared_words()[(32 + other) * WORDS + i];
}
KERNEL conformance_cp_async4(const __grid_constant__ ConformanceParams p) {
    copied<4>(p, [](uint32_t to, const void* from, bool pred) { cp_async4(to, from, pred); });
}
EXPORT(conformance_cp_async4)
KERNEL conformance_cp_async8(const __grid_constant__ ConformanceParams p) {
    copied<8>(p, [](uint32_t to, const void* from, bool pred) { cp_async8(to, from, pred); });
}
EXPORT(conformance_cp_async8)
KERNEL conformance_cp_async16(const __grid_constant__ ConformanceParams p) {
    copied<16>(p, [](uint32_t to, const void* from, bool pred) { cp_async16(to, from, pred); });
}
EXPORT(conformance_cp_async16)

template <class Load> __device__ __forceinline__ void loaded(const ConformanceParams& p, Load load) {
    for (int i = 0; i < 4; i++) shared_words()[threadIdx.x * 4 + i] = p.input[threadIdx.x * 4 + i];
    __syncthreads();
    uint32_t r[4];
    load(r, smem_u32(dyn_smem()) + shuffled(threadIdx.x) * 16);
    for (int i = 0; i < 4; i++) p.out[threadIdx.x * 4 + i] = r[i];
}
KERNEL conformance_ldmatrix_x4(const __grid_constant__ ConformanceParams p) {
    loaded(p, [](uint32_t (&r)[4], uint32_t row) { ldmatrix_x4(r, row); });
}
EXPORT(conformance_ldmatrix_x4)
KERNEL conformance_ldmatrix_x4_trans(const __grid_constant__ ConformanceParams p) {
    loaded(p, [](uint32_t (&r)[4], uint32_t row) { ldmatrix_x4_trans(r, row); });
}
EXPORT(conformance_ldmatrix_x4_trans)

// Each lane's registers of A, then of B, then of D.
template <int MT, int NT>
__device__ __forceinline__ void load_fragments(const uint32_t* in, float (&d)[MT][NT][4], uint32_t (&a)[MT][4],
                                               uint32_t (&b)[NT][2]) {
    for (int i = 0; i < MT; i++)
        for (int k = 0; k < 4; k++) a[i][k] = *in++;
    for (int j = 0; j < NT; j++)
        for (int k = 0; k < 2; k++) b[j][k] = *in++;
    for (int i = 0; i < MT; i++)
        for (int j = 0; j < NT; j++)
            for (int k = 0; k < 4; k++) d[i][j][k] = __int_as_float(*in++);
}

KERNEL conformance_mma_m16n8k16(const __grid_constant__ ConformanceParams p) {
    float d[1][1][4];
    uint32_t a[1][4], b[1][2];
    load_fragments(p.input + threadIdx.x * 10, d, a, b);
    mma_m16n8k16(d[0][0], a[0], b[0]);
    for (int k = 0; k < 4; k++) p.out[threadIdx.x * 4 + k] = __float_as_int(d[0][0][k]);
}
EXPORT(conformance_mma_m16n8k16)

KERNEL conformance_mma_tile(const __grid_constant__ ConformanceParams p) {
    float d[2][3][4];
    uint32_t a[2][4], b[3][2];
    load_fragments(p.input + threadIdx.x * 38, d, a, b);
    mma_tile(d, a, b);
    for (int k = 0; k < 24; k++) p.out[threadIdx.x * 24 + k] = __float_as_int(d[k / 12][k / 4 % 3][k % 4]);
}
EXPORT(conformance_mma_tile)

// CUDA's own collectives, on whole warps and on segments of eight.
KERNEL conformance_shuffles(const __grid_constant__ ConformanceParams p) {
    constexpr uint32_t ALL = 0xffffffff;
    uint32_t lane = threadIdx.x, x = p.input[lane], source = p.input[32 + lane] % 32, odd = x & 1;
    uint32_t results[] = {
        __shfl_sync(ALL, x, source),    __shfl_sync(ALL, x, source, 8), __shfl_xor_sync(ALL, x, 5),
        __shfl_xor_sync(ALL, x, 3, 8),  __shfl_up_sync(ALL, x, 3),      __shfl_up_sync(ALL, x, 3, 8),
        __shfl_down_sync(ALL, x, 3),    __shfl_down_sync(ALL, x, 3, 8), __ballot_sync(ALL, odd),
        uint32_t(__any_sync(ALL, odd)), uint32_t(__all_sync(ALL, odd)), uint32_t(__all_sync(ALL, odd | 1)),
    };
    for (int i = 0; i < 12; i++) p.out[i * 32 + lane] = results[i];
}
EXPORT(conformance_shuffles)

// Two warps write, arrive and go on; two other warps wait for them.
KERNEL conformance_named_barriers(const __grid_constant__ ConformanceParams p) {
    uint32_t thread = threadIdx.x;
    if (thread < 64) {
        shared_words()[thread] = p.input[thread];
        named_bar_arrive(1, 128);
    } else {
        named_bar_sync(1, 128);
        p.out[thread - 64] = shared_words()[127 - thread];
    }
}
EXPORT(conformance_named_barriers)

// Transforms the 32 words that the launch before left, and leaves as many.
KERNEL conformance_griddep(const __grid_constant__ ConformanceParams p) {
    uint32_t lane = threadIdx.x, x = p.input[lane];
    griddep_launch_dependents();
    griddep_wait();
    uint32_t before = p.out[shuffled(lane)];
    __syncwarp();
    p.out[lane] = before * 5 + x;
}
EXPORT(conformance_griddep)
