//! Convolutions and linear layers, with the operations that follow them fused into an epilogue.
//!
//! A 3x3 convolution for which [`winograd::pays`] runs there. Everything else runs here as a matrix product with
//! implicit im2col. A task is a block of rows by a group of panels. One stretch of k at a time, it gathers the pixels
//! under the rows' taps into a cache block that stays in L2, and multiplies the block by the group's panels in turn.
//! Their partial sums are kept in strips of `M_BLOCK` x 32 elements, and the epilogue writes each strip out once, after
//! the last stretch.

use super::gemm::{Left, Matrix, PANEL, ROWS, multiply};
use super::rounded::{Block, Rounded};
use super::simd::{dispatch, gelu, quick_gelu, relu, silu, soft_clamp};
use super::weights::source_column;
use super::{CpuWeights, NodeMemory, SharedOutput, winograd, with_scratch};
use crate::graph::{Activation, Conv, Extent, Shape, TensorId};
use rayon::prelude::*;
use std::ops::Range;

/// Most rows of a block: 16 register tiles of 12.
const M_BLOCK: usize = 16 * ROWS;
/// Longest stretch of k: a block of 288 KiB, and 48 KiB of a panel's lines.
const K_BLOCK: usize = 384;
/// Most panels of a task, whose sums then take 480 KiB.
const GROUP: usize = 20;
/// Most bytes of a block of rounded rows, which spans all of k.
const ROUNDED_BYTES: usize = 384 << 10;
/// Number of values, and of gates, in a gated panel.
const HALF: usize = PANEL / 2;

/// A source's elements and channels.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub data: &'a [f32],
    pub channels: usize,
}

/// A convolution with everything that it reads.
pub(super) struct ConvTask<'a> {
    conv: &'a Conv,
    /// The second is a copy of the first if there is no skip connection.
    sources: [Source<'a>; 2],
    /// Shape of the input as stored, and the height and width that the kernel sees after the resize.
    input: Shape,
    seen: Extent,
    pub output: Shape,
    /// Columns of the matrix: `output.c`, or twice that if gated.
    pub columns: usize,
    /// Rows of the matrix: channels of all sources times taps.
    pub depth: usize,
    pub weight: Matrix<'a>,
    bias: Option<&'a [f32]>,
    /// Elements of all images, from the first one that this layer reads, and the distance from one image's to the
    /// next's.
    per_image: Option<(&'a [f32], usize)>,
    residual: Option<&'a [f32]>,
}

/// Runs a [`Conv`].
pub(super) fn run(conv: &Conv, output: TensorId, memory: &NodeMemory, weights: &CpuWeights) {
    let input = memory.shape(conv.sources.x);
    let source = |id: TensorId| Source { data: memory.read(id), channels: memory.shape(id).c };
    let first = source(conv.sources.x);
    let sources = [first, conv.sources.skip.map_or(first, source)];
    let shape = memory.shape(output);
    let gated = conv.activation == Activation::Geglu;
    let task = ConvTask {
        conv,
        sources,
        input,
        seen: conv.resize.unwrap_or(input.extent()),
        output: shape,
        columns: if gated { 2 * shape.c } else { shape.c },
        depth: conv.kernel * conv.kernel * conv.sources.iter().map(|t| memory.shape(t).c).sum::<usize>(),
        weight: weights.matrix(conv.weight),
        bias: conv.bias.map(|b| weights.get(b)),
        per_image: conv.per_image.map(|view| (&memory.read(view.tensor)[view.offset..], memory.shape(view.tensor).c)),
        residual: conv.residual.map(|t| memory.read(t)),
    };
    let out = SharedOutput::new(memory.write(output));
    if winograd::pays(|t| memory.shape(t), conv, shape) {
        return winograd::run(&task, memory.workspace(), &out);
    }

    let rows = shape.rows();
    let panels = task.columns.div_ceil(PANEL);
    let most_rows = match task.weight {
        Matrix::Rounded(_, format) => (ROUNDED_BYTES / format.row_bytes(task.depth) / ROWS).max(1) * ROWS,
        _ => M_BLOCK,
    };
    let row_blocks = rows.div_ceil(most_rows.min(M_BLOCK));
    let block = rows.div_ceil(row_blocks).next_multiple_of(ROWS);
    let row_blocks = rows.div_ceil(block);
    // Enough tasks for the threads to finish together, but few enough that rows are not gathered more often than
    // needed.
    let wanted = 4 * rayon::current_num_threads();
    let groups = panels.div_ceil(GROUP).max(wanted.div_ceil(row_blocks)).min(panels);
    let group = panels.div_ceil(groups);
    let groups = panels.div_ceil(group);
    // Row blocks vary fastest, so that tasks that run close together share weights.
    (0..groups * row_blocks).into_par_iter().with_max_len(1).for_each(|i| {
        let (first_row, first_panel) = (i % row_blocks * block, i / row_blocks * group);
        let panels = first_panel..(first_panel + group).min(panels);
        let rows = first_row..(first_row + block).min(rows);
        match task.weight {
            Matrix::Rounded(weight, format) => rounded_product(&task, (weight, format), rows, panels, &out),
            _ => product(&task, rows, panels, &out),
        }
    });
}

impl ConvTask<'_> {
    /// The sources in channel order.
    pub fn sources(&self) -> &[Source<'_>] {
        &self.sources[..self.conv.sources.iter().count()]
    }

    /// The number of columns of a panel up to the last that is read. A gated panel has gates in its second half.
    pub fn columns_of(&self, panel: usize) -> usize {
        match self.conv.activation {
            Activation::Geglu => PANEL,
            _ => PANEL.min(self.columns - panel * PANEL),
        }
    }

    /// True if the padded image is one border row, then pairs of equal rows, and the same in columns.
    pub fn doubled(&self) -> bool {
        self.conv.pad == 1 && self.seen == self.input.extent().doubled()
    }

    /// The index of the sources' pixel at a row and a column of the padded image; `None` outside the image.
    pub fn pixel(&self, image: usize, y: usize, x: usize) -> Option<usize> {
        let Extent { h, w } = self.seen;
        // Rows and columns before the image wrap around to huge numbers, which fail the test below.
        let (y, x) = (y.wrapping_sub(self.conv.pad), x.wrapping_sub(self.conv.pad));
        if y >= h || x >= w {
            return None;
        }
        let (y, x) = match self.conv.resize {
            Some(_) => (y * self.input.h / h, x * self.input.w / w),
            None => (y, x),
        };
        Some((image * self.input.h + y) * self.input.w + x)
    }
}

/// Computes a block of rows by a group of panels.
fn product(task: &ConvTask, rows: Range<usize>, panels: Range<usize>, out: &SharedOutput) {
    let padded = rows.len().next_multiple_of(ROWS);
    let stretch = task.depth.div_ceil(task.depth.div_ceil(K_BLOCK));
    let strip = padded * PANEL;
    with_scratch(padded * stretch + stretch * PANEL + panels.len() * strip, |scratch| {
        let (gathered, scratch) = scratch.split_at_mut(padded * stretch);
        let (room, sums) = scratch.split_at_mut(stretch * PANEL);
        for start in (0..task.depth).step_by(stretch) {
            let k = start..(start + stretch).min(task.depth);
            gather(task, rows.clone(), k.clone(), gathered);
            let left = Left { numbers: gathered, pitch: k.len(), rows: rows.len(), depth: k.len() };
            for (panel, sums) in panels.clone().zip(sums.chunks_exact_mut(strip)) {
                let line = panel * task.depth + start;
                let lines = task.weight.lines(line * PANEL..(line + k.len()) * PANEL, room);
                multiply(left, lines, sums, PANEL, task.columns_of(panel), start == 0);
            }
        }
        Epilogue::new(task, panels).finish((rows.start, rows.len()), sums, strip, out);
    });
}

/// The same in a rounded format, for all of k at once, since a row's scale is that of all its elements.
fn rounded_product(
    task: &ConvTask,
    (weight, format): (&[u8], &dyn Rounded),
    rows: Range<usize>,
    panels: Range<usize>,
    out: &SharedOutput,
) {
    let (padded, depth) = (rows.len().next_multiple_of(ROWS), task.depth);
    let (strip, row_bytes, panel_bytes) = (padded * PANEL, format.row_bytes(depth), format.panel_bytes(depth));
    let bytes = (padded * row_bytes).div_ceil(size_of::<f32>());
    with_scratch(depth + padded + bytes + panels.len() * strip, |scratch| {
        let (row, scratch) = scratch.split_at_mut(depth);
        let (scales, scratch) = scratch.split_at_mut(padded);
        let (rounded, sums) = scratch.split_at_mut(bytes);
        let rounded: &mut [u8] = &mut bytemuck::cast_slice_mut(rounded)[..padded * row_bytes];
        for (i, (rounded, scale)) in rows.clone().zip(rounded.chunks_exact_mut(row_bytes).zip(&mut *scales)) {
            gather(task, i..i + 1, 0..depth, row);
            format.round(row, rounded, scale);
        }
        for (panel, sums) in panels.clone().zip(sums.chunks_exact_mut(strip)) {
            let left = Block { bytes: rounded, scales: &scales[..rows.len()], depth };
            format.multiply(left, &weight[panel * panel_bytes..][..panel_bytes], sums, task.columns_of(panel));
        }
        Epilogue::new(task, panels).finish((rows.start, rows.len()), sums, strip, out);
    });
}

/// Gathers a stretch `k` of the rows of the im2col matrix, row-major: channels of the pixels under the taps, and zeros
/// outside the image.
fn gather(task: &ConvTask, rows: Range<usize>, k: Range<usize>, to: &mut [f32]) {
    let inputs: usize = task.sources().iter().map(|source| source.channels).sum();
    let Conv { kernel, stride, .. } = *task.conv;
    let mut at = k.start;
    while at < k.end {
        let (tap, input) = (at / inputs, at % inputs);
        let (source, channel) = match input.checked_sub(task.sources[0].channels) {
            None => (task.sources[0], input),
            Some(channel) => (task.sources[1], channel),
        };
        let len = (source.channels - channel).min(k.end - at);
        for (row, line) in rows.clone().zip(to.chunks_exact_mut(k.len())) {
            let (image, pixel) = (row / task.output.tokens(), row % task.output.tokens());
            let (y, x) = (pixel / task.output.w, pixel % task.output.w);
            let part = &mut line[at - k.start..][..len];
            match task.pixel(image, y * stride + tap / kernel, x * stride + tap % kernel) {
                Some(pixel) => part.copy_from_slice(&source.data[pixel * source.channels + channel..][..len]),
                None => part.fill(0.0),
            }
        }
        at += len;
    }
}

/// The epilogue of a group of panels: bias, activation, residual, and the store to the output.
pub(super) struct Epilogue<'a> {
    task: &'a ConvTask<'a>,
    /// Bias of each panel of the group.
    bias: [[f32; PANEL]; GROUP],
    /// First column of the output of the group.
    first_column: usize,
    /// Columns of the output per panel, and of the whole group.
    width: usize,
    columns: usize,
}

impl<'a> Epilogue<'a> {
    /// An epilogue for at most [`GROUP`] panels.
    pub fn new(task: &'a ConvTask, panels: Range<usize>) -> Self {
        let gated = task.conv.activation == Activation::Geglu;
        let width = if gated { HALF } else { PANEL };
        let mut bias = [[0.0; PANEL]; GROUP];
        if let Some(values) = task.bias {
            for (panel, bias) in panels.clone().zip(&mut bias) {
                for (j, b) in bias.iter_mut().enumerate() {
                    *b = source_column(panel, j, task.columns, gated).map_or(0.0, |c| task.conv.bias_gain * values[c]);
                }
            }
        }
        let first_column = panels.start * width;
        Epilogue { task, bias, first_column, width, columns: (panels.len() * width).min(task.output.c - first_column) }
    }

    /// Writes `rows` rows (pixels of the output) from `first` on, from the sums of the panels, which it overwrites. The
    /// sums of each panel begin `strip` elements after those of the previous one. Every row is written from its first
    /// column to its last, so that the processor prefetches it. The caller alone may write these rows' part of `out`.
    pub fn finish(&self, (first, rows): (usize, usize), sums: &mut [f32], strip: usize, out: &SharedOutput) {
        finish(self, (first, rows), sums, strip, out);
    }
}

/// Calls `f` with each element of `x` and its value. A whole panel has a fixed length, which vectorises better.
#[inline(always)]
fn each(x: &mut [f32; PANEL], values: &[f32], f: impl Fn(&mut f32, f32)) {
    match <&[f32; PANEL]>::try_from(values) {
        Ok(values) => x.iter_mut().zip(values).for_each(|(x, v)| f(x, *v)),
        Err(_) => x.iter_mut().zip(values).for_each(|(x, v)| f(x, *v)),
    }
}

dispatch! {
    /// [`Epilogue::finish`].
    fn finish(epilogue: &Epilogue, rows: (usize, usize), sums: &mut [f32], strip: usize, out: &SharedOutput) {
        let &Epilogue { task, ref bias, first_column, width, columns } = epilogue;
        let Conv { gain, scale, activation, .. } = *task.conv;
        for row in 0..rows.1 {
            let at = (rows.0 + row) * task.output.c + first_column;
            // SAFETY: guaranteed by the caller of `Epilogue::finish`.
            let out = unsafe { out.at(at, columns) };
            let per_image = task.per_image.map(|(values, channels)| {
                &values[(rows.0 + row) / task.output.tokens() * channels + first_column..][..columns]
            });
            let residual = task.residual.map(|values| &values[at..][..columns]);
            for ((i, out), bias) in out.chunks_mut(width).enumerate().zip(bias) {
                let part = |values: &'_ [f32]| i * width..(i * width + width).min(values.len());
                let x = sums[i * strip + row * PANEL..].first_chunk_mut::<PANEL>().expect("a panel's sums");
                each(x, bias, |x, b| *x = *x * gain + b);
                if let Some(values) = per_image {
                    each(x, &values[part(values)], |x, v| *x += v);
                }
                match activation {
                    Activation::None | Activation::Relu => {}
                    Activation::Silu => x.iter_mut().for_each(|x| *x = silu(*x)),
                    Activation::Gelu => x.iter_mut().for_each(|x| *x = gelu(*x)),
                    Activation::QuickGelu => x.iter_mut().for_each(|x| *x = quick_gelu(*x)),
                    Activation::Geglu => {
                        let (values, gates) = x.split_at_mut(HALF);
                        for (x, g) in values.iter_mut().zip(gates) {
                            *x *= gelu(*g);
                        }
                    }
                    Activation::SoftClamp => x.iter_mut().for_each(|x| *x = soft_clamp(*x)),
                    Activation::ToUnit => x.iter_mut().for_each(|x| *x = 0.5 * *x + 0.5),
                    Activation::FromUnit => x.iter_mut().for_each(|x| *x = 2.0 * *x - 1.0),
                }
                if let Some(values) = residual {
                    each(x, &values[part(values)], |x, v| *x += v);
                }
                if activation == Activation::Relu {
                    x.iter_mut().for_each(|x| *x = relu(*x));
                }
                x.iter_mut().for_each(|x| *x *= scale);
                match out.len() {
                    PANEL => out.copy_from_slice(x),
                    HALF => out.copy_from_slice(&x[..HALF]),
                    len => out.copy_from_slice(&x[..len]),
                }
            }
        }
    }
}
