//! `kernels/layer_norm.cu`, and layer norms that `kernels/conv_hopper.cu` computes without a launch.

use super::group_norm::{EPS, gradient_of};
use super::*;
use respodiff::backend::Executor;
use respodiff::graph::{Activation, ConvOptions};

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

/// A matrix product with a residual, a layer norm of it, and a product of the norm, as in transformer layers. `size`
/// are the rows; `channels` are those of the source, of the norm and of the result.
struct Between {
    size: (usize, usize),
    channels: [usize; 3],
    activation: Activation,
}

/// The way in which the norm between the products is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    /// By the products on either side of it, without a launch.
    Products,
    /// By a launch that only normalises: scale and shift are in the second product's weights, as they are whenever TMA
    /// can fetch the norm's channels, but here TMA cannot fetch those of the first product's source.
    Launch,
    /// By a launch with scale and shift, since something else reads its result.
    All,
}

impl Between {
    /// Returns the tensor that was normalised, and the result. The residual's numbers are within 1 of `mean`.
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
        // Few multiprocessors, so that blocks compute several tiles, and large tiles are the fastest for small products
        // too.
        let limits = Limits { multiprocessors: 3, ..Limits::H100 };
        let device: Arc<dyn CudaDevice> = Emulated::new(limits, schedule);
        let (folder, by_name) = weights(&graph);
        let tensors = Source::folder(folder.path()).unwrap().tensors("unet").unwrap();
        let weights = CudaWeights::load(&device, graph.weights(), &tensors).unwrap();
        let mut executor = CudaExecutor::new(&device, Arc::new(Plan::new(graph, &[], &limits)), weights).unwrap();
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

    /// The root mean square of the result's error, given the tensor that was normalised.
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

/// A layer norm between two products on 9.0 has no launch, and the error of the result is no greater than with one:
/// with a launch the norm's result is rounded to fp16, without one the scaled weights are. This also holds where rows
/// are far from 0.
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

/// The bits of a norm between products depend neither on the schedule nor on the images beside it.
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
