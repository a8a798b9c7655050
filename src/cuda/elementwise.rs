//! Launches of `kernels/elementwise.cu`.

use super::device::Launch;
use super::program::Site;
use crate::graph::{Activation, TensorId, WeightId};
use bytemuck::NoUninit;

/// Threads of a block.
const THREADS: usize = 256;
/// Numbers of a vector load.
const VECTOR: usize = 8;

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct ActivateParams {
    x: u64,
    out: u64,
    length: u64,
    activation: i32,
    unused: i32,
}

pub(super) fn activate(x: TensorId, activation: Activation, out: TensorId, site: &Site) -> Launch {
    let length = site.shape(out).len();
    let params = ActivateParams {
        x: site.address(x),
        out: site.address(out),
        length: length as u64,
        activation: activation as i32,
        unused: 0,
    };
    Launch::new("activate", [length.div_ceil(VECTOR * THREADS), 1, 1], THREADS, 0, &params)
}

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct RowParams {
    x: u64,
    index: u64,
    table: u64,
    positions: u64,
    class: u64,
    out: u64,
    rows: i64,
    tokens: i32,
    channels: i32,
}

impl RowParams {
    /// What reads nothing yet.
    fn new(out: TensorId, tokens: usize, site: &Site) -> Self {
        let shape = site.shape(out);
        RowParams {
            x: 0,
            index: 0,
            table: 0,
            positions: 0,
            class: 0,
            out: site.address(out),
            rows: shape.rows() as i64,
            tokens: tokens as i32,
            channels: shape.c as i32,
        }
    }

    /// By vectors or by elements, as the channels allow.
    fn launch(&self, vector: &'static str, element: &'static str) -> Launch {
        let channels = self.channels as usize;
        let (kernel, columns) = if channels % VECTOR == 0 { (vector, channels / VECTOR) } else { (element, channels) };
        Launch::new(kernel, [(self.rows as usize * columns).div_ceil(THREADS), 1, 1], THREADS, 0, self)
    }
}

pub(super) fn embed(ids: TensorId, tokens: WeightId, positions: WeightId, out: TensorId, site: &Site) -> Launch {
    RowParams {
        index: site.address(ids),
        table: site.weight(tokens),
        positions: site.weight(positions),
        ..RowParams::new(out, site.shape(out).tokens(), site)
    }
    .launch("embed_8", "embed_1")
}

pub(super) fn class_token(x: TensorId, class: WeightId, positions: WeightId, out: TensorId, site: &Site) -> Launch {
    RowParams {
        x: site.address(x),
        class: site.weight(class),
        positions: site.weight(positions),
        ..RowParams::new(out, site.shape(out).tokens(), site)
    }
    .launch("class_token_8", "class_token_1")
}

pub(super) fn select_token(x: TensorId, index: TensorId, out: TensorId, site: &Site) -> Launch {
    RowParams { x: site.address(x), index: site.address(index), ..RowParams::new(out, site.shape(x).tokens(), site) }
        .launch("select_token_8", "select_token_1")
}

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct SinusoidParams {
    x: u64,
    out: u64,
    length: i64,
    dim: i32,
    flip_sin_to_cos: i32,
    freq_shift: f32,
    unused: i32,
}

pub(super) fn sinusoid(
    x: TensorId,
    dim: usize,
    flip_sin_to_cos: bool,
    freq_shift: f32,
    out: TensorId,
    site: &Site,
) -> Launch {
    let length = site.shape(x).len();
    let params = SinusoidParams {
        x: site.address(x),
        out: site.address(out),
        length: length as i64,
        dim: dim as i32,
        flip_sin_to_cos: flip_sin_to_cos as i32,
        freq_shift,
        unused: 0,
    };
    Launch::new("sinusoid", [(length * dim / 2).div_ceil(THREADS), 1, 1], THREADS, 0, &params)
}
