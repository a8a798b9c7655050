//! Attention without the score matrix: online softmax over blocks of keys (Milakov and Gimelshein, arXiv 1805.02867;
//! Dao et al., arXiv 2205.14135).
//!
//! For each image and head, keys and values are packed once into panels for [`super::gemm`]; then each block of
//! queries passes over the keys. A block's scores (`Q_BLOCK` x `K_BLOCK`) stay in the cache.

use super::gemm::{PANEL, ROWS, Segment, multiply, pack_panel, packed_len};
use super::simd::{dispatch, exp, fused_exp};
use super::{Memory, SharedOutput};
use crate::graph::{Attention, Shape, TensorId, View};
use rayon::prelude::*;

/// Queries of a block.
const Q_BLOCK: usize = 4 * ROWS;
/// Keys of a block.
const K_BLOCK: usize = 8 * PANEL;

/// Numbers of packed keys, packed values, and of a task's accumulators.
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
pub(super) fn run(attention: &Attention, out: TensorId, memory: &Memory) {
    let Attention { q, k, v, heads, head_dim, scale, causal } = *attention;
    let shape = memory.shape(out);
    let (queries, keys) = (shape.tokens(), memory.shape(k.tensor).tokens());
    let (key_len, value_len, accumulator_len) = sizes(keys, head_dim);
    let (packed, accumulators) = memory.workspace().split_at_mut(shape.n * heads * (key_len + value_len));
    // The numbers of one head, from the first token's on, and the distance between tokens.
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
            // Rows beyond the last query compute on zeros and are never written.
            if row < count {
                let query = &data[(first + row) * width..][..head_dim];
                scaled.iter_mut().zip(query).for_each(|(s, x)| *s = x * scale);
            } else {
                scaled.fill(0.0);
            }
        }
        let totals = attend(scaled, count, packed_keys, packed_values, (keys, head_dim), causal.then_some(first), sums);
        for (row, total) in totals.iter().enumerate().take(count) {
            let at = (i / heads * queries + first + row) * shape.c + i % heads * head_dim;
            // SAFETY: this task alone writes these rows of this head.
            let out = unsafe { output.at(at, head_dim) };
            for (j, out) in out.iter_mut().enumerate() {
                *out = sums[strip_at(row, j)] / total;
            }
        }
    });
}

/// Where column `j` of a query stands in `sums`: strips of `[PANEL]`-wide rows, one a panel.
fn strip_at(row: usize, j: usize) -> usize {
    (j / PANEL * Q_BLOCK + row) * PANEL + j % PANEL
}

#[repr(align(64))]
struct Scores([[f32; Q_BLOCK * PANEL]; K_BLOCK / PANEL]);

/// Unnormalised outputs of the first `rows` queries of a block into `sums`; returns each row's sum of exponentials.
fn attend(
    queries: &[f32],
    rows: usize,
    packed_keys: &[f32],
    packed_values: &[f32],
    (keys, head_dim): (usize, usize),
    causal_from: Option<usize>,
    sums: &mut [f32],
) -> [f32; Q_BLOCK] {
    let mut scores = Scores([[0.0; Q_BLOCK * PANEL]; K_BLOCK / PANEL]);
    let mut maxima = [f32::NEG_INFINITY; Q_BLOCK];
    let mut totals = [0.0f32; Q_BLOCK];
    sums.fill(0.0);
    let tiles = rows.div_ceil(ROWS);
    let visible = causal_from.map_or(keys, |first| (first + Q_BLOCK).min(keys));
    for start in (0..visible).step_by(K_BLOCK) {
        let count = K_BLOCK.min(visible - start);
        let panels = count.div_ceil(PANEL);
        for (p, strip) in scores.0[..panels].iter_mut().enumerate() {
            let panel = packed_keys[(start / PANEL + p) * head_dim * PANEL..].as_ptr();
            for tile in 0..tiles {
                let rows = std::array::from_fn(|r| queries[(tile * ROWS + r) * head_dim..].as_ptr());
                let segment = Segment { len: head_dim, rows };
                multiply(&[segment], panel, strip[tile * ROWS * PANEL..].as_mut_ptr(), count - p * PANEL, true);
            }
        }
        for row in 0..rows {
            let seen = causal_from.map_or(count, |first| (first + row + 1).saturating_sub(start).min(count));
            let mut factor = 1.0;
            softmax_row(&mut scores, row, seen, panels, &mut maxima[row], &mut totals[row], &mut factor);
            if factor != 1.0 {
                for j in (0..head_dim).step_by(PANEL) {
                    sums[strip_at(row, j)..][..PANEL].iter_mut().for_each(|x| *x *= factor);
                }
            }
        }
        for (p, sums) in sums.chunks_exact_mut(Q_BLOCK * PANEL).enumerate() {
            let panel = &packed_values[(p * keys + start) * PANEL..];
            for tile in 0..tiles {
                let segments: [Segment; K_BLOCK / PANEL] = std::array::from_fn(|s| Segment {
                    len: count.saturating_sub(s * PANEL).min(PANEL),
                    rows: std::array::from_fn(|r| scores.0[s][(tile * ROWS + r) * PANEL..].as_ptr()),
                });
                let sums = sums[tile * ROWS * PANEL..].as_mut_ptr();
                multiply(&segments[..panels], panel.as_ptr(), sums, head_dim - p * PANEL, false);
            }
        }
    }
    totals
}

/// One number of a panel's lanes, halving them: a chain of 32 would take longer than the row itself.
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
    /// Turns a row's scores into exponentials against its running maximum; `factor` corrects what came before.
    fn softmax_row(
        scores: &mut Scores,
        row: usize,
        seen: usize,
        panels: usize,
        maximum: &mut f32,
        total: &mut f32,
        factor: &mut f32,
    ) {
        let mut lanes = [f32::NEG_INFINITY; PANEL];
        for (p, strip) in scores.0[..panels].iter_mut().enumerate() {
            let line = &mut strip[row * PANEL..][..PANEL];
            if seen < (p + 1) * PANEL {
                line[seen.saturating_sub(p * PANEL)..].fill(f32::NEG_INFINITY);
            }
            for (lane, x) in lanes.iter_mut().zip(&*line) {
                *lane = if *x > *lane { *x } else { *lane };
            }
        }
        let highest = across(lanes, |a, b| if a > b { a } else { b }).max(*maximum);
        if highest == f32::NEG_INFINITY {
            // A causal row that sees none of this block: its weights are zero, not NaN.
            for strip in &mut scores.0[..panels] {
                strip[row * PANEL..][..PANEL].fill(0.0);
            }
            return;
        }
        let mut sums = [0.0f32; PANEL];
        for (p, strip) in scores.0[..panels].iter_mut().enumerate() {
            let line = &mut strip[row * PANEL..][..PANEL];
            for (sum, x) in sums.iter_mut().zip(&mut *line) {
                *x = fused_exp::<ISA>(*x - highest);
                *sum += *x;
            }
            if seen < (p + 1) * PANEL {
                // `exp` clamps: what is masked is exactly zero.
                let cut = seen.saturating_sub(p * PANEL);
                for (sum, x) in sums[cut..].iter_mut().zip(&mut line[cut..]) {
                    *sum -= *x;
                    *x = 0.0;
                }
            }
        }
        *factor = if *maximum == f32::NEG_INFINITY { 1.0 } else { exp(*maximum - highest) };
        *total = *total * *factor + across(sums, |a, b| a + b);
        *maximum = highest;
    }
}
