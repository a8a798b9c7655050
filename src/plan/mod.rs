//! Plans: a graph with every buffer at a fixed place.
//!
//! A plan orders the nodes, gives each activation an offset in one arena by its lifetime, and splits off the
//! *prologue*: the nodes that depend only on inputs which stay the same from step to step (a UNet's prompt keys and
//! values). A step that reuses activations which the graph keeps needs only some of the nodes. For training it also
//! splits off the *backward* nodes, which need the gradient that follows from a step's result. After that a step needs
//! no further memory for activations and cannot run out of it. Plans know no device.

mod arena;

use crate::graph::{Graph, Node, Op, TensorId, WeightSpec};
use crate::{Error, Result, Subject};
use arena::{ALIGN, Interval, place};

/// The storage of a graph's activations by an executor.
pub trait Storage {
    /// Names the executor and everything that its sizes depend on. A plan runs only with a storage of the same name.
    fn name(&self) -> String;

    /// Bytes of an activation.
    fn tensor(&self, graph: &Graph, id: TensorId) -> usize;

    /// The activations that are read while a node runs: the inputs of the operation, unless several nodes run as one.
    fn reads(&self, _: &Graph, node: &Node) -> Vec<TensorId> {
        node.op.inputs().collect()
    }

    /// Bytes of scratch memory that the node needs while it runs.
    fn workspace(&self, graph: &Graph, node: &Node) -> usize;

    /// Bytes at the beginning of the arena that no activation ever takes. They belong to the executor and are zero at
    /// first. Plans that share an arena have them in common.
    fn reserved(&self) -> usize {
        0
    }
}

/// A compiled [`Graph`]. Offsets and lengths are in bytes.
#[derive(Debug)]
pub struct Plan {
    graph: Graph,
    /// Name of the storage that the plan was made for.
    storage: String,
    /// Node indices: those of the prologue, then of the step, then of the backward half.
    order: Vec<usize>,
    prologue: usize,
    /// Position in `order` where the backward nodes begin.
    backward: usize,
    /// Positions in `order` of the nodes of a step that reuses the kept activations.
    reusing: Vec<usize>,
    offsets: Vec<usize>,
    workspaces: Vec<(usize, usize)>,
    arena_bytes: usize,
}

impl Plan {
    /// Compiles `graph`.
    ///
    /// `constant` names the inputs that keep their value over many steps.
    pub fn new(graph: Graph, constant: &[&str], storage: &dyn Storage) -> Self {
        let (order, prologue, backward) = phases(&graph, constant);
        let steps = order.len();
        let last = steps.saturating_sub(1);

        // Lifetimes in positions of `order`. Inputs and outputs live throughout. So do the results of the prologue that
        // steps read, since many steps run after one prologue.
        let life = |i| Interval { len: storage.tensor(&graph, TensorId(i)), first: usize::MAX, last: 0 };
        let mut lives: Vec<Interval> = (0..graph.shapes.len()).map(life).collect();
        for (_, id) in graph.inputs.iter().chain(&graph.outputs) {
            (lives[id.0].first, lives[id.0].last) = (0, last);
        }
        for (position, &node) in order.iter().enumerate() {
            let node = &graph.nodes[node];
            let produced = &mut lives[node.output.0];
            produced.first = produced.first.min(position);
            produced.last = produced.last.max(position);
            for input in storage.reads(&graph, node) {
                let life = &mut lives[input.0];
                life.last = life.last.max(if life.first < prologue && position >= prologue { last } else { position });
            }
        }
        // So do kept activations, which come first: plans that keep the same ones and share an arena find them where
        // another left them.
        let mut first = storage.reserved().next_multiple_of(ALIGN);
        let mut kept: Vec<(TensorId, usize)> = Vec::new();
        for &id in &graph.kept {
            kept.push((id, first));
            first += std::mem::take(&mut lives[id.0].len).next_multiple_of(ALIGN);
        }
        // Activations whose nodes the backward half dropped as unread have a shape but no node.
        lives.iter_mut().filter(|life| life.first == usize::MAX).for_each(|life| life.len = 0);
        // The output of a shift may be written by the kernel that writes its input, so it must be live from there on.
        for node in &graph.nodes {
            if let Op::Shift { x, .. } = node.op {
                lives[node.output.0].first = lives[x.0].first;
            }
        }
        for (position, &node) in order.iter().enumerate() {
            lives.push(Interval {
                len: storage.workspace(&graph, &graph.nodes[node]),
                first: position,
                last: position,
            });
        }
        let (mut offsets, arena_bytes) = place(&lives, first);
        kept.iter().for_each(|&(id, offset)| offsets[id.0] = offset);
        let workspaces = (0..steps).map(|i| (offsets[graph.shapes.len() + i], lives[graph.shapes.len() + i].len));
        let workspaces = workspaces.collect();
        let reusing = reusing(&graph, storage, &order[prologue..backward]);
        let reusing = reusing.into_iter().map(|position| prologue + position).collect();
        let storage = storage.name();
        Plan { order, prologue, backward, reusing, offsets, workspaces, arena_bytes, storage, graph }
    }

    /// The graph that the plan was made from.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Checks that an executor with this storage can run the plan with weights that were loaded for `specs`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`]: offsets and sizes are those of another storage, or the weights another
    /// network's.
    pub fn check(&self, storage: &dyn Storage, specs: &[WeightSpec]) -> Result<()> {
        let name = storage.name();
        if self.storage != name {
            let problem = format!("the plan was made for {}, and this is {name}", self.storage);
            return Err(Error::mismatch(Subject::Run, problem).advise("plan again for it"));
        }
        match specs == self.graph.weights() {
            true => Ok(()),
            false => Err(Error::mismatch(Subject::Run, "the weights are another network's")
                .advise("load them for the plan's graph")),
        }
    }

    /// Bytes of the arena: all memory that a run needs in addition to the weights.
    pub fn arena_bytes(&self) -> usize {
        self.arena_bytes
    }

    /// Offset of an activation in the arena.
    pub fn offset(&self, id: TensorId) -> usize {
        self.offsets[id.0]
    }

    /// The nodes to run once after a constant input changed, each with the offset and length of its scratch memory.
    pub fn prologue(&self) -> impl Iterator<Item = (&Node, (usize, usize))> {
        self.range(0..self.prologue)
    }

    /// The nodes of a step, likewise with their scratch memory.
    pub fn step(&self) -> impl Iterator<Item = (&Node, (usize, usize))> {
        self.range(self.prologue..self.backward)
    }

    /// The number of nodes of a step up to the one that makes the named output.
    ///
    /// # Panics
    /// If the graph has no such output, or it is made in another phase.
    pub fn step_to(&self, output: &str) -> usize {
        let id = self.graph.output(output);
        let place = self.step().position(|(node, _)| node.output == id);
        place.unwrap_or_else(|| panic!("no step makes `{output}`")) + 1
    }

    /// The nodes of a step that takes the activations which the graph keeps ([`crate::graph::GraphBuilder::keep`]) from
    /// the step before: those on which the outputs depend otherwise. Outputs that depend on a kept activation alone
    /// stay as they were.
    pub fn reusing_step(&self) -> impl Iterator<Item = (&Node, (usize, usize))> {
        self.reusing.iter().map(|&i| (&self.graph.nodes[self.order[i]], self.workspaces[i]))
    }

    /// The nodes of the backward half (see [`Graph::with_gradient`]), likewise with their scratch memory.
    pub fn backward(&self) -> impl Iterator<Item = (&Node, (usize, usize))> {
        self.range(self.backward..self.order.len())
    }

    /// All nodes in the order prologue, step, backward half.
    pub fn all(&self) -> impl Iterator<Item = (&Node, (usize, usize))> {
        self.range(0..self.order.len())
    }

    fn range(&self, range: std::ops::Range<usize>) -> impl Iterator<Item = (&Node, (usize, usize))> {
        range.map(|i| (&self.graph.nodes[self.order[i]], self.workspaces[i]))
    }
}

/// Positions in `step`, which holds node indices, of the nodes that the outputs depend on if the kept activations are
/// given.
fn reusing(graph: &Graph, storage: &dyn Storage, step: &[usize]) -> Vec<usize> {
    let mut needed = vec![false; graph.shapes.len()];
    graph.outputs.iter().for_each(|(_, id)| needed[id.0] = true);
    let mut positions = Vec::new();
    for (position, &node) in step.iter().enumerate().rev() {
        let node = &graph.nodes[node];
        if needed[node.output.0] && !graph.kept.contains(&node.output) {
            positions.push(position);
            node.op.inputs().chain(storage.reads(graph, node)).for_each(|id| needed[id.0] = true);
        }
    }
    positions.reverse();
    positions
}

/// Node indices in three phases, and the positions where the second and the third begin. The phases are nodes whose
/// inputs are all constant, the rest, and those that depend on the seed of a backward half.
fn phases(graph: &Graph, constant: &[&str]) -> (Vec<usize>, usize, usize) {
    const PROLOGUE: usize = 0;
    const STEP: usize = 1;
    const BACKWARD: usize = 2;
    let mut phase = vec![PROLOGUE; graph.shapes.len()];
    for (name, id) in &graph.inputs {
        phase[id.0] = if constant.contains(&name.as_str()) { PROLOGUE } else { STEP };
    }
    let backward = graph.backward.unwrap_or(usize::MAX);
    let mut nodes: [Vec<usize>; 3] = Default::default();
    for (index, node) in graph.nodes.iter().enumerate() {
        let latest = node.op.inputs().map(|id| phase[id.0]).max().unwrap_or(PROLOGUE);
        let latest = if index < backward { latest } else { BACKWARD };
        phase[node.output.0] = latest;
        nodes[latest].push(index);
    }
    let [prologue, step, backward] = nodes.each_ref().map(Vec::len);
    debug_assert_eq!(prologue + step + backward, graph.nodes.len());
    (nodes.concat(), prologue, prologue + step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{ConvOptions, GraphBuilder, Shape};

    /// No two buffers that are alive at the same position may overlap; checked by brute force.
    #[test]
    fn buffers_alive_together_are_disjoint() {
        let mut b = GraphBuilder::new();
        let x = b.input("x", Shape::new(1, 8, 8, 16));
        let fixed = b.input("fixed", Shape::new(1, 8, 8, 16));
        let kept = b.linear("kept", fixed, 48, ConvOptions::default());
        let mut h = x;
        let mut skips = vec![];
        for i in 0..6 {
            let options = ConvOptions { residual: (i % 2 == 0).then_some(kept), ..ConvOptions::conv3x3() };
            h = b.conv(&format!("c{i}"), h, 48, options);
            skips.push(h);
        }
        let shift = b.input("shift", Shape::new(1, 8, 8, 48));
        let mid = h;
        h = b.shift("shift", mid, shift);
        let shifted = h;
        for (i, skip) in skips.into_iter().rev().enumerate() {
            let sources = crate::graph::Sources { x: h, skip: Some(skip) };
            h = b.conv(&format!("u{i}"), sources, 48, ConvOptions::conv3x3());
        }
        b.output("h", h);
        struct Bytes;
        impl Storage for Bytes {
            fn name(&self) -> String {
                "bytes".into()
            }

            fn tensor(&self, graph: &Graph, id: TensorId) -> usize {
                graph.shape(id).len()
            }

            fn workspace(&self, _: &Graph, node: &Node) -> usize {
                if node.name == "c3" || node.name == "c5" { 5000 } else { 0 }
            }

            fn reserved(&self) -> usize {
                1000
            }
        }
        b.keep(shifted);
        b.keep(x);
        b.keep(shifted);
        let plan = Plan::new(b.finish(), &["fixed"], &Bytes);
        // Kept activations come first, in their order, at multiples of the alignment.
        assert_eq!((plan.offset(shifted), plan.offset(x)), (1024, 1024 + 8 * 8 * 48));
        assert_eq!(plan.prologue().count(), 1);

        let graph = plan.graph();
        let position = |id: TensorId| plan.order.iter().position(|&n| graph.nodes[n].output == id);
        let life = |id: TensorId| {
            let fixed = [graph.input("x"), graph.input("fixed"), graph.input("shift"), graph.output("h")];
            if fixed.contains(&id) || graph.kept.contains(&id) {
                return (0, usize::MAX);
            }
            // A shift's output may be written together with its input.
            let first = position(if id == shifted { mid } else { id }).unwrap();
            let uses = plan.order.iter().enumerate().filter(|(_, n)| graph.nodes[**n].op.inputs().any(|i| i == id));
            // Results of the prologue are read again in the next step.
            (first, if first < plan.prologue { usize::MAX } else { uses.map(|(p, _)| p).max().unwrap_or(first) })
        };
        let span = |id: TensorId| plan.offset(id)..plan.offset(id) + graph.shape(id).len();
        let overlap = |a: &std::ops::Range<usize>, b: &std::ops::Range<usize>| a.start < b.end && b.start < a.end;
        for a in (0..graph.shapes.len()).map(TensorId) {
            assert!(span(a).start >= 1000 && span(a).end <= plan.arena_bytes());
            for b in (0..a.0).map(TensorId) {
                let ((f1, l1), (f2, l2)) = (life(a), life(b));
                if f1 <= l2 && f2 <= l1 {
                    assert!(!overlap(&span(a), &span(b)), "{a:?} and {b:?} overlap");
                }
            }
            for (p, &(offset, len)) in plan.workspaces.iter().enumerate().filter(|w| w.1.1 > 0) {
                assert!(offset >= 1000);
                let (first, last) = life(a);
                assert!(!(first..=last).contains(&p) || !overlap(&span(a), &(offset..offset + len)));
            }
        }
        let total: usize = graph.shapes.iter().map(|s| s.len()).sum();
        assert!(plan.arena_bytes() < total, "lifetimes save nothing: {} of {total}", plan.arena_bytes());
    }
}
