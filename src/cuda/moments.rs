//! Moments (mean and sum of squared deviations) of results, which matrix products leave for the norms that read them.

use super::cut::{Cut, PAIR, gcd};
use super::device::Limits;
use super::folded;
use crate::graph::{Graph, Op, Shape, TensorId};
use half::f16;

/// Pixels of a unit for group norms: those of a warpgroup in `kernels/conv_hopper.cu`.
pub(super) const PIXELS: usize = 64;
/// Channels of a unit for layer norms, of which the first that divides the row is taken, and the most units of a row:
/// four loads for each of the four lanes that share it. A tile whose columns are a multiple of 80 has units of 80
/// channels, any other tile units of 64.
const ROW_CHANNELS: [usize; 2] = [80, 64];
const ROW_UNITS: usize = 16;

/// The layout of an activation's moments, which are stored behind it: one pair per unit of some channels of some
/// pixels, whose extent depends neither on the batch nor on a tile. For group norms it is `[images][units of
/// channels][units of pixels]`, for layer norms `[pixels of all images][units of channels]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moments {
    /// Channels of a unit.
    pub channels: usize,
    /// Pixels of a unit: [`PIXELS`] for group norms, 1 for layer norms.
    pub pixels: usize,
}

impl Moments {
    /// Their offset from the activation's first byte.
    pub fn offset(shape: Shape) -> usize {
        (shape.len() * size_of::<f16>()).next_multiple_of(PAIR)
    }

    /// The number of units of an image that have the same channels.
    pub fn pixel_units(&self, shape: Shape) -> usize {
        shape.tokens() / self.pixels
    }

    /// Their size in bytes.
    pub fn bytes(&self, shape: Shape) -> usize {
        shape.n * (shape.c / self.channels) * self.pixel_units(shape) * PAIR
    }
}

/// The moments that the norms which read an activation want. A layer norm without a launch wants those of rows. Group
/// norms, and gradients of group norms that take an image in several stretches, want those of units that divide every
/// group; `None` if such a unit is odd or has fewer than four channels.
pub(super) fn wanted(graph: &Graph, id: TensorId, limits: Limits) -> Option<Moments> {
    if folded::leaves_moments(graph, id, limits) {
        return of_rows(graph.shape(id).c);
    }
    let mut unit = 0;
    for node in graph.readers(id) {
        let norm = match &node.op {
            Op::GroupNorm(norm) if norm.moments.is_none() => norm,
            Op::GroupNormGradient { of, .. } if Cut::of(of, |id| graph.shape(id)).stretches > 1 => of,
            _ => continue,
        };
        let mut first = 0;
        for source in norm.sources.iter() {
            if source == id {
                let channels: usize = norm.sources.iter().map(|id| graph.shape(id).c).sum();
                unit = gcd(gcd(unit, channels / norm.groups), gcd(first, graph.shape(id).c));
            }
            first += graph.shape(source).c;
        }
    }
    (unit >= 4 && unit.is_multiple_of(2)).then_some(Moments { channels: unit, pixels: PIXELS })
}

/// The moments of a row of `row` channels; `None` if no unit divides it, or if there would be too many.
pub(super) fn of_rows(row: usize) -> Option<Moments> {
    let channels = ROW_CHANNELS.into_iter().find(|&channels| row.is_multiple_of(channels))?;
    (row / channels <= ROW_UNITS).then_some(Moments { channels, pixels: 1 })
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use super::super::{CudaExecutor, CudaWeights, Emulated, Limits, conv};
    use super::*;
    use crate::backend::Executor;
    use crate::graph::{Activation, ConvOptions, Extent, GraphBuilder, Sources};
    use crate::plan::Plan;
    use crate::weights::Tensors;
    use respodiff_emulated_kernels::Schedule;
    use std::sync::Arc;

    /// What a convolution reads, in the tests below: each pixel by itself, pixels with their neighbours, or an
    /// upsampled source.
    #[derive(Clone, Copy, Debug)]
    enum Reads {
        Pixels,
        Neighbours,
        Upsampled,
    }

    /// Two convolutions, and the norm of their concatenated results.
    #[derive(Clone, Copy, Debug)]
    struct Case {
        reads: Reads,
        images: usize,
        /// Of the results.
        size: (usize, usize),
        channels: [usize; 2],
        groups: usize,
    }

    impl Case {
        fn graph(&self) -> Graph {
            let Case { reads, images, size: (h, w), channels, groups } = *self;
            let mut g = GraphBuilder::new();
            // A product of less depth would be faster with mma.sync.
            let (size, inputs, options) = match reads {
                Reads::Pixels => ((h, w), 384, ConvOptions::default()),
                Reads::Neighbours => ((h, w), 192, ConvOptions::conv3x3()),
                Reads::Upsampled => {
                    let resize = Some(Extent { h, w });
                    ((h / 2, w / 2), 128, ConvOptions { resize, ..ConvOptions::conv3x3() })
                }
            };
            let source = g.input("source", Shape::new(images, size.0, size.1, inputs));
            let [x, skip] = [("x", channels[0]), ("skip", channels[1])].map(|(name, channels)| {
                let made = g.conv(name, source, channels, options.clone());
                g.output(name, made);
                made
            });
            let norm = g.group_norm("norm", Sources { x, skip: Some(skip) }, groups, 1e-5, false, None);
            let read = g.activate("read", norm, Activation::Silu);
            g.output("norm", norm);
            g.output("read", read);
            g.finish()
        }

        /// The norm of two results by the kernels that compute statistics.
        fn usual_norm(&self, limits: Limits, sources: [&[f32]; 2]) -> Vec<f32> {
            let device = Emulated::new(limits, Schedule::QUICK);
            let mut g = GraphBuilder::new();
            let shape = |channels| Shape::new(self.images, self.size.0, self.size.1, channels);
            let [x, skip] = [0, 1].map(|i| g.input(["x", "skip"][i], shape(self.channels[i])));
            let norm = g.group_norm("norm", Sources { x, skip: Some(skip) }, self.groups, 1e-5, false, None);
            g.output("norm", norm);
            let plan = Arc::new(Plan::new(g.finish(), &[], &limits));
            let weights = CudaWeights::load(&device, plan.graph().weights(), &Tensors::random()).unwrap();
            let mut executor = CudaExecutor::new(&device, plan, weights).unwrap();
            executor.write("x", sources[0]).unwrap();
            executor.write("skip", sources[1]).unwrap();
            executor.step().unwrap();
            executor.read("norm").unwrap()
        }

        /// The kernels, the two results, their moments, and the norm.
        fn run(&self, limits: Limits, schedule: Schedule) -> (Vec<&'static str>, [Vec<f32>; 5]) {
            let device = Emulated::new(limits, schedule);
            let plan = Arc::new(Plan::new(self.graph(), &[], &limits));
            let graph = plan.graph();
            let weights = CudaWeights::load(&device, graph.weights(), &Tensors::random()).unwrap();
            let mut executor = CudaExecutor::new(&device, plan.clone(), weights).unwrap();
            let len = graph.shape(graph.input("source")).len() / self.images;
            // All images have the same numbers in another order, far from 0.
            let number = |i: usize| ((i % len * 7919 + i / len * 31) % 2003) as f32 / 1001.5 + 2.0;
            executor.write("source", &(0..self.images * len).map(number).collect::<Vec<_>>()).unwrap();
            executor.step().unwrap_or_else(|fault| panic!("{self:?}, {schedule:?}: {fault}"));
            let moments = |name: &str| {
                let id = graph.output(name);
                let moments = conv::moments(graph, id, limits).unwrap_or_else(|| panic!("{self:?}: {name} has none"));
                let mut bytes = vec![0; moments.bytes(graph.shape(id))];
                executor.arena.read(plan.offset(id) + Moments::offset(graph.shape(id)), &mut bytes).unwrap();
                bytemuck::pod_collect_to_vec(&bytes)
            };
            let read = |name: &str| executor.read(name).unwrap();
            let numbers = [read("x"), read("skip"), moments("x"), moments("skip"), read("norm")];
            (executor.step_launches().iter().map(|launch| launch.kernel).collect(), numbers)
        }
    }

    /// Merges the mean and squared deviations of parts of `each` numbers.
    fn merged(parts: impl Iterator<Item = (f64, f64)> + Clone, each: f64) -> (f64, f64) {
        let mean = parts.clone().map(|(mean, _)| mean).sum::<f64>() / parts.clone().count() as f64;
        (mean, parts.map(|(part, squares)| squares + each * (part - mean).powi(2)).sum())
    }

    const CASES: [Case; 7] = [
        // A group of 20 has 16 channels of the first source and 4 of the second.
        Case { reads: Reads::Pixels, images: 2, size: (24, 56), channels: [96, 64], groups: 8 },
        Case { reads: Reads::Neighbours, images: 1, size: (24, 48), channels: [160, 80], groups: 24 },
        Case { reads: Reads::Upsampled, images: 1, size: (64, 32), channels: [160, 160], groups: 32 },
        // So many units that they are merged first, with a part that is not full.
        Case { reads: Reads::Pixels, images: 1, size: (132, 128), channels: [80, 80], groups: 20 },
        Case { reads: Reads::Pixels, images: 2, size: (8, 200), channels: [320, 80], groups: 20 },
        // One stretch, where only the last kernel remains; a half of a tile is a whole image.
        Case { reads: Reads::Neighbours, images: 3, size: (8, 8), channels: [320, 160], groups: 16 },
        Case { reads: Reads::Neighbours, images: 2, size: (16, 16), channels: [160, 160], groups: 16 },
    ];

    /// The moments equal those of the stored numbers in float64, and the norm computed with them is right.
    #[test]
    fn products_leave_the_moments_of_their_results() {
        for (number, case) in CASES.into_iter().enumerate() {
            // Few multiprocessors, so that blocks compute several tiles.
            let limits = Limits { multiprocessors: 3, ..Limits::H100 };
            let schedules = Schedule::hostile(number as u64);
            let schedules = if number < 2 { &schedules[..] } else { &schedules[..1] };
            for &schedule in schedules {
                let (kernels, [x, skip, of_x, of_skip, norm]) = case.run(limits, schedule);
                let expected = if case.size.0 == 132 { "group_norm_merge" } else { "group_norm_apply_8" };
                assert_eq!(kernels[2], expected, "{case:?}");
                assert!(kernels.iter().all(|kernel| !kernel.starts_with("group_norm_statistics")), "{kernels:?}");
                let pixels = case.size.0 * case.size.1;
                for (numbers, moments, channels) in [(&x, &of_x, case.channels[0]), (&skip, &of_skip, case.channels[1])]
                {
                    let of_channels = pixels / PIXELS;
                    let units = moments.len() / (2 * case.images * of_channels);
                    let unit = channels / units;
                    for (place, of_unit) in moments.chunks(2 * of_channels).enumerate() {
                        let (image, first) = (place / units, place % units * unit);
                        let left = of_unit.chunks(2).map(|m| (f64::from(m[0]), f64::from(m[1])));
                        let (mean, squares) = merged(left, (PIXELS * unit) as f64);
                        let all = (0..pixels).flat_map(|pixel| {
                            let at = (image * pixels + pixel) * channels + first;
                            numbers[at..at + unit].iter().map(|&x| (f64::from(x), 0.0))
                        });
                        let right = merged(all, 1.0);
                        // A chain of 80 sums and three more, in fp32, about a number that is at most ten deviations
                        // away; the deviations are at least a tenth of the mean.
                        assert!((mean - right.0).abs() <= 1e-5 * right.0.abs().max(1.0), "{case:?}: {mean}, {right:?}");
                        assert!((squares - right.1).abs() <= 1e-3 * right.1, "{case:?}: {squares}, {right:?}");
                    }
                }
                // The same norm by its own statistics; the errors of both are below fp16's resolution, except for a
                // last bit.
                let usual = case.usual_norm(limits, [&x, &skip]);
                let off = |(&y, &right): (&f32, &f32)| (y - right).abs() <= 1e-3 * right.abs().max(0.06);
                assert!(norm.iter().zip(&usual).all(off), "{case:?}, {schedule:?}");
            }
        }
    }
}
