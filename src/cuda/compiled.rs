//! The kernels as the build compiled them.

/// One fatbin a file of `kernels/`: its name and what it holds. Empty when the build found no nvcc.
pub const FATBINS: &[(&str, &[u8])] = &[];
