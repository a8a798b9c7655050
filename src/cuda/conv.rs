//! Launches of `kernels/conv.cu`.

use super::conv_hopper;
use super::device::{Launch, Limits};
use super::epilogue::{Epilogue, is_shifted};
use super::folded;
use super::moments::{self, Moments};
use super::site::{COUNTERS, Site};
use super::tiles::{Choice, Instruction, Product, choose};
use super::weights::{CHUNK, has_phases};
use crate::graph::{Activation, Conv, Graph, Op, Shape, TensorId, WeightKind};
use crate::{Error, Result, Subject};

crate::params! {
    pub(super) struct ConvParams {
        sources: [u64; 2],
        weight: u64,
        after: Epilogue,
        partial: u64,
        counters: u64,
        resize_y: u64,
        resize_x: u64,
        source_channels: [i32; 2],
        depth: i32,
        height: i32,
        width: i32,
        seen_height: i32,
        seen_width: i32,
        out_height: i32,
        out_width: i32,
        kernel: i32,
        stride: i32,
        pad: i32,
        phases: i32,
        rows: i32,
        columns: i32,
        splits: i32,
        steps: i32,
        padding: i32,
    }
}

/// The product of all images, and the tile and split chosen for it.
pub(super) fn plan(graph: &Graph, conv: &Conv, out: TensorId, limits: Limits) -> (Product, Choice) {
    let shape = graph.shape(out);
    let channels: usize = conv.sources.iter().map(|id| graph.shape(id).c).sum();
    let (phases, taps) = if is_upsampled(graph, conv, out) { (4, 4) } else { (1, conv.kernel * conv.kernel) };
    let one = Product {
        phases,
        rows: shape.tokens() / phases,
        columns: match graph.weight(conv.weight).kind {
            WeightKind::Mirrored { wanted, .. } => wanted,
            _ => graph.weight(conv.weight).total_outputs(),
        },
        depth: taps * channels.next_multiple_of(CHUNK),
        added: 0,
        vector: conv.sources.iter().all(|id| graph.shape(id).c.is_multiple_of(CHUNK)),
        gated: conv.activation == Activation::Geglu,
        unit: moments::wanted(graph, out, limits).map_or(1, |moments| moments.channels),
        followed: !matches!(conv.activation, Activation::None | Activation::Geglu) || is_shifted(graph, out),
        normalised: folded::norm(graph, conv, limits).is_some() || folded::leaves_moments(graph, out, limits),
        area: conv_hopper::area(graph, conv, out).ok(),
    };
    let with_added = conv_hopper::added(graph, conv, out).and_then(|added| {
        let both = Product { added: added.sources.iter().map(|id| graph.shape(id).c).sum(), ..one };
        let choice = choose(both, shape.n, limits);
        (choice.tile.instruction == Instruction::Wgmma).then_some((both, choice))
    });
    let (one, choice) = with_added.unwrap_or_else(|| (one, choose(one, shape.n, limits)));
    (Product { rows: shape.n * one.rows, ..one }, choice)
}

/// True if another convolution computes the result `out` of this one as part of its own.
pub(super) fn is_added(graph: &Graph, out: TensorId, limits: Limits) -> bool {
    graph.readers(out).any(|node| match &node.op {
        Op::Conv(conv) if conv.residual == Some(out) => plan(graph, conv, node.output, limits).0.added > 0,
        _ => false,
    })
}

/// The activations that the kernel of a convolution reads.
pub(super) fn reads(graph: &Graph, conv: &Conv, out: TensorId, limits: Limits) -> Vec<TensorId> {
    let added = conv_hopper::added(graph, conv, out).filter(|_| plan(graph, conv, out, limits).0.added > 0);
    let per_image = conv.per_image.map(|view| view.tensor);
    let residual = conv.residual.filter(|_| added.is_none());
    let added = added.into_iter().flat_map(|added| added.sources.iter());
    let sources = match folded::norm(graph, conv, limits) {
        Some(norm) => norm.x.into(),
        None => conv.sources,
    };
    sources.iter().chain(per_image).chain(residual).chain(added).collect()
}

/// The moments that a convolution leaves behind its result `id` for the norms that read it. `None` if no norm wants
/// them, if no convolution computes `id`, if the rectangles of its kernel are not whole units, or if no layer norm is
/// computed by its readers.
pub(super) fn moments(graph: &Graph, id: TensorId, limits: Limits) -> Option<Moments> {
    let moments = moments::wanted(graph, id, limits)?;
    let node = graph.maker(id)?;
    let Op::Conv(conv) = &node.op else { return None };
    let (product, choice) = plan(graph, conv, id, limits);
    let area = product.area?;
    let suits = moments.pixels == 1 || area.is_whole_units();
    (suits && choice.tile.instruction == Instruction::Wgmma).then_some(moments)
}

/// The reason why a convolution gets none of the kernels of 9.0 on a card of 9.0; `None` if it gets one.
pub(super) fn reason(graph: &Graph, conv: &Conv, out: TensorId, limits: Limits) -> Option<&'static str> {
    match conv_hopper::area(graph, conv, out) {
        _ if limits.capability != 90 => None,
        _ if is_added(graph, out, limits) => Some("it is more depth of the convolution that adds it"),
        Err(reason) => Some(reason),
        Ok(_) if plan(graph, conv, out, limits).1.tile.instruction == Instruction::Wgmma => None,
        Ok(_) => Some("a tile of mma.sync should be faster"),
    }
}

/// Bytes of partial sums of a split depth.
pub(super) fn workspace(graph: &Graph, conv: &Conv, out: TensorId, limits: Limits) -> usize {
    if is_added(graph, out, limits) {
        return 0;
    }
    let (product, choice) = plan(graph, conv, out, limits);
    choice.tile.partial_bytes(&product, choice.splits)
}

/// True if the source of a 3x3 convolution is first upsampled by two. It is then computed as four 2x2 convolutions of
/// the source itself, 4/9 of the work: one for each parity of the result's row and column, which are the phases of the
/// product.
pub(super) fn is_upsampled(graph: &Graph, conv: &Conv, out: TensorId) -> bool {
    let (input, shape) = (graph.shape(conv.sources.x), graph.shape(out));
    let size = input.extent().doubled();
    let plain = has_phases(graph.weight(conv.weight)) && conv.stride == 1 && conv.pad == 1;
    plain && conv.resize == Some(size) && shape.extent() == size
}

/// The address of the weights of a product.
pub(super) fn weight_address(conv: &Conv, site: &Site, product: &Product) -> u64 {
    match product.phases {
        1 => site.weight(conv.weight),
        _ => site.behind(conv.weight),
    }
}

/// # Errors
/// [`crate::ErrorKind::Unsupported`] for more split sums than there are counters, or if TMA does not take the tensors.
pub(super) fn conv(conv: &Conv, out: TensorId, site: &Site) -> Result<Launch> {
    let (input, output) = (site.shape(conv.sources.x), site.shape(out));
    let (product, choice) = plan(site.graph(), conv, out, site.limits);
    let Choice { tile, splits, steps } = choice;
    let tiles = tile.count(&product);
    if splits > 1 && tiles > COUNTERS {
        let problem = format!("{tiles} tiles of split sums are more than {COUNTERS}");
        return Err(Error::unsupported(Subject::Device, problem).advise("make a smaller batch"));
    }
    if tile.instruction == Instruction::Wgmma {
        return conv_hopper::launch(conv, out, site, &product, choice);
    }
    // A pointwise product reads each pixel by itself, so every pixel is an image of its own: any number of tokens, and
    // no index arithmetic.
    let point = Shape::new(output.rows(), 1, 1, input.c);
    let upsampled = product.phases > 1;
    let (stored, made) = match () {
        () if conv.is_pointwise() => (point, point),
        () if upsampled => (input, input),
        () => (input, output),
    };
    let kernel = if upsampled { 2 } else { conv.kernel };
    let seen = conv.resize.filter(|_| !upsampled).unwrap_or(stored.extent());
    let ratio = |stored: usize, seen: usize| ((stored as u64) << 32).div_ceil(seen as u64);
    let params = ConvParams {
        sources: [site.address(conv.sources.x), site.optional(conv.sources.skip)],
        weight: weight_address(conv, site, &product),
        after: Epilogue::new(conv, out, site),
        partial: if splits > 1 { site.workspace() } else { 0 },
        counters: site.counters(),
        resize_y: ratio(stored.h, seen.h),
        resize_x: ratio(stored.w, seen.w),
        source_channels: [input.c as i32, conv.sources.skip.map_or(0, |id| site.shape(id).c as i32)],
        depth: (product.depth / (kernel * kernel)) as i32,
        height: stored.h as i32,
        width: stored.w as i32,
        seen_height: seen.h as i32,
        seen_width: seen.w as i32,
        out_height: made.h as i32,
        out_width: made.w as i32,
        kernel: kernel as i32,
        stride: conv.stride as i32,
        pad: conv.pad as i32,
        phases: product.phases as i32,
        rows: product.rows as i32,
        columns: product.columns as i32,
        splits: splits as i32,
        steps: steps as i32,
        padding: 0,
    };
    Ok(Launch::new(tile.kernel, [tiles, splits, 1], tile.threads(), tile.shared(), &params))
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use super::super::tiles::{STEP, TILES};
    use super::super::{Buffer, CudaDevice, Emulated};
    use super::*;
    use crate::graph::Activation;
    use half::f16;
    use respodiff_emulated_kernels::Schedule;
    use std::sync::Arc;

    /// Pseudorandom numbers in -1..1.
    fn numbers(len: usize, seed: u32) -> impl Iterator<Item = f32> {
        (0..len as u32).map(move |i| {
            let mixed = (i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed).wrapping_mul(2_246_822_519);
            (mixed >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
    }

    fn halves(device: &Arc<dyn CudaDevice>, len: usize, seed: u32) -> Buffer {
        let halves: Vec<f16> = numbers(len, seed).map(f16::from_f32).collect();
        Buffer::from_bytes(device, bytemuck::cast_slice(&halves)).unwrap()
    }

    /// Every tile gives the same bits under every schedule: for a 3x3 convolution of two sources with the whole
    /// epilogue, whose rows and columns fill no tile, and for the same with a gate.
    #[test]
    fn tiles_agree_bit_for_bit() {
        let (images, h, w, x, skip, columns) = (2, 5, 7, 24, 16, 88);
        let (rows, depth) = (images * h * w, x + skip);
        for (splits, activation) in
            [(1, Activation::Silu), (3, Activation::None), (1, Activation::Geglu), (2, Activation::Geglu)]
        {
            let channels = if activation == Activation::Geglu { columns / 2 } else { columns };
            let mut first: Option<Vec<u8>> = None;
            for schedule in Schedule::hostile(11) {
                let device = Emulated::new(Limits::A100, schedule);
                let bias: Vec<f32> = numbers(columns, 1).collect();
                let bias = Buffer::from_bytes(&device, bytemuck::cast_slice(&bias)).unwrap();
                let buffers: Vec<Buffer> =
                    [rows * x, rows * skip, columns * 9 * depth, images * channels, rows * channels, h * w * channels]
                        .iter()
                        .enumerate()
                        .map(|(i, &len)| halves(&device, len, i as u32))
                        .collect();
                let [source, second, weight, per_image, residual, shift] =
                    [0, 1, 2, 3, 4, 5].map(|i| buffers[i].address());
                let product = Product {
                    phases: 1,
                    rows,
                    columns,
                    depth: 9 * depth,
                    vector: true,
                    gated: activation == Activation::Geglu,
                    added: 0,
                    unit: 1,
                    followed: false,
                    normalised: false,
                    area: None,
                };
                let counters = Buffer::zeroed(&device, COUNTERS * size_of::<u32>()).unwrap();
                for tile in TILES.iter().filter(|tile| tile.instruction == Instruction::MmaSync) {
                    let partial = Buffer::new(&device, tile.partial_bytes(&product, splits)).unwrap();
                    let out = Buffer::new(&device, rows * channels * 2).unwrap();
                    let shifted = Buffer::new(&device, rows * channels * 2).unwrap();
                    let after = Epilogue {
                        bias: bias.address(),
                        folded: 0,
                        per_image,
                        residual,
                        out: out.address(),
                        shift,
                        shifted: shifted.address(),
                        channels: channels as i32,
                        per_image_width: channels as i32,
                        pixels: (h * w) as i32,
                        activation: activation as i32,
                        full: 0,
                        first_shifted: 1,
                        gain: 0.75,
                        bias_gain: 1.5,
                        scale: 0.5,
                        padding: 0,
                    };
                    let params = ConvParams {
                        sources: [source, second],
                        weight,
                        after,
                        partial: partial.address(),
                        counters: counters.address(),
                        resize_y: 1 << 32,
                        resize_x: 1 << 32,
                        source_channels: [x as i32, skip as i32],
                        depth: depth as i32,
                        height: h as i32,
                        width: w as i32,
                        seen_height: h as i32,
                        seen_width: w as i32,
                        out_height: h as i32,
                        out_width: w as i32,
                        kernel: 3,
                        stride: 1,
                        pad: 1,
                        phases: 1,
                        rows: rows as i32,
                        columns: columns as i32,
                        splits: splits as i32,
                        steps: product.depth.div_ceil(STEP).div_ceil(splits) as i32,
                        padding: 0,
                    };
                    let grid = [tile.count(&product), splits, 1];
                    let launch = Launch::new(tile.kernel, grid, tile.threads(), tile.shared(), &params);
                    // SAFETY: the buffers have the sizes that the structure says.
                    let run = unsafe { device.run(&[launch]) };
                    run.unwrap_or_else(|fault| panic!("{}, {schedule:?}: {fault}", tile.kernel));
                    let mut bits = vec![0; 2 * out.len()];
                    let (mid, end) = bits.split_at_mut(out.len());
                    out.read(0, mid).unwrap();
                    shifted.read(0, end).unwrap();
                    let first = first.get_or_insert_with(|| bits.clone());
                    assert!(*first == bits, "{}, {splits} splits, {activation:?}, {schedule:?}", tile.kernel);
                }
            }
        }
    }
}
