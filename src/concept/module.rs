//! Modules: the learnt functions whose value at the bottleneck is added to it.
//!
//! The method's own module is a constant, which does not depend on the bottleneck. The networks are for the paper's
//! ablation. The paper does not publish their sizes, so these are ours: `mlp` is two layers at each pixel, `conv` three
//! 3x3 convolutions, both with [`HIDDEN_DIVISOR`] times fewer channels inside, SiLU between the layers, and a last
//! layer that starts at zero.

use crate::cpu::{silu, silu_slope};
use crate::graph::Shape;

/// The number of channels of the bottleneck per hidden channel of a network.
const HIDDEN_DIVISOR: usize = 2;

/// The kind of function that a module computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Form {
    /// One learnt tensor of the bottleneck's shape.
    Constant,
    /// Two linear layers at each pixel.
    Mlp,
    /// Three 3x3 convolutions.
    Conv,
}

/// One layer of a network: weights `[out][k * k][in]`, then biases.
#[derive(Clone, Copy, Debug)]
struct Layer {
    kernel: usize,
    inputs: usize,
    outputs: usize,
}

impl Layer {
    fn len(self) -> usize {
        self.outputs * (self.kernel * self.kernel * self.inputs + 1)
    }
}

/// A learnt function from the bottleneck `[n, h, w, c]` to what is added to it.
#[derive(Clone, Debug)]
pub struct Module {
    form: Form,
    /// Shape of one image's bottleneck; `n` is 1.
    shape: Shape,
    /// The learnt numbers: of a constant `[h, w, c]`, of a network the weights and then the biases of each layer.
    pub parameters: Vec<f32>,
}

impl Module {
    /// A module for a bottleneck of `shape`, whose value is zero until it is trained. `draw` gives numbers in -1..1,
    /// which initialise the inner layers of networks.
    pub fn new(form: Form, shape: Shape, mut draw: impl FnMut() -> f32) -> Self {
        let shape = Shape { n: 1, ..shape };
        let mut module = Module { form, shape, parameters: Vec::new() };
        if form == Form::Constant {
            module.parameters = vec![0.0; shape.len()];
            return module;
        }
        let layers = module.layers();
        for (i, layer) in layers.iter().enumerate() {
            let inputs = layer.kernel * layer.kernel * layer.inputs;
            // The uniform bound of He et al. (arXiv 1502.01852) for ReLU: SiLU, too, passes about half of its input.
            let bound = if i + 1 < layers.len() { (6.0 / inputs as f32).sqrt() } else { 0.0 };
            module.parameters.extend((0..layer.outputs * inputs).map(|_| bound * draw()));
            module.parameters.extend(std::iter::repeat_n(0.0, layer.outputs));
        }
        module
    }

    /// A module with given parameters; `None` if their number is not that of the form.
    pub fn with_parameters(form: Form, shape: Shape, parameters: Vec<f32>) -> Option<Self> {
        Some(Module { form, shape: Shape { n: 1, ..shape }, parameters }).filter(Module::is_whole)
    }

    /// True if there are as many parameters as the form has.
    fn is_whole(&self) -> bool {
        let wanted: usize = match self.form {
            Form::Constant => self.shape.len(),
            _ => self.layers().iter().map(|layer| layer.len()).sum(),
        };
        self.parameters.len() == wanted
    }

    /// The same module for a bottleneck of another size and as many channels; `None` if it has too few or too many
    /// parameters. A constant is resampled, and a network is the same at every size.
    pub(super) fn at_size(&self, shape: Shape) -> Option<Self> {
        let parameters = match self.form {
            _ if !self.is_whole() => return None,
            Form::Constant => resample(&self.parameters, self.shape, shape),
            _ => self.parameters.clone(),
        };
        Self::with_parameters(self.form, shape, parameters)
    }

    /// The kind of function that it is.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Shape of one image's bottleneck.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    fn layers(&self) -> Vec<Layer> {
        let c = self.shape.c;
        let hidden = (c / HIDDEN_DIVISOR).max(1);
        let layer = |kernel, inputs, outputs| Layer { kernel, inputs, outputs };
        match self.form {
            Form::Constant => vec![],
            Form::Mlp => vec![layer(1, c, hidden), layer(1, hidden, c)],
            Form::Conv => vec![layer(3, c, hidden), layer(3, hidden, hidden), layer(3, hidden, c)],
        }
    }

    /// Adds `weight` times the module's value at the bottleneck `mid` to `out`, both `[h, w, c]` of one image.
    pub fn add_to(&self, mid: &[f32], weight: f32, out: &mut [f32]) {
        let add = |out: &mut [f32], value: &[f32]| out.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
        match self.form {
            Form::Constant => add(out, &self.parameters),
            _ => add(out, self.activations(mid).last().map_or(&[][..], |v| v)),
        }
    }

    /// The gradient with respect to the parameters, given the gradient `d` with respect to the module's value at `mid`;
    /// both `mid` and `d` are of any number of images. The gradient with respect to `mid` is not needed, since the
    /// layers before the bottleneck are frozen.
    pub fn gradient(&self, mid: &[f32], d: &[f32]) -> Vec<f32> {
        let one = self.shape.len();
        let mut gradient = vec![0.0; self.parameters.len()];
        for (mid, d) in mid.chunks_exact(one).zip(d.chunks_exact(one)) {
            match self.form {
                Form::Constant => gradient.iter_mut().zip(d).for_each(|(g, d)| *g += d),
                _ => self.network_gradient(mid, d, &mut gradient),
            }
        }
        gradient
    }

    /// Outputs of every layer for one image, before SiLU.
    fn activations(&self, mid: &[f32]) -> Vec<Vec<f32>> {
        let mut results: Vec<Vec<f32>> = Vec::new();
        let mut start = 0;
        for layer in self.layers() {
            let input = results.last().map_or_else(|| mid.to_vec(), |x| x.iter().map(|&x| silu(x)).collect());
            let (weights, biases) = self.parameters[start..start + layer.len()].split_at(layer.len() - layer.outputs);
            let mut out = vec![0.0; self.shape.tokens() * layer.outputs];
            out.chunks_exact_mut(layer.outputs).for_each(|pixel| pixel.copy_from_slice(biases));
            self.taps(layer, |tap, from, to| {
                let x = &input[from * layer.inputs..][..layer.inputs];
                let out = &mut out[to * layer.outputs..][..layer.outputs];
                for (o, out) in out.iter_mut().enumerate() {
                    let row = &weights[(o * layer.kernel * layer.kernel + tap) * layer.inputs..][..layer.inputs];
                    *out += dot(row, x);
                }
            });
            start += layer.len();
            results.push(out);
        }
        results
    }

    fn network_gradient(&self, mid: &[f32], d: &[f32], gradient: &mut [f32]) {
        let layers = self.layers();
        let results = self.activations(mid);
        let mut d = d.to_vec();
        let mut end = self.parameters.len();
        for (i, &layer) in layers.iter().enumerate().rev() {
            let start = end - layer.len();
            let weights = &self.parameters[start..end - layer.outputs];
            let (by_weight, by_bias) = gradient[start..end].split_at_mut(layer.len() - layer.outputs);
            let input: Vec<f32> = if i == 0 { mid.to_vec() } else { results[i - 1].iter().map(|&x| silu(x)).collect() };
            for pixel in d.chunks_exact(layer.outputs) {
                by_bias.iter_mut().zip(pixel).for_each(|(b, d)| *b += d);
            }
            let mut below = vec![0.0; input.len()];
            self.taps(layer, |tap, from, to| {
                let x = &input[from * layer.inputs..][..layer.inputs];
                let below = &mut below[from * layer.inputs..][..layer.inputs];
                for (o, &d) in d[to * layer.outputs..][..layer.outputs].iter().enumerate() {
                    let row = (o * layer.kernel * layer.kernel + tap) * layer.inputs;
                    by_weight[row..][..layer.inputs].iter_mut().zip(x).for_each(|(g, x)| *g += d * x);
                    below.iter_mut().zip(&weights[row..][..layer.inputs]).for_each(|(b, w)| *b += d * w);
                }
            });
            if i > 0 {
                below.iter_mut().zip(&results[i - 1]).for_each(|(b, &x)| *b *= silu_slope(x));
            }
            d = below;
            end = start;
        }
    }

    /// Calls `each` with every tap, input pixel and output pixel of a convolution that keeps the size.
    fn taps(&self, layer: Layer, mut each: impl FnMut(usize, usize, usize)) {
        let (h, w, pad) = (self.shape.h, self.shape.w, layer.kernel / 2);
        for tap in 0..layer.kernel * layer.kernel {
            let (ky, kx) = (tap / layer.kernel, tap % layer.kernel);
            for to in 0..h * w {
                let (y, x) = ((to / w + ky).wrapping_sub(pad), (to % w + kx).wrapping_sub(pad));
                if y < h && x < w {
                    each(tap, y * w + x, to);
                }
            }
        }
    }
}

/// Resamples bilinearly, per channel, with half-pixel centres and clamped edges; it is the identity at the same size.
fn resample(values: &[f32], from: Shape, to: Shape) -> Vec<f32> {
    let along = |i: usize, from: usize, to: usize| {
        let at = ((i as f32 + 0.5) * from as f32 / to as f32 - 0.5).clamp(0.0, (from - 1) as f32);
        let low = at as usize;
        (low, (low + 1).min(from - 1), at - low as f32)
    };
    let mut out = Vec::with_capacity(to.tokens() * to.c);
    for y in 0..to.h {
        let (top, bottom, down) = along(y, from.h, to.h);
        for x in 0..to.w {
            let (left, right, across) = along(x, from.w, to.w);
            let pixel = |y: usize, x: usize| &values[(y * from.w + x) * from.c..][..from.c];
            for c in 0..to.c {
                let upper = pixel(top, left)[c] * (1.0 - across) + pixel(top, right)[c] * across;
                let lower = pixel(bottom, left)[c] * (1.0 - across) + pixel(bottom, right)[c] * across;
                out.push(upper * (1.0 - down) + lower * down);
            }
        }
    }
    out
}

/// The dot product, with 16 partial sums that compile to vector instructions.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gradients of every form against central differences.
    #[test]
    fn gradients_of_parameters() {
        for form in [Form::Constant, Form::Mlp, Form::Conv] {
            let shape = Shape::new(1, 3, 4, 6);
            let mut state = 9u32;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            let mut module = Module::new(form, shape, &mut draw);
            module.parameters.iter_mut().for_each(|p| *p += 0.3 * draw());
            let mid: Vec<f32> = (0..2 * shape.len()).map(|_| draw()).collect();
            let d: Vec<f32> = (0..2 * shape.len()).map(|_| draw()).collect();
            let value = |module: &Module| -> f64 {
                let mut out = vec![0.0; mid.len()];
                for (mid, out) in mid.chunks_exact(shape.len()).zip(out.chunks_exact_mut(shape.len())) {
                    module.add_to(mid, 1.0, out);
                }
                out.iter().zip(&d).map(|(o, d)| *o as f64 * *d as f64).sum()
            };
            let ours = module.gradient(&mid, &d);
            let scale = ours.iter().map(|g| g.abs()).fold(0.0, f32::max) as f64;
            for (i, &gradient) in ours.iter().enumerate() {
                let step = 1e-2f32;
                let mut moved = module.clone();
                moved.parameters[i] += step;
                let above = value(&moved);
                moved.parameters[i] -= 2.0 * step;
                let numeric = (above - value(&moved)) / (2.0 * step as f64);
                assert!((gradient as f64 - numeric).abs() < 2e-3 * scale, "{form:?} {i}: {gradient} {numeric}");
            }
        }
    }
}
