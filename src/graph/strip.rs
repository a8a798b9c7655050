//! Parts of a network that run one after another, over strips of an image's rows: for images whose activations would
//! not fit into memory as a whole.
//!
//! A strip is a range of rows over the whole width, which NHWC keeps in one piece. Convolutions read rows beyond their
//! output, so a strip is read with a *halo* of rows above and below it, whose results are dropped. Where the image
//! ends, the strip ends with it, so that convolutions find the zeros there that they would find in the whole image.
//! Group norms read their moments over the whole image from inputs; a run over all strips computes those of one norm,
//! from the moments of the norms before it. So the result is that of the whole image, up to the order of sums.

use super::{Graph, GroupNorm, Node, Op, Shape, TensorId};

/// A network, and the activation at which it can be cut into two parts, of which one has no attention.
pub struct Divisible<G> {
    /// The network for an image of so many units of rows. A unit is the least number of rows that every activation
    /// divides into whole rows: a VAE's is one row of latents.
    pub graph: G,
    /// Where the network can be cut; `None` if it cannot.
    pub cut: Option<TensorId>,
    /// Name of the input.
    pub input: &'static str,
    /// Name of the output.
    pub output: &'static str,
}

/// An activation, and the name that it has as an input or output of a part.
pub(crate) type Cut<'a> = (&'a str, TensorId);

impl Graph {
    /// The part of the network that computes `to`, from `from` if that is given. Its weights are those of the whole
    /// network. `continued`: another part reads the result.
    ///
    /// # Panics
    /// If the result depends on anything but `from` and the network's inputs.
    pub(crate) fn part(&self, from: Option<Cut>, to: Cut, continued: bool) -> Graph {
        let mut needed = vec![false; self.shapes.len()];
        needed[to.1.0] = true;
        let mut nodes = Vec::new();
        for node in self.nodes.iter().rev().filter(|node| from.is_none_or(|(_, id)| node.output != id)) {
            if needed[node.output.0] {
                node.op.inputs().for_each(|id| needed[id.0] = true);
                nodes.push(node.clone());
            }
        }
        nodes.reverse();
        let own = self.inputs.iter().filter(|(_, id)| needed[id.0]).cloned();
        let inputs: Vec<_> = own.chain(from.map(|(name, id)| (name.to_string(), id))).collect();
        let made = |id: usize| nodes.iter().any(|node| node.output.0 == id) || inputs.iter().any(|(_, i)| i.0 == id);
        assert!((0..needed.len()).all(|id| !needed[id] || made(id)), "a part of the network reads more than its input");
        let outputs = vec![(to.0.to_string(), to.1)];
        let (shapes, weights) = (self.shapes.clone(), self.weights.clone());
        let mut part = Graph { shapes, weights, nodes, inputs, outputs, continued, ..Graph::default() };
        part.link();
        part
    }

    /// The same graph for strips: the moments of group norm number `i`, counted from 0, are read from the input
    /// `norm.i` ([`GroupNorm::moments`]), and those of its sources, row by row, are the output `moments.i`.
    pub(crate) fn strip(mut self) -> Graph {
        let mut nodes = Vec::new();
        for mut node in std::mem::take(&mut self.nodes) {
            if let Op::GroupNorm(norm) = &mut node.op {
                let number = nodes.iter().filter(|node: &&Node| matches!(node.op, Op::GroupNorm(_))).count();
                let Shape { n, h, .. } = self.shape(norm.sources.x);
                let [output, given] =
                    [Shape::new(n, norm.groups, h, 2), Shape::new(n, 1, norm.groups, 2)].map(|shape| {
                        self.shapes.push(shape);
                        TensorId(self.shapes.len() - 1)
                    });
                let (op, name) = (Op::GroupNormMoments { of: *norm }, format!("{}.moments", node.name));
                nodes.push(Node { name, op, output });
                self.outputs.push((format!("moments.{number}"), output));
                self.inputs.push((format!("norm.{number}"), given));
                norm.moments = Some(given);
            }
            nodes.push(node);
        }
        self.nodes = nodes;
        self.link();
        self
    }

    /// The group norms, in order.
    pub(crate) fn group_norms(&self) -> impl Iterator<Item = &GroupNorm> {
        self.nodes.iter().filter_map(|node| match &node.op {
            Op::GroupNorm(norm) => Some(norm),
            _ => None,
        })
    }

    /// The number of rows of the input `from` above or below those of a row of the output `to` that it depends on,
    /// group norms aside.
    ///
    /// # Panics
    /// If an operation between the two reads all rows: attention.
    pub(crate) fn halo(&self, from: &str, to: &str) -> usize {
        let mut halo = vec![None; self.shapes.len()];
        halo[self.output(to).0] = Some(0);
        for node in self.nodes.iter().rev() {
            let Some(rows) = halo[node.output.0] else { continue };
            let source_rows = match &node.op {
                Op::Conv(conv) => {
                    let read = conv.stride * rows + conv.kernel - 1 - if conv.stride == 1 { conv.pad } else { 0 };
                    let source = self.shape(conv.sources.x).h;
                    conv.resize.map_or(read, |larger| (read * source).div_ceil(larger.h))
                }
                Op::GroupNorm(_) | Op::GroupNormMoments { .. } | Op::Activate { .. } | Op::Add { .. } => rows,
                op => panic!("{}: {op:?} reads more than some rows", node.name),
            };
            let residual = if let Op::Conv(conv) = &node.op { conv.residual } else { None };
            for id in node.op.inputs() {
                let needed = if Some(id) == residual { rows } else { source_rows };
                halo[id.0] = halo[id.0].max(Some(needed));
            }
        }
        halo[self.input(from).0].unwrap_or(0)
    }
}
