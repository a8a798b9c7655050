//! The autoencoder between images and latents (Rombach et al., arXiv 2112.10752).

use super::blocks::{Resnet, Time, attention, downsample, upsample};
use super::{KlConfig, VaeConfig, VaeKind, taesd};
use crate::graph::{ConvOptions, Divisible, Extent, Graph, GraphBuilder, Node, Op, Shape, TensorId};

/// Added to the variance in all norms of the VAE.
const EPS: f32 = 1e-6;

/// Factor by which the activations between the VAE's layers are smaller than the checkpoint means them to be. Those of
/// SDXL exceed the largest fp16 number, 65,504. Every reader of them is a norm, so the result is the same, and scaling
/// by a power of two rounds nothing.
const SHRINK: f32 = 1.0 / 32.0;

/// The decoder for `batch` latents of size `latent`.
///
/// Input: `latents` `[batch, h, w, latent_channels]`, divided by the scaling factor. Output: `image`, larger by the
/// factor [`VaeConfig::scale`], with values from about -1 to 1.
pub fn vae_decoder(config: &VaeConfig, batch: usize, latent: Extent) -> Graph {
    let mut g = GraphBuilder::new();
    let latents = g.input("latents", Shape::new(batch, latent.h, latent.w, config.latent_channels));
    let image = match &config.kind {
        VaeKind::Kl(kl) => decode(&mut g, kl, latents, config.out_channels),
        VaeKind::Tiny(tiny) => taesd::decode(&mut g, tiny, latents, config.out_channels),
    };
    g.output("image", image);
    g.finish()
}

/// The decoder for one image of latents `width` wide, which can run in two parts. It is cut before the last but one of
/// its upsampling convolutions. The activations before the cut have a sixth of the size of the largest ones, and no
/// attention comes after it. A cut further up would save more memory, but then more work has to be done again for every
/// norm.
pub fn divisible_decoder(config: &VaeConfig, width: usize) -> Divisible<impl Fn(usize) -> Graph> {
    let graph = move |h| vae_decoder(config, 1, Extent { h, w: width });
    let upsampled = |node: &Node| match &node.op {
        Op::Conv(conv) if conv.resize.is_some() => Some(conv.sources.x),
        _ => None,
    };
    let all: Vec<TensorId> = graph(1).nodes().iter().filter_map(upsampled).collect();
    let cut = all.get(all.len().saturating_sub(2)).copied();
    Divisible { graph, cut, input: "latents", output: "image" }
}

/// The encoder for one image of `width` latents, which can run in two parts. It is cut after the second of its
/// downsampling convolutions.
pub fn divisible_encoder(config: &VaeConfig, width: usize) -> Divisible<impl Fn(usize) -> Graph> {
    let scale = config.scale();
    let graph = move |h: usize| vae_encoder(config, 1, Extent { h: h * scale, w: width * scale });
    let downsampled = |node: &Node| matches!(&node.op, Op::Conv(conv) if conv.stride == 2).then_some(node.output);
    let all: Vec<TensorId> = graph(1).nodes().iter().filter_map(downsampled).collect();
    let cut = all.get(1).or(all.first()).copied();
    Divisible { graph, cut, input: "image", output: "moments" }
}

/// The encoder for `batch` images of size `image`, whose height and width are multiples of [`VaeConfig::scale`].
///
/// Input: `image` `[batch, h, w, in_channels]` in -1 to 1. Output: `moments`, smaller by the same factor: the channels
/// of the mean, then those of the log-variance, which is not clamped. TAESD's latents have no variance, and `moments`
/// are the latents.
pub fn vae_encoder(config: &VaeConfig, batch: usize, image: Extent) -> Graph {
    let mut g = GraphBuilder::new();
    let image = g.input("image", Shape::new(batch, image.h, image.w, config.in_channels));
    let moments = match &config.kind {
        VaeKind::Kl(kl) => encode(&mut g, kl, image, 2 * config.latent_channels),
        VaeKind::Tiny(tiny) => taesd::encode(&mut g, tiny, image, config.latent_channels),
    };
    g.output("moments", moments);
    g.finish()
}

fn decode(g: &mut GraphBuilder, config: &KlConfig, latents: TensorId, outputs: usize) -> TensorId {
    let mut x = latents;
    if config.use_post_quant_conv {
        x = g.conv("post_quant_conv", x, g.shape(x).c, ConvOptions::default()); // [n, h, w, latent]
    }
    let (levels, channels) = (config.block_out_channels.len(), &config.block_out_channels);
    x = g.conv("decoder.conv_in", x, channels[levels - 1], first()); // [n, h, w, c]
    x = middle(g, config, "decoder", x);
    for i in 0..levels {
        let name = format!("decoder.up_blocks.{i}");
        for j in 0..=config.layers_per_block {
            x = resnet(config).build(g, &format!("{name}.resnets.{j}"), x, channels[levels - 1 - i]);
        }
        if i + 1 < levels {
            let size = g.shape(x).extent().doubled();
            x = upsample(g, &name, x, size, SHRINK); // [n, 2h, 2w, c]
        }
    }
    finish(g, config, "decoder", x, outputs)
}

fn encode(g: &mut GraphBuilder, config: &KlConfig, image: TensorId, moments: usize) -> TensorId {
    let (levels, channels) = (config.block_out_channels.len(), &config.block_out_channels);
    let mut x = g.conv("encoder.conv_in", image, channels[0], first()); // [n, h, w, c]
    for (i, &channels) in channels.iter().enumerate() {
        let name = format!("encoder.down_blocks.{i}");
        for j in 0..config.layers_per_block {
            x = resnet(config).build(g, &format!("{name}.resnets.{j}"), x, channels);
        }
        if i + 1 < levels {
            x = downsample(g, &name, x, 0, SHRINK); // [n, h / 2, w / 2, c]
        }
    }
    x = middle(g, config, "encoder", x);
    x = finish(g, config, "encoder", x, moments);
    if config.use_quant_conv {
        x = g.conv("quant_conv", x, moments, ConvOptions::default()); // [n, h, w, 2 * latent]
    }
    x
}

fn resnet(config: &KlConfig) -> Resnet {
    Resnet { groups: config.norm_num_groups, eps: EPS, time: Time::None, scale: 1.0, shrink: SHRINK }
}

/// The first convolution, from which the shrunk activations come.
fn first() -> ConvOptions {
    ConvOptions { gain: SHRINK, bias_gain: SHRINK, ..ConvOptions::conv3x3() }
}

/// Two residual blocks and, between them, attention with one head.
fn middle(g: &mut GraphBuilder, config: &KlConfig, name: &str, x: TensorId) -> TensorId {
    let channels = g.shape(x).c;
    let mut x = resnet(config).build(g, &format!("{name}.mid_block.resnets.0"), x, channels);
    if config.mid_block_add_attention {
        let name = format!("{name}.mid_block.attentions.0");
        let y = norm(g, config, &format!("{name}.group_norm"), x, false); // [n, h, w, c]
        let add = ConvOptions { residual: Some(x), kernel: 1, pad: 0, pad_end: 0, ..first() };
        x = attention(g, &name, y, None, 1, true, add);
    }
    resnet(config).build(g, &format!("{name}.mid_block.resnets.1"), x, channels)
}

/// A group norm of shrunk activations, with the epsilon that belongs to them.
fn norm(g: &mut GraphBuilder, config: &KlConfig, name: &str, x: TensorId, silu: bool) -> TensorId {
    g.group_norm(name, x, config.norm_num_groups, EPS * SHRINK * SHRINK, silu, None)
}

/// The last norm and the convolution after it.
fn finish(g: &mut GraphBuilder, config: &KlConfig, name: &str, x: TensorId, channels: usize) -> TensorId {
    let x = norm(g, config, &format!("{name}.conv_norm_out"), x, true); // [n, h, w, c]
    g.conv(&format!("{name}.conv_out"), x, channels, ConvOptions::conv3x3()) // [n, h, w, channels]
}
