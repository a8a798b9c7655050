//! Number formats of linear layers that are less exact than fp32, one file each: how a panel of weights is packed and
//! a row of activations rounded, and the product of both.

use super::MatrixPrecision;
use super::bf16::Bf16;
use super::int8::Int8;

/// A format.
pub trait Rounded: Sync {
    /// Whether a matrix of this depth can be packed so.
    fn suits(&self, depth: usize) -> bool;

    /// Bytes of a row of activations.
    fn row_bytes(&self, depth: usize) -> usize;

    /// Bytes of a packed panel.
    fn panel_bytes(&self, depth: usize) -> usize;

    /// Packs a panel from `[k][PANEL]`.
    fn pack(&self, numbers: &[f32], panel: &mut [u8]);

    /// Rounds a row of activations; `scale` is for what the product has to know of it. What is not finite shows in the
    /// row's sums as NaN.
    fn round(&self, row: &[f32], bytes: &mut [u8], scale: &mut f32);

    /// Sets the sums `[rows][PANEL]` to the product of a block with a panel, of whose columns the first `columns` are
    /// wanted. As in [`super::gemm`], block and sums have room for rows up to a multiple of [`super::gemm::ROWS`].
    ///
    /// # Panics
    /// If a slice is too short for that.
    fn multiply(&self, left: Block, panel: &[u8], sums: &mut [f32], columns: usize);
}

/// Rounded rows, one after the other.
#[derive(Clone, Copy)]
pub struct Block<'a> {
    pub bytes: &'a [u8],
    /// One for each row.
    pub scales: &'a [f32],
    pub depth: usize,
}

impl MatrixPrecision {
    /// The format, unless it is fp32.
    pub(super) fn rounded(self) -> Option<&'static dyn Rounded> {
        match self {
            MatrixPrecision::Fp32 => None,
            MatrixPrecision::Bf16 => Some(&Bf16),
            MatrixPrecision::Int8 => Some(&Int8),
        }
    }
}
