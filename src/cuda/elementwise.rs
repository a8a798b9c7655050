//! Launches of `kernels/elementwise.cu`.

use super::device::Launch;
use super::site::Site;
use crate::graph::{Activation, Shape, TensorId, WeightId};

/// Threads of a block.
const THREADS: usize = 256;
/// Numbers of a vector load.
const VECTOR: usize = 8;

crate::params! {
    pub(super) struct ElementParams {
        x: u64,
        y: u64,
        out: u64,
        length: u64,
        activation: i32,
        channels: i32,
    }
}

impl ElementParams {
    fn new(x: TensorId, y: Option<TensorId>, activation: Activation, out: TensorId, site: &Site) -> Self {
        ElementParams {
            x: site.address(x),
            y: site.optional(y),
            out: site.address(out),
            length: site.shape(out).len() as u64,
            activation: activation as i32,
            channels: site.shape(out).c as i32,
        }
    }

    fn launch(&self, kernel: &'static str, width: usize) -> Launch {
        Launch::new(kernel, [(self.length as usize).div_ceil(width * THREADS), 1, 1], THREADS, 0, self)
    }

    /// For pairs of values and gates, with `result` the shape of GEGLU's result: by the vector or the scalar kernel, as
    /// the channels allow.
    fn pairs(mut self, result: Shape, vector: &'static str, element: &'static str) -> Launch {
        (self.length, self.channels) = (result.len() as u64, result.c as i32);
        let (kernel, width) = if result.c.is_multiple_of(VECTOR) { (vector, VECTOR) } else { (element, 1) };
        self.launch(kernel, width)
    }
}

pub(super) fn activate(x: TensorId, activation: Activation, out: TensorId, site: &Site) -> Launch {
    let params = ElementParams::new(x, None, activation, out, site);
    match activation {
        Activation::Geglu => params.pairs(site.shape(out), "geglu_8", "geglu_1"),
        _ => params.launch("activate", VECTOR),
    }
}

pub(super) fn activate_gradient(
    x: TensorId,
    activation: Activation,
    d: TensorId,
    out: TensorId,
    site: &Site,
) -> Launch {
    let params = ElementParams::new(x, Some(d), activation, out, site);
    match activation {
        Activation::Geglu => params.pairs(site.shape(d), "geglu_gradient_8", "geglu_gradient_1"),
        _ => params.launch("activate_gradient", VECTOR),
    }
}

pub(super) fn add(a: TensorId, b: TensorId, out: TensorId, site: &Site) -> Launch {
    ElementParams::new(a, Some(b), Activation::None, out, site).launch("add", VECTOR)
}

pub(super) fn mean_of_halves(x: TensorId, out: TensorId, site: &Site) -> Launch {
    let mut params = ElementParams::new(x, None, Activation::None, out, site);
    params.y = params.x + params.length * size_of::<half::f16>() as u64;
    let vectors = params.length.is_multiple_of(VECTOR as u64);
    let (kernel, width) = if vectors { ("mean_of_halves_8", VECTOR) } else { ("mean_of_halves_1", 1) };
    params.launch(kernel, width)
}

crate::params! {
    pub(super) struct ResizeGradientParams {
        d: u64,
        out: u64,
        pixels: i64,
        from_height: i32,
        from_width: i32,
        height: i32,
        width: i32,
        channels: i32,
        padding: i32,
    }
}

pub(super) fn resize_gradient(d: TensorId, out: TensorId, site: &Site) -> Launch {
    let (from, to) = (site.shape(d), site.shape(out));
    let params = ResizeGradientParams {
        d: site.address(d),
        out: site.address(out),
        pixels: to.rows() as i64,
        from_height: from.h as i32,
        from_width: from.w as i32,
        height: to.h as i32,
        width: to.w as i32,
        channels: to.c as i32,
        padding: 0,
    };
    let (kernel, width) =
        if to.c.is_multiple_of(VECTOR) { ("resize_gradient_8", VECTOR) } else { ("resize_gradient_1", 1) };
    Launch::new(kernel, [(to.len() / width).div_ceil(THREADS), 1, 1], THREADS, 0, &params)
}

crate::params! {
    pub(super) struct RowParams {
        x: u64,
        index: u64,
        table: u64,
        positions: u64,
        class_token: u64,
        out: u64,
        rows: i64,
        tokens: i32,
        channels: i32,
    }
}

impl RowParams {
    /// The parameters for a kernel that reads nothing yet.
    fn new(out: TensorId, tokens: usize, site: &Site) -> Self {
        let shape = site.shape(out);
        RowParams {
            x: 0,
            index: 0,
            table: 0,
            positions: 0,
            class_token: 0,
            out: site.address(out),
            rows: shape.rows() as i64,
            tokens: tokens as i32,
            channels: shape.c as i32,
        }
    }

    /// Launches the vector or the scalar kernel, as the channels allow.
    fn launch(&self, vector: &'static str, element: &'static str) -> Launch {
        let channels = self.channels as usize;
        let (kernel, columns) =
            if channels.is_multiple_of(VECTOR) { (vector, channels / VECTOR) } else { (element, channels) };
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
        class_token: site.weight(class),
        positions: site.weight(positions),
        ..RowParams::new(out, site.shape(out).tokens(), site)
    }
    .launch("class_token_8", "class_token_1")
}

pub(super) fn select_token(x: TensorId, index: TensorId, out: TensorId, site: &Site) -> Launch {
    RowParams { x: site.address(x), index: site.address(index), ..RowParams::new(out, site.shape(x).tokens(), site) }
        .launch("select_token_8", "select_token_1")
}

crate::params! {
    pub(super) struct SinusoidParams {
        x: u64,
        out: u64,
        length: i64,
        dim: i32,
        flip_sin_to_cos: i32,
        freq_shift: f32,
        padding: i32,
    }
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
        padding: 0,
    };
    Launch::new("sinusoid", [(length * dim / 2).div_ceil(THREADS), 1, 1], THREADS, 0, &params)
}
