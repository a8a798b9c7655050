//! Launches of `kernels/group_norm.cu`.

use super::conv;
use super::cut::{Cut, PAIR, THREADS, VECTOR};
use super::device::Launch;
use super::moments::{Moments, PIXELS};
use super::site::Site;
use crate::graph::{Graph, GroupNorm, Shape, TensorId};
use bytemuck::NoUninit;

/// The most units of an image's pixels that every block of the last kernel reads. More than that are first merged into
/// at most [`MERGED`] parts of the image.
const READ_UNITS: usize = 256;
const MERGED: usize = 64;

/// The kernels that compute the moments of stretches, for vectors and for single channels.
const STATISTICS: [&str; 2] = ["group_norm_statistics_8", "group_norm_statistics_1"];

crate::params! {
    pub(super) struct GroupNormParams {
        x: u64,
        skip: u64,
        scale_shift: u64,
        weight: u64,
        bias: u64,
        out: u64,
        partials: u64,
        moments: [u64; 2],
        scale_shift_width: i64,
        x_channels: i32,
        channels: i32,
        per_group: i32,
        slab: i32,
        pixels: i32,
        stretch: i32,
        eps: f32,
        silu: i32,
        first_moments: i32,
        unit_channels: [i32; 2],
        unit_pixels: i32,
        pixel_units: i32,
        padding: i32,
    }
}

/// Bytes of a pair of numbers for each group in each stretch, unless the image is a single stretch: mean and squared
/// deviations. A gradient needs the same again for its sums.
pub(super) fn workspace(graph: &Graph, norm: &GroupNorm) -> usize {
    match Cut::of(norm, |t| graph.shape(t)).stretches {
        1 => 0,
        stretches => graph.shape(norm.sources.x).n * norm.groups * stretches * PAIR,
    }
}

/// The launches that compute the moments of the norm's groups, the parameters of its other kernels and of its
/// gradient's, and its division into blocks. A single stretch needs no such launches and its kernels no moments, but
/// the products may have left them.
fn group_norm_params(norm: &GroupNorm, out: TensorId, site: &Site) -> (Vec<Launch>, GroupNormParams, Cut) {
    let x = site.shape(norm.sources.x);
    let shape = Shape { c: norm.sources.iter().map(|t| site.shape(t).c).sum(), ..x };
    let cut = Cut::of(norm, |t| site.shape(t));
    let per_group = shape.c / norm.groups;
    // As the statistics kernel writes them: a unit is a group's channels in a stretch.
    let mut params = GroupNormParams {
        x: site.address(norm.sources.x),
        skip: site.optional(norm.sources.skip),
        scale_shift: norm.scale_shift.map_or(0, |view| site.view(view)),
        weight: site.weight(norm.weight),
        bias: site.weight(norm.bias),
        out: site.address(out),
        partials: site.workspace(),
        moments: [site.workspace(), 0],
        scale_shift_width: norm.scale_shift.map_or(0, |view| site.shape(view.tensor).c as i64),
        x_channels: x.c as i32,
        channels: shape.c as i32,
        per_group: per_group as i32,
        slab: cut.slab as i32,
        pixels: shape.tokens() as i32,
        stretch: cut.stretch as i32,
        eps: norm.eps,
        silu: norm.silu as i32,
        first_moments: shape.c as i32,
        unit_channels: [per_group as i32, 1],
        unit_pixels: cut.stretch as i32,
        pixel_units: cut.stretches as i32,
        padding: 0,
    };
    if let Some(given) = norm.moments {
        params.moments[0] = site.address(given);
        params.unit_pixels = params.pixels;
        params.pixel_units = 1;
        return (Vec::new(), params, cut);
    }
    let Some(left) = moments_left(norm, site) else {
        let statistics = || cut.launch(STATISTICS, x.n, cut.shared(per_group).1, &params);
        return ((cut.stretches > 1).then(statistics).into_iter().collect(), params, cut);
    };
    let pixel_units = left[0].pixel_units(x);
    let units = GroupNormParams {
        moments: [Some(norm.sources.x), norm.sources.skip].map(|id| id.map_or(0, |id| site.moments(id))),
        first_moments: x.c as i32,
        unit_channels: [left[0].channels as i32, left.last().map_or(1, |last| last.channels as i32)],
        unit_pixels: PIXELS as i32,
        pixel_units: pixel_units as i32,
        ..params
    };
    if pixel_units <= READ_UNITS {
        return (Vec::new(), units, cut);
    }
    let each = pixel_units.div_ceil(MERGED.min(cut.stretches));
    let parts = pixel_units.div_ceil(each);
    params.unit_pixels = (each * PIXELS) as i32;
    params.pixel_units = parts as i32;
    let grid = [parts, norm.groups.div_ceil(THREADS / 32), x.n];
    (vec![Launch::new("group_norm_merge", grid, THREADS, 0, &units)], params, cut)
}

/// The moments that the products which computed the sources left, if all of them did.
fn moments_left(norm: &GroupNorm, site: &Site) -> Option<Vec<Moments>> {
    norm.sources.iter().map(|id| conv::moments(site.graph(), id, site.limits)).collect()
}

impl Cut {
    fn launch(&self, kernels: [&'static str; 2], images: usize, shared: usize, params: &impl NoUninit) -> Launch {
        let kernel = kernels[usize::from(self.width != VECTOR)];
        Launch::new(kernel, [self.stretches, self.slabs, images], THREADS, shared, params)
    }
}

/// The moments of each row of pixels: the statistics of stretches that are rows.
pub(super) fn row_moments(norm: &GroupNorm, out: TensorId, site: &Site) -> Launch {
    let Shape { n, h, w, .. } = site.shape(norm.sources.x);
    let (_, params, cut) = group_norm_params(&GroupNorm { moments: Some(out), ..*norm }, out, site);
    let params = GroupNormParams { partials: site.address(out), stretch: w as i32, ..params };
    let cut = Cut { stretch: w, stretches: h, ..cut };
    cut.launch(STATISTICS, n, cut.shared(params.per_group as usize).1, &params)
}

pub(super) fn group_norm(norm: &GroupNorm, out: TensorId, site: &Site, launches: &mut Vec<Launch>) {
    let images = site.shape(out).n;
    let (moments, mut params, mut cut) = group_norm_params(norm, out, site);
    let (groups, sums) = cut.shared(params.per_group as usize);
    launches.extend(moments);
    if cut.stretches == 1 {
        if norm.moments.is_none() && moments_left(norm, site).is_none() {
            launches.push(cut.launch(["group_norm_8", "group_norm_1"], images, groups + sums, &params));
            return;
        }
        // Only the last kernel remains, whose results no division changes: more blocks fill more multiprocessors.
        cut = cut.finer(params.pixels as usize);
        params.stretch = cut.stretch as i32;
    }
    launches.push(cut.launch(["group_norm_apply_8", "group_norm_apply_1"], images, groups, &params));
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
    let (moments, params, cut) = group_norm_params(norm, out, site);
    let (groups, sums) = cut.shared(params.per_group as usize);
    launches.extend(moments);
    let statistics = workspace(site.graph(), norm) as u64;
    let gradient = GroupNormGradientParams { norm: params, d: site.address(d), sums: site.workspace() + statistics };
    let shared = 2 * groups + sums;
    if cut.stretches == 1 {
        let whole = ["group_norm_gradient_8", "group_norm_gradient_1"];
        launches.push(cut.launch(whole, images, shared, &gradient));
    } else {
        let sums = ["group_norm_gradient_sums_8", "group_norm_gradient_sums_1"];
        launches.push(cut.launch(sums, images, shared, &gradient));
        let apply = ["group_norm_gradient_apply_8", "group_norm_gradient_apply_1"];
        launches.push(cut.launch(apply, images, 2 * groups, &gradient));
    }
}
