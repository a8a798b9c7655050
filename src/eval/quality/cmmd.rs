//! CMMD (Jayasumana et al., arXiv 2401.09603): the maximum mean discrepancy between CLIP's embeddings.

use nalgebra::DMatrix;
use rayon::prelude::*;

/// Bandwidth of the Gaussian kernel.
const SIGMA: f64 = 10.0;
/// Factor that makes the numbers readable.
const SCALE: f64 = 1000.0;
/// Embeddings of a block of the kernel matrix.
const BLOCK: usize = 256;

/// `1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y))` with `k(a, b) = exp(-|a - b|^2 / 200)`: the biased estimator
/// of the authors' code (Gretton et al., JMLR 13, equation 5), in fp64, since nearly all of the three means cancels.
/// Rows are embeddings of length 1.
pub fn cmmd(x: &[Vec<f32>], y: &[Vec<f32>]) -> f64 {
    let (x, y) = (blocks(x), blocks(y));
    SCALE * (mean(&x, &x) + mean(&y, &y) - 2.0 * mean(&x, &y))
}

/// Columns are embeddings.
fn blocks(rows: &[Vec<f32>]) -> Vec<DMatrix<f64>> {
    let block = |rows: &[Vec<f32>]| DMatrix::from_fn(rows[0].len(), rows.len(), |i, j| f64::from(rows[j][i]));
    rows.chunks(BLOCK).map(block).collect()
}

/// The mean of the kernel less 1, over all pairs. `expm1` keeps the digits that are lost beside 1; the ones cancel.
fn mean(x: &[DMatrix<f64>], y: &[DMatrix<f64>]) -> f64 {
    let pairs: Vec<_> = x.iter().flat_map(|x| y.iter().map(move |y| (x, y))).collect();
    let sum = |&(x, y): &(&DMatrix<f64>, &DMatrix<f64>)| -> f64 {
        let norms = |m: &DMatrix<f64>| m.column_iter().map(|column| column.norm_squared()).collect::<Vec<_>>();
        let (rows, columns) = (norms(x), norms(y));
        let products = x.tr_mul(y);
        let kernel = |(j, column): (usize, &f64)| -> f64 {
            let products = products.column(j);
            let squares = rows.iter().zip(products.iter()).map(|(row, xy)| row + column - 2.0 * xy);
            squares.map(|square| (-square / (2.0 * SIGMA * SIGMA)).exp_m1()).sum()
        };
        columns.iter().enumerate().map(kernel).sum()
    };
    // The sums are added in order, whatever thread computed them.
    let sums: Vec<f64> = pairs.par_iter().map(sum).collect();
    let count = |m: &[DMatrix<f64>]| m.iter().map(DMatrix::ncols).sum::<usize>() as f64;
    sums.iter().sum::<f64>() / (count(x) * count(y))
}
