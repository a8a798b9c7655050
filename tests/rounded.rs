//! Linear layers in bf16 and in 8-bit integers, compared with the same layers in float64: their errors are those of
//! rounding, and their results are the same bit for bit with any batch and any number of threads.

mod support;

use respodiff::backend::{Executor, Precision};
use respodiff::cpu::{CpuExecutor, CpuWeights, Fp32};
use respodiff::graph::{Activation, ConvOptions, GraphBuilder, Shape, Sources};
use respodiff::plan::Plan;
use respodiff::weights::Source;
use safetensors::Dtype;
use std::collections::HashMap;
use std::sync::Arc;
use support::{Numbers, narrow, random, relative_l2, weights};

/// A 1x1 convolution of two sources, gated or with a residual.
#[derive(Clone, Copy, Debug)]
struct Case {
    x: Shape,
    skip: usize,
    outputs: usize,
    gated: bool,
    format: Dtype,
    precision: Precision,
}

impl Case {
    /// The channels of the output, which are half of `outputs` if the layer is gated.
    fn width(self) -> usize {
        if self.gated { self.outputs / 2 } else { self.outputs }
    }

    fn run(self, [x, skip, residual]: &[Numbers; 3], images: usize) -> (Vec<f32>, HashMap<String, Numbers>) {
        let mut g = GraphBuilder::new();
        let shape = Shape { n: images, ..self.x };
        let sources = Sources {
            x: g.input("x", shape),
            skip: (self.skip > 0).then(|| g.input("skip", Shape { c: self.skip, ..shape })),
        };
        let mut options = ConvOptions::default();
        if self.gated {
            options.activation = Activation::Geglu;
        } else {
            options.residual = Some(g.input("residual", Shape { c: self.outputs, ..shape }));
        }
        let y = g.conv("a", sources, self.outputs, options);
        g.output("y", y);
        let graph = g.finish();
        let (folder, by_name) = weights(&graph, self.format);
        let tensors = Source::folder(folder.path()).unwrap().tensors("unet").unwrap();
        let plan = Arc::new(Plan::new(graph, &[], &Fp32));
        let loaded = CpuWeights::load(plan.graph().weights(), &tensors, &[], self.precision).unwrap();
        let mut executor = CpuExecutor::new(plan.clone(), loaded).unwrap();
        for (name, numbers) in [("x", x), ("skip", skip), ("residual", residual)] {
            if plan.graph().find_input(name).is_some() {
                executor.write(name, &narrow(numbers)).unwrap();
            }
        }
        executor.step().unwrap();
        (executor.output("y").to_vec(), by_name)
    }

    fn numbers(self) -> [Numbers; 3] {
        let rows = self.x.rows();
        [random(rows * self.x.c, 5), random(rows * self.skip, 6), random(rows * self.outputs, 7)]
    }

    fn plain(self, [x, skip, residual]: &[Numbers; 3], by_name: &HashMap<String, Numbers>) -> Numbers {
        let (weight, bias) = (&by_name["a.weight"], &by_name["a.bias"]);
        let depth = self.x.c + self.skip;
        let value = |row: usize, o: usize| {
            let ours = x[row * self.x.c..][..self.x.c].iter().chain(&skip[row * self.skip..][..self.skip]);
            bias[o] + ours.zip(&weight[o * depth..]).map(|(x, w)| x * w).sum::<f64>()
        };
        let out = |place: usize| {
            let (row, o) = (place / self.width(), place % self.width());
            match self.gated {
                // GELU in its tanh form is off by at most 5e-4, a twentieth of the expected rounding error.
                true => {
                    let gate = value(row, self.width() + o);
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
                    value(row, o) * 0.5 * gate * (1.0 + inner.tanh())
                }
                false => value(row, o) + residual[place],
            }
        };
        (0..self.x.rows() * self.width()).map(out).collect()
    }
}

fn cases() -> Vec<Case> {
    let precision = Precision::Int8;
    let base = Case { x: Shape::new(2, 5, 7, 64), skip: 0, outputs: 40, gated: false, format: Dtype::F32, precision };
    let cases = [
        base,
        Case { format: Dtype::F16, ..base },
        // One column beyond a panel, one row beyond a tile, and a second source.
        Case { x: Shape::new(3, 1, 13, 36), skip: 20, outputs: 33, format: Dtype::F16, ..base },
        // More rows than a task takes, and then so many inputs that a task takes fewer rows.
        Case { x: Shape::new(3, 11, 10, 48), outputs: 5, ..base },
        Case { x: Shape::new(2, 1, 60, 8192), outputs: 65, format: Dtype::F16, ..base },
        Case { x: Shape::new(2, 1, 21, 128), outputs: 160, gated: true, ..base },
    ];
    let others = cases.map(|case| Case { precision: Precision::Bf16, ..case });
    cases.into_iter().chain(others).collect()
}

#[test]
fn linear_layers_are_off_by_rounding_alone() {
    for case in cases() {
        let numbers = case.numbers();
        let (ours, by_name) = case.run(&numbers, case.x.n);
        let error = relative_l2(&ours, &narrow(&case.plain(&numbers, &by_name)));
        println!("{error:.1e} {case:?}");
        // The relative rounding error of uniform numbers. For integers, a step is 1/127 of the largest number, rounding
        // is off by 1/sqrt(12) of a step, and the root mean square of the numbers is 1/sqrt(3). For bf16, a step is
        // 2^-8 to 2^-7 of a number. A product has two rounded factors, and a gate is a further factor.
        let rounding = match case.precision {
            Precision::Int8 => 1.0 / 127.0 / 2.0,
            _ => 0.75 * 2f64.powi(-7) / 12f64.sqrt(),
        };
        let expected = 2f64.sqrt() * rounding * if case.gated { 2.0 } else { 1.0 };
        assert!((0.5..1.5).contains(&(error / expected)), "{case:?}: off by {error:e}");
    }
}

#[test]
fn neither_batch_nor_threads_change_a_bit() {
    for case in cases() {
        let numbers = case.numbers();
        let all = case.run(&numbers, case.x.n).0;
        for threads in [1, 3, 64] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert!(pool.install(|| case.run(&numbers, case.x.n).0) == all, "{case:?}: on {threads} threads");
        }
        for image in 0..case.x.n {
            let of = |numbers: &Numbers| {
                let each = numbers.len() / case.x.n;
                numbers[image * each..][..each].to_vec()
            };
            let alone = case.run(&numbers.each_ref().map(of), 1).0;
            assert!(alone == all[image * alone.len()..][..alone.len()], "{case:?}: image {image}");
        }
    }
}

/// NaN among the inputs of a row makes all outputs of that row NaN, and those of no other row.
#[test]
fn nan_stays_visible() {
    for case in cases().into_iter().filter(|case| !case.gated && case.x.c == 64) {
        let mut numbers = case.numbers();
        numbers[0][3 * case.x.c + 9] = f64::NAN;
        for (row, out) in case.run(&numbers, case.x.n).0.chunks_exact(case.outputs).enumerate() {
            assert!(out.iter().all(|x| x.is_nan() == (row == 3)), "{case:?}, row {row}");
        }
    }
}

#[cfg(feature = "emulated")]
#[test]
fn kernels_have_their_own_precision() {
    let none = respodiff::weights::Tensors::random();
    for precision in [Precision::Bf16, Precision::Int8] {
        let refused = support::kernels().weights(&[], &none, &[], precision);
        assert!(refused.is_err_and(|e| e.kind() == respodiff::ErrorKind::Invalid));
    }
}
