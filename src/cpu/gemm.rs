//! The matrix product that convolutions, linear layers and attention are built on.
//!
//! `C[m, n] = sum_k A[m, k] B[k, n]`. Callers gather rows of A into cache blocks: the pixels under the taps of a
//! convolution, the queries of a head. A block that is multiplied by many columns stays in the L2 cache, and is
//! contiguous whatever it was gathered from, so that it exhausts neither the TLB nor the sets of a cache.
//!
//! B is packed once, at load, into panels of [`PANEL`] columns: `[panel][k][PANEL]`, in fp16 where the checkpoint is.
//! Panels in fp16 are widened a few lines at a time when they are multiplied by many rows. The micro-kernel's register
//! tile has as many rows as the instruction set has accumulators for ([`Lanes::ROWS`]), and two registers of columns,
//! or one at the end of a panel: 12x32 on AVX-512, 6x16 on AVX2, 6x8 on SSE2, 12x8 on NEON. Every element of C is one
//! chain of multiply-adds in the order of k, whichever tile it falls in, so results depend neither on the batch nor on
//! the threads.

use super::rounded::Rounded;
use super::simd::{Lanes, dispatch};
use half::f16;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use std::arch::asm;
use std::ops::Range;

/// Columns of a packed panel.
pub const PANEL: usize = 32;

/// Blocks have room for a multiple of this many rows, itself a multiple of every instruction set's tile height.
pub const ROWS: usize = 12;

/// Length of a packed `[k, n]` matrix.
pub fn packed_len(k: usize, n: usize) -> usize {
    n.div_ceil(PANEL) * k * PANEL
}

/// A packed matrix in the format in which memory holds it.
#[derive(Clone, Copy)]
pub enum Matrix<'a> {
    /// In fp32.
    Single(&'a [f32]),
    /// In fp16, exactly as in the checkpoint.
    Half(&'a [f16]),
    /// Panels in a less exact format.
    Rounded(&'a [u8], &'static dyn Rounded),
}

impl<'a> Matrix<'a> {
    /// Whole lines of a panel in fp32: borrowed if the matrix is in fp32, else widened into `room`.
    ///
    /// # Panics
    /// For a rounded matrix.
    pub fn lines<'b>(self, range: Range<usize>, room: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        match self {
            Matrix::Single(numbers) => &numbers[range],
            Matrix::Half(numbers) => {
                let room = &mut room[..range.len()];
                widen(&numbers[range], room);
                room
            }
            Matrix::Rounded(..) => unreachable!("rounded matrices have kernels of their own"),
        }
    }
}

dispatch! {
    /// Widens whole lines of a panel from fp16.
    fn widen<V>(from: &[f16], to: &mut [f32]) {
        for (from, to) in from.chunks_exact(V::COUNT).zip(to.chunks_exact_mut(V::COUNT)) {
            // SAFETY: both chunks have `V::COUNT` elements; `dispatch!` runs this only where V's instructions exist.
            unsafe { V::load_half(from.as_ptr()).store(to.as_mut_ptr()) };
        }
    }
}

/// A block of the left matrix: `rows` rows of `depth` elements, each `pitch` elements after the previous one.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    /// Holds `rows` rounded up to a multiple of [`ROWS`]. The sums of the rows beyond `rows` have no meaning.
    pub numbers: &'a [f32],
    pub pitch: usize,
    pub rows: usize,
    pub depth: usize,
}

dispatch! {
    /// Adds to the sums (or sets them, if `first`) the product of a block with a part of a panel: `depth` lines of
    /// [`PANEL`] elements. At least the first `columns` of its columns are multiplied. Each row of the sums begins
    /// `pitch` elements after the previous one; like those of the block, the rows are rounded up to a multiple of
    /// [`ROWS`].
    ///
    /// # Panics
    /// If a slice is too short.
    pub fn multiply<V>(left: Left, panel: &[f32], sums: &mut [f32], pitch: usize, columns: usize, first: bool) {
        let Some(last) = left.rows.next_multiple_of(ROWS).checked_sub(1) else { return };
        assert!(left.numbers.len() >= last * left.pitch + left.depth);
        assert!(panel.len() >= left.depth * PANEL);
        assert!(sums.len() >= last * pitch + PANEL);
        // All rows use one pair of column registers before the next pair is begun, so that less of the panel is live.
        for column in (0..columns.min(PANEL)).step_by(2 * V::COUNT) {
            for row in (0..left.rows).step_by(V::ROWS) {
                // SAFETY: lengths are asserted above; `dispatch!` runs this only where V's instructions exist.
                unsafe {
                    let a = left.numbers.as_ptr().add(row * left.pitch);
                    let b = panel.as_ptr().add(column);
                    let c = sums.as_mut_ptr().add(row * pitch + column);
                    let (a, c) = ((a, left.pitch), (c, pitch));
                    match (V::ROWS, columns - column > V::COUNT) {
                        (12, true) => tile::<V, 12, 2>(a, left.depth, b, c, first),
                        (12, false) => tile::<V, 12, 1>(a, left.depth, b, c, first),
                        (_, true) => tile::<V, 6, 2>(a, left.depth, b, c, first),
                        (_, false) => tile::<V, 6, 1>(a, left.depth, b, c, first),
                    }
                }
            }
        }
    }
}

/// The micro-kernel: one register tile of `HEIGHT` rows by `WIDTH` registers. `a_pitch` and `c_pitch` are the distances
/// between rows.
///
/// # Safety
/// `HEIGHT` rows of `depth` elements at `a`, `depth` lines of [`PANEL`] at `b`, and the tile's part of `HEIGHT` rows at
/// `c` must be valid, and V's instructions available.
#[inline(always)]
unsafe fn tile<V: Lanes, const HEIGHT: usize, const WIDTH: usize>(
    (a, a_pitch): (*const f32, usize),
    depth: usize,
    b: *const f32,
    (c, c_pitch): (*mut f32, usize),
    first: bool,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let mut acc = [[V::splat(0.0); WIDTH]; HEIGHT];
        if !first {
            for (i, line) in acc.iter_mut().enumerate() {
                for (j, x) in line.iter_mut().enumerate() {
                    *x = V::load(c.add(i * c_pitch + j * V::COUNT));
                }
            }
        }
        let rows: [*const f32; HEIGHT] = std::array::from_fn(|i| opaque(a.add(i * a_pitch)));
        for k in 0..depth {
            let columns: [V; WIDTH] = std::array::from_fn(|j| V::load(b.add(k * PANEL + j * V::COUNT)));
            for (line, row) in acc.iter_mut().zip(&rows) {
                let a = V::splat(*row.add(k));
                for (x, column) in line.iter_mut().zip(&columns) {
                    *x = a.mul_add(*column, *x);
                }
            }
        }
        for (i, line) in acc.iter().enumerate() {
            for (j, x) in line.iter().enumerate() {
                x.store(c.add(i * c_pitch + j * V::COUNT));
            }
        }
    }
}

/// Returns the pointer, hidden from the optimiser. Otherwise the optimiser sees that rows have a common pitch, keeps a
/// single pointer, and computes the others by a chain of additions in every iteration of the inner loop.
#[inline(always)]
pub fn opaque<T>(pointer: *const T) -> *const T {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    let pointer = {
        let mut pointer = pointer;
        // SAFETY: the block holds no instruction, so nothing is read.
        #[allow(clippy::pointers_in_nomem_asm_block)]
        unsafe {
            asm!("/* {} */", inout(reg) pointer, options(pure, nomem, nostack, preserves_flags))
        };
        pointer
    };
    pointer
}

dispatch! {
    /// Packs `columns` columns of a panel: `panel[k][j] = source[k * row + j * column]`, and zeros in the columns
    /// beyond.
    pub fn pack_panel(source: &[f32], row: usize, column: usize, columns: usize, panel: &mut [f32]) {
        if column == 1 {
            for (k, line) in panel.chunks_exact_mut(PANEL).enumerate() {
                line[..columns].copy_from_slice(&source[k * row..][..columns]);
                line[columns..].fill(0.0);
            }
        } else {
            for j in 0..PANEL {
                let lines = panel.chunks_exact_mut(PANEL);
                match j < columns {
                    true => lines.zip(source[j * column..].iter().step_by(row)).for_each(|(line, x)| line[j] = *x),
                    false => lines.for_each(|line| line[j] = 0.0),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random sizes and pitches, in two stretches of k, against f64. Elements beside the sums must stay as they are.
    #[test]
    fn multiply_matches_float64() {
        let mut seed = 1u64;
        let mut next = move || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize
        };
        for _ in 0..50 {
            let (columns, rows) = (1 + next() % PANEL, 1 + next() % 40);
            let (head, tail) = (1 + next() % 90, next() % 90);
            let (k, padded) = (head + tail, rows.next_multiple_of(ROWS));
            let (a_pitch, c_pitch) = (k + next() % 9, PANEL + next() % 9);
            let mut random = |n: usize| (0..n).map(|_| (next() % 2000) as f32 / 1000.0 - 1.0).collect::<Vec<_>>();
            let (a, b) = (random(padded * a_pitch), random(k * PANEL));
            let mut panel = vec![9.0; packed_len(k, columns)];
            pack_panel(&b, PANEL, 1, columns, &mut panel);
            let mut c = vec![f32::NAN; padded * c_pitch];
            let left = |from: usize, depth| Left { numbers: &a[from..], pitch: a_pitch, rows, depth };
            multiply(left(0, head), &panel, &mut c, c_pitch, columns, true);
            multiply(left(head, tail), &panel[head * PANEL..], &mut c, c_pitch, columns, false);
            for (i, row) in c.chunks_exact(c_pitch).enumerate() {
                for (j, &sum) in row.iter().enumerate() {
                    if i < rows && j < columns {
                        let truth: f64 = (0..k).map(|p| a[i * a_pitch + p] as f64 * b[p * PANEL + j] as f64).sum();
                        assert!((sum as f64 - truth).abs() < 1e-5 * (k as f64).sqrt(), "{i} {j}");
                    } else if j >= PANEL {
                        assert!(sum.is_nan(), "{i} {j}");
                    }
                }
            }
        }
    }

    /// Every finite fp16 number, against the value that its bits define.
    #[test]
    fn widening_is_exact() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let mut room = vec![f32::NAN; halves.len()];
        for (half, wide) in halves.iter().zip(Matrix::Half(&halves).lines(0..halves.len(), &mut room)) {
            let (exponent, fraction) = (half.to_bits() >> 10 & 31, half.to_bits() & 1023);
            let size = match exponent {
                0 => fraction as f32 * 2f32.powi(-24),
                1..31 => (1024 + fraction) as f32 * 2f32.powi(exponent as i32 - 25),
                _ => continue,
            };
            assert_eq!(*wide, if half.to_bits() >> 15 == 1 { -size } else { size }, "{half:?}");
        }
    }
}
