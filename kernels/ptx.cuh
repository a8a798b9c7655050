// The only access to PTX: one wrapper per primitive. Each wrapper holds the instruction for the device and, beside it,
// the call into the emulator that is made when a host compiler builds the same kernels. There is no inline assembly
// outside ptx*.cuh.
//
// In the comments, lane = g * 4 + t with g in 0..8 and t in 0..4; these are groupID and threadID_in_group of the PTX
// manual. Shared memory is addressed by the 32-bit addresses that smem_u32 returns. "All lanes" and "all 128 threads"
// mean that every one of them must reach the same instruction, converged.
#pragma once

#if defined(__CUDACC__)
#include <cuda.h>
#include <cuda_fp16.h>
#include <stdint.h>
#define KERNEL extern "C" __global__ void
// Registers a kernel with the emulator.
#define EXPORT(kernel)
// The same for a kernel of a table of tiles. `resident` is the number of blocks that a multiprocessor's registers must
// allow; after it comes a type with the THREADS and the SHARED of a block, bytes of dynamic shared memory. src/cuda has
// these numbers in tables of its own, and a test compares them.
#define EXPORT_TILE(kernel, resident, ...)
// Names the fields of a structure that kernels take as their parameter, or of a part of one. src/cuda holds a mirror of
// it, and a test compares the two field by field.
#define LAYOUT(structure, ...)
#define PTX_FN static __device__ __forceinline__
#define PTX_DEVICE(...) __VA_ARGS__
#define PTX_EMULATED(...)
// The caller's file and line, which the emulator names in its messages: PTX_LINE is the last parameter of a wrapper,
// PTX_ONLY_LINE its only one.
#define PTX_LINE
#define PTX_ONLY_LINE
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PTX_HOPPER 1
#endif
#else
#include "emu.h"
#define KERNEL static void
#define EXPORT(kernel) EMU_KERNEL(kernel)
#define EXPORT_TILE(kernel, resident, ...) EMU_TILE(kernel, resident, __VA_ARGS__)
#define LAYOUT(structure, ...) EMU_LAYOUT(structure, __VA_ARGS__)
#define PTX_FN static inline
#define PTX_DEVICE(...)
#define PTX_EMULATED(...) __VA_ARGS__
#define PTX_LINE , EMU_LOC
#define PTX_ONLY_LINE EMU_LOC
#define PTX_HOPPER 1
#endif

// ---- dependent launches, sm_90a ----
//
// A launch may begin while earlier launches of its list are still running. Their results are not there yet, and they
// may still read memory that this launch writes, since the arena reuses memory. Therefore every thread of every kernel
// calls griddep_wait. Before that it writes no memory, and reads none except its parameters and data that no launch of
// a list writes, that is, weights.
//
// griddep_wait returns when the one launch directly before has ended and its writes are visible. This covers all
// earlier launches because that launch has waited in the same way. For the same reason threads that have no work must
// wait as well.

// Waits for all launches before this one.
PTX_FN void griddep_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    PTX_EMULATED(emu::griddep_wait();)
}
// Allows the next launch to begin; it does so once every block of this launch has called this or ended. The blocks of
// the next launch occupy whatever room is left on the multiprocessors and wait there, so every kernel calls this first.
PTX_FN void griddep_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- shared memory ----

// The block's dynamic shared memory, of the size given at launch, aligned to 1024 bytes as swizzled tiles require.
PTX_FN unsigned char* dyn_smem() {
    PTX_DEVICE(extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[]; return dynamic_shared_memory;)
    PTX_EMULATED(return emu::smem_base();)
}

// The 32-bit shared-memory address of a pointer into dyn_smem.
PTX_FN uint32_t smem_u32(const void* pointer PTX_LINE) {
    PTX_DEVICE(return uint32_t(__cvta_generic_to_shared(pointer));)
    PTX_EMULATED(return emu::smem_addr(pointer, EMU_PASS);)
}

// ---- numbers ----

// 2^x with a relative error of about 2^-22. Results below 2^-126 become 0.
PTX_FN float exp2_approx(float x) {
    PTX_DEVICE(float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;)
    PTX_EMULATED(float y = exp2f(x); return y < 0x1p-126f ? 0.0f : y;)
}

// 1 / x with an error of one unit in the last place. Subnormal arguments and results count as 0.
PTX_FN float rcp_approx(float x) {
    PTX_DEVICE(float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;)
    PTX_EMULATED(float y = 1.0f / (fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x);
                 return fabsf(y) < 0x1p-126f ? copysignf(0.0f, y) : y;)
}

// Rounds to the nearest fp16 number. Values beyond 65504, the greatest finite fp16 number, saturate there: an image may
// clip, but no infinities arise. NaN stays NaN, so that the check at the end of a network reports it.
PTX_FN __half to_half(float x) {
    PTX_DEVICE(uint16_t y; asm("cvt.rn.satfinite.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return __ushort_as_half(y);)
    PTX_EMULATED(return x != x ? __ushort_as_half(0x7fff) : __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));)
}
// Rounds two numbers with one instruction.
PTX_FN __half2 to_halves(float x, float y) {
    PTX_DEVICE(__half2 pair; asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;"
                                 : "=r"(reinterpret_cast<uint32_t&>(pair)) : "f"(y), "f"(x)); return pair;)
    PTX_EMULATED(return __halves2half2(to_half(x), to_half(y));)
}

// ---- asynchronous copies, sm_80 ----

// Each thread copies N bytes from global to shared memory; both addresses are aligned to N. Where `pred` is false
// nothing is read and zeros are written. The bytes are visible to this thread after cp_async_wait for their group, and
// to other threads after a barrier that follows it.
PTX_FN void cp_async4(uint32_t to, const void* from, bool pred PTX_LINE) {
    PTX_DEVICE(asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(pred ? 4 : 0)
                            : "memory");)
    PTX_EMULATED(emu::cp_async(to, from, 4, pred ? 4 : 0, EMU_PASS);)
}
PTX_FN void cp_async8(uint32_t to, const void* from, bool pred PTX_LINE) {
    PTX_DEVICE(asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(pred ? 8 : 0)
                            : "memory");)
    PTX_EMULATED(emu::cp_async(to, from, 8, pred ? 8 : 0, EMU_PASS);)
}
// The 16-byte copy bypasses the L1 cache. `pred` is passed as the instruction's ignore-src predicate, because a source
// size would have to be computed for each copy.
PTX_FN void cp_async16(uint32_t to, const void* from, bool pred PTX_LINE) {
    PTX_DEVICE(asm volatile("{.reg .pred none; setp.eq.s32 none, %2, 0;"
                            "cp.async.cg.shared.global [%0], [%1], 16, none;}" ::"r"(to), "l"(from), "r"(int(pred))
                            : "memory");)
    PTX_EMULATED(emu::cp_async(to, from, 16, pred ? 16 : 0, EMU_PASS);)
}

// Closes the thread's current group of copies; an empty group counts too.
PTX_FN void cp_async_commit() {
    PTX_DEVICE(asm volatile("cp.async.commit_group;" ::: "memory");)
    PTX_EMULATED(emu::cp_async_commit();)
}

// Waits until at most the N latest groups of this thread are still in flight.
template <int N> PTX_FN void cp_async_wait() {
    PTX_DEVICE(asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");)
    PTX_EMULATED(emu::cp_async_wait(N);)
}

// ---- warp-level matrices ----

// Loads four 8x8 matrices of halves. Lane 8 * i + j supplies the address of row j of matrix i (16 bytes); r[i] receives
// columns 2t and 2t + 1 of row g. All lanes.
PTX_FN void ldmatrix_x4(uint32_t (&r)[4], uint32_t row PTX_LINE) {
    PTX_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                            : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");)
    PTX_EMULATED(emu::ldmatrix(r, 4, false, row, EMU_PASS);)
}
// Loads the transposed matrices: r[i] receives rows 2t and 2t + 1 of column g.
PTX_FN void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row PTX_LINE) {
    PTX_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                            : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");)
    PTX_EMULATED(emu::ldmatrix(r, 4, true, row, EMU_PASS);)
}

// D[16][8] += A[16][16] * B[16][8], halves accumulated in fp32. All lanes.
// A: a[0] is row g, columns 2t and 2t + 1; a[1] is row g + 8; a[2] and a[3] are the same rows, columns + 8.
// B: b[0] is column g, rows 2t and 2t + 1; b[1] is rows + 8.
// D: d[0] and d[1] are row g, columns 2t and 2t + 1; d[2] and d[3] are row g + 8.
PTX_FN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PTX_LINE) {
    PTX_DEVICE(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));)
    PTX_EMULATED(emu::mma16816(d, a, b, 1, 1, EMU_PASS);)
}

// MT x NT such products: D[16 * MT][8 * NT] += A[16 * MT][16] * B[16][8 * NT]. The emulator performs them in one
// rendezvous of the warp's lanes.
template <int MT, int NT>
PTX_FN void mma_tile(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2] PTX_LINE) {
#if defined(__CUDACC__)
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++) mma_m16n8k16(d[i][j], a[i], b[j]);
#else
    emu::mma16816(&d[0][0][0], &a[0][0], &b[0][0], MT, NT, EMU_PASS);
#endif
}

// ---- named barriers ----

// Arrives at barrier `id` (1..16; 0 is __syncthreads) of `threads` threads, a multiple of 32, and waits for the others.
PTX_FN void named_bar_sync(int id, int threads PTX_LINE) {
    PTX_DEVICE(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");)
    PTX_EMULATED(emu::named_bar(id, threads, true, EMU_PASS);)
}
// Arrives without waiting; the threads in named_bar_sync wait for it. `threads` counts both kinds.
PTX_FN void named_bar_arrive(int id, int threads PTX_LINE) {
    PTX_DEVICE(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");)
    PTX_EMULATED(emu::named_bar(id, threads, false, EMU_PASS);)
}

#ifdef PTX_HOPPER
#include "ptx_hopper.cuh"
#endif
