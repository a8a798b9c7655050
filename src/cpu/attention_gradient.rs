//! The gradient of attention. For each image and head it takes blocks of queries in turn and computes scores and
//! softmax again, since nothing but q, k, v was kept. Then, with `P` the softmax and `dO` the gradient with respect to
//! the result,
//!
//! `dP = dO V^T`, `dS = P (dP - sum_j P dP) scale`, `dQ = dS K`, `dK += dS^T Q`, `dV += P^T dO`.
//!
//! A block's rows of `P` and `dP` over all keys are held: 2 x `Q_BLOCK` x keys elements per head.

use super::gemm::{Left, PANEL, ROWS, multiply, pack_panel, packed_len};
use super::simd::{dispatch, exp2};
use super::{NodeMemory, SharedOutput};
use crate::graph::{Attention, Shape, TensorId, View};
use rayon::prelude::*;
use std::f32::consts::LOG2_E;

/// Queries of a block.
const Q_BLOCK: usize = 4 * ROWS;

/// Sizes that determine the lengths of a head's scratch memory.
struct Sizes {
    keys: usize,
    head_dim: usize,
    fused: bool,
}

impl Sizes {
    /// Keys, rounded up to panels.
    fn wide(&self) -> usize {
        self.keys.next_multiple_of(PANEL)
    }
    /// Head channels, rounded up to panels.
    fn deep(&self) -> usize {
        self.head_dim.next_multiple_of(PANEL)
    }
    /// Lengths of the buffers: keys and values packed by key; keys packed by channel; a block's rows of queries and
    /// gradients; the panels of these; its `P`; its `dP`; their transpose; sums for `dQ`; sums for `dK` and `dV`.
    fn lengths(&self) -> [usize; 9] {
        let by_key = packed_len(self.head_dim, self.keys);
        let transposed = self.keys.next_multiple_of(ROWS) * Q_BLOCK;
        let sums = self.keys.next_multiple_of(ROWS) * self.deep();
        let when_fused = |len: usize| if self.fused { len } else { 0 };
        [
            2 * by_key,
            packed_len(self.keys, self.head_dim),
            2 * Q_BLOCK * self.head_dim,
            when_fused(2 * Q_BLOCK * self.deep()),
            Q_BLOCK * self.wide(),
            Q_BLOCK * self.wide(),
            when_fused(transposed),
            Q_BLOCK * self.deep(),
            when_fused(2 * sums),
        ]
    }
}

/// [`Sizes`] of an operation.
fn sizes(attention: &Attention, fused: bool, shape: impl Fn(TensorId) -> Shape) -> Sizes {
    Sizes { keys: shape(attention.k.tensor).tokens(), head_dim: attention.head_dim, fused }
}

/// Elements of scratch memory.
pub(super) fn workspace(attention: &Attention, fused: bool, shape: impl Fn(TensorId) -> Shape) -> usize {
    let heads = shape(attention.q.tensor).n * attention.heads;
    heads * sizes(attention, fused, shape).lengths().iter().sum::<usize>()
}

/// Runs an [`crate::graph::Op::AttentionGradient`].
pub(super) fn run(attention: &Attention, fused: bool, d: TensorId, out: TensorId, memory: &NodeMemory) {
    let Attention { q, k, v, heads, head_dim, causal, .. } = *attention;
    assert!(!causal, "causal attention has no gradient here: text encoders are frozen");
    let sizes = sizes(attention, fused, |t| memory.shape(t));
    let shape = memory.shape(d);
    let output = SharedOutput::new(memory.write(out));
    let width = memory.shape(out).c;
    let lengths = sizes.lengths();
    memory.workspace().par_chunks_exact_mut(lengths.iter().sum()).enumerate().for_each(|(i, scratch)| {
        let (image, head) = (i / heads, i % heads);
        let numbers = |view: View, tokens: usize| {
            let width = memory.shape(view.tensor).c;
            (&memory.read(view.tensor)[image * tokens * width + view.offset + head * head_dim..], width)
        };
        let queries = shape.tokens();
        let inputs = Inputs {
            q: numbers(q, queries),
            k: numbers(k, sizes.keys),
            v: numbers(v, sizes.keys),
            d: numbers(View { tensor: d, offset: 0 }, queries),
            queries,
            scale: attention.scale,
        };
        let write = |view: View, token: usize, values: &[f32]| {
            let offset = if fused { view.offset } else { 0 } + head * head_dim;
            // SAFETY: only this task writes this head's channels of this image.
            let out = unsafe { output.at((image * queries + token) * width + offset, values.len()) };
            out.copy_from_slice(values);
        };
        let views = [q, k, v];
        one_head(&inputs, &sizes, scratch, |which, token, x| write(views[which], token, x));
    });
}

/// A head's elements, each slice with the distance between tokens.
struct Inputs<'a> {
    q: (&'a [f32], usize),
    k: (&'a [f32], usize),
    v: (&'a [f32], usize),
    d: (&'a [f32], usize),
    queries: usize,
    scale: f32,
}

/// Computes the gradient of one head. `write` takes 0, 1 or 2 for query, key or value, the token, and its gradient.
fn one_head(inputs: &Inputs, sizes: &Sizes, mut scratch: &mut [f32], write: impl Fn(usize, usize, &[f32])) {
    let mut take = |len: usize| {
        let (taken, rest) = std::mem::take(&mut scratch).split_at_mut(len);
        scratch = rest;
        taken
    };
    let [by_key, keys_by_channel, rows, row_panels, p, dp, transposed, dq, dkv] = sizes.lengths().map(&mut take);
    let (keys, head_dim, deep) = (sizes.keys, sizes.head_dim, sizes.deep());
    let (k_panels, v_panels) = by_key.split_at_mut(by_key.len() / 2);
    for ((data, width), panels) in [(inputs.k, &mut *k_panels), (inputs.v, &mut *v_panels)] {
        for (i, panel) in panels.chunks_exact_mut(head_dim * PANEL).enumerate() {
            pack_panel(&data[i * PANEL * width..], 1, width, PANEL.min(keys - i * PANEL), panel);
        }
    }
    pack_columns(inputs.k, keys, head_dim, keys_by_channel);
    dkv.fill(0.0);
    let (q_rows, d_rows) = rows.split_at_mut(Q_BLOCK * head_dim);

    for first in (0..inputs.queries).step_by(Q_BLOCK) {
        let count = Q_BLOCK.min(inputs.queries - first);
        for ((data, width), rows, scale) in [(inputs.q, &mut *q_rows, inputs.scale), (inputs.d, &mut *d_rows, 1.0)] {
            for (row, out) in rows.chunks_exact_mut(head_dim).enumerate() {
                // Rows beyond the last query are zeros, so they add nothing to sums over all rows.
                if row < count {
                    let x = &data[(first + row) * width..][..head_dim];
                    out.iter_mut().zip(x).for_each(|(o, x)| *o = x * scale);
                } else {
                    out.fill(0.0);
                }
            }
        }
        for (rows, panels, scores) in [(&*q_rows, &*k_panels, &mut *p), (&*d_rows, &*v_panels, &mut *dp)] {
            let left = Left { numbers: rows, pitch: head_dim, rows: Q_BLOCK, depth: head_dim };
            products(left, panels, scores, sizes.wide(), true);
        }
        softmax_gradient(p, dp, sizes.wide(), keys);
        // dQ = scale dS K.
        let left = Left { numbers: dp, pitch: sizes.wide(), rows: Q_BLOCK, depth: keys };
        products(left, keys_by_channel, dq, deep, true);
        dq.iter_mut().for_each(|x| *x *= inputs.scale);
        for (row, x) in dq.chunks_exact(deep).enumerate().take(count) {
            write(0, first + row, &x[..head_dim]);
        }
        if sizes.fused {
            // q_rows already contain the scale. dK += dS^T Q, dV += P^T dO.
            let (q_panels, d_panels) = row_panels.split_at_mut(Q_BLOCK * deep);
            let (dk, dv) = dkv.split_at_mut(dkv.len() / 2);
            for (rows, panels, scores, sums) in [(&*q_rows, q_panels, &*dp, dk), (&*d_rows, d_panels, &*p, dv)] {
                pack_columns((rows, head_dim), Q_BLOCK, head_dim, panels);
                transpose(scores, keys, transposed);
                let left = Left { numbers: transposed, pitch: Q_BLOCK, rows: keys, depth: Q_BLOCK };
                products(left, panels, sums, deep, false);
            }
        }
    }
    if sizes.fused {
        for (which, sums) in dkv.chunks_exact(dkv.len() / 2).enumerate() {
            for (key, x) in sums.chunks_exact(deep).enumerate().take(keys) {
                write(1 + which, key, &x[..head_dim]);
            }
        }
    }
}

/// Packs `[tokens, head_dim]` with channels as columns.
fn pack_columns((data, width): (&[f32], usize), tokens: usize, head_dim: usize, panels: &mut [f32]) {
    for (i, panel) in panels.chunks_exact_mut(tokens * PANEL).enumerate() {
        pack_panel(&data[i * PANEL..], width, 1, PANEL.min(head_dim - i * PANEL), panel);
    }
}

/// Multiplies a block by all panels, into rows of `wide` elements, which are overwritten if `first` and added to
/// otherwise.
fn products(left: Left, panels: &[f32], out: &mut [f32], wide: usize, first: bool) {
    for (i, panel) in panels.chunks_exact(left.depth * PANEL).enumerate() {
        multiply(left, panel, &mut out[i * PANEL..], wide, PANEL, first);
    }
}

dispatch! {
    /// Turns rows of `wide` scores into their softmax, and its gradient into that of the scores, in place; zeros beyond
    /// the last key.
    fn softmax_gradient(p: &mut [f32], dp: &mut [f32], wide: usize, keys: usize) {
        for (p, dp) in p.chunks_exact_mut(wide).zip(dp.chunks_exact_mut(wide)) {
            let mut highest = [f32::NEG_INFINITY; PANEL];
            p[keys..].fill(f32::NEG_INFINITY);
            let ((p, _), (dp, _)) = (p.as_chunks_mut::<PANEL>(), dp.as_chunks_mut::<PANEL>());
            for p in &*p {
                for (highest, x) in highest.iter_mut().zip(p) {
                    *highest = if *x > *highest { *x } else { *highest };
                }
            }
            let highest = highest.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
            p.iter_mut().for_each(|p| p.iter_mut().for_each(|x| *x = exp2::<ISA>((*x - highest) * LOG2_E)));
            p.as_flattened_mut()[keys..].fill(0.0);
            let (mut totals, mut dots) = ([0.0f32; PANEL], [0.0f32; PANEL]);
            for (p, dp) in p.iter().zip(&*dp) {
                for i in 0..PANEL {
                    totals[i] += p[i];
                    dots[i] += p[i] * dp[i];
                }
            }
            let inverse = 1.0 / totals.iter().sum::<f32>();
            let mean = dots.iter().sum::<f32>() * inverse;
            for (p, dp) in p.iter_mut().zip(dp) {
                for i in 0..PANEL {
                    p[i] *= inverse;
                    dp[i] = p[i] * (dp[i] - mean);
                }
            }
        }
    }
}

dispatch! {
    /// Transposes rows of scores into one row of `Q_BLOCK` elements per key; zeros beyond the last key.
    fn transpose(scores: &[f32], keys: usize, out: &mut [f32]) {
        let wide = scores.len() / Q_BLOCK;
        for (key, line) in out.chunks_exact_mut(Q_BLOCK).enumerate() {
            for (row, x) in line.iter_mut().enumerate() {
                *x = if key < keys { scores[row * wide + key] } else { 0.0 };
            }
        }
    }
}
