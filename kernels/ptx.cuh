// One wrapper per PTX primitive. Device side: inline PTX. Host side: emulator calls.
#pragma once
#if defined(__CUDACC__)
#include <cuda.h>
#include <cuda_fp16.h>
#include <stdint.h>
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PTX_HOPPER 1
#endif
#define KERNEL extern "C" __global__ void
#define EXPORT(kernel)
#define PTX_FN static __device__ __forceinline__
PTX_FN unsigned char* dyn_smem() { extern __shared__ __align__(1024) unsigned char smem_[]; return smem_; }
PTX_FN uint32_t smem_u32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// ---- sm_80 ----
PTX_FN void cp_async16(uint32_t dst, const void* src, bool pred) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(pred ? 16 : 0) : "memory"); }
PTX_FN void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> PTX_FN void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
PTX_FN void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory"); }
PTX_FN void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory"); }
PTX_FN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); }
// a whole register tile in one call: unrolled mma.sync on the device, one rendezvous in the emulator
template <int MT, int NT> PTX_FN void mma_tile(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2]) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++) mma_m16n8k16(d[i][j], a[i], b[j]); }
// 2^x to 2 units in the last place; results below 2^-126 are 0
PTX_FN float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
PTX_FN void named_bar_sync(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }
PTX_FN void named_bar_arrive(int id, int n) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n) : "memory"); }
#ifdef PTX_HOPPER
PTX_FN void mbar_init(uint32_t b, uint32_t n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(n) : "memory"); }
PTX_FN void fence_mbar_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PTX_FN void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
PTX_FN void mbar_expect_tx(uint32_t b, uint32_t tx) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(tx) : "memory"); }
PTX_FN void mbar_arrive(uint32_t b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
PTX_FN void mbar_wait(uint32_t b, uint32_t parity) {
    asm volatile("{\n .reg .pred p;\n W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n @p bra D;\n bra W;\n D:\n }" ::"r"(b), "r"(parity) : "memory"); }
PTX_FN void tma_load_2d(uint32_t dst, const CUtensorMap* tm, uint32_t bar, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4}], [%2];"
        ::"r"(dst), "l"(tm), "r"(bar), "r"(c0), "r"(c1) : "memory"); }
PTX_FN void tma_load_3d(uint32_t dst, const CUtensorMap* tm, uint32_t bar, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], [%2];"
        ::"r"(dst), "l"(tm), "r"(bar), "r"(c0), "r"(c1), "r"(c2) : "memory"); }
PTX_FN void tma_load_4d(uint32_t dst, const CUtensorMap* tm, uint32_t bar, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], [%2];"
        ::"r"(dst), "l"(tm), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory"); }
PTX_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> PTX_FN void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
template <int R> PTX_FN void reg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R)); }
template <int R> PTX_FN void reg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R)); }
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
template <int TB> PTX_FN void wgmma_m64n128k16(float (&d)[64], uint64_t da, uint64_t db, int scale_d) {
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
        " %64, %65, p, 1, 1, 0, %67;\n }"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56) : "l"(da), "l"(db), "r"(scale_d), "n"(TB)); }
template <int TB> PTX_FN void wgmma_m64n128k16_rs(float (&d)[64], const uint32_t (&a)[4], uint64_t db, int scale_d) {
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
        " {%64,%65,%66,%67}, %68, p, 1, 1, %70;\n }"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(db), "r"(scale_d), "n"(TB)); }
#endif
#else  // ------------------------------------------------------------------ emulator
#include "emu.h"
#define KERNEL static void
#define EXPORT(kernel) EMU_KERNEL(kernel)
#define PTX_HOPPER 1
#define PTX_FN static inline
PTX_FN unsigned char* dyn_smem() { return emu::smem_base(); }
PTX_FN uint32_t smem_u32(const void* p, EMU_LOC) { return emu::smem_addr(p, EMU_PASS); }
PTX_FN void cp_async16(uint32_t dst, const void* src, bool pred, EMU_LOC) { emu::cp_async(dst, src, 16, pred ? 16 : 0, EMU_PASS); }
PTX_FN void cp_async_commit() { emu::cp_async_commit(); }
template <int N> PTX_FN void cp_async_wait() { emu::cp_async_wait(N); }
PTX_FN void ldmatrix_x4(uint32_t (&r)[4], uint32_t a, EMU_LOC) { emu::ldmatrix(r, 4, false, a, EMU_PASS); }
PTX_FN void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a, EMU_LOC) { emu::ldmatrix(r, 4, true, a, EMU_PASS); }
PTX_FN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_LOC) { emu::mma16816(d, a, b, 1, 1, EMU_PASS); }
template <int MT, int NT> PTX_FN void mma_tile(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2], EMU_LOC) {
    emu::mma16816(&d[0][0][0], &a[0][0], &b[0][0], MT, NT, EMU_PASS); }
PTX_FN float exp2_approx(float x) { float y = exp2f(x); return y < 1.17549435e-38f ? 0.0f : y; }
PTX_FN void named_bar_sync(int id, int n, EMU_LOC) { emu::named_bar(id, n, true, EMU_PASS); }
PTX_FN void named_bar_arrive(int id, int n, EMU_LOC) { emu::named_bar(id, n, false, EMU_PASS); }
PTX_FN void mbar_init(uint32_t b, uint32_t n, EMU_LOC) { emu::mbar_init(b, n, EMU_PASS); }
PTX_FN void fence_mbar_init() {}
PTX_FN void fence_proxy_async() { emu::fence_proxy_async(); }
PTX_FN void mbar_expect_tx(uint32_t b, uint32_t tx, EMU_LOC) { emu::mbar_arrive(b, 1, tx, EMU_PASS); }
PTX_FN void mbar_arrive(uint32_t b, EMU_LOC) { emu::mbar_arrive(b, 1, 0, EMU_PASS); }
PTX_FN void mbar_wait(uint32_t b, uint32_t parity, EMU_LOC) { emu::mbar_wait(b, parity, EMU_PASS); }
PTX_FN void tma_load_2d(uint32_t dst, const CUtensorMap* tm, uint32_t bar, int c0, int c1, EMU_LOC) { int c[2] = {c0, c1}; emu::tma_load(dst, tm, bar, 2, c, EMU_PASS); }
PTX_FN void tma_load_3d(uint32_t dst, const CUtensorMap* tm, uint32_t bar, int c0, int c1, int c2, EMU_LOC) { int c[3] = {c0, c1, c2}; emu::tma_load(dst, tm, bar, 3, c, EMU_PASS); }
PTX_FN void tma_load_4d(uint32_t dst, const CUtensorMap* tm, uint32_t bar, int c0, int c1, int c2, int c3, EMU_LOC) { int c[4] = {c0, c1, c2, c3}; emu::tma_load(dst, tm, bar, 4, c, EMU_PASS); }
PTX_FN void wgmma_fence(EMU_LOC) { emu::wgmma_fence(EMU_PASS); }
PTX_FN void wgmma_commit(EMU_LOC) { emu::wgmma_commit(EMU_PASS); }
template <int N> PTX_FN void wgmma_wait(EMU_LOC) { emu::wgmma_wait(N, EMU_PASS); }
template <int R> PTX_FN void reg_inc() { static_assert(R % 8 == 0 && R >= 24 && R <= 256); }
template <int R> PTX_FN void reg_dec() { static_assert(R % 8 == 0 && R >= 24 && R <= 256); }
template <int TB> PTX_FN void wgmma_m64n128k16(float (&d)[64], uint64_t da, uint64_t db, int scale_d, EMU_LOC) { emu::wgmma(d, nullptr, da, db, 128, scale_d, 0, TB, EMU_PASS); }
template <int TB> PTX_FN void wgmma_m64n128k16_rs(float (&d)[64], const uint32_t (&a)[4], uint64_t db, int scale_d, EMU_LOC) { emu::wgmma(d, a, 0, db, 128, scale_d, 0, TB, EMU_PASS); }
#endif

// 128B-swizzled K-major (or MN-major) shared-memory matrix descriptor
PTX_FN uint64_t wg_desc_sw128(uint32_t addr, uint32_t lbo, uint32_t sbo) {
    return (uint64_t)((addr & 0x3ffff) >> 4) | (uint64_t)(lbo >> 4) << 16 | (uint64_t)(sbo >> 4) << 32 | 1ull << 62; }
