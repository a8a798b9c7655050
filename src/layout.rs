//! Between NHWC, in which everything is computed, and NCHW, diffusers' order, which files and random numbers use.

/// `[n, c, pixels]` to `[n, pixels, c]`.
pub fn nchw_to_nhwc(from: &[f32], c: usize, pixels: usize, to: &mut [f32]) {
    transpose(from, c, pixels, to);
}

/// `[n, pixels, c]` to `[n, c, pixels]`.
pub fn nhwc_to_nchw(from: &[f32], c: usize, pixels: usize, to: &mut [f32]) {
    transpose(from, pixels, c, to);
}

fn transpose(from: &[f32], rows: usize, columns: usize, to: &mut [f32]) {
    for (from, to) in from.chunks_exact(rows * columns).zip(to.chunks_exact_mut(rows * columns)) {
        for (r, row) in from.chunks_exact(columns).enumerate() {
            for (c, &x) in row.iter().enumerate() {
                to[c * rows + r] = x;
            }
        }
    }
}
