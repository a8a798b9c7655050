// The CUDA language for a host compiler: qualifiers, vector types, half precision and intrinsics.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// __shared__ is deliberately not defined: all shared memory is dynamic, through dyn_smem().

// ---- vector types -----------------------------------------------------------------------------

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

// The alignment of a vector is its size, as CUDA's 8- and 16-byte accesses require.
#define EMU_VECTOR2(name, scalar)                                       \
    struct __attribute__((aligned(2 * sizeof(scalar)))) name {          \
        scalar x, y;                                                    \
    };                                                                  \
    static inline name make_##name(scalar x, scalar y) { return {x, y}; }
#define EMU_VECTOR4(name, scalar)                                       \
    struct __attribute__((aligned(4 * sizeof(scalar)))) name {          \
        scalar x, y, z, w;                                              \
    };                                                                  \
    static inline name make_##name(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
EMU_VECTOR2(char2, signed char)
EMU_VECTOR4(char4, signed char)
EMU_VECTOR2(uchar2, unsigned char)
EMU_VECTOR4(uchar4, unsigned char)
EMU_VECTOR2(short2, short)
EMU_VECTOR4(short4, short)
EMU_VECTOR2(ushort2, unsigned short)
EMU_VECTOR4(ushort4, unsigned short)
EMU_VECTOR2(int2, int)
EMU_VECTOR4(int4, int)
EMU_VECTOR2(uint2, unsigned)
EMU_VECTOR4(uint4, unsigned)
EMU_VECTOR2(float2, float)
EMU_VECTOR4(float4, float)
EMU_VECTOR2(longlong2, long long)
EMU_VECTOR2(ulonglong2, unsigned long long)
EMU_VECTOR2(double2, double)
#undef EMU_VECTOR2
#undef EMU_VECTOR4

struct float3 {
    float x, y, z;
};
static inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }

// ---- half -------------------------------------------------------------------------------------
// Not _Float16: here every operation is one float operation and one explicit rounding to nearest, as on the device.

struct __half {
    uint16_t bits;
};
struct __align__(4) __half2 {
    __half x, y;
};
using half = __half;
using half2 = __half2;

static inline float __half2float(__half h) { return _cvtsh_ss(h.bits); }
static inline __half __float2half_rn(float f) { return {(uint16_t)_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT)}; }
static inline __half __float2half_rz(float f) { return {(uint16_t)_cvtss_sh(f, _MM_FROUND_TO_ZERO)}; }
static inline __half __float2half(float f) { return __float2half_rn(f); }
static inline unsigned short __half_as_ushort(__half h) { return h.bits; }
static inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

static inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
static inline __half2 __half2half2(__half h) { return {h, h}; }
static inline __half2 __float2half2_rn(float f) { return __half2half2(__float2half_rn(f)); }
static inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
static inline __half2 __float22half2_rn(float2 f) { return __floats2half2_rn(f.x, f.y); }
static inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
static inline __half __low2half(__half2 h) { return h.x; }
static inline __half __high2half(__half2 h) { return h.y; }
static inline float __low2float(__half2 h) { return __half2float(h.x); }
static inline float __high2float(__half2 h) { return __half2float(h.y); }

static inline __half __hadd(__half a, __half b) { return __float2half_rn(__half2float(a) + __half2float(b)); }
static inline __half __hsub(__half a, __half b) { return __float2half_rn(__half2float(a) - __half2float(b)); }
static inline __half __hmul(__half a, __half b) { return __float2half_rn(__half2float(a) * __half2float(b)); }
static inline __half __hmax(__half a, __half b) { return __half2float(a) > __half2float(b) ? a : b; }
static inline __half __hmin(__half a, __half b) { return __half2float(a) < __half2float(b) ? a : b; }
static inline __half __hneg(__half a) { return {(uint16_t)(a.bits ^ 0x8000)}; }
static inline bool __hisnan(__half a) { return (a.bits & 0x7fff) > 0x7c00; }

// A single rounding: the sum is exact in double, and rounding it to odd in float keeps the final rounding correct.
static inline __half __hfma(__half a, __half b, __half c) {
    double exact = (double)__half2float(a) * __half2float(b) + __half2float(c);
    float f = (float)exact;
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    if ((double)f != exact && !(bits & 1)) {
        bool rounded_down = (double)f < exact;
        bits += (f < 0) == rounded_down ? -1 : 1;
        __builtin_memcpy(&f, &bits, 4);
    }
    return __float2half_rn(f);
}

static inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
static inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
static inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
static inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
static inline __half2 __hmin2(__half2 a, __half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
static inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

// ---- scalar intrinsics ------------------------------------------------------------------------
// Approximate intrinsics are computed exactly: their last bits differ from the device's.

template <class T> static inline T __ldg(const T* p) { return *p; }
template <class T> static inline T __ldcs(const T* p) { return *p; }
template <class T> static inline void __stcs(T* p, T value) { *p = value; }

// glibc declares some of these names itself, so they must be macros.
#define __expf expf
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf
#define __sincosf sincosf
#define __powf powf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __frsqrt_rn(float x) { return rsqrtf(x); }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

template <class To, class From> static inline To emu_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
static inline float __int_as_float(int i) { return emu_bits<float>(i); }
static inline int __float_as_int(float f) { return emu_bits<int>(f); }
static inline float __uint_as_float(unsigned i) { return emu_bits<float>(i); }
static inline unsigned __float_as_uint(float f) { return emu_bits<unsigned>(f); }

static inline int __float2int_rn(float f) { return (int)nearbyintf(f); }
static inline int __float2int_rd(float f) { return (int)floorf(f); }
static inline int __float2int_rz(float f) { return (int)f; }
static inline unsigned __float2uint_rn(float f) { return (unsigned)nearbyintf(f); }
static inline float __int2float_rn(int i) { return (float)i; }
static inline float __uint2float_rn(unsigned i) { return (float)i; }

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
    return r;
}
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
    return (unsigned)(((uint64_t)hi << 32 | lo) << (n & 31) >> 32);
}

template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }
