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
    /// The weights that were loaded for this network, in one piece.
    own: Arc<Memory>,
    /// Each weight's place: in `own`, or among another network's weights.
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
    /// Those of [`Tensors::stored`], [`Error::Checkpoint`] for a number that is not finite, or [`Error::Device`] when
    /// memory is short.
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

    /// The list that they were loaded for.
    pub fn specs(&self) -> &[WeightSpec] {
        &self.specs
    }

    /// Bytes of memory, without the weights that another network holds.
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
    // `par_bridge` hands tasks out in their order, so that files are read from front to back.
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
    // Rows of the strip begin 16 numbers further apart than they are long: a power of two would put a column of the
    // strip into few sets of the cache.
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
    use crate::weights::cases::{Case, Random};

    /// Every number put into its place, one after the other.
    fn packed_by_definition(case: &Case) -> Vec<f32> {
        let outputs = case.spec.total_outputs();
        let mut numbers = vec![0.0; packed(&case.spec)];
        for ([output, input, tap], x) in case.numbers() {
            // Where it stands in which panel of 32 columns, and how many lines the panels have.
            let (panel, line, lines, column) = match case.spec.kind {
                WeightKind::Vector | WeightKind::Table => {
                    numbers[output * case.spec.width + input] = x;
                    continue;
                }
                WeightKind::Mirrored { wanted, .. } if input >= wanted => continue,
                WeightKind::Mirrored { kernel, .. } => {
                    let taps = kernel * kernel;
                    (input / 32, (taps - 1 - tap) * outputs + output, taps * outputs, input % 32)
                }
                WeightKind::Matrix { inputs, gated: true, .. } => {
                    let (pair, side) = (output % (outputs / 2), output / (outputs / 2));
                    (pair / 16, tap * inputs + input, case.spec.width, 16 * side + pair % 16)
                }
                WeightKind::Matrix { inputs, .. } => (output / 32, tap * inputs + input, case.spec.width, output % 32),
            };
            numbers[(panel * lines + line) * 32 + column] = x;
        }
        numbers
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
        for round in 0..30 {
            let mut cases: Vec<Case> = (0..20).map(|_| Case::random(&mut random)).collect();
            if round % 10 == 0 {
                // Larger than the stretch that one thread packs.
                let kind = WeightKind::Matrix { kernel: 3, inputs: 65, gated: false, resized: false };
                cases.push(Case::new(kind, vec![333, 450], 9 * 65, &mut random));
                cases.push(Case::new(WeightKind::Table, vec![5000], 70, &mut random));
                let kind = WeightKind::Mirrored { kernel: 1, inputs: 300, wanted: 290 };
                cases.push(Case::new(kind, vec![1500], 300, &mut random));
            }
            let out = load(&cases).unwrap();
            let mut at = 0;
            for case in &cases {
                let truth = packed_by_definition(case);
                let got = &out[at..][..truth.len()];
                let wrong = got.iter().zip(&truth).position(|(a, b)| a.to_bits() != b.to_bits());
                assert_eq!(wrong, None, "{case:?}");
                at += truth.len().next_multiple_of(ALIGN);
            }
        }
    }

    /// The first bad number of the first bad weight is told, whichever others are bad and whatever the formats.
    #[test]
    fn a_number_that_is_not_finite_is_named() {
        let mut random = Random(2);
        let kind = WeightKind::Matrix { kernel: 3, inputs: 40, gated: false, resized: false };
        for _ in 0..10 {
            let mut cases: Vec<Case> = (0..12).map(|_| Case::random(&mut random)).collect();
            for place in [5, 9] {
                cases[place] = Case::new(kind.clone(), vec![20, 50], 360, &mut random);
                cases[place].spec.names[1] = format!("bad {place}");
                [17_000, 7_777].into_iter().for_each(|position| cases[place].damage(1, position, f64::NAN));
            }
            let problem = "file: tensor `bad 5` holds NaN at position 7777; the file is damaged";
            assert_eq!(load(&cases).unwrap_err().to_string(), problem, "{:?}", cases[5]);
        }
    }
}
