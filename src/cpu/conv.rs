//! Convolutions and linear layers, with everything that follows them fused.
//!
//! Work is split into blocks of rows by groups of panels. Within a block, for each panel and each stretch of k that
//! keeps the packed weights in L1 (`K_BLOCK` x 32 numbers), all rows pass by; their partial sums stay in a strip of
//! `M_BLOCK` x 32 numbers, and the epilogue writes the strip out once.

use super::gemm::{PANEL, ROWS, Segment, multiply};
use super::simd::{dispatch, gelu, quick_gelu, silu};
use super::weights::source_column;
use super::{Memory, SharedOutput, Weights};
use crate::graph::{Activation, Conv, Shape, TensorId};
use rayon::prelude::*;

/// Rows of a block: 32 tiles of 12, a strip of 48 KiB.
const M_BLOCK: usize = 32 * ROWS;
/// Numbers of k between two visits of a strip, at least; segments are not split but for very wide ones.
const K_BLOCK: usize = 384;
/// Most pieces of a convolution: nine taps of two sources, and wide sources in several.
const MAX_PIECES: usize = 128;
/// Most segments between two visits of a strip.
const MAX_SEGMENTS: usize = 16;

/// A tap's channels of one source: where a stretch of k comes from.
#[derive(Clone, Copy, Default)]
struct Piece {
    source: usize,
    ky: usize,
    kx: usize,
    channel: usize,
    len: usize,
}

/// A source's numbers and channels.
#[derive(Clone, Copy)]
struct Source<'a> {
    data: &'a [f32],
    channels: usize,
}

struct Task<'a> {
    conv: &'a Conv,
    sources: [Source<'a>; 2],
    /// Input as stored, and as the kernel sees it after the resize.
    input: Shape,
    seen: (usize, usize),
    output: Shape,
    /// Columns of the matrix: `output.c`, twice that when gated.
    columns: usize,
    pieces: &'a [Piece],
    depth: usize,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    /// Numbers of all images, from the first that this layer reads, and how many are between an image's and the next's.
    per_image: Option<(&'a [f32], usize)>,
    residual: Option<&'a [f32]>,
    zeros: &'a [f32],
}

/// Elements of scratch memory a node wants: a row of zeros for taps outside the image.
pub(super) fn workspace(shape: impl Fn(TensorId) -> Shape, conv: &Conv) -> usize {
    conv.sources.iter().map(|t| shape(t).c).max().unwrap_or(0)
}

/// Runs a [`Conv`].
pub(super) fn run(conv: &Conv, output: TensorId, memory: &Memory, weights: &Weights) {
    let input = memory.shape(conv.sources.x);
    let zeros = memory.workspace();
    zeros.fill(0.0);
    let source = |id: TensorId| Source { data: memory.read(id), channels: memory.shape(id).c };
    let first = source(conv.sources.x);
    let sources = [first, conv.sources.skip.map_or(first, source)];
    let mut pieces = [Piece::default(); MAX_PIECES];
    let count = list_pieces(conv, &sources, &mut pieces);
    let pieces = &pieces[..count];
    let shape = memory.shape(output);
    let gated = conv.activation == Activation::Geglu;
    let task = Task {
        conv,
        sources,
        input,
        seen: conv.resize.unwrap_or((input.h, input.w)),
        output: shape,
        columns: if gated { 2 * shape.c } else { shape.c },
        pieces,
        depth: pieces.iter().map(|p| p.len).sum(),
        weight: weights.get(conv.weight),
        bias: conv.bias.map(|b| weights.get(b)),
        per_image: conv.per_image.map(|view| (&memory.read(view.tensor)[view.offset..], memory.shape(view.tensor).c)),
        residual: conv.residual.map(|t| memory.read(t)),
        zeros,
    };

    let rows = shape.rows();
    let panels = task.columns.div_ceil(PANEL);
    let row_blocks = rows.div_ceil(M_BLOCK);
    // Enough blocks that the threads end together, few enough that weights are not fetched more often than needed.
    let wanted = 8 * rayon::current_num_threads();
    let groups = wanted.div_ceil(row_blocks).clamp(1, panels);
    let per_group = panels.div_ceil(groups);
    let groups = panels.div_ceil(per_group);
    let out = SharedOutput::new(memory.write(output));
    // Row blocks vary fastest: neighbours in time share the weights.
    (0..groups * row_blocks).into_par_iter().for_each(|i| {
        let (group, block) = (i / row_blocks, i % row_blocks);
        let first_row = block * M_BLOCK;
        let last_row = (first_row + M_BLOCK).min(rows);
        for panel in group * per_group..((group + 1) * per_group).min(panels) {
            strip(&task, first_row..last_row, panel, &out);
        }
    });
}

/// Splits k into pieces of at most `K_BLOCK` channels, in the order of the packed weights.
fn list_pieces(conv: &Conv, sources: &[Source; 2], pieces: &mut [Piece; MAX_PIECES]) -> usize {
    let used = conv.sources.iter().count();
    let widest = sources.iter().map(|s| s.channels).max().unwrap_or(1);
    let limit = K_BLOCK.max(widest.div_ceil(MAX_PIECES / (2 * conv.kernel * conv.kernel)));
    let mut count = 0;
    for tap in 0..conv.kernel * conv.kernel {
        for (index, source) in sources.iter().enumerate().take(used) {
            let mut channel = 0;
            while channel < source.channels {
                let len = limit.min(source.channels - channel);
                let (ky, kx) = (tap / conv.kernel, tap % conv.kernel);
                pieces[count] = Piece { source: index, ky, kx, channel, len };
                count += 1;
                channel += len;
            }
        }
    }
    count
}

/// One panel of columns for a block of rows.
fn strip(task: &Task, rows: std::ops::Range<usize>, panel: usize, out: &SharedOutput) {
    let mut sums = Strip([0.0; M_BLOCK * PANEL]);
    let weight = &task.weight[panel * task.depth * PANEL..][..task.depth * PANEL];
    let mut segments = [Segment { len: 0, rows: [task.zeros.as_ptr(); ROWS] }; MAX_SEGMENTS];
    let mut k = 0;
    let mut start = 0;
    while start < task.pieces.len() {
        let mut end = start;
        let mut len = 0;
        while end < task.pieces.len().min(start + MAX_SEGMENTS) && (len == 0 || len + task.pieces[end].len <= K_BLOCK) {
            len += task.pieces[end].len;
            end += 1;
        }
        for (tile, first) in rows.clone().step_by(ROWS).enumerate() {
            let segments = &mut segments[..end - start];
            locate(task, first..(first + ROWS).min(rows.end), &task.pieces[start..end], segments);
            let sums = &mut sums.0[tile * ROWS * PANEL..][..ROWS * PANEL];
            multiply(segments, weight[k * PANEL..].as_ptr(), sums.as_mut_ptr(), start == 0);
        }
        k += len;
        start = end;
    }

    let half = PANEL / 2;
    let gated = task.conv.activation == Activation::Geglu;
    let mut bias = [0.0; PANEL];
    if let Some(values) = task.bias {
        for (j, b) in bias.iter_mut().enumerate() {
            *b = source_column(panel, j, task.columns, gated).map_or(0.0, |c| task.conv.bias_gain * values[c]);
        }
    }
    let width = task.output.c;
    let first_column = panel * if gated { half } else { PANEL };
    let count = (width - first_column).min(if gated { half } else { PANEL });
    let pixels = task.output.tokens();
    for (row, sums) in rows.zip(sums.0.chunks_exact_mut(PANEL)) {
        let at = row * width + first_column;
        let per_image = task.per_image.map(|(v, width)| &v[row / pixels * width + first_column..][..count]);
        let residual = task.residual.map(|v| &v[at..][..count]);
        // SAFETY: this strip alone writes these rows and columns.
        let out = unsafe { out.at(at, count) };
        finish(sums, task.conv.gain, &bias, per_image, task.conv.activation, residual, task.conv.scale, out);
    }
}

#[repr(align(64))]
struct Strip([f32; M_BLOCK * PANEL]);

/// Points each segment's rows at the pixels under its tap, or at zeros outside the image and beyond the last row.
fn locate(task: &Task, rows: std::ops::Range<usize>, pieces: &[Piece], segments: &mut [Segment]) {
    let (height, width) = task.seen;
    let stride = task.conv.stride;
    for segment in &mut *segments {
        segment.rows[rows.len()..].fill(task.zeros.as_ptr());
    }
    for (i, row) in rows.enumerate() {
        let (image, pixel) = (row / task.output.tokens(), row % task.output.tokens());
        let (oy, ox) = (pixel / task.output.w, pixel % task.output.w);
        for (piece, segment) in pieces.iter().zip(&mut *segments) {
            segment.len = piece.len;
            // Rows and columns before the image wrap around to huge numbers and fail the test below.
            let y = (oy * stride + piece.ky).wrapping_sub(task.conv.pad);
            let x = (ox * stride + piece.kx).wrapping_sub(task.conv.pad);
            segment.rows[i] = if y < height && x < width {
                let (y, x) = match task.conv.resize {
                    Some(_) => (y * task.input.h / height, x * task.input.w / width),
                    None => (y, x),
                };
                let source = &task.sources[piece.source];
                let pixel = (image * task.input.h + y) * task.input.w + x;
                source.data[pixel * source.channels + piece.channel..].as_ptr()
            } else {
                task.zeros.as_ptr()
            };
        }
    }
}

dispatch! {
    /// The epilogue for one row of a strip.
    fn finish(
        sums: &mut [f32],
        gain: f32,
        bias: &[f32; PANEL],
        per_image: Option<&[f32]>,
        activation: Activation,
        residual: Option<&[f32]>,
        scale: f32,
        out: &mut [f32],
    ) {
        for (x, b) in sums.iter_mut().zip(bias) {
            *x = *x * gain + b;
        }
        if let Some(values) = per_image {
            for (x, v) in sums.iter_mut().zip(values) {
                *x += v;
            }
        }
        match activation {
            Activation::None => {}
            Activation::Silu => sums.iter_mut().for_each(|x| *x = silu(*x)),
            Activation::Gelu => sums.iter_mut().for_each(|x| *x = gelu(*x)),
            Activation::QuickGelu => sums.iter_mut().for_each(|x| *x = quick_gelu(*x)),
            Activation::Geglu => {
                let (values, gates) = sums.split_at_mut(PANEL / 2);
                for (x, g) in values.iter_mut().zip(gates) {
                    *x *= gelu(*g);
                }
            }
        }
        if let Some(values) = residual {
            for (x, v) in sums.iter_mut().zip(values) {
                *x += v;
            }
        }
        for (o, x) in out.iter_mut().zip(sums) {
            *o = *x * scale;
        }
    }
}
