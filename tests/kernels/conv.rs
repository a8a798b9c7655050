//! `kernels/conv.cu` and `kernels/conv_hopper.cu`.

use super::*;
use respodiff::backend::Executor;
use respodiff::graph::{Activation, ConvOptions, Extent, Sources, View};

/// Channels of other layers in front of those that are added per image: not a multiple of 16 bytes.
const OTHERS: usize = 10;

/// A convolution and the size on which it is tried.
#[derive(Clone, Debug)]
struct Case {
    images: usize,
    size: (usize, usize),
    channels: usize,
    skip: usize,
    outputs: usize,
    per_image: bool,
    residual: bool,
    /// True if something reads the result, which is then fp16.
    read: bool,
    options: ConvOptions,
}

/// Resizes a source to this height and width.
fn to(h: usize, w: usize) -> Option<Extent> {
    Some(Extent { h, w })
}

impl Case {
    fn linear(tokens: usize, channels: usize, outputs: usize) -> Self {
        let options = ConvOptions::default();
        let (size, read) = ((1, tokens), true);
        Case { images: 2, size, channels, skip: 0, outputs, per_image: false, residual: false, read, options }
    }

    fn conv3x3(size: (usize, usize), channels: usize, outputs: usize) -> Self {
        Case { size, options: ConvOptions::conv3x3(), ..Self::linear(0, channels, outputs) }
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn gated(&self) -> bool {
        self.options.activation == Activation::Geglu
    }

    /// Height and width of the source after the resize.
    fn seen(&self) -> (usize, usize) {
        self.options.resize.map_or(self.size, |Extent { h, w }| (h, w))
    }

    /// The result's shape.
    fn shape(&self) -> Shape {
        let (h, w) = self.seen();
        let o = &self.options;
        let span = |size: usize| (size + o.pad + o.pad_end - o.kernel) / o.stride + 1;
        Shape::new(self.images, span(h), span(w), if self.gated() { self.outputs / 2 } else { self.outputs })
    }

    /// The inputs' shapes: first source, second source, per-image row, residual.
    fn shapes(&self) -> Vec<Shape> {
        let (n, (h, w), out) = (self.images, self.size, self.shape());
        let mut shapes = vec![Shape::new(n, h, w, self.channels)];
        shapes.extend((self.skip > 0).then_some(Shape::new(n, h, w, self.skip)));
        shapes.extend(self.per_image.then_some(Shape::new(n, 1, 1, OTHERS + out.c)));
        shapes.extend(self.residual.then_some(out));
        shapes
    }

    fn build(&self, g: &mut GraphBuilder, inputs: &[TensorId]) -> TensorId {
        let mut inputs = inputs.iter().copied();
        let x = inputs.next().unwrap();
        let skip = (self.skip > 0).then(|| inputs.next().unwrap());
        let per_image = self.per_image.then(|| inputs.next().unwrap());
        let residual = self.residual.then(|| inputs.next().unwrap());
        let per_image = per_image.map(|tensor| View { tensor, offset: OTHERS });
        let options = ConvOptions { per_image, residual, ..self.options.clone() };
        let out = g.conv("conv", Sources { x, skip }, self.outputs, options);
        if self.read {
            g.activate("reader", out, Activation::Silu);
        }
        out
    }

    /// The definition, a loop in f64.
    fn plain(&self, given: &Given, round: Round) -> Numbers {
        let (o, out, (h, w)) = (&self.options, self.shape(), self.size);
        let (seen_h, seen_w) = self.seen();
        let inputs = self.channels + self.skip;
        let weight = &given.weights["conv.weight"];
        let bias = o.bias.then(|| &given.weights["conv.bias"]);
        let rest = &given.inputs[1 + usize::from(self.skip > 0)..];
        let source = |image: usize, y: usize, x: usize, c: usize| {
            let pixel = (image * h + y) * w + x;
            if c < self.channels {
                given.inputs[0][pixel * self.channels + c]
            } else {
                given.inputs[1][pixel * self.skip + c - self.channels]
            }
        };
        let sum = |image: usize, oy: usize, ox: usize, column: usize| {
            let mut sum = 0.0;
            for (ky, kx) in (0..o.kernel).flat_map(|ky| (0..o.kernel).map(move |kx| (ky, kx))) {
                let (y, x) = ((oy * o.stride + ky).wrapping_sub(o.pad), (ox * o.stride + kx).wrapping_sub(o.pad));
                if y < seen_h && x < seen_w {
                    for c in 0..inputs {
                        let weight = weight[((column * inputs + c) * o.kernel + ky) * o.kernel + kx];
                        sum += weight * source(image, y * h / seen_h, x * w / seen_w, c);
                    }
                }
            }
            let bias = bias.map_or(0.0, |bias| bias[column]);
            round(round(sum) * o.gain as f64 + bias * o.bias_gain as f64)
        };
        let mut result = Vec::with_capacity(out.len());
        for row in 0..out.rows() {
            let (image, y, x) = (row / out.tokens(), row % out.tokens() / out.w, row % out.w);
            for c in 0..out.c {
                let mut value = sum(image, y, x, c);
                if self.per_image {
                    value = round(value + rest[0][image * (OTHERS + out.c) + OTHERS + c]);
                }
                value = match o.activation {
                    Activation::Geglu => value * round(activated(sum(image, y, x, out.c + c), Activation::Gelu)),
                    Activation::Relu => value,
                    other => activated(value, other),
                };
                if self.residual {
                    value = round(round(value) + rest[usize::from(self.per_image)][result.len()]);
                }
                if o.activation == Activation::Relu {
                    value = activated(value, Activation::Relu);
                }
                result.push(round(value * o.scale as f64));
            }
        }
        result
    }

    /// The gradient of the definition with respect to the first source, for stride 1: every output passes its part to
    /// the numbers that it read.
    fn plain_gradient(&self, given: &Given, round: Round) -> Numbers {
        let (o, out, (h, w)) = (&self.options, self.shape(), self.size);
        let (seen_h, seen_w) = self.seen();
        let (weight, inputs) = (&given.weights["conv.weight"], self.channels + self.skip);
        let d = given.inputs.last().unwrap();
        let mut seen = vec![0.0; self.images * seen_h * seen_w * self.channels];
        for row in 0..out.rows() {
            let (image, oy, ox) = (row / out.tokens(), row % out.tokens() / out.w, row % out.w);
            for (ky, kx) in (0..o.kernel).flat_map(|ky| (0..o.kernel).map(move |kx| (ky, kx))) {
                let (y, x) = ((oy + ky).wrapping_sub(o.pad), (ox + kx).wrapping_sub(o.pad));
                if y >= seen_h || x >= seen_w {
                    continue;
                }
                let to = &mut seen[((image * seen_h + y) * seen_w + x) * self.channels..][..self.channels];
                for (c, to) in to.iter_mut().enumerate() {
                    let at = |column: usize| ((column * inputs + c) * o.kernel + ky) * o.kernel + kx;
                    *to += (0..out.c).map(|column| weight[at(column)] * d[row * out.c + column]).sum::<f64>();
                }
            }
        }
        let mut result = vec![0.0; self.images * h * w * self.channels];
        for (i, x) in seen.into_iter().enumerate() {
            let (pixel, c) = (i / self.channels, i % self.channels);
            let (image, y, x0) = (pixel / seen_w / seen_h, pixel / seen_w % seen_h, pixel % seen_w);
            let to = ((image * h + y * h / seen_h) * w + x0 * w / seen_w) * self.channels + c;
            result[to] += round(x * o.gain as f64);
        }
        result.into_iter().map(round).collect()
    }

    /// Checks on a device with few multiprocessors, where tiles are large, and on one with so many that sums are split
    /// (split-K). Sources of a multiple of 64 channels are also checked on compute capability 9.0, which has kernels of
    /// its own for them.
    fn check(&self) {
        let shapes = self.shapes();
        let hopper = (self.channels.is_multiple_of(64) && self.skip.is_multiple_of(64)).then_some(Limits::H100);
        let devices = [Limits::A100].into_iter().chain(hopper);
        for (limits, multiprocessors) in devices.flat_map(|limits| [(limits, 1), (limits, 108)]) {
            let inputs = shapes.iter().enumerate().map(|(i, shape)| random(shape.len(), 5 + i as u64)).collect();
            check_with(
                Limits { multiprocessors, ..limits },
                &format!("{multiprocessors} multiprocessors of {}, {self:?}", limits.capability),
                &shapes,
                inputs,
                |g, x| self.build(g, x),
                |given, round| self.plain(given, round),
            );
        }
    }
}

#[test]
fn linear_layers() {
    for (tokens, channels, outputs) in [(1, 320, 128), (13, 40, 24), (77, 64, 80), (100, 96, 200)] {
        Case::linear(tokens, channels, outputs).check();
    }
    Case::linear(77, 768, 64).with(|c| c.options.bias = false).check();
    // Neither channels nor columns are a multiple of eight; then one number in, one out.
    Case::linear(5, 7, 3).check();
    Case::linear(1, 1, 1).with(|c| c.images = 1).check();
    Case::linear(33, 100, 37).with(|c| (c.residual, c.images) = (true, 3)).check();
}

#[test]
fn convolutions() {
    Case::conv3x3((8, 8), 32, 48).check();
    Case::conv3x3((5, 7), 64, 160).with(|c| (c.per_image, c.residual, c.images) = (true, true, 3)).check();
    // The first and last layers of a UNet and of a VAE.
    Case::conv3x3((9, 6), 4, 64).check();
    Case::conv3x3((9, 6), 64, 4).with(|c| c.read = false).check();
    Case::conv3x3((10, 14), 16, 3).with(|c| (c.read, c.images) = (false, 1)).check();
    // One pixel: all taps except one are in the padding.
    Case::conv3x3((1, 1), 24, 16).check();
}

/// Shapes that the kernels of 9.0 support at any size: several rectangular tiles, of one image and of several, two
/// sources, gates.
#[test]
fn tiles_of_warpgroups() {
    Case::conv3x3((8, 8), 64, 160).with(|c| (c.skip, c.residual, c.images) = (64, true, 3)).check();
    Case::conv3x3((19, 17), 64, 96).with(|c| (c.per_image, c.images) = (true, 1)).check();
    Case::conv3x3((3, 131), 64, 40).check();
    Case::conv3x3((10, 14), 64, 96).with(|c| (c.options.stride, c.images) = (2, 3)).check();
    Case::linear(150, 128, 320).with(|c| (c.per_image, c.residual) = (true, true)).check();
    Case::linear(130, 64, 320).with(|c| c.options.activation = Activation::Geglu).check();
    Case::linear(67, 640, 96).check();
    // An upsampled source, whose taps are summed before they are rounded.
    Case::conv3x3((5, 7), 64, 96).with(|c| c.options.resize = to(10, 14)).check();
    Case::conv3x3((9, 19), 128, 200).with(|c| (c.images, c.options.resize) = (3, to(18, 38))).check();
}

#[test]
fn strides_and_paddings() {
    for (size, pad, pad_end) in [((8, 8), 1, 1), ((7, 5), 1, 1), ((8, 6), 0, 1), ((9, 7), 0, 1)] {
        let stride = |c: &mut Case| (c.options.stride, c.options.pad, c.options.pad_end) = (2, pad, pad_end);
        Case::conv3x3(size, 16, 24).with(stride).check();
    }
    Case::conv3x3((6, 6), 8, 8).with(|c| (c.options.kernel, c.options.stride) = (1, 2)).check();
}

#[test]
fn resized_sources() {
    for (size, resize) in [((4, 4), to(8, 8)), ((3, 5), to(6, 10)), ((4, 3), to(7, 5)), ((5, 5), to(9, 5))] {
        Case::conv3x3(size, 16, 16).with(|c| c.options.resize = resize).check();
    }
}

/// Sources that are upsampled by exactly two, which are computed as four products: with channels that are not whole
/// chunks, with the whole epilogue, with two sources, and with split sums.
#[test]
fn upsampled_sources() {
    let upsampled = |(h, w), channels, outputs| {
        Case::conv3x3((h, w), channels, outputs).with(|c| c.options.resize = to(2 * h, 2 * w))
    };
    upsampled((1, 1), 8, 8).check();
    upsampled((4, 3), 7, 5).check();
    upsampled((3, 5), 24, 88).with(|c| (c.per_image, c.residual, c.images) = (true, true, 3)).check();
    upsampled((5, 2), 16, 24).with(|c| c.skip = 40).check();
    upsampled((3, 3), 12, 10).with(|c| (c.skip, c.residual) = (5, true)).check();
    upsampled((2, 3), 320, 72).with(|c| (c.images, c.options.activation) = (1, Activation::Silu)).check();
}

#[test]
fn concatenated_sources() {
    for (channels, skip) in [(16, 8), (40, 72), (12, 20), (4, 3), (64, 128)] {
        Case::conv3x3((5, 4), channels, 16).with(|c| c.skip = skip).check();
        Case::linear(11, channels, 24).with(|c| c.skip = skip).check();
    }
}

#[test]
fn activations_and_gains() {
    for activation in
        [Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::Relu, Activation::FromUnit]
    {
        Case::linear(20, 48, 40)
            .with(|c| {
                (c.options.activation, c.per_image, c.residual) = (activation, true, true);
                (c.options.gain, c.options.bias_gain, c.options.scale) = (0.25, 1.5, 0.7);
            })
            .check();
    }
}

#[test]
fn gated_layers() {
    for (tokens, channels, outputs) in [(20, 64, 320), (9, 40, 80), (3, 320, 48), (6, 16, 20), (5, 6, 6)] {
        Case::linear(tokens, channels, outputs).with(|c| c.options.activation = Activation::Geglu).check();
    }
    Case::linear(9, 512, 64)
        .with(|c| {
            (c.options.activation, c.residual, c.images) = (Activation::Geglu, true, 1);
            (c.options.gain, c.options.bias_gain, c.options.scale) = (2.0, 0.5, 1.25);
        })
        .check();
}

/// The data gradient: with respect to the first source alone, as in the up half of a UNet, and through a resize, to the
/// smaller size.
#[test]
fn gradients() {
    let conv3x3 = |size, channels, outputs| Case::conv3x3(size, channels, outputs);
    for case in [
        Case::linear(13, 40, 24),
        Case::linear(5, 7, 3),
        Case::linear(33, 100, 37).with(|c| c.images = 3),
        Case::linear(11, 40, 24).with(|c| c.skip = 16),
        conv3x3((8, 8), 32, 48),
        conv3x3((5, 7), 64, 4),
        conv3x3((5, 4), 12, 20).with(|c| (c.skip, c.images) = (9, 3)),
        conv3x3((5, 4), 40, 64).with(|c| (c.skip, c.per_image, c.options.gain) = (72, true, 0.25)),
        conv3x3((1, 1), 24, 16),
        conv3x3((4, 4), 16, 24).with(|c| c.options.resize = to(8, 8)),
        conv3x3((4, 3), 16, 16).with(|c| c.options.resize = to(7, 5)),
        conv3x3((5, 5), 7, 9).with(|c| c.options.resize = to(9, 5)),
    ] {
        let (shapes, seed) = (case.shapes(), case.shape());
        let inputs = shapes.iter().chain([&seed]).enumerate().map(|(i, shape)| random(shape.len(), 5 + i as u64));
        check_gradient(
            Limits::A100,
            &format!("{case:?}"),
            &shapes,
            inputs.collect(),
            |g, x| case.build(g, x),
            |given, round| case.plain_gradient(given, round),
        );
    }
}

/// In fp16 results, numbers beyond fp16's range saturate.
#[test]
fn saturation() {
    let case = Case::linear(4, 64, 16).with(|c| c.options.gain = 1e6);
    check(
        "saturation",
        &case.shapes(),
        |g, x| case.build(g, x),
        |given, round| case.plain(given, round).into_iter().map(to_half).collect(),
    );
}

/// The bottleneck: a convolution whose result is used as it is, and with the shift of every conditional image added.
#[test]
fn bottleneck() {
    for (channels, images, shifted) in [(64, 2, 1), (320, 4, 2), (20, 3, 3)] {
        let case = Case::conv3x3((3, 4), channels, channels).with(|c| {
            (c.images, c.per_image, c.residual, c.options.scale) = (images, true, true, 0.5);
        });
        let mut shapes = case.shapes();
        shapes.push(Shape { n: shifted, ..case.shape() });
        for with_shift in [false, true] {
            check(
                &format!("bottleneck, {channels} channels, {shifted} of {images} images, {with_shift}"),
                &shapes,
                |g, x| {
                    let mid = case.build(g, x);
                    let out = g.shift("shift", mid, x[3]);
                    g.output("mid", mid);
                    g.output("shifted", out);
                    if with_shift { out } else { mid }
                },
                |given, round| {
                    let mut mid = case.plain(given, round);
                    let first = mid.len() - given.inputs[3].len();
                    if with_shift {
                        mid[first..].iter_mut().zip(&given.inputs[3]).for_each(|(x, s)| *x = round(*x + s));
                    }
                    mid
                },
            );
        }
    }
}

/// An image gives the same bits alone and in a batch.
#[test]
fn batch_invariance() {
    let cases = [
        Case::linear(77, 768, 96),
        Case::linear(1, 1280, 64),
        Case::conv3x3((8, 8), 160, 40),
        Case::conv3x3((4, 4), 320, 160),
        Case::conv3x3((4, 3), 320, 40).with(|c| c.options.resize = to(8, 6)),
    ];
    for case in cases {
        let run = |images: usize| {
            let case = case.clone().with(|c| c.images = images);
            let mut g = GraphBuilder::new();
            let x = g.input("x", case.shapes()[0]);
            let out = case.build(&mut g, &[x]);
            g.output("out", out);
            let graph = g.finish();
            let (folder, _) = weights(&graph);
            let tensors = Source::folder(folder.path()).unwrap().tensors("unet").unwrap();
            let device = Emulated::new(Limits::A100, Schedule::QUICK);
            let weights = CudaWeights::load(&device, graph.weights(), &tensors).unwrap();
            let plan = Arc::new(Plan::new(graph, &[], &device.limits()));
            let mut executor = CudaExecutor::new(&device, plan, weights).unwrap();
            // Image i is the same in every batch.
            let numbers = random(5 * case.shapes()[0].len() / images, 3);
            let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
            executor.write("x", &numbers[..case.shapes()[0].len()]).unwrap();
            executor.step().unwrap();
            executor.read("out").unwrap()
        };
        let alone = run(1);
        for images in [2, 5] {
            let among = run(images);
            let same = alone.iter().zip(&among).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{case:?}: alone and among {images} images");
        }
    }
}
