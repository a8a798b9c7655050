//! Blocks that the UNet and the VAE share.

use crate::graph::{ConvOptions, Extent, GraphBuilder, Sources, TensorId, View};

/// The way in which the timestep enters a residual block.
#[derive(Clone, Copy)]
pub(super) enum Time {
    /// Not at all.
    None,
    /// Added between the convolutions: `[n, 1, 1, c]` for a block of `c` channels.
    Add(View),
    /// As the scale and shift of the second norm, `[n, 1, 1, 2c]`.
    ScaleShift(View),
}

/// A residual block: norm, SiLU and convolution, twice, and the input added.
#[derive(Clone, Copy)]
pub(super) struct Resnet {
    /// Groups of the norms.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// The way in which the timestep enters.
    pub time: Time,
    /// Multiplies the result.
    pub scale: f32,
    /// Factor by which the input and the result are scaled down to stay within fp16's range: 1 everywhere except in the
    /// VAE. Scaling the input of a norm changes nothing as long as the norm's epsilon is scaled with it.
    pub shrink: f32,
}

impl Resnet {
    pub(super) fn build(
        self,
        g: &mut GraphBuilder,
        name: &str,
        sources: impl Into<Sources>,
        channels: usize,
    ) -> TensorId {
        let sources = sources.into();
        let layer = |suffix: &str| format!("{name}.{suffix}");
        let inputs: usize = sources.iter().map(|t| g.shape(t).c).sum();

        let (per_image, scale_shift) = match self.time {
            Time::None => (None, None),
            Time::Add(time) => (Some(time), None),
            Time::ScaleShift(time) => (None, Some(time)),
        };
        let residual = match inputs == channels {
            true => sources.x,
            false => {
                let options = ConvOptions { bias_gain: self.shrink, ..ConvOptions::default() };
                g.conv(&layer("conv_shortcut"), sources, channels, options) // [n, h, w, c]
            }
        };
        let eps = self.eps * self.shrink * self.shrink;
        let shrunk = ConvOptions { gain: self.shrink, bias_gain: self.shrink, ..ConvOptions::conv3x3() };

        let x = g.group_norm(&layer("norm1"), sources, self.groups, eps, true, None); // [n, h, w, inputs]
        let x = g.conv(&layer("conv1"), x, channels, ConvOptions { per_image, ..shrunk.clone() }); // [n, h, w, c]
        let x = g.group_norm(&layer("norm2"), x, self.groups, eps, true, scale_shift); // [n, h, w, c]
        let add = ConvOptions { residual: Some(residual), scale: self.scale, ..shrunk };
        g.conv(&layer("conv2"), x, channels, add) // [n, h, w, c]
    }
}

/// Attention with its projections. The output projection has the options `last`. Keys and values come from `context`,
/// or from `x` itself if there is none.
pub(super) fn attention(
    g: &mut GraphBuilder,
    name: &str,
    x: TensorId,
    context: Option<TensorId>,
    heads: usize,
    bias: bool,
    last: ConvOptions,
) -> TensorId {
    let channels = g.shape(x).c;
    let layer = |suffix: &str| format!("{name}.{suffix}");
    let options = ConvOptions { bias, ..ConvOptions::default() };
    let view = |tensor, offset| View { tensor, offset };

    let qkv = match context {
        None => {
            let names = ["to_q", "to_k", "to_v"].map(layer);
            let qkv = g.fused(&layer("to_qkv"), &names, x, &[channels; 3], options); // [n, h, w, 3c]
            (view(qkv, 0), view(qkv, channels), view(qkv, 2 * channels))
        }
        Some(context) => {
            let q = g.linear(&layer("to_q"), x, channels, options.clone()); // [n, h, w, c]
            let names = ["to_k", "to_v"].map(layer);
            let kv = g.fused(&layer("to_kv"), &names, context, &[channels; 2], options); // [n, 1, tokens, 2c]
            (view(q, 0), view(kv, 0), view(kv, channels))
        }
    };
    let x = g.attention(name, qkv, heads, channels / heads, false); // [n, h, w, c]
    g.linear(&layer("to_out.0"), x, channels, last) // [n, h, w, c]
}

/// A nearest-neighbour resize to `size`, then a convolution; `shrink` as in [`Resnet`].
pub(super) fn upsample(g: &mut GraphBuilder, name: &str, x: TensorId, size: Extent, shrink: f32) -> TensorId {
    let options = ConvOptions { resize: Some(size), bias_gain: shrink, ..ConvOptions::conv3x3() };
    let channels = g.shape(x).c;
    g.conv(&format!("{name}.upsamplers.0.conv"), x, channels, options) // [n, h, w, c]
}

/// A convolution with stride 2 and `pad` zeros above and left, one below and right; `shrink` as in [`Resnet`].
pub(super) fn downsample(g: &mut GraphBuilder, name: &str, x: TensorId, pad: usize, shrink: f32) -> TensorId {
    let options = ConvOptions { stride: 2, pad, bias_gain: shrink, ..ConvOptions::conv3x3() };
    let channels = g.shape(x).c;
    g.conv(&format!("{name}.downsamplers.0.conv"), x, channels, options) // [n, h / 2, w / 2, c]
}
