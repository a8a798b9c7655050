//! The context in which a node is lowered to launches: addresses, and the storage format of activations.

use super::device::{Limits, TensorTiles};
use super::moments::Moments;
use super::weights;
use crate::Result;
use crate::graph::{Graph, GroupNorm, Node, Op, Shape, TensorId, View, WeightId};
use crate::plan::Plan;

/// The storage format of an activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// For activations between layers.
    F16,
    /// For indices and timesteps, which must be exact, and for the result of a network's last product.
    F32,
}

impl Element {
    /// How `graph` stores an activation: fp16, except for numbers that are no activations (token ids, indices,
    /// timesteps), for moments, and for the result of a network's last matrix product, whose fp16 rounding guidance
    /// would amplify.
    pub fn of(graph: &Graph, id: TensorId) -> Self {
        let exact = |node: &Node| match node.op {
            Op::Embed { ids, .. } => ids == id,
            Op::Sinusoid { x, .. } => x == id,
            Op::SelectToken { index, .. } => index == id,
            Op::GroupNorm(GroupNorm { moments, .. }) => moments == Some(id),
            _ => false,
        };
        let made_exact = graph.maker(id).is_some_and(|node| match node.op {
            Op::Conv(_) => !graph.continued && graph.readers(id).next().is_none(),
            Op::GroupNormMoments { .. } => true,
            _ => false,
        });
        if made_exact || graph.readers(id).any(exact) { Element::F32 } else { Element::F16 }
    }

    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Element::F16 => 2,
            Element::F32 => 4,
        }
    }
}

/// The memory of a plan on a device.
pub(super) struct Bindings<'a> {
    /// The device's.
    pub limits: Limits,
    /// The address of each weight, by its number in the network.
    pub weights: &'a [u64],
    /// The address of the arena.
    pub arena: u64,
    /// The device's [`super::CudaDevice::tensor_map`].
    pub tensor_map: &'a dyn Fn(&TensorTiles) -> Result<[u64; 16]>,
}

/// Counters that a launch may use: one for each tile whose depth is split over blocks.
pub(super) const COUNTERS: usize = 1 << 16;

/// A node with its context.
pub(super) struct Site<'a> {
    pub limits: Limits,
    pub bindings: &'a Bindings<'a>,
    pub plan: &'a Plan,
    /// Offset and size in bytes of the node's scratch memory.
    pub workspace: (usize, usize),
}

impl Site<'_> {
    pub fn graph(&self) -> &Graph {
        self.plan.graph()
    }

    pub fn shape(&self, id: TensorId) -> Shape {
        self.graph().shape(id)
    }

    /// The address of an activation.
    pub fn address(&self, id: TensorId) -> u64 {
        self.bindings.arena + self.plan.offset(id) as u64
    }

    /// The address of an activation that may be missing: 0 then.
    pub fn optional(&self, id: Option<TensorId>) -> u64 {
        id.map_or(0, |id| self.address(id))
    }

    /// The address of the moments of an activation that has any.
    pub fn moments(&self, id: TensorId) -> u64 {
        self.address(id) + Moments::offset(self.shape(id)) as u64
    }

    /// The address of the first channel of a view, whose channels are halves.
    pub fn view(&self, view: View) -> u64 {
        self.address(view.tensor) + (view.offset * size_of::<half::f16>()) as u64
    }

    pub fn element(&self, id: TensorId) -> Element {
        Element::of(self.graph(), id)
    }

    pub fn weight(&self, id: WeightId) -> u64 {
        self.bindings.weights[id.0]
    }

    /// The address of the second part of a weight that has one.
    pub fn behind(&self, id: WeightId) -> u64 {
        self.weight(id) + weights::behind(self.graph().weight(id)) as u64
    }

    /// The address of the split counters, [`COUNTERS`] words, which are 0 between launches.
    pub fn counters(&self) -> u64 {
        self.bindings.arena
    }

    /// The address of the node's scratch memory, of the size that its family's `workspace` returned.
    pub fn workspace(&self) -> u64 {
        self.bindings.arena + self.workspace.0 as u64
    }
}
