//! Building a graph: one method per operation. Each takes the layer's name in the checkpoint.

use super::*;

/// Everything that a convolution or linear layer may have in addition to its weight.
#[derive(Clone, Debug)]
pub struct ConvOptions {
    /// Kernel side.
    pub kernel: usize,
    /// Step between outputs.
    pub stride: usize,
    /// Zeros above and left.
    pub pad: usize,
    /// Zeros below and right: equal to `pad`, except in the VAE's asymmetric downsampling.
    pub pad_end: usize,
    /// Nearest-neighbour resize of the input to this size before the convolution.
    pub resize: Option<Extent>,
    /// True if there is a bias.
    pub bias: bool,
    /// `[n, 1, 1, c]` to add to every pixel of its image.
    pub per_image: Option<View>,
    /// Multiplies the product.
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

impl Default for ConvOptions {
    /// A linear layer with bias.
    fn default() -> Self {
        ConvOptions {
            kernel: 1,
            stride: 1,
            pad: 0,
            pad_end: 0,
            resize: None,
            bias: true,
            per_image: None,
            gain: 1.0,
            bias_gain: 1.0,
            activation: Activation::None,
            residual: None,
            scale: 1.0,
        }
    }
}

impl ConvOptions {
    /// A 3x3 convolution that keeps the size.
    pub fn conv3x3() -> Self {
        ConvOptions { kernel: 3, pad: 1, pad_end: 1, ..Default::default() }
    }
}

/// Builds a [`Graph`].
#[derive(Default)]
pub struct GraphBuilder {
    pub(super) graph: Graph,
}

impl GraphBuilder {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// The finished graph, in which [`WeightSpec::norm`] is set for the matrices that multiply a layer norm's result.
    pub fn finish(mut self) -> Graph {
        self.graph.link();
        let graph = &self.graph;
        let mut found = Vec::new();
        for node in &graph.nodes {
            let Op::LayerNorm { weight, bias, .. } = node.op else { continue };
            let matrices = graph.readers(node.output).map(|reader| match &reader.op {
                Op::Conv(conv) if conv.only_multiplies(node.output) => Some(conv.weight),
                _ => None,
            });
            if let Some(matrices) = matrices.collect::<Option<Vec<WeightId>>>()
                && !graph.is_output(node.output)
            {
                let norm = [weight, bias].map(|id| graph.weight(id).names[0].clone());
                found.extend(matrices.into_iter().map(|matrix| (matrix, norm.clone())));
            }
        }
        for (matrix, norm) in found {
            self.graph.weights[matrix.0].norm = Some(norm);
        }
        self.graph
    }

    /// Shape of an activation made so far.
    pub fn shape(&self, id: TensorId) -> Shape {
        self.graph.shape(id)
    }

    /// Declares an input of the graph.
    pub fn input(&mut self, name: &str, shape: Shape) -> TensorId {
        let id = self.tensor(shape);
        self.graph.inputs.push((name.to_string(), id));
        id
    }

    /// Names an activation as an output, which is kept until the run ends.
    pub fn output(&mut self, name: &str, id: TensorId) {
        self.graph.outputs.push((name.to_string(), id));
    }

    /// Keeps an activation from step to step, for steps that take it from the step before: see
    /// [`crate::plan::Plan::reusing_step`].
    pub fn keep(&mut self, id: TensorId) {
        if !self.graph.kept.contains(&id) {
            self.graph.kept.push(id);
        }
    }

    /// A convolution `name.weight`, `name.bias`.
    pub fn conv(&mut self, name: &str, sources: impl Into<Sources>, outputs: usize, options: ConvOptions) -> TensorId {
        self.fused(name, &[name.to_string()], sources, &[outputs], options)
    }

    /// A linear layer: [`GraphBuilder::conv`], whose default options are a 1x1 convolution with bias.
    pub fn linear(
        &mut self,
        name: &str,
        sources: impl Into<Sources>,
        outputs: usize,
        options: ConvOptions,
    ) -> TensorId {
        self.conv(name, sources, outputs, options)
    }

    /// Fuses several layers that read the same input into one layer, which concatenates their outputs along the
    /// channels.
    pub fn fused(
        &mut self,
        name: &str,
        layers: &[String],
        sources: impl Into<Sources>,
        outputs: &[usize],
        options: ConvOptions,
    ) -> TensorId {
        let sources = sources.into();
        let input = self.shape(sources.x);
        let channels: usize = sources.iter().map(|t| self.shape(t).c).sum();
        let Extent { h, w } = options.resize.unwrap_or(input.extent());
        let span = |size: usize| (size + options.pad + options.pad_end - options.kernel) / options.stride + 1;
        let total: usize = outputs.iter().sum();
        let gated = options.activation == Activation::Geglu;
        let shape = Shape::new(input.n, span(h), span(w), if gated { total / 2 } else { total });

        let weight = self.weight(WeightSpec {
            names: layers.iter().map(|l| format!("{l}.weight")).collect(),
            outputs: outputs.to_vec(),
            width: channels * options.kernel * options.kernel,
            kind: WeightKind::Matrix {
                kernel: options.kernel,
                inputs: channels,
                gated,
                resized: options.resize.is_some(),
            },
            norm: None,
        });
        let bias = options.bias.then(|| {
            self.weight(WeightSpec {
                names: layers.iter().map(|l| format!("{l}.bias")).collect(),
                outputs: outputs.to_vec(),
                width: 1,
                kind: WeightKind::Vector,
                norm: None,
            })
        });
        let conv = Conv {
            sources,
            weight,
            bias,
            kernel: options.kernel,
            stride: options.stride,
            pad: options.pad,
            resize: options.resize,
            per_image: options.per_image,
            gain: options.gain,
            bias_gain: options.bias_gain,
            activation: options.activation,
            residual: options.residual,
            scale: options.scale,
        };
        self.node(name, Op::Conv(conv), shape)
    }

    /// Group normalisation.
    pub fn group_norm(
        &mut self,
        name: &str,
        sources: impl Into<Sources>,
        groups: usize,
        eps: f32,
        silu: bool,
        scale_shift: Option<View>,
    ) -> TensorId {
        let sources = sources.into();
        let channels = sources.iter().map(|t| self.shape(t).c).sum();
        let shape = Shape { c: channels, ..self.shape(sources.x) };
        let (weight, bias) = self.affine(name, channels);
        self.node(
            name,
            Op::GroupNorm(GroupNorm { sources, weight, bias, groups, eps, scale_shift, silu, moments: None }),
            shape,
        )
    }

    /// Layer normalisation.
    pub fn layer_norm(&mut self, name: &str, x: TensorId, eps: f32) -> TensorId {
        let [normed] = self.layer_norms(name, [x], eps);
        normed
    }

    /// The same layer normalisation of several tensors of one width.
    pub fn layer_norms<const N: usize>(&mut self, name: &str, all: [TensorId; N], eps: f32) -> [TensorId; N] {
        let (weight, bias) = self.affine(name, self.shape(all[0]).c);
        all.map(|x| self.node(name, Op::LayerNorm { x, weight, bias, eps }, self.shape(x)))
    }

    /// Attention. The result has the height and width of the queries.
    pub fn attention(
        &mut self,
        name: &str,
        (q, k, v): (View, View, View),
        heads: usize,
        head_dim: usize,
        causal: bool,
    ) -> TensorId {
        let shape = Shape { c: heads * head_dim, ..self.shape(q.tensor) };
        let scale = (head_dim as f32).powf(-0.5);
        self.node(name, Op::Attention(Attention { q, k, v, heads, head_dim, scale, causal }), shape)
    }

    /// An elementwise function.
    pub fn activate(&mut self, name: &str, x: TensorId, activation: Activation) -> TensorId {
        let shape = self.shape(x);
        let shape = Shape { c: if activation == Activation::Geglu { shape.c / 2 } else { shape.c }, ..shape };
        self.node(name, Op::Activate { x, activation }, shape)
    }

    /// `a + b`.
    pub fn add(&mut self, name: &str, a: TensorId, b: TensorId) -> TensorId {
        let shape = self.shape(a);
        self.node(name, Op::Add { a, b }, shape)
    }

    /// See [`Op::MeanOfHalves`].
    pub fn mean_of_halves(&mut self, name: &str, x: TensorId) -> TensorId {
        let shape = self.shape(x);
        self.node(name, Op::MeanOfHalves { x }, Shape { n: shape.n / 2, ..shape })
    }

    /// Token embedding plus position embedding. `tokens` and `positions` are the names and the numbers of rows of the
    /// tables; the ids of a second table of tokens follow those of the first.
    ///
    /// # Panics
    /// If `ids` is not an input: indices are checked only when inputs are written.
    pub fn embed(
        &mut self,
        tokens: &[(&str, usize)],
        positions: (&str, usize),
        ids: TensorId,
        width: usize,
    ) -> TensorId {
        self.assert_input(ids);
        let table = |tables: &[(&str, usize)]| WeightSpec {
            names: tables.iter().map(|(name, _)| format!("{name}.weight")).collect(),
            outputs: tables.iter().map(|(_, rows)| *rows).collect(),
            width,
            kind: WeightKind::Table,
            norm: None,
        };
        let name = tokens[0].0;
        let shape = Shape { c: width, ..self.shape(ids) };
        let (tokens, positions) = (self.weight(table(tokens)), self.weight(table(&[positions])));
        self.node(name, Op::Embed { ids, tokens, positions }, shape)
    }

    /// Sinusoidal embedding.
    pub fn sinusoid(
        &mut self,
        name: &str,
        x: TensorId,
        dim: usize,
        flip_sin_to_cos: bool,
        freq_shift: f32,
    ) -> TensorId {
        let shape = self.shape(x);
        let shape = Shape { c: shape.c * dim, ..shape };
        self.node(name, Op::Sinusoid { x, dim, flip_sin_to_cos, freq_shift }, shape)
    }

    /// See [`Op::Shift`].
    pub fn shift(&mut self, name: &str, x: TensorId, shift: TensorId) -> TensorId {
        let shape = self.shape(x);
        self.node(name, Op::Shift { x, shift }, shape)
    }

    /// Puts a learnt token `class` before the others, and adds position embeddings to all.
    pub fn class_token(&mut self, class: &str, positions: &str, x: TensorId) -> TensorId {
        let shape = self.shape(x);
        let spec = |name: String, rows: usize, width: usize, kind| WeightSpec {
            names: vec![name],
            outputs: vec![rows],
            width,
            kind,
            norm: None,
        };
        let token = self.weight(spec(class.to_string(), shape.c, 1, WeightKind::Vector));
        let table = spec(format!("{positions}.weight"), shape.w + 1, shape.c, WeightKind::Table);
        let positions = self.weight(table);
        self.node(class, Op::ClassToken { x, class: token, positions }, Shape { w: shape.w + 1, ..shape })
    }

    /// Selects one token of each image.
    ///
    /// # Panics
    /// If `index` is not an input, as for [`GraphBuilder::embed`].
    pub fn select_token(&mut self, name: &str, x: TensorId, index: TensorId) -> TensorId {
        self.assert_input(index);
        let shape = self.shape(x);
        self.node(name, Op::SelectToken { x, index }, Shape { h: 1, w: 1, ..shape })
    }

    fn assert_input(&self, indices: TensorId) {
        assert!(self.graph.inputs.iter().any(|(_, id)| *id == indices), "indices must be an input of the graph");
    }

    fn affine(&mut self, name: &str, channels: usize) -> (WeightId, WeightId) {
        let vector = |suffix: &str| WeightSpec {
            names: vec![format!("{name}.{suffix}")],
            outputs: vec![channels],
            width: 1,
            kind: WeightKind::Vector,
            norm: None,
        };
        (self.weight(vector("weight")), self.weight(vector("bias")))
    }

    pub(super) fn tensor(&mut self, shape: Shape) -> TensorId {
        self.graph.shapes.push(shape);
        TensorId(self.graph.shapes.len() - 1)
    }

    pub(super) fn weight(&mut self, spec: WeightSpec) -> WeightId {
        self.graph.weights.push(spec);
        WeightId(self.graph.weights.len() - 1)
    }

    pub(super) fn node(&mut self, name: &str, op: Op, shape: Shape) -> TensorId {
        let output = self.tensor(shape);
        self.graph.nodes.push(Node { name: name.to_string(), op, output });
        output
    }
}
