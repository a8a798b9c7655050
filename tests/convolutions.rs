//! Convolutions on the CPU, by Winograd's algorithm and by implicit im2col, compared with plain f64 loops on odd
//! shapes. An image of a batch equals the same image alone bit for bit, on any number of threads.

mod support;

use respodiff::backend::{Executor, Precision};
use respodiff::cpu::{CpuExecutor, CpuWeights, Fp32};
use respodiff::graph::{Activation, ConvOptions, Extent, GraphBuilder, Shape, Sources, View};
use respodiff::plan::Plan;
use respodiff::weights::Source;
use safetensors::Dtype;
use std::collections::HashMap;
use std::sync::Arc;
use support::{Numbers, narrow, random, relative_l2, weights};

/// A 3x3 convolution with its epilogue, if it is `fused`. `skip` is the number of channels of a second source.
#[derive(Clone, Copy, Debug)]
struct Case {
    x: Shape,
    skip: usize,
    outputs: usize,
    stride: usize,
    pad: (usize, usize),
    resize: Option<Extent>,
    fused: bool,
    format: Dtype,
}

impl Case {
    /// The output for `x` and, if the convolution is fused, for a residual and a vector per image. All numbers are in
    /// the order of the images.
    fn run(self, x: &[f64], skip: &[f64], added: &[f64], images: usize) -> (Vec<f32>, HashMap<String, Numbers>) {
        let mut g = GraphBuilder::new();
        let shape = Shape { n: images, ..self.x };
        let inputs = Sources {
            x: g.input("x", shape),
            skip: (self.skip > 0).then(|| g.input("skip", Shape { c: self.skip, ..shape })),
        };
        let (h, w) = self.output();
        let mut options = ConvOptions {
            stride: self.stride,
            pad: self.pad.0,
            pad_end: self.pad.1,
            resize: self.resize,
            ..ConvOptions::conv3x3()
        };
        if self.fused {
            let vector = g.input("vector", Shape::new(images, 1, 1, self.outputs));
            options.per_image = Some(View::from(vector));
            options.residual = Some(g.input("residual", Shape::new(images, h, w, self.outputs)));
            (options.activation, options.scale) = (Activation::Silu, 0.75);
        }
        let y = g.conv("a", inputs, self.outputs, options);
        g.output("y", y);
        let graph = g.finish();
        let (folder, by_name) = weights(&graph, self.format);
        let tensors = Source::folder(folder.path()).unwrap().tensors("unet").unwrap();
        let plan = Arc::new(Plan::new(graph, &[], &Fp32));
        let loaded = CpuWeights::load(plan.graph().weights(), &tensors, &[], Precision::Full).unwrap();
        let mut executor = CpuExecutor::new(plan, loaded).unwrap();
        executor.write("x", &narrow(x)).unwrap();
        if self.skip > 0 {
            executor.write("skip", &narrow(skip)).unwrap();
        }
        if self.fused {
            let (residual, vector) = added.split_at(images * h * w * self.outputs);
            executor.write("residual", &narrow(residual)).unwrap();
            executor.write("vector", &narrow(vector)).unwrap();
        }
        executor.prologue().unwrap();
        executor.step().unwrap();
        (executor.output("y").to_vec(), by_name)
    }

    fn output(self) -> (usize, usize) {
        let Extent { h, w } = self.resize.unwrap_or(self.x.extent());
        let span = |size| (size + self.pad.0 + self.pad.1 - 3) / self.stride + 1;
        (span(h), span(w))
    }

    /// The inputs of all images: those of the source, those of the skip connection, and the residuals before the
    /// vectors.
    fn numbers(self) -> (Numbers, Numbers, Numbers) {
        let ((h, w), pixels) = (self.output(), self.x.rows());
        let round = |numbers: Numbers| narrow(&numbers).iter().map(|&x| x as f64).collect();
        let added = self.x.n * (h * w + 1) * self.outputs;
        (round(random(pixels * self.x.c, 5)), round(random(pixels * self.skip, 6)), round(random(added, 7)))
    }

    /// The same convolution by its definition.
    fn plain(self, by_name: &HashMap<String, Numbers>) -> Numbers {
        let (x, skip, added) = self.numbers();
        let ((h, w), seen) = (self.output(), self.resize.unwrap_or(self.x.extent()));
        let (c, outputs, inputs) = (self.x.c, self.outputs, self.x.c + self.skip);
        let (weight, bias) = (&by_name["a.weight"], &by_name["a.bias"]);
        let (residual, vector) = added.split_at(self.x.n * h * w * outputs);
        let mut out = vec![0.0; self.x.n * h * w * outputs];
        for (place, out) in out.iter_mut().enumerate() {
            let (row, o) = (place / outputs, place % outputs);
            let (n, oy, ox) = (row / (h * w), row / w % h, row % w);
            let mut sum = bias[o];
            for (ky, kx) in (0..9).map(|tap| (tap / 3, tap % 3)) {
                let (y, x0) = (oy * self.stride + ky, ox * self.stride + kx);
                let Some((y, x0)) = y.checked_sub(self.pad.0).zip(x0.checked_sub(self.pad.0)) else { continue };
                if y >= seen.h || x0 >= seen.w {
                    continue;
                }
                let pixel = (n * self.x.h + y * self.x.h / seen.h) * self.x.w + x0 * self.x.w / seen.w;
                for i in 0..inputs {
                    let number = if i < c { x[pixel * c + i] } else { skip[pixel * self.skip + i - c] };
                    sum += weight[(o * inputs + i) * 9 + ky * 3 + kx] * number;
                }
            }
            if self.fused {
                sum += vector[n * outputs + o];
                sum = (sum / (1.0 + (-sum).exp()) + residual[place]) * 0.75;
            }
            *out = sum;
        }
        out
    }
}

fn cases() -> Vec<Case> {
    let base = Case {
        x: Shape::new(2, 9, 11, 64),
        skip: 0,
        outputs: 40,
        stride: 1,
        pad: (1, 1),
        resize: None,
        fused: false,
        format: Dtype::F32,
    };
    let x = |n, h, w, c| Shape::new(n, h, w, c);
    vec![
        base,
        Case { format: Dtype::F16, ..base },
        // Two sources, the second of which begins inside a chunk of channels.
        Case { x: x(3, 8, 8, 80), skip: 112, outputs: 72, fused: true, ..base },
        Case { x: x(1, 5, 30, 48), skip: 16, outputs: 3, fused: true, format: Dtype::F16, ..base },
        // More tiles than a task takes.
        Case { x: x(5, 17, 21, 16), outputs: 70, ..base },
        // More tiles than are transformed together.
        Case { x: x(4, 16, 16, 2048), outputs: 5, ..base },
        // Sources of odd height and width that are doubled, and one that is resized otherwise.
        Case { x: x(2, 5, 7, 32), resize: Some(Extent { h: 10, w: 14 }), ..base },
        Case { x: x(2, 4, 4, 32), resize: Some(Extent::square(8)), fused: true, format: Dtype::F16, ..base },
        Case { x: x(2, 5, 7, 32), resize: Some(Extent { h: 9, w: 14 }), ..base },
        // Other paddings.
        Case { x: x(1, 9, 9, 16), pad: (0, 0), ..base },
        Case { x: x(1, 8, 10, 16), pad: (0, 2), ..base },
        Case { x: x(1, 7, 6, 32), resize: Some(Extent { h: 14, w: 12 }), pad: (0, 1), ..base },
        // Implicit im2col: few pixels, other numbers of channels, a stride.
        Case { x: x(2, 4, 4, 32), fused: true, ..base },
        Case { x: x(2, 9, 8, 20), skip: 13, fused: true, format: Dtype::F16, ..base },
        Case { x: x(2, 9, 8, 32), stride: 2, pad: (0, 1), format: Dtype::F16, ..base },
        Case { x: x(1, 3, 3, 800), outputs: 33, format: Dtype::F16, ..base },
    ]
}

#[test]
fn convolutions_are_what_plain_loops_make() {
    for case in cases() {
        let (x, skip, added) = case.numbers();
        let (ours, by_name) = case.run(&x, &skip, &added, case.x.n);
        let error = relative_l2(&ours, &narrow(&case.plain(&by_name)));
        println!("{error:.1e} {case:?}");
        // The rounding error grows with the square root of the number of addends.
        let limit = 3e-7 * ((case.x.c + case.skip) as f64).sqrt();
        assert!(error < limit, "{case:?}: off by {error:e}");
    }
}

#[test]
fn neither_batch_nor_threads_change_a_bit() {
    for case in cases() {
        let (x, skip, added) = case.numbers();
        let all = case.run(&x, &skip, &added, case.x.n).0;
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| case.run(&x, &skip, &added, case.x.n).0)
        };
        assert!([1, 3, 64].into_iter().all(|threads| on(threads) == all), "{case:?}: by the threads");
        let (residual, vector) = added.split_at(added.len() - case.x.n * case.outputs);
        for image in 0..case.x.n {
            let of = |numbers: &[f64]| {
                let each = numbers.len() / case.x.n;
                numbers[image * each..][..each].to_vec()
            };
            let added = [of(residual), of(vector)].concat();
            let alone = case.run(&of(&x), &of(&skip), &added, 1).0;
            let each = alone.len();
            assert!(alone == all[image * each..][..each], "{case:?}: by the batch, image {image}");
        }
    }
}
