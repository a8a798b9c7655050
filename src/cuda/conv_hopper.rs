//! Launches of `kernels/conv_hopper.cu`.

use super::conv::{self, is_upsampled, weight_address};
use super::device::{Launch, TensorTiles};
use super::epilogue::{self, Epilogue};
use super::folded;
use super::site::{Element, Site};
use super::tiles::{Area, Choice, Pixels, Product, STEP};
use crate::graph::{Activation, Conv, Graph, Op, Shape, TensorId};
use crate::{Error, Result, Subject};
use half::f16;

/// `CUtensorMapSwizzle` for spans of 128, 64 and 32 bytes.
const SWIZZLES: [(usize, u32); 3] = [(128, 3), (64, 2), (32, 1)];

crate::params! {
    pub(super) struct ConvHopperParams {
        sources: [[u64; 16]; 4],
        weight: [u64; 16],
        out: [[u64; 16]; 4],
        residual: [u64; 16],
        added_sources: [[u64; 16]; 2],
        added_weight: [u64; 16],
        after: Epilogue,
        partial: u64,
        counters: u64,
        moments: u64,
        added_bias: u64,
        source_moments: u64,
        height: i32,
        width: i32,
        images: i32,
        log_width: i32,
        log_height: i32,
        across_image: i32,
        down_image: i32,
        tiles_down: i32,
        tiles_across: i32,
        columns: i32,
        tiles_of_columns: i32,
        blocks: [i32; 2],
        added_blocks: [i32; 2],
        kernel: i32,
        splits: i32,
        steps: i32,
        unit_pixels: i32,
        unit_channels: i32,
        pixel_units: i32,
        source_units: i32,
        source_eps: f32,
        halved: i32,
        padding: [i32; 6],
    }
}

/// The area of which TMA would fetch tiles for a convolution, if the kernels support it: each stage is 64 channels of
/// one source, rectangles move by whole pixels, and results are fp16 in multiples of 16 bytes. For a plain 3x3
/// convolution the source may be upsampled by two; a 3x3 convolution of one source may have stride 2, and its area is
/// that of the pixels it reads for one tap.
///
/// # Errors
/// Why they cannot.
pub(super) fn area(graph: &Graph, conv: &Conv, out: TensorId) -> Result<Area, &'static str> {
    let (input, shape) = (graph.shape(conv.sources.x), graph.shape(out));
    let gated = conv.activation == Activation::Geglu;
    let plain = conv.residual.is_none() && conv.per_image.is_none() && !epilogue::is_shifted(graph, out);
    let upsampled = is_upsampled(graph, conv, out);
    let halved = conv.stride == 2;
    let size = if upsampled { (2 * input.h, 2 * input.w) } else { (input.h, input.w) };
    let result = if halved { (2 * shape.h, 2 * shape.w) } else { (shape.h, shape.w) };
    let pixels = if conv.is_pointwise() { Pixels::Apart } else { Pixels::Near };
    let seen = if halved { shape } else { input };
    let area = Area { height: seen.h, width: seen.w, pixels };
    for (holds, otherwise) in [
        (conv.stride <= 2, "its stride is greater than 2"),
        (!halved || conv.kernel == 3, "it has stride 2 and is not 3x3"),
        (!halved || conv.sources.skip.is_none(), "it has stride 2 and two sources"),
        (!halved || conv.resize.is_none(), "it has stride 2 and a resized source"),
        (conv.kernel % 2 == 1 && conv.pad == conv.kernel / 2, "its padding is not half of its kernel"),
        (size == result && (upsampled || conv.resize.is_none()), "its source is resized by a factor other than 2"),
        (
            conv.sources.iter().all(|id| graph.shape(id).c.is_multiple_of(STEP)),
            "its sources' channels are not multiples of 64",
        ),
        (
            !matches!(conv.activation, Activation::SoftClamp | Activation::ToUnit | Activation::FromUnit),
            "its activation function is one of images",
        ),
        (shape.c.is_multiple_of(8), "its result's channels are not a multiple of 8"),
        (Element::of(graph, out) == Element::F16, "its results are fp32"),
        (plain || !gated, "it adds something to the gated values"),
        (!upsampled || plain, "its source is upsampled and it adds something"),
        (
            conv.per_image.is_none() || area.halves_have_one_image(),
            "its images are so small that half a tile would span several",
        ),
    ] {
        if !holds {
            return Err(otherwise);
        }
    }
    Ok(area)
}

/// The 1x1 convolution whose result `conv` adds, if it can be computed as more depth of `conv`: nothing else reads its
/// result, nothing but a bias follows it, and both products have the same gains.
pub(super) fn added<'a>(graph: &'a Graph, conv: &Conv, out: TensorId) -> Option<&'a Conv> {
    let residual = conv.residual?;
    let Op::Conv(added) = &graph.maker(residual)?.op else { return None };
    let alone = graph.readers(residual).count() == 1 && !graph.is_output(residual);
    let plain = added.residual.is_none()
        && added.per_image.is_none()
        && added.activation == Activation::None
        && added.scale == 1.0
        && (added.gain, added.bias_gain) == (conv.gain, conv.bias_gain);
    let whole = added.sources.iter().all(|id| graph.shape(id).c.is_multiple_of(STEP));
    let near = area(graph, conv, out).is_ok_and(|area| area.pixels == Pixels::Near);
    let same = conv.stride == 1 && added.is_pointwise();
    let suits = alone && plain && whole && near && same && conv.activation == Activation::None;
    suits.then_some(added)
}

/// # Errors
/// [`crate::ErrorKind::Unsupported`] if TMA does not take the tensors.
pub(super) fn launch(
    conv: &Conv,
    out: TensorId,
    site: &Site,
    product: &Product,
    Choice { tile, splits, steps }: Choice,
) -> Result<Launch> {
    let shape = site.shape(out);
    let area = product.area.ok_or_else(|| Error::unsupported(Subject::Device, "a product that TMA cannot fetch"))?;
    let (seen, images) = area.seen(shape.n);
    let rectangle = area.rectangle();
    let [across, down, deep] = rectangle.count(seen, images);
    let [width, height, pictures] = rectangle.size();
    // A warpgroup's half of a rectangle: half of the images if there are several, else half of the height, else of the
    // width.
    let half = match [width, height, pictures] {
        [w, h, n] if n > 1 => [w, h, n / 2],
        [w, h, n] if h > 1 => [w, h / 2, n],
        [w, h, n] => [w / 2, h, n],
    };
    // The map of images of `channels` of which every `step`-th row and column is visible.
    let image = |address, channels: usize, step: usize, [width, height, pictures]: [usize; 3], span: usize| {
        let (pixel, step) = ((channels * size_of::<f16>()) as u64, step as u64);
        let sizes = [channels as u64, seen.width as u64, seen.height as u64, images as u64];
        let row = pixel * sizes[1] * step;
        let strides = [pixel * step, row * step, row * sizes[2] * step];
        let tile = [span / size_of::<f16>(), width, height, pictures].map(|n| n as u32);
        let swizzle = SWIZZLES.iter().find(|(bytes, _)| *bytes == span).map_or(0, |(_, swizzle)| *swizzle);
        (site.bindings.tensor_map)(&TensorTiles { address, sizes: &sizes, strides: &strides, tile: &tile, swizzle })
    };
    let halved = conv.stride == 2;
    // The pixels of a source, or, of a source of twice the result's size, those of one parity of row and column.
    let pixels = |id: TensorId, parity: usize| {
        let Shape { w, c, .. } = site.shape(id);
        let first = (parity / 2 * w + parity % 2) * c * size_of::<f16>();
        image(site.address(id) + first as u64, c, if halved { 2 } else { 1 }, rectangle.size(), 2 * STEP)
    };
    let source = |id: TensorId| pixels(id, 0);
    // In place of a layer norm without a launch, the product reads what the norm would normalise.
    let norm = folded::norm(site.graph(), conv, site.limits);
    let x = norm.as_ref().map_or(conv.sources.x, |norm| norm.x);
    let source_moments = norm.as_ref().and_then(|norm| conv::moments(site.graph(), norm.x, site.limits));
    let first = source(x)?;
    let mut sources = [first; 4];
    if let Some(skip) = conv.sources.skip {
        sources[1] = source(skip)?;
    }
    if halved {
        for (parity, map) in sources.iter_mut().enumerate().skip(1) {
            *map = pixels(x, parity)?;
        }
    }
    let (phases, upsampled) = (product.phases, product.phases > 1);
    let kernel = if upsampled { 2 } else { conv.kernel };
    let matrix = |address, depth: usize, columns: usize| {
        let row = (depth * size_of::<f16>()) as u64;
        let (sizes, strides, tile): (&[u64], &[u64], &[u32]) = match product.gated {
            false => (&[depth as u64, columns as u64], &[row], &[STEP as u32, tile.columns as u32]),
            true => {
                (&[depth as u64, 2, columns as u64 / 2], &[row, 2 * row], &[STEP as u32, 1, tile.columns as u32 / 2])
            }
        };
        (site.bindings.tensor_map)(&TensorTiles { address, sizes, strides, tile, swizzle: SWIZZLES[0].1 })
    };
    let weight = matrix(weight_address(conv, site, product), product.depth, phases * product.columns)?;
    // Results are stored in boxes of the widest span that divides a tile's row.
    let results = if product.gated { tile.columns / 2 } else { tile.columns } * size_of::<f16>();
    let span = SWIZZLES.iter().map(|(bytes, _)| *bytes).find(|bytes| results.is_multiple_of(*bytes)).unwrap_or(32);
    let result = |address, step| image(address, shape.c, step, half, span);
    let mut stored = [result(site.address(out), if upsampled { 2 } else { 1 })?; 4];
    for (phase, map) in stored.iter_mut().enumerate().skip(1).filter(|_| upsampled) {
        let first = (phase / 2 * shape.w + phase % 2) * shape.c * size_of::<f16>();
        *map = result(site.address(out) + first as u64, 2)?;
    }
    let added = added(site.graph(), conv, out).filter(|_| product.added > 0);
    let residual = conv.residual.filter(|_| added.is_none());
    let mut after = Epilogue::new(conv, out, site);
    after.residual = site.optional(residual);
    let residual = residual.map_or(Ok(stored[0]), |id| result(site.address(id), 1))?;
    let added_first = added.map_or(Ok(first), |added| source(added.sources.x))?;
    let added_second = added.and_then(|added| added.sources.skip).map_or(Ok(added_first), source)?;
    let added_weight =
        added.map_or(Ok(weight), |added| matrix(site.weight(added.weight), product.added, product.columns))?;
    let tiles_of_columns = product.columns.div_ceil(tile.columns);
    let (tiles_down, tiles_across) = (across * down * deep, phases * tiles_of_columns);
    let moments = conv::moments(site.graph(), out, site.limits);
    let blocks = |id: Option<TensorId>| id.map_or(0, |id| site.shape(id).c / STEP) as i32;
    let params = ConvHopperParams {
        sources,
        weight,
        out: stored,
        residual,
        added_sources: [added_first, added_second],
        added_weight,
        after,
        partial: if splits > 1 { site.workspace() } else { 0 },
        counters: site.counters(),
        moments: moments.map_or(0, |_| site.moments(out)),
        added_bias: added.and_then(|added| added.bias).map_or(0, |id| site.weight(id)),
        source_moments: source_moments.map_or(0, |_| site.moments(x)),
        height: seen.height as i32,
        width: seen.width as i32,
        images: images as i32,
        log_width: rectangle.log_width as i32,
        log_height: rectangle.log_height as i32,
        across_image: across as i32,
        down_image: down as i32,
        tiles_down: tiles_down as i32,
        tiles_across: tiles_across as i32,
        columns: product.columns as i32,
        tiles_of_columns: tiles_of_columns as i32,
        blocks: [blocks(Some(conv.sources.x)), blocks(conv.sources.skip)],
        added_blocks: [added.map(|added| added.sources.x), added.and_then(|added| added.sources.skip)].map(blocks),
        kernel: kernel as i32,
        splits: splits as i32,
        steps: steps as i32,
        unit_pixels: moments.map_or(1, |of| of.pixels) as i32,
        unit_channels: moments.map_or(1, |of| of.channels) as i32,
        pixel_units: moments.map_or(1, |of| of.pixel_units(shape) / phases) as i32,
        source_units: source_moments.map_or(1, |of| site.shape(x).c / of.channels) as i32,
        source_eps: norm.map_or(0.0, |norm| norm.eps),
        halved: halved.into(),
        padding: [0; 6],
    };
    let units = tiles_down * tiles_across * splits;
    let grid = [units.min(site.limits.multiprocessors as usize), 1, 1];
    Ok(Launch::new(tile.kernel, grid, tile.threads(), tile.shared(), &params))
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use super::super::tiles::{GemmTile, Instruction, TILES};
    use super::super::{CudaExecutor, CudaWeights, Emulated, Limits, bound};
    use super::*;
    use crate::backend::Executor;
    use crate::graph::{ConvOptions, Extent, GraphBuilder, Sources, View};
    use crate::plan::Plan;
    use crate::weights::Tensors;
    use respodiff_emulated_kernels::Schedule;
    use std::sync::Arc;

    /// Floats of scratch memory for partial sums.
    const SCRATCH: usize = 1 << 22;

    struct Case {
        images: usize,
        size: (usize, usize),
        channels: [usize; 2],
        outputs: usize,
        kernel: usize,
        activation: Activation,
        /// True if a residual and a shift are added and, to a 3x3 convolution, a per-image row.
        more: bool,
        /// True if the source is upsampled by two.
        upsampled: bool,
        /// True if the source has twice the result's height and width.
        halved: bool,
    }

    impl Case {
        fn graph(&self) -> Graph {
            let Case {
                images,
                size: (h, w),
                channels: [x, skip],
                outputs,
                kernel,
                activation,
                more,
                upsampled,
                halved,
            } = *self;
            let gated = activation == Activation::Geglu;
            let made = |side: usize| if upsampled { 2 * side } else { side / if halved { 2 } else { 1 } };
            let result = Shape::new(images, made(h), made(w), if gated { outputs / 2 } else { outputs });
            let mut g = GraphBuilder::new();
            let scratch = g.input("scratch", Shape::new(1, 1, 1, 2 * SCRATCH));
            g.output("scratch", scratch);
            let source = g.input("x", Shape::new(images, h, w, x));
            let skip = (skip > 0).then(|| g.input("skip", Shape::new(images, h, w, skip)));
            // The second of two layers' numbers.
            let per_image = (more && kernel == 3).then(|| g.input("per_image", Shape::new(images, 1, 1, result.c + 6)));
            let per_image = per_image.map(|tensor| View { tensor, offset: 6 });
            let residual = more.then(|| g.input("residual", result));
            let geometry = if kernel == 3 { ConvOptions::conv3x3() } else { ConvOptions::default() };
            let resize = upsampled.then_some(Extent { h: 2 * h, w: 2 * w });
            let geometry = ConvOptions { resize, stride: if halved { 2 } else { 1 }, ..geometry };
            let options =
                ConvOptions { activation, per_image, residual, gain: 0.75, bias_gain: 1.5, scale: 0.5, ..geometry };
            let mut out = g.conv("layer", Sources { x: source, skip }, outputs, options);
            if more {
                let shift = g.input("shift", Shape { n: 1, ..result });
                let shifted = g.shift("shift", out, shift);
                g.output("shifted", shifted);
            }
            // Something reads the result, which makes it fp16.
            out = g.activate("read", out, Activation::Silu);
            g.output("out", out);
            g.finish()
        }

        /// All outputs, computed by the kernel that is chosen for the device, or by `tile` with `splits`.
        fn run(&self, limits: Limits, schedule: Schedule, by: Option<(&'static GemmTile, usize)>) -> Vec<f32> {
            let device = Emulated::new(limits, schedule);
            let graph = self.graph();
            let weights = CudaWeights::load(&device, graph.weights(), &Tensors::random()).unwrap();
            let plan = Arc::new(Plan::new(graph, &[], &limits));
            let mut executor = CudaExecutor::new(&device, plan.clone(), weights).unwrap();
            let graph = plan.graph();
            for (seed, name) in ["x", "skip", "per_image", "residual", "shift"].into_iter().enumerate() {
                let Some(id) = graph.find_input(name) else { continue };
                let number = |i: usize| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0;
                let numbers: Vec<f32> = (0..graph.shape(id).len()).map(number).collect();
                executor.write(name, &numbers).unwrap();
            }
            match by {
                None => executor.step().unwrap(),
                Some((tile, splits)) => {
                    let scratch = plan.offset(graph.input("scratch"));
                    let CudaExecutor { weights, arena, .. } = &executor;
                    bound(&device, weights, arena, |bindings| {
                        for (node, workspace) in plan.step() {
                            let Op::Conv(conv) = &node.op else {
                                // SAFETY: all memory is the executor's.
                                unsafe {
                                    device.run(&super::super::Program::lowering(&plan, bindings)(node, workspace)?)?
                                };
                                continue;
                            };
                            let (product, _) = super::super::conv::plan(graph, conv, node.output, limits);
                            let steps = product.steps().div_ceil(splits);
                            let site = Site { limits, bindings, plan: &plan, workspace: (scratch, 4 * SCRATCH) };
                            assert!(tile.partial_bytes(&product, splits) <= 4 * SCRATCH);
                            let launch = launch(conv, node.output, &site, &product, Choice { tile, splits, steps })?;
                            // SAFETY: as above.
                            unsafe { device.run(&[launch])? };
                        }
                        Ok(())
                    })
                    .unwrap_or_else(|fault| panic!("{}, {splits} splits, {schedule:?}: {fault}", tile.kernel));
                }
            }
            let outputs = ["out", "shifted"].into_iter().take(if self.more { 2 } else { 1 });
            outputs.flat_map(|name| executor.read(name).unwrap()).collect()
        }
    }

    /// Every tile with every number of splits gives the results of mma.sync's kernels except for the last bit, and the
    /// same bits as every other tile, under every hostile schedule.
    #[test]
    fn tiles_agree_with_the_other_instruction() {
        let case = |images, size, channels, outputs, kernel, activation, more| Case {
            images,
            size,
            channels,
            outputs,
            kernel,
            activation,
            more,
            upsampled: false,
            halved: false,
        };
        let cases = [
            // A convolution of two sources with the whole epilogue, of a size that fills no rectangle.
            case(3, (5, 7), [64, 128], 168, 3, Activation::None, true),
            case(2, (9, 20), [64, 0], 328, 3, Activation::Silu, true),
            case(1, (3, 140), [128, 0], 88, 3, Activation::None, false),
            // Tiles of several images, and of the same image in both halves.
            case(5, (3, 5), [64, 0], 88, 3, Activation::None, false),
            case(1, (8, 16), [64, 0], 96, 3, Activation::None, true),
            // Linear layers, whose rows fill no tile.
            case(2, (1, 77), [192, 0], 264, 1, Activation::QuickGelu, true),
            case(3, (10, 21), [128, 0], 336, 1, Activation::Geglu, false),
            // ReLU, which follows the residual.
            case(1, (9, 20), [64, 0], 64, 3, Activation::Relu, true),
            case(1, (1, 1), [320, 0], 16, 1, Activation::None, false),
            // Upsampled sources.
            Case { upsampled: true, ..case(3, (5, 7), [64, 0], 168, 3, Activation::None, false) },
            Case { upsampled: true, ..case(1, (11, 13), [128, 64], 88, 3, Activation::Silu, false) },
            // Sources of twice the size.
            Case { halved: true, ..case(3, (10, 14), [64, 0], 168, 3, Activation::None, true) },
            Case { halved: true, ..case(1, (22, 36), [128, 0], 88, 3, Activation::Silu, false) },
        ];
        for case in cases {
            let truth = case.run(Limits::A100, Schedule::QUICK, None);
            let gated = case.activation == Activation::Geglu;
            let taps = if case.upsampled { 4 } else { case.kernel * case.kernel };
            let depth = taps * case.channels.iter().sum::<usize>() / STEP;
            let followed = case.more || !matches!(case.activation, Activation::None | Activation::Geglu);
            let suits = |tile: &&GemmTile| {
                tile.instruction == Instruction::Wgmma && tile.gated == Some(gated) && !(tile.pingpong && followed)
            };
            let tiles = TILES.iter().filter(suits);
            let mut first: [Option<Vec<f32>>; 4] = Default::default();
            for (number, tile) in tiles.enumerate() {
                let most = if tile.pingpong { 1 } else { 3 };
                for splits in (1..=most).filter(|&splits| depth.div_ceil(depth.div_ceil(splits)) == splits) {
                    for schedule in Schedule::hostile(number as u64 + 1) {
                        // Few multiprocessors, so that blocks compute several tiles.
                        let limits = Limits { multiprocessors: 3, ..Limits::H100 };
                        let made = case.run(limits, schedule, Some((tile, splits)));
                        let label =
                            format!("{}, {splits} splits, {schedule:?}, {} to {}", tile.kernel, depth, case.outputs);
                        for (i, (&x, &y)) in made.iter().zip(&truth).enumerate() {
                            // The layer's result may differ in its last bit, which is 2^-10 of at most |y| + 0.28,
                            // where y is the SiLU of the result; and y in its own, 2^-11. Rounded sums of taps differ
                            // by at most 2^-12 of each weight: results of about 0.4 by 9e-5 at random, and some ten
                            // thousand of them by up to 4.5 times that.
                            let off = (x - y).abs();
                            assert!(off <= 1.5e-3 * (y.abs() + 0.28), "{label}: number {i} is {x}, and {y} is right");
                        }
                        let first = first[splits].get_or_insert_with(|| made.clone());
                        assert!(
                            made.iter().zip(&*first).all(|(a, b)| a.to_bits() == b.to_bits()),
                            "{label}: other bits"
                        );
                    }
                }
            }
        }
    }

    /// A 1x1 convolution of two sources whose result is added to a 3x3 one has no launch. The sum is that of two
    /// products except for the rounding of the first, with the same bits whatever the number of tiles, and for an image
    /// alone.
    #[test]
    fn added_convolutions_are_more_depth() {
        let graph = |images: usize, apart: bool| {
            let mut g = GraphBuilder::new();
            let [x, a, b] =
                [("x", 320), ("a", 64), ("b", 192)].map(|(name, c)| g.input(name, Shape::new(images, 16, 16, c)));
            let added = g.conv("added", Sources { x: a, skip: Some(b) }, 160, ConvOptions::default());
            let options = ConvOptions { residual: Some(added), scale: 0.5, ..ConvOptions::conv3x3() };
            let out = g.conv("layer", x, 160, options);
            let read = g.activate("read", out, Activation::Silu);
            g.output("out", out);
            g.output("read", read);
            if apart {
                g.output("added", added);
            }
            g.finish()
        };
        let run = |images: usize, apart: bool, limits: Limits, schedule| {
            let device = Emulated::new(limits, schedule);
            let plan = Arc::new(Plan::new(graph(images, apart), &[], &limits));
            let weights = CudaWeights::load(&device, plan.graph().weights(), &Tensors::random()).unwrap();
            let mut executor = CudaExecutor::new(&device, plan, weights).unwrap();
            for (seed, name) in ["x", "a", "b"].into_iter().enumerate() {
                let graph = executor.plan().graph();
                let numbers = graph.shape(graph.input(name)).len();
                let number = |i: usize| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0;
                executor.write(name, &(0..numbers).map(number).collect::<Vec<_>>()).unwrap();
            }
            executor.step().unwrap_or_else(|fault| panic!("{images} images, {schedule:?}: {fault}"));
            (executor.step_launches().iter().map(|l| l.kernel).collect::<Vec<_>>(), executor.read("out").unwrap())
        };
        // Few multiprocessors make blocks compute several tiles; many make them split the depth.
        for multiprocessors in [2, 24] {
            let limits = Limits { multiprocessors, ..Limits::H100 };
            let graph = graph(2, false);
            let splits = graph.nodes().iter().filter_map(|node| match &node.op {
                Op::Conv(conv) => Some(super::super::conv::plan(&graph, conv, node.output, limits).1.splits),
                _ => None,
            });
            assert_eq!(splits.max().is_some_and(|splits| splits > 1), multiprocessors == 24);
            let (_, apart) = run(2, true, limits, Schedule::QUICK);
            let (_, one) = run(1, false, limits, Schedule::QUICK);
            for schedule in Schedule::hostile(5) {
                let (launches, made) = run(2, false, limits, schedule);
                assert_eq!(launches.len(), 2, "{multiprocessors} multiprocessors: {launches:?}");
                // The result of the 1x1 convolution, at most 4, was rounded to fp16, and half of it is added.
                let off = made.iter().zip(&apart).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                assert!(off > 0.0 && off <= 2e-3, "{multiprocessors} multiprocessors: {off}");
                assert!(made.iter().zip(&one).all(|(x, y)| x.to_bits() == y.to_bits()), "{schedule:?}");
            }
        }
    }
}
