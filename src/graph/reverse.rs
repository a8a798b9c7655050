//! The backward half of a graph: the gradient of an output with respect to an earlier activation, with frozen weights.

use super::*;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// The activations of the forward half that are kept until the backward half reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All of them.
    All,
    /// Only sums with a residual. The nodes from one such sum to the next are computed again when the backward half
    /// gets there (gradient checkpointing, Chen et al., arXiv 1604.06174). A transformer layer keeps 3 of its 20
    /// activations, at the cost of one more forward pass.
    Sums,
}

impl Graph {
    /// The graph with its backward half: the gradient of `sum(seed * output)` with respect to the activation `by`.
    ///
    /// `output` names an output, `by` an input or an output. The result has one more input, `d.<output>` (the seed),
    /// and one more output, `d.<by>`. Only the nodes between the two are differentiated, and only with respect to
    /// activations. Activations of the forward half that the backward half reads are kept by the plan until then or, if
    /// `keep` says so, computed again. An activation function that is fused into a convolution between the two becomes
    /// a node of its own, as its gradient needs its argument.
    ///
    /// # Panics
    /// If an operation between the two has no gradient here: one with a stride or a scaled residual, one whose skip
    /// connection depends on `by`, or one that reads an input of the network. The up half of a UNet has none of these.
    pub fn with_gradient(self, output: &str, by: &str, keep: Keep) -> Graph {
        let (from, to) = (self.output(output), self.find_input(by).unwrap_or_else(|| self.output(by)));
        let mut reverse = Reverse::new(self, to);
        let shape = reverse.builder.shape(from);
        let seed = reverse.builder.input(&format!("d.{output}"), shape);
        reverse.gradients.insert(from, seed);
        let forward = reverse.builder.graph.nodes.len();
        reverse.builder.graph.backward = Some(forward);
        let mut end = forward;
        while end > 0 {
            let start = match keep {
                Keep::All => 0,
                Keep::Sums => reverse.segment(end),
            };
            let again = if keep == Keep::Sums { reverse.again(start..end) } else { HashMap::new() };
            for index in (start..end).rev() {
                let begin = reverse.builder.graph.nodes.len();
                reverse.node(index);
                reverse.builder.graph.nodes[begin..].iter_mut().for_each(|node| node.rename(&again));
            }
            end = start;
        }
        let gradient = reverse.gradients[&to];
        reverse.builder.output(&format!("d.{by}"), gradient);
        let mut graph = reverse.builder.finish();
        graph.drop_unread(forward);
        graph
    }

    /// Of the nodes from `first` on, drops those whose results no node reads.
    fn drop_unread(&mut self, first: usize) {
        let mut read: HashSet<TensorId> = self.outputs.iter().map(|(_, id)| *id).collect();
        let mut kept = Vec::new();
        for node in self.nodes.drain(first..).rev() {
            if read.contains(&node.output) {
                read.extend(node.op.inputs());
                kept.push(node);
            }
        }
        self.nodes.extend(kept.into_iter().rev());
        self.link();
    }
}

impl Node {
    /// Replaces the activations that the node reads by those to which `to` maps them.
    fn rename(&mut self, to: &HashMap<TensorId, TensorId>) {
        for id in self.op.slots().into_iter().flatten() {
            *id = to.get(id).copied().unwrap_or(*id);
        }
    }
}

struct Reverse {
    builder: GraphBuilder,
    /// True for the activations that depend on the one with respect to which the gradient is taken.
    depends: Vec<bool>,
    gradients: HashMap<TensorId, TensorId>,
}

impl Reverse {
    fn new(graph: Graph, by: TensorId) -> Self {
        let mut depends = vec![false; graph.shapes.len()];
        depends[by.0] = true;
        for node in &graph.nodes {
            depends[node.output.0] |= node.op.inputs().any(|id| depends[id.0]);
        }
        let mut reverse = Reverse { builder: GraphBuilder { graph }, depends, gradients: HashMap::new() };
        reverse.part_activations();
        reverse
    }

    fn wants(&self, id: TensorId) -> bool {
        self.depends.get(id.0).is_some_and(|&depends| depends)
    }

    /// Splits the activation functions off the convolutions that are to be differentiated.
    fn part_activations(&mut self) {
        let nodes = std::mem::take(&mut self.builder.graph.nodes);
        for mut node in nodes {
            let wanted = node.op.inputs().any(|id| self.wants(id));
            match &mut node.op {
                Op::Conv(conv) if wanted && conv.activation != Activation::None => {
                    assert!(
                        conv.residual.is_none() && conv.scale == 1.0,
                        "{}: an activation function followed by a residual has no gradient here",
                        node.name
                    );
                    let activation = std::mem::replace(&mut conv.activation, Activation::None);
                    let spec = &mut self.builder.graph.weights[conv.weight.0];
                    if let WeightKind::Matrix { gated, .. } = &mut spec.kind {
                        *gated = false;
                    }
                    let shape = Shape { c: spec.total_outputs(), ..self.builder.shape(node.output) };
                    let x = self.builder.tensor(shape);
                    self.depends.resize(x.0 + 1, false);
                    self.depends[x.0] = true;
                    let op = Op::Activate { x, activation };
                    let name = format!("{}.activation", node.name);
                    let apply = Node { name, op, output: node.output };
                    node.output = x;
                    self.builder.graph.nodes.extend([node, apply]);
                }
                _ => self.builder.graph.nodes.push(node),
            }
        }
    }

    /// The start of the segment of nodes that ends before `end`: the node after the previous sum with a residual.
    fn segment(&self, end: usize) -> usize {
        let sum =
            |node: &Node| matches!(&node.op, Op::Conv(conv) if conv.residual.is_some()) && self.wants(node.output);
        (1..end).rev().find(|&i| sum(&self.builder.graph.nodes[i - 1])).unwrap_or(0)
    }

    /// Adds copies of nodes that compute them again, and returns the new ids of their results.
    fn again(&mut self, nodes: Range<usize>) -> HashMap<TensorId, TensorId> {
        let mut again = HashMap::new();
        for index in nodes {
            let mut node = self.builder.graph.nodes[index].clone();
            if self.wants(node.output) {
                let output = self.builder.tensor(self.builder.shape(node.output));
                again.insert(std::mem::replace(&mut node.output, output), output);
                node.rename(&again);
                self.builder.graph.nodes.push(node);
            }
        }
        again
    }

    /// Adds to the gradient of `id` the part that comes from one of its readers.
    fn give(&mut self, id: TensorId, gradient: TensorId) {
        let sum = match self.gradients.get(&id) {
            None => gradient,
            Some(&other) => {
                let shape = self.builder.shape(id);
                self.builder.node("gradient.add", Op::Add { a: other, b: gradient }, shape)
            }
        };
        self.gradients.insert(id, sum);
    }

    /// Passes the gradient of a node's result on to the activations that the node read.
    fn node(&mut self, index: usize) {
        let node = self.builder.graph.nodes[index].clone();
        if !node.op.inputs().any(|id| self.wants(id)) {
            return;
        }
        let Some(&d) = self.gradients.get(&node.output) else { return };
        let name = format!("{}.gradient", node.name);
        match node.op {
            Op::Conv(conv) => self.conv(&name, conv, d),
            Op::GroupNorm(of) => {
                assert!(
                    !of.sources.skip.is_some_and(|t| self.wants(t)),
                    "{name}: a skip connection has no gradient here"
                );
                let shape = self.builder.shape(of.sources.x);
                let dx = self.builder.node(&name, Op::GroupNormGradient { of, d }, shape);
                self.give(of.sources.x, dx);
            }
            Op::LayerNorm { x, weight, eps, .. } => {
                let shape = self.builder.shape(x);
                let dx = self.builder.node(&name, Op::LayerNormGradient { x, weight, eps, d }, shape);
                self.give(x, dx);
            }
            Op::Attention(of) => {
                let fused = self.wants(of.k.tensor);
                assert!(
                    !fused || (of.q.tensor == of.k.tensor && of.k.tensor == of.v.tensor),
                    "{name}: queries, keys and values are of several tensors"
                );
                let shape = self.builder.shape(of.q.tensor);
                let dx = self.builder.node(&name, Op::AttentionGradient { of, fused, d }, shape);
                self.give(of.q.tensor, dx);
            }
            Op::Activate { x, activation } => {
                let shape = self.builder.shape(x);
                let dx = self.builder.node(&name, Op::ActivateGradient { x, activation, d }, shape);
                self.give(x, dx);
            }
            Op::Add { a, b } => [a, b]
                .into_iter()
                .filter(|&t| self.wants(t))
                .collect::<Vec<_>>()
                .into_iter()
                .for_each(|t| self.give(t, d)),
            Op::Shift { x, .. } => self.give(x, d),
            op => panic!("{name}: {op:?} has no gradient"),
        }
    }

    /// A convolution's data gradient is a convolution with the mirrored weight.
    fn conv(&mut self, name: &str, conv: Conv, d: TensorId) {
        assert!(conv.stride == 1 && conv.scale == 1.0, "{name}: a strided or scaled convolution has no gradient here");
        assert!(
            !conv.per_image.is_some_and(|view| self.wants(view.tensor)),
            "{name}: a term that is added per image has no gradient here"
        );
        assert!(!conv.sources.skip.is_some_and(|t| self.wants(t)), "{name}: a skip connection has no gradient here");
        if let Some(residual) = conv.residual.filter(|&t| self.wants(t)) {
            self.give(residual, d);
        }
        let x = conv.sources.x;
        if !self.wants(x) {
            return;
        }
        let shape = self.builder.shape(x);
        let Extent { h, w } = conv.resize.unwrap_or(shape.extent());
        let spec = self.builder.graph.weight(conv.weight).clone();
        let inputs = spec.width / (conv.kernel * conv.kernel);
        let kind = WeightKind::Mirrored { kernel: conv.kernel, inputs, wanted: shape.c };
        let weight = self.builder.weight(WeightSpec { kind, ..spec });
        // The gradient so far becomes the residual of this convolution, which saves an addition. This is impossible if
        // the source is resized, since that gradient has the size before the resize.
        let residual = if conv.resize.is_none() { self.gradients.remove(&x) } else { None };
        let mirrored = Conv {
            sources: d.into(),
            weight,
            bias: None,
            kernel: conv.kernel,
            stride: 1,
            pad: conv.kernel - 1 - conv.pad,
            resize: None,
            per_image: None,
            gain: conv.gain,
            bias_gain: 1.0,
            activation: Activation::None,
            residual,
            scale: 1.0,
        };
        let mut dx = self.builder.node(name, Op::Conv(mirrored), Shape { h, w, ..shape });
        if conv.resize.is_some() {
            dx = self.builder.node(&format!("{name}.resize"), Op::ResizeGradient { d: dx }, shape);
        }
        self.give(x, dx);
    }
}
