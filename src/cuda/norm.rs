//! Launches of `kernels/norm.cu`.

use super::device::Launch;
use super::program::Site;
use crate::graph::{Graph, GroupNorm, Shape, TensorId, WeightId};
use bytemuck::NoUninit;

/// Threads of a group norm's block.
const THREADS: usize = 256;
/// Channels of a vector load.
const VECTOR: usize = 8;

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct GroupNormParams {
    x: u64,
    skip: u64,
    scale_shift: u64,
    weight: u64,
    bias: u64,
    out: u64,
    partials: u64,
    x_channels: i32,
    channels: i32,
    per_group: i32,
    slab: i32,
    pixels: i32,
    stretch: i32,
    eps: f32,
    silu: i32,
}

/// How one image's group norm is cut into blocks. The image's shape alone decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    /// Channels of a thread.
    width: usize,
    /// Channels of a block: whole groups.
    slab: usize,
    /// Pixels of a block.
    stretch: usize,
    slabs: usize,
    stretches: usize,
}

impl Cut {
    /// For channels of the sources, in order.
    fn new(sources: &[usize], per_group: usize, pixels: usize) -> Self {
        // A slab fills sectors of 32 bytes and has at least 128 bytes of a pixel. A stretch keeps every thread busy with
        // eight vectors, which makes enough blocks for a GPU from the smallest image that is cut at all; and there are
        // no more than 256, all of which every block of the second kernel reads.
        const SECTOR: usize = 16;
        const SLAB: usize = 64;
        const STRETCH: usize = 8 * THREADS;
        const UNCUT: usize = 3 * STRETCH;
        const STRETCHES: usize = 256;
        let channels: usize = sources.iter().sum();
        let width = if sources.iter().all(|c| c % VECTOR == 0) { VECTOR } else { 1 };
        let unit = per_group / gcd(per_group, SECTOR) * SECTOR;
        let slab = (unit * SLAB.div_ceil(unit)).min(channels);
        let columns = pixels * (slab / width);
        let wanted = if columns <= UNCUT { 1 } else { (columns / STRETCH).min(STRETCHES) };
        let stretch = pixels.div_ceil(wanted);
        Cut { width, slab, stretch, slabs: channels.div_ceil(slab), stretches: pixels.div_ceil(stretch) }
    }

    fn of(norm: &GroupNorm, shape: impl Fn(TensorId) -> Shape) -> Self {
        let sources: Vec<usize> = norm.sources.iter().map(|t| shape(t).c).collect();
        let per_group = sources.iter().sum::<usize>() / norm.groups;
        Cut::new(&sources, per_group, shape(norm.sources.x).tokens())
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Mean and squared deviations of each group in each stretch, unless the image is one.
pub(super) fn workspace(graph: &Graph, norm: &GroupNorm) -> usize {
    match Cut::of(norm, |t| graph.shape(t)).stretches {
        1 => 0,
        stretches => graph.shape(norm.sources.x).n * norm.groups * stretches * 2 * size_of::<f32>(),
    }
}

pub(super) fn group_norm(norm: &GroupNorm, out: TensorId, site: &Site, launches: &mut Vec<Launch>) {
    let shape = site.shape(out);
    let cut = Cut::of(norm, |t| site.shape(t));
    let per_group = shape.c / norm.groups;
    let params = GroupNormParams {
        x: site.address(norm.sources.x),
        skip: site.optional(norm.sources.skip),
        scale_shift: site.optional(norm.scale_shift),
        weight: site.weight(norm.weight),
        bias: site.weight(norm.bias),
        out: site.address(out),
        partials: site.workspace(),
        x_channels: site.shape(norm.sources.x).c as i32,
        channels: shape.c as i32,
        per_group: per_group as i32,
        slab: cut.slab as i32,
        pixels: shape.tokens() as i32,
        stretch: cut.stretch as i32,
        eps: norm.eps,
        silu: norm.silu as i32,
    };
    let pair = 2 * size_of::<f32>();
    let groups = cut.slab / per_group * pair;
    let sums = (THREADS / (cut.slab / cut.width)).max(1) * cut.slab * pair;
    let mut launch = |vector, element, shared| {
        let kernel = if cut.width == VECTOR { vector } else { element };
        launches.push(Launch::new(kernel, [cut.stretches, cut.slabs, shape.n], THREADS, shared, &params));
    };
    if cut.stretches == 1 {
        launch("group_norm_8", "group_norm_1", groups + sums);
    } else {
        launch("group_norm_statistics_8", "group_norm_statistics_1", sums);
        launch("group_norm_apply_8", "group_norm_apply_1", groups);
    }
}

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct LayerNormParams {
    x: u64,
    weight: u64,
    bias: u64,
    out: u64,
    rows: i64,
    channels: i32,
    warps: i32,
    eps: f32,
    unused: i32,
}

pub(super) fn layer_norm(
    x: TensorId,
    (weight, bias): (WeightId, WeightId),
    eps: f32,
    out: TensorId,
    site: &Site,
) -> Launch {
    /// Columns that a thread keeps, and rows of a block of several.
    const SLOTS: usize = 5;
    const ROWS: usize = 4;
    let shape = site.shape(out);
    let (kernel, columns) =
        if shape.c % VECTOR == 0 { ("layer_norm_8", shape.c / VECTOR) } else { ("layer_norm_1", shape.c) };
    let warps = columns.div_ceil(32 * SLOTS);
    let rows = if warps == 1 { ROWS } else { 1 };
    let params = LayerNormParams {
        x: site.address(x),
        weight: site.weight(weight),
        bias: site.weight(bias),
        out: site.address(out),
        rows: shape.rows() as i64,
        channels: shape.c as i32,
        warps: warps as i32,
        eps,
        unused: 0,
    };
    let shared = if warps == 1 { 0 } else { warps * size_of::<f32>() };
    Launch::new(kernel, [shape.rows().div_ceil(rows), 1, 1], 32 * warps * rows, shared, &params)
}
