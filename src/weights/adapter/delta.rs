//! The differences that adapters add to a matrix, as functions of a place in it. No difference is ever held whole,
//! unless its file holds it so.
//!
//! Every number is computed in one order of operations, whatever stretch is asked for.

use rayon::prelude::*;

/// Numbers that are computed together: they stay in the L1 cache.
pub(super) const STRETCH: usize = 256;
/// Rows whose sums of squares are added up together.
const ROWS: usize = 64;

/// The product of two matrices, `[outputs, rank] x [rank, width]`.
pub(super) struct Product {
    rank: usize,
    width: usize,
    up: Vec<f32>,
    down: Vec<f32>,
}

impl Product {
    pub fn new(rank: usize, up: Vec<f32>, down: Vec<f32>) -> Self {
        Product { rank, width: down.len() / rank.max(1), up, down }
    }

    /// The product of all of it, `[outputs, width]`.
    pub fn whole(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.up.len() / self.rank.max(1) * self.width];
        out.par_chunks_mut(self.width.max(1)).enumerate().for_each(|(row, out)| {
            out.chunks_mut(STRETCH).enumerate().for_each(|(i, out)| self.write(row, i * STRETCH, out));
        });
        out
    }

    /// Writes the numbers of a row from the column `start` on.
    fn write(&self, row: usize, start: usize, out: &mut [f32]) {
        let (up, n) = (&self.up[row * self.rank..][..self.rank], out.len());
        let down = |k: usize| &self.down[k * self.width + start..][..n];
        out.fill(0.0);
        let (fours, rest) = up.as_chunks::<4>();
        for (i, [a, b, c, d]) in fours.iter().enumerate() {
            let rows = down(4 * i).iter().zip(down(4 * i + 1)).zip(down(4 * i + 2)).zip(down(4 * i + 3));
            for (x, (((w, x0), x1), x2)) in out.iter_mut().zip(rows) {
                *x += a * w + b * x0 + c * x1 + d * x2;
            }
        }
        for (i, a) in rest.iter().enumerate() {
            out.iter_mut().zip(down(4 * fours.len() + i)).for_each(|(x, w)| *x += a * w);
        }
    }
}

/// A difference from a matrix `[outputs, width]`.
pub(super) enum Delta {
    /// LoRA (Hu et al., arXiv 2106.09685), and its form for convolutions (LoCon).
    Product(Product),
    /// LoHa: the elementwise product of two (Hyeon-Woo et al., FedPara, arXiv 2108.06098).
    Hadamard(Product, Product),
    /// LoKr: the Kronecker product of two matrices (Yeh et al., LyCORIS, arXiv 2309.14859), of which the second has
    /// `outputs` rows and `width` columns.
    Kronecker {
        /// Columns of the first matrix.
        columns: usize,
        first: Vec<f32>,
        second: Vec<f32>,
        outputs: usize,
        width: usize,
    },
    /// All numbers.
    Whole(Vec<f32>),
}

impl Delta {
    /// Writes at most [`STRETCH`] numbers of a row from the column `start` on, of a matrix with rows of `row_width`
    /// numbers.
    fn write(&self, row_width: usize, row: usize, start: usize, out: &mut [f32]) {
        match self {
            Delta::Product(product) => product.write(row, start, out),
            Delta::Hadamard(first, second) => {
                first.write(row, start, out);
                let mut other = [0.0; STRETCH];
                let other = &mut other[..out.len()];
                second.write(row, start, other);
                out.iter_mut().zip(other).for_each(|(x, y)| *x *= *y);
            }
            Delta::Kronecker { columns, first, second, outputs, width } => {
                let (first, second) = (&first[row / outputs * columns..], &second[row % outputs * width..]);
                for (column, x) in (start..).zip(out) {
                    *x = first[column / width] * second[column % width];
                }
            }
            Delta::Whole(numbers) => out.copy_from_slice(&numbers[row * row_width + start..][..out.len()]),
        }
    }
}

/// The groups of numbers whose norms DoRA sets (Liu et al., arXiv 2402.09353).
#[derive(Clone, Copy)]
pub(super) enum Axis {
    /// Those of one output.
    Output,
    /// Those of one input, which has a number of taps.
    Input { taps: usize },
}

/// A difference with its scale and weight, ready to be added.
pub(super) struct Term {
    /// The adapter's weight.
    weight: f32,
    /// Multiplies the difference.
    scale: f32,
    delta: Delta,
    /// For DoRA: the factors that give each group of the changed matrix its norm.
    factors: Option<(Axis, Vec<f32>)>,
}

impl Term {
    pub fn new(weight: f32, scale: f32, delta: Delta) -> Self {
        Term { weight, scale, delta, factors: None }
    }

    /// The same with DoRA: groups of numbers of the matrix, which without changes is `base`, get `norms`.
    pub fn normed(mut self, base: &[f32], width: usize, axis: Axis, mut norms: Vec<f32>) -> Self {
        let changed = |row: usize, out: &mut [f32]| {
            out.copy_from_slice(&base[row * width..][..width]);
            for (i, out) in out.chunks_mut(STRETCH).enumerate() {
                let mut delta = [0.0; STRETCH];
                let delta = &mut delta[..out.len()];
                self.delta.write(width, row, i * STRETCH, delta);
                out.iter_mut().zip(delta).for_each(|(x, d)| *x += self.scale * *d);
            }
        };
        let rows: Vec<usize> = (0..base.len() / width.max(1)).collect();
        // Sums are made in an order that does not depend on the number of threads.
        let sums: Vec<Vec<f64>> = rows
            .par_chunks(ROWS)
            .map(|rows| {
                let mut numbers = vec![0.0; width];
                let mut sums = vec![0.0; if matches!(axis, Axis::Output) { rows.len() } else { norms.len() }];
                for (i, &row) in rows.iter().enumerate() {
                    changed(row, &mut numbers);
                    let squares = numbers.iter().map(|x| f64::from(*x).powi(2));
                    match axis {
                        Axis::Output => sums[i] = squares.sum(),
                        Axis::Input { taps } => squares.enumerate().for_each(|(column, x)| sums[column / taps] += x),
                    }
                }
                sums
            })
            .collect();
        let sums: Vec<f64> = match axis {
            Axis::Output => sums.concat(),
            Axis::Input { .. } => sums.into_iter().fold(vec![0.0; norms.len()], |mut all, part| {
                all.iter_mut().zip(part).for_each(|(a, b)| *a += b);
                all
            }),
        };
        for (norm, sum) in norms.iter_mut().zip(sums) {
            // Whatever multiplies zeros.
            *norm = if sum > 0.0 { (f64::from(*norm) / sum.sqrt()) as f32 } else { 1.0 };
        }
        self.factors = Some((axis, norms));
        self
    }

    /// Adds to `out` at most [`STRETCH`] numbers of a row from the column `start` on; `base` has them without changes.
    pub fn add(&self, base: &[f32], row_width: usize, row: usize, start: usize, out: &mut [f32]) {
        let mut delta = [0.0; STRETCH];
        let delta = &mut delta[..out.len()];
        self.delta.write(row_width, row, start, delta);
        match &self.factors {
            None => {
                let factor = self.weight * self.scale;
                out.iter_mut().zip(delta).for_each(|(x, d)| *x += factor * *d);
            }
            Some((axis, factors)) => {
                for (i, ((x, d), w)) in out.iter_mut().zip(delta).zip(base).enumerate() {
                    let factor = match axis {
                        Axis::Output => factors[row],
                        Axis::Input { taps } => factors[(start + i) / taps],
                    };
                    *x += self.weight * (factor * (w + self.scale * *d) - w);
                }
            }
        }
    }
}
