//! Weights as the CPU's operations read them: fp32, matrices packed for [`super::gemm`].

use super::gemm::{PANEL, packed_len};
use crate::graph::{WeightId, WeightKind, WeightSpec};
use crate::weights::{Stored, Tensors};
use crate::{Error, Result};
use memmap2::MmapMut;
use rayon::prelude::*;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Weights begin at multiples of this many numbers: two cache lines.
const ALIGN: usize = 32;
/// Numbers that one thread packs at a time, roughly.
const TASK: usize = 1 << 18;
/// Numbers of a row that are converted together, roughly: a panel's strip of them stays in the first cache.
const STRIP: usize = 128;

/// A network's weights, shared by every plan of the network at whatever size.
pub struct Weights {
    /// What was loaded for this network, in one piece.
    own: Arc<Memory>,
    /// Where each weight is: there, or among another network's.
    places: Vec<(Arc<Memory>, Range<usize>)>,
    specs: Vec<WeightSpec>,
    by_spec: HashMap<WeightSpec, usize>,
}

/// Numbers in pages of their own.
struct Memory(MmapMut);

impl Memory {
    /// Zeros, which take no memory before they are written.
    fn new(len: usize) -> Result<Self> {
        let bytes = len * size_of::<f32>();
        let memory = MmapMut::map_anon(bytes).map_err(|e| {
            let gib = bytes as f64 / (1u64 << 30) as f64;
            Error::Device(format!("{gib:.1} GiB of memory for weights are not to be had: {e}"))
        })?;
        Ok(Memory(memory))
    }

    fn numbers(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }
}

impl Weights {
    /// Reads and packs all of `specs`. No tensor is ever held in two forms.
    ///
    /// # Errors
    /// What [`Tensors::stored`] finds, or which number is not finite.
    pub fn load(specs: &[WeightSpec], tensors: &Tensors) -> Result<Arc<Self>> {
        Self::load_beside(specs, tensors, &[])
    }

    /// The same, taking what `others` of the same checkpoint hold in the same form from them.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load_beside(specs: &[WeightSpec], tensors: &Tensors, others: &[&Weights]) -> Result<Arc<Self>> {
        let find =
            |spec: &WeightSpec| others.iter().find_map(|other| Some(other.places[*other.by_spec.get(spec)?].clone()));
        let found: Vec<_> = specs.iter().map(find).collect();
        let lacking = specs.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(spec, _)| spec);
        let lacking = lacking.map(|spec| Ok((spec, tensors.stored(spec)?))).collect::<Result<Vec<_>>>()?;
        let padded = |spec: &WeightSpec| packed(spec).next_multiple_of(ALIGN);
        let mut own = Memory::new(lacking.iter().map(|(spec, _)| padded(spec)).sum())?;
        std::thread::scope(|scope| {
            let read_ahead = || lacking.iter().for_each(|(_, parts)| tensors.read_ahead(parts));
            // Without another thread the files are read as they are needed.
            let _ = std::thread::Builder::new().spawn_scoped(scope, read_ahead);
            pack(&lacking, bytemuck::cast_slice_mut(&mut own.0))
        })?;
        let (own, mut end) = (Arc::new(own), 0);
        let mut place = |spec| {
            let start = end;
            end += padded(spec);
            (own.clone(), start..start + packed(spec))
        };
        let places = specs.iter().zip(found).map(|(spec, found)| found.unwrap_or_else(|| place(spec))).collect();
        let by_spec = specs.iter().enumerate().map(|(place, spec)| (spec.clone(), place)).collect();
        Ok(Arc::new(Weights { own, places, specs: specs.to_vec(), by_spec }))
    }

    /// What they were loaded for.
    pub fn specs(&self) -> &[WeightSpec] {
        &self.specs
    }

    /// Bytes of memory, but for what others hold.
    pub fn bytes(&self) -> usize {
        self.own.0.len()
    }

    /// Bytes that `specs` would take beside these.
    pub fn missing(&self, specs: &[WeightSpec]) -> usize {
        let missing = specs.iter().filter(|spec| !self.by_spec.contains_key(spec));
        missing.map(|spec| packed(spec).next_multiple_of(ALIGN) * size_of::<f32>()).sum()
    }

    pub(super) fn get(&self, id: WeightId) -> &[f32] {
        let (memory, range) = &self.places[id.0];
        &memory.numbers()[range.clone()]
    }
}

/// Numbers of a weight in packed form.
fn packed(spec: &WeightSpec) -> usize {
    let (depth, columns) = match spec.kind {
        WeightKind::Vector | WeightKind::Table => return spec.len(),
        WeightKind::Matrix { .. } => (spec.width, spec.total_outputs()),
        WeightKind::Mirrored { kernel, wanted, .. } => (kernel * kernel * spec.total_outputs(), wanted),
    };
    packed_len(depth, columns)
}

/// A stretch of a weight that one thread packs.
struct Task<'a> {
    /// The weight's place in the list.
    index: usize,
    /// Where the stretch begins in the weight's packed form.
    start: usize,
    out: &'a mut [f32],
}

/// Packs weights, one after the other with room for [`ALIGN`], into `out`, which is zero.
fn pack(weights: &[(&WeightSpec, Vec<Stored>)], out: &mut [f32]) -> Result<()> {
    let mut tasks = Vec::new();
    let mut rest = out;
    for (index, (spec, _)) in weights.iter().enumerate() {
        let (room, after) = rest.split_at_mut(packed(spec).next_multiple_of(ALIGN));
        rest = after;
        // Whole panels of matrices.
        let unit = match spec.kind {
            WeightKind::Vector | WeightKind::Table => 1,
            WeightKind::Matrix { .. } => spec.width * PANEL,
            WeightKind::Mirrored { kernel, .. } => kernel * kernel * spec.total_outputs() * PANEL,
        };
        let length = (TASK / unit).max(1) * unit;
        let chunks = room[..packed(spec)].chunks_mut(length).enumerate();
        tasks.extend(chunks.map(|(i, out)| Task { index, start: i * length, out }));
    }
    // A bridge hands tasks out in their order, so that files are read from front to back.
    let run = |task: Task| {
        let (spec, parts) = &weights[task.index];
        (!pack_stretch(spec, parts, task.start, task.out)).then_some(task.index)
    };
    match tasks.into_iter().par_bridge().filter_map(run).min() {
        Some(bad) => weights[bad].1.iter().try_for_each(Stored::check_finite),
        None => Ok(()),
    }
}

/// Packs the stretch of a weight that begins at `start` in packed form; false if a number is not finite.
fn pack_stretch(spec: &WeightSpec, parts: &[Stored], start: usize, out: &mut [f32]) -> bool {
    match spec.kind {
        WeightKind::Vector | WeightKind::Table => numbers(parts, start, out),
        WeightKind::Matrix { kernel, gated, .. } => {
            let (taps, outputs) = (kernel * kernel, spec.total_outputs());
            let first = start / (spec.width * PANEL);
            let panels = out.chunks_exact_mut(spec.width * PANEL).enumerate();
            panels.fold(true, |finite, (i, out)| {
                let columns = std::array::from_fn(|j| source_column(first + i, j, outputs, gated));
                finite & pack_panel(parts, &columns, taps, out)
            })
        }
        WeightKind::Mirrored { kernel, inputs, wanted } => {
            let (taps, outputs) = (kernel * kernel, spec.total_outputs());
            let first = start / (taps * outputs * PANEL);
            let panels = out.chunks_exact_mut(taps * outputs * PANEL).enumerate();
            panels.fold(true, |finite, (i, out)| {
                let channel = (first + i) * PANEL;
                let columns = channel..wanted.min(channel + PANEL);
                finite & pack_mirrored(parts, inputs, columns, taps, out)
            })
        }
    }
}

/// The numbers from `start` on of tensors that stand one after the other; false if one is not finite.
fn numbers(parts: &[Stored], mut start: usize, mut out: &mut [f32]) -> bool {
    let mut finite = true;
    for part in parts {
        if start < part.len() && !out.is_empty() {
            let (head, tail) = out.split_at_mut(out.len().min(part.len() - start));
            finite &= part.numbers(start, head);
            (start, out) = (0, tail);
        } else {
            start -= part.len().min(start);
        }
    }
    finite
}

/// Packs a panel of `[out, in, k, k]`, whose rows run over taps, then input channels, and whose columns are outputs.
fn pack_panel(parts: &[Stored], columns: &[Option<usize>; PANEL], taps: usize, panel: &mut [f32]) -> bool {
    let depth = panel.len() / PANEL;
    let channels = depth / taps;
    let together = (STRIP / taps).max(1);
    // Rows of the strip do not begin a power of two apart, which would put a column into few sets of the cache.
    let pitch = together * taps + 16;
    let mut strip = vec![0.0; PANEL * pitch];
    let mut finite = true;
    for first in (0..channels).step_by(together) {
        let count = together.min(channels - first);
        for (row, column) in strip.chunks_exact_mut(pitch).zip(columns) {
            if let Some(output) = column {
                finite &= numbers(parts, output * depth + first * taps, &mut row[..count * taps]);
            }
        }
        for tap in 0..taps {
            let lines = panel[(tap * channels + first) * PANEL..][..count * PANEL].chunks_exact_mut(PANEL);
            for (channel, line) in lines.enumerate() {
                for (x, row) in line.iter_mut().zip(strip.chunks_exact(pitch)) {
                    *x = row[channel * taps + tap];
                }
            }
        }
    }
    finite
}

/// Packs a panel of `[out, in, k, k]` for the data gradient: its rows run over mirrored taps, then the layer's outputs,
/// and its columns are some of the layer's inputs.
fn pack_mirrored(parts: &[Stored], inputs: usize, columns: Range<usize>, taps: usize, panel: &mut [f32]) -> bool {
    let outputs = panel.len() / PANEL / taps;
    let mut strip = vec![0.0; columns.len() * taps];
    let mut finite = true;
    for output in 0..outputs {
        finite &= numbers(parts, (output * inputs + columns.start) * taps, &mut strip);
        for tap in 0..taps {
            let line = &mut panel[((taps - 1 - tap) * outputs + output) * PANEL..][..PANEL];
            line.iter_mut().zip(strip.iter().skip(tap).step_by(taps)).for_each(|(x, number)| *x = *number);
        }
    }
    finite
}

/// Which output of the layer stands in column `j` of a panel.
pub(super) fn source_column(panel: usize, j: usize, outputs: usize, gated: bool) -> Option<usize> {
    if gated {
        let half = PANEL / 2;
        let value = panel * half + j % half;
        (value < outputs / 2).then_some(if j < half { value } else { outputs / 2 + value })
    } else {
        Some(panel * PANEL + j).filter(|&o| o < outputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{Data, Format};
    use half::{bf16, f16};

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 33) as usize % n
        }
    }

    const FORMATS: [Format; 4] = [Format::F16, Format::BF16, Format::F32, Format::F64];

    /// A number's bytes in a file, and what it is in fp32.
    fn number(format: Format, random: &mut Random) -> (Vec<u8>, f32) {
        let x = (random.below(1 << 20) as f64 / (1 << 19) as f64 - 1.0) * 0.1f64.powi(random.below(8) as i32);
        match format {
            Format::F16 => (f16::from_f64(x).to_le_bytes().to_vec(), f16::from_f64(x).to_f32()),
            Format::BF16 => (bf16::from_f64(x).to_le_bytes().to_vec(), bf16::from_f64(x).to_f32()),
            Format::F32 => ((x as f32).to_le_bytes().to_vec(), x as f32),
            Format::F64 => (x.to_le_bytes().to_vec(), x as f32),
        }
    }

    /// A weight with its tensors in files, each behind one byte of something else, and in fp32.
    struct Case {
        spec: WeightSpec,
        files: Vec<(Format, bool, Vec<u8>)>,
        rows: Vec<Vec<f32>>,
    }

    impl Case {
        fn new(kind: WeightKind, outputs: Vec<usize>, width: usize, random: &mut Random) -> Self {
            let names = (0..outputs.len()).map(|i| format!("tensor {i}")).collect();
            let spec = WeightSpec { names, outputs, width, kind };
            let (mut files, mut rows) = (Vec::new(), Vec::new());
            for &outputs in &spec.outputs {
                let format = FORMATS[random.below(4)];
                let matrix =
                    matches!(spec.kind, WeightKind::Matrix { kernel: 1, .. } | WeightKind::Mirrored { kernel: 1, .. });
                let transposed = matrix && random.below(2) == 0;
                let numbers: Vec<(Vec<u8>, f32)> = (0..outputs * width).map(|_| number(format, random)).collect();
                let mut file = vec![0xff];
                for i in 0..numbers.len() {
                    let of = if transposed { i % outputs * width + i / outputs } else { i };
                    file.extend(&numbers[of].0);
                }
                files.push((format, transposed, file));
                rows.extend(numbers.chunks(width).map(|row| row.iter().map(|number| number.1).collect::<Vec<f32>>()));
            }
            Case { spec, files, rows }
        }

        fn random(random: &mut Random) -> Self {
            let sizes = |random: &mut Random, most| (0..1 + random.below(3)).map(|_| 1 + random.below(most)).collect();
            let (kernel, inputs) = ([1, 1, 2, 3][random.below(4)], 1 + random.below(70));
            let width = kernel * kernel * inputs;
            match random.below(5) {
                0 => Self::new(WeightKind::Vector, sizes(random, 300), 1, random),
                1 => Self::new(WeightKind::Table, sizes(random, 40), inputs, random),
                2 => Self::new(WeightKind::Matrix { kernel, inputs, gated: false }, sizes(random, 90), width, random),
                3 => {
                    let outputs = vec![2 * (1 + random.below(60))];
                    Self::new(WeightKind::Matrix { kernel, inputs, gated: true }, outputs, width, random)
                }
                _ => {
                    let wanted = 1 + random.below(inputs);
                    Self::new(WeightKind::Mirrored { kernel, inputs, wanted }, sizes(random, 60), width, random)
                }
            }
        }

        fn stored(&self) -> Vec<Stored<'_>> {
            let named = self.spec.names.iter().zip(&self.spec.outputs);
            let stored = named.zip(&self.files).map(|((name, &outputs), (format, transposed, file))| Stored {
                name,
                path: "file".as_ref(),
                format: *format,
                transposed: *transposed,
                outputs,
                width: self.spec.width,
                data: Data::File(&file[1..]),
            });
            stored.collect()
        }

        /// One number after the other, each put into its place.
        fn packed(&self) -> Vec<f32> {
            let (WeightKind::Matrix { kernel, inputs, .. } | WeightKind::Mirrored { kernel, inputs, .. }) =
                self.spec.kind
            else {
                return self.rows.concat();
            };
            let taps = kernel * kernel;
            let mut packed = vec![0.0; packed(&self.spec)];
            for (output, row) in self.rows.iter().enumerate() {
                for (i, &x) in row.iter().enumerate() {
                    let (input, tap) = (i / taps, i % taps);
                    let half = self.rows.len() / 2;
                    let (panel, k, depth, column) = match self.spec.kind {
                        WeightKind::Mirrored { wanted, .. } if input >= wanted => continue,
                        WeightKind::Mirrored { .. } => {
                            let k = (taps - 1 - tap) * self.rows.len() + output;
                            (input / 32, k, taps * self.rows.len(), input % 32)
                        }
                        WeightKind::Matrix { gated: true, .. } => {
                            let (of, side) = (output % half, output / half);
                            (of / 16, tap * inputs + input, taps * inputs, 16 * side + of % 16)
                        }
                        _ => (output / 32, tap * inputs + input, taps * inputs, output % 32),
                    };
                    packed[(panel * depth + k) * 32 + column] = x;
                }
            }
            packed
        }
    }

    fn load(cases: &[Case]) -> Result<Vec<f32>> {
        let weights: Vec<_> = cases.iter().map(|case| (&case.spec, case.stored())).collect();
        let len = cases.iter().map(|case| packed(&case.spec).next_multiple_of(ALIGN)).sum();
        let mut out = vec![0.0; len];
        pack(&weights, &mut out).map(|()| out)
    }

    /// Bit for bit, of every kind, format and layout.
    #[test]
    fn weights_are_packed_as_one_number_after_the_other() {
        let mut random = Random(1);
        for _ in 0..30 {
            let mut cases: Vec<Case> = (0..20).map(|_| Case::random(&mut random)).collect();
            if random.below(10) == 0 {
                // Larger than what one thread packs.
                let kind = WeightKind::Matrix { kernel: 3, inputs: 65, gated: false };
                cases.push(Case::new(kind, vec![333, 450], 9 * 65, &mut random));
                cases.push(Case::new(WeightKind::Table, vec![5000], 70, &mut random));
                let kind = WeightKind::Mirrored { kernel: 1, inputs: 300, wanted: 290 };
                cases.push(Case::new(kind, vec![1500], 300, &mut random));
            }
            let out = load(&cases).unwrap();
            let mut at = 0;
            for case in &cases {
                let truth = case.packed();
                let got = &out[at..][..truth.len()];
                let wrong = got.iter().zip(&truth).position(|(a, b)| a.to_bits() != b.to_bits());
                assert_eq!(
                    wrong,
                    None,
                    "{:?} {:?}",
                    case.spec,
                    case.files.iter().map(|f| (f.0, f.1)).collect::<Vec<_>>()
                );
                at += truth.len().next_multiple_of(ALIGN);
            }
        }
    }

    /// The first bad number of the first bad weight, wherever else there are some.
    #[test]
    fn a_number_that_is_not_finite_is_named() {
        let mut random = Random(2);
        for format in FORMATS {
            let bad = match format {
                Format::F16 => f16::NAN.to_le_bytes().to_vec(),
                Format::BF16 => bf16::NAN.to_le_bytes().to_vec(),
                Format::F32 => f32::NAN.to_le_bytes().to_vec(),
                Format::F64 => f64::NAN.to_le_bytes().to_vec(),
            };
            let mut cases: Vec<Case> = (0..12).map(|_| Case::random(&mut random)).collect();
            let matrix = WeightKind::Matrix { kernel: 3, inputs: 40, gated: false };
            for place in [5, 9] {
                // The tensors of one weight may be of different formats.
                cases[place] = loop {
                    let case = Case::new(matrix.clone(), vec![20, 50], 360, &mut random);
                    if case.files[1].0 == format {
                        break case;
                    }
                };
                cases[place].spec.names[1] = format!("bad {place}");
                for position in [17_000, 7_777] {
                    cases[place].files[1].2[1 + position * bad.len()..][..bad.len()].copy_from_slice(&bad);
                }
            }
            let problem = "file: tensor `bad 5` holds NaN at position 7777; the file is damaged";
            assert_eq!(load(&cases).unwrap_err().to_string(), problem, "{format:?}");
        }
    }
}
