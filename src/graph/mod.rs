//! Static graphs: the computation of a network at one given shape, as a small set of fused operations.
//!
//! A graph knows shapes and weight names but no device. Every activation is NHWC; a token sequence is an image of
//! height 1 (`[n, 1, tokens, c]`), a vector per image is `[n, 1, 1, c]`, so no tensor is ever reshaped. Attention reads
//! `[n, h, w, c]` as a sequence of `h * w` tokens.
//!
//! Names of nodes and weights are the checkpoint's own tensor names.

mod builder;
mod op;
mod reverse;
mod strip;

pub use builder::{ConvOptions, GraphBuilder};
pub use op::{Activation, Attention, Conv, GroupNorm, Op, Sources, View};
pub use reverse::Keep;
pub use strip::Divisible;

use crate::{Error, Result};
use std::fmt;

/// The shape of an activation, NHWC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Images.
    pub n: usize,
    /// Rows.
    pub h: usize,
    /// Columns; tokens where `h` is 1.
    pub w: usize,
    /// Channels, the innermost and contiguous dimension.
    pub c: usize,
}

impl Shape {
    /// `[n, h, w, c]`.
    pub fn new(n: usize, h: usize, w: usize, c: usize) -> Self {
        Shape { n, h, w, c }
    }

    /// Height and width.
    pub fn extent(&self) -> Extent {
        Extent { h: self.h, w: self.w }
    }

    /// Tokens of one image: `h * w`.
    pub fn tokens(&self) -> usize {
        self.h * self.w
    }

    /// Rows of the activation seen as a matrix: `n * h * w`.
    pub fn rows(&self) -> usize {
        self.n * self.h * self.w
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows() * self.c
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}, {}, {}]", self.n, self.h, self.w, self.c)
    }
}

/// Height and width of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
}

impl Extent {
    /// As many rows as columns.
    pub fn square(side: usize) -> Self {
        Extent { h: side, w: side }
    }

    /// Twice the height and the width.
    pub fn doubled(self) -> Self {
        Extent { h: 2 * self.h, w: 2 * self.w }
    }
}

/// An activation of a [`Graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorId(pub(crate) usize);

/// A weight of a [`Graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightId(pub(crate) usize);

/// The role of a weight in the operation that reads it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WeightKind {
    /// One number per channel: biases, norm scales and shifts.
    Vector,
    /// Rows that are looked up: token and position embeddings, `[rows, c]`.
    Table,
    /// The right-hand side of a convolution or linear layer, `[out, in, k, k]` or `[out, in]` in the checkpoint.
    Matrix {
        /// Kernel side (1 for linear layers).
        kernel: usize,
        /// Input channels.
        inputs: usize,
        /// True for GEGLU: the first half of the outputs are values, the second half gates. Executors pack the column
        /// of a value near that of its gate.
        gated: bool,
        /// True if the source is resized first. If that doubles its size, an executor may sum the taps that read the
        /// same pixel.
        resized: bool,
    },
    /// A [`WeightKind::Matrix`] transposed for a data gradient: outputs become inputs, and taps are mirrored.
    Mirrored {
        /// Kernel side.
        kernel: usize,
        /// Input channels of the layer.
        inputs: usize,
        /// The number of input channels, counted from the first, for which the gradient is wanted.
        wanted: usize,
    },
}

/// A weight as the checkpoint names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WeightSpec {
    /// Tensor names; several are concatenated along the output dimension (fused q, k, v).
    pub names: Vec<String>,
    /// Output length of each name: elements of a vector, rows of a table or matrix.
    pub outputs: Vec<usize>,
    /// Width of a row of a table or matrix (`inputs * kernel * kernel`); 1 for vectors.
    pub width: usize,
    /// Role of the weight.
    pub kind: WeightKind,
    /// Names of the scale and the shift of the layer norm whose result the matrix multiplies; set only if nothing but
    /// such products reads that result. An executor may then fold both into the matrix and normalise only: the norm of
    /// `x` is `scale * n(x) + shift`, and `W (scale * n + shift) = (W * scale) n + W shift`. [`GraphBuilder::finish`]
    /// sets it.
    pub norm: Option<[String; 2]>,
}

impl WeightSpec {
    /// Output length over all names.
    pub fn total_outputs(&self) -> usize {
        self.outputs.iter().sum()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.total_outputs() * self.width
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The scale and the shift of [`WeightSpec::norm`] as one vector: a scale for each input, then a shift for each.
    pub fn norm_vector(&self) -> Option<WeightSpec> {
        let names = self.norm.as_ref()?.to_vec();
        Some(WeightSpec { names, outputs: vec![self.width; 2], width: 1, kind: WeightKind::Vector, norm: None })
    }
}

/// One operation and the activation that it makes.
#[derive(Clone, Debug)]
pub struct Node {
    /// The checkpoint's name of the layer.
    pub name: String,
    /// The operation.
    pub op: Op,
    /// The result.
    pub output: TensorId,
}

/// A network at one shape. Nodes are in an order in which they can be computed.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    pub(crate) shapes: Vec<Shape>,
    pub(crate) weights: Vec<WeightSpec>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) inputs: Vec<(String, TensorId)>,
    pub(crate) outputs: Vec<(String, TensorId)>,
    /// Activations that later steps may reuse; see [`GraphBuilder::keep`].
    pub(crate) kept: Vec<TensorId>,
    /// Index of the first node of the backward half; see [`Graph::with_gradient`].
    pub(crate) backward: Option<usize>,
    /// True if its output is an activation that another part of the network reads; see [`Graph::part`].
    pub(crate) continued: bool,
    /// Maker and readers of each activation, once the graph is finished.
    links: Vec<Links>,
}

/// Index of the node that makes an activation, if it is not an input, and indices of the nodes that read it.
#[derive(Clone, Debug, Default)]
struct Links {
    maker: Option<usize>,
    readers: Vec<usize>,
}

impl Graph {
    /// Shape of an activation.
    pub fn shape(&self, id: TensorId) -> Shape {
        self.shapes[id.0]
    }

    /// True if it keeps activations for later steps.
    pub fn keeps(&self) -> bool {
        !self.kept.is_empty()
    }

    /// A weight's description.
    pub fn weight(&self, id: WeightId) -> &WeightSpec {
        &self.weights[id.0]
    }

    /// All weights. Their order does not depend on the shape that the graph was made for.
    pub fn weights(&self) -> &[WeightSpec] {
        &self.weights
    }

    /// The operations.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node that makes an activation; `None` for an input.
    pub fn maker(&self, id: TensorId) -> Option<&Node> {
        self.links[id.0].maker.map(|node| &self.nodes[node])
    }

    /// The nodes that read an activation.
    pub fn readers(&self, id: TensorId) -> impl Iterator<Item = &Node> {
        self.links[id.0].readers.iter().map(|&node| &self.nodes[node])
    }

    /// True if the activation is an output.
    pub fn is_output(&self, id: TensorId) -> bool {
        self.outputs.iter().any(|(_, output)| *output == id)
    }

    /// Finds the maker and the readers of every activation anew.
    fn link(&mut self) {
        self.links = vec![Links::default(); self.shapes.len()];
        for (number, node) in self.nodes.iter().enumerate() {
            self.links[node.output.0].maker = Some(number);
            for id in node.op.inputs() {
                let readers = &mut self.links[id.0].readers;
                if readers.last() != Some(&number) {
                    readers.push(number);
                }
            }
        }
    }

    /// The named input.
    ///
    /// # Panics
    /// If the graph has none of that name: names are fixed by the code in `models/`.
    pub fn input(&self, name: &str) -> TensorId {
        self.find_input(name).unwrap_or_else(|| panic!("the graph has no input `{name}`"))
    }

    /// The named input, if the graph has it.
    pub fn find_input(&self, name: &str) -> Option<TensorId> {
        self.inputs.iter().find(|(n, _)| n == name).map(|(_, id)| *id)
    }

    /// The number of rows from which the values of an input choose, if they are indices: token ids of a vocabulary, or
    /// the position of a token. If several nodes read them, it is the smallest number.
    pub fn choices(&self, input: TensorId) -> Option<usize> {
        let rows = self.nodes.iter().filter_map(|node| match node.op {
            Op::Embed { ids, tokens, .. } if ids == input => Some(self.weight(tokens).total_outputs()),
            Op::SelectToken { x, index } if index == input => Some(self.shape(x).tokens()),
            _ => None,
        });
        rows.min()
    }

    /// Checks that `values` may be written to the named input, since kernels use indices without checking them.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for the first index that is not a whole number or not that of a row.
    ///
    /// # Panics
    /// If the graph has no such input, or one of another length.
    pub fn check_values(&self, name: &str, values: &[f32]) -> Result<()> {
        let id = self.input(name);
        assert_eq!(values.len(), self.shape(id).len(), "input `{name}`");
        let Some(rows) = self.choices(id) else { return Ok(()) };
        let wrong = |x: &f32| !(x.fract() == 0.0 && (0.0..rows as f32).contains(x));
        match values.iter().position(wrong) {
            None => Ok(()),
            Some(place) => Err(Error::invalid(
                "prompt",
                format!(
                    "`{name}` holds {} at position {place}, where whole numbers from 0 to {} are possible",
                    values[place],
                    rows - 1
                ),
            )
            .advise("were the tokens made for another model?")),
        }
    }

    /// The named output.
    ///
    /// # Panics
    /// If the graph has none of that name.
    pub fn output(&self, name: &str) -> TensorId {
        self.find_output(name).unwrap_or_else(|| panic!("the graph has no output `{name}`"))
    }

    /// The named output, if the graph has it.
    pub fn find_output(&self, name: &str) -> Option<TensorId> {
        self.outputs.iter().find(|(n, _)| n == name).map(|(_, id)| *id)
    }

    /// Names of the outputs.
    pub fn outputs(&self) -> impl Iterator<Item = &str> {
        self.outputs.iter().map(|(name, _)| name.as_str())
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.weights.iter().map(WeightSpec::len).sum()
    }
}
