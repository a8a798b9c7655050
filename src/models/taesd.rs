//! TAESD, a small autoencoder that was distilled from Stable Diffusion's (github.com/madebyollin/taesd), in diffusers
//! `AutoencoderTiny`. Its images are from 0 to 1, and everything between its layers is a ReLU's result.

use super::TinyConfig;
use crate::graph::{Activation, ConvOptions, GraphBuilder, TensorId};

/// A convolution that ReLU follows.
fn conv() -> ConvOptions {
    ConvOptions { activation: Activation::Relu, ..ConvOptions::conv3x3() }
}

/// From latents to an image, from -1 to 1.
pub(super) fn decode(g: &mut GraphBuilder, config: &TinyConfig, latents: TensorId, outputs: usize) -> TensorId {
    let mut layer = Layers::new("decoder");
    let mut x = g.activate("decoder.clamp", latents, Activation::SoftClamp); // [n, h, w, latent]
    x = g.conv(&layer.next(), x, config.decoder_channels, conv()); // [n, h, w, c]
    layer.next(); // the ReLU
    for (i, &blocks) in config.decoder_blocks.iter().enumerate() {
        for _ in 0..blocks {
            x = block(g, &layer.next(), x);
        }
        if i + 1 < config.decoder_blocks.len() {
            layer.next(); // the upsampling
            let resize = Some(g.shape(x).extent().doubled());
            let options = ConvOptions { resize, bias: false, ..ConvOptions::conv3x3() };
            x = g.conv(&layer.next(), x, config.decoder_channels, options); // [n, 2h, 2w, c]
        }
    }
    let options = ConvOptions { activation: Activation::FromUnit, ..ConvOptions::conv3x3() };
    g.conv(&layer.next(), x, outputs, options)
}

/// From an image, from -1 to 1, to latents.
pub(super) fn encode(g: &mut GraphBuilder, config: &TinyConfig, image: TensorId, latents: usize) -> TensorId {
    let mut layer = Layers::new("encoder");
    let mut x = g.activate("encoder.unit", image, Activation::ToUnit); // [n, h, w, 3]
    for (i, &blocks) in config.encoder_blocks.iter().enumerate() {
        let options = match i {
            0 => ConvOptions::conv3x3(),
            _ => ConvOptions { stride: 2, bias: false, ..ConvOptions::conv3x3() },
        };
        x = g.conv(&layer.next(), x, config.encoder_channels, options); // [n, h, w, c], from the second [n, h / 2, ...]
        for _ in 0..blocks {
            x = block(g, &layer.next(), x);
        }
    }
    g.conv(&layer.next(), x, latents, ConvOptions::conv3x3())
}

/// Three convolutions, to whose result the block's input is added.
fn block(g: &mut GraphBuilder, name: &str, x: TensorId) -> TensorId {
    let channels = g.shape(x).c;
    let y = g.conv(&format!("{name}.conv.0"), x, channels, conv());
    let y = g.conv(&format!("{name}.conv.2"), y, channels, conv());
    g.conv(&format!("{name}.conv.4"), y, channels, ConvOptions { residual: Some(x), ..conv() })
}

/// The names of layers that are numbered consecutively, those without weights included.
struct Layers {
    part: &'static str,
    next: usize,
}

impl Layers {
    fn new(part: &'static str) -> Self {
        Layers { part, next: 0 }
    }

    fn next(&mut self) -> String {
        self.next += 1;
        format!("{}.layers.{}", self.part, self.next - 1)
    }
}
