//! Launches of `kernels/layer_norm.cu`.

use super::device::Launch;
use super::folded::is_norm_folded;
use super::site::Site;
use crate::graph::{TensorId, WeightId};

/// Channels of a vector load.
const VECTOR: usize = 8;

crate::params! {
    pub(super) struct LayerNormParams {
        x: u64,
        d: u64,
        weight: u64,
        bias: u64,
        out: u64,
        rows: i64,
        channels: i32,
        warps: i32,
        eps: f32,
        padding: i32,
    }
}

pub(super) fn layer_norm(
    x: TensorId,
    (weight, bias): (WeightId, WeightId),
    eps: f32,
    out: TensorId,
    site: &Site,
) -> Launch {
    let affine =
        [weight, bias].map(|id| if is_norm_folded(site.graph(), weight, site.limits) { 0 } else { site.weight(id) });
    let addresses = [site.address(x), 0, affine[0], affine[1]];
    row_launch(addresses, eps, out, ["layer_norm_8", "layer_norm_1"], site)
}

pub(super) fn layer_norm_gradient(
    x: TensorId,
    weight: WeightId,
    eps: f32,
    d: TensorId,
    out: TensorId,
    site: &Site,
) -> Launch {
    let weight = if is_norm_folded(site.graph(), weight, site.limits) { 0 } else { site.weight(weight) };
    let addresses = [site.address(x), site.address(d), weight, 0];
    row_launch(addresses, eps, out, ["layer_norm_gradient_8", "layer_norm_gradient_1"], site)
}

/// The launch of the vector or of the scalar kernel; `[x, d, weight, bias]` are addresses.
fn row_launch(
    [x, d, weight, bias]: [u64; 4],
    eps: f32,
    out: TensorId,
    [vector, element]: [&'static str; 2],
    site: &Site,
) -> Launch {
    /// Columns that a thread holds, and rows of a block if a row is one warp.
    const SLOTS: usize = 5;
    const ROWS: usize = 4;
    let shape = site.shape(out);
    let (kernel, columns) =
        if shape.c.is_multiple_of(VECTOR) { (vector, shape.c / VECTOR) } else { (element, shape.c) };
    let warps = columns.div_ceil(32 * SLOTS);
    let rows = if warps == 1 { ROWS } else { 1 };
    let params = LayerNormParams {
        x,
        d,
        weight,
        bias,
        out: site.address(out),
        rows: shape.rows() as i64,
        channels: shape.c as i32,
        warps: warps as i32,
        eps,
        padding: 0,
    };
    let shared = if warps == 1 { 0 } else { warps * size_of::<f32>() };
    Launch::new(kernel, [shape.rows().div_ceil(rows), 1, 1], 32 * warps * rows, shared, &params)
}
