//! Linear layers in bf16 with sums in fp32, by AMX or AVX-512 BF16 where the processor has one of them. Weights and
//! activations are rounded to nearest, to 8 significant bits.
//!
//! A panel is `[k / 2][PANEL][2]`. Each sum is one chain in the order of k, so that neither batch nor threads change a
//! bit of the result.

#[cfg(target_arch = "x86_64")]
use super::amx::{self, Operands};
use super::gemm::{PANEL, ROWS};
use super::rounded::{Block, Rounded};
use super::simd::dispatch;
use half::bf16;
use half::slice::HalfFloatSliceExt;

/// Products that one instruction adds to a sum.
const TOGETHER: usize = 2;

/// The bf16 format.
pub struct Bf16;

impl Rounded for Bf16 {
    fn suits(&self, depth: usize) -> bool {
        depth.is_multiple_of(TOGETHER)
    }

    fn row_bytes(&self, depth: usize) -> usize {
        depth * size_of::<bf16>()
    }

    fn panel_bytes(&self, depth: usize) -> usize {
        depth * PANEL * size_of::<bf16>()
    }

    fn pack(&self, numbers: &[f32], panel: &mut [u8]) {
        let panel: &mut [bf16] = bytemuck::cast_slice_mut(panel);
        for (k, line) in numbers.as_chunks::<PANEL>().0.iter().enumerate() {
            for (column, x) in line.iter().enumerate() {
                panel[(k / TOGETHER * PANEL + column) * TOGETHER + k % TOGETHER] = bf16::from_f32(*x);
            }
        }
    }

    fn round(&self, row: &[f32], bytes: &mut [u8], scale: &mut f32) {
        round(row, bytemuck::cast_slice_mut(bytes));
        *scale = 1.0;
    }

    fn multiply(&self, left: Block, panel: &[u8], sums: &mut [f32], columns: usize) {
        let (rows, depth) = (left.scales.len(), left.depth);
        assert!(left.bytes.len() >= rows.next_multiple_of(ROWS) * self.row_bytes(depth));
        assert!(sums.len() >= rows.next_multiple_of(ROWS) * PANEL);
        assert!(panel.len() == self.panel_bytes(depth) && self.suits(depth));
        #[cfg(target_arch = "x86_64")]
        if amx::suits(Operands::Bf16, self.row_bytes(depth)) {
            let sums = sums.as_mut_ptr().cast();
            // SAFETY: lengths are asserted above.
            unsafe { amx::multiply(Operands::Bf16, left.bytes.as_ptr(), (rows, 2 * depth), panel.as_ptr(), sums) };
            return;
        }
        let (left, panel): (&[bf16], &[bf16]) = (bytemuck::cast_slice(left.bytes), bytemuck::cast_slice(panel));
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("avx512bf16") && std::is_x86_feature_detected!("avx512f") {
            for row in (0..rows).step_by(ROWS) {
                // SAFETY: the features are detected; the lengths of rows and sums up to a multiple of `ROWS` are
                // asserted.
                unsafe {
                    let (left, sums) = (left.as_ptr().add(row * depth), sums.as_mut_ptr().add(row * PANEL));
                    match columns > PANEL / 2 {
                        true => x86::tile::<2>(left, depth, panel.as_ptr(), sums),
                        false => x86::tile::<1>(left, depth, panel.as_ptr(), sums),
                    }
                }
            }
            return;
        }
        products(left, depth, panel, &mut sums[..rows * PANEL]);
    }
}

dispatch! {
    /// Rounds to the nearest bf16 number, ties to even. NaN stays NaN.
    fn round(row: &[f32], to: &mut [bf16]) {
        to.convert_from_f32_slice(row);
    }
}

dispatch! {
    /// The products on processors without such instructions; slower than in fp32.
    fn products(left: &[bf16], depth: usize, panel: &[bf16], sums: &mut [f32]) {
        let (lines, _) = panel.as_chunks::<{ PANEL * TOGETHER }>();
        // A bf16 number is the upper half of the same number in fp32.
        let wide = |x: bf16| f32::from_bits(u32::from(x.to_bits()) << 16);
        for (row, sums) in left.chunks_exact(depth).zip(sums.as_chunks_mut::<PANEL>().0) {
            *sums = [0.0; PANEL];
            for (a, line) in row.as_chunks::<TOGETHER>().0.iter().zip(lines) {
                for (sum, b) in sums.iter_mut().zip(line.as_chunks::<TOGETHER>().0) {
                    *sum += wide(a[1]) * wide(b[1]) + wide(a[0]) * wide(b[0]);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::gemm::opaque;
    use super::{PANEL, ROWS, TOGETHER};
    use half::bf16;
    use std::arch::x86_64::*;

    /// A register tile of [`ROWS`] rows by `WIDTH` registers of 16 columns.
    ///
    /// # Safety
    /// `ROWS` rows of `depth` elements at `left`, a whole panel, and `ROWS` rows of sums must be valid.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn tile<const WIDTH: usize>(left: *const bf16, depth: usize, panel: *const bf16, sums: *mut f32) {
        /// The two registers differ only in type.
        fn pairs(register: __m512i) -> __m512bh {
            // SAFETY: same size, and every bit pattern is valid in both.
            unsafe { std::mem::transmute(register) }
        }
        // SAFETY: guaranteed by the caller.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); WIDTH]; ROWS];
            let rows: [*const bf16; ROWS] = std::array::from_fn(|i| opaque(left.add(i * depth)));
            for k in (0..depth).step_by(TOGETHER) {
                let line = |j: usize| pairs(_mm512_loadu_si512(panel.add(k * PANEL + j * 32).cast()));
                let b: [__m512bh; WIDTH] = std::array::from_fn(line);
                for i in 0..ROWS {
                    let a = pairs(_mm512_set1_epi32(rows[i].add(k).cast::<i32>().read_unaligned()));
                    for j in 0..WIDTH {
                        acc[i][j] = _mm512_dpbf16_ps(acc[i][j], a, b[j]);
                    }
                }
            }
            for (i, line) in acc.iter().enumerate() {
                for (j, x) in line.iter().enumerate() {
                    _mm512_storeu_ps(sums.add(i * PANEL + j * 16), *x);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random sizes, on every code path, against the products of the rounded numbers in float64.
    #[test]
    fn products_match_float64() {
        let mut seed = 9u64;
        let mut next = move || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize
        };
        for _ in 0..30 {
            let (rows, columns) = (1 + next() % 50, 1 + next() % PANEL);
            // Every other depth suits AMX.
            let depth = if rows.is_multiple_of(2) { 32 * (1 + next() % 5) } else { TOGETHER * (1 + next() % 90) };
            let mut random = |n: usize| (0..n).map(|_| (next() % 2000) as f32 / 1000.0 - 1.0).collect::<Vec<_>>();
            let (a, b) = (random(rows * depth), random(depth * PANEL));
            let padded = rows.next_multiple_of(ROWS);
            // Allocated as f32, whose alignment is enough for bf16.
            let (mut panel, mut left) = (vec![0f32; depth * PANEL / 2], vec![0f32; padded * depth / 2]);
            let (panel, left) = (bytemuck::cast_slice_mut(&mut panel), bytemuck::cast_slice_mut(&mut left));
            Bf16.pack(&b, panel);
            let mut scales = vec![0.0; rows];
            for (i, row) in a.chunks_exact(depth).enumerate() {
                Bf16.round(row, &mut left[i * 2 * depth..][..2 * depth], &mut scales[i]);
            }
            let (mut sums, mut others) = (vec![f32::NAN; padded * PANEL], vec![f32::NAN; padded * PANEL]);
            Bf16.multiply(Block { bytes: left, scales: &scales, depth }, panel, &mut sums, columns);
            let (left, panel): (&[bf16], &[bf16]) = (bytemuck::cast_slice(left), bytemuck::cast_slice(panel));
            products(left, depth, panel, &mut others[..rows * PANEL]);
            for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
                let rounded = |x: f32| bf16::from_f32(x).to_f64();
                let product = |k: usize| rounded(a[i * depth + k]) * rounded(b[k * PANEL + j]);
                let truth: f64 = (0..depth).map(product).sum();
                for sum in [sums[i * PANEL + j], others[i * PANEL + j]] {
                    assert!((sum as f64 - truth).abs() < 1e-5 * (depth as f64).sqrt(), "{sum} {truth}");
                }
            }
        }
    }
}
