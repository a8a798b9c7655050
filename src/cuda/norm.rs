//! Launches of `kernels/norm.cu`.

use super::device::Launch;
use super::site::Site;
use crate::graph::{Graph, GroupNorm, Shape, TensorId, WeightId};
use bytemuck::NoUninit;

/// Threads of a group norm's block.
const THREADS: usize = 256;
/// Channels of a vector load.
const VECTOR: usize = 8;
/// Bytes of two statistics.
const PAIR: usize = 2 * size_of::<f32>();

crate::params! {
    pub(super) struct GroupNormParams {
        x: u64,
        skip: u64,
        scale_shift: u64,
        weight: u64,
        bias: u64,
        out: u64,
        partials: u64,
        scale_shift_width: i64,
        x_channels: i32,
        channels: i32,
        per_group: i32,
        slab: i32,
        pixels: i32,
        stretch: i32,
        eps: f32,
        silu: i32,
    }
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
        // A slab fills sectors of 32 bytes and has at least 128 bytes of a pixel. A stretch gives every thread eight
        // vectors, two rounds of loads, which is 20 blocks for the smallest image that is cut at all and hundreds for most;
        // and there are no more than 256, all of which every block of the second kernel reads.
        const SECTOR: usize = 16;
        const SLAB: usize = 64;
        const STRETCH: usize = 8 * THREADS;
        const UNCUT: usize = 4 * STRETCH;
        const STRETCHES: usize = 256;
        let channels: usize = sources.iter().sum();
        let width = if sources.iter().all(|c| c.is_multiple_of(VECTOR)) { VECTOR } else { 1 };
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

/// Two numbers of each group in each stretch, unless the image is one: mean and squared deviations; for a gradient as many
/// bytes again for its sums.
pub(super) fn workspace(graph: &Graph, norm: &GroupNorm) -> usize {
    match Cut::of(norm, |t| graph.shape(t)).stretches {
        1 => 0,
        stretches => graph.shape(norm.sources.x).n * norm.groups * stretches * PAIR,
    }
}

/// What the norm's kernels and its gradient's read, and how it is cut.
fn group_norm_params(norm: &GroupNorm, out: TensorId, site: &Site) -> (GroupNormParams, Cut) {
    let x = site.shape(norm.sources.x);
    let shape = Shape { c: norm.sources.iter().map(|t| site.shape(t).c).sum(), ..x };
    let cut = Cut::of(norm, |t| site.shape(t));
    let per_group = shape.c / norm.groups;
    let params = GroupNormParams {
        x: site.address(norm.sources.x),
        skip: site.optional(norm.sources.skip),
        scale_shift: norm.scale_shift.map_or(0, |view| site.view(view)),
        weight: site.weight(norm.weight),
        bias: site.weight(norm.bias),
        out: site.address(out),
        partials: site.workspace(),
        scale_shift_width: norm.scale_shift.map_or(0, |view| site.shape(view.tensor).c as i64),
        x_channels: x.c as i32,
        channels: shape.c as i32,
        per_group: per_group as i32,
        slab: cut.slab as i32,
        pixels: shape.tokens() as i32,
        stretch: cut.stretch as i32,
        eps: norm.eps,
        silu: norm.silu as i32,
    };
    (params, cut)
}

impl Cut {
    fn launch(&self, kernels: [&'static str; 2], images: usize, shared: usize, params: &impl NoUninit) -> Launch {
        let kernel = kernels[usize::from(self.width != VECTOR)];
        Launch::new(kernel, [self.stretches, self.slabs, images], THREADS, shared, params)
    }

    /// Bytes of shared memory: a pair of numbers for each group of a slab, and one for each channel of a slab in each
    /// lane. A block has as many lanes as a slab's columns fit into its threads. The last slab may be narrower and have
    /// more lanes, and with them more channels in all than a full slab; but never more than all threads hold, unless it
    /// has one lane.
    fn shared(&self, per_group: usize) -> (usize, usize) {
        (self.slab / per_group * PAIR, (THREADS * self.width).max(self.slab) * PAIR)
    }
}

pub(super) fn group_norm(norm: &GroupNorm, out: TensorId, site: &Site, launches: &mut Vec<Launch>) {
    let images = site.shape(out).n;
    let (params, cut) = group_norm_params(norm, out, site);
    let per_group = params.per_group as usize;
    let (groups, sums) = cut.shared(per_group);
    if cut.stretches == 1 {
        launches.push(cut.launch(["group_norm_8", "group_norm_1"], images, groups + sums, &params));
    } else {
        let statistics = ["group_norm_statistics_8", "group_norm_statistics_1"];
        launches.push(cut.launch(statistics, images, sums, &params));
        launches.push(cut.launch(["group_norm_apply_8", "group_norm_apply_1"], images, groups, &params));
    }
}

crate::params! {
    pub(super) struct GroupNormGradientParams {
        norm: GroupNormParams,
        d: u64,
        sums: u64,
    }
}

pub(super) fn group_norm_gradient(
    norm: &GroupNorm,
    d: TensorId,
    out: TensorId,
    site: &Site,
    launches: &mut Vec<Launch>,
) {
    let images = site.shape(out).n;
    let (params, cut) = group_norm_params(norm, out, site);
    let per_group = params.per_group as usize;
    let (groups, sums) = cut.shared(per_group);
    let statistics = workspace(site.graph(), norm) as u64;
    let gradient = GroupNormGradientParams { norm: params, d: site.address(d), sums: site.workspace() + statistics };
    let shared = 2 * groups + sums;
    if cut.stretches == 1 {
        let whole = ["group_norm_gradient_8", "group_norm_gradient_1"];
        launches.push(cut.launch(whole, images, shared, &gradient));
    } else {
        let statistics = ["group_norm_statistics_8", "group_norm_statistics_1"];
        launches.push(cut.launch(statistics, images, sums, &params));
        let sums = ["group_norm_gradient_sums_8", "group_norm_gradient_sums_1"];
        launches.push(cut.launch(sums, images, shared, &gradient));
        let apply = ["group_norm_gradient_apply_8", "group_norm_gradient_apply_1"];
        launches.push(cut.launch(apply, images, 2 * groups, &gradient));
    }
}

crate::params! {
    pub(super) struct LayerNormParams {
        x: u64,
        d: u64,
        weight: u64,
        bias: u64,
        out: u64,
        rows: i64,
        channels: i32,
        warps: i32,
        eps: f32,
        padding: i32,
    }
}

pub(super) fn layer_norm(
    x: TensorId,
    (weight, bias): (WeightId, WeightId),
    eps: f32,
    out: TensorId,
    site: &Site,
) -> Launch {
    let addresses = [site.address(x), 0, site.weight(weight), site.weight(bias)];
    row_launch(addresses, eps, out, ["layer_norm_8", "layer_norm_1"], site)
}

pub(super) fn layer_norm_gradient(
    x: TensorId,
    weight: WeightId,
    eps: f32,
    d: TensorId,
    out: TensorId,
    site: &Site,
) -> Launch {
    let addresses = [site.address(x), site.address(d), site.weight(weight), 0];
    row_launch(addresses, eps, out, ["layer_norm_gradient_8", "layer_norm_gradient_1"], site)
}

/// The vector or the element kernel with what `[x, d, weight, bias]` point at.
fn row_launch(
    [x, d, weight, bias]: [u64; 4],
    eps: f32,
    out: TensorId,
    [vector, element]: [&'static str; 2],
    site: &Site,
) -> Launch {
    /// Columns that a thread keeps, and rows of a block of several.
    const SLOTS: usize = 5;
    const ROWS: usize = 4;
    let shape = site.shape(out);
    let (kernel, columns) =
        if shape.c.is_multiple_of(VECTOR) { (vector, shape.c / VECTOR) } else { (element, shape.c) };
    let warps = columns.div_ceil(32 * SLOTS);
    let rows = if warps == 1 { ROWS } else { 1 };
    let params = LayerNormParams {
        x,
        d,
        weight,
        bias,
        out: site.address(out),
        rows: shape.rows() as i64,
        channels: shape.c as i32,
        warps: warps as i32,
        eps,
        padding: 0,
    };
    let shared = if warps == 1 { 0 } else { warps * size_of::<f32>() };
    Launch::new(kernel, [shape.rows().div_ceil(rows), 1, 1], 32 * warps * rows, shared, &params)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No slab of any norm stores more pairs than its launch has memory for, by the kernel's own count of lanes.
    #[test]
    fn shared_memory_holds_every_slab() {
        for groups in 1..=64 {
            for per_group in 1..=160 {
                let channels = groups * per_group;
                let cut = Cut::new(&[channels], per_group, 4096);
                for slab in 0..cut.slabs {
                    let channels = cut.slab.min(channels - slab * cut.slab);
                    let lanes = (THREADS / (channels / cut.width)).max(1);
                    let (_, sums) = cut.shared(per_group);
                    assert!(lanes * channels * PAIR <= sums, "{groups} groups of {per_group}: slab {slab} of {cut:?}");
                }
            }
        }
    }

    /// Every group norm of SD 1.5 and SDXL at their sizes: whole groups and sectors, everything covered, blocks enough
    /// for a GPU where an image is cut, and stretches few enough for every block to read them.
    #[test]
    fn cuts_of_real_layers() {
        let unet = [320, 640, 960, 1280, 1920, 2560].map(|c| (c, [8, 16, 32, 64, 128]));
        let vae = [128, 256, 512].map(|c| (c, [64, 128, 256, 512, 1024]));
        for (channels, sides) in unet.into_iter().chain(vae) {
            for side in sides {
                let (per_group, pixels) = (channels / 32, side * side);
                let cut = Cut::new(&[channels], per_group, pixels);
                let label = format!("{side}x{side}x{channels}: {cut:?}");
                assert!(
                    cut.width == VECTOR && cut.slab.is_multiple_of(per_group) && cut.slab.is_multiple_of(16),
                    "{label}"
                );
                assert!(cut.slab >= 64 && cut.slabs * cut.slab >= channels, "{label}");
                assert!((cut.slabs - 1) * cut.slab < channels && (cut.stretches - 1) * cut.stretch < pixels, "{label}");
                assert!(cut.stretches * cut.stretch >= pixels && cut.stretches <= 256, "{label}");
                assert!(cut.stretches == 1 || cut.stretches * cut.slabs >= 20, "{label}");
            }
        }
    }
}
