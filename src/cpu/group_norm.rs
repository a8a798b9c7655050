//! Group normalisation and its gradient. Memory bound: the norm reads its input twice and writes once.
//!
//! The statistics of each stretch of pixels, which fits the cache, are taken in two passes (mean, then squared
//! deviations), and combined in f64 by Chan's rule, so that a large mean does not cancel the variance.

use super::simd::{dispatch, silu, silu_slope};
use super::{CpuWeights, NodeMemory};
use crate::graph::{GroupNorm, Shape, TensorId};
use rayon::prelude::*;
use std::ops::Range;

/// Pixels of a stretch. Constant, so that sums do not depend on the number of threads.
const STRETCH: usize = 64;

/// Shape of the first source, stretches per image, and channels of all sources.
fn sizes(norm: &GroupNorm, shape: impl Fn(TensorId) -> Shape) -> (Shape, usize, usize) {
    let x = shape(norm.sources.x);
    (x, x.tokens().div_ceil(STRETCH), norm.sources.iter().map(|t| shape(t).c).sum())
}

/// Elements of scratch memory: two numbers per channel and stretch, and a scale and a shift per channel and image.
pub(super) fn workspace(norm: &GroupNorm, shape: impl Fn(TensorId) -> Shape) -> usize {
    let (x, stretches, channels) = sizes(norm, shape);
    x.n * (stretches + 1) * channels * 2
}

/// Elements of scratch memory of the gradient: the same, and likewise its sums per channel and stretch, and the slope
/// and offset per channel and image.
pub(super) fn gradient_workspace(norm: &GroupNorm, shape: impl Fn(TensorId) -> Shape) -> usize {
    2 * workspace(norm, shape)
}

/// Elements and channels of both sources. The boundary to a skip connection may fall inside a group.
type Parts<'a> = [(&'a [f32], usize); 2];

fn parts<'a>(norm: &GroupNorm, memory: &'a NodeMemory) -> Parts<'a> {
    let part = |t: TensorId| (memory.read(t), memory.shape(t).c);
    [part(norm.sources.x), norm.sources.skip.map_or((&[][..], 0), part)]
}

/// Statistics of every stretch of `stretch` pixels, `[stretch][2][c]` per image: the mean of each group, repeated for
/// its channels, and the sum of squared deviations of each channel.
fn partial_statistics(parts: Parts, x: Shape, stretch: usize, per_group: usize, partial: &mut [f32]) {
    let channels: usize = parts.iter().map(|p| p.1).sum();
    let (pixels, stretches) = (x.tokens(), x.tokens().div_ceil(stretch));
    partial.par_chunks_exact_mut(channels * 2).enumerate().for_each(|(i, out)| {
        let (image, first) = (i / stretches, i % stretches * stretch);
        let rows = image * pixels + first..image * pixels + (first + stretch).min(pixels);
        let (means, squares) = out.split_at_mut(channels);
        statistics(parts, rows, per_group, means, squares);
    });
}

/// Mean and `1 / sqrt(variance + eps)` of a group, given as its range of channels, from the stretches of an image.
fn moments(image: &[f32], group: &Range<usize>, channels: usize, pixels: usize, eps: f32) -> (f64, f64) {
    let (mut count, mut mean, mut squares) = (0.0f64, 0.0f64, 0.0f64);
    for (stretch, stats) in image.chunks_exact(channels * 2).enumerate() {
        let n = (STRETCH.min(pixels - stretch * STRETCH) * group.len()) as f64;
        let delta = stats[group.start] as f64 - mean;
        mean += delta * n / (count + n);
        squares += stats[channels..][group.clone()].iter().map(|&x| x as f64).sum::<f64>();
        squares += delta * delta * count * n / (count + n);
        count += n;
    }
    (mean, 1.0 / (squares / count + eps as f64).sqrt())
}

/// Computes from the statistics of the stretches, or from moments that are given, the scale and the shift, `[n][2][c]`,
/// that make the norm `x * scale + shift` in each channel of each image.
fn affine_of(norm: &GroupNorm, weights: &CpuWeights, memory: &NodeMemory, partial: &[f32], affine: &mut [f32]) {
    let (x, stretches, channels) = sizes(norm, |t| memory.shape(t));
    let (weight, bias) = (weights.get(norm.weight), weights.get(norm.bias));
    let per_group = channels / norm.groups;
    let given = norm.moments.map(|id| memory.read(id));
    affine.par_chunks_exact_mut(channels * 2).enumerate().for_each(|(image, affine)| {
        let (scales, shifts) = affine.split_at_mut(channels);
        let modulation = norm.scale_shift.map(|view| {
            let start = image * memory.shape(view.tensor).c + view.offset;
            &memory.read(view.tensor)[start..][..channels * 2]
        });
        let partial = &partial[image * stretches * channels * 2..][..stretches * channels * 2];
        for group in (0..channels).step_by(per_group).map(|c| c..c + per_group) {
            let (mean, inverse) = match given {
                Some(given) => {
                    let at = (image * norm.groups + group.start / per_group) * 2;
                    let variance = given[at + 1] as f64 / (x.tokens() * per_group) as f64;
                    (given[at] as f64, 1.0 / (variance + norm.eps as f64).sqrt())
                }
                None => moments(partial, &group, channels, x.tokens(), norm.eps),
            };
            for c in group {
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

/// Two rows of `[n][2][channels]`.
fn pair(numbers: &[f32], image: usize, channels: usize) -> (&[f32], &[f32]) {
    numbers[image * channels * 2..][..channels * 2].split_at(channels)
}

/// Runs a [`GroupNorm`].
pub(super) fn run(norm: &GroupNorm, weights: &CpuWeights, out: TensorId, memory: &NodeMemory) {
    let (x, stretches, channels) = sizes(norm, |t| memory.shape(t));
    let parts = parts(norm, memory);
    let (partial, affine) = memory.workspace().split_at_mut(x.n * stretches * channels * 2);
    if norm.moments.is_none() {
        partial_statistics(parts, x, STRETCH, channels / norm.groups, partial);
    }
    affine_of(norm, weights, memory, partial, affine);

    let affine = &*affine;
    memory.write(out).par_chunks_mut(STRETCH * channels).enumerate().for_each(|(i, out)| {
        for (row, out) in (i * STRETCH..).zip(out.chunks_exact_mut(channels)) {
            let (scales, shifts) = pair(affine, row / x.tokens(), channels);
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

/// Elements of scratch memory of [`row_moments`]: two numbers per channel and row of pixels.
pub(super) fn row_moments_workspace(norm: &GroupNorm, shape: impl Fn(TensorId) -> Shape) -> usize {
    let (x, _, channels) = sizes(norm, shape);
    x.n * x.h * channels * 2
}

/// Runs an [`crate::graph::Op::GroupNormMoments`].
pub(super) fn row_moments(norm: &GroupNorm, out: TensorId, memory: &NodeMemory) {
    let (x, _, channels) = sizes(norm, |t| memory.shape(t));
    let per_group = channels / norm.groups;
    let partial = memory.workspace();
    partial_statistics(parts(norm, memory), x, x.w, per_group, partial);
    for (i, moments) in memory.write(out).chunks_exact_mut(2).enumerate() {
        let (image, group, row) = (i / x.h / norm.groups, i / x.h % norm.groups, i % x.h);
        let (means, squares) = pair(partial, image * x.h + row, channels);
        moments[0] = means[group * per_group];
        moments[1] = squares[group * per_group..][..per_group].iter().sum();
    }
}

/// Runs an [`crate::graph::Op::GroupNormGradient`]: the gradient with respect to the first source. With
/// `u = d silu'(y) scale`, where `scale` includes `1 / deviation`, and `x^` the normalised input, it is
/// `u - mean(u) - x^ mean(u x^)` with means over the group, computed as `u - slope x - offset`.
pub(super) fn gradient(norm: &GroupNorm, weights: &CpuWeights, d: TensorId, out: TensorId, memory: &NodeMemory) {
    let (x, stretches, channels) = sizes(norm, |t| memory.shape(t));
    let pixels = x.tokens();
    let per_group = channels / norm.groups;
    let parts = parts(norm, memory);
    let d = memory.read(d);
    let (partial, rest) = memory.workspace().split_at_mut(x.n * stretches * channels * 2);
    let (sums, rest) = rest.split_at_mut(x.n * stretches * channels * 2);
    let (affine, lines) = rest.split_at_mut(x.n * channels * 2);
    partial_statistics(parts, x, STRETCH, per_group, partial);
    affine_of(norm, weights, memory, partial, affine);

    let (partial, affine) = (&*partial, &*affine);
    sums.par_chunks_exact_mut(channels * 2).enumerate().for_each(|(i, sums)| {
        let (image, first) = (i / stretches, i % stretches * STRETCH);
        let (scales, shifts) = pair(affine, image, channels);
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

    // Slope and offset of each channel. The mean of u x^ follows from the sums of u x.
    let sums = &*sums;
    lines.par_chunks_exact_mut(channels * 2).enumerate().for_each(|(image, lines)| {
        let of_image = image * stretches * channels * 2..(image + 1) * stretches * channels * 2;
        let (slopes, offsets) = lines.split_at_mut(channels);
        for group in (0..channels).step_by(per_group).map(|c| c..c + per_group) {
            let (mean, inverse) = moments(&partial[of_image.clone()], &group, channels, pixels, norm.eps);
            let (mut u, mut ux) = (0.0f64, 0.0f64);
            for stretch in sums[of_image.clone()].chunks_exact(channels * 2) {
                u += stretch[group.clone()].iter().map(|&x| x as f64).sum::<f64>();
                ux += stretch[channels..][group.clone()].iter().map(|&x| x as f64).sum::<f64>();
            }
            let n = (pixels * per_group) as f64;
            let slope = (ux - mean * u) * inverse * inverse / n;
            slopes[group.clone()].fill(slope as f32);
            offsets[group].fill((u / n - mean * slope) as f32);
        }
    });

    let lines = &*lines;
    let (data, width) = parts[0];
    memory.write(out).par_chunks_mut(STRETCH * width).enumerate().for_each(|(i, out)| {
        for (row, out) in (i * STRETCH..).zip(out.chunks_exact_mut(width)) {
            let image = row / pixels;
            let (x, d) = (&data[row * width..][..width], &d[row * channels..][..width]);
            let (affine, line) = (pair(affine, image, channels), pair(lines, image, channels));
            gradient_row(x, d, affine, norm.silu, line, out);
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
    /// Writes the gradient of a row of pixels' channels, `u - slope x - offset`, with slopes and offsets in `line`.
    fn gradient_row(
        x: &[f32],
        d: &[f32],
        affine: (&[f32], &[f32]),
        with_silu: bool,
        line: (&[f32], &[f32]),
        out: &mut [f32],
    ) {
        let n = out.len();
        let (x, d, affine, line) = (&x[..n], &d[..n], (&affine.0[..n], &affine.1[..n]), (&line.0[..n], &line.1[..n]));
        for i in 0..n {
            let mut u = d[i] * affine.0[i];
            if with_silu {
                u *= silu_slope(x[i] * affine.0[i] + affine.1[i]);
            }
            out[i] = u - line.0[i] * x[i] - line.1[i];
        }
    }
}

dispatch! {
    /// Writes the mean of each group over some rows, repeated for its channels, and each channel's sum of squared
    /// deviations from that mean.
    fn statistics(
        parts: [(&[f32], usize); 2],
        rows: Range<usize>,
        per_group: usize,
        means: &mut [f32],
        squares: &mut [f32],
    ) {
        let n = (rows.len() * per_group) as f32;
        let split = parts[0].1;
        let source = |row: usize, part: usize| &parts[part].0[row * parts[part].1..][..parts[part].1];
        squares.fill(0.0);
        let (head, tail) = squares.split_at_mut(split);
        for row in rows.clone() {
            head.iter_mut().zip(source(row, 0)).for_each(|(sum, x)| *sum += x);
            tail.iter_mut().zip(source(row, 1)).for_each(|(sum, x)| *sum += x);
        }
        for (means, sums) in means.chunks_exact_mut(per_group).zip(squares.chunks_exact(per_group)) {
            means.fill(sums.iter().sum::<f32>() / n);
        }
        squares.fill(0.0);
        let (head, tail) = squares.split_at_mut(split);
        for row in rows {
            let deviations = |sums: &mut [f32], means: &[f32], x: &[f32]| {
                sums.iter_mut().zip(means).zip(x).for_each(|((sum, mean), x)| *sum += (x - mean) * (x - mean));
            };
            deviations(head, &means[..split], source(row, 0));
            deviations(tail, &means[split..], source(row, 1));
        }
    }
}

dispatch! {
    /// Writes `x * scale + shift` of a row, with SiLU if wanted.
    fn affine_row(x: &[f32], scales: &[f32], shifts: &[f32], with_silu: bool, out: &mut [f32]) {
        let numbers = out.iter_mut().zip(x).zip(scales.iter().zip(shifts));
        if with_silu {
            numbers.for_each(|((o, x), (scale, shift))| *o = silu(x * scale + shift));
        } else {
            numbers.for_each(|((o, x), (scale, shift))| *o = x * scale + shift);
        }
    }
}
