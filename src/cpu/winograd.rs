//! 3x3 convolutions of stride 1 with a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3) as
//! Lavin and Gray give it (arXiv 1509.09308, section 4.3), with their points 0, 1, -1, 2, -2 and infinity.
//!
//! Each 4x4 tile of the output comes from a 6x6 patch of the input. A transform along rows and columns makes of a
//! patch's 36 pixels 36 other numbers a channel, its *points*, and of a kernel's 9 taps 36 too; at each point tiles
//! and kernels are then two matrices, whose product the matrix kernel makes, and a third transform leads back from 36
//! sums to 16 pixels. That is 36 multiply-adds for 16 pixels where the direct way takes 144.
//!
//! Where the source is doubled first, every pixel of a patch but the outermost has an equal beside it, so that the
//! point -1 is zero along rows and columns: 25 products are left.
//!
//! The weights stay what they are, nine taps in panels: a task transforms [`depth`] lines of [`GROUP`] panels at a
//! time, which was 5 to 10 % of its time at 96 tiles. So no weight is held a second time nor four times as large, and
//! one packed form serves both ways. The patches' points, up to [`POINTS_BYTES`] of them, are written once for all
//! threads and read once a group of panels. The transforms are of one tile each, and each sum is one chain in the order
//! of k: results depend neither on the batch nor on the threads.
//!
//! Rounding: 3.5e-6 of a layer's L2 norm with 320 inputs, where the direct chain has 1e-6.

use super::conv::{Epilogue, Task};
use super::gemm::{Left, PANEL, ROWS, multiply};
use super::simd::{Isa, dispatch, isa};
use super::{SharedOutput, with_scratch};
use crate::graph::{Conv, Shape, TensorId};
use rayon::prelude::*;

/// Rows and columns of a tile of outputs, and of the patch of inputs under it.
const TILE: usize = 4;
const PATCH: usize = TILE + 2;
/// Points of a patch, a kernel and a tile.
const POINTS: usize = PATCH * PATCH;
/// Where the point -1 stands in each direction.
const MINUS_ONE: usize = 2;
/// Channels that are transformed together: a cache line of them.
const LANES: usize = 16;
/// Most lines of weights that are transformed at a time.
const MOST_DEPTH: usize = 128;
/// Panels of a task: patches' points are read from the first cache for the second one.
const GROUP: usize = 2;
/// Most tiles of a task, whose sums are then 0.9 MB.
const TASK_TILES: usize = 8 * ROWS;
/// Memory for patches' points, roughly: half of the third cache that two threads may hope for.
const POINTS_BYTES: usize = 16 << 20;

/// Lines of weights that are transformed at a time: at a row of points those of 64 are 96 KiB a group, at one point 16.
/// Twice as many are 8 % faster where the second cache has room for them, as with AVX-512, of 1 MiB or more.
fn depth() -> usize {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => MOST_DEPTH,
        _ => 64,
    }
}

/// Whether a convolution is made here: measured with AVX2, 2.4 times as fast as the direct way at 16x16 pixels and
/// more, 1.5 times at two images of 8x8; below that, tiles are too few for the kernels' transforms.
///
/// One image's shape decides, never the batch: the two ways round differently.
pub(super) fn pays(shape: impl Fn(TensorId) -> Shape, conv: &Conv, output: Shape) -> bool {
    conv.kernel == 3
        && conv.stride == 1
        && conv.sources.iter().all(|t| shape(t).c.is_multiple_of(LANES))
        && output.h.div_ceil(TILE) * output.w.div_ceil(TILE) >= 4
}

/// Numbers of scratch memory: the points of a block of patches.
pub(super) fn workspace(shape: impl Fn(TensorId) -> Shape, conv: &Conv, output: Shape) -> usize {
    if !pays(&shape, conv, output) {
        return 0;
    }
    let channels = conv.sources.iter().map(|t| shape(t).c).sum();
    POINTS * channels * block(channels, Tiles::of(output).count())
}

/// Tiles whose patches are transformed together: a multiple of [`ROWS`].
fn block(channels: usize, tiles: usize) -> usize {
    (POINTS_BYTES / (POINTS * channels * size_of::<f32>())).clamp(1, tiles).next_multiple_of(ROWS)
}

/// Tiles of all images, none of which holds pixels of two.
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

/// Channels of a source that are transformed together.
struct Chunk<'a> {
    data: &'a [f32],
    /// Channels of the source, and the first of these.
    channels: usize,
    channel: usize,
    /// Their first line among the weights' of a tap.
    k: usize,
    len: usize,
}

fn chunks<'a>(task: &'a Task) -> impl Iterator<Item = Chunk<'a>> {
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

/// Where the points of a block of so many tiles stand: those of a chunk as `[point][tile][channel]`, one chunk after
/// the other.
#[derive(Clone, Copy)]
struct Layout(usize);

impl Layout {
    fn at(self, chunk: &Chunk, point: usize, tile: usize) -> usize {
        POINTS * self.0 * chunk.k + (point * self.0 + tile) * chunk.len
    }
}

/// Runs a convolution for which it [`pays`], with a workspace of its size.
pub(super) fn run(task: &Task, workspace: &mut [f32], out: &SharedOutput) {
    let tiles = Tiles::of(task.output);
    let groups = task.columns.div_ceil(PANEL).div_ceil(GROUP);
    let block = block(task.depth / 9, tiles.count());
    for first in (0..tiles.count()).step_by(block) {
        let count = block.min(tiles.count() - first);
        // Whole rows of the matrix kernel: what it makes of those without a tile nobody reads.
        let layout = Layout(count.next_multiple_of(ROWS));
        let points = SharedOutput::new(workspace);
        (0..count)
            .into_par_iter()
            .with_min_len(4)
            .for_each(|i| patch(task, tiles.place(first + i), i, layout, &points));
        let points = &*workspace;
        // Enough tasks that the threads end together, of as many tiles as the kernels' transforms are worth.
        let wanted = (4 * rayon::current_num_threads()).div_ceil(groups);
        let each = count.div_ceil(wanted).next_multiple_of(ROWS).min(TASK_TILES);
        let parts = count.div_ceil(each);
        // Parts vary fastest: neighbours in time share the weights.
        (0..groups * parts).into_par_iter().with_max_len(1).for_each(|i| {
            let start = i % parts * each;
            product(task, i / parts, start..(start + each).min(count), (tiles, first), (layout, points), out);
        });
    }
}

/// Transforms the patch under a tile, the block's `i`th.
fn patch(task: &Task, (image, y, x): (usize, usize, usize), i: usize, layout: Layout, points: &SharedOutput) {
    let pixels: [_; POINTS] = std::array::from_fn(|p| task.pixel(image, y + p / PATCH, x + p % PATCH));
    for chunk in chunks(task) {
        let at = |pixel: usize| &chunk.data[pixel * chunk.channels + chunk.channel..][..chunk.len];
        let pixels = pixels.map(|pixel| pixel.map_or(&[0.0; MOST_DEPTH][..chunk.len], at));
        // SAFETY: this tile's numbers of this chunk are nobody else's.
        let out = |point| unsafe { points.at(layout.at(&chunk, point, i), chunk.len) };
        transform_patch(&pixels, &mut std::array::from_fn(out));
    }
}

/// Some tiles of a block at the columns of a group of panels: products at every point, and the tiles made of them.
fn product(
    task: &Task,
    group: usize,
    range: std::ops::Range<usize>,
    (tiles, first): (Tiles, usize),
    (layout, points): (Layout, &[f32]),
    out: &SharedOutput,
) {
    let panels = group * GROUP..((group + 1) * GROUP).min(task.columns.div_ceil(PANEL));
    // Sums of a point begin a row further apart than they are long: a power of two would put all of a tile's into few
    // sets of the cache.
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

/// The points of a line of six pixels.
#[inline(always)]
fn patch_line(d: [f32; PATCH]) -> [f32; PATCH] {
    let (even, odd) = (d[4] - 4.0 * d[2], d[3] - 4.0 * d[1]);
    let (even_2, odd_2) = (d[4] - d[2], 2.0 * (d[3] - d[1]));
    let ends = [4.0 * d[0] - 5.0 * d[2] + d[4], 4.0 * d[1] - 5.0 * d[3] + d[5]];
    [ends[0], even + odd, even - odd, even_2 + odd_2, even_2 - odd_2, ends[1]]
}

/// What the three taps of a line count at each point.
const KERNEL: [[f32; 3]; PATCH] = [
    [1.0 / 4.0, 0.0, 0.0],
    [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0],
    [-1.0 / 6.0, 1.0 / 6.0, -1.0 / 6.0],
    [1.0 / 24.0, 1.0 / 12.0, 1.0 / 6.0],
    [1.0 / 24.0, -1.0 / 12.0, 1.0 / 6.0],
    [0.0, 0.0, 1.0],
];

/// The points of a line of three taps.
#[inline(always)]
fn kernel_line(g: [f32; 3]) -> [f32; PATCH] {
    let (even, odd) = (KERNEL[1][0] * (g[0] + g[2]), KERNEL[1][1] * g[1]);
    let (even_2, odd_2) = (KERNEL[3][0] * g[0] + KERNEL[3][2] * g[2], KERNEL[3][1] * g[1]);
    [KERNEL[0][0] * g[0], even + odd, even - odd, even_2 + odd_2, even_2 - odd_2, g[2]]
}

/// The four pixels of a line of six points.
#[inline(always)]
fn tile_line(m: [f32; PATCH]) -> [f32; TILE] {
    let (sum, difference, sum_2, difference_2) = (m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]);
    [m[0] + sum + sum_2, difference + 2.0 * difference_2, sum + 4.0 * sum_2, difference + 8.0 * difference_2 + m[5]]
}

/// Lines of [`LANES`] channels through `line`, as the compiler vectorises it.
#[inline(always)]
fn lanes<const N: usize, const M: usize>(
    from: [&[f32; LANES]; N],
    line: impl Fn([f32; N]) -> [f32; M],
) -> [[f32; LANES]; M] {
    let mut to = [[0.0; LANES]; M];
    for lane in 0..LANES {
        let numbers = line(std::array::from_fn(|i| from[i][lane]));
        (0..M).for_each(|i| to[i][lane] = numbers[i]);
    }
    to
}

/// [`LANES`] numbers of a slice.
#[inline(always)]
fn some(numbers: &[f32], start: usize) -> &[f32; LANES] {
    numbers[start..][..LANES].try_into().expect("as many")
}

dispatch! {
    /// Channels of a patch's pixels to those of its points.
    fn transform_patch(pixels: &[&[f32]; POINTS], points: &mut [&mut [f32]; POINTS]) {
        for c in (0..pixels[0].len()).step_by(LANES) {
            // By column, then row.
            let down: [[[f32; LANES]; PATCH]; PATCH] = std::array::from_fn(|x| {
                lanes(std::array::from_fn(|y| some(pixels[y * PATCH + x], c)), patch_line)
            });
            for (y, points) in points.chunks_exact_mut(PATCH).enumerate() {
                let across = lanes(std::array::from_fn(|x| &down[x][y]), patch_line);
                for (point, numbers) in points.iter_mut().zip(across) {
                    point[c..][..LANES].copy_from_slice(&numbers);
                }
            }
        }
    }
}

dispatch! {
    /// Lines of the nine taps of a panel to a row of points, `[column][k][PANEL]`.
    fn transform_kernels(taps: &[&[f32]; 9], row: usize, points: &mut [f32]) {
        let column = points.len() / PATCH;
        let [top, middle, bottom] = KERNEL[row];
        for i in (0..column).step_by(LANES) {
            let taps = taps.map(|tap| some(tap, i));
            let line: [[f32; LANES]; 3] = std::array::from_fn(|x| {
                std::array::from_fn(|l| top * taps[x][l] + middle * taps[3 + x][l] + bottom * taps[6 + x][l])
            });
            for (x, numbers) in lanes(line.each_ref(), kernel_line).iter().enumerate() {
                points[x * column + i..][..LANES].copy_from_slice(numbers);
            }
        }
    }
}

dispatch! {
    /// A tile's sums, those of a point `pitch` after the last one's, to its pixels.
    fn transform_sums(sums: &[f32], pitch: usize, pixels: &mut [[[f32; PANEL]; TILE]; TILE]) {
        for c in (0..PANEL).step_by(LANES) {
            // By column, then row.
            let down: [[[f32; LANES]; TILE]; PATCH] = std::array::from_fn(|x| {
                lanes(std::array::from_fn(|y| some(sums, (y * PATCH + x) * pitch + c)), tile_line)
            });
            for (y, pixels) in pixels.iter_mut().enumerate() {
                let across = lanes(std::array::from_fn(|x| &down[x][y]), tile_line);
                for (pixel, numbers) in pixels.iter_mut().zip(across) {
                    pixel[c..][..LANES].copy_from_slice(&numbers);
                }
            }
        }
    }
}
