//! Small operations: activations alone, embeddings, token selection.

use super::Memory;
use super::simd::{dispatch, gelu, quick_gelu, silu};
use crate::graph::{Activation, TensorId};
use rayon::prelude::*;

/// Numbers a thread takes at a time.
const CHUNK: usize = 1 << 14;

pub(super) fn activate(x: TensorId, activation: Activation, out: TensorId, memory: &Memory) {
    let x = memory.read(x);
    let chunks = memory.write(out).par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
    chunks.for_each(|(out, x)| apply(activation, x, out));
}

dispatch! {
    fn apply(activation: Activation, x: &[f32], out: &mut [f32]) {
        let f = match activation {
            Activation::Silu => return out.iter_mut().zip(x).for_each(|(o, x)| *o = silu(*x)),
            Activation::Gelu => gelu,
            Activation::QuickGelu => quick_gelu,
            Activation::None | Activation::Geglu => |x| x,
        };
        out.iter_mut().zip(x).for_each(|(o, x)| *o = f(*x));
    }
}

/// Each image plus its weighted sum of modules. Memory bound: one read and one write of the bottleneck.
pub(super) fn concepts(x: TensorId, modules: TensorId, weights: TensorId, out: TensorId, memory: &Memory) {
    let one = memory.shape(modules).tokens() * memory.shape(modules).c;
    let slots = memory.shape(weights).c;
    let (x, modules) = (memory.read(x), memory.read(modules));
    let images = memory.write(out).par_chunks_exact_mut(one).zip(x.par_chunks_exact(one));
    images.zip(memory.read(weights).par_chunks_exact(slots)).for_each(|((out, x), weights)| {
        out.copy_from_slice(x);
        for (module, &weight) in modules.chunks_exact(one).zip(weights) {
            if weight != 0.0 {
                out.iter_mut().zip(module).for_each(|(o, m)| *o += weight * m);
            }
        }
    });
}

/// Rows of `tokens` and `positions`. Ids were checked against the vocabulary by whoever wrote them.
pub(super) fn embed(ids: TensorId, tokens: &[f32], positions: &[f32], out: TensorId, memory: &Memory) {
    let shape = memory.shape(out);
    let rows = memory.write(out).chunks_exact_mut(shape.c).zip(memory.read(ids));
    for (i, (out, &id)) in rows.enumerate() {
        let token = &tokens[id as usize * shape.c..][..shape.c];
        let position = &positions[i % shape.tokens() * shape.c..][..shape.c];
        for ((o, t), p) in out.iter_mut().zip(token).zip(position) {
            *o = t + p;
        }
    }
}

/// In f64: the frequencies span four decades and the angles a thousand radians.
pub(super) fn sinusoid(
    x: TensorId,
    dim: usize,
    flip_sin_to_cos: bool,
    freq_shift: f32,
    out: TensorId,
    memory: &Memory,
) {
    let half = dim / 2;
    for (out, &x) in memory.write(out).chunks_exact_mut(dim).zip(memory.read(x)) {
        let (first, second) = out.split_at_mut(half);
        for (i, (a, b)) in first.iter_mut().zip(second).enumerate() {
            let frequency = (-(10000f64.ln()) * i as f64 / (half as f64 - freq_shift as f64)).exp();
            let (sin, cos) = (x as f64 * frequency).sin_cos();
            (*a, *b) = if flip_sin_to_cos { (cos as f32, sin as f32) } else { (sin as f32, cos as f32) };
        }
    }
}

pub(super) fn select_token(x: TensorId, index: TensorId, out: TensorId, memory: &Memory) {
    let shape = memory.shape(x);
    let rows = memory.write(out).chunks_exact_mut(shape.c).zip(memory.read(index));
    for (image, (out, &index)) in rows.enumerate() {
        out.copy_from_slice(&memory.read(x)[(image * shape.tokens() + index as usize) * shape.c..][..shape.c]);
    }
}
