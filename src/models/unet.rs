//! The denoising UNet of Stable Diffusion 1.x, 2.x and SDXL (Rombach et al., arXiv 2112.10752; Podell et al.,
//! arXiv 2307.01952).

use super::blocks::{Resnet, Time, attention, downsample, upsample};
use super::{MidBlock, UNetConfig, UNetLevel};
use crate::graph::{Activation, ConvOptions, Graph, GraphBuilder, Shape, Sources, TensorId, View};

/// Added to the variance in the group norm that begins a transformer.
const TRANSFORMER_EPS: f32 = 1e-6;
/// Added to the variance in layer norms.
const LAYER_EPS: f32 = 1e-5;

/// The sizes of a UNet's inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UNetInput {
    /// Rows of the batch: one per image, or with guidance (CFG) two, the unconditional ones first.
    pub rows: usize,
    /// Height of the latents.
    pub h: usize,
    /// Width of the latents.
    pub w: usize,
    /// Tokens of a prompt.
    pub tokens: usize,
    /// The number of rows whose bottleneck can be shifted, counted from the last row. [`unet_halves`] ignores it.
    pub shifted: usize,
}

impl Default for UNetInput {
    /// A small input, for a graph that is only made to list its weights: these do not depend on the input's sizes.
    fn default() -> Self {
        UNetInput { rows: 1, h: 8, w: 8, tokens: 1, shifted: 0 }
    }
}

/// The UNet for inputs of given sizes.
///
/// Inputs: `sample` `[rows, h, w, out_channels]`, `timestep` `[rows, 1, 1, 1]`, `encoder_hidden_states`
/// `[rows, 1, tokens, cross_attention_dim]`; for SDXL also `text_embeds` `[rows, 1, 1, text_embed_dim]` and `time_ids`
/// `[rows, 1, 1, 6]`; for one that reads the guidance scale `timestep_cond` `[rows, 1, 1, time_cond_proj_dim]`
/// ([`guidance_embedding`]); if it knows masks [`MASK_AND_IMAGE`]; unless `shifted` is 0 also `shift`
/// `[shifted, h', w', c]`. Outputs: `sample`
/// `[rows, h, w, out_channels]`, and `mid` `[rows, h', w', c]`, the bottleneck before the shift.
pub fn unet(config: &UNetConfig, input: UNetInput) -> Graph {
    whole(config, input, Kept::Nothing)
}

/// The same UNet, without the output `mid`, for steps that reuse activations of the step before
/// ([`crate::plan::Plan::reusing_step`]). Neighbouring steps differ least in them.
///
/// Without a shift, such a step takes what the residual block before the last one reads, and computes the first block
/// of the down half and the last two of the up half (DeepCache, arXiv 2312.00858). With a shift it takes the down half,
/// and computes the bottleneck with its shift and the up half (Faster Diffusion, arXiv 2312.09608), so that a shift
/// acts in every step.
pub fn unet_with_reuse(config: &UNetConfig, input: UNetInput) -> Graph {
    whole(config, input, Kept::Inner)
}

/// The same UNet, without the output `mid`, for steps that take the outputs of all cross-attention layers, before they
/// are added to what they attend from, from an earlier step (T-GATE, arXiv 2404.02747).
///
/// If `guided`, the first half of the rows is unconditional, and what is kept is the mean of both halves. So it is as
/// large as that of a UNet with the conditional rows alone, whose steps reuse it in the same arena.
pub fn unet_with_gate(config: &UNetConfig, input: UNetInput, guided: bool) -> Graph {
    whole(config, input, Kept::CrossAttention { guided })
}

/// The activations that a UNet keeps for later steps.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    Nothing,
    /// See [`unet_with_reuse`].
    Inner,
    /// See [`unet_with_gate`].
    CrossAttention {
        guided: bool,
    },
}

fn whole(config: &UNetConfig, input: UNetInput, kept: Kept) -> Graph {
    let mut g = GraphBuilder::new();
    let sample = sample(&mut g, config, input);
    let time = time_embedding(&mut g, config, input.rows);
    let context = context(&mut g, config, input);
    let mut net = UNet { config, g, time, context, projected: time.into(), kept };
    let (x, mut skips) = net.down(sample);
    if kept == Kept::Inner && input.shifted > 0 {
        skips.iter().for_each(|&skip| net.g.keep(skip));
        net.g.keep(x);
    }
    let x = net.middle(x);
    if kept == Kept::Nothing {
        net.g.output("mid", x);
    }
    let x = net.shift(x, input.shifted);
    net.up(x, &mut skips, kept == Kept::Inner && input.shifted == 0);
    net.g.finish()
}

/// The same UNet cut after the mid block, for training: the down half with the mid block, and the up half.
///
/// The first graph has the inputs of [`unet`] except for `shift`. Its outputs are `mid`, `time` (the timestep as
/// residual blocks read it) and `skip.0`, `skip.1`, ... The second graph reads these and `encoder_hidden_states`; its
/// output is `sample`.
pub fn unet_halves(config: &UNetConfig, input: UNetInput) -> (Graph, Graph) {
    let mut g = GraphBuilder::new();
    let sample = sample(&mut g, config, input);
    let time = time_embedding(&mut g, config, input.rows);
    let states = context(&mut g, config, input);
    let kept = Kept::Nothing;
    let mut first = UNet { config, g, time, context: states, projected: time.into(), kept };
    let (x, skips) = first.down(sample);
    let x = first.middle(x);
    first.g.output("mid", x);
    first.g.output("time", time);
    for (i, &skip) in skips.iter().enumerate() {
        first.g.output(&format!("skip.{i}"), skip);
    }
    let first = first.g.finish();

    let mut g = GraphBuilder::new();
    let x = g.input("mid", first.shape(x));
    let time = g.input("time", first.shape(time));
    let context = context(&mut g, config, input);
    let mut skips: Vec<TensorId> =
        skips.iter().enumerate().map(|(i, &skip)| g.input(&format!("skip.{i}"), first.shape(skip))).collect();
    let mut second = UNet { config, g, time, context, projected: time.into(), kept };
    second.up(x, &mut skips, false);
    (first, second.g.finish())
}

/// The embedding of a guidance scale of which a UNet reads `width` channels (Meng et al., arXiv 2210.03142): sines and
/// cosines of `1000 (guidance - 1)`, in fp32 as diffusers' `get_guidance_scale_embedding` computes them.
pub fn guidance_embedding(guidance: f32, width: usize) -> Vec<f32> {
    let half = width / 2;
    let scaled = (f64::from(guidance) - 1.0) as f32 * 1000.0;
    let step = 10_000f32.ln() / (half - 1) as f32;
    let angles = move |i: usize| scaled * f64::from(i as f32 * -step).exp() as f32;
    (0..half).map(move |i| angles(i).sin()).chain((0..half).map(move |i| angles(i).cos())).collect()
}

/// The input of a UNet that knows masks (those of inpainting models) beside its latents, `[rows, h, w, in_channels -
/// out_channels]`: 1 where it paints and 0 elsewhere, then the latents of the picture that is grey where it paints.
pub const MASK_AND_IMAGE: &str = "mask_and_image";

/// The latents, and the channels that a UNet which knows masks reads beside them.
fn sample(g: &mut GraphBuilder, config: &UNetConfig, input: UNetInput) -> Sources {
    let shape = Shape::new(input.rows, input.h, input.w, config.out_channels);
    let x = g.input("sample", shape);
    let more = config.in_channels - config.out_channels;
    Sources { x, skip: (more > 0).then(|| g.input(MASK_AND_IMAGE, Shape { c: more, ..shape })) }
}

/// The states of the prompts, which cross attention reads.
fn context(g: &mut GraphBuilder, config: &UNetConfig, input: UNetInput) -> TensorId {
    g.input("encoder_hidden_states", Shape::new(input.rows, 1, input.tokens, config.cross_attention_dim))
}

/// The embedding that every residual block reads: of the timestep, and in SDXL of the image's sizes and the pooled
/// prompt.
fn time_embedding(g: &mut GraphBuilder, config: &UNetConfig, rows: usize) -> TensorId {
    let (flip, shift) = (config.flip_sin_to_cos, config.freq_shift);
    let timestep = g.input("timestep", Shape::new(rows, 1, 1, 1));
    let channels = config.levels[0].channels;
    let mut time = g.sinusoid("time_proj", timestep, channels, flip, shift); // [n, 1, 1, c]
    if let Some(width) = config.time_cond_proj_dim {
        let guidance = g.input("timestep_cond", Shape::new(rows, 1, 1, width));
        let options = ConvOptions { bias: false, residual: Some(time), ..ConvOptions::default() };
        time = g.linear("time_embedding.cond_proj", guidance, channels, options); // [n, 1, 1, c]
    }
    let embed = |g: &mut GraphBuilder, name: &str, x: Sources, residual| {
        let silu = ConvOptions { activation: Activation::Silu, ..ConvOptions::default() };
        let x = g.linear(&format!("{name}.linear_1"), x, config.time_embedding_dim, silu); // [n, 1, 1, time]
        let add = ConvOptions { residual, ..ConvOptions::default() };
        g.linear(&format!("{name}.linear_2"), x, config.time_embedding_dim, add) // [n, 1, 1, time]
    };
    let added = config.text_time.as_ref().map(|added| {
        let text = g.input("text_embeds", Shape::new(rows, 1, 1, added.text_embed_dim));
        let ids = g.input("time_ids", Shape::new(rows, 1, 1, 6));
        let ids = g.sinusoid("add_time_proj", ids, added.time_embed_dim, flip, shift); // [n, 1, 1, 6 * time_embed_dim]
        embed(g, "add_embedding", Sources { x: text, skip: Some(ids) }, None)
    });
    let x = embed(g, "time_embedding", time.into(), added);
    // Every residual block applies SiLU to it first.
    g.activate("time_embedding.silu", x, Activation::Silu) // [n, 1, 1, time]
}

struct UNet<'a> {
    config: &'a UNetConfig,
    g: GraphBuilder,
    time: TensorId,
    context: TensorId,
    /// The projected timestep of the next residual block, followed by those of the blocks after it: see
    /// [`UNet::project_time`].
    projected: View,
    kept: Kept,
}

impl UNet<'_> {
    /// Projects the timestep for residual blocks of given names and channels in one product. One product per block
    /// would have only a few rows of its own, and each would wait for its own part of the wide weight matrix.
    fn project_time(&mut self, resnets: Vec<(String, usize)>) {
        let each = if self.config.time_scale_shift { 2 } else { 1 };
        let names: Vec<String> = resnets.iter().map(|(name, _)| format!("{name}.time_emb_proj")).collect();
        let outputs: Vec<usize> = resnets.iter().map(|(_, channels)| each * channels).collect();
        self.projected = self.g.fused("time_emb_proj", &names, self.time, &outputs, ConvOptions::default()).into();
    }

    /// Builds the down half. Returns the coarsest activation and the skip connections, which the up half reads again.
    fn down(&mut self, sample: Sources) -> (TensorId, Vec<TensorId>) {
        let levels = &self.config.levels;
        let resnets = levels.iter().enumerate().flat_map(|(i, level)| {
            (0..level.layers).map(move |j| (format!("down_blocks.{i}.resnets.{j}"), level.channels))
        });
        let resnets_in_middle = match self.config.mid {
            MidBlock::None => 0,
            MidBlock::Resnet => 1,
            MidBlock::Attention(_) => 2,
        };
        let middle = levels
            .last()
            .into_iter()
            .flat_map(|level| (0..resnets_in_middle).map(move |j| (format!("mid_block.resnets.{j}"), level.channels)));
        self.project_time(resnets.chain(middle).collect());
        let mut x = self.g.conv("conv_in", sample, levels[0].channels, ConvOptions::conv3x3()); // [n, h, w, c]
        let mut skips = vec![x];
        for (i, level) in levels.iter().enumerate() {
            let name = format!("down_blocks.{i}");
            for j in 0..level.layers {
                x = self.resnet(&format!("{name}.resnets.{j}"), x, level.channels, 1.0);
                if let Some(&depth) = level.down.get(j) {
                    x = self.transformer(
                        &format!("{name}.attentions.{j}"),
                        x,
                        level,
                        depth,
                        level.only_cross_attention,
                    );
                }
                skips.push(x);
            }
            if i + 1 < levels.len() {
                x = downsample(&mut self.g, &name, x, 1, 1.0); // [n, h / 2, w / 2, c], halves rounded up
                skips.push(x);
            }
        }
        (x, skips)
    }

    fn middle(&mut self, mut x: TensorId) -> TensorId {
        let scale = self.config.mid_block_scale_factor.recip();
        let Some(level) = self.config.levels.last() else { return x };
        if self.config.mid != MidBlock::None {
            x = self.resnet("mid_block.resnets.0", x, level.channels, scale);
        }
        if let MidBlock::Attention(depth) = self.config.mid {
            x = self.transformer("mid_block.attentions.0", x, level, depth, false);
            x = self.resnet("mid_block.resnets.1", x, level.channels, scale);
        }
        x
    }

    /// Adds the input `shift` to the bottleneck of the last `shifted` rows, if there are any.
    fn shift(&mut self, x: TensorId, shifted: usize) -> TensorId {
        if shifted == 0 {
            return x;
        }
        let shift = self.g.input("shift", Shape { n: shifted, ..self.g.shape(x) });
        self.g.shift("mid_block.shift", x, shift) // [n, h, w, c]
    }

    /// Builds the up half, from the bottleneck to the output `sample`. If `keep`, the activation that the residual
    /// block before the last one reads is kept.
    fn up(&mut self, mut x: TensorId, skips: &mut Vec<TensorId>, keep: bool) {
        let resnets = self.config.levels.iter().rev().enumerate().flat_map(|(i, level)| {
            (0..=level.layers).map(move |j| (format!("up_blocks.{i}.resnets.{j}"), level.channels))
        });
        self.project_time(resnets.collect());
        for (i, level) in self.config.levels.iter().rev().enumerate() {
            let name = format!("up_blocks.{i}");
            for j in 0..=level.layers {
                if keep && skips.len() == 2 {
                    self.g.keep(x);
                }
                let sources = Sources { x, skip: skips.pop() };
                x = self.resnet(&format!("{name}.resnets.{j}"), sources, level.channels, 1.0);
                if let Some(&depth) = level.up.get(j) {
                    x = self.transformer(
                        &format!("{name}.attentions.{j}"),
                        x,
                        level,
                        depth,
                        level.only_cross_attention,
                    );
                }
            }
            // The size is that of the next level in the down half, which need not be twice the current one.
            if let Some(&skip) = skips.last() {
                let size = self.g.shape(skip).extent();
                x = upsample(&mut self.g, &name, x, size, 1.0); // [n, h, w, c]
            }
        }
        let (groups, eps) = (self.config.norm_num_groups, self.config.norm_eps);
        x = self.g.group_norm("conv_norm_out", x, groups, eps, true, None); // [n, h, w, c]
        x = self.g.conv("conv_out", x, self.config.out_channels, ConvOptions::conv3x3()); // [n, h, w, out_channels]
        self.g.output("sample", x);
    }

    fn resnet(&mut self, name: &str, sources: impl Into<Sources>, channels: usize, scale: f32) -> TensorId {
        let (time, width) = match self.config.time_scale_shift {
            true => (Time::ScaleShift(self.projected), 2 * channels),
            false => (Time::Add(self.projected), channels),
        };
        self.projected.offset += width;
        let resnet =
            Resnet { groups: self.config.norm_num_groups, eps: self.config.norm_eps, time, scale, shrink: 1.0 };
        resnet.build(&mut self.g, name, sources, channels)
    }

    /// A transformer of `depth` blocks.
    fn transformer(
        &mut self,
        name: &str,
        image: TensorId,
        level: &UNetLevel,
        depth: usize,
        only_cross: bool,
    ) -> TensorId {
        let channels = level.channels;
        let groups = self.config.norm_num_groups;
        let x = self.g.group_norm(&format!("{name}.norm"), image, groups, TRANSFORMER_EPS, false, None); // [n, h, w, c]
        let mut x = self.g.linear(&format!("{name}.proj_in"), x, channels, ConvOptions::default()); // [n, h, w, c]
        for i in 0..depth {
            x = self.transformer_block(&format!("{name}.transformer_blocks.{i}"), x, level.heads, only_cross);
        }
        let add = ConvOptions { residual: Some(image), ..ConvOptions::default() };
        self.g.linear(&format!("{name}.proj_out"), x, channels, add) // [n, h, w, c]
    }

    fn transformer_block(&mut self, name: &str, x: TensorId, heads: usize, only_cross: bool) -> TensorId {
        let channels = self.g.shape(x).c;
        let layer = |suffix: &str| format!("{name}.{suffix}");
        let y = self.g.layer_norm(&layer("norm1"), x, LAYER_EPS); // [n, h, w, c]
        let x = self.attend(&layer("attn1"), y, x, only_cross.then_some(self.context), heads); // [n, h, w, c]
        let y = self.g.layer_norm(&layer("norm2"), x, LAYER_EPS); // [n, h, w, c]
        let x = self.attend(&layer("attn2"), y, x, Some(self.context), heads); // [n, h, w, c]
        let y = self.g.layer_norm(&layer("norm3"), x, LAYER_EPS); // [n, h, w, c]
        let geglu = ConvOptions { activation: Activation::Geglu, ..ConvOptions::default() };
        let y = self.g.linear(&layer("ff.net.0.proj"), y, 8 * channels, geglu); // [n, h, w, 4c]
        let add = ConvOptions { residual: Some(x), ..ConvOptions::default() };
        self.g.linear(&layer("ff.net.2"), y, channels, add) // [n, h, w, c]
    }

    /// `x` plus the attention from `y` to `context`, or to `y` itself if there is none.
    fn attend(&mut self, name: &str, y: TensorId, x: TensorId, context: Option<TensorId>, heads: usize) -> TensorId {
        let g = &mut self.g;
        match (self.kept, context) {
            (Kept::CrossAttention { guided }, Some(_)) => {
                let out = attention(g, name, y, context, heads, false, ConvOptions::default()); // [n, h, w, c]
                let kept = if guided { g.mean_of_halves(&format!("{name}.mean"), out) } else { out };
                g.keep(kept);
                g.add(&format!("{name}.add"), out, x) // [n, h, w, c]
            }
            _ => {
                let add = ConvOptions { residual: Some(x), ..ConvOptions::default() };
                attention(g, name, y, context, heads, false, add) // [n, h, w, c]
            }
        }
    }
}
