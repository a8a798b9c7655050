//! `kernels/group_norm.cu`.

use super::*;
use respodiff::backend::Executor;
use respodiff::graph::{Activation, View};

/// Channels of other layers in front of those that modulate.
const OTHERS: usize = 3;

/// A group norm: the shapes of its sources, its number of groups, and whether it is modulated and followed by SiLU.
struct Case<'a> {
    sources: &'a [Shape],
    groups: usize,
    modulated: bool,
    silu: bool,
}

pub const EPS: f32 = 1e-5;

/// The gradient with respect to one group or row: `u - mean(u) - x^ mean(u x^)`, for `x^ = (x - mean(x)) * inverse`.
///
/// The floor: with one or two numbers all three terms cancel. In f32 with a unit roundoff of e, a mean is off by e
/// times the number of consecutive additions, and so is the deviation `x - mean(x)`, relative to the size of x. Hence
/// x^ is off by e |x| * inverse, besides a few e of its own for the inverse, and u has a few roundings as well. So u
/// and its mean are off by k e |u|, and the last term, in which x^ occurs twice, by k e |u| (|x^|^2 + 2 |x^| (|x| *
/// inverse + |x^|)).
pub fn gradient_of(x: &[f64], u: &[f64], normal: &[f64], inverse: f64, round: Round) -> Truth {
    let mean_of = |x: &dyn Fn(usize) -> f64| (0..u.len()).map(x).sum::<f64>() / u.len() as f64;
    let (mean_u, mean_product) = (round(mean_of(&|i| u[i])), round(mean_of(&|i| u[i] * normal[i])));
    let numbers = (0..u.len()).map(|i| round(u[i] - mean_u - round(normal[i] * mean_product))).collect();
    let greatest = |x: &[f64]| x.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let (u, normal, from_mean) = (greatest(u), greatest(normal), greatest(x) * inverse);
    // The kernels' longest chains: a thread's numbers, 40 at most, the lanes of a warp, and up to 32 warps.
    let roundings = (x.len().min(77) + 5) as f64;
    let floor = roundings * 2f64.powi(-24) * u * (1.0 + 3.0 * normal * normal + 2.0 * normal * from_mean);
    Truth { numbers, floor }
}

impl Case<'_> {
    fn label(&self) -> String {
        let Case { sources, groups, modulated, silu } = self;
        let sources: Vec<String> = sources.iter().map(Shape::to_string).collect();
        format!("{} in {groups} groups, modulated {modulated}, silu {silu}", sources.join(" and "))
    }

    fn channels(&self) -> usize {
        self.sources.iter().map(|s| s.c).sum()
    }

    fn shapes(&self) -> Vec<Shape> {
        let modulation = Shape::new(self.sources[0].n, 1, 1, OTHERS + 2 * self.channels());
        self.sources.iter().copied().chain(self.modulated.then_some(modulation)).collect()
    }

    fn build(&self, g: &mut GraphBuilder, x: &[TensorId]) -> TensorId {
        let sources = respodiff::graph::Sources { x: x[0], skip: (self.sources.len() == 2).then(|| x[1]) };
        let modulation = self.modulated.then(|| View { tensor: x[self.sources.len()], offset: OTHERS });
        g.group_norm("norm", sources, self.groups, EPS, self.silu, modulation)
    }

    fn plain(&self, given: &Given, round: Round) -> Numbers {
        let (n, pixels, channels) = (self.sources[0].n, self.sources[0].tokens(), self.channels());
        let (weight, bias) = (&given.weights["norm.weight"], &given.weights["norm.bias"]);
        let at = |image: usize, pixel: usize, c: usize| {
            let (source, c) = if c < self.sources[0].c { (0, c) } else { (1, c - self.sources[0].c) };
            given.inputs[source][(image * pixels + pixel) * self.sources[source].c + c]
        };
        let per_group = channels / self.groups;
        let mut out = vec![0.0; n * pixels * channels];
        for image in 0..n {
            for group in 0..self.groups {
                let all =
                    || (0..pixels).flat_map(|p| (group * per_group..(group + 1) * per_group).map(move |c| (p, c)));
                let count = (pixels * per_group) as f64;
                let mean = round(all().map(|(p, c)| at(image, p, c)).sum::<f64>() / count);
                let variance = round(all().map(|(p, c)| (at(image, p, c) - mean).powi(2)).sum::<f64>() / count);
                for (p, c) in all() {
                    let normal = round((at(image, p, c) - mean) / (variance + EPS as f64).sqrt());
                    let mut y = round(normal * weight[c] + bias[c]);
                    if self.modulated {
                        let modulation = &given.inputs[self.sources.len()][image * (OTHERS + 2 * channels) + OTHERS..];
                        y = round(y * (1.0 + modulation[c]) + modulation[channels + c]);
                    }
                    let y = if self.silu { activated(y, Activation::Silu) } else { y };
                    out[(image * pixels + p) * channels + c] = round(y);
                }
            }
        }
        out
    }

    fn check(&self) {
        check(&self.label(), &self.shapes(), |g, x| self.build(g, x), |given, round| self.plain(given, round));
    }

    /// The gradient with respect to the first source: [`gradient_of`] each group, where `u` is the seed times the
    /// factors that the norm applies.
    fn plain_gradient(&self, given: &Given, round: Round) -> Truth {
        let (n, pixels, channels) = (self.sources[0].n, self.sources[0].tokens(), self.channels());
        let (weight, bias) = (&given.weights["norm.weight"], &given.weights["norm.bias"]);
        let first = self.sources[0].c;
        let at = |image: usize, pixel: usize, c: usize| {
            let (source, c) = if c < first { (0, c) } else { (1, c - first) };
            given.inputs[source][(image * pixels + pixel) * self.sources[source].c + c]
        };
        let seed = given.inputs.last().unwrap();
        let per_group = channels / self.groups;
        let mut out = Truth::from(vec![0.0; n * pixels * first]);
        for (image, group) in (0..n * self.groups).map(|i| (i / self.groups, i % self.groups)) {
            let places = (0..pixels).flat_map(|p| (group * per_group..(group + 1) * per_group).map(move |c| (p, c)));
            let places: Vec<(usize, usize)> = places.collect();
            let mean_of = |x: &dyn Fn(usize) -> f64| (0..places.len()).map(x).sum::<f64>() / places.len() as f64;
            let mean = round(mean_of(&|i| at(image, places[i].0, places[i].1)));
            let variance = round(mean_of(&|i| (at(image, places[i].0, places[i].1) - mean).powi(2)));
            let inverse = 1.0 / (variance + EPS as f64).sqrt();
            let normal: Numbers = places.iter().map(|&(p, c)| round((at(image, p, c) - mean) * inverse)).collect();
            let u = places.iter().zip(&normal).map(|(&(p, c), normal)| {
                let (mut y, mut scale) = (round(normal * weight[c] + bias[c]), weight[c]);
                if self.modulated {
                    let modulation = &given.inputs[self.sources.len()][image * (OTHERS + 2 * channels) + OTHERS..];
                    y = round(y * (1.0 + modulation[c]) + modulation[channels + c]);
                    scale = round(scale * (1.0 + modulation[c]));
                }
                let d = seed[(image * pixels + p) * channels + c];
                let d = if self.silu { round(d * slope(y, Activation::Silu)) } else { d };
                round(round(d * scale) * inverse)
            });
            let u: Numbers = u.collect();
            let x: Numbers = places.iter().map(|&(p, c)| at(image, p, c)).collect();
            let Truth { numbers, floor } = gradient_of(&x, &u, &normal, inverse, round);
            out.floor = out.floor.max(floor);
            for (&(p, c), number) in places.iter().zip(numbers).filter(|((_, c), _)| *c < first) {
                out.numbers[(image * pixels + p) * first + c] = number;
            }
        }
        out
    }

    fn check_gradient(&self) {
        let (shapes, seed) = (self.shapes(), Shape { c: self.channels(), ..self.sources[0] });
        let inputs = shapes.iter().chain([&seed]).enumerate().map(|(i, shape)| random(shape.len(), 5 + i as u64));
        check_gradient(
            Limits::A100,
            &self.label(),
            &shapes,
            inputs.collect(),
            |g, x| self.build(g, x),
            |given, round| self.plain_gradient(given, round),
        );
    }
}

#[test]
fn group_norm() {
    for &(n, h, w, c, groups) in &[
        (2, 8, 8, 320, 32),
        (1, 4, 4, 1280, 32),
        (3, 5, 7, 960, 32),
        (2, 5, 3, 48, 3),
        (1, 1, 1, 8, 8),
        (2, 5, 7, 12, 4),
        (1, 3, 3, 9, 1),
        (1, 1, 3, 120, 20), // a last slab of 24 channels after one of 96
        (1, 2, 3, 2600, 1),
        (1, 1, 2, 301, 7),
    ] {
        let sources = &[Shape::new(n, h, w, c)];
        Case { sources, groups, modulated: false, silu: true }.check();
    }
}

#[test]
fn group_norm_gradient() {
    for &(n, h, w, c, groups) in &[
        (2, 8, 8, 320, 32),
        (1, 4, 4, 1280, 32),
        (3, 5, 7, 48, 3),
        (2, 5, 7, 12, 4),
        (1, 3, 3, 9, 1),
        (1, 1, 3, 120, 20), // a last slab of 24 channels after one of 96
        (1, 2, 3, 2600, 1),
        // Groups of one number and of two, whose gradients are zero.
        (1, 1, 1, 8, 8),
        (2, 1, 2, 5, 5),
    ] {
        let sources = &[Shape::new(n, h, w, c)];
        Case { sources, groups, modulated: false, silu: true }.check_gradient();
    }
    // Images that are divided into stretches of pixels.
    for &(n, h, w, c, groups) in &[(2, 29, 31, 80, 8), (1, 67, 64, 32, 32), (1, 33, 35, 20, 5)] {
        let sources = &[Shape::new(n, h, w, c)];
        Case { sources, groups, modulated: n == 2, silu: n == 2 }.check_gradient();
    }
    // Two sources, with the gradient with respect to the first.
    for &(n, h, w, first, second, groups) in
        &[(2, 4, 4, 64, 32, 4), (1, 3, 5, 24, 40, 4), (2, 3, 3, 5, 7, 2), (1, 31, 37, 96, 64, 32)]
    {
        let sources = &[Shape::new(n, h, w, first), Shape::new(n, h, w, second)];
        Case { sources, groups, modulated: true, silu: true }.check_gradient();
        Case { sources, groups, modulated: false, silu: false }.check_gradient();
    }
}

/// Images that are divided into stretches of pixels, the last of them shorter than the others.
#[test]
fn group_norm_in_stretches() {
    for &(n, h, w, c, groups) in &[(2, 29, 31, 80, 8), (1, 67, 64, 32, 32), (1, 33, 35, 20, 5)] {
        let sources = &[Shape::new(n, h, w, c)];
        Case { sources, groups, modulated: n == 2, silu: false }.check();
    }
}

/// The boundary between the sources falls inside a group, and inside eight channels that would otherwise be one vector.
#[test]
fn group_norm_of_two_sources() {
    for &(n, h, w, first, second, groups) in
        &[(2, 4, 4, 640, 320, 32), (1, 3, 5, 24, 40, 4), (2, 3, 3, 5, 7, 2), (1, 31, 37, 96, 64, 32)]
    {
        let sources = &[Shape::new(n, h, w, first), Shape::new(n, h, w, second)];
        Case { sources, groups, modulated: true, silu: true }.check();
        Case { sources, groups, modulated: false, silu: false }.check();
    }
}

/// A mean of 1500 times the deviation, and in one channel a first pixel that is far off. If f32 sums of squares were
/// taken about zero, nothing would be left of the variance, since a thread has 32 pixels of the first size.
#[test]
fn group_norm_keeps_the_variance_beside_a_large_mean() {
    for (h, w) in [(31, 33), (60, 60)] {
        let shape = Shape::new(1, h, w, 64);
        let case = Case { sources: &[shape], groups: 4, modulated: false, silu: false };
        let mut x: Numbers = random(shape.len(), 3).iter().map(|x| 1500.0 + (1.5 * x).round()).collect();
        x[5] = -1500.0;
        check_with(
            Limits::A100,
            &format!("large mean, {shape}"),
            &[shape],
            vec![x],
            |g, x| case.build(g, x),
            // Rounding the mean to fp16 in the naive loop would be as bad as the error that is looked for here, so only
            // the truth is used; f32's own rounding of a mean of 1500 is far below the floor.
            |given, _| case.plain(given, |x| x),
        );
    }
}

/// The bits of an image's norms and of their gradients must not depend on the images beside it.
#[test]
fn norms_of_an_image_alone_and_in_a_batch() {
    for (h, w, c, groups) in [(5, 7, 320, 32), (29, 31, 80, 8), (31, 37, 12, 3)] {
        let of = |n: usize, input: &[f64]| {
            let shape = Shape::new(n, h, w, c);
            let mut g = GraphBuilder::new();
            let x = g.input("x", shape);
            let y = g.group_norm("norm", x, groups, EPS, true, None);
            let y = g.layer_norm("layer", y, EPS);
            g.output("out", y);
            let graph = g.finish().with_gradient("out", "x", Keep::All);
            let (folder, _) = weights(&graph);
            let tensors = Source::folder(folder.path()).unwrap().tensors("unet").unwrap();
            let (_, device) = devices(Limits::A100).remove(0);
            let weights = CudaWeights::load(&device, graph.weights(), &tensors).unwrap();
            let plan = Arc::new(Plan::new(graph, &[], &device.limits()));
            let mut executor = CudaExecutor::new(&device, plan, weights).unwrap();
            for name in ["x", "d.out"] {
                executor.write(name, &input.iter().map(|&x| x as f32).collect::<Vec<f32>>()).unwrap();
            }
            executor.step().and_then(|()| executor.backward()).unwrap();
            ["out", "d.x"].map(|name| executor.read(name).unwrap())
        };
        let one = h * w * c;
        let inputs = random(3 * one, 9);
        let batch = of(3, &inputs);
        for image in 0..3 {
            for (alone, batch) in of(1, &inputs[image * one..][..one]).iter().zip(&batch) {
                let same = alone.iter().zip(&batch[image * one..]).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "image {image} of {h}x{w}x{c}");
            }
        }
    }
}
