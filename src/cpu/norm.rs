//! Group and layer normalisation. Memory bound: group norm reads its input twice and writes once, layer norm keeps a
//! row in L1.
//!
//! Sums are taken in two passes over stretches that fit the cache (mean, then squared deviations) and combined in f64
//! by Chan's rule, so that a large mean does not eat the variance.

use super::simd::{dispatch, silu, silu_slope};
use super::{Memory, Weights};
use crate::graph::{GroupNorm, Shape, TensorId};
use rayon::prelude::*;

/// Pixels of a stretch. Fixed, so that sums do not depend on the number of threads.
const STRETCH: usize = 64;

/// Pixels of an image, stretches of it, and channels.
fn sizes(norm: &GroupNorm, shape: impl Fn(TensorId) -> Shape) -> (Shape, usize, usize) {
    let x = shape(norm.sources.x);
    (x, x.tokens().div_ceil(STRETCH), norm.sources.iter().map(|t| shape(t).c).sum())
}

/// Elements of scratch memory: mean and squared deviation of each group in each stretch, then scale and shift of each
/// channel of each image.
pub(super) fn workspace(norm: &GroupNorm, shape: impl Fn(TensorId) -> Shape) -> usize {
    let (x, stretches, channels) = sizes(norm, shape);
    x.n * (stretches * norm.groups * 2 + channels * 2)
}

/// Of the gradient: besides the same, mean and inverse deviation of each group, and the gradient's sums by channel in
/// each stretch.
pub(super) fn gradient_workspace(norm: &GroupNorm, shape: impl Fn(TensorId) -> Shape) -> usize {
    let (x, stretches, channels) = sizes(norm, &shape);
    workspace(norm, shape) + x.n * (norm.groups * 4 + stretches * channels * 2)
}

/// The sources' numbers and channels. A skip connection's boundary may fall inside a group.
type Parts<'a> = [(&'a [f32], usize); 2];

fn parts<'a>(norm: &GroupNorm, memory: &'a Memory) -> Parts<'a> {
    let part = |t: TensorId| (memory.read(t), memory.shape(t).c);
    [part(norm.sources.x), norm.sources.skip.map_or((&[][..], 0), part)]
}

/// Mean and squared deviation of each group in each stretch of each image.
fn partial_statistics(parts: Parts, x: Shape, per_group: usize, partial: &mut [f32]) {
    let groups = parts.iter().map(|p| p.1).sum::<usize>() / per_group;
    let (pixels, stretches) = (x.tokens(), x.tokens().div_ceil(STRETCH));
    partial.par_chunks_exact_mut(groups * 2).enumerate().for_each(|(i, out)| {
        let (image, stretch) = (i / stretches, i % stretches);
        let first = stretch * STRETCH;
        let rows = image * pixels + first..image * pixels + (first + STRETCH).min(pixels);
        statistics(parts, rows, per_group, out);
    });
}

/// Mean and `1 / sqrt(variance + eps)` of a group, from its stretches.
fn moments(image: &[f32], group: usize, groups: usize, per_group: usize, pixels: usize, eps: f32) -> (f64, f64) {
    let (mut count, mut mean, mut squares) = (0.0f64, 0.0f64, 0.0f64);
    for (stretch, stats) in image.chunks_exact(groups * 2).enumerate() {
        let stats = &stats[group * 2..][..2];
        let n = (STRETCH.min(pixels - stretch * STRETCH) * per_group) as f64;
        let delta = stats[0] as f64 - mean;
        mean += delta * n / (count + n);
        squares += stats[1] as f64 + delta * delta * count * n / (count + n);
        count += n;
    }
    (mean, 1.0 / (squares / count + eps as f64).sqrt())
}

/// Scales and shifts of every channel of every image, `[n][2][c]`, from the stretches' statistics: the norm as
/// `x * scale + shift`.
fn affine_of(norm: &GroupNorm, weights: &Weights, memory: &Memory, partial: &[f32], affine: &mut [f32]) {
    let (x, stretches, channels) = sizes(norm, |t| memory.shape(t));
    let (weight, bias) = (weights.get(norm.weight), weights.get(norm.bias));
    let per_group = channels / norm.groups;
    affine.par_chunks_exact_mut(channels * 2).enumerate().for_each(|(image, affine)| {
        let (scales, shifts) = affine.split_at_mut(channels);
        let modulation = norm.scale_shift.map(|t| &memory.read(t)[image * channels * 2..][..channels * 2]);
        let partial = &partial[image * stretches * norm.groups * 2..][..stretches * norm.groups * 2];
        for group in 0..norm.groups {
            let (mean, inverse) = moments(partial, group, norm.groups, per_group, x.tokens(), norm.eps);
            for c in group * per_group..(group + 1) * per_group {
                let mut scale = weight[c] as f64 * inverse;
                let mut shift = bias[c] as f64 - mean * scale;
                if let Some(m) = modulation {
                    let factor = 1.0 + m[c] as f64;
                    (scale, shift) = (scale * factor, shift * factor + m[channels + c] as f64);
                }
                (scales[c], shifts[c]) = (scale as f32, shift as f32);
            }
        }
    });
}

/// Runs a [`GroupNorm`].
pub(super) fn group_norm(norm: &GroupNorm, weights: &Weights, out: TensorId, memory: &Memory) {
    let (x, stretches, channels) = sizes(norm, |t| memory.shape(t));
    let parts = parts(norm, memory);
    let (partial, affine) = memory.workspace().split_at_mut(x.n * stretches * norm.groups * 2);
    partial_statistics(parts, x, channels / norm.groups, partial);
    affine_of(norm, weights, memory, partial, affine);

    let affine = &*affine;
    memory.write(out).par_chunks_mut(STRETCH * channels).enumerate().for_each(|(i, out)| {
        for (row, out) in (i * STRETCH..).zip(out.chunks_exact_mut(channels)) {
            let (scales, shifts) = affine[row / x.tokens() * channels * 2..][..channels * 2].split_at(channels);
            let mut start = 0;
            for (data, width) in parts {
                let x = &data[row * width..][..width];
                let channels = start..start + width;
                affine_row(x, &scales[channels.clone()], &shifts[channels.clone()], norm.silu, &mut out[channels]);
                start += width;
            }
        }
    });
}

/// The gradient by the first source. With `u = d silu'(y) scale`, where `scale` holds `1 / deviation`, and `x^` the
/// normalised input, it is `u - mean(u) - x^ mean(u x^)`, means over the group.
pub(super) fn group_norm_gradient(norm: &GroupNorm, weights: &Weights, d: TensorId, out: TensorId, memory: &Memory) {
    let (x, stretches, channels) = sizes(norm, |t| memory.shape(t));
    let (pixels, groups) = (x.tokens(), norm.groups);
    let per_group = channels / groups;
    let parts = parts(norm, memory);
    let d = memory.read(d);
    let (partial, rest) = memory.workspace().split_at_mut(x.n * stretches * groups * 2);
    let (affine, rest) = rest.split_at_mut(x.n * channels * 2);
    let (means, sums) = rest.split_at_mut(x.n * groups * 4);
    partial_statistics(parts, x, per_group, partial);
    affine_of(norm, weights, memory, partial, affine);

    let (partial, affine) = (&*partial, &*affine);
    sums.par_chunks_exact_mut(channels * 2).enumerate().for_each(|(i, sums)| {
        let (image, first) = (i / stretches, i % stretches * STRETCH);
        let (scales, shifts) = affine[image * channels * 2..][..channels * 2].split_at(channels);
        sums.fill(0.0);
        let (by_channel, by_product) = sums.split_at_mut(channels);
        for pixel in first..(first + STRETCH).min(pixels) {
            let row = image * pixels + pixel;
            let mut start = 0;
            for (data, width) in parts {
                let c = start..start + width;
                gradient_sums(
                    &data[row * width..][..width],
                    &d[row * channels..][c.clone()],
                    (&scales[c.clone()], &shifts[c.clone()]),
                    norm.silu,
                    (&mut by_channel[c.clone()], &mut by_product[c]),
                );
                start += width;
            }
        }
    });

    // Of each group: mean, inverse deviation, mean(u) and mean(u x^), the last from the sums of u x.
    let sums = &*sums;
    means.par_chunks_exact_mut(groups * 4).enumerate().for_each(|(image, means)| {
        let partial = &partial[image * stretches * groups * 2..][..stretches * groups * 2];
        for (group, out) in means.chunks_exact_mut(4).enumerate() {
            let (mean, inverse) = moments(partial, group, groups, per_group, pixels, norm.eps);
            let (mut u, mut ux) = (0.0f64, 0.0f64);
            for stretch in
                sums[image * stretches * channels * 2..][..stretches * channels * 2].chunks_exact(channels * 2)
            {
                for c in group * per_group..(group + 1) * per_group {
                    u += stretch[c] as f64;
                    ux += stretch[channels + c] as f64;
                }
            }
            let n = (pixels * per_group) as f64;
            let product = (ux - mean * u) * inverse;
            out.copy_from_slice(&[mean as f32, inverse as f32, (u / n) as f32, (product / n) as f32]);
        }
    });

    let means = &*means;
    let (data, width) = parts[0];
    memory.write(out).par_chunks_mut(STRETCH * width).enumerate().for_each(|(i, out)| {
        for (row, out) in (i * STRETCH..).zip(out.chunks_exact_mut(width)) {
            let image = row / pixels;
            let (scales, shifts) = affine[image * channels * 2..][..channels * 2].split_at(channels);
            let x = &data[row * width..][..width];
            let d = &d[row * channels..][..width];
            for (group, out) in out.chunks_mut(per_group).enumerate() {
                let c = group * per_group..group * per_group + out.len();
                let means = &means[(image * groups + group) * 4..][..4];
                let affine = (&scales[c.clone()], &shifts[c.clone()]);
                gradient_row(&x[c.clone()], &d[c], affine, norm.silu, means, out);
            }
        }
    });
}

dispatch! {
    /// Adds `u` and `u x` of a row to the sums of its channels.
    fn gradient_sums(x: &[f32], d: &[f32], affine: (&[f32], &[f32]), with_silu: bool, sums: (&mut [f32], &mut [f32])) {
        for i in 0..x.len().min(d.len()).min(affine.0.len()).min(affine.1.len()).min(sums.0.len()).min(sums.1.len()) {
            let mut u = d[i] * affine.0[i];
            if with_silu {
                u *= silu_slope(x[i] * affine.0[i] + affine.1[i]);
            }
            sums.0[i] += u;
            sums.1[i] += u * x[i];
        }
    }
}

dispatch! {
    fn gradient_row(x: &[f32], d: &[f32], affine: (&[f32], &[f32]), with_silu: bool, means: &[f32], out: &mut [f32]) {
        let [mean, inverse, mean_u, mean_product] = [means[0], means[1], means[2], means[3]];
        for i in 0..x.len().min(d.len()).min(affine.0.len()).min(affine.1.len()).min(out.len()) {
            let mut u = d[i] * affine.0[i];
            if with_silu {
                u *= silu_slope(x[i] * affine.0[i] + affine.1[i]);
            }
            out[i] = u - mean_u - (x[i] - mean) * inverse * mean_product;
        }
    }
}

dispatch! {
    /// Mean and sum of squared deviations of each group over some rows.
    fn statistics(parts: [(&[f32], usize); 2], rows: std::ops::Range<usize>, per_group: usize, out: &mut [f32]) {
        let n = (rows.len() * per_group) as f32;
        for (group, stats) in out.chunks_exact_mut(2).enumerate() {
            let (start, end) = (group * per_group, (group + 1) * per_group);
            let split = start.max(parts[0].1.min(end));
            let ranges = [(parts[0], start, split), (parts[1], split - parts[0].1.min(split), end - parts[0].1.min(end))];
            let mut mean = 0.0;
            let mut squares = 0.0;
            for pass in 0..2 {
                let mut lanes = [0.0f32; 16];
                for ((data, width), start, end) in ranges {
                    if start >= end {
                        continue;
                    }
                    for row in rows.clone() {
                        let x = &data[row * width..][start..end];
                        for x in x.chunks(16) {
                            for (lane, x) in lanes.iter_mut().zip(x) {
                                let d = x - mean;
                                *lane += if pass == 0 { d } else { d * d };
                            }
                        }
                    }
                }
                let sum: f32 = lanes.iter().sum();
                if pass == 0 { mean = sum / n } else { squares = sum }
            }
            stats.copy_from_slice(&[mean, squares]);
        }
    }
}

dispatch! {
    fn affine_row(x: &[f32], scales: &[f32], shifts: &[f32], with_silu: bool, out: &mut [f32]) {
        let numbers = out.iter_mut().zip(x).zip(scales.iter().zip(shifts));
        if with_silu {
            numbers.for_each(|((o, x), (scale, shift))| *o = silu(x * scale + shift));
        } else {
            numbers.for_each(|((o, x), (scale, shift))| *o = x * scale + shift);
        }
    }
}

pub(super) fn layer_norm(x: TensorId, affine: (&[f32], &[f32]), eps: f32, out: TensorId, memory: &Memory) {
    let channels = memory.shape(out).c;
    let x = memory.read(x);
    let chunk = STRETCH * channels;
    memory
        .write(out)
        .par_chunks_mut(chunk)
        .zip(x.par_chunks(chunk))
        .for_each(|(out, x)| layer_norm_rows(x, affine, eps, channels, out));
}

dispatch! {
    fn layer_norm_rows(x: &[f32], affine: (&[f32], &[f32]), eps: f32, channels: usize, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(channels).zip(out.chunks_exact_mut(channels)) {
            let mean = lane_sum(x, |x| x) / channels as f32;
            let variance = lane_sum(x, |x| (x - mean) * (x - mean)) / channels as f32;
            let inverse = 1.0 / (variance + eps).sqrt();
            for ((o, x), (w, b)) in out.iter_mut().zip(x).zip(affine.0.iter().zip(affine.1)) {
                *o = (x - mean) * inverse * w + b;
            }
        }
    }
}

/// The gradient by a layer norm's input; see [`group_norm_gradient`], with a row as the group.
pub(super) fn layer_norm_gradient(x: TensorId, weight: &[f32], eps: f32, d: TensorId, out: TensorId, memory: &Memory) {
    let channels = memory.shape(out).c;
    let (x, d) = (memory.read(x), memory.read(d));
    let chunk = STRETCH * channels;
    let chunks = memory.write(out).par_chunks_mut(chunk).zip(x.par_chunks(chunk)).zip(d.par_chunks(chunk));
    chunks.for_each(|((out, x), d)| layer_norm_gradient_rows(x, weight, eps, d, channels, out));
}

dispatch! {
    fn layer_norm_gradient_rows(x: &[f32], weight: &[f32], eps: f32, d: &[f32], channels: usize, out: &mut [f32]) {
        let rows = x.chunks_exact(channels).zip(d.chunks_exact(channels)).zip(out.chunks_exact_mut(channels));
        for ((x, d), out) in rows {
            let mean = lane_sum(x, |x| x) / channels as f32;
            let variance = lane_sum(x, |x| (x - mean) * (x - mean)) / channels as f32;
            let inverse = 1.0 / (variance + eps).sqrt();
            for ((o, d), w) in out.iter_mut().zip(d).zip(weight) {
                *o = d * w * inverse;
            }
            let mean_u = lane_sum(out, |u| u) / channels as f32;
            let mut lanes = [0.0f32; 16];
            for (x, u) in x.chunks(16).zip(out.chunks(16)) {
                for ((lane, x), u) in lanes.iter_mut().zip(x).zip(u) {
                    *lane += (x - mean) * u;
                }
            }
            let mean_product = lanes.iter().sum::<f32>() * inverse / channels as f32;
            for (o, x) in out.iter_mut().zip(x) {
                *o = *o - mean_u - (x - mean) * inverse * mean_product;
            }
        }
    }
}

/// Sum of `f(x)` in 16 lanes: vectorises, and rounds less than one chain.
#[inline(always)]
fn lane_sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let mut chunks = x.chunks_exact(16);
    for chunk in &mut chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += f(x);
    }
    lanes.iter().sum()
}
