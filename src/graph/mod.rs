//! Static graphs: the computation of a network at one given shape, as a small set of fused operations.
//!
//! A graph knows shapes and weight names but no device. Every activation is NHWC; a token sequence is an image of
//! height 1 (`[n, 1, tokens, c]`), a vector per image is `[n, 1, 1, c]`, so no tensor is ever reshaped. Attention reads
//! `[n, h, w, c]` as a sequence of `h * w` tokens.
//!
//! Names of nodes and weights are the checkpoint's own tensor names.

mod builder;
mod reverse;

pub use builder::{ConvOptions, GraphBuilder};
pub use reverse::Keep;

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

/// Elementwise functions that follow a matrix product or stand alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// The identity.
    None,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)` with the exact error function (Hendrycks and Gimpel, arXiv 1606.08415).
    Gelu,
    /// `x * sigmoid(1.702 x)`, as CLIP ViT-L/14 was trained.
    QuickGelu,
    /// `value * gelu(gate)`, values before gates, halving the channels (Shazeer, arXiv 2002.05202).
    Geglu,
}

/// One activation, or two whose channels follow one another (a UNet skip connection) without being copied together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sources {
    /// The first channels.
    pub x: TensorId,
    /// The channels after them.
    pub skip: Option<TensorId>,
}

impl From<TensorId> for Sources {
    fn from(x: TensorId) -> Self {
        Sources { x, skip: None }
    }
}

impl Sources {
    /// The tensors in channel order.
    pub fn iter(&self) -> impl Iterator<Item = TensorId> {
        [Some(self.x), self.skip].into_iter().flatten()
    }
}

/// Channels `offset..` of an activation. A layer reads its part of a fused one, such as q, k or v, through a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The whole activation.
    pub tensor: TensorId,
    /// First channel.
    pub offset: usize,
}

impl From<TensorId> for View {
    fn from(tensor: TensorId) -> Self {
        View { tensor, offset: 0 }
    }
}

/// A convolution or linear layer:
/// `out = (activation(gain * W * x + bias_gain * bias + per_image) + residual) * scale`.
#[derive(Clone, Debug)]
pub struct Conv {
    /// Input of the convolution.
    pub sources: Sources,
    /// A [`WeightKind::Matrix`].
    pub weight: WeightId,
    /// One number per output column.
    pub bias: Option<WeightId>,
    /// Kernel side: 1 or 3.
    pub kernel: usize,
    /// Step between outputs: 1 or 2.
    pub stride: usize,
    /// Zero rows above and zero columns left of the input; those below and right follow from the output's size.
    pub pad: usize,
    /// Nearest-neighbour resize of the input to this size, folded into the read.
    pub resize: Option<Extent>,
    /// `[n, 1, 1, c]` added to every pixel of its image (the time embedding).
    pub per_image: Option<View>,
    /// Multiplies the product. With `bias_gain` it scales down a network that would otherwise leave fp16's range.
    pub gain: f32,
    /// Multiplies the bias.
    pub bias_gain: f32,
    /// Applied after bias and `per_image`.
    pub activation: Activation,
    /// Added after the activation.
    pub residual: Option<TensorId>,
    /// Multiplies the sum.
    pub scale: f32,
}

impl Conv {
    /// True if every pixel is read once and by itself.
    pub fn is_pointwise(&self) -> bool {
        self.kernel == 1 && self.stride == 1 && self.pad == 0 && self.resize.is_none()
    }

    /// True if the convolution is a matrix product of `id`'s pixels, and reads `id` for nothing else.
    fn only_multiplies(&self, id: TensorId) -> bool {
        let more = self.per_image.map(|view| view.tensor).into_iter().chain(self.residual).any(|other| other == id);
        self.is_pointwise() && self.sources == id.into() && !more
    }
}

/// Group normalisation (Wu and He, arXiv 1803.08494), optionally modulated per image and followed by SiLU.
#[derive(Clone, Copy, Debug)]
pub struct GroupNorm {
    /// Input.
    pub sources: Sources,
    /// One scale per channel.
    pub weight: WeightId,
    /// One shift per channel.
    pub bias: WeightId,
    /// Number of groups.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// `[n, 1, 1, 2c]`: `y * (1 + scale) + shift`, scales first.
    pub scale_shift: Option<View>,
    /// True if SiLU follows.
    pub silu: bool,
}

/// `softmax(q k^T * scale) v` for each image and head.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Queries, `heads * head_dim` channels.
    pub q: View,
    /// Keys, likewise.
    pub k: View,
    /// Values, likewise.
    pub v: View,
    /// Number of heads.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Multiplies the scores; `1 / sqrt(head_dim)` everywhere so far.
    pub scale: f32,
    /// If true, token `i` attends only to tokens `0..=i`.
    pub causal: bool,
}

/// The operations.
#[derive(Clone, Debug)]
pub enum Op {
    /// See [`Conv`].
    Conv(Conv),
    /// See [`GroupNorm`].
    GroupNorm(GroupNorm),
    /// Layer normalisation over channels.
    LayerNorm {
        /// Input.
        x: TensorId,
        /// One scale per channel.
        weight: WeightId,
        /// One shift per channel.
        bias: WeightId,
        /// Added to the variance.
        eps: f32,
    },
    /// See [`Attention`].
    Attention(Attention),
    /// An elementwise function alone.
    Activate {
        /// Its argument.
        x: TensorId,
        /// The function.
        activation: Activation,
    },
    /// `a + b`.
    Add {
        /// One term.
        a: TensorId,
        /// The other.
        b: TensorId,
    },
    /// Gradient of [`Op::GroupNorm`] with respect to the first of its sources.
    GroupNormGradient {
        /// The operation.
        of: GroupNorm,
        /// Gradient with respect to its result.
        d: TensorId,
    },
    /// Gradient of [`Op::LayerNorm`] with respect to its input.
    LayerNormGradient {
        /// Input of the layer norm.
        x: TensorId,
        /// One scale per channel.
        weight: WeightId,
        /// Added to the variance.
        eps: f32,
        /// Gradient with respect to its result.
        d: TensorId,
    },
    /// Gradient of [`Op::Attention`] with respect to the queries alone, `[n, h, w, heads * head_dim]`, or, if queries,
    /// keys and values are views of one tensor, with respect to all three in the layout of that tensor.
    AttentionGradient {
        /// The operation.
        of: Attention,
        /// True if the gradient is also with respect to keys and values.
        fused: bool,
        /// Gradient with respect to its result.
        d: TensorId,
    },
    /// Gradient of [`Op::Activate`] with respect to its argument.
    ActivateGradient {
        /// The function's argument.
        x: TensorId,
        /// The function.
        activation: Activation,
        /// Gradient with respect to its result.
        d: TensorId,
    },
    /// Gradient of a nearest-neighbour resize: every pixel sums the gradients of the pixels that were copied from it.
    ResizeGradient {
        /// Gradient with respect to the larger image; the result has the size of the smaller one.
        d: TensorId,
    },
    /// Maps token ids (stored as f32, exact below 2^24) to rows of `tokens`, and adds rows of `positions`.
    Embed {
        /// `[n, 1, tokens, 1]`.
        ids: TensorId,
        /// Table `[vocabulary, c]`.
        tokens: WeightId,
        /// Table `[positions, c]`.
        positions: WeightId,
    },
    /// Sinusoidal embedding of each channel of `x` into `dim` channels
    /// (Vaswani et al., arXiv 1706.03762, section 3.5, as DDPM lays it out).
    Sinusoid {
        /// `[n, 1, 1, k]`; the result is `[n, 1, 1, k * dim]`.
        x: TensorId,
        /// Channels for each input; even.
        dim: usize,
        /// If true, cosines come before sines.
        flip_sin_to_cos: bool,
        /// Subtracted from `dim / 2` in the frequency's denominator.
        freq_shift: f32,
    },
    /// RespoDiff's transform of the bottleneck (arXiv 2509.15257): adds to each of the last `m` images a tensor of its
    /// own.
    Shift {
        /// `[n, h, w, c]`, the middle block's output.
        x: TensorId,
        /// `[m, h, w, c]` for the last `m` images, the conditional CFG rows: the sum of each image's concepts.
        shift: TensorId,
    },
    /// Puts a learnt token before the tokens of each image, and adds position embeddings to all.
    ClassToken {
        /// `[n, 1, tokens, c]`; the result has one token more.
        x: TensorId,
        /// The token, one number per channel.
        class: WeightId,
        /// Table `[1 + tokens, c]`.
        positions: WeightId,
    },
    /// Selects one token of each image.
    SelectToken {
        /// `[n, 1, tokens, c]`.
        x: TensorId,
        /// `[n, 1, 1, 1]`, the token's index.
        index: TensorId,
    },
}

impl Op {
    /// The activations that the operation reads.
    pub fn inputs(&self) -> impl Iterator<Item = TensorId> {
        let mut op = self.clone();
        op.slots().map(|slot| slot.copied()).into_iter().flatten()
    }

    /// Mutable references to the ids of the activations that the operation reads.
    pub(crate) fn slots(&mut self) -> [Option<&mut TensorId>; 4] {
        match self {
            Op::Conv(c) => {
                let per_image = c.per_image.as_mut().map(|view| &mut view.tensor);
                [Some(&mut c.sources.x), c.sources.skip.as_mut(), per_image, c.residual.as_mut()]
            }
            Op::GroupNorm(of) => {
                let scale_shift = of.scale_shift.as_mut().map(|view| &mut view.tensor);
                [Some(&mut of.sources.x), of.sources.skip.as_mut(), scale_shift, None]
            }
            Op::GroupNormGradient { of, d } => {
                let scale_shift = of.scale_shift.as_mut().map(|view| &mut view.tensor);
                [Some(&mut of.sources.x), of.sources.skip.as_mut(), scale_shift, Some(d)]
            }
            Op::LayerNorm { x, .. } | Op::Activate { x, .. } | Op::Sinusoid { x, .. } | Op::ClassToken { x, .. } => {
                [Some(x), None, None, None]
            }
            Op::LayerNormGradient { x, d, .. } | Op::ActivateGradient { x, d, .. } => [Some(x), Some(d), None, None],
            Op::Attention(of) => [Some(&mut of.q.tensor), Some(&mut of.k.tensor), Some(&mut of.v.tensor), None],
            Op::AttentionGradient { of, d, .. } => {
                [Some(&mut of.q.tensor), Some(&mut of.k.tensor), Some(&mut of.v.tensor), Some(d)]
            }
            Op::Add { a, b } => [Some(a), Some(b), None, None],
            Op::Shift { x, shift } => [Some(x), Some(shift), None, None],
            Op::Embed { ids, .. } => [Some(ids), None, None, None],
            Op::SelectToken { x, index } => [Some(x), Some(index), None, None],
            Op::ResizeGradient { d } => [Some(d), None, None, None],
        }
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
