// Small kernels, each correct with fault 0 and with one fault planted for every other number. The tests expect the
// emulator to report each of them.
#include "ptx.cuh"

struct FaultParams {
    const __half* in;
    float* out;
    uint32_t length;    // of `in`; `out` has one number per thread of the grid
    int32_t fault;
};

#define HERE __FILE__, __LINE__

// ---- reduce: out[thread] = sum of in[0..length] + sum of squares, the same in each thread; 128 threads ----

static float block_sum(float x, float* partial, int fault) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (lane == 0) partial[warp] = x;
    if (fault != 1) __syncthreads();                                // 1: partial sums are read before they are written
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += partial[i];
    if (fault != 2) __syncthreads();                                // 2: they are overwritten while others still read
    return sum;
}

struct Block32 {
    uint64_t words[4];
};

KERNEL reduce(const __grid_constant__ FaultParams p) {
    float* partial = (float*)dyn_smem();
    int thread = threadIdx.x, f = p.fault;
    float sum = 0, squares = 0;
    for (uint32_t i = thread; i < p.length + (f == 3); i += 128) {  // 3: one element too many
        float x = __half2float(p.in[i]);
        sum += x;
        squares += x * x;
    }
    sum = block_sum(sum, partial, f);
    squares = block_sum(squares, partial, f);
    if (f == 4 && thread == 7) p.out[gridDim.x * 128] = 1;          // 4: write past the end
    if (f == 5 && thread == 7) partial[4] = 1;                      // 5: past the end of shared memory
    if (f == 6 && thread % 32 < 16) sum += __shfl_xor_sync(0xffffffffu, sum, 1);    // 6: full mask, half a warp
    if (f == 7 && thread < 32) __syncthreads();                     // 7: a barrier for one warp only
    if (f == 8) {                                                   // 8: one barrier in two places
        if (thread < 64) __syncthreads();
        else __syncthreads();
    }
    if (f == 9) squares += ((const float4*)(p.in + 4))->x * 0;      // 9: misaligned 16 bytes, one number used
    if (f == 10) *(Block32*)p.out = *(const Block32*)(p.in + p.length - 8);         // 10: structure beyond the end
    if (f == 11) memcpy(p.out, p.in + p.length - 8, 18 + 0 * thread);               // 11: memcpy beyond the end
    if (f == 12 && thread == 3) *(float*)nullptr = 1;               // 12: null pointer
    if (f == 13) sum += __shfl_sync(1u << (thread + 1) % 32, sum, 0);               // 13: lane not in its own mask
    if (f == 14) named_bar_sync(1, thread < 64 ? 128 : 64);         // 14: two different counts
    if (f == 15) ((uint16_t*)p.in)[p.length] = 0;                   // 15: write past the end of the input
    if (f == 16 && thread < 96) named_bar_sync(2, 128);             // 16: one warp never arrives
    if (f == 17) __ballot_sync(thread % 2 ? 0xffffffffu : 0x55555555u, 1);          // 17: overlapping masks
    if (f == 18) sum += __shfl_sync(0xffffffffu, sum, 0, 12);       // 18: width is not a power of two
    if (f == 19) partial[thread % 2] = sum;                         // 19: all threads write the same word
    if (f == 20) p.out[-1 - (int)gridDim.x * 128] = 0;              // 20: before the beginning
    p.out[blockIdx.x * 128 + thread] = sum + squares;
}
EXPORT(reduce)

// ---- exchange: a warp reverses 32 numbers in shared memory; 32 threads ----

KERNEL exchange(const __grid_constant__ FaultParams p) {
    float* numbers = (float*)dyn_smem();
    int lane = threadIdx.x;
    numbers[lane] = __half2float(p.in[lane]);
    if (p.fault != 1) __syncwarp();                                 // 1: lanes are not ordered by themselves
    p.out[lane] = numbers[31 - lane];
}
EXPORT(exchange)

// ---- stream: out[thread] = sum over tiles of in[tile * 1024 + ...]: 128 threads, two stages of cp.async ----

KERNEL stream(const __grid_constant__ FaultParams p) {
    unsigned char* shared = dyn_smem();
    int thread = threadIdx.x, f = p.fault, tiles = p.length / 1024;
    auto fetch = [&](int tile) {
        uint32_t to = smem_u32(shared) + (tile & 1) * 2048 + thread * 16;
        const __half* from = p.in + tile * 1024 + thread * 8;
        if (f == 5) to += 8;                                        // 5: misaligned destination
        if (f == 6) from += p.length;                               // 6: read past the end
        if (f == 7) to += 4096;                                     // 7: past the end of shared memory
        if (f == 9) emu::cp_async(to, from + 1, 16, 16, HERE);      // 9: misaligned source
        else cp_async16(to, from, true);
    };
    fetch(0);
    cp_async_commit();
    float sum = 0;
    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) fetch(tile + 1);
        if (f != 8) cp_async_commit();                              // 8: no commit closes the group
        if (f == 2) cp_async_wait<2>();                             // 2: one group too many stays in flight
        else if (f != 1) cp_async_wait<1>();                        // 1: no wait
        if (f != 3) __syncthreads();                                // 3: other threads' copies are not waited for
        const __half* numbers = (const __half*)(shared + (tile & 1) * 2048);
        for (int i = 0; i < 8; i++) sum += __half2float(numbers[i * 128 + (thread + 1) % 128]);
        if (f != 4) __syncthreads();                                // 4: the next copy overwrites what is being read
    }
    if (f == 10) fetch(0);                                          // 10: the last copy is not waited for
    p.out[thread] = sum;
}
EXPORT(stream)

// ---- narrow: cp.async of 4 and 8 bytes, ldmatrix and stmatrix of each count; 32 threads ----
// 32 rows of 16 bytes: the first 16 pass through matrices and are transposed twice, the others become the first 16
// reversed.

KERNEL narrow(const __grid_constant__ FaultParams p) {
    unsigned char* shared = dyn_smem();
    uint32_t s = smem_u32(shared);
    int lane = threadIdx.x;
    for (int i = 0; i < 2; i++) {
        emu::cp_async(s + lane * 16 + i * 4, p.in + lane * 8 + i * 2, 4, 4, HERE);
        emu::cp_async(s + lane * 16 + 8, p.in + lane * 8 + 4, 8, 8, HERE);
    }
    cp_async_commit();
    cp_async_wait<0>();
    if (p.fault != 1) __syncwarp();                                 // 1: rows of other lanes
    uint32_t r[4], t[2];
    emu::ldmatrix(r, 4, false, s + (31 - lane) * 16, HERE);
    emu::ldmatrix(t, 2, true, s + lane % 16 * 16, HERE);
    if (p.fault == 2) emu::ldmatrix(r, 1, false, s + lane * 8, HERE);               // 2: rows at multiples of 8
    if (p.fault == 3 && lane < 16) emu::ldmatrix(r, 1, false, s, HERE);             // 3: half a warp
    __syncwarp();
    emu::stmatrix(s + lane % 16 * 16, t, 2, true, HERE);
    emu::stmatrix(s + 256 + lane % 16 * 16, r + 2, 2, false, HERE);
    if (p.fault != 4) __syncwarp();                                 // 4: read before all is stored
    const __half* out = (const __half*)(shared + (31 - lane) * 16);
    float sum = 0;
    for (int i = 0; i < 8; i++) sum += (i + 1) * __half2float(out[i]);
    p.out[lane] = sum;
}
EXPORT(narrow)

// ---- product: out[64][8 n] = sum over tiles of A[64][64 tiles] B[8n..][64 tiles]^T: TMA, mbarriers, wgmma ----
// Warpgroup 0 fetches, warpgroup 1 multiplies; a ring of two slots, tiles of 64 channels with the 128-byte swizzle.

struct ProductParams {
    CUtensorMap a, b;
    float* out;
    int32_t tiles, fault;
};

KERNEL product(const __grid_constant__ ProductParams p) {
    constexpr uint32_t A = 64 * 128, B = 128 * 128, SLOT = A + B;
    uint32_t s = smem_u32(dyn_smem()), full = s + 2 * SLOT, empty = full + 16;
    int thread = threadIdx.x, f = p.fault;
    if (thread == 0) {
        for (int i = 0; i < 2; i++) {
            if (f != 9) mbar_init(full + i * 8, 1);                 // 9: never initialised
            mbar_init(empty + i * 8, 1);
        }
        if (f == 8) mbar_init(full, 1);                             // 8: initialised twice
        fence_mbar_init();
    }
    if (f != 7) __syncthreads();                                    // 7: used before the initialisation is visible
    if (f == 12 && thread == 9) *(uint64_t*)(dyn_smem() + 2 * SLOT) = 0;            // 12: a barrier is overwritten
    if (thread < 128) {
        for (int tile = 0; thread == 0 && tile < p.tiles; tile++) {
            int slot = tile % 2;
            if (f != 2) mbar_wait(empty + slot * 8, (tile / 2 & 1) ^ 1);            // 2: the slot may be in use
            mbar_expect_tx(full + slot * 8, f == 3 ? SLOT + 16 : f == 4 ? SLOT - 16 : SLOT);    // 3, 4: wrong bytes
            if (f == 15) mbar_arrive(full + slot * 8);              // 15: one arrival too many
            tma_load_2d(s + slot * SLOT + (f == 16 ? 64 : 0), &p.a, full + slot * 8, tile * 64, 0);  // 16: misaligned
            tma_load_2d(s + slot * SLOT + A, &p.b, full + slot * 8, tile * 64, 0);
        }
        return;
    }
    float d[64];
    for (int i = 0; i < 64; i++) d[i] = 0;
    for (int tile = 0; tile < p.tiles; tile++) {
        int slot = tile % 2;
        if (f != 1) mbar_wait(full + slot * 8, tile / 2 & 1);       // 1: read before it has landed
        uint64_t a = wg_desc_sw128(s + slot * SLOT, 16, 1024), b = wg_desc_sw128(s + slot * SLOT + A, 16, 1024);
        if (f != 6) wgmma_fence();                                  // 6: no fence
        for (int k = 0; k < 4; k++) {
            wgmma_m64n128k16<0>(d, a + k * 2, b + k * 2, 1);
            if (f == 17 && k == 1) wgmma_commit();
        }
        if (f == 10) d[3] = 1;                                      // 10: an accumulator in flight is changed
        wgmma_commit();
        if (f == 5 && thread == 128) mbar_arrive(empty + slot * 8); // 5: released while it is being read
        if (f == 17) wgmma_wait<1>();                               // 17: released after waiting for half
        if (f == 17 && thread == 128) mbar_arrive(empty + slot * 8);
        if (f != 11 || tile + 1 < p.tiles) wgmma_wait<0>();         // 11: the last product is not waited for
        if (f != 5 && f != 17 && thread == 128) mbar_arrive(empty + slot * 8);
        if (f == 13 && thread >= 192) break;                        // 13: half of the warpgroup leaves
    }
    int lane = thread % 32, warp = thread / 32 % 4;
    for (int i = 0; i < 64; i++) {
        int row = warp * 16 + lane / 4 + (i >> 1 & 1) * 8, column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
        p.out[row * 128 + column] = d[i];
    }
    if (f == 14 && thread == 128) tma_load_2d(s, &p.a, full, 0, 0); // 14: load never waited for
}
EXPORT(product)

// ---- stored: out = A[64][64] B[n][64]^T, operands by plain stores, out by TMA store; every layout; 128 threads ----

struct StoredParams {
    CUtensorMap out;        // [64][n] floats
    const __half *a, *b;
    int32_t n, swizzle, mn_major, fault;
};

// Offset of element (mn, k) of an operand 64 deep, and the descriptor of the 16-deep part at k.
struct Layout {
    int mode, rows, mn_major;
    static uint32_t swizzle(uint32_t at, int mode) { return at ^ ((at >> 7 & ((1 << mode) - 1)) << 4); }
    uint32_t offset(int mn, int k) const {
        int width = 16 << mode, along = width / 2;
        if (!mn_major) return swizzle(k / along * rows * width + mn * width + k % along * 2, mode);
        return swizzle(mn / along * 64 * width + k * width + mn % along * 2, mode);
    }
    uint64_t descriptor(uint32_t start, int k) const {
        int width = 16 << mode, along = width / 2;
        uint32_t leading, stride;
        if (!mn_major) {
            start += k / along * rows * width + k % along * 2;
            // Without a swizzle the second eight of k are a column of rows further on.
            leading = mode ? 16 : rows * width;
            stride = 8 * width;
        } else {
            start += k * width;
            leading = mode ? 64 * width : 8 * width;
            stride = mode ? 8 * width : 64 * width;
        }
        const uint64_t types[] = {0, 3, 2, 1};
        uint64_t distances = (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32;
        return (uint64_t)(start >> 4) | distances | types[mode] << 62;
    }
};

KERNEL stored(const __grid_constant__ StoredParams p) {
    unsigned char* shared = dyn_smem();
    int thread = threadIdx.x, f = p.fault;
    Layout a{p.swizzle, 64, p.mn_major}, b{p.swizzle, p.n, p.mn_major};
    unsigned char* second = shared + 64 * 128;
    float* out = (float*)(second + 256 * 128);
    for (int i = thread; i < 64 * 64; i += 128) *(__half*)(shared + a.offset(i / 64, i % 64)) = p.a[i];
    for (int i = thread; i < p.n * 64; i += 128) *(__half*)(second + b.offset(i / 64, i % 64)) = p.b[i];
    if (f != 1) fence_proxy_async();                                // 1: the tensor core does not see ordinary stores
    if (f != 2) __syncthreads();                                    // 2: nor those of other threads
    float d[128];
    for (int i = 0; i < 128; i++) d[i] = 1;
    if (f == 3) d[0] = 0;
    wgmma_fence();
    for (int k = 0; k < 64; k += 16) {
        uint64_t da = a.descriptor(smem_u32(shared), k), db = b.descriptor(smem_u32(second), k);
        if (f == 3) da |= 1ull << 49;                               // 3: a base offset
        if (f == 4) db += 1 << 13;                                  // 4: beyond shared memory
        if (f == 5 && thread == 64) db += 64;                       // 5: threads disagree
        emu::wgmma(d, nullptr, da, db, p.n, k > 0, p.mn_major, p.mn_major, HERE);
    }
    wgmma_commit();
    if (f == 6 && thread == 0) *(float*)shared = 0;                 // 6: an operand is overwritten before the wait
    wgmma_wait<0>();
    int lane = thread % 32, warp = thread / 32;
    for (int i = 0; i < p.n / 2; i++) {
        int row = warp * 16 + lane / 4 + (i >> 1 & 1) * 8, column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
        out[row * p.n + column] = d[i];
    }
    if (f != 7) fence_proxy_async();                                // 7: TMA does not see ordinary stores either
    if (f != 8) __syncthreads();                                    // 8: nor those of other threads
    if (thread == 0) {
        int corner[2] = {0, f == 11 ? -1 : 0};                      // 11: begins outside the tensor
        emu::tma_store(&p.out, smem_u32(out), 2, corner, HERE);
        emu::bulk_commit();
        if (f != 9 && f != 10) emu::bulk_wait(0, true);             // 9: exit while it may still be read
        if (f == 10) out[0] = 7, emu::bulk_wait(0, true);           // 10: overwritten while it may still be read
    }
}
EXPORT(stored)

// ---- pool: out[thread] = in[thread], by warpgroups that exchange registers; a thread has 128; 512 threads ----

KERNEL pool(const __grid_constant__ FaultParams p) {
    int thread = threadIdx.x, f = p.fault;
    if (f == 4 && thread == 40) {                                   // 4: a lane skips it
    } else if (thread < 128) {
        if (f == 2) reg_dec<136>();                                 // 2: to more registers
        else if (f != 5) reg_dec<32>();                             // 5: nobody releases any
    } else {
        if (f == 1) reg_inc<168>();                                 // 1: more than were released
        else if (f == 3) reg_inc<120>();                            // 3: to fewer registers
        else reg_inc<160>();
    }
    p.out[thread] = __half2float(p.in[thread]);
}
EXPORT(pool)

// ---- relay: each block waits for the one before it; blocks must be resident together ----

KERNEL relay(const __grid_constant__ FaultParams p) {
    unsigned* flag = (unsigned*)p.out;
    if (threadIdx.x == 0)
        while (atomicAdd(flag, 0u) != gridDim.x - 1 - blockIdx.x) emu::yield_now();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(flag, 1u);
}
EXPORT(relay)

// ---- chain: out[thread] = before[31 - lane] + constant[...], `before` from earlier launches; 32 threads ----

struct ChainParams {
    CUtensorMap map;        // of `before`, 32 floats
    const float *constant, *before;
    float* out;
    int32_t fault, padding;
};

KERNEL chain(const __grid_constant__ ChainParams p) {
    float* numbers = (float*)dyn_smem();
    uint32_t s = smem_u32(numbers), arrived = s + 128;
    int lane = threadIdx.x, f = p.fault;
    float x = p.constant[lane];                                     // never written, so it may be read at once
    if (lane == 0) {
        mbar_init(arrived, 1);
        fence_mbar_init();
        mbar_expect_tx(arrived, 128);
        if (f == 1) tma_load_2d(s, &p.map, arrived, 0, 0);          // 1 to 6: while earlier launches may still run
    }
    if (f == 2) x += 0 * p.before[lane];
    if (f == 3) p.out[blockIdx.x * 32 + lane] = 0;
    if (f == 4) cp_async4(s + lane * 4, p.before + lane, true);
    if (f == 5 && lane == 0) atomicAdd((unsigned*)p.out, 0u);
    if (f == 6 && lane == 0) tma_store_2d(&p.map, s, 0, 0);
    if (f == 7 && blockIdx.x == 1) return;                          // 7: a block exits without having waited
    if (f != 8 || lane != 9) griddep_wait();                        // 8: one thread has not waited
    if (f != 1 && lane == 0) tma_load_2d(s, &p.map, arrived, 0, 0);
    __syncwarp();
    mbar_wait(arrived, 0);
    if (f == 8 && lane == 9) return;
    p.out[blockIdx.x * 32 + lane] = x + numbers[31 - lane];
}
EXPORT(chain)
