//! `kernels/norm.cu`.

use super::*;
use respodiff::graph::{Activation, ConvOptions, View};

/// Channels of other layers that stand before those that modulate.
const OTHERS: usize = 3;

/// A group norm: shapes of the sources, groups, whether it is modulated and followed by SiLU.
struct Case<'a> {
    sources: &'a [Shape],
    groups: usize,
    modulated: bool,
    silu: bool,
}

const EPS: f32 = 1e-5;

/// The gradient by one group or row: `u - mean(u) - x^ mean(u x^)`, for `x^ = (x - mean(x)) * inverse`.
///
/// The floor: with one number, or two, all three terms cancel. In f32, of a unit roundoff e, a mean is off by as many e
/// as it has additions in a row; so is `x - mean(x)`, of the size of x, hence x^ by e |x| * inverse, besides a few e of
/// its own for the inverse; u has a few roundings as well. So u and its mean are off by k e |u|, and the last term, in
/// which x^ stands twice, by k e |u| (|x^|^2 + 2 |x^| (|x| * inverse + |x^|)).
fn gradient_of(x: &[f64], u: &[f64], normal: &[f64], inverse: f64, round: Round) -> Truth {
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

    /// The gradient by the first source: [`gradient_of`] each group, where `u` is the seed times what the norm
    /// multiplies by.
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
    // In stretches.
    for &(n, h, w, c, groups) in &[(2, 29, 31, 80, 8), (1, 67, 64, 32, 32), (1, 33, 35, 20, 5)] {
        let sources = &[Shape::new(n, h, w, c)];
        Case { sources, groups, modulated: n == 2, silu: n == 2 }.check_gradient();
    }
    // Of two sources, by the first.
    for &(n, h, w, first, second, groups) in
        &[(2, 4, 4, 64, 32, 4), (1, 3, 5, 24, 40, 4), (2, 3, 3, 5, 7, 2), (1, 31, 37, 96, 64, 32)]
    {
        let sources = &[Shape::new(n, h, w, first), Shape::new(n, h, w, second)];
        Case { sources, groups, modulated: true, silu: true }.check_gradient();
        Case { sources, groups, modulated: false, silu: false }.check_gradient();
    }
}

/// Images that are cut into stretches, the last of them shorter than others.
#[test]
fn group_norm_in_stretches() {
    for &(n, h, w, c, groups) in &[(2, 29, 31, 80, 8), (1, 67, 64, 32, 32), (1, 33, 35, 20, 5)] {
        let sources = &[Shape::new(n, h, w, c)];
        Case { sources, groups, modulated: n == 2, silu: false }.check();
    }
}

/// The boundary between the sources falls inside a group, and inside what would be a vector.
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

/// A mean of 1500 times the deviation, and in one channel a first pixel that is far off: f32 sums of squares about zero
/// would leave nothing of the variance, a thread having 32 pixels of the first size.
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
            // Every rounding of the mean to fp16 would be as bad as what is looked for here: the truth alone, f32's
            // own rounding of a mean of 1500 being far below the floor.
            |given, _| case.plain(given, |x| x),
        );
    }
}

#[test]
fn layer_norm() {
    for (n, w, c) in
        [(2, 5, 320), (1, 3, 1280), (2, 77, 64), (1, 1, 8), (1, 2, 2048), (3, 5, 12), (1, 7, 1), (2, 3, 333)]
    {
        let shape = Shape::new(n, 1, w, c);
        check(
            &format!("layer norm of {shape}"),
            &[shape],
            |g, x| g.layer_norm("norm", x[0], EPS),
            |given, round| {
                let rows = given.inputs[0].chunks_exact(c).flat_map(|x| {
                    let mean = round(x.iter().sum::<f64>() / c as f64);
                    let variance = round(x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64);
                    let normal = move |x: &f64| round((x - mean) / (variance + EPS as f64).sqrt());
                    let affine = given.weights["norm.weight"].iter().zip(&given.weights["norm.bias"]);
                    x.iter().zip(affine).map(move |(x, (w, b))| round(normal(x) * w + b))
                });
                rows.collect()
            },
        );
    }
}

#[test]
fn layer_norm_gradient() {
    for (n, w, c) in [(2, 5, 320), (1, 3, 1280), (1, 1, 8), (1, 2, 2048), (3, 5, 12), (1, 7, 1), (1, 7, 2), (2, 3, 333)]
    {
        let shape = Shape::new(n, 1, w, c);
        check_gradient(
            Limits::A100,
            &format!("layer norm of {shape}"),
            &[shape],
            vec![random(shape.len(), 5), random(shape.len(), 6)],
            |g, x| g.layer_norm("norm", x[0], EPS),
            |given, round| {
                let rows = given.inputs[0].chunks_exact(c).zip(given.inputs[1].chunks_exact(c)).map(|(x, d)| {
                    let mean = round(x.iter().sum::<f64>() / c as f64);
                    let variance = round(x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64);
                    let inverse = 1.0 / (variance + EPS as f64).sqrt();
                    let normal: Numbers = x.iter().map(|x| round((x - mean) * inverse)).collect();
                    let u = d.iter().zip(&given.weights["norm.weight"]).map(|(d, w)| round(round(d * w) * inverse));
                    gradient_of(x, &u.collect::<Numbers>(), &normal, inverse, round)
                });
                rows.reduce(|a, b| Truth { numbers: [a.numbers, b.numbers].concat(), floor: a.floor.max(b.floor) })
                    .expect("a row")
            },
        );
    }
}

/// The bits of an image must not depend on those beside it, nor those of a gradient.
#[test]
fn an_image_alone_and_in_a_batch() {
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
            let weights = Weights::load(&device, graph.weights(), &tensors).unwrap();
            let plan = Arc::new(Plan::new(graph, &[], &device.limits()));
            let mut executor = Executor::new(&device, plan, weights).unwrap();
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

/// A product with a residual, a layer norm of it, and a product of that, as transformers have them: rows, channels of the
/// source, of the norm and of the result.
struct Between {
    size: (usize, usize),
    channels: [usize; 3],
    activation: Activation,
}

/// How the norm between is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    /// By the products on either side of it, without a launch.
    Products,
    /// By a launch that normalises only: scale and shift are in the second product's weights, as whenever TMA can fetch the
    /// norm's channels; but here it cannot fetch those of the first product's source.
    Launch,
    /// By a launch, with scale and shift: something else reads its result.
    All,
}

impl Between {
    /// What was normalised and the result; the residual's numbers are 1 to each side of `mean`.
    fn run(&self, images: usize, mean: f64, by: By, schedule: Schedule) -> ([Vec<f32>; 2], HashMap<String, Numbers>) {
        let Between { size: (h, w), channels: [inputs, channels, outputs], activation } = *self;
        let inputs = inputs + if by == By::Launch { 8 } else { 0 };
        let mut g = GraphBuilder::new();
        let [source, residual] =
            [("source", inputs), ("residual", channels)].map(|(name, c)| g.input(name, Shape::new(images, h, w, c)));
        let x = g.linear("x", source, channels, ConvOptions { residual: Some(residual), ..Default::default() });
        let norm = g.layer_norm("norm", x, EPS);
        let out = g.linear("layer", norm, outputs, ConvOptions { activation, ..Default::default() });
        // Something reads the results, which makes them fp16.
        let read = g.activate("read", out, Activation::Silu);
        for (name, id) in [("x", x), ("out", out), ("read", read)] {
            g.output(name, id);
        }
        if by == By::All {
            g.output("norm", norm);
        }
        let graph = g.finish();
        // Few multiprocessors, so that blocks make several tiles, and large ones are the fastest of small products too.
        let limits = Limits { multiprocessors: 3, ..Limits::H100 };
        let device: Arc<dyn Device> = Emulated::new(limits, schedule);
        let (folder, by_name) = weights(&graph);
        let tensors = Source::folder(folder.path()).unwrap().tensors("unet").unwrap();
        let weights = Weights::load(&device, graph.weights(), &tensors).unwrap();
        let mut executor = Executor::new(&device, Arc::new(Plan::new(graph, &[], &limits)), weights).unwrap();
        // The numbers of an image do not depend on those beside it.
        let numbers = |c: usize, seed: u64, mean: f64| -> Vec<f32> {
            let one = |image| random(h * w * c, seed + image as u64);
            (0..images).flat_map(one).map(|x| (x + mean) as f32).collect()
        };
        executor.write("source", &numbers(inputs, 50, 0.0)).unwrap();
        executor.write("residual", &numbers(channels, 70, mean)).unwrap();
        executor.step().unwrap_or_else(|fault| panic!("{by:?}, {schedule:?}: {fault}"));
        let kernels: Vec<_> = executor.step_launches().iter().map(|launch| launch.kernel).collect();
        let launched = kernels.iter().any(|kernel| kernel.starts_with("layer_norm"));
        assert_eq!(launched, by != By::Products, "{kernels:?}");
        let products = kernels.iter().filter(|kernel| kernel.contains("hopper")).count();
        assert!(by != By::Products || products == 2, "{kernels:?}");
        (["x", "out"].map(|name| executor.read(name).unwrap()), by_name)
    }

    /// The root of the mean square of the result's error, given what was normalised.
    fn error(&self, [x, out]: &[Vec<f32>; 2], weights: &HashMap<String, Numbers>) -> f64 {
        let [_, channels, outputs] = self.channels;
        let gated = self.activation == Activation::Geglu;
        let results = if gated { outputs / 2 } else { outputs };
        let [scale, shift, matrix, bias] =
            ["norm.weight", "norm.bias", "layer.weight", "layer.bias"].map(|name| &weights[name]);
        let errors = x.chunks_exact(channels).zip(out.chunks_exact(results)).flat_map(|(x, out)| {
            let x: Numbers = x.iter().map(|&x| f64::from(x)).collect();
            let mean = x.iter().sum::<f64>() / channels as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / channels as f64;
            let affine = scale.iter().zip(shift);
            let normal = x.iter().zip(affine).map(|(x, (w, b))| (x - mean) / (variance + EPS as f64).sqrt() * w + b);
            let normal: Numbers = normal.collect();
            let product = |row: usize| {
                let row_of_matrix = &matrix[row * channels..][..channels];
                row_of_matrix.iter().zip(&normal).map(|(w, x)| w * x).sum::<f64>() + bias[row]
            };
            let right = |channel: usize| match gated {
                true => product(channel) * activated(product(results + channel), Activation::Gelu),
                false => activated(product(channel), self.activation),
            };
            out.iter().enumerate().map(|(channel, &y)| (f64::from(y) - right(channel)).powi(2)).collect::<Numbers>()
        });
        let errors: Numbers = errors.collect();
        (errors.iter().sum::<f64>() / errors.len() as f64).sqrt()
    }
}

/// A layer norm between two products of 9.0 has no launch, and the result is no further off than where it has one: there
/// the norm's result is rounded to fp16, here the scaled weights are. Also where rows are far from 0.
#[test]
fn a_layer_norm_between_products() {
    if support::gpu().is_some() {
        return;
    }
    let cases = [
        Between { size: (9, 17), channels: [384, 320, 328], activation: Activation::None },
        Between { size: (1, 203), channels: [448, 192, 264], activation: Activation::QuickGelu },
        Between { size: (7, 19), channels: [320, 640, 336], activation: Activation::Geglu },
        Between { size: (1, 131), channels: [384, 1024, 168], activation: Activation::None },
        Between { size: (5, 27), channels: [384, 1280, 176], activation: Activation::None },
        Between { size: (1, 3), channels: [128, 64, 8], activation: Activation::None },
    ];
    for case in cases {
        for mean in [0.0, 20.0] {
            let error = |by| {
                let (made, weights) = case.run(2, mean, by, Schedule::QUICK);
                case.error(&made, &weights)
            };
            let [products, launch, all] = [By::Products, By::Launch, By::All].map(error);
            let label = format!("{:?} to {:?}, mean {mean}", case.size, case.channels);
            println!("{label}: {products:.2e} by products, {launch:.2e} by a launch, {all:.2e} with scale and shift");
            assert!(products <= all, "{label}");
            assert!(launch <= 1.2 * all, "{label}");
        }
    }
}

/// The bits of a norm between products depend on no schedule, nor on the images beside it.
#[test]
fn a_layer_norm_between_products_in_a_batch() {
    if support::gpu().is_some() {
        return;
    }
    for (size, channels, activation) in
        [((9, 17), [384, 320, 168], Activation::None), ((7, 19), [320, 640, 336], Activation::Geglu)]
    {
        let case = Between { size, channels, activation };
        let (alone, _) = case.run(1, 20.0, By::Products, Schedule::QUICK);
        for schedule in Schedule::hostile(9) {
            let (batch, _) = case.run(3, 20.0, By::Products, schedule);
            for (alone, batch) in alone.iter().zip(&batch) {
                let same = alone.iter().zip(batch).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{size:?}, {schedule:?}");
            }
        }
    }
}
