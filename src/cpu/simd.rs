//! SIMD that is not tied to one instruction set: kernels are written once over [`Lanes`] and compiled for AVX-512, AVX2
//! and the target's baseline. The `dispatch!` macro picks one at run time.
//!
//! The arithmetic is the same on every path, except that the baseline may lack fused multiply-adds.

use half::f16;
use std::sync::OnceLock;

/// Instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, VL, BW, DQ.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// The instructions that every machine of the target has.
    Baseline,
}

/// The best instruction set of this machine.
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq");
            if avx2 && avx512 {
                return Isa::Avx512;
            }
            if avx2 {
                return Isa::Avx2;
            }
        }
        Isa::Baseline
    })
}

/// A vector register of fp32 lanes.
pub trait Lanes: Copy {
    /// Lanes in the register.
    const COUNT: usize;
    /// Rows of a register tile, which needs two accumulator registers per row and three registers for the operands: 12
    /// rows with 32 registers, 6 with 16.
    const ROWS: usize;
    /// Loads `COUNT` numbers.
    ///
    /// # Safety
    /// The instruction set must be available; `from` must be readable for `COUNT` numbers.
    unsafe fn load(from: *const f32) -> Self;
    /// Loads `COUNT` fp16 numbers and widens them.
    ///
    /// # Safety
    /// As for `load`.
    unsafe fn load_half(from: *const f16) -> Self;
    /// Stores `COUNT` numbers.
    ///
    /// # Safety
    /// The instruction set must be available; `to` must be writable for `COUNT` numbers.
    unsafe fn store(self, to: *mut f32);
    /// Broadcasts `x` to all lanes.
    ///
    /// # Safety
    /// The instruction set must be available.
    unsafe fn splat(x: f32) -> Self;
    /// `self * b + c`.
    ///
    /// # Safety
    /// The instruction set must be available.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
}

/// The baseline register: four lanes, which the compiler maps to SSE2 or NEON.
impl Lanes for [f32; 4] {
    const COUNT: usize = 4;
    const ROWS: usize = if cfg!(target_arch = "aarch64") { 12 } else { 6 };
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: guaranteed by the caller.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_half(from: *const f16) -> Self {
        // SAFETY: guaranteed by the caller.
        widen(unsafe { from.cast::<[f16; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: guaranteed by the caller.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        std::array::from_fn(|i| madd(self[i], b[i], c[i]))
    }
}

/// Widens four fp16 numbers.
#[cfg(not(target_arch = "aarch64"))]
#[inline(always)]
fn widen(halves: [f16; 4]) -> [f32; 4] {
    halves.map(f16::to_f32)
}

/// Widens four fp16 numbers by an instruction that every NEON has. `half` would check before each number whether the
/// machine has fp16 arithmetic too, and Rust's intrinsic, `vcvt_f32_f16`, is newer than the oldest Rust version that
/// this crate supports.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn widen(halves: [f16; 4]) -> [f32; 4] {
    use std::arch::{aarch64::*, asm};
    let numbers: float32x4_t;
    // SAFETY: `halves` has the 64 bits that are loaded; the instruction reads and writes only registers.
    unsafe {
        let halves = vld1_u16(halves.as_ptr().cast());
        asm!("fcvtl {:v}.4s, {:v}.4h", lateout(vreg) numbers, in(vreg) halves, options(pure, nomem, nostack));
        std::mem::transmute(numbers)
    }
}

/// `a * b + c`, fused where the target's baseline has the instruction. Elsewhere a fused multiply-add would be a call.
#[inline(always)]
fn madd(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Lanes;
    use half::f16;
    use std::arch::x86_64::*;

    macro_rules! lanes {
        ($register:ty, $count:expr, $rows:expr, $load:ident, $load_half:expr, $store:ident, $splat:ident, $fma:ident) => {
            impl Lanes for $register {
                const COUNT: usize = $count;
                const ROWS: usize = $rows;
                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    // SAFETY: the caller's promises, stated at the trait.
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn load_half(from: *const f16) -> Self {
                    // SAFETY: the caller's promises, stated at the trait.
                    unsafe { $load_half(from.cast()) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    // SAFETY: the caller's promises, stated at the trait.
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                unsafe fn splat(x: f32) -> Self {
                    // SAFETY: the caller's promises, stated at the trait.
                    unsafe { $splat(x) }
                }
                #[inline(always)]
                unsafe fn mul_add(self, b: Self, c: Self) -> Self {
                    // SAFETY: the caller's promises, stated at the trait.
                    unsafe { $fma(self, b, c) }
                }
            }
        };
    }
    lanes!(
        __m512,
        16,
        12,
        _mm512_loadu_ps,
        |from| _mm512_cvtph_ps(_mm256_loadu_si256(from)),
        _mm512_storeu_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps
    );
    lanes!(
        __m256,
        8,
        6,
        _mm256_loadu_ps,
        |from| _mm256_cvtph_ps(_mm_loadu_si128(from)),
        _mm256_storeu_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps
    );
}

/// Defines a function whose body is compiled once per instruction set.
///
/// In `fn name(args) { body }` the optimiser vectorises the loops of the body for each set. In `fn name<V>(args) { body
/// }` the body uses `V`, a [`Lanes`] type of the set. In both, `ISA` is the number of the set, 0 for the baseline.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$v:ident>)? ($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<$($v: $crate::cpu::simd::Lanes,)? const ISA: usize>($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx512($($arg: $ty),*) {
                body::<$(dispatch!(@lanes $v std::arch::x86_64::__m512),)? 2>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx2($($arg: $ty),*) {
                body::<$(dispatch!(@lanes $v std::arch::x86_64::__m256),)? 1>($($arg),*)
            }

            match $crate::cpu::simd::isa() {
                // SAFETY: `isa` has detected the features.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: likewise.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Isa::Avx2 => unsafe { avx2($($arg),*) },
                $crate::cpu::simd::Isa::Baseline => {
                    body::<$(dispatch!(@lanes $v [f32; 4]),)? 0>($($arg),*)
                }
            }
        }
    };
    (@lanes $v:ident $register:ty) => { $register };
}
pub(crate) use dispatch;

/// Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
const MAGIC: f32 = 12_582_912.0;

/// `e^x` to about 2 ulp over the finite range, without branches so that loops over it vectorise.
///
/// Cody and Waite's reduction `x = n ln 2 + r`, then a polynomial of degree 6 on `|r| <= ln 2 / 2`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.33, 88.37);
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = n * 2.121_944_4e-4 + (n * -0.693_359_4 + x);
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    f32::from_bits(p.to_bits().wrapping_add((shifted.to_bits() << 23).wrapping_sub(MAGIC.to_bits() << 23)))
}

/// `2^x` to about 2 ulp for `x` up to 127, and 2^-125 for every `x` below -125, with fused multiply-adds where the
/// instruction set `ISA` of [`dispatch!`] has them. At most two thirds of the instructions of [`exp`].
///
/// `x = n + r`, then a polynomial of degree 5 on `|r| <= 1/2` which is 1 at 0, has a slope of ln 2 there, and is off by
/// at most 1.1e-7.
#[inline(always)]
pub fn exp2<const ISA: usize>(x: f32) -> f32 {
    const LEAST: f32 = -125.0;
    let mul_add = |a: f32, b: f32, c: f32| if ISA == 0 { madd(a, b, c) } else { a.mul_add(b, c) };
    // NaN does not compare less, so it is kept.
    let x = if LEAST > x { LEAST } else { x };
    let shifted = x + MAGIC;
    let r = x - (shifted - MAGIC);
    let p = 1.330_060_5e-3;
    let p = mul_add(p, r, 9.669_691e-3);
    let p = mul_add(p, r, 5.550_558_5e-2);
    let p = mul_add(p, r, 2.402_228_3e-1);
    let p = mul_add(p, r, std::f32::consts::LN_2);
    let p = mul_add(p, r, 1.0);
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// The derivative of [`silu`].
#[inline(always)]
pub fn silu_slope(x: f32) -> f32 {
    let sigmoid = 1.0 / (1.0 + exp(-x));
    sigmoid * (1.0 + x * (1.0 - sigmoid))
}

/// `x * sigmoid(1.702 x)`.
#[inline(always)]
pub fn quick_gelu(x: f32) -> f32 {
    x / (1.0 + exp(-1.702 * x))
}

/// `1 - erf(z)` for `z >= 0`, by Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7).
#[inline(always)]
fn erfc(z: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let p = 1.061_405_4;
    let p = p * t - 1.453_152;
    let p = p * t + 1.421_413_7;
    let p = p * t - 0.284_496_72;
    let p = p * t + 0.254_829_6;
    p * t * exp(-z * z)
}

/// `x * Phi(x)`.
#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    // The tail `1 - Phi(|x|)`: Phi(x) itself for negative x, and its distance from 1 for positive x.
    let tail = 0.5 * erfc(x.abs() * std::f32::consts::FRAC_1_SQRT_2);
    if x >= 0.0 { x - x * tail } else { x * tail }
}

/// The derivative of [`gelu`]: `Phi(x) + x phi(x)`.
#[inline(always)]
pub fn gelu_slope(x: f32) -> f32 {
    const DENSITY_AT_0: f32 = 0.398_942_3;
    // Phi(x) is gelu(x) / x, but that quotient cannot be computed near zero.
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let tail = 0.5 * erfc(z);
    let phi = if x >= 0.0 { 1.0 - tail } else { tail };
    phi + x * DENSITY_AT_0 * exp(-z * z)
}

/// `max(x, 0)`. NaN does not compare less, so it is kept.
#[inline(always)]
pub fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

/// `3 tanh(x / 3)`.
#[inline(always)]
pub fn soft_clamp(x: f32) -> f32 {
    3.0 - 6.0 / (1.0 + exp(2.0 / 3.0 * x))
}

#[cfg(test)]
mod tests {
    /// Against the standard library in f64, and erf by Simpson's rule.
    #[test]
    fn elementary_functions() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01 + 0.003;
            let truth = (x as f64).exp();
            assert!(((super::exp(x) as f64 - truth) / truth).abs() < 3e-7, "exp({x})");
        }
        for i in -12500..12700 {
            let x = i as f32 * 0.01 + 0.003;
            let truth = (x as f64).exp2();
            for ours in [super::exp2::<0>(x), super::exp2::<1>(x)] {
                assert!(((ours as f64 - truth) / truth).abs() < 3e-7, "exp2({x})");
            }
        }
        for one in [super::exp(0.0), super::exp2::<0>(0.0), super::exp2::<1>(0.0)] {
            assert_eq!(one, 1.0);
        }
        assert_eq!(super::exp2::<1>(f32::NEG_INFINITY), 2f32.powi(-125));
        assert!(super::exp2::<1>(f32::NAN).is_nan());
        for i in -600..600 {
            let x = i as f64 * 0.01;
            let steps = 2000;
            let h = x / steps as f64;
            let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
            let area: f64 = (0..steps)
                .map(|k| k as f64 * h)
                .map(|a| h / 6.0 * (density(a) + 4.0 * density(a + h / 2.0) + density(a + h)))
                .sum();
            assert!((super::gelu(x as f32) as f64 - x * (0.5 + area)).abs() < 1e-6, "gelu({x})");
            let sigmoid = |t: f64| 1.0 / (1.0 + (-t).exp());
            assert!((super::silu(x as f32) as f64 - x * sigmoid(x)).abs() < 1e-6);
            assert!((super::quick_gelu(x as f32) as f64 - x * sigmoid(1.702 * x)).abs() < 1e-6);
            assert!((super::soft_clamp(x as f32) as f64 - 3.0 * (x / 3.0).tanh()).abs() < 1e-6);
        }
    }
}
