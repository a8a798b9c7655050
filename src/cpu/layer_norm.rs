//! Layer normalisation and its gradient. Memory bound: a row stays in L1 for all its passes.

use super::NodeMemory;
use super::simd::dispatch;
use crate::graph::TensorId;
use rayon::prelude::*;

/// Rows that a thread takes at a time.
const CHUNK: usize = 64;

/// Runs a layer norm; `affine` holds scales and shifts.
pub(super) fn run(x: TensorId, affine: (&[f32], &[f32]), eps: f32, out: TensorId, memory: &NodeMemory) {
    let channels = memory.shape(out).c;
    let x = memory.read(x);
    let chunk = CHUNK * channels;
    memory
        .write(out)
        .par_chunks_mut(chunk)
        .zip(x.par_chunks(chunk))
        .for_each(|(out, x)| norm_rows(x, affine, eps, channels, out));
}

dispatch! {
    fn norm_rows(x: &[f32], affine: (&[f32], &[f32]), eps: f32, channels: usize, out: &mut [f32]) {
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

/// Runs an [`crate::graph::Op::LayerNormGradient`]: the gradient with respect to the input, by the formula of
/// [`super::group_norm::gradient`] with a row as the group.
pub(super) fn gradient(x: TensorId, weight: &[f32], eps: f32, d: TensorId, out: TensorId, memory: &NodeMemory) {
    let channels = memory.shape(out).c;
    let (x, d) = (memory.read(x), memory.read(d));
    let chunk = CHUNK * channels;
    let chunks = memory.write(out).par_chunks_mut(chunk).zip(x.par_chunks(chunk)).zip(d.par_chunks(chunk));
    chunks.for_each(|((out, x), d)| gradient_rows(x, weight, eps, d, channels, out));
}

dispatch! {
    fn gradient_rows(x: &[f32], weight: &[f32], eps: f32, d: &[f32], channels: usize, out: &mut [f32]) {
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

/// Sum of `f(x)` in 16 lanes, which vectorises and rounds less than one chain.
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
