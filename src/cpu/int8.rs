//! Linear layers in 8-bit integers, for matrices that were packed so on request. One instruction computes 64 products
//! and sums them by fours where the processor has AVX-512 VNNI, and 16 products summed by twos with AVX2.
//!
//! Quantisation is symmetric, without zero points: each column of weights has a scale, chosen when it is packed, and
//! each row of activations has one, chosen when it is read; both map to -127 to 127 (Dettmers et al., arXiv 2208.07339,
//! section 2.1). The instruction takes unsigned numbers on the left, so 128 is added to these, and 128 times a column's
//! sum is subtracted from the accumulators again. Sums are exact in 32 bits, in any order.
//!
//! A panel is `[k / 4][PANEL][4]` bytes, then the scales of its columns, then 128 times the sums of its columns.

#[cfg(target_arch = "x86_64")]
use super::amx::{self, Operands};
use super::gemm::{PANEL, ROWS};
use super::rounded::{Block, Rounded};
use super::simd::{Isa, dispatch, isa};

/// Products that one instruction adds to a sum.
const TOGETHER: usize = 4;
/// Added to the left numbers to make them unsigned.
const OFFSET: i32 = 128;
/// Largest magnitude of a rounded number.
const MOST: f32 = 127.0;
/// Bytes of a panel in addition to its weights.
const BESIDE: usize = PANEL * (size_of::<f32>() + size_of::<i32>());

/// The 8-bit integer format.
pub struct Int8;

impl Rounded for Int8 {
    fn suits(&self, depth: usize) -> bool {
        depth.is_multiple_of(TOGETHER)
    }

    fn row_bytes(&self, depth: usize) -> usize {
        depth
    }

    fn panel_bytes(&self, depth: usize) -> usize {
        depth * PANEL + BESIDE
    }

    fn pack(&self, numbers: &[f32], panel: &mut [u8]) {
        let (weights, beside) = panel.split_at_mut(numbers.len());
        let (scales, sums) = beside.split_at_mut(PANEL * size_of::<f32>());
        let (lines, _) = numbers.as_chunks::<PANEL>();
        let mut highest = [0.0f32; PANEL];
        for line in lines {
            highest.iter_mut().zip(line).for_each(|(highest, x)| *highest = highest.max(x.abs()));
        }
        let mut totals = [0i32; PANEL];
        for (k, line) in lines.iter().enumerate() {
            for (column, x) in line.iter().enumerate() {
                let rounded = if highest[column] > 0.0 { (x * (MOST / highest[column])).round() as i8 } else { 0 };
                weights[(k / TOGETHER * PANEL + column) * TOGETHER + k % TOGETHER] = rounded as u8;
                totals[column] += OFFSET * i32::from(rounded);
            }
        }
        for column in 0..PANEL {
            let place = column * size_of::<f32>()..(column + 1) * size_of::<f32>();
            scales[place.clone()].copy_from_slice(&(highest[column] / MOST).to_ne_bytes());
            sums[place].copy_from_slice(&totals[column].to_ne_bytes());
        }
    }

    fn round(&self, row: &[f32], bytes: &mut [u8], scale: &mut f32) {
        round_row(row, bytes, scale);
    }

    fn multiply(&self, left: Block, panel: &[u8], sums: &mut [f32], columns: usize) {
        let Block { bytes: left, scales, depth } = left;
        let rows = scales.len();
        assert!(left.len() >= rows.next_multiple_of(ROWS) * depth);
        assert!(sums.len() >= rows.next_multiple_of(ROWS) * PANEL);
        assert!(panel.len() == self.panel_bytes(depth) && self.suits(depth));
        let (weights, beside) = panel.split_at(depth * PANEL);
        let integers: &mut [i32] = bytemuck::cast_slice_mut(sums);
        match isa() {
            #[cfg(target_arch = "x86_64")]
            _ if amx::suits(Operands::Int8, depth) => {
                let sums = integers.as_mut_ptr().cast();
                // SAFETY: lengths are asserted above.
                unsafe { amx::multiply(Operands::Int8, left.as_ptr(), (rows, depth), weights.as_ptr(), sums) };
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 if std::is_x86_feature_detected!("avx512vnni") => {
                for row in (0..rows).step_by(ROWS) {
                    // SAFETY: the features are detected; the lengths of rows and sums up to a multiple of `ROWS` are
                    // asserted.
                    unsafe {
                        let (left, sums) = (left.as_ptr().add(row * depth), integers.as_mut_ptr().add(row * PANEL));
                        match columns > PANEL / 2 {
                            true => x86::tile_512::<2>(left, depth, weights.as_ptr(), sums),
                            false => x86::tile_512::<1>(left, depth, weights.as_ptr(), sums),
                        }
                    }
                }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx2 => {
                for column in (0..columns.min(PANEL)).step_by(8) {
                    for row in (0..rows).step_by(x86::ROWS_256) {
                        // SAFETY: likewise; `ROWS` is a multiple of `ROWS_256`.
                        unsafe {
                            let sums = integers.as_mut_ptr().add(row * PANEL + column);
                            let weights = weights.as_ptr().add(column * TOGETHER);
                            x86::tile_256(left.as_ptr().add(row * depth), depth, weights, sums);
                        }
                    }
                }
            }
            Isa::Baseline => products(left, depth, weights, &mut integers[..rows * PANEL]),
        }
        scale(sums, beside, scales);
    }
}

dispatch! {
    /// Rounds a row of activations and stores its scale in `scale`: NaN if an activation is not finite.
    fn round_row(row: &[f32], bytes: &mut [u8], scale: &mut f32) {
        let (mut highest, mut strange) = ([0.0f32; PANEL], [0.0f32; PANEL]);
        let (chunks, rest) = row.as_chunks::<PANEL>();
        for chunk in chunks {
            for (i, x) in chunk.iter().enumerate() {
                highest[i] = if x.abs() > highest[i] { x.abs() } else { highest[i] };
                strange[i] += x * 0.0;
            }
        }
        let rest_highest = rest.iter().fold(0.0f32, |highest, x| highest.max(x.abs()));
        let highest = highest.iter().fold(rest_highest, |a, b| a.max(*b));
        let strange = strange.iter().sum::<f32>() + rest.iter().map(|x| x * 0.0).sum::<f32>();
        *scale = highest / MOST + strange;
        let inverse = if highest > 0.0 { MOST / highest } else { 0.0 };
        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low byte.
        const MAGIC: f32 = 12_582_912.0 + OFFSET as f32;
        bytes.iter_mut().zip(row).for_each(|(byte, x)| *byte = (x * inverse + MAGIC).to_bits() as u8);
    }
}

dispatch! {
    /// The products on processors without such instructions; slower than in fp32.
    fn products(left: &[u8], depth: usize, weights: &[u8], sums: &mut [i32]) {
        let (lines, _) = weights.as_chunks::<{ PANEL * TOGETHER }>();
        for (row, sums) in left.chunks_exact(depth).zip(sums.as_chunks_mut::<PANEL>().0) {
            *sums = [0; PANEL];
            for (a, line) in row.as_chunks::<TOGETHER>().0.iter().zip(lines) {
                for (sum, b) in sums.iter_mut().zip(line.as_chunks::<TOGETHER>().0) {
                    *sum += (0..TOGETHER).map(|i| i32::from(a[i]) * i32::from(b[i] as i8)).sum::<i32>();
                }
            }
        }
    }
}

dispatch! {
    /// Turns the integer sums into the numbers that they stand for, in place.
    fn scale(sums: &mut [f32], beside: &[u8], scales: &[f32]) {
        let (columns, totals) = beside.split_at(PANEL * size_of::<f32>());
        let columns: [f32; PANEL] = bytemuck::pod_read_unaligned(columns);
        let totals: [i32; PANEL] = bytemuck::pod_read_unaligned(totals);
        for (sums, row) in sums.as_chunks_mut::<PANEL>().0.iter_mut().zip(scales) {
            for ((x, column), total) in sums.iter_mut().zip(&columns).zip(&totals) {
                *x = (x.to_bits() as i32 - total) as f32 * (column * row);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::gemm::opaque;
    use super::{PANEL, ROWS, TOGETHER};
    use std::arch::x86_64::*;

    /// Rows of a register tile in AVX2.
    pub const ROWS_256: usize = 6;

    /// A register tile of [`ROWS_256`] rows by eight columns, with products of 16-bit numbers. A register holds four
    /// columns, each as the sum of its even pairs and the sum of its odd pairs.
    ///
    /// # Safety
    /// As for [`tile_512`], with fewer rows and columns.
    #[target_feature(enable = "avx2")]
    pub unsafe fn tile_256(left: *const u8, depth: usize, weights: *const u8, sums: *mut i32) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let mut acc = [[_mm256_setzero_si256(); 2]; ROWS_256];
            let rows: [*const u8; ROWS_256] = std::array::from_fn(|i| opaque(left.add(i * depth)));
            for k in (0..depth).step_by(TOGETHER) {
                let wide =
                    |half: usize| _mm256_cvtepi8_epi16(_mm_loadu_si128(weights.add(k * PANEL + 16 * half).cast()));
                let b = [wide(0), wide(1)];
                for i in 0..ROWS_256 {
                    let four = _mm_set1_epi32(rows[i].add(k).cast::<i32>().read_unaligned());
                    let a = _mm256_cvtepu8_epi16(four);
                    for j in 0..2 {
                        acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(a, b[j]));
                    }
                }
            }
            for (i, [low, high]) in acc.into_iter().enumerate() {
                // Columns 0 1 4 5, then 2 3 6 7, which the permutation puts in order.
                let pairs = _mm256_hadd_epi32(low, high);
                let columns = _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs);
                _mm256_storeu_si256(sums.add(i * PANEL).cast(), columns);
            }
        }
    }

    /// A register tile of [`ROWS`] rows by `WIDTH` registers of 16 columns.
    ///
    /// # Safety
    /// `ROWS` rows of `depth` bytes at `left`, a panel's weights, and `ROWS` rows of sums must be valid.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub unsafe fn tile_512<const WIDTH: usize>(left: *const u8, depth: usize, weights: *const u8, sums: *mut i32) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let mut acc = [[_mm512_setzero_si512(); WIDTH]; ROWS];
            let rows: [*const u8; ROWS] = std::array::from_fn(|i| opaque(left.add(i * depth)));
            for k in (0..depth).step_by(TOGETHER) {
                let b: [__m512i; WIDTH] =
                    std::array::from_fn(|j| _mm512_loadu_si512(weights.add(k * PANEL + j * 64).cast()));
                for i in 0..ROWS {
                    let a = _mm512_set1_epi32(rows[i].add(k).cast::<i32>().read_unaligned());
                    for j in 0..WIDTH {
                        acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], a, b[j]);
                    }
                }
            }
            for (i, line) in acc.iter().enumerate() {
                for (j, x) in line.iter().enumerate() {
                    _mm512_storeu_si512(sums.add(i * PANEL + j * 16).cast(), *x);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random sizes: products of the rounded numbers are exact, and rounding is off by at most half a step.
    #[test]
    fn products_of_rounded_numbers_are_exact() {
        let mut seed = 5u64;
        let mut next = move || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize
        };
        for _ in 0..30 {
            let (rows, columns) = (1 + next() % 50, 1 + next() % PANEL);
            // Every other depth suits AMX.
            let depth = if rows.is_multiple_of(2) { 64 * (1 + next() % 5) } else { TOGETHER * (1 + next() % 40) };
            let mut random = |n: usize| (0..n).map(|_| (next() % 2000) as f32 / 100.0 - 10.0).collect::<Vec<_>>();
            let (a, b) = (random(rows * depth), random(depth * PANEL));
            let mut panel = vec![0; Int8.panel_bytes(depth)];
            Int8.pack(&b, &mut panel);
            let padded = rows.next_multiple_of(ROWS);
            let (mut bytes, mut scales) = (vec![0; padded * depth], vec![0.0; rows]);
            for (i, row) in a.chunks_exact(depth).enumerate() {
                round_row(row, &mut bytes[i * depth..][..depth], &mut scales[i]);
            }
            let step = |numbers: &mut dyn Iterator<Item = f32>| numbers.fold(0.0f32, |a, x| a.max(x.abs())) / MOST;
            let rounded = |x: f32, step: f32| (x as f64 / step as f64).round();
            let mut sums = vec![f32::NAN; padded * PANEL];
            Int8.multiply(Block { bytes: &bytes, scales: &scales, depth }, &panel, &mut sums, columns);
            // The other code paths must give the same integers.
            let mut anywhere = vec![0; padded * PANEL];
            products(&bytes, depth, &panel[..depth * PANEL], &mut anywhere[..rows * PANEL]);
            #[cfg(target_arch = "x86_64")]
            if std::is_x86_feature_detected!("avx2") {
                let mut tile = [0; x86::ROWS_256 * PANEL];
                for column in (0..PANEL).step_by(8) {
                    // SAFETY: `bytes` has at least as many rows as a tile, the panel is whole, and `tile` has room for
                    // the sums.
                    unsafe {
                        let weights = panel.as_ptr().add(column * TOGETHER);
                        x86::tile_256(bytes.as_ptr(), depth, weights, tile.as_mut_ptr().add(column));
                    }
                }
                let several = rows.min(x86::ROWS_256) * PANEL;
                assert_eq!(tile[..several], anywhere[..several]);
            }
            for i in 0..rows {
                let row = step(&mut a[i * depth..][..depth].iter().copied());
                assert_eq!(row, scales[i]);
                for j in 0..columns {
                    let column = step(&mut (0..depth).map(|k| b[k * PANEL + j]));
                    let product = |k: usize| rounded(a[i * depth + k], row) * rounded(b[k * PANEL + j], column);
                    let whole: f64 = (0..depth).map(product).sum();
                    let truth = whole * row as f64 * column as f64;
                    // A number halfway between two steps may be rounded either way.
                    let slack = 2.0 * MOST as f64 * row as f64 * column as f64;
                    assert!((sums[i * PANEL + j] as f64 - truth).abs() < slack, "{} {truth}", sums[i * PANEL + j]);
                    let offset: i32 = (0..depth)
                        .map(|k| i32::from(panel[(k / TOGETHER * PANEL + j) * TOGETHER + k % TOGETHER] as i8) * OFFSET)
                        .sum();
                    let same = (anywhere[i * PANEL + j] - offset) as f32 * (column * row);
                    assert_eq!(sums[i * PANEL + j], same);
                }
            }
        }
    }

    /// Activations that are not finite give a scale of NaN, and a row of zeros stays zeros.
    #[test]
    fn rows_that_are_not_finite_have_no_scale() {
        for (strange, place) in [(f32::NAN, 3), (f32::INFINITY, 40), (f32::NEG_INFINITY, 35)] {
            let mut row = vec![1.0; 44];
            row[place] = strange;
            let (mut bytes, mut scale) = (vec![0; 44], 0.0);
            round_row(&row, &mut bytes, &mut scale);
            assert!(scale.is_nan(), "{strange}");
        }
        let (mut bytes, mut scale) = (vec![0; 44], 1.0);
        round_row(&[0.0; 44], &mut bytes, &mut scale);
        assert_eq!((scale, &bytes[..]), (0.0, &[OFFSET as u8; 44][..]));
    }
}
