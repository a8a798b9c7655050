//! Weights as the CPU's operations read them. Matrices are packed for [`super::gemm`], in fp16 if all of a matrix's
//! tensors fit into it, which loses nothing. Everything else is in fp32.

use super::gemm::{Matrix, PANEL, packed_len};
use super::pages;
use super::rounded::Rounded;
use crate::Result;
use crate::backend::{PackedWeights, Precision};
use crate::graph::{WeightId, WeightKind, WeightSpec};
use crate::weights::{Edition, Number, Stored, Tensors};
use half::f16;
use memmap2::MmapMut;
use rayon::prelude::*;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Weights begin at multiples of this many bytes: two cache lines.
const ALIGN: usize = 128;
/// Numbers that one thread packs at a time, approximately.
const TASK: usize = 1 << 18;
/// Numbers of a row that are converted together, approximately: a panel's strip of them stays in the L1 cache.
const STRIP: usize = 128;

/// A network's weights on the CPU, which plans of the network at any size share.
pub struct CpuWeights {
    /// The weights that were loaded for this network, in one allocation.
    own: Arc<WeightPages>,
    places: Vec<Place>,
    specs: Vec<WeightSpec>,
    /// The adapters by which each weight is changed.
    editions: Vec<Edition>,
    by_spec: HashMap<WeightSpec, usize>,
}

/// The location of a weight: in the network's own memory, or in that of another network.
#[derive(Clone)]
struct Place {
    memory: Arc<WeightPages>,
    bytes: Range<usize>,
    form: Form,
}

/// The format of a weight's numbers in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Single,
    Half,
    /// Panels in a rounded format, as bytes.
    Rounded(Precision),
}

impl Form {
    fn of(spec: &WeightSpec, parts: &[Stored], precision: Precision) -> Self {
        let linear = matches!(spec.kind, WeightKind::Matrix { kernel: 1, .. });
        if linear && precision.rounded().is_some_and(|format| format.suits(spec.width)) {
            return Form::Rounded(precision);
        }
        let matrix = matches!(spec.kind, WeightKind::Matrix { .. } | WeightKind::Mirrored { .. });
        let half = matrix && parts.iter().all(Stored::fits_half);
        if half { Form::Half } else { Form::Single }
    }

    /// Bytes of an element.
    fn size(self) -> usize {
        match self {
            Form::Single => size_of::<f32>(),
            Form::Half => size_of::<f16>(),
            Form::Rounded(_) => size_of::<u8>(),
        }
    }

    /// Bytes of a weight in packed form.
    fn bytes(self, spec: &WeightSpec) -> usize {
        packed(spec, self) * self.size()
    }
}

/// Bytes in memory pages of their own.
struct WeightPages(MmapMut);

impl CpuWeights {
    /// Reads and packs `specs`, with linear layers in `precision`. Weights that `others`, from the same checkpoint,
    /// hold already, changed by the same adapters, are shared with them, and no tensor is ever held in two forms.
    ///
    /// # Errors
    /// Those of [`Tensors::stored`], [`crate::ErrorKind::Damaged`] for a number that is not finite, or
    /// [`crate::ErrorKind::OutOfMemory`] when memory is short.
    pub fn load(
        specs: &[WeightSpec],
        tensors: &Tensors,
        others: &[&CpuWeights],
        precision: Precision,
    ) -> Result<Arc<Self>> {
        let editions: Vec<Edition> = specs.iter().map(|spec| tensors.edition(spec)).collect();
        let find = |(spec, edition)| others.iter().find_map(|other| other.place(spec, edition).cloned());
        let found: Vec<_> = specs.iter().zip(&editions).map(find).collect();
        let lacking = specs.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(spec, _)| spec);
        let lacking = lacking.map(|spec| {
            let parts = tensors.stored(spec)?;
            Ok(Lacking { spec, form: Form::of(spec, &parts, precision), parts })
        });
        let lacking = lacking.collect::<Result<Vec<_>>>()?;
        let bytes = lacking.iter().map(|weight| weight.bytes().next_multiple_of(ALIGN)).sum();
        let mut own = WeightPages(pages(bytes, "weights")?);
        std::thread::scope(|scope| {
            let read_ahead = || lacking.iter().for_each(|weight| tensors.read_ahead(&weight.parts));
            // If no thread can be started, files are read only when they are needed.
            let _ = std::thread::Builder::new().spawn_scoped(scope, read_ahead);
            pack(&lacking, &mut own.0, |parts| tensors.done_with(parts))
        })?;
        let (own, mut end) = (Arc::new(own), 0);
        let mut places = lacking.iter().map(|weight| {
            let bytes = end..end + weight.bytes();
            end = bytes.end.next_multiple_of(ALIGN);
            Place { memory: own.clone(), bytes, form: weight.form }
        });
        let places =
            found.into_iter().map(|found| found.or_else(|| places.next()).expect("as many as lacking")).collect();
        let by_spec = specs.iter().enumerate().map(|(place, spec)| (spec.clone(), place)).collect();
        Ok(Arc::new(CpuWeights { own, places, specs: specs.to_vec(), editions, by_spec }))
    }

    /// The list that the weights were loaded for.
    pub fn specs(&self) -> &[WeightSpec] {
        &self.specs
    }

    fn place(&self, spec: &WeightSpec, edition: &Edition) -> Option<&Place> {
        let place = self.by_spec.get(spec).filter(|&&place| self.editions[place] == *edition);
        place.map(|&place| &self.places[place])
    }

    /// A vector or a table.
    pub(super) fn get(&self, id: WeightId) -> &[f32] {
        let Place { memory, bytes, .. } = &self.places[id.0];
        bytemuck::cast_slice(&memory.0[bytes.clone()])
    }

    /// A matrix.
    pub(super) fn matrix(&self, id: WeightId) -> Matrix<'_> {
        let Place { memory, bytes, form } = &self.places[id.0];
        let bytes = &memory.0[bytes.clone()];
        match form {
            Form::Single => Matrix::Single(bytemuck::cast_slice(bytes)),
            Form::Half => Matrix::Half(bytemuck::cast_slice(bytes)),
            Form::Rounded(precision) => Matrix::Rounded(bytes, format(*precision)),
        }
    }
}

impl PackedWeights for CpuWeights {
    /// Bytes of memory, excluding weights that another network holds.
    fn bytes(&self) -> usize {
        self.own.0.len()
    }

    fn missing(&self, specs: &[WeightSpec]) -> usize {
        // A mirrored matrix is held in the same format as the matrix is here.
        let form = |spec: &WeightSpec| {
            let other = self.specs.iter().zip(&self.places).find(|(other, _)| other.names == spec.names);
            match other {
                // Except that mirrored matrices are never rounded; most checkpoints are in fp16.
                Some((_, Place { form: Form::Rounded(_), .. })) => Form::Half,
                Some((_, place)) => place.form,
                None => Form::Single,
            }
        };
        let missing = specs.iter().filter(|spec| !self.by_spec.contains_key(spec));
        missing.map(|spec| form(spec).bytes(spec).next_multiple_of(ALIGN)).sum()
    }
}

/// A weight that is to be loaded.
struct Lacking<'a> {
    spec: &'a WeightSpec,
    parts: Vec<Stored<'a>>,
    form: Form,
}

impl Lacking<'_> {
    fn bytes(&self) -> usize {
        self.form.bytes(self.spec)
    }
}

/// Elements of a weight in packed form; bytes for a rounded format.
fn packed(spec: &WeightSpec, form: Form) -> usize {
    let (depth, columns) = match spec.kind {
        WeightKind::Vector | WeightKind::Table => return spec.len(),
        WeightKind::Matrix { .. } => (spec.width, spec.total_outputs()),
        WeightKind::Mirrored { kernel, wanted, .. } => (kernel * kernel * spec.total_outputs(), wanted),
    };
    match form {
        Form::Rounded(precision) => columns.div_ceil(PANEL) * format(precision).panel_bytes(depth),
        _ => packed_len(depth, columns),
    }
}

/// A stretch of a weight, which one thread packs.
struct PackTask<'a> {
    /// The weight's index in the list.
    index: usize,
    /// Start of the stretch in the weight's packed form, in elements.
    start: usize,
    out: &'a mut [u8],
}

/// Packs weights one after the other, each padded to [`ALIGN`], into `out`, which is zeroed. Calls `done` with each
/// weight's tensors after they have been read.
fn pack(weights: &[Lacking], out: &mut [u8], done: impl Fn(&[Stored]) + Sync) -> Result<()> {
    let mut tasks = Vec::new();
    let mut left: Vec<AtomicUsize> = Vec::new();
    let mut rest = out;
    for (index, weight) in weights.iter().enumerate() {
        let (spec, bytes) = (weight.spec, weight.bytes());
        let (room, after) = rest.split_at_mut(bytes.next_multiple_of(ALIGN));
        rest = after;
        // Matrices are packed in whole panels.
        let unit = match spec.kind {
            WeightKind::Vector | WeightKind::Table => 1,
            WeightKind::Matrix { .. } => match weight.form {
                Form::Rounded(precision) => format(precision).panel_bytes(spec.width),
                _ => spec.width * PANEL,
            },
            WeightKind::Mirrored { kernel, .. } => kernel * kernel * spec.total_outputs() * PANEL,
        };
        let length = (TASK / unit).max(1) * unit;
        let chunks = room[..bytes].chunks_mut(length * weight.form.size()).enumerate();
        left.push(chunks.len().into());
        tasks.extend(chunks.map(|(i, out)| PackTask { index, start: i * length, out }));
    }
    // `par_bridge` hands tasks out in order, so that files are read from front to back.
    let run = |task: PackTask| {
        let Lacking { spec, parts, form } = &weights[task.index];
        let finite = match form {
            Form::Single => pack_stretch::<f32>(spec, parts, task.start, bytemuck::cast_slice_mut(task.out)),
            Form::Half => pack_stretch::<f16>(spec, parts, task.start, bytemuck::cast_slice_mut(task.out)),
            Form::Rounded(precision) => pack_rounded(format(*precision), spec, parts, task.start, task.out),
        };
        if left[task.index].fetch_sub(1, Ordering::Relaxed) == 1 {
            done(parts);
        }
        (!finite).then_some(task.index)
    };
    match tasks.into_iter().par_bridge().filter_map(run).min() {
        Some(bad) => weights[bad].parts.iter().try_for_each(Stored::check_finite),
        None => Ok(()),
    }
}

/// Packs the stretch that begins at `start` in a weight's packed form. Returns false if a number is not finite.
fn pack_stretch<T: Number>(spec: &WeightSpec, parts: &[Stored], start: usize, out: &mut [T]) -> bool {
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

/// The format of a rounded matrix.
fn format(precision: Precision) -> &'static dyn Rounded {
    precision.rounded().expect("a format: the matrix is rounded")
}

/// Like [`pack_stretch`], for a linear layer in a rounded format.
fn pack_rounded(format: &dyn Rounded, spec: &WeightSpec, parts: &[Stored], start: usize, out: &mut [u8]) -> bool {
    let bytes = format.panel_bytes(spec.width);
    let mut numbers = vec![0.0f32; spec.width * PANEL];
    out.chunks_exact_mut(bytes).enumerate().fold(true, |finite, (i, out)| {
        let first = (start / bytes + i) * numbers.len();
        let whole = pack_stretch(spec, parts, first, &mut numbers);
        format.pack(&numbers, out);
        finite & whole
    })
}

/// Reads the numbers from `start` on of tensors that are concatenated. Returns false if one is not finite.
fn numbers<T: Number>(parts: &[Stored], mut start: usize, mut out: &mut [T]) -> bool {
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

/// Packs a panel of `[out, in, k, k]`: its rows are taps, then input channels, and its columns are outputs.
fn pack_panel<T: Number>(parts: &[Stored], columns: &[Option<usize>; PANEL], taps: usize, panel: &mut [T]) -> bool {
    let depth = panel.len() / PANEL;
    let channels = depth / taps;
    let together = (STRIP / taps).max(1);
    // Rows of the strip are 16 numbers further apart than they are long: with a power of two as pitch, a column of the
    // strip would fall into few sets of the cache.
    let pitch = together * taps + 16;
    let mut strip = vec![T::zeroed(); PANEL * pitch];
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

/// Packs a panel of `[out, in, k, k]` for the data gradient: its rows are mirrored taps, then the layer's outputs, and
/// its columns are some of the layer's inputs.
fn pack_mirrored<T: Number>(
    parts: &[Stored],
    inputs: usize,
    columns: Range<usize>,
    taps: usize,
    panel: &mut [T],
) -> bool {
    let outputs = panel.len() / PANEL / taps;
    let mut strip = vec![T::zeroed(); columns.len() * taps];
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

/// The output of the layer that is in column `j` of a panel, if any.
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

    /// Packs every number to its place, one after the other.
    fn packed_by_definition(case: &Case) -> Vec<f32> {
        let outputs = case.spec.total_outputs();
        let mut numbers = vec![0.0; packed(&case.spec, Form::Single)];
        for ([output, input, tap], x) in case.numbers() {
            // The panel of 32 columns, the line in it, the number of lines of such panels, and the column.
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

    /// The packed numbers of each case, in fp32, and the format in which they are held.
    fn load(cases: &[Case]) -> Result<Vec<(Vec<f32>, Form)>> {
        fn weight(case: &Case) -> Lacking<'_> {
            let (spec, parts) = (&case.spec, case.stored());
            Lacking { spec, form: Form::of(spec, &parts, Precision::Full), parts }
        }
        let weights: Vec<_> = cases.iter().map(weight).collect();
        let len: usize = weights.iter().map(|weight| weight.bytes().next_multiple_of(ALIGN)).sum();
        let mut out = WeightPages(pages(len, "weights")?);
        let read = AtomicUsize::new(0);
        pack(&weights, &mut out.0, |parts| {
            read.fetch_add(parts.len(), Ordering::Relaxed);
        })?;
        assert_eq!(read.into_inner(), cases.iter().map(|case| case.spec.names.len()).sum::<usize>());
        let mut at = 0;
        let numbers = weights.iter().map(|weight| {
            let bytes = &out.0[at..][..weight.bytes()];
            at += bytes.len().next_multiple_of(ALIGN);
            let numbers = match weight.form {
                Form::Single => bytemuck::cast_slice(bytes).to_vec(),
                Form::Half => bytemuck::cast_slice::<_, f16>(bytes).iter().map(|x| x.to_f32()).collect(),
                Form::Rounded(_) => unreachable!("nobody asked for it"),
            };
            (numbers, weight.form)
        });
        Ok(numbers.collect())
    }

    /// Packing is bit for bit as defined, for every kind, format and layout.
    #[test]
    fn weights_are_packed_as_one_number_after_the_other() {
        let mut random = Random(1);
        let mut forms = [0; 2];
        for round in 0..30 {
            let mut cases: Vec<Case> = (0..20).map(|_| Case::random(&mut random)).collect();
            if round % 10 == 0 {
                // Larger than the stretch that one thread packs at a time.
                let kind = WeightKind::Matrix { kernel: 3, inputs: 65, gated: false, resized: false };
                cases.push(Case::new(kind, vec![333, 450], 9 * 65, &mut random));
                cases.push(Case::new(WeightKind::Table, vec![5000], 70, &mut random));
                let kind = WeightKind::Mirrored { kernel: 1, inputs: 300, wanted: 290 };
                cases.push(Case::new(kind, vec![1500], 300, &mut random));
            }
            for (case, (got, form)) in cases.iter().zip(load(&cases).unwrap()) {
                let truth = packed_by_definition(case);
                let wrong = got.iter().zip(&truth).position(|(a, b)| a.to_bits() != b.to_bits());
                assert_eq!((got.len(), wrong), (truth.len(), None), "{case:?}");
                forms[usize::from(form == Form::Half)] += 1;
            }
        }
        assert!(forms.into_iter().all(|count| count > 20), "{forms:?}");
    }

    /// The error names the first bad number of the first bad weight, whichever others are bad and whatever the formats.
    #[test]
    fn a_number_that_is_not_finite_is_named() {
        let mut random = Random(2);
        let kind = WeightKind::Matrix { kernel: 3, inputs: 40, gated: false, resized: false };
        for _ in 0..10 {
            let mut cases: Vec<Case> = (0..12).map(|_| Case::random(&mut random)).collect();
            for place in [5, 9] {
                cases[place] = Case::new(kind.clone(), vec![20, 50], 360, &mut random);
                cases[place].spec.names[1] = format!("bad {place}");
                for position in [17_000, 7_777] {
                    cases[place].damage(1, position, f64::NAN);
                }
            }
            let problem = "tensor `bad 5` holds NaN at position 7777";
            assert_eq!(load(&cases).map(drop).unwrap_err().problem(), problem, "{:?}", cases[5]);
        }
    }
}
