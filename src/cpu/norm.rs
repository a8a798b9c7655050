//! Group and layer normalisation. Memory bound: group norm reads its input twice and writes once, layer norm keeps a
//! row in L1.
//!
//! Sums are taken in two passes over stretches that fit the cache (mean, then squared deviations) and combined in f64
//! by Chan's rule, so that a large mean does not eat the variance.

use super::Memory;
use super::simd::{dispatch, silu};
use crate::graph::{Shape, Sources, TensorId};
use rayon::prelude::*;

/// Pixels of a stretch. Fixed, so that sums do not depend on the number of threads.
const STRETCH: usize = 64;

/// Elements of scratch memory: mean and squared deviation of each group in each stretch, then scale and shift of each
/// channel of each image.
pub(super) fn workspace(x: Shape, channels: usize, groups: usize) -> usize {
    x.n * (x.tokens().div_ceil(STRETCH) * groups * 2 + channels * 2)
}

#[allow(clippy::too_many_arguments)]
pub(super) fn group_norm(
    sources: Sources,
    (weight, bias): (&[f32], &[f32]),
    groups: usize,
    eps: f32,
    scale_shift: Option<TensorId>,
    silu: bool,
    out: TensorId,
    memory: &Memory,
) {
    let shape = memory.shape(out);
    let (pixels, channels) = (shape.tokens(), shape.c);
    let stretches = pixels.div_ceil(STRETCH);
    let per_group = channels / groups;
    let (partial, affine) = memory.workspace().split_at_mut(shape.n * stretches * groups * 2);

    // A skip connection's boundary may fall inside a group: rows are gathered channel by channel from both.
    let parts: [(&[f32], usize); 2] = {
        let part = |t: TensorId| (memory.read(t), memory.shape(t).c);
        [part(sources.x), sources.skip.map_or((&[][..], 0), part)]
    };
    partial.par_chunks_exact_mut(groups * 2).enumerate().for_each(|(i, out)| {
        let (image, stretch) = (i / stretches, i % stretches);
        let first = stretch * STRETCH;
        let rows = image * pixels + first..image * pixels + (first + STRETCH).min(pixels);
        statistics(parts, rows, per_group, out);
    });

    affine.par_chunks_exact_mut(channels * 2).enumerate().for_each(|(image, affine)| {
        let (scales, shifts) = affine.split_at_mut(channels);
        let modulation = scale_shift.map(|t| &memory.read(t)[image * channels * 2..][..channels * 2]);
        for group in 0..groups {
            let (mut count, mut mean, mut squares) = (0.0f64, 0.0f64, 0.0f64);
            for stretch in 0..stretches {
                let stats = &partial[((image * stretches + stretch) * groups + group) * 2..][..2];
                let n = (STRETCH.min(pixels - stretch * STRETCH) * per_group) as f64;
                let delta = stats[0] as f64 - mean;
                mean += delta * n / (count + n);
                squares += stats[1] as f64 + delta * delta * count * n / (count + n);
                count += n;
            }
            let inverse = 1.0 / (squares / count + eps as f64).sqrt();
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

    let affine = &*affine;
    memory.write(out).par_chunks_mut(STRETCH * channels).enumerate().for_each(|(i, out)| {
        for (row, out) in (i * STRETCH..).zip(out.chunks_exact_mut(channels)) {
            let (scales, shifts) = affine[row / pixels * channels * 2..][..channels * 2].split_at(channels);
            let mut start = 0;
            for (data, width) in parts {
                let x = &data[row * width..][..width];
                let channels = start..start + width;
                affine_row(x, &scales[channels.clone()], &shifts[channels.clone()], silu, &mut out[channels]);
                start += width;
            }
        }
    });
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
