//! The structure of `kernels/epilogue.cuh`, the epilogue of a matrix product.

use super::folded::as_packed;
use super::site::{Element, Site};
use super::weights::has_sums;
use crate::graph::{Conv, Graph, Op, TensorId};

crate::params! {
    pub(super) struct Epilogue {
        pub bias: u64,
        pub folded: u64,
        pub per_image: u64,
        pub residual: u64,
        pub out: u64,
        pub shift: u64,
        pub shifted: u64,
        pub channels: i32,
        pub per_image_width: i32,
        pub pixels: i32,
        pub activation: i32,
        pub full: i32,
        pub first_shifted: i32,
        pub gain: f32,
        pub bias_gain: f32,
        pub scale: f32,
        pub padding: i32,
    }
}

/// The RespoDiff shift of `x` and the shifted result, if there is one: the convolution that computes `x` writes both.
fn shift_of(graph: &Graph, x: TensorId) -> Option<(TensorId, TensorId)> {
    graph.readers(x).find_map(|node| match node.op {
        Op::Shift { x: shifted, shift } if shifted == x => Some((shift, node.output)),
        _ => None,
    })
}

/// True if `x` is shifted.
pub(super) fn is_shifted(graph: &Graph, x: TensorId) -> bool {
    shift_of(graph, x).is_some()
}

/// True if a convolution computes `x`: its kernel then also writes the shifted `x`.
pub(super) fn makes(graph: &Graph, x: TensorId) -> bool {
    graph.maker(x).is_some_and(|node| matches!(node.op, Op::Conv(_)))
}

impl Epilogue {
    pub fn new(conv: &Conv, out: TensorId, site: &Site) -> Self {
        let (output, shift) = (site.shape(out), shift_of(site.graph(), out));
        Epilogue {
            bias: conv.bias.map_or(0, |id| site.weight(id)),
            folded: if has_sums(&as_packed(site.graph().weight(conv.weight), site.limits)) {
                site.behind(conv.weight)
            } else {
                0
            },
            per_image: conv.per_image.map_or(0, |view| site.view(view)),
            residual: site.optional(conv.residual),
            out: site.address(out),
            shift: site.optional(shift.map(|(shift, _)| shift)),
            shifted: site.optional(shift.map(|(_, shifted)| shifted)),
            channels: output.c as i32,
            per_image_width: conv.per_image.map_or(0, |view| site.shape(view.tensor).c as i32),
            pixels: output.tokens() as i32,
            activation: conv.activation as i32,
            full: i32::from(site.element(out) == Element::F32),
            first_shifted: shift.map_or(0, |(shift, _)| (output.n - site.shape(shift).n) as i32),
            gain: conv.gain,
            bias_gain: conv.bias_gain,
            scale: conv.scale,
            padding: 0,
        }
    }
}
