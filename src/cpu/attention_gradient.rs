//! The gradient of attention. For each image and head, blocks of queries in turn: scores and softmax once more (nothing
//! but q, k, v was kept), then with `P` the softmax, `dO` the gradient by the result,
//!
//! `dP = dO V^T`, `dS = P (dP - sum_j P dP) scale`, `dQ = dS K`, `dK += dS^T Q`, `dV += P^T dO`.
//!
//! A block's rows of `P` and `dP` over all keys are held, 2 x `Q_BLOCK` x keys numbers a head.

use super::gemm::{PANEL, ROWS, Segment, multiply, pack_panel, packed_len};
use super::simd::{dispatch, exp};
use super::{Memory, SharedOutput};
use crate::graph::{Attention, Shape, TensorId, View};
use rayon::prelude::*;

/// Queries of a block.
const Q_BLOCK: usize = 4 * ROWS;

/// Lengths of a head's scratch memory.
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
    /// Keys and values by key, keys by channel; a block's queries and gradients, and its panels of them; its `P`, `dP`
    /// and their transpose; sums for `dQ`, and for `dK` and `dV`.
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

fn sizes(attention: &Attention, fused: bool, shape: impl Fn(TensorId) -> Shape) -> Sizes {
    Sizes { keys: shape(attention.k.tensor).tokens(), head_dim: attention.head_dim, fused }
}

/// Elements of scratch memory.
pub(super) fn workspace(attention: &Attention, fused: bool, shape: impl Fn(TensorId) -> Shape) -> usize {
    let heads = shape(attention.q.tensor).n * attention.heads;
    heads * sizes(attention, fused, shape).lengths().iter().sum::<usize>()
}

/// Runs an [`crate::graph::Op::AttentionGradient`].
pub(super) fn run(attention: &Attention, fused: bool, d: TensorId, out: TensorId, memory: &Memory) {
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
        let write = |view: View, token: usize, channel: usize, values: &[f32]| {
            let offset = if fused { view.offset } else { 0 } + head * head_dim + channel;
            // SAFETY: this task alone writes this head's channels of this image.
            let out = unsafe { output.at((image * queries + token) * width + offset, values.len()) };
            out.copy_from_slice(values);
        };
        let views = [q, k, v];
        one_head(&inputs, &sizes, scratch, |which, token, channel, x| write(views[which], token, channel, x));
    });
}

/// A head's numbers, each with the distance between tokens.
struct Inputs<'a> {
    q: (&'a [f32], usize),
    k: (&'a [f32], usize),
    v: (&'a [f32], usize),
    d: (&'a [f32], usize),
    queries: usize,
    scale: f32,
}

/// `write` takes 0, 1 or 2 for query, key or value, its token, a first channel, and the gradient from there on.
fn one_head(inputs: &Inputs, sizes: &Sizes, mut scratch: &mut [f32], write: impl Fn(usize, usize, usize, &[f32])) {
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
                // Rows beyond the last query are zeros: they add nothing to what all rows add up to.
                if row < count {
                    let x = &data[(first + row) * width..][..head_dim];
                    out.iter_mut().zip(x).for_each(|(o, x)| *o = x * scale);
                } else {
                    out.fill(0.0);
                }
            }
        }
        products(q_rows, head_dim, k_panels, p);
        products(d_rows, head_dim, v_panels, dp);
        for row in 0..Q_BLOCK {
            softmax_gradient_row(p, dp, row, keys);
        }
        // dQ = scale dS K; the strips of dS are its segments.
        let strips = sizes.wide() / PANEL;
        for (column, sums) in dq.chunks_exact_mut(Q_BLOCK * PANEL).enumerate() {
            for tile in 0..Q_BLOCK / ROWS {
                for strip in 0..strips {
                    let rows = std::array::from_fn(|r| dp[(strip * Q_BLOCK + tile * ROWS + r) * PANEL..].as_ptr());
                    let segment = Segment { len: PANEL.min(keys - strip * PANEL), rows };
                    let panel = keys_by_channel[(column * keys + strip * PANEL) * PANEL..].as_ptr();
                    multiply(&[segment], panel, sums[tile * ROWS * PANEL..].as_mut_ptr(), PANEL, strip == 0);
                }
            }
        }
        dq.iter_mut().for_each(|x| *x *= inputs.scale);
        write_rows(dq, Q_BLOCK, head_dim, count, |row, channel, x| write(0, first + row, channel, x));
        if sizes.fused {
            // q_rows hold the scale already. dK += dS^T Q, dV += P^T dO.
            let (q_panels, d_panels) = row_panels.split_at_mut(Q_BLOCK * deep);
            let (dk, dv) = dkv.split_at_mut(dkv.len() / 2);
            for (rows, panels, scores, sums) in [(&*q_rows, q_panels, &*dp, dk), (&*d_rows, d_panels, &*p, dv)] {
                pack_columns((rows, head_dim), Q_BLOCK, head_dim, panels);
                transpose(scores, keys, transposed);
                accumulate(transposed, panels, keys.next_multiple_of(ROWS), sums);
            }
        }
    }
    if sizes.fused {
        for (which, sums) in dkv.chunks_exact(dkv.len() / 2).enumerate() {
            let rows = keys.next_multiple_of(ROWS);
            write_rows(sums, rows, head_dim, keys, |key, channel, x| write(1 + which, key, channel, x));
        }
    }
}

/// Hands out the first `count` rows of `[panel][rows][PANEL]` by their parts.
fn write_rows(sums: &[f32], rows: usize, head_dim: usize, count: usize, write: impl Fn(usize, usize, &[f32])) {
    for (panel, sums) in sums.chunks_exact(rows * PANEL).enumerate() {
        let width = PANEL.min(head_dim - panel * PANEL);
        for (row, x) in sums.chunks_exact(PANEL).enumerate().take(count) {
            write(row, panel * PANEL, &x[..width]);
        }
    }
}

/// Packs `[tokens, head_dim]` with channels as columns.
fn pack_columns((data, width): (&[f32], usize), tokens: usize, head_dim: usize, panels: &mut [f32]) {
    for (i, panel) in panels.chunks_exact_mut(tokens * PANEL).enumerate() {
        pack_panel(&data[i * PANEL..], width, 1, PANEL.min(head_dim - i * PANEL), panel);
    }
}

/// All products of a block's rows with the packed columns, in strips `[panel][Q_BLOCK][PANEL]`.
fn products(rows: &[f32], head_dim: usize, panels: &[f32], out: &mut [f32]) {
    for (panel, strip) in panels.chunks_exact(head_dim * PANEL).zip(out.chunks_exact_mut(Q_BLOCK * PANEL)) {
        for tile in 0..Q_BLOCK / ROWS {
            let rows = std::array::from_fn(|r| rows[(tile * ROWS + r) * head_dim..].as_ptr());
            let segment = Segment { len: head_dim, rows };
            multiply(&[segment], panel.as_ptr(), strip[tile * ROWS * PANEL..].as_mut_ptr(), PANEL, true);
        }
    }
}

dispatch! {
    /// Scores to softmax, and its gradient to theirs, in place; zeros beyond the last key.
    fn softmax_gradient_row(p: &mut [f32], dp: &mut [f32], row: usize, keys: usize) {
        let strips = p.len() / (Q_BLOCK * PANEL);
        let at = |strip: usize| (strip * Q_BLOCK + row) * PANEL;
        let mut highest = f32::NEG_INFINITY;
        for strip in 0..strips {
            let seen = PANEL.min(keys - strip * PANEL);
            for x in &p[at(strip)..][..seen] {
                highest = if *x > highest { *x } else { highest };
            }
        }
        let (mut totals, mut dots) = ([0.0f32; PANEL], [0.0f32; PANEL]);
        for strip in 0..strips {
            let seen = PANEL.min(keys - strip * PANEL);
            let (p, dp) = (&mut p[at(strip)..][..PANEL], &dp[at(strip)..][..PANEL]);
            p[..seen].iter_mut().for_each(|x| *x = exp(*x - highest));
            p[seen..].fill(0.0);
            for i in 0..PANEL {
                totals[i] += p[i];
                dots[i] += p[i] * dp[i];
            }
        }
        let inverse = 1.0 / totals.iter().sum::<f32>();
        let mean = dots.iter().sum::<f32>() * inverse;
        for strip in 0..strips {
            let (p, dp) = (&mut p[at(strip)..][..PANEL], &mut dp[at(strip)..][..PANEL]);
            for i in 0..PANEL {
                p[i] *= inverse;
                dp[i] = p[i] * (dp[i] - mean);
            }
        }
    }
}

dispatch! {
    /// Strips `[panel][Q_BLOCK][PANEL]` to rows of `Q_BLOCK` numbers, one a key.
    fn transpose(strips: &[f32], keys: usize, out: &mut [f32]) {
        for (key, line) in out.chunks_exact_mut(Q_BLOCK).enumerate() {
            for (row, x) in line.iter_mut().enumerate() {
                *x = if key < keys { strips[(key / PANEL * Q_BLOCK + row) * PANEL + key % PANEL] } else { 0.0 };
            }
        }
    }
}

/// Adds to the sums `[panel][keys][PANEL]` the products of the rows of `left` (`Q_BLOCK` numbers each) with the panels.
fn accumulate(left: &[f32], panels: &[f32], keys: usize, sums: &mut [f32]) {
    for (panel, sums) in panels.chunks_exact(Q_BLOCK * PANEL).zip(sums.chunks_exact_mut(keys * PANEL)) {
        for tile in 0..keys / ROWS {
            let rows = std::array::from_fn(|r| left[(tile * ROWS + r) * Q_BLOCK..].as_ptr());
            let segment = Segment { len: Q_BLOCK, rows };
            multiply(&[segment], panel.as_ptr(), sums[tile * ROWS * PANEL..].as_mut_ptr(), PANEL, false);
        }
    }
}
