// The part of ptx.cuh that needs sm_90a: mbarriers, TMA, stmatrix and wgmma. Included by ptx.cuh.
#pragma once

// Stores what ldmatrix_x4 loads: lane 8 * i + j supplies the address of row j of matrix i; r[i] holds columns 2t and 2t
// + 1 of row g. All lanes.
PTX_FN void stmatrix_x4(uint32_t row, const uint32_t (&r)[4] PTX_LINE) {
    PTX_DEVICE(asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]),
                            "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");)
    PTX_EMULATED(emu::stmatrix(row, r, 4, false, EMU_PASS);)
}
// Stores the transposed matrices: r[i] holds rows 2t and 2t + 1 of column g.
PTX_FN void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4] PTX_LINE) {
    PTX_DEVICE(asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]),
                            "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");)
    PTX_EMULATED(emu::stmatrix(row, r, 4, true, EMU_PASS);)
}

// ---- mbarriers: 8 bytes of shared memory each ----

// Initialises a barrier whose phases complete after `arrivals` arrivals and after all expected bytes have come. Called
// by one thread, which then calls fence_mbar_init.
PTX_FN void mbar_init(uint32_t barrier, uint32_t arrivals PTX_LINE) {
    PTX_DEVICE(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");)
    PTX_EMULATED(emu::mbar_init(barrier, arrivals, EMU_PASS);)
}
// Makes initialised barriers visible to TMA; other threads see them after a __syncthreads that follows.
PTX_FN void fence_mbar_init() {
    PTX_DEVICE(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");)
}
PTX_FN void mbar_arrive(uint32_t barrier PTX_LINE) {
    PTX_DEVICE(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");)
    PTX_EMULATED(emu::mbar_arrive(barrier, 1, 0, EMU_PASS);)
}
// Arrives, and makes the phase wait for `bytes` more bytes from TMA.
PTX_FN void mbar_expect_tx(uint32_t barrier, uint32_t bytes PTX_LINE) {
    PTX_DEVICE(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                            : "memory");)
    PTX_EMULATED(emu::mbar_arrive(barrier, 1, bytes, EMU_PASS);)
}
// Waits until the phase of this parity has completed. The first phase has parity 0; on a new barrier, parity 1 counts
// as completed.
PTX_FN void mbar_wait(uint32_t barrier, uint32_t parity PTX_LINE) {
    PTX_DEVICE(asm volatile("{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                            "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");)
    PTX_EMULATED(emu::mbar_wait(barrier, parity, EMU_PASS);)
}

// ---- TMA: tiles of tensors in global memory, issued by one thread; the tensor map holds sizes, tile and swizzle ----

// Makes the thread's writes to shared memory visible to TMA and wgmma, which access it through the asynchronous proxy.
// A barrier must follow.
PTX_FN void fence_proxy_async() {
    PTX_DEVICE(asm volatile("fence.proxy.async.shared::cta;" ::: "memory");)
    PTX_EMULATED(emu::fence_proxy_async();)
}

// Prefetches a tensor map to where TMA looks for it; otherwise its first use waits for it.
PTX_FN void tma_prefetch(const CUtensorMap* map) {
    PTX_DEVICE(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");)
}

// Loads the tile whose first element is at the given coordinates, innermost first; elements outside the tensor become
// zero. The bytes of the whole tile count at `barrier`, on which readers wait.
PTX_FN void tma_load_2d(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x0, int x1 PTX_LINE) {
    PTX_DEVICE(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                            "[%0], [%1, {%3,%4}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(x0), "r"(x1)
                            : "memory");)
    PTX_EMULATED(int x[] = {x0, x1}; emu::tma_load(to, map, barrier, 2, x, EMU_PASS);)
}
PTX_FN void tma_load_3d(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x0, int x1, int x2 PTX_LINE) {
    PTX_DEVICE(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                            "[%0], [%1, {%3,%4,%5}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2)
                            : "memory");)
    PTX_EMULATED(int x[] = {x0, x1, x2}; emu::tma_load(to, map, barrier, 3, x, EMU_PASS);)
}
PTX_FN void tma_load_4d(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x0, int x1, int x2,
                        int x3 PTX_LINE) {
    PTX_DEVICE(asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                            "[%0], [%1, {%3,%4,%5,%6}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(x0), "r"(x1),
                            "r"(x2), "r"(x3) : "memory");)
    PTX_EMULATED(int x[] = {x0, x1, x2, x3}; emu::tma_load(to, map, barrier, 4, x, EMU_PASS);)
}

// Stores a tile; elements outside the tensor are left out. The tile must have been made visible by fence_proxy_async
// and a barrier.
PTX_FN void tma_store_2d(const CUtensorMap* map, uint32_t from, int x0, int x1 PTX_LINE) {
    PTX_DEVICE(asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2,%3}], [%1];" ::"l"(map),
                            "r"(from), "r"(x0), "r"(x1) : "memory");)
    PTX_EMULATED(int x[] = {x0, x1}; emu::tma_store(map, from, 2, x, EMU_PASS);)
}
PTX_FN void tma_store_4d(const CUtensorMap* map, uint32_t from, int x0, int x1, int x2, int x3 PTX_LINE) {
    PTX_DEVICE(asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2,%3,%4,%5}], [%1];" ::
                            "l"(map), "r"(from), "r"(x0), "r"(x1), "r"(x2), "r"(x3) : "memory");)
    PTX_EMULATED(int x[] = {x0, x1, x2, x3}; emu::tma_store(map, from, 4, x, EMU_PASS);)
}
// Closes the thread's current group of stores.
PTX_FN void tma_store_commit() {
    PTX_DEVICE(asm volatile("cp.async.bulk.commit_group;" ::: "memory");)
    PTX_EMULATED(emu::bulk_commit();)
}
// The thread that stored waits until all but its latest N groups have read shared memory, which may then be reused.
template <int N> PTX_FN void tma_store_wait() {
    PTX_DEVICE(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");)
    PTX_EMULATED(emu::bulk_wait(N, true);)
}

// ---- wgmma: a warpgroup multiplies tiles in shared memory; all 128 threads ----

// Needed before the first wgmma, and before any wgmma that follows another use of its registers.
PTX_FN void wgmma_fence(PTX_ONLY_LINE) {
    PTX_DEVICE(asm volatile("wgmma.fence.sync.aligned;" ::: "memory");)
    PTX_EMULATED(emu::wgmma_fence(EMU_PASS);)
}
// Closes the current group of products.
PTX_FN void wgmma_commit(PTX_ONLY_LINE) {
    PTX_DEVICE(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");)
    PTX_EMULATED(emu::wgmma_commit(EMU_PASS);)
}
// Waits until at most the latest N groups are in flight: the registers and shared memory of earlier groups are free
// then.
template <int N> PTX_FN void wgmma_wait(PTX_ONLY_LINE) {
    PTX_DEVICE(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");)
    PTX_EMULATED(emu::wgmma_wait(N, EMU_PASS);)
}

// Keeps the compiler from moving any use of the accumulators across this point. The compiler does not know that they
// change between a wgmma and its wait, so this belongs before wgmma_fence and after wgmma_wait.
template <int R> PTX_FN void wgmma_hold(float (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; i++) {
        PTX_DEVICE(asm volatile("" : "+f"(d[i])::"memory");)
        PTX_EMULATED((void)d;)
    }
}

// Changes the number of registers of each of the warpgroup's threads to R, a multiple of 8. reg_inc raises it and waits
// until other warpgroups have released enough; reg_dec lowers it.
template <int R> PTX_FN void reg_inc(PTX_ONLY_LINE) {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256);
    PTX_DEVICE(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));)
    PTX_EMULATED(emu::set_registers(R, true, EMU_PASS);)
}
template <int R> PTX_FN void reg_dec(PTX_ONLY_LINE) {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256);
    PTX_DEVICE(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));)
    PTX_EMULATED(emu::set_registers(R, false, EMU_PASS);)
}

// How the 16-byte chunks of a tile are permuted so that a column is spread over the banks; the values are those of
// CUtensorMapSwizzle. A row r of a tile is a span of 128, 64 or 32 bytes, and its chunk c is stored at c ^ r % 8, c ^ r
// / 2 % 4 or c ^ r / 4 % 2 respectively. A tile begins at a multiple of 8 spans.
enum class Swizzle : uint32_t { NONE, SPAN32, SPAN64, SPAN128 };

// The descriptor of a tile in shared memory; `leading` and `stride` are distances in bytes.
//
// K-major (rows of K, one span each; A, and B^T): `stride` leads from eight rows to the next eight. Without a swizzle a
// row is 16 bytes, 8 values of k, and `leading` leads to the next 8; with a swizzle `leading` is ignored, and the next
// 16 values of k are 32 bytes further on.
//
// MN-major (rows of N, one span each, one row per k; B): with a swizzle `leading` leads from one span of N to the next,
// and `stride` from eight values of k to the next eight. Without one `stride` leads from 8 columns to the next 8, and
// `leading` from eight values of k to the next eight.
PTX_FN uint64_t wg_desc(Swizzle swizzle, uint32_t address, uint32_t leading, uint32_t stride) {
    uint64_t layout = (4 - uint64_t(swizzle)) % 4;
    uint64_t tile = (address & 0x3ffff) >> 4;
    return tile | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | layout << 62;
}
PTX_FN uint64_t wg_desc_sw128(uint32_t address, uint32_t leading, uint32_t stride) {
    return wg_desc(Swizzle::SPAN128, address, leading, stride);
}

// wgmma_m64nNk16<TB>(d, a, b, scale_d): D[64][N] = A[64][16] * B[16][N], plus D where scale_d is not 0. A and B are
// descriptors; TB = 0 takes B^T (K-major), TB = 1 takes B (MN-major). wgmma_m64nNk16_rs takes A from registers. Warp w
// of the warpgroup has rows 16 * w .. 16 * w + 16. The registers a[..] and d[4 * j ..] are the fragments of
// mma_m16n8k16, the latter for columns 8 * j .. 8 * j + 8. Until its group has been waited for, nothing may touch d,
// the registers of a or the tiles.
#define PTX_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PTX_D8(i) PTX_D4(i), PTX_D4(i + 4)
#define PTX_D16 PTX_D8(0), PTX_D8(8)
#define PTX_D20 PTX_D16, PTX_D4(16)
#define PTX_D32 PTX_D20, PTX_D4(20), PTX_D8(24)
#define PTX_D40 PTX_D32, PTX_D8(32)
#define PTX_D64 PTX_D40, PTX_D8(40), PTX_D8(48), PTX_D8(56)
#define PTX_D80 PTX_D64, PTX_D8(64), PTX_D8(72)
#define PTX_D128 PTX_D80, PTX_D8(80), PTX_D8(88), PTX_D8(96), PTX_D8(104), PTX_D8(112), PTX_D8(120)
#define PTX_NAMES16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PTX_NAMES20 PTX_NAMES16 ",%16,%17,%18,%19"
#define PTX_NAMES32 PTX_NAMES20 ",%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PTX_NAMES40 PTX_NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define PTX_NAMES64 PTX_NAMES40 \
    ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PTX_NAMES80 PTX_NAMES64 \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define PTX_NAMES128 PTX_NAMES80 \
    ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102" \
    ",%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121" \
    ",%122,%123,%124,%125,%126,%127"

// N columns take R = N / 2 registers per thread; P0.. are the numbers of the operands that follow them.
#define PTX_WGMMA(N, R, P0, P1, P2, P3, P4, P5, P6) \
    template <int TB> PTX_FN void wgmma_m64n##N##k16(float (&d)[R], uint64_t a, uint64_t b, int scale_d PTX_LINE) { \
        PTX_DEVICE(asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P2 ", 0;\n" \
                                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 " \
                                "{" PTX_NAMES##R "}, %" #P0 ", %" #P1 ", add, 1, 1, 0, %" #P3 ";\n}" \
                                : PTX_D##R \
                                : "l"(a), "l"(b), "r"(scale_d), "n"(TB));) \
        PTX_EMULATED(emu::wgmma(d, nullptr, a, b, N, scale_d, 0, TB, EMU_PASS);) \
    } \
    template <int TB> \
    PTX_FN void wgmma_m64n##N##k16_rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b, int scale_d PTX_LINE) { \
        PTX_DEVICE(asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P5 ", 0;\n" \
                                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 " \
                                "{" PTX_NAMES##R "}, {%" #P0 ",%" #P1 ",%" #P2 ",%" #P3 "}, %" #P4 ", " \
                                "add, 1, 1, %" #P6 ";\n}" \
                                : PTX_D##R \
                                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(TB));) \
        PTX_EMULATED(emu::wgmma(d, a, 0, b, N, scale_d, 0, TB, EMU_PASS);) \
    }
PTX_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
PTX_WGMMA(40, 20, 20, 21, 22, 23, 24, 25, 26)
PTX_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
PTX_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
PTX_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
PTX_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
PTX_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)
