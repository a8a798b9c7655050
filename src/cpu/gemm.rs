//! The matrix product under convolutions, linear layers and attention.
//!
//! `C[m, n] = sum_k A[m, k] B[k, n]`, where a row of A is not one stretch of memory but a list of *segments*, each
//! a pointer to contiguous numbers. So one kernel serves linear layers (one segment), convolutions (one a tap and
//! source; a zero row where the tap falls outside) and concatenated inputs, with neither an im2col buffer nor a copy
//! (the indirect convolution of Dukhan, arXiv 1907.02129, on a BLIS-like loop nest).
//!
//! B is packed once, at load, into panels of [`PANEL`] columns: `[panel][k][PANEL]`, in fp16 where the checkpoint is,
//! and widened a few lines at a time while they are multiplied by many rows. A register tile has as many rows as the
//! instruction set's registers hold sums of ([`Lanes::ROWS`]), and two registers of columns, or one at a panel's end: 12x32
//! on AVX-512, 6x16 on AVX2, 12x8 on NEON. Every element of C is one chain of
//! multiply-adds in the order of k, whatever tile it falls in: results do not depend on the batch or on the threads.

use super::simd::{Lanes, dispatch};
use half::f16;
use std::ops::Range;

/// Columns of a packed panel.
pub const PANEL: usize = 32;

/// Rows of A for which a caller must give pointers: a multiple of every instruction set's tile height.
pub const ROWS: usize = 12;

/// Length of `[k, n]` once packed.
pub fn packed_len(k: usize, n: usize) -> usize {
    n.div_ceil(PANEL) * k * PANEL
}

/// A packed matrix as it is held.
#[derive(Clone, Copy)]
pub enum Matrix<'a> {
    /// In fp32.
    Single(&'a [f32]),
    /// In fp16, which is exactly what the checkpoint holds.
    Half(&'a [f16]),
}

impl<'a> Matrix<'a> {
    /// Whole lines of a panel in fp32: those held, or in `room`.
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
        }
    }
}

dispatch! {
    /// Whole lines of a panel, from fp16.
    fn widen<V>(from: &[f16], to: &mut [f32]) {
        for (from, to) in from.chunks_exact(V::COUNT).zip(to.chunks_exact_mut(V::COUNT)) {
            // SAFETY: as many numbers; `dispatch!` runs this where V's instructions exist.
            unsafe { V::load_half(from.as_ptr()).store(to.as_mut_ptr()) };
        }
    }
}

/// A stretch of k: `len` numbers of each row, `rows[i]` pointing at them.
#[derive(Clone, Copy)]
pub struct Segment {
    /// How many numbers.
    pub len: usize,
    /// Where they are in each row.
    pub rows: [*const f32; ROWS],
}

dispatch! {
    /// Adds to (or, when `first`, sets) the strip `[ROWS][PANEL]` at `c` the product of the segments' rows with the
    /// part of a panel at `b` (rows of [`PANEL`] numbers, one a k). Of the panel's columns the first `columns` are
    /// multiplied, and perhaps some more.
    ///
    /// The caller promises: every row pointer is readable for its segment's length, `b` for the segments' total, and
    /// `c` is writable for the strip.
    pub fn multiply<V>(segments: &[Segment], b: *const f32, c: *mut f32, columns: usize, first: bool) {
        // SAFETY: the caller's promise; `dispatch!` runs this where V's instructions exist.
        unsafe {
            for row in (0..ROWS).step_by(V::ROWS) {
                for column in (0..columns.min(PANEL)).step_by(2 * V::COUNT) {
                    let (b, c) = (b.add(column), c.add(row * PANEL + column));
                    match (V::ROWS, columns - column > V::COUNT) {
                        (12, true) => tile::<V, 12, 2>(segments, row, b, c, first),
                        (12, false) => tile::<V, 12, 1>(segments, row, b, c, first),
                        (_, true) => tile::<V, 6, 2>(segments, row, b, c, first),
                        (_, false) => tile::<V, 6, 1>(segments, row, b, c, first),
                    }
                }
            }
        }
    }
}

/// One register tile: `HEIGHT` rows by `WIDTH` registers.
///
/// # Safety
/// As [`multiply`] promises.
#[inline(always)]
unsafe fn tile<V: Lanes, const HEIGHT: usize, const WIDTH: usize>(
    segments: &[Segment],
    row: usize,
    b: *const f32,
    c: *mut f32,
    first: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[V::splat(0.0); WIDTH]; HEIGHT];
        if !first {
            for (i, line) in acc.iter_mut().enumerate() {
                for (j, x) in line.iter_mut().enumerate() {
                    *x = V::load(c.add(i * PANEL + j * V::COUNT));
                }
            }
        }
        let mut b = b;
        for segment in segments {
            let mut rows = [std::ptr::null(); HEIGHT];
            rows.copy_from_slice(&segment.rows[row..row + HEIGHT]);
            for k in 0..segment.len {
                let mut columns = [V::splat(0.0); WIDTH];
                for (j, x) in columns.iter_mut().enumerate() {
                    *x = V::load(b.add(j * V::COUNT));
                }
                b = b.add(PANEL);
                for (line, a) in acc.iter_mut().zip(&rows) {
                    let a = V::splat(*a.add(k));
                    for (x, column) in line.iter_mut().zip(&columns) {
                        *x = a.mul_add(*column, *x);
                    }
                }
            }
        }
        for (i, line) in acc.iter().enumerate() {
            for (j, x) in line.iter().enumerate() {
                x.store(c.add(i * PANEL + j * V::COUNT));
            }
        }
    }
}

dispatch! {
    /// Packs `columns` columns of a panel: `panel[k][j] = source[k * row + j * column]`, zeros beyond.
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

    /// Random sizes and segmentations against f64.
    #[test]
    fn multiply_matches_float64() {
        let mut seed = 1u64;
        let mut next = move || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize
        };
        for _ in 0..50 {
            let columns = 1 + next() % PANEL;
            let lens: Vec<usize> = (0..1 + next() % 4).map(|_| 1 + next() % 37).collect();
            let k: usize = lens.iter().sum();
            let mut random = |n: usize| (0..n).map(|_| (next() % 2000) as f32 / 1000.0 - 1.0).collect::<Vec<_>>();
            let (a, b) = (random(ROWS * k), random(k * PANEL));
            let mut panel = vec![9.0; packed_len(k, columns)];
            pack_panel(&b, PANEL, 1, columns, &mut panel);
            let mut start = 0;
            let segments: Vec<Segment> = lens
                .iter()
                .map(|&len| {
                    let rows = std::array::from_fn(|i| a[i * k + start..].as_ptr());
                    start += len;
                    Segment { len, rows }
                })
                .collect();
            let mut c = [f32::NAN; ROWS * PANEL];
            let (head, tail) = segments.split_at(1);
            multiply(head, panel.as_ptr(), c.as_mut_ptr(), columns, true);
            multiply(tail, panel[lens[0] * PANEL..].as_ptr(), c.as_mut_ptr(), columns, false);
            for i in 0..ROWS {
                for j in 0..columns {
                    let truth: f64 = (0..k).map(|p| a[i * k + p] as f64 * b[p * PANEL + j] as f64).sum();
                    assert!((c[i * PANEL + j] as f64 - truth).abs() < 1e-5 * (k as f64).sqrt(), "{i} {j}");
                }
            }
        }
    }

    /// Every finite number of fp16, by what its bits mean.
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
