//! 3x3 convolutions of stride 1 with a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3) as
//! given by Lavin and Gray (arXiv 1509.09308, section 4.3), with their points 0, 1, -1, 2, -2 and infinity.
//!
//! Each 4x4 tile of the output depends on a 6x6 patch of the input. A transform along rows and columns turns the 36
//! pixels of a patch, in each channel, into 36 other numbers, its *points*; another turns the 9 taps of a kernel into
//! 36 points too. At each point the tiles and the kernels are then two matrices, which the matrix kernel multiplies. A
//! third transform turns the 36 sums of a tile back into 16 pixels. This takes 36 multiply-adds for 16 pixels, where
//! direct convolution takes 144.
//!
//! If the source is doubled first, every pixel of a patch except the outermost has an equal neighbour. The point -1 is
//! then zero along rows and columns, which leaves 25 products.
//!
//! The weights stay nine taps in panels. A task transforms [`depth`] lines of [`GROUP`] panels at a time, which took 5
//! to 10 % of its time at 96 tiles. So no weight is held twice or at four times its size, and one packed form serves
//! both direct convolution and this one. The points of the patches, up to [`POINTS_BYTES`] of them, are written once
//! for all threads and read once per group of panels. Each transform is of a single tile, and each sum is one chain in
//! the order of k, so results depend neither on the batch nor on the threads.
//!
//! Rounding error: 3.5e-6 of a layer's L2 norm with 320 inputs, where the direct chain has 1e-6.

use super::conv::{ConvTask, Epilogue};
use super::gemm::{Left, PANEL, ROWS, multiply};
use super::simd::{Isa, dispatch, isa};
use super::{SharedOutput, with_scratch};
use crate::graph::{Conv, Shape, TensorId};
use rayon::prelude::*;

/// Height and width of a tile of outputs, and of the patch of inputs under it.
const TILE: usize = 4;
const PATCH: usize = TILE + 2;
/// Number of points of a patch, a kernel and a tile.
const POINTS: usize = PATCH * PATCH;
/// Index of the point -1 in each direction.
const MINUS_ONE: usize = 2;
/// Channels that are transformed together: one cache line.
const LANES: usize = 16;
/// Most lines of weights that are transformed at a time.
const MOST_DEPTH: usize = 128;
/// Panels of a task. For the second panel, the points of the patches are read from the L1 cache.
const GROUP: usize = 2;
/// Most tiles of a task, whose sums then take 0.9 MB.
const TASK_TILES: usize = 8 * ROWS;
/// Approximate memory for the points of patches: half of the L3 cache that two threads can expect.
const POINTS_BYTES: usize = 16 << 20;

/// Lines of weights that are transformed at a time. The points of 64 lines take 96 KiB per group for a row of points,
/// 16 KiB for one point. Twice as many lines are 8 % faster where the L2 cache has room for them; with AVX-512 it has 1
/// MiB or more.
fn depth() -> usize {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => MOST_DEPTH,
        _ => 64,
    }
}

/// Returns true if a convolution is to be computed by this module. Measured with AVX2, it is 2.4 times as fast as
/// direct convolution from 16x16 pixels on, and 1.5 times for two images of 8x8. Below that, tiles are too few to be
/// worth the transforms of the kernels.
///
/// The shape of one image decides, never the batch, since the two methods round differently.
pub(super) fn pays(shape: impl Fn(TensorId) -> Shape, conv: &Conv, output: Shape) -> bool {
    conv.kernel == 3
        && conv.stride == 1
        && conv.sources.iter().all(|t| shape(t).c.is_multiple_of(LANES))
        && output.h.div_ceil(TILE) * output.w.div_ceil(TILE) >= 4
}

/// Elements of scratch memory: the points of a block of patches.
pub(super) fn workspace(shape: impl Fn(TensorId) -> Shape, conv: &Conv, output: Shape) -> usize {
    if !pays(&shape, conv, output) {
        return 0;
    }
    let channels = conv.sources.iter().map(|t| shape(t).c).sum();
    POINTS * channels * block(channels, Tiles::of(output).count())
}

/// Number of tiles whose patches are transformed together: a multiple of [`ROWS`].
fn block(channels: usize, tiles: usize) -> usize {
    (POINTS_BYTES / (POINTS * channels * size_of::<f32>())).clamp(1, tiles).next_multiple_of(ROWS)
}

/// The tiles of all images. No tile has pixels of two images.
#[derive(Clone, Copy)]
struct Tiles {
    images: usize,
    down: usize,
    across: usize,
}

impl Tiles {
    fn of(output: Shape) -> Self {
        Tiles { images: output.n, down: output.h.div_ceil(TILE), across: output.w.div_ceil(TILE) }
    }

    fn count(self) -> usize {
        self.images * self.down * self.across
    }

    /// A tile's image, first row and first column.
    fn place(self, tile: usize) -> (usize, usize, usize) {
        let in_image = tile % (self.down * self.across);
        (tile / (self.down * self.across), in_image / self.across * TILE, in_image % self.across * TILE)
    }
}

/// Channels of a source that are transformed together, and the lines of weights that they meet.
struct Chunk<'a> {
    data: &'a [f32],
    /// Channels of the whole source, and the first channel of the chunk.
    channels: usize,
    channel: usize,
    /// First line of the chunk among the weights of a tap.
    k: usize,
    len: usize,
}

fn chunks<'a>(task: &'a ConvTask) -> impl Iterator<Item = Chunk<'a>> {
    let (mut k, depth) = (0, depth());
    task.sources().iter().flat_map(move |source| {
        let first = k;
        k += source.channels;
        (0..source.channels).step_by(depth).map(move |channel| Chunk {
            data: source.data,
            channels: source.channels,
            channel,
            k: first + channel,
            len: depth.min(source.channels - channel),
        })
    })
}

/// The layout of the points of a block of this many tiles: each chunk's as `[point][tile][channel]`, one chunk after
/// the other.
#[derive(Clone, Copy)]
struct Layout(usize);

impl Layout {
    fn at(self, chunk: &Chunk, point: usize, tile: usize) -> usize {
        POINTS * self.0 * chunk.k + (point * self.0 + tile) * chunk.len
    }
}

/// Runs a convolution for which [`pays`] is true, in a workspace of the size that [`workspace`] tells.
pub(super) fn run(task: &ConvTask, workspace: &mut [f32], out: &SharedOutput) {
    let tiles = Tiles::of(task.output);
    let groups = task.columns.div_ceil(PANEL).div_ceil(GROUP);
    let block = block(task.depth / 9, tiles.count());
    for first in (0..tiles.count()).step_by(block) {
        let count = block.min(tiles.count() - first);
        // The matrix kernel works on whole tiles of rows. Nothing reads the results of rows without a tile.
        let layout = Layout(count.next_multiple_of(ROWS));
        let points = SharedOutput::new(workspace);
        (0..count)
            .into_par_iter()
            .with_min_len(4)
            .for_each(|i| patch(task, tiles.place(first + i), i, layout, &points));
        let points = &*workspace;
        // Enough tasks for the threads to finish together, each with enough tiles to be worth the transforms of its
        // kernels.
        let wanted = (4 * rayon::current_num_threads()).div_ceil(groups);
        let each = count.div_ceil(wanted).next_multiple_of(ROWS).min(TASK_TILES);
        let parts = count.div_ceil(each);
        // Parts vary fastest, so that tasks that run close together share weights.
        (0..groups * parts).into_par_iter().with_max_len(1).for_each(|i| {
            let start = i % parts * each;
            product(task, i / parts, start..(start + each).min(count), (tiles, first), (layout, points), out);
        });
    }
}

/// Transforms the patch under tile `i` of the block.
fn patch(task: &ConvTask, (image, y, x): (usize, usize, usize), i: usize, layout: Layout, points: &SharedOutput) {
    let pixels: [_; POINTS] = std::array::from_fn(|p| task.pixel(image, y + p / PATCH, x + p % PATCH));
    for chunk in chunks(task) {
        let at = |pixel: usize| &chunk.data[pixel * chunk.channels + chunk.channel..][..chunk.len];
        let pixels = pixels.map(|pixel| pixel.map_or(&[0.0; MOST_DEPTH][..chunk.len], at));
        // SAFETY: only this call writes this tile's elements of this chunk.
        let out = |point| unsafe { points.at(layout.at(&chunk, point, i), chunk.len) };
        transform_patch(&pixels, &mut std::array::from_fn(out));
    }
}

/// Computes some tiles of a block for the columns of a group of panels: the products at every point, and the output
/// pixels from them.
fn product(
    task: &ConvTask,
    group: usize,
    range: std::ops::Range<usize>,
    (tiles, first): (Tiles, usize),
    (layout, points): (Layout, &[f32]),
    out: &SharedOutput,
) {
    let panels = group * GROUP..((group + 1) * GROUP).min(task.columns.div_ceil(PANEL));
    // The sums of the points are one row further apart than they are long: with a power of two as pitch, all sums of a
    // tile would fall into few sets of the cache.
    let pitch = (range.len().next_multiple_of(ROWS) + 1) * PANEL;
    let (depth, tap) = (depth(), task.depth / 9 * PANEL);
    let lines = PATCH * depth * PANEL;
    let skipped = |row| task.doubled() && row == MINUS_ONE;
    with_scratch(GROUP * (9 * depth * PANEL + lines + POINTS * pitch), |scratch| {
        let (room, scratch) = scratch.split_at_mut(GROUP * 9 * depth * PANEL);
        let (kernels, sums) = scratch.split_at_mut(GROUP * lines);
        if task.doubled() {
            sums.fill(0.0);
        }
        for chunk in chunks(task) {
            let mut room = room.chunks_exact_mut(depth * PANEL);
            let mut taps = [[&[][..]; 9]; GROUP];
            for (first_tap, taps) in panels.clone().map(|panel| 9 * panel).zip(&mut taps) {
                for (i, (numbers, room)) in taps.iter_mut().zip(&mut room).enumerate() {
                    let start = (first_tap + i) * tap + chunk.k * PANEL;
                    *numbers = task.weight.lines(start..start + chunk.len * PANEL, room);
                }
            }
            for row in (0..PATCH).filter(|&row| !skipped(row)) {
                for (taps, kernels) in taps[..panels.len()].iter().zip(kernels.chunks_exact_mut(lines)) {
                    transform_kernels(taps, row, &mut kernels[..PATCH * chunk.len * PANEL]);
                }
                for column in (0..PATCH).filter(|&column| !skipped(column)) {
                    let point = row * PATCH + column;
                    let numbers = &points[layout.at(&chunk, point, range.start)..];
                    let left = Left { numbers, pitch: chunk.len, rows: range.len(), depth: chunk.len };
                    let group = kernels.chunks_exact(lines).zip(sums.chunks_exact_mut(POINTS * pitch));
                    for (panel, (kernels, sums)) in panels.clone().zip(group) {
                        let kernels = &kernels[column * chunk.len * PANEL..];
                        let sums = &mut sums[point * pitch..][..pitch];
                        multiply(left, kernels, sums, PANEL, task.columns_of(panel), chunk.k == 0);
                    }
                }
            }
        }
        let epilogue = Epilogue::new(task, panels.clone());
        for (i, tile) in range.clone().enumerate() {
            let (image, y, x) = tiles.place(first + tile);
            let mut pixels = [[[[0.0; PANEL]; TILE]; TILE]; GROUP];
            for (sums, pixels) in sums.chunks_exact(POINTS * pitch).zip(&mut pixels[..panels.len()]) {
                transform_sums(&sums[i * PANEL..], pitch, pixels);
            }
            let pixels = pixels.as_flattened_mut().as_flattened_mut().as_flattened_mut();
            for (line, y) in (y..task.output.h.min(y + TILE)).enumerate() {
                let first = (image * task.output.h + y) * task.output.w + x;
                let rows = (first, TILE.min(task.output.w - x));
                epilogue.finish(rows, &mut pixels[line * TILE * PANEL..], TILE * TILE * PANEL, out);
            }
        }
    });
}

/// Transforms a line of six pixels to its points.
#[inline(always)]
fn patch_line(d: [f32; PATCH]) -> [f32; PATCH] {
    let (even, odd) = (d[4] - 4.0 * d[2], d[3] - 4.0 * d[1]);
    let (even_2, odd_2) = (d[4] - d[2], 2.0 * (d[3] - d[1]));
    let ends = [4.0 * d[0] - 5.0 * d[2] + d[4], 4.0 * d[1] - 5.0 * d[3] + d[5]];
    [ends[0], even + odd, even - odd, even_2 + odd_2, even_2 - odd_2, ends[1]]
}

/// The factors of the three taps of a line at each point.
const KERNEL: [[f32; 3]; PATCH] = [
    [1.0 / 4.0, 0.0, 0.0],
    [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0],
    [-1.0 / 6.0, 1.0 / 6.0, -1.0 / 6.0],
    [1.0 / 24.0, 1.0 / 12.0, 1.0 / 6.0],
    [1.0 / 24.0, -1.0 / 12.0, 1.0 / 6.0],
    [0.0, 0.0, 1.0],
];

/// Transforms a line of three taps to its points.
#[inline(always)]
fn kernel_line(g: [f32; 3]) -> [f32; PATCH] {
    let (even, odd) = (KERNEL[1][0] * (g[0] + g[2]), KERNEL[1][1] * g[1]);
    let (even_2, odd_2) = (KERNEL[3][0] * g[0] + KERNEL[3][2] * g[2], KERNEL[3][1] * g[1]);
    [KERNEL[0][0] * g[0], even + odd, even - odd, even_2 + odd_2, even_2 - odd_2, g[2]]
}

/// Transforms a line of six points to its four pixels.
#[inline(always)]
fn tile_line(m: [f32; PATCH]) -> [f32; TILE] {
    let (sum, difference, sum_2, difference_2) = (m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]);
    [m[0] + sum + sum_2, difference + 2.0 * difference_2, sum + 4.0 * sum_2, difference + 8.0 * difference_2 + m[5]]
}

/// Applies `line` in each of [`LANES`] channels. The compiler vectorises over them. Here and in the transforms arrays
/// are filled by loops rather than by closures, whose calls may end up outside the code for the processor's vectors.
#[inline(always)]
fn lanes<const N: usize, const M: usize>(
    from: &[[f32; LANES]; N],
    line: impl Fn([f32; N]) -> [f32; M],
) -> [[f32; LANES]; M] {
    let mut to = [[0.0; LANES]; M];
    for lane in 0..LANES {
        let mut numbers = [0.0; N];
        for i in 0..N {
            numbers[i] = from[i][lane];
        }
        let numbers = line(numbers);
        for i in 0..M {
            to[i][lane] = numbers[i];
        }
    }
    to
}

/// The [`LANES`] elements of a slice from `start` on.
#[inline(always)]
fn some(numbers: &[f32], start: usize) -> [f32; LANES] {
    numbers[start..][..LANES].try_into().expect("as many")
}

/// Rows and columns exchanged.
#[inline(always)]
fn transposed<const N: usize, const M: usize>(from: &[[[f32; LANES]; M]; N]) -> [[[f32; LANES]; N]; M] {
    let mut to = [[[0.0; LANES]; N]; M];
    for x in 0..N {
        for y in 0..M {
            to[y][x] = from[x][y];
        }
    }
    to
}

dispatch! {
    /// Transforms the channels of a patch's pixels to those of its points.
    fn transform_patch(pixels: &[&[f32]; POINTS], points: &mut [&mut [f32]; POINTS]) {
        for c in (0..pixels[0].len()).step_by(LANES) {
            // Indexed by column, then row.
            let mut down = [[[0.0; LANES]; PATCH]; PATCH];
            for x in 0..PATCH {
                for y in 0..PATCH {
                    down[x][y] = some(pixels[y * PATCH + x], c);
                }
                down[x] = lanes(&down[x], patch_line);
            }
            for (points, row) in points.chunks_exact_mut(PATCH).zip(&transposed(&down)) {
                for (point, numbers) in points.iter_mut().zip(lanes(row, patch_line)) {
                    point[c..][..LANES].copy_from_slice(&numbers);
                }
            }
        }
    }
}

dispatch! {
    /// Transforms lines of the nine taps of a panel to a row of points, `[column][k][PANEL]`.
    fn transform_kernels(taps: &[&[f32]; 9], row: usize, points: &mut [f32]) {
        let column = points.len() / PATCH;
        let [top, middle, bottom] = KERNEL[row];
        for i in (0..column).step_by(LANES) {
            let mut line = [[0.0; LANES]; 3];
            for (x, line) in line.iter_mut().enumerate() {
                let (first, second, third) = (some(taps[x], i), some(taps[3 + x], i), some(taps[6 + x], i));
                for l in 0..LANES {
                    line[l] = top * first[l] + middle * second[l] + bottom * third[l];
                }
            }
            for (x, numbers) in lanes(&line, kernel_line).iter().enumerate() {
                points[x * column + i..][..LANES].copy_from_slice(numbers);
            }
        }
    }
}

dispatch! {
    /// Transforms a tile's sums, in which points are `pitch` elements apart, to its pixels.
    fn transform_sums(sums: &[f32], pitch: usize, pixels: &mut [[[f32; PANEL]; TILE]; TILE]) {
        for c in (0..PANEL).step_by(LANES) {
            // Indexed by column, then row.
            let mut down = [[[0.0; LANES]; TILE]; PATCH];
            for (x, down) in down.iter_mut().enumerate() {
                let mut column = [[0.0; LANES]; PATCH];
                for (y, points) in column.iter_mut().enumerate() {
                    *points = some(sums, (y * PATCH + x) * pitch + c);
                }
                *down = lanes(&column, tile_line);
            }
            for (pixels, row) in pixels.iter_mut().zip(&transposed(&down)) {
                for (pixel, numbers) in pixels.iter_mut().zip(lanes(row, tile_line)) {
                    pixel[c..][..LANES].copy_from_slice(&numbers);
                }
            }
        }
    }
}
