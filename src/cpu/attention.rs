//! Attention without the score matrix: online softmax over blocks of keys (Milakov and Gimelshein, arXiv 1805.02867;
//! Dao et al., arXiv 2205.14135).
//!
//! For each image and head, keys and values are packed once into panels for [`super::gemm`]; then each block of queries
//! passes over the keys. The scores of a block (`Q_BLOCK` x `K_BLOCK`) stay in the cache.

use super::gemm::{Left, PANEL, ROWS, multiply, pack_panel, packed_len};
use super::simd::{dispatch, exp2};
use super::{NodeMemory, SharedOutput};
use crate::graph::{Attention, Shape, TensorId, View};
use rayon::prelude::*;
use std::f32::consts::LOG2_E;

/// Queries of a block.
const Q_BLOCK: usize = 8 * ROWS;
/// Keys of a block.
const K_BLOCK: usize = 8 * PANEL;

/// Elements of a head's packed keys, of its packed values, and of a task's accumulators.
fn sizes(keys: usize, head_dim: usize) -> (usize, usize, usize) {
    let padded = head_dim.next_multiple_of(PANEL);
    (packed_len(head_dim, keys), packed_len(keys, head_dim), Q_BLOCK * (padded + head_dim))
}

/// Elements of scratch memory: the packed keys and values of every head, and every task's accumulators.
pub(super) fn workspace(attention: &Attention, shape: impl Fn(TensorId) -> Shape) -> usize {
    let (q, k) = (shape(attention.q.tensor), shape(attention.k.tensor));
    let (keys, values, accumulators) = sizes(k.tokens(), attention.head_dim);
    q.n * attention.heads * (keys + values + q.tokens().div_ceil(Q_BLOCK) * accumulators)
}

/// Runs an [`Attention`].
pub(super) fn run(attention: &Attention, out: TensorId, memory: &NodeMemory) {
    let Attention { q, k, v, heads, head_dim, scale, causal } = *attention;
    let shape = memory.shape(out);
    let (queries, keys) = (shape.tokens(), memory.shape(k.tensor).tokens());
    let (key_len, value_len, accumulator_len) = sizes(keys, head_dim);
    let (packed, accumulators) = memory.workspace().split_at_mut(shape.n * heads * (key_len + value_len));
    // The elements of one head from its first token on, and the distance between tokens.
    let head = |view: View, tokens: usize, i: usize| {
        let width = memory.shape(view.tensor).c;
        (&memory.read(view.tensor)[i / heads * tokens * width + view.offset + i % heads * head_dim..], width)
    };

    packed.par_chunks_exact_mut(key_len + value_len).enumerate().for_each(|(i, packed)| {
        let (packed_keys, packed_values) = packed.split_at_mut(key_len);
        let (data, width) = head(k, keys, i);
        for (p, panel) in packed_keys.chunks_exact_mut(head_dim * PANEL).enumerate() {
            pack_panel(&data[p * PANEL * width..], 1, width, PANEL.min(keys - p * PANEL), panel);
        }
        let (data, width) = head(v, keys, i);
        for (p, panel) in packed_values.chunks_exact_mut(keys * PANEL).enumerate() {
            pack_panel(&data[p * PANEL..], width, 1, PANEL.min(head_dim - p * PANEL), panel);
        }
    });

    let packed = &*packed;
    let blocks = queries.div_ceil(Q_BLOCK);
    let output = SharedOutput::new(memory.write(out));
    accumulators.par_chunks_exact_mut(accumulator_len).enumerate().for_each(|(task, scratch)| {
        let (i, block) = (task / blocks, task % blocks);
        let (packed_keys, packed_values) = packed[i * (key_len + value_len)..][..key_len + value_len].split_at(key_len);
        let first = block * Q_BLOCK;
        let count = Q_BLOCK.min(queries - first);
        let (scaled, sums) = scratch.split_at_mut(Q_BLOCK * head_dim);
        let (data, width) = head(q, queries, i);
        for (row, scaled) in scaled.chunks_exact_mut(head_dim).enumerate() {
            // Rows beyond the last query are computed on zeros and never written.
            if row < count {
                let query = &data[(first + row) * width..][..head_dim];
                scaled.iter_mut().zip(query).for_each(|(s, x)| *s = x * (scale * LOG2_E));
            } else {
                scaled.fill(0.0);
            }
        }
        let totals = attend(scaled, count, packed_keys, packed_values, (keys, head_dim), causal.then_some(first), sums);
        let rows = sums.chunks_exact(head_dim.next_multiple_of(PANEL)).zip(totals).take(count);
        for (row, (sums, total)) in rows.enumerate() {
            let at = (i / heads * queries + first + row) * shape.c + i % heads * head_dim;
            // SAFETY: only this task writes these rows of this head.
            let out = unsafe { output.at(at, head_dim) };
            out.iter_mut().zip(sums).for_each(|(out, x)| *out = x / total);
        }
    });
}

/// Scores of a block, one row per query, times log2(e), since powers of two cost less than powers of e.
#[repr(align(64))]
struct Scores([[f32; K_BLOCK]; Q_BLOCK]);

/// Running softmax statistics of a block's queries over the keys so far.
struct SoftmaxState {
    maxima: [f32; Q_BLOCK],
    /// Sums of exponentials.
    totals: [f32; Q_BLOCK],
}

/// Writes unnormalised outputs of the first `rows` queries of a block into `sums`, and returns each row's sum of
/// exponentials.
fn attend(
    queries: &[f32],
    rows: usize,
    packed_keys: &[f32],
    packed_values: &[f32],
    (keys, head_dim): (usize, usize),
    causal_from: Option<usize>,
    sums: &mut [f32],
) -> [f32; Q_BLOCK] {
    let mut scores = Scores([[0.0; K_BLOCK]; Q_BLOCK]);
    let mut state = SoftmaxState { maxima: [f32::NEG_INFINITY; Q_BLOCK], totals: [0.0; Q_BLOCK] };
    let padded = head_dim.next_multiple_of(PANEL);
    sums.fill(0.0);
    let visible = causal_from.map_or(keys, |first| (first + Q_BLOCK).min(keys));
    for start in (0..visible).step_by(K_BLOCK) {
        let count = K_BLOCK.min(visible - start);
        let left = Left { numbers: queries, pitch: head_dim, rows, depth: head_dim };
        for first in (0..count).step_by(PANEL) {
            let panel = &packed_keys[(start + first) * head_dim..];
            multiply(left, panel, &mut scores.0.as_flattened_mut()[first..], K_BLOCK, count - first, true);
        }
        let diagonal = causal_from.map(|first| (first + 1).saturating_sub(start));
        softmax(&mut scores.0[..rows], count, diagonal, &mut state, sums, padded);
        let left = Left { numbers: scores.0.as_flattened(), pitch: K_BLOCK, rows, depth: count };
        for (p, panel) in packed_values.chunks_exact(keys * PANEL).enumerate() {
            let first = p * PANEL;
            multiply(left, &panel[start * PANEL..], &mut sums[first..], padded, head_dim - first, false);
        }
    }
    state.totals
}

/// Reduces a panel's lanes to one number by halving. A chain of 32 would take longer than the row itself.
#[inline(always)]
fn across(mut lanes: [f32; PANEL], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = PANEL / 2;
    while half > 0 {
        (0..half).for_each(|i| lanes[i] = f(lanes[i], lanes[i + half]));
        half /= 2;
    }
    lanes[0]
}

dispatch! {
    /// Turns rows of `count` scores into powers of two against their running maxima, and rescales the totals and the
    /// sums (rows of `padded` elements) of the earlier keys. With a `diagonal`, row `i` sees the first `diagonal + i`
    /// scores.
    fn softmax(
        scores: &mut [[f32; K_BLOCK]],
        count: usize,
        diagonal: Option<usize>,
        state: &mut SoftmaxState,
        sums: &mut [f32],
        padded: usize,
    ) {
        for (row, line) in scores.iter_mut().enumerate() {
            let seen = diagonal.map_or(count, |first| (first + row).min(count));
            let (maximum, total) = (&mut state.maxima[row], &mut state.totals[row]);
            let wide = seen.next_multiple_of(PANEL);
            line[seen..wide].fill(f32::NEG_INFINITY);
            let (panels, _) = line[..wide].as_chunks_mut::<PANEL>();
            let mut lanes = [f32::NEG_INFINITY; PANEL];
            for panel in &*panels {
                for (lane, x) in lanes.iter_mut().zip(panel) {
                    *lane = if *x > *lane { *x } else { *lane };
                }
            }
            let highest = across(lanes, |a, b| if a > b { a } else { b }).max(*maximum);
            if highest > *maximum && *maximum != f32::NEG_INFINITY {
                let factor = exp2::<ISA>(*maximum - highest);
                *total *= factor;
                let (sums, _) = sums[row * padded..][..padded].as_chunks_mut::<PANEL>();
                sums.iter_mut().for_each(|sums| sums.iter_mut().for_each(|x| *x *= factor));
            }
            *maximum = highest;
            let mut lanes = [0.0f32; PANEL];
            for panel in panels {
                for (sum, x) in lanes.iter_mut().zip(panel) {
                    *x = exp2::<ISA>(*x - highest);
                    *sum += *x;
                }
            }
            // Masked scores become exactly zero. Each has added 2^-125 to the total, which cannot change a total of one
            // or more.
            line[seen..count.max(wide)].fill(0.0);
            *total += across(lanes, |a, b| a + b);
        }
    }
}
