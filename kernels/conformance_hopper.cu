// One tiny kernel per wrapper of ptx_hopper.cuh; see conformance.cu. For sm_90a, and empty for other architectures.
#include "conformance.cuh"

template <class Store> __device__ __forceinline__ void stored(const ConformanceParams& p, Store store) {
    uint32_t r[4];
    for (int i = 0; i < 4; i++) r[i] = p.input[threadIdx.x * 4 + i];
    store(smem_u32(dyn_smem()) + shuffled(threadIdx.x) * 16, r);
    __syncthreads();
    for (int i = 0; i < 4; i++) p.out[threadIdx.x * 4 + i] = shared_words()[threadIdx.x * 4 + i];
}
KERNEL conformance_stmatrix_x4(const __grid_constant__ ConformanceParams p) {
#ifdef PTX_HOPPER
    stored(p, [](uint32_t row, const uint32_t (&r)[4]) { stmatrix_x4(row, r); });
#endif
}
EXPORT(conformance_stmatrix_x4)
KERNEL conformance_stmatrix_x4_trans(const __grid_constant__ ConformanceParams p) {
#ifdef PTX_HOPPER
    stored(p, [](uint32_t row, const uint32_t (&r)[4]) { stmatrix_x4_trans(row, r); });
#endif
}
EXPORT(conformance_stmatrix_x4_trans)

// Two warps fill a buffer of 64 words three times; a third one empties it.
KERNEL conformance_mbarriers(const __grid_constant__ ConformanceParams p) {
#ifdef PTX_HOPPER
    uint32_t full = smem_u32(dyn_smem()) + 256, empty = full + 8, thread = threadIdx.x;
    if (thread == 0) {
        mbar_init(full, 64);
        mbar_init(empty, 32);
        fence_mbar_init();
    }
    __syncthreads();
    for (uint32_t round = 0; round < 3; round++) {
        if (thread < 64) {
            mbar_wait(empty, (round + 1) % 2);
            shared_words()[thread] = p.input[round * 64 + thread];
            mbar_arrive(full);
        } else {
            mbar_wait(full, round % 2);
            for (uint32_t i = thread - 64; i < 64; i += 32) p.out[round * 64 + i] = shared_words()[63 - i];
            mbar_arrive(empty);
        }
    }
#endif
}
EXPORT(conformance_mbarriers)

struct TmaParams {
    CUtensorMap map;
    // A tile's bytes in the layout of shared memory.
    uint32_t* tile;
    uint32_t words;
    int32_t x[4];
    // Pads to a multiple of the map's alignment.
    int32_t padding[25];
};
LAYOUT(TmaParams, map, tile, words, x, padding)

template <class Load> __device__ __forceinline__ void tile_loaded(const TmaParams& p, Load load) {
#ifdef PTX_HOPPER
    uint32_t tile = smem_u32(dyn_smem()), barrier = tile + p.words * 4;
    if (threadIdx.x == 0) {
        mbar_init(barrier, 1);
        fence_mbar_init();
        mbar_expect_tx(barrier, p.words * 4);
        load(tile, barrier);
    }
    __syncthreads();
    mbar_wait(barrier, 0);
    for (uint32_t i = threadIdx.x; i < p.words; i += 32) p.tile[i] = shared_words()[i];
#endif
}
KERNEL conformance_tma_load_2d(const __grid_constant__ TmaParams p) {
    tile_loaded(p, [&](uint32_t to, uint32_t barrier) { HOPPER(tma_load_2d(to, &p.map, barrier, p.x[0], p.x[1])); });
}
EXPORT(conformance_tma_load_2d)
KERNEL conformance_tma_load_3d(const __grid_constant__ TmaParams p) {
    tile_loaded(p, [&](uint32_t to, uint32_t barrier) {
        HOPPER(tma_load_3d(to, &p.map, barrier, p.x[0], p.x[1], p.x[2]));
    });
}
EXPORT(conformance_tma_load_3d)
KERNEL conformance_tma_load_4d(const __grid_constant__ TmaParams p) {
    tile_loaded(p, [&](uint32_t to, uint32_t barrier) {
        HOPPER(tma_load_4d(to, &p.map, barrier, p.x[0], p.x[1], p.x[2], p.x[3]));
    });
}
EXPORT(conformance_tma_load_4d)

template <class Store> __device__ __forceinline__ void tile_stored(const TmaParams& p, Store store) {
#ifdef PTX_HOPPER
    for (uint32_t i = threadIdx.x; i < p.words; i += 32) shared_words()[i] = p.tile[i];
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        store(smem_u32(dyn_smem()));
        tma_store_commit();
        tma_store_wait<0>();
    }
#endif
}
KERNEL conformance_tma_store_2d(const __grid_constant__ TmaParams p) {
    tile_stored(p, [&](uint32_t from) { HOPPER(tma_store_2d(&p.map, from, p.x[0], p.x[1])); });
}
EXPORT(conformance_tma_store_2d)
KERNEL conformance_tma_store_4d(const __grid_constant__ TmaParams p) {
    tile_stored(p, [&](uint32_t from) { HOPPER(tma_store_4d(&p.map, from, p.x[0], p.x[1], p.x[2], p.x[3])); });
}
EXPORT(conformance_tma_store_4d)

// Position of a tile, for a descriptor, and the bytes from its first step of 16 k to the second.
struct Tile {
    uint32_t swizzle, start, leading, stride, step;
};
LAYOUT(Tile, swizzle, start, leading, stride, step)

struct WgmmaParams {
    // The contents of shared memory.
    const uint32_t* shared;
    // Registers of A, [thread][step][4].
    const uint32_t* a;
    // Registers of D, [thread][N / 2]: before and after.
    float* d;
    uint32_t words, scale_d;
    Tile of_a, of_b;
};
LAYOUT(WgmmaParams, shared, a, d, words, scale_d, of_a, of_b)

// Two steps of 16 k: D = A * B, plus the previous D in the first one if scale_d says so.
template <int N, class Multiply> __device__ __forceinline__ void multiplied(const WgmmaParams& p, Multiply multiply) {
#ifdef PTX_HOPPER
    uint32_t thread = threadIdx.x, start = smem_u32(dyn_smem());
    for (uint32_t i = thread; i < p.words; i += 128) shared_words()[i] = p.shared[i];
    float d[N / 2];
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[i] = p.d[thread * (N / 2) + i];
#pragma unroll
    for (int i = 0; i < 8; i++) a[i / 4][i % 4] = p.a[thread * 8 + i];
    auto descriptor = [&](const Tile& tile, uint32_t step) {
        return wg_desc(Swizzle(tile.swizzle), start + tile.start + step * tile.step, tile.leading, tile.stride);
    };
    fence_proxy_async();
    __syncthreads();
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 2; step++)
        multiply(d, a[step], descriptor(p.of_a, step), descriptor(p.of_b, step), step == 0 ? p.scale_d : 1);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < N / 2; i++) p.d[thread * (N / 2) + i] = d[i];
#endif
}

// A in shared memory and, as _rs, in registers.
#define WGMMA(N, TB) \
    KERNEL __launch_bounds__(128) conformance_wgmma_m64n##N##k16_tb##TB(const __grid_constant__ WgmmaParams p) { \
        multiplied<N>(p, [](float (&d)[N / 2], const uint32_t (&)[4], uint64_t of_a, uint64_t of_b, int scale_d) { \
            HOPPER(wgmma_m64n##N##k16<TB>(d, of_a, of_b, scale_d)); \
        }); \
    } \
    EXPORT(conformance_wgmma_m64n##N##k16_tb##TB) \
    KERNEL __launch_bounds__(128) conformance_wgmma_m64n##N##k16_rs_tb##TB(const __grid_constant__ WgmmaParams p) { \
        multiplied<N>(p, [](float (&d)[N / 2], const uint32_t (&a)[4], uint64_t, uint64_t of_b, int scale_d) { \
            HOPPER(wgmma_m64n##N##k16_rs<TB>(d, a, of_b, scale_d)); \
        }); \
    } \
    EXPORT(conformance_wgmma_m64n##N##k16_rs_tb##TB)
WGMMA(32, 0)
WGMMA(32, 1)
WGMMA(40, 0)
WGMMA(40, 1)
WGMMA(64, 0)
WGMMA(64, 1)
WGMMA(80, 0)
WGMMA(80, 1)
WGMMA(128, 0)
WGMMA(128, 1)
WGMMA(160, 0)
WGMMA(160, 1)
WGMMA(256, 0)
WGMMA(256, 1)

// One warpgroup releases registers and two take them; their contents are preserved.
KERNEL __launch_bounds__(384, 1) conformance_setmaxnreg(const __grid_constant__ ConformanceParams p) {
#ifdef PTX_HOPPER
    uint32_t x = p.input[threadIdx.x];
    if (threadIdx.x < 128) {
        reg_dec<40>();
        p.out[threadIdx.x] = x + 1;
    } else {
        reg_inc<232>();
        p.out[threadIdx.x] = x + 2;
    }
#endif
}
EXPORT(conformance_setmaxnreg)
