//! Layer norms without a launch. Where `kernels/conv_hopper.cu` computes both what is normalised and the products that
//! read the result, the first product leaves moments of its rows, and the second one normalises its own sums.
//!
//! The scale and shift of such a norm are folded into the matrices that read it, whatever the shape of the images,
//! because weights are loaded before shapes are known. Therefore these products have no other kernels, however small
//! they are. Otherwise a launch would normalise, and its rounded rows would be multiplied by weights that are rounded
//! once more. That case is left to networks with channels that TMA cannot fetch.

use super::conv_hopper;
use super::device::Limits;
use super::moments;
use super::tiles::STEP;
use crate::graph::{Activation, Conv, Graph, Node, Op, TensorId, WeightId, WeightSpec};

/// A layer norm that is computed by the products that read it.
pub(super) struct Norm {
    /// The activation that is normalised, which the products read in place of the norm's result.
    pub x: TensorId,
    pub eps: f32,
}

/// True if a matrix contains the scale and shift of the layer norm whose result it multiplies.
pub(super) fn is_folded(spec: &WeightSpec, limits: Limits) -> bool {
    let width = spec.width;
    limits.capability == 90 && spec.norm.is_some() && width.is_multiple_of(STEP) && moments::of_rows(width).is_some()
}

/// The weight as it is packed: without its norm, if that is not folded into it.
pub(super) fn as_packed(spec: &WeightSpec, limits: Limits) -> WeightSpec {
    WeightSpec { norm: spec.norm.clone().filter(|_| is_folded(spec, limits)), ..spec.clone() }
}

/// True if the matrices that multiply the result of the layer norm with this scale contain its scale and shift.
pub(super) fn is_norm_folded(graph: &Graph, scale: WeightId, limits: Limits) -> bool {
    let name = &graph.weight(scale).names[0];
    let names = |spec: &WeightSpec| spec.norm.as_ref().is_some_and(|[scale, _]| scale == name);
    graph.weights().iter().any(|spec| names(spec) && is_folded(spec, limits))
}

/// The layer norm that a convolution computes itself, if it reads the result of one.
pub(super) fn norm(graph: &Graph, conv: &Conv, limits: Limits) -> Option<Norm> {
    match graph.maker(conv.sources.x)?.op {
        Op::LayerNorm { x, eps, .. } if has_no_launch(graph, conv.sources.x, limits) => Some(Norm { x, eps }),
        _ => None,
    }
}

/// True if `out` is the result of a layer norm that is computed by the products that read it.
pub(super) fn has_no_launch(graph: &Graph, out: TensorId, limits: Limits) -> bool {
    let Some(Op::LayerNorm { x, weight, .. }) = graph.maker(out).map(|node| &node.op) else { return false };
    let can = |reader: &Node| match &reader.op {
        Op::Conv(conv) => conv_hopper::area(graph, conv, reader.output).is_ok(),
        _ => false,
    };
    graph.readers(out).all(can) && can_make(graph, *x) && is_norm_folded(graph, *weight, limits)
}

/// True if a layer norm without a launch reads `x`, so that the product which computes `x` leaves moments of its rows.
pub(super) fn leaves_moments(graph: &Graph, x: TensorId, limits: Limits) -> bool {
    graph.readers(x).any(|node| has_no_launch(graph, node.output, limits))
}

/// True if `x` is computed by a product that wgmma can compute, and no group norm wants other moments of it.
fn can_make(graph: &Graph, x: TensorId) -> bool {
    let Some(Op::Conv(conv)) = graph.maker(x).map(|node| &node.op) else { return false };
    let gated = conv.activation == Activation::Geglu;
    let group_norm = |node: &Node| matches!(node.op, Op::GroupNorm(_) | Op::GroupNormGradient { .. });
    conv.is_pointwise() && !gated && conv_hopper::area(graph, conv, x).is_ok() && !graph.readers(x).any(group_norm)
}
