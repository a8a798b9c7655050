//! The Fréchet distance of two normal distributions (Heusel et al., arXiv 1706.08500), in float64.

use crate::{Error, Result};
use nalgebra::{DMatrix, DVector};
use std::io::Read;
use std::path::Path;

/// The mean and the covariance of features.
#[derive(Debug)]
pub struct Moments {
    mean: DVector<f64>,
    covariance: DMatrix<f64>,
}

impl Moments {
    /// Of rows of features, `[pictures, width]`. The covariance is that of `numpy.cov`: sums are divided by one less
    /// than the number of pictures.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for fewer than two pictures.
    pub fn of(rows: &[Vec<f32>]) -> Result<Self> {
        /// Pictures whose products are added at a time.
        const BLOCK: usize = 1024;
        let Some(width) = rows.first().map(Vec::len).filter(|_| rows.len() > 1) else {
            return Err(Error::invalid("images", format!("{} pictures have no covariance", rows.len()))
                .advise("give two pictures or more"));
        };
        let count = rows.len() as f64;
        let mut mean = DVector::zeros(width);
        for row in rows {
            mean.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        mean /= count;
        let mut covariance = DMatrix::zeros(width, width);
        for rows in rows.chunks(BLOCK) {
            let centred = DMatrix::from_fn(width, rows.len(), |i, picture| f64::from(rows[picture][i]) - mean[i]);
            covariance.gemm(1.0 / (count - 1.0), &centred, &centred.transpose(), 1.0);
        }
        Ok(Moments { mean, covariance })
    }

    /// Reads statistics that clean-fid or pytorch-fid saved: `mu` and `sigma` in an `.npz` file.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if it is anything else, [`crate::ErrorKind::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let bad = |problem: String| {
            Error::damaged(path, format!("not statistics of clean-fid or pytorch-fid: {problem}"))
                .advise("give an .npz file with mu and sigma")
        };
        let mut archive = zip::ZipArchive::new(std::io::Cursor::new(bytes)).map_err(|e| bad(e.to_string()))?;
        let mut array = |name: &str| -> Result<(Vec<usize>, Vec<f64>)> {
            /// Enough for a covariance of 4096 features.
            const MOST: u64 = 1 << 28;
            let member = archive.by_name(&format!("{name}.npy")).map_err(|e| bad(format!("{name}: {e}")))?;
            let mut bytes = Vec::new();
            member.take(MOST).read_to_end(&mut bytes).map_err(|e| bad(format!("{name}: {e}")))?;
            npy(&bytes).ok_or_else(|| bad(format!("{name} is no array of floating-point numbers")))
        };
        let ((shape, mean), (square, covariance)) = (array("mu")?, array("sigma")?);
        let width = mean.len();
        if shape != [width] || square != [width, width] || width == 0 {
            return Err(bad(format!("mu has shape {shape:?} and sigma {square:?}")));
        }
        if !mean.iter().chain(&covariance).all(|x| x.is_finite()) {
            return Err(bad("it holds NaN or infinity".into()));
        }
        Ok(Moments { mean: mean.into(), covariance: DMatrix::from_vec(width, width, covariance) })
    }

    /// The number of features.
    pub fn width(&self) -> usize {
        self.mean.len()
    }

    /// The Fréchet distance, `|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2))`.
    ///
    /// With any factor `C1 = L L^T`, the trace of the root is the sum of the square roots of the eigenvalues of
    /// `L^T C2 L`, which is symmetric, so that singular covariances need no offset.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] for different numbers of features.
    pub fn distance(&self, other: &Moments) -> Result<f64> {
        if self.width() != other.width() {
            let problem = format!("{} features cannot be compared with {}", self.width(), other.width());
            return Err(Error::new(crate::ErrorKind::Mismatch, crate::Subject::Run, problem)
                .advise("give statistics by the same network"));
        }
        let factor = factor(self.covariance.clone());
        let inner = factor.tr_mul(&(&other.covariance * &factor));
        let inner = (&inner + inner.transpose()) * 0.5;
        let root: f64 = match inner.nrows() {
            0 => 0.0,
            _ => inner.symmetric_eigenvalues().iter().map(|x| x.max(0.0).sqrt()).sum(),
        };
        let apart = (&self.mean - &other.mean).norm_squared();
        Ok(apart + self.covariance.trace() + other.covariance.trace() - 2.0 * root)
    }
}

/// The matrix `L`, `[n, rank]`, with `L L^T = a` for a positive semidefinite `a`: the Cholesky factorisation with
/// diagonal pivoting (Higham, Accuracy and Stability of Numerical Algorithms, section 10.3), which ends at rounding.
fn factor(mut a: DMatrix<f64>) -> DMatrix<f64> {
    let n = a.nrows();
    let least = n as f64 * f64::EPSILON * a.diagonal().max();
    let mut columns: Vec<DVector<f64>> = Vec::new();
    while columns.len() < n {
        let pivot = a.diagonal().argmax().0;
        let size = a[(pivot, pivot)];
        if size <= least {
            break;
        }
        let column = a.column(pivot) / size.sqrt();
        for j in 0..n {
            let x = column[j];
            if x != 0.0 {
                a.column_mut(j).axpy(-x, &column, 1.0);
            }
        }
        // Exactly zero, for no row is chosen twice.
        a.column_mut(pivot).fill(0.0);
        a.row_mut(pivot).fill(0.0);
        columns.push(column);
    }
    match columns.is_empty() {
        true => DMatrix::zeros(n, 0),
        false => DMatrix::from_columns(&columns),
    }
}

/// Parses numpy's format of one array, of little-endian fp32 or fp64.
fn npy(bytes: &[u8]) -> Option<(Vec<usize>, Vec<f64>)> {
    let (head, rest) = match bytes.strip_prefix(b"\x93NUMPY")? {
        [1, _, a, b, rest @ ..] => rest.split_at_checked(usize::from(u16::from_le_bytes([*a, *b])))?,
        [2 | 3, _, a, b, c, d, rest @ ..] => rest.split_at_checked(u32::from_le_bytes([*a, *b, *c, *d]) as usize)?,
        _ => return None,
    };
    let head = std::str::from_utf8(head).ok()?;
    let after = |key: &str| head.split_once(key).map(|(_, rest)| rest.trim_start_matches([':', ' ']));
    let shape = after("'shape'")?.strip_prefix('(')?.split_once(')')?.0;
    let shape: Option<Vec<usize>> =
        shape.split(',').map(str::trim).filter(|d| !d.is_empty()).map(|d| d.parse().ok()).collect();
    let shape = shape?;
    let values: Vec<f64> = match after("'descr'")? {
        kind if kind.starts_with("'<f8'") => rest.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
        kind if kind.starts_with("'<f4'") => rest.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b).into()).collect(),
        _ => return None,
    };
    // A covariance is symmetric, so the order of rows and columns does not matter.
    let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    (count == values.len()).then_some((shape, values))
}
