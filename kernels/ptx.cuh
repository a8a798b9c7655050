// The only door to PTX: one wrapper per primitive, its instruction on the device and beside it the call into the
// emulator, for which a host compiler reads the same kernels. Outside ptx*.cuh there is no inline assembly.
//
// In the comments a lane is g * 4 + t, with g in 0..8 and t in 0..4: the PTX manual's groupID and threadID_in_group.
// Shared memory is addressed by the 32-bit addresses of smem_u32. "All lanes" and "all 128 threads" mean that the same
// instruction is reached by every one of them, converged.
#pragma once

#if defined(__CUDACC__)
#include <cuda.h>
#include <cuda_fp16.h>
#include <stdint.h>
#define KERNEL extern "C" __global__ void
#define EXPORT(kernel)
// Names the fields of a structure that kernels take, or that is part of one: src/cuda has its mirror, and a test
// compares both.
#define LAYOUT(structure, ...)
#define PTX_FN static __device__ __forceinline__
#define PTX_DEVICE(...) __VA_ARGS__
#define PTX_EMULATED(...)
// The caller's line, which the emulator names in its faults: last parameter of a wrapper, or its only one.
#define PTX_LINE
#define PTX_ONLY_LINE
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PTX_HOPPER 1
#endif
#else
#include "emu.h"
#define KERNEL static void
#define EXPORT(kernel) EMU_KERNEL(kernel)
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
// A launch may begin while those before it in its list still run, and what they write is not there yet; what it writes
// they may still read, since the arena uses memory again. So every thread of every kernel waits, and until then reads
// no memory but its parameters and what no launch of a list writes, which is weights. It writes none.
//
// A launch's wait ends when the one launch before it has ended and its writes can be seen. That it includes all earlier
// launches is due to that one having waited itself: threads that have nothing to do wait, too.

// Waits for all launches before this one.
PTX_FN void griddep_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    PTX_EMULATED(emu::griddep_wait();)
}
// Lets the next launch begin, which it does as soon as all blocks of this one have called this or ended. It takes what
// room these leave on the multiprocessors and waits there, so that every kernel calls this first.
PTX_FN void griddep_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- shared memory ----

// The block's dynamic shared memory, as large as the launch says; aligned to 1024 bytes, as swizzled tiles need.
PTX_FN unsigned char* dyn_smem() {
    PTX_DEVICE(extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[]; return dynamic_shared_memory;)
    PTX_EMULATED(return emu::smem_base();)
}

// The shared-memory address of a pointer into dyn_smem.
PTX_FN uint32_t smem_u32(const void* pointer PTX_LINE) {
    PTX_DEVICE(return uint32_t(__cvta_generic_to_shared(pointer));)
    PTX_EMULATED(return emu::smem_addr(pointer, EMU_PASS);)
}

// ---- numbers ----

// 2^x with a relative error of about 2^-22; results below 2^-126 are 0.
PTX_FN float exp2_approx(float x) {
    PTX_DEVICE(float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;)
    PTX_EMULATED(float y = exp2f(x); return y < 0x1p-126f ? 0.0f : y;)
}

// The nearest half. What is beyond 65504, fp16's greatest finite number, becomes that: an image may clip, but
// infinities never come of it. NaN stays NaN, so that whoever reads the end of a network hears of it.
PTX_FN __half to_half(float x) {
    PTX_DEVICE(uint16_t y; asm("cvt.rn.satfinite.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return __ushort_as_half(y);)
    PTX_EMULATED(return x != x ? __ushort_as_half(0x7fff) : __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));)
}
// Two of them by one instruction.
PTX_FN __half2 to_halves(float x, float y) {
    PTX_DEVICE(__half2 pair; asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;"
                                 : "=r"(reinterpret_cast<uint32_t&>(pair)) : "f"(y), "f"(x)); return pair;)
    PTX_EMULATED(return __halves2half2(to_half(x), to_half(y));)
}

// ---- asynchronous copies, sm_80 ----

// Global to shared memory, N bytes of one thread, both sides aligned to N; zeros are written where `pred` is false, and
// nothing is read. Bytes are there after cp_async_wait of their group, for other threads after a barrier behind it.
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
// The widest goes past the L1 cache. A predicate tells it to ignore the source: a size would have to be computed for
// each copy.
PTX_FN void cp_async16(uint32_t to, const void* from, bool pred PTX_LINE) {
    PTX_DEVICE(asm volatile("{.reg .pred none; setp.eq.s32 none, %2, 0;"
                            "cp.async.cg.shared.global [%0], [%1], 16, none;}" ::"r"(to), "l"(from), "r"(int(pred))
                            : "memory");)
    PTX_EMULATED(emu::cp_async(to, from, 16, pred ? 16 : 0, EMU_PASS);)
}

// Ends a thread's group of copies; an empty group counts too.
PTX_FN void cp_async_commit() {
    PTX_DEVICE(asm volatile("cp.async.commit_group;" ::: "memory");)
    PTX_EMULATED(emu::cp_async_commit();)
}

// The thread waits until at most N of its groups, the latest ones, are under way.
template <int N> PTX_FN void cp_async_wait() {
    PTX_DEVICE(asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");)
    PTX_EMULATED(emu::cp_async_wait(N);)
}

// ---- matrices of a warp ----

// Four 8x8 matrices of halves: lane 8 * i + j names row j of matrix i, 16 bytes; r[i] gets columns 2t and 2t + 1 of
// row g. All lanes.
PTX_FN void ldmatrix_x4(uint32_t (&r)[4], uint32_t row PTX_LINE) {
    PTX_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                            : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");)
    PTX_EMULATED(emu::ldmatrix(r, 4, false, row, EMU_PASS);)
}
// The same of the transposed matrices: r[i] gets rows 2t and 2t + 1 of column g.
PTX_FN void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row PTX_LINE) {
    PTX_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                            : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");)
    PTX_EMULATED(emu::ldmatrix(r, 4, true, row, EMU_PASS);)
}

// D[16][8] += A[16][16] * B[16][8], halves summed in float. All lanes.
// A: a[0] is row g, columns 2t and 2t + 1; a[1] row g + 8; a[2] and a[3] the same rows, columns + 8.
// B: b[0] is column g, rows 2t and 2t + 1; b[1] rows + 8.
// D: d[0] and d[1] are row g, columns 2t and 2t + 1; d[2] and d[3] row g + 8.
PTX_FN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PTX_LINE) {
    PTX_DEVICE(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));)
    PTX_EMULATED(emu::mma16816(d, a, b, 1, 1, EMU_PASS);)
}

// MT x NT of these: D[16 * MT][8 * NT] += A[16 * MT][16] * B[16][8 * NT]. The emulator takes them in one rendezvous.
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

// Barrier `id` (1..16; 0 is __syncthreads) of `threads` threads, a multiple of 32: arrives and waits for the others.
PTX_FN void named_bar_sync(int id, int threads PTX_LINE) {
    PTX_DEVICE(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");)
    PTX_EMULATED(emu::named_bar(id, threads, true, EMU_PASS);)
}
// Arrives and goes on; those in named_bar_sync wait for it. `threads` counts both kinds.
PTX_FN void named_bar_arrive(int id, int threads PTX_LINE) {
    PTX_DEVICE(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");)
    PTX_EMULATED(emu::named_bar(id, threads, false, EMU_PASS);)
}

#ifdef PTX_HOPPER
#include "ptx_hopper.cuh"
#endif
