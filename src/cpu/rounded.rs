//! Number formats of linear layers that are less exact than fp32, one file each: how a panel of weights is packed, how
//! a row of activations is rounded, and the product of both.

use super::Precision;
use super::bf16::Bf16;
use super::int8::Int8;

/// A format of less exact numbers.
pub trait Rounded: Sync {
    /// True if a matrix of this depth can be packed in the format.
    fn suits(&self, depth: usize) -> bool;

    /// Bytes of a rounded row of activations.
    fn row_bytes(&self, depth: usize) -> usize;

    /// Bytes of a packed panel.
    fn panel_bytes(&self, depth: usize) -> usize;

    /// Packs a panel given as `[k][PANEL]`.
    fn pack(&self, numbers: &[f32], panel: &mut [u8]);

    /// Rounds a row of activations, and stores in `scale` the number that the product has to know of it. If an
    /// activation is not finite, the sums of its row are NaN.
    fn round(&self, row: &[f32], bytes: &mut [u8], scale: &mut f32);

    /// Sets the sums `[rows][PANEL]` to the product of a block with a panel, of whose columns the first `columns` are
    /// wanted. As in [`super::gemm`], block and sums have room for rows up to a multiple of [`super::gemm::ROWS`].
    ///
    /// # Panics
    /// If a slice is too short.
    fn multiply(&self, left: Block, panel: &[u8], sums: &mut [f32], columns: usize);
}

/// Rounded rows, row-major.
#[derive(Clone, Copy)]
pub struct Block<'a> {
    pub bytes: &'a [u8],
    /// One scale per row.
    pub scales: &'a [f32],
    pub depth: usize,
}

impl Precision {
    /// The rounded format, or `None` for fp32.
    pub(super) fn rounded(self) -> Option<&'static dyn Rounded> {
        match self {
            Precision::Full => None,
            Precision::Bf16 => Some(&Bf16),
            Precision::Int8 => Some(&Int8),
        }
    }
}
