//! The Inception network of FID (Heusel et al., arXiv 1706.08500): Inception v3 of TensorFlow's release of 2015-12-05,
//! which differs from torchvision's in its weights and in the pools of its blocks.
//!
//! It runs on the CPU in fp32, since features in less would change FID. Images are independent tasks; a convolution is
//! a matrix product over gathered pixels. All channel counts follow from the tensors.

use super::resize::bicubic;
use crate::cpu::gemm::{Left, PANEL, ROWS, multiply, pack_panel, packed_len};
use crate::image::Picture;
use crate::weights::{Tensors, pickle};
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// Height and width that pictures are resized to.
const SIDE: usize = 299;
/// The batch norms' epsilon.
const EPSILON: f64 = 1e-3;
/// Rows of a block of pixels, and the longest stretch of k; with them the block stays in the L2 cache.
const ROW_BLOCK: usize = 16 * ROWS;
const K_BLOCK: usize = 384;

/// The network's blocks in order: a prefix of names, and branches whose results are concatenated. A branch is a chain
/// of convolutions (each followed by its batch norm and ReLU) and 3x3 pools. `/2` and `/1` mean that stride without
/// padding; otherwise the stride is 1 and the output as large as the input. `a|b` concatenates two convolutions of the
/// same input. The average pools do not count padding.
const NETWORK: [(&str, &[&str]); 12] = [
    ("", &["Conv2d_1a_3x3/2 Conv2d_2a_3x3/1 Conv2d_2b_3x3 max/2 Conv2d_3b_1x1/1 Conv2d_4a_3x3/1 max/2"]),
    ("Mixed_5b.", A),
    ("Mixed_5c.", A),
    ("Mixed_5d.", A),
    ("Mixed_6a.", &["branch3x3/2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2", "max/2"]),
    ("Mixed_6b.", C),
    ("Mixed_6c.", C),
    ("Mixed_6d.", C),
    ("Mixed_6e.", C),
    ("Mixed_7a.", &["branch3x3_1 branch3x3_2/2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2", "max/2"]),
    ("Mixed_7b.", &[E[0], E[1], E[2], "average branch_pool"]),
    // TensorFlow's graph has a maximum here, where the paper on Inception has an average.
    ("Mixed_7c.", &[E[0], E[1], E[2], "max branch_pool"]),
];
const A: &[&str] =
    &["branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "average branch_pool"];
const C: &[&str] = &[
    "branch1x1",
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
    "average branch_pool",
];
const E: [&str; 3] = [
    "branch1x1",
    "branch3x3_1 branch3x3_2a|branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b",
];

/// The network, ready to run.
pub struct Inception {
    fingerprint: String,
    /// Blocks of branches of steps.
    blocks: Vec<Vec<Vec<Step>>>,
    features: usize,
}

enum Step {
    /// Convolutions of the same input, whose results are concatenated.
    Convs(Vec<Conv>),
    /// A 3x3 maximum with this stride; with stride 1 the output is as large as the input.
    Max(usize),
    /// A 3x3 average with stride 1 over the pixels that there are.
    Average,
}

/// A convolution with its batch norm folded in, followed by ReLU.
struct Conv {
    kernel: (usize, usize),
    stride: usize,
    padding: (usize, usize),
    inputs: usize,
    outputs: usize,
    /// Packed `[kernel rows * kernel columns * inputs, outputs]`.
    weights: Vec<f32>,
    bias: Vec<f32>,
}

/// An activation, `[h, w, c]`.
struct Map {
    h: usize,
    w: usize,
    c: usize,
    data: Vec<f32>,
}

/// Shapes and numbers of tensors by their names.
type Named = HashMap<String, (Vec<usize>, Vec<f32>)>;

/// The tensors of a file, while they are taken.
struct State<'a> {
    path: &'a Path,
    tensors: Named,
    hash: Sha256,
}

impl Inception {
    /// Loads the state dict of pytorch-fid's `InceptionV3` before it is cut into blocks, as in
    /// `pt_inception-2015-12-05-6726825d.pth`: a `torch.save` file, or the same tensors in safetensors. Layers may have
    /// any numbers of channels that fit together.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for a TorchScript archive or torchvision's own Inception,
    /// [`crate::ErrorKind::Damaged`] or [`crate::ErrorKind::Mismatch`] for other weights, and those of reading.
    pub fn load(path: &Path) -> Result<Self> {
        let mut state = State { path, tensors: read(path)?, hash: Sha256::new() };
        let head = state.tensors.get("fc.weight").and_then(|(shape, _)| shape.first().copied());
        if head == Some(1000) || state.tensors.keys().any(|name| name.starts_with("AuxLogits")) {
            return Err(Error::unsupported(path, "torchvision's Inception, whose features give another FID")
                .advise("give FID's Inception, pt_inception-2015-12-05-6726825d.pth"));
        }
        let mut channels = 3;
        let mut blocks = Vec::new();
        for (prefix, branches) in NETWORK {
            let mut block = Vec::new();
            let mut total = 0;
            for branch in branches {
                let mut width = channels;
                let steps: Result<Vec<Step>> =
                    branch.split(' ').map(|word| state.step(prefix, word, &mut width)).collect();
                block.push(steps?);
                total += width;
            }
            channels = total;
            blocks.push(block);
        }
        let fingerprint = state.hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Ok(Inception { fingerprint, blocks, features: channels })
    }

    /// Identifies the weights: a SHA-256 of the network's tensors in fp32.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The number of features, 2048 at full width.
    pub fn width(&self) -> usize {
        self.features
    }

    /// The features of a picture as clean-fid (Parmar et al., arXiv 2104.11222) computes them in its mode `clean`: the
    /// picture resized to 299x299 without rounding, and the averages of the last block's channels.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`] if the weights give no finite features.
    pub fn features(&self, picture: &Picture) -> Result<Vec<f32>> {
        let pixels = bicubic(picture, SIDE);
        // As clean-fid does it, which differs from 2 x / 255 - 1.
        let data = pixels.iter().map(|x| (x.clamp(0.0, 255.0) - 128.0) / 128.0).collect();
        let mut x = Map { h: SIDE, w: SIDE, c: 3, data };
        for block in &self.blocks {
            let branches = block.iter().map(|steps| {
                let (first, rest) = steps.split_first().expect("a branch has steps");
                rest.iter().fold(first.run(&x), |x, step| step.run(&x))
            });
            x = concatenated(branches.collect());
        }
        let mut sums = vec![0.0; x.c];
        for pixel in x.data.chunks_exact(x.c) {
            sums.iter_mut().zip(pixel).for_each(|(sum, x)| *sum += x);
        }
        let count = (x.h * x.w) as f32;
        sums.iter_mut().for_each(|sum| *sum /= count);
        match sums.iter().all(|x| x.is_finite()) {
            true => Ok(sums),
            false => Err(Error::non_finite("the Inception gave NaN or infinity").advise("give its weights again")),
        }
    }
}

/// Reads all tensors of a file.
fn read(path: &Path) -> Result<Named> {
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        let file = Tensors::open_file(path)?;
        let entries: Vec<(&str, &[usize])> = file.entries().collect();
        // The counters of batches are integers, which are not read.
        let entries = entries.into_iter().filter(|(name, _)| !name.ends_with("num_batches_tracked"));
        return entries
            .map(|(name, shape)| Ok((name.to_string(), (shape.to_vec(), file.read(name, &[shape])?))))
            .collect();
    }
    let tensors = pickle::tensors(path).map_err(|error| match error.kind() {
        crate::ErrorKind::Unsupported => error.advise(
            "give pytorch-fid's pt_inception-2015-12-05-6726825d.pth, which holds the same numbers, or its tensors in \
             safetensors",
        ),
        _ => error,
    })?;
    Ok(tensors.into_iter().map(|tensor| (tensor.name, (tensor.shape, tensor.values))).collect())
}

impl State<'_> {
    fn take(&mut self, name: &str, dimensions: usize) -> Result<(Vec<usize>, Vec<f32>)> {
        let Some((shape, values)) = self.tensors.remove(name) else {
            let problem = format!("tensor `{name}` of FID's Inception is missing");
            return Err(Error::damaged(self.path, problem)
                .advise("give pytorch-fid's pt_inception-2015-12-05-6726825d.pth, or its tensors in safetensors"));
        };
        if shape.len() != dimensions || values.is_empty() {
            return Err(Error::mismatch(self.path, format!("tensor `{name}` has shape {shape:?}")));
        }
        if !values.iter().all(|x| x.is_finite()) {
            return Err(Error::damaged(self.path, format!("tensor `{name}` holds NaN or infinity")));
        }
        self.hash.update(format!("{name} {shape:?}\n"));
        values.iter().for_each(|x| self.hash.update(x.to_le_bytes()));
        Ok((shape, values))
    }

    /// The step that a word of [`NETWORK`] names, for `channels` channels, which become the step's own.
    fn step(&mut self, prefix: &str, word: &str, channels: &mut usize) -> Result<Step> {
        match word {
            "max" => return Ok(Step::Max(1)),
            "max/2" => return Ok(Step::Max(2)),
            "average" => return Ok(Step::Average),
            _ => {}
        }
        let (names, stride) = match word.split_once('/') {
            Some((names, stride)) => (names, Some(if stride == "2" { 2 } else { 1 })),
            None => (word, None),
        };
        let inputs = *channels;
        let convs: Result<Vec<Conv>> =
            names.split('|').map(|name| self.conv(&format!("{prefix}{name}"), inputs, stride)).collect();
        let convs = convs?;
        *channels = convs.iter().map(|conv| conv.outputs).sum();
        Ok(Step::Convs(convs))
    }

    fn conv(&mut self, name: &str, inputs: usize, stride: Option<usize>) -> Result<Conv> {
        let tensor = format!("{name}.conv.weight");
        let (shape, values) = self.take(&tensor, 4)?;
        let (outputs, kernel) = (shape[0], (shape[2], shape[3]));
        if shape[1] != inputs || kernel.0 % 2 == 0 || kernel.1 % 2 == 0 || kernel.0.max(kernel.1) > 7 {
            let problem = format!("tensor `{tensor}` has shape {shape:?}, but its input has {inputs} channels");
            return Err(Error::mismatch(self.path, problem).advise("give the Inception of pytorch-fid"));
        }
        let mut norm = |part: &str| -> Result<Vec<f32>> {
            let tensor = format!("{name}.bn.{part}");
            let (shape, values) = self.take(&tensor, 1)?;
            match shape[0] == outputs {
                true => Ok(values),
                false => Err(Error::mismatch(self.path, format!("tensor `{tensor}` has shape {shape:?}"))),
            }
        };
        let (scale, shift) = (norm("weight")?, norm("bias")?);
        let (mean, variance) = (norm("running_mean")?, norm("running_var")?);
        if variance.iter().any(|&x| x < 0.0) {
            return Err(Error::damaged(self.path, format!("tensor `{name}.bn.running_var` holds a negative number")));
        }
        let gain: Vec<f64> =
            scale.iter().zip(&variance).map(|(&w, &v)| f64::from(w) / (f64::from(v) + EPSILON).sqrt()).collect();
        let bias =
            (0..outputs).map(|o| (f64::from(shift[o]) - f64::from(mean[o]) * gain[o]) as f32).collect::<Vec<_>>();
        let taps = kernel.0 * kernel.1;
        let depth = taps * inputs;
        let mut matrix = vec![0.0; depth * outputs];
        for (o, values) in values.chunks_exact(depth).enumerate() {
            for (i, x) in values.iter().enumerate() {
                let (input, tap) = (i / taps, i % taps);
                matrix[(tap * inputs + input) * outputs + o] = (f64::from(*x) * gain[o]) as f32;
            }
        }
        let mut weights = vec![0.0; packed_len(depth, outputs)];
        for (panel, packed) in weights.chunks_exact_mut(depth * PANEL).enumerate() {
            let first = panel * PANEL;
            pack_panel(&matrix[first..], outputs, 1, PANEL.min(outputs - first), packed);
        }
        let padding = if stride.is_some() { (0, 0) } else { (kernel.0 / 2, kernel.1 / 2) };
        Ok(Conv { kernel, stride: stride.unwrap_or(1), padding, inputs, outputs, weights, bias })
    }
}

impl Step {
    fn run(&self, x: &Map) -> Map {
        match self {
            Step::Convs(convs) => concatenated(convs.iter().map(|conv| conv.run(x)).collect()),
            &Step::Max(stride) => {
                // Not `max`, which would hide NaN.
                let larger = |max: f32, x: f32| if x > max || x.is_nan() { x } else { max };
                pooled(x, stride, f32::NEG_INFINITY, larger, |max, _| max)
            }
            Step::Average => pooled(x, 1, 0.0, |sum, x| sum + x, |sum, count| sum / count as f32),
        }
    }
}

impl Conv {
    fn run(&self, x: &Map) -> Map {
        let Conv { kernel, stride, padding, inputs, outputs, .. } = *self;
        let h = (x.h + 2 * padding.0 - kernel.0) / stride + 1;
        let w = (x.w + 2 * padding.1 - kernel.1) / stride + 1;
        let depth = kernel.0 * kernel.1 * inputs;
        let mut out = Map { h, w, c: outputs, data: vec![0.0; h * w * outputs] };
        let strip = ROW_BLOCK * PANEL;
        let mut block = vec![0.0; ROW_BLOCK * K_BLOCK.min(depth)];
        let mut sums = vec![0.0; outputs.div_ceil(PANEL) * strip];
        for (first, out) in (0..).step_by(ROW_BLOCK).zip(out.data.chunks_mut(ROW_BLOCK * outputs)) {
            let rows = out.len() / outputs;
            for start in (0..depth).step_by(K_BLOCK) {
                let k = start..depth.min(start + K_BLOCK);
                self.gather(x, w, first..first + rows, k.clone(), &mut block);
                let left = Left { numbers: &block, pitch: k.len(), rows, depth: k.len() };
                for (panel, sums) in sums.chunks_exact_mut(strip).enumerate() {
                    let lines = &self.weights[(panel * depth + start) * PANEL..][..k.len() * PANEL];
                    let columns = PANEL.min(outputs - panel * PANEL);
                    multiply(left, lines, sums, PANEL, columns, start == 0);
                }
            }
            for (row, out) in out.chunks_exact_mut(outputs).enumerate() {
                let panels = out.chunks_mut(PANEL).zip(self.bias.chunks(PANEL));
                for ((out, bias), sums) in panels.zip(sums.chunks_exact(strip)) {
                    for ((out, bias), sum) in out.iter_mut().zip(bias).zip(&sums[row * PANEL..]) {
                        // Not `max`, which would hide NaN.
                        let y = sum + bias;
                        *out = if y < 0.0 { 0.0 } else { y };
                    }
                }
            }
        }
        out
    }

    /// Gathers a stretch `k` of rows of the im2col matrix, for outputs in rows of `width` pixels.
    fn gather(&self, x: &Map, width: usize, rows: Range<usize>, k: Range<usize>, to: &mut [f32]) {
        let mut at = k.start;
        while at < k.end {
            let (tap, channel) = (at / self.inputs, at % self.inputs);
            let len = (self.inputs - channel).min(k.end - at);
            for (row, line) in rows.clone().zip(to.chunks_exact_mut(k.len())) {
                let y = (row / width * self.stride + tap / self.kernel.1).wrapping_sub(self.padding.0);
                let column = (row % width * self.stride + tap % self.kernel.1).wrapping_sub(self.padding.1);
                let part = &mut line[at - k.start..][..len];
                match y < x.h && column < x.w {
                    true => part.copy_from_slice(&x.data[(y * x.w + column) * x.c + channel..][..len]),
                    false => part.fill(0.0),
                }
            }
            at += len;
        }
    }
}

/// A 3x3 pool, without padding at stride 2, and at stride 1 over the pixels that there are.
fn pooled(
    x: &Map,
    stride: usize,
    start: f32,
    add: impl Fn(f32, f32) -> f32,
    finish: impl Fn(f32, usize) -> f32,
) -> Map {
    let padding = usize::from(stride == 1);
    let size = |side: usize| (side + 2 * padding - 3) / stride + 1;
    let (h, w, c) = (size(x.h), size(x.w), x.c);
    let mut data = vec![start; h * w * c];
    for (i, out) in data.chunks_exact_mut(c).enumerate() {
        let range = |at: usize, end: usize| (at * stride).saturating_sub(padding)..(at * stride + 3 - padding).min(end);
        let (rows, columns) = (range(i / w, x.h), range(i % w, x.w));
        let count = rows.len() * columns.len();
        for pixel in rows.flat_map(|y| columns.clone().map(move |column| y * x.w + column)) {
            out.iter_mut().zip(&x.data[pixel * c..]).for_each(|(out, x)| *out = add(*out, *x));
        }
        out.iter_mut().for_each(|out| *out = finish(*out, count));
    }
    Map { h, w, c, data }
}

/// Concatenates the channels of maps of one size.
fn concatenated(mut maps: Vec<Map>) -> Map {
    if maps.len() == 1 {
        return maps.remove(0);
    }
    let (h, w, c) = (maps[0].h, maps[0].w, maps.iter().map(|map| map.c).sum());
    let mut data = Vec::with_capacity(h * w * c);
    for pixel in 0..h * w {
        maps.iter().for_each(|map| data.extend_from_slice(&map.data[pixel * map.c..][..map.c]));
    }
    Map { h, w, c, data }
}
