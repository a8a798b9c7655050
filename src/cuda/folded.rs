//! Layer norms without a launch: where `kernels/conv_hopper.cu` makes what is normalised and multiplies the result, the first
//! product leaves moments of its rows, and the second one normalises its own sums.

use super::conv;
use super::device::Limits;
use super::tiles::Instruction;
use crate::graph::{Conv, Graph, Op, TensorId};

/// A layer norm that the products which read it compute.
pub(super) struct Norm {
    /// What is normalised, and what the products read.
    pub x: TensorId,
    pub eps: f32,
}

/// The norm of which a convolution reads the result and which it computes itself.
pub(super) fn norm(graph: &Graph, conv: &Conv, limits: Limits) -> Option<Norm> {
    graph.weight(conv.weight).norm.as_ref()?;
    let read = conv.sources.x;
    let node = graph.nodes().iter().find(|node| node.output == read)?;
    let Op::LayerNorm { x, eps, .. } = node.op else { return None };
    has_no_launch(graph, read, limits).then_some(Norm { x, eps })
}

/// True if `out` is the result of a layer norm that the products which read it compute.
pub(super) fn has_no_launch(graph: &Graph, out: TensorId, limits: Limits) -> bool {
    let node = graph.nodes().iter().find(|node| node.output == out);
    let Some(Op::LayerNorm { x, weight, .. }) = node.map(|node| &node.op) else { return false };
    graph.is_folded(*weight)
        && readers_can(graph, out, limits)
        && conv::moments(graph, *x, limits).is_some_and(|moments| moments.pixels == 1)
}

/// True if a layer norm of `x` wants moments of its rows: if products of wgmma read its result, and nothing else does.
pub(super) fn is_wanted(graph: &Graph, x: TensorId, limits: Limits) -> bool {
    graph.nodes().iter().any(|node| match node.op {
        Op::LayerNorm { x: normalised, weight, .. } => {
            normalised == x && graph.is_folded(weight) && readers_can(graph, node.output, limits)
        }
        _ => false,
    })
}

/// True if all that read the result of a folded layer norm are products of wgmma.
fn readers_can(graph: &Graph, out: TensorId, limits: Limits) -> bool {
    graph.nodes().iter().all(|node| match &node.op {
        Op::Conv(conv) if conv.sources.x == out => {
            conv::plan(graph, conv, node.output, limits).1.tile.instruction == Instruction::Wgmma
        }
        _ => true,
    })
}
