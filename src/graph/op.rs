//! The operations of a graph.

use super::{Extent, TensorId, WeightId};

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
    /// `max(x, 0)`. Unlike the others it follows a convolution's residual, as in residual networks without norms.
    Relu,
    /// `3 tanh(x / 3)`, by which TAESD keeps latents from -3 to 3.
    SoftClamp,
    /// `(x + 1) / 2`, from -1..1 to 0..1.
    ToUnit,
    /// `2 x - 1`, from 0..1 to -1..1.
    FromUnit,
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
/// `out = (activation(gain * W * x + bias_gain * bias + per_image) + residual) * scale`, or with
/// [`Activation::Relu`] `relu(gain * W * x + bias_gain * bias + per_image + residual) * scale`.
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
    /// Added after the activation, but before [`Activation::Relu`].
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
    pub(super) fn only_multiplies(&self, id: TensorId) -> bool {
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
    /// `[n, 1, groups, 2]`: the mean of each group, and the sum of squared deviations from it over as many numbers as
    /// the group has here. If given, they take the place of the sources' own: the sources are a strip of a larger
    /// image ([`Graph::strip`](super::Graph::strip)).
    pub moments: Option<TensorId>,
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
    /// The moments of the sources of a group norm, `[n, groups, h, 2]`: the mean of each group in each row of pixels,
    /// and the sum of squared deviations from it.
    GroupNormMoments {
        /// The group norm.
        of: GroupNorm,
    },
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
    /// The mean of the first and the second half of the images.
    MeanOfHalves {
        /// `[2n, h, w, c]`; the result is `[n, h, w, c]`.
        x: TensorId,
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
                [Some(&mut of.sources.x), of.sources.skip.as_mut(), scale_shift, of.moments.as_mut()]
            }
            Op::GroupNormMoments { of } => [Some(&mut of.sources.x), of.sources.skip.as_mut(), None, None],
            Op::GroupNormGradient { of, d } => {
                let scale_shift = of.scale_shift.as_mut().map(|view| &mut view.tensor);
                [Some(&mut of.sources.x), of.sources.skip.as_mut(), scale_shift, Some(d)]
            }
            Op::LayerNorm { x, .. }
            | Op::Activate { x, .. }
            | Op::MeanOfHalves { x }
            | Op::Sinusoid { x, .. }
            | Op::ClassToken { x, .. } => [Some(x), None, None, None],
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
