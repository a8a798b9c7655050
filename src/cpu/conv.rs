//! Convolutions and linear layers, with everything that follows them fused.
//!
//! Where [`winograd::pays`] a 3x3 convolution is made there, and everything else here, tap by tap. Work is split into
//! blocks of rows by groups of panels. Within a block, for each panel and each stretch of k that keeps the weights'
//! lines in L1 (`K_BLOCK` x 32 numbers), all rows pass by; their partial sums stay in a strip of `M_BLOCK` x 32
//! numbers, and the epilogue writes the strip out once.

use super::gemm::{Matrix, PANEL, ROWS, Segment, multiply};
use super::simd::{dispatch, gelu, quick_gelu, silu};
use super::weights::source_column;
use super::{Memory, SharedOutput, Weights, winograd, with_scratch};
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
pub(super) struct Source<'a> {
    pub data: &'a [f32],
    pub channels: usize,
}

/// A convolution with all that it reads.
pub(super) struct Task<'a> {
    conv: &'a Conv,
    /// The second is the first again where there is no skip connection.
    sources: [Source<'a>; 2],
    /// Input as stored, and as the kernel sees it after the resize.
    input: Shape,
    seen: (usize, usize),
    pub output: Shape,
    /// Columns of the matrix: `output.c`, twice that when gated.
    pub columns: usize,
    /// Rows of the matrix: inputs of all sources and taps.
    pub depth: usize,
    pub weight: Matrix<'a>,
    bias: Option<&'a [f32]>,
    /// Numbers of all images, from the first that this layer reads, and how many are between an image's and the next's.
    per_image: Option<(&'a [f32], usize)>,
    residual: Option<&'a [f32]>,
    /// As many as the widest source has channels.
    pub zeros: &'a [f32],
}

/// Elements of scratch memory a node wants: a row of zeros for taps outside the image, after what
/// [`winograd::workspace`] says.
pub(super) fn workspace(shape: impl Fn(TensorId) -> Shape, conv: &Conv, output: TensorId) -> usize {
    widest(&shape, conv) + winograd::workspace(&shape, conv, shape(output))
}

fn widest(shape: impl Fn(TensorId) -> Shape, conv: &Conv) -> usize {
    conv.sources.iter().map(|t| shape(t).c).max().unwrap_or(0)
}

/// Runs a [`Conv`].
pub(super) fn run(conv: &Conv, output: TensorId, memory: &Memory, weights: &Weights) {
    let input = memory.shape(conv.sources.x);
    let workspace = memory.workspace();
    let room = workspace.len() - widest(|t| memory.shape(t), conv);
    let (transformed, zeros) = workspace.split_at_mut(room);
    zeros.fill(0.0);
    let source = |id: TensorId| Source { data: memory.read(id), channels: memory.shape(id).c };
    let first = source(conv.sources.x);
    let sources = [first, conv.sources.skip.map_or(first, source)];
    let shape = memory.shape(output);
    let gated = conv.activation == Activation::Geglu;
    let task = Task {
        conv,
        sources,
        input,
        seen: conv.resize.unwrap_or((input.h, input.w)),
        output: shape,
        columns: if gated { 2 * shape.c } else { shape.c },
        depth: conv.kernel * conv.kernel * conv.sources.iter().map(|t| memory.shape(t).c).sum::<usize>(),
        weight: weights.matrix(conv.weight),
        bias: conv.bias.map(|b| weights.get(b)),
        per_image: conv.per_image.map(|view| (&memory.read(view.tensor)[view.offset..], memory.shape(view.tensor).c)),
        residual: conv.residual.map(|t| memory.read(t)),
        zeros,
    };
    let out = SharedOutput::new(memory.write(output));
    if winograd::pays(|t| memory.shape(t), conv, shape) {
        return winograd::run(&task, transformed, &out);
    }

    let mut pieces = [Piece::default(); MAX_PIECES];
    let count = list_pieces(conv, task.sources(), &mut pieces);
    let pieces = &pieces[..count];
    let rows = shape.rows();
    let panels = task.columns.div_ceil(PANEL);
    let row_blocks = rows.div_ceil(M_BLOCK);
    // Enough blocks that the threads end together, few enough that weights are not fetched more often than needed.
    let wanted = 8 * rayon::current_num_threads();
    let groups = wanted.div_ceil(row_blocks).clamp(1, panels);
    let per_group = panels.div_ceil(groups);
    let groups = panels.div_ceil(per_group);
    // Row blocks vary fastest: neighbours in time share the weights.
    (0..groups * row_blocks).into_par_iter().for_each(|i| {
        let (group, block) = (i / row_blocks, i % row_blocks);
        let first_row = block * M_BLOCK;
        let last_row = (first_row + M_BLOCK).min(rows);
        let most = pieces.iter().map(|p| p.len).max().unwrap_or(0).max(K_BLOCK) * PANEL;
        with_scratch(M_BLOCK * PANEL + most, |scratch| {
            for panel in group * per_group..((group + 1) * per_group).min(panels) {
                strip(&task, pieces, first_row..last_row, panel, scratch, &out);
            }
        });
    });
}

impl Task<'_> {
    /// The sources in channel order.
    pub fn sources(&self) -> &[Source<'_>] {
        &self.sources[..self.conv.sources.iter().count()]
    }

    /// Columns of a panel up to the last that is read; a gated one has gates in its second half.
    pub fn columns_of(&self, panel: usize) -> usize {
        match self.conv.activation {
            Activation::Geglu => PANEL,
            _ => PANEL.min(self.columns - panel * PANEL),
        }
    }

    /// Whether the image with its padding is an odd row, then equal pairs of rows, and the same of columns.
    pub fn doubled(&self) -> bool {
        self.conv.pad == 1 && self.seen == (2 * self.input.h, 2 * self.input.w)
    }

    /// The sources' pixel at a row and a column of the image with its padding; none outside the image.
    pub fn pixel(&self, image: usize, y: usize, x: usize) -> Option<usize> {
        let (height, width) = self.seen;
        // Rows and columns before the image wrap around to huge numbers and fail the test below.
        let (y, x) = (y.wrapping_sub(self.conv.pad), x.wrapping_sub(self.conv.pad));
        if y >= height || x >= width {
            return None;
        }
        let (y, x) = match self.conv.resize {
            Some(_) => (y * self.input.h / height, x * self.input.w / width),
            None => (y, x),
        };
        Some((image * self.input.h + y) * self.input.w + x)
    }
}

/// Splits k into pieces of at most `K_BLOCK` channels, in the order of the packed weights.
fn list_pieces(conv: &Conv, sources: &[Source], pieces: &mut [Piece; MAX_PIECES]) -> usize {
    let widest = sources.iter().map(|s| s.channels).max().unwrap_or(1);
    let limit = K_BLOCK.max(widest.div_ceil(MAX_PIECES / (2 * conv.kernel * conv.kernel)));
    let mut count = 0;
    for tap in 0..conv.kernel * conv.kernel {
        for (index, source) in sources.iter().enumerate() {
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

/// One panel of columns for a block of rows. `scratch` takes the strip of sums, and the weights of a visit.
fn strip(
    task: &Task,
    pieces: &[Piece],
    rows: std::ops::Range<usize>,
    panel: usize,
    scratch: &mut [f32],
    out: &SharedOutput,
) {
    let (sums, room) = scratch.split_at_mut(M_BLOCK * PANEL);
    let mut segments = [Segment { len: 0, rows: [task.zeros.as_ptr(); ROWS] }; MAX_SEGMENTS];
    let mut k = 0;
    let mut start = 0;
    while start < pieces.len() {
        let mut end = start;
        let mut len = 0;
        while end < pieces.len().min(start + MAX_SEGMENTS) && (len == 0 || len + pieces[end].len <= K_BLOCK) {
            len += pieces[end].len;
            end += 1;
        }
        let line = panel * task.depth + k;
        let weight = task.weight.lines(line * PANEL..(line + len) * PANEL, room);
        for (tile, first) in rows.clone().step_by(ROWS).enumerate() {
            let segments = &mut segments[..end - start];
            locate(task, first..(first + ROWS).min(rows.end), &pieces[start..end], segments);
            let sums = &mut sums[tile * ROWS * PANEL..][..ROWS * PANEL];
            multiply(segments, weight.as_ptr(), sums.as_mut_ptr(), task.columns_of(panel), start == 0);
        }
        k += len;
        start = end;
    }

    let epilogue = Epilogue::new(task, panel);
    for (row, sums) in rows.zip(sums.chunks_exact_mut(PANEL)) {
        epilogue.finish(row, sums, out);
    }
}

/// What follows the sums of one panel.
pub(super) struct Epilogue<'a> {
    task: &'a Task<'a>,
    bias: [f32; PANEL],
    first_column: usize,
    columns: usize,
}

impl<'a> Epilogue<'a> {
    pub fn new(task: &'a Task, panel: usize) -> Self {
        let gated = task.conv.activation == Activation::Geglu;
        let width = if gated { PANEL / 2 } else { PANEL };
        let mut bias = [0.0; PANEL];
        if let Some(values) = task.bias {
            for (j, b) in bias.iter_mut().enumerate() {
                *b = source_column(panel, j, task.columns, gated).map_or(0.0, |c| task.conv.bias_gain * values[c]);
            }
        }
        let first_column = panel * width;
        Epilogue { task, bias, first_column, columns: (task.output.c - first_column).min(width) }
    }

    /// Writes one row, a pixel of the output, from the panel's sums, which are spoilt. Whoever calls is the only one to
    /// write this row's part of `out`.
    pub fn finish(&self, row: usize, sums: &mut [f32], out: &SharedOutput) {
        let &Epilogue { task, ref bias, first_column, columns } = self;
        let at = row * task.output.c + first_column;
        let image = row / task.output.tokens();
        let per_image = task.per_image.map(|(v, width)| &v[image * width + first_column..][..columns]);
        let residual = task.residual.map(|v| &v[at..][..columns]);
        // SAFETY: the caller's promise.
        let out = unsafe { out.at(at, columns) };
        finish(sums, task.conv.gain, bias, per_image, task.conv.activation, residual, task.conv.scale, out);
    }
}

/// Points each segment's rows at the pixels under its tap, or at zeros outside the image and beyond the last row.
fn locate(task: &Task, rows: std::ops::Range<usize>, pieces: &[Piece], segments: &mut [Segment]) {
    let stride = task.conv.stride;
    for segment in &mut *segments {
        segment.rows[rows.len()..].fill(task.zeros.as_ptr());
    }
    for (i, row) in rows.enumerate() {
        let (image, pixel) = (row / task.output.tokens(), row % task.output.tokens());
        let (oy, ox) = (pixel / task.output.w, pixel % task.output.w);
        for (piece, segment) in pieces.iter().zip(&mut *segments) {
            segment.len = piece.len;
            let source = &task.sources[piece.source];
            let pixel = task.pixel(image, oy * stride + piece.ky, ox * stride + piece.kx);
            segment.rows[i] = pixel
                .map_or(task.zeros.as_ptr(), |pixel| source.data[pixel * source.channels + piece.channel..].as_ptr());
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
