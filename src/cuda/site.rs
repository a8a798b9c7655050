//! The surroundings of a node from which its launches are made: where things lie, and how activations are stored.

use super::device::{Limits, TensorTiles};
use super::moments::Moments;
use super::weights;
use crate::Result;
use crate::graph::{Graph, Node, Op, Shape, TensorId, View, WeightId};
use crate::plan::Plan;

/// How an activation is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Activations between layers.
    F16,
    /// Indices and timesteps, which are exact, and what a network ends in.
    F32,
}

impl Element {
    /// How `graph` stores an activation: fp16, but for numbers that are no activations (token ids, indices, timesteps) and
    /// for results of a last matrix product, whose rounding guidance would multiply.
    pub fn of(graph: &Graph, id: TensorId) -> Self {
        let exact = |node: &Node| match node.op {
            Op::Embed { ids, .. } => ids == id,
            Op::Sinusoid { x, .. } => x == id,
            Op::SelectToken { index, .. } => index == id,
            _ => false,
        };
        let multiplied = graph.maker(id).is_some_and(|node| matches!(node.op, Op::Conv(_)));
        if graph.readers(id).any(exact) || (multiplied && graph.readers(id).next().is_none()) {
            Element::F32
        } else {
            Element::F16
        }
    }

    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Element::F16 => 2,
            Element::F32 => 4,
        }
    }
}

/// A plan's memory on a device.
pub(super) struct Bindings<'a> {
    /// The device's.
    pub limits: Limits,
    /// Where each weight begins, by its number in the network.
    pub weights: &'a [u64],
    /// Where the arena begins.
    pub arena: u64,
    /// The device's [`super::Device::tensor_map`].
    pub tensor_map: &'a dyn Fn(&TensorTiles) -> Result<[u64; 16]>,
}

/// Counters that a launch may use: one for each tile whose depth is split over blocks.
pub(super) const COUNTERS: usize = 1 << 16;

/// A node's surroundings.
pub(super) struct Site<'a> {
    pub limits: Limits,
    pub bindings: &'a Bindings<'a>,
    pub plan: &'a Plan,
    /// Offset and bytes of the node's scratch memory.
    pub workspace: (usize, usize),
}

impl Site<'_> {
    pub fn graph(&self) -> &Graph {
        self.plan.graph()
    }

    pub fn shape(&self, id: TensorId) -> Shape {
        self.graph().shape(id)
    }

    /// Where an activation lies.
    pub fn address(&self, id: TensorId) -> u64 {
        self.bindings.arena + self.plan.offset(id) as u64
    }

    /// Where an activation lies that may be missing: 0 then.
    pub fn optional(&self, id: Option<TensorId>) -> u64 {
        id.map_or(0, |id| self.address(id))
    }

    /// Where the moments of an activation lie, if it has any.
    pub fn moments(&self, id: TensorId) -> u64 {
        self.address(id) + Moments::offset(self.shape(id)) as u64
    }

    /// Where a view's first channel lies, of halves.
    pub fn view(&self, view: View) -> u64 {
        self.address(view.tensor) + (view.offset * size_of::<half::f16>()) as u64
    }

    pub fn element(&self, id: TensorId) -> Element {
        Element::of(self.graph(), id)
    }

    pub fn weight(&self, id: WeightId) -> u64 {
        self.bindings.weights[id.0]
    }

    /// Where the second part of a weight begins, if it has one.
    pub fn behind(&self, id: WeightId) -> u64 {
        self.weight(id) + weights::behind(self.graph().weight(id)) as u64
    }

    /// Counters of blocks, [`COUNTERS`] words: 0 between launches.
    pub fn counters(&self) -> u64 {
        self.bindings.arena + self.plan.reserved() as u64
    }

    /// The node's scratch memory: as many bytes as its family's `workspace` said.
    pub fn workspace(&self) -> u64 {
        self.bindings.arena + self.workspace.0 as u64
    }
}
