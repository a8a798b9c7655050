//! Small operations: activation functions on their own, sums, embeddings, token selection.

use super::NodeMemory;
use super::simd::{dispatch, exp, gelu, gelu_slope, quick_gelu, relu, silu, silu_slope, soft_clamp};
use crate::graph::{Activation, TensorId};
use rayon::prelude::*;

/// Elements that a thread takes at a time.
const CHUNK: usize = 1 << 14;

/// Runs an [`Activation`] on its own.
pub(super) fn activate(x: TensorId, activation: Activation, out: TensorId, memory: &NodeMemory) {
    let (from, to) = (memory.shape(x).c, memory.shape(out).c);
    let rows = (CHUNK / from).max(1);
    let chunks = memory.write(out).par_chunks_mut(rows * to).zip(memory.read(x).par_chunks(rows * from));
    chunks.for_each(|(out, x)| apply(activation, x, to, out));
}

dispatch! {
    fn apply(activation: Activation, x: &[f32], channels: usize, out: &mut [f32]) {
        let f = match activation {
            Activation::Silu => return out.iter_mut().zip(x).for_each(|(o, x)| *o = silu(*x)),
            Activation::Geglu => {
                for (out, x) in out.chunks_exact_mut(channels).zip(x.chunks_exact(2 * channels)) {
                    let (values, gates) = x.split_at(channels);
                    for ((o, v), g) in out.iter_mut().zip(values).zip(gates) {
                        *o = v * gelu(*g);
                    }
                }
                return;
            }
            Activation::Gelu => gelu,
            Activation::QuickGelu => quick_gelu,
            Activation::None => |x| x,
            Activation::Relu => relu,
            Activation::SoftClamp => soft_clamp,
            Activation::ToUnit => |x| 0.5 * x + 0.5,
            Activation::FromUnit => |x| 2.0 * x - 1.0,
        };
        out.iter_mut().zip(x).for_each(|(o, x)| *o = f(*x));
    }
}

/// The gradient of an [`Activation`] with respect to its argument.
pub(super) fn activate_gradient(x: TensorId, activation: Activation, d: TensorId, out: TensorId, memory: &NodeMemory) {
    let (from, to) = (memory.shape(d).c, memory.shape(out).c);
    let rows = (CHUNK / to).max(1);
    let chunks = memory.write(out).par_chunks_mut(rows * to).zip(memory.read(x).par_chunks(rows * to));
    chunks.zip(memory.read(d).par_chunks(rows * from)).for_each(|((out, x), d)| slope(activation, x, d, from, out));
}

dispatch! {
    fn slope(activation: Activation, x: &[f32], d: &[f32], channels: usize, out: &mut [f32]) {
        match activation {
            Activation::None => out.copy_from_slice(d),
            Activation::Relu => {
                let through = |x: f32, d: f32| if x > 0.0 { d } else { 0.0 };
                out.iter_mut().zip(x).zip(d).for_each(|((o, x), d)| *o = through(*x, *d));
            }
            Activation::SoftClamp => out.iter_mut().zip(x).zip(d).for_each(|((o, x), d)| {
                let tanh = soft_clamp(*x) / 3.0;
                *o = d * (1.0 - tanh * tanh);
            }),
            Activation::ToUnit => out.iter_mut().zip(d).for_each(|(o, d)| *o = 0.5 * d),
            Activation::FromUnit => out.iter_mut().zip(d).for_each(|(o, d)| *o = 2.0 * d),
            Activation::Silu => out.iter_mut().zip(x).zip(d).for_each(|((o, x), d)| *o = d * silu_slope(*x)),
            Activation::Gelu => out.iter_mut().zip(x).zip(d).for_each(|((o, x), d)| *o = d * gelu_slope(*x)),
            Activation::QuickGelu => out.iter_mut().zip(x).zip(d).for_each(|((o, x), d)| {
                let sigmoid = 1.0 / (1.0 + exp(-1.702 * x));
                *o = d * sigmoid * (1.0 + 1.702 * x * (1.0 - sigmoid));
            }),
            Activation::Geglu => {
                let rows = out.chunks_exact_mut(2 * channels).zip(x.chunks_exact(2 * channels));
                for ((out, x), d) in rows.zip(d.chunks_exact(channels)) {
                    let (values, gates) = x.split_at(channels);
                    let (by_value, by_gate) = out.split_at_mut(channels);
                    for i in 0..channels.min(d.len()) {
                        by_value[i] = d[i] * gelu(gates[i]);
                        by_gate[i] = d[i] * values[i] * gelu_slope(gates[i]);
                    }
                }
            }
        }
    }
}

/// `a + b`.
pub(super) fn add(a: TensorId, b: TensorId, out: TensorId, memory: &NodeMemory) {
    pairs(memory.read(a), memory.read(b), memory.write(out), |a, b| a + b);
}

/// The mean of the first and the second half of the images.
pub(super) fn mean_of_halves(x: TensorId, out: TensorId, memory: &NodeMemory) {
    let (first, second) = memory.read(x).split_at(memory.shape(out).len());
    pairs(first, second, memory.write(out), |a, b| 0.5 * (a + b));
}

/// `f` of each pair of numbers.
fn pairs(a: &[f32], b: &[f32], out: &mut [f32], f: impl Fn(f32, f32) -> f32 + Sync) {
    let chunks = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
    out.par_chunks_mut(CHUNK).zip(chunks).for_each(|(out, (a, b))| {
        out.iter_mut().zip(a.iter().zip(b)).for_each(|(o, (a, b))| *o = f(*a, *b));
    });
}

/// Sums at each pixel the gradients of the pixels that were copied from it.
pub(super) fn resize_gradient(d: TensorId, out: TensorId, memory: &NodeMemory) {
    let (large, small) = (memory.shape(d), memory.shape(out));
    let d = memory.read(d);
    memory.write(out).par_chunks_exact_mut(small.w * small.c).enumerate().for_each(|(row, out)| {
        let (image, y) = (row / small.h, row % small.h);
        out.fill(0.0);
        for from in (0..large.h).filter(|from| from * small.h / large.h == y) {
            let line = &d[(image * large.h + from) * large.w * large.c..][..large.w * large.c];
            for (x, pixel) in line.chunks_exact(large.c).enumerate() {
                let out = &mut out[x * small.w / large.w * small.c..][..small.c];
                out.iter_mut().zip(pixel).for_each(|(o, p)| *o += p);
            }
        }
    });
}

/// Adds to each of the last images its own tensor. Memory bound: one read and one write of the bottleneck, one read of
/// the shift.
pub(super) fn shift(x: TensorId, shift: TensorId, out: TensorId, memory: &NodeMemory) {
    let (x, shift) = (memory.read(x), memory.read(shift));
    let (out, shifted) = memory.write(out).split_at_mut(x.len() - shift.len());
    let (plain, x) = x.split_at(out.len());
    out.copy_from_slice(plain);
    let chunks = shifted.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(shift.par_chunks(CHUNK));
    chunks.for_each(|((out, x), s)| out.iter_mut().zip(x.iter().zip(s)).for_each(|(o, (x, s))| *o = x + s));
}

/// Sums rows of `tokens` and `positions`. The ids were checked against the vocabulary when they were written.
pub(super) fn embed(ids: TensorId, tokens: &[f32], positions: &[f32], out: TensorId, memory: &NodeMemory) {
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

/// Puts `class` before each image's tokens, and adds `positions`.
pub(super) fn class_token(x: TensorId, class: &[f32], positions: &[f32], out: TensorId, memory: &NodeMemory) {
    let one = memory.shape(x).tokens() * class.len();
    let images = memory.write(out).chunks_exact_mut(one + class.len()).zip(memory.read(x).chunks_exact(one));
    for (out, x) in images {
        let tokens = class.iter().chain(x).zip(positions);
        out.iter_mut().zip(tokens).for_each(|(o, (x, p))| *o = x + p);
    }
}

/// Computes in f64, since the frequencies span four decades and the angles a thousand radians.
pub(super) fn sinusoid(
    x: TensorId,
    dim: usize,
    flip_sin_to_cos: bool,
    freq_shift: f32,
    out: TensorId,
    memory: &NodeMemory,
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

/// Copies one token of each image. The indices were checked when they were written.
pub(super) fn select_token(x: TensorId, index: TensorId, out: TensorId, memory: &NodeMemory) {
    let shape = memory.shape(x);
    let rows = memory.write(out).chunks_exact_mut(shape.c).zip(memory.read(index));
    for (image, (out, &index)) in rows.enumerate() {
        out.copy_from_slice(&memory.read(x)[(image * shape.tokens() + index as usize) * shape.c..][..shape.c]);
    }
}
