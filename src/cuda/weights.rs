//! Weights as the kernels read them: vectors in fp32, tables and matrices in fp16.
//!
//! Tensors go to the device as they lie in their files, and `kernels/weights.cu` packs them there.

use super::device::{Buffer, Device, Launch, Limits};
use super::folded;
use crate::graph::{WeightKind, WeightSpec};
use crate::weights::{Stored, Tensors};
use crate::{Error, Result};
use half::f16;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Input channels of a matrix are filled up with zeros to a multiple of this: 16 bytes, what one thread copies.
pub(super) const CHUNK: usize = 8;
/// Weights begin at multiples of this many bytes.
const ALIGN: usize = 256;
/// Bytes of a file that lie on the device at a time, unless a single row is longer.
const STAGE: usize = 64 << 20;
/// Threads of a block.
const THREADS: usize = 128;
/// Bytes of S and T.
const SUMS: usize = 2 * size_of::<f32>();

/// A network's weights in device memory, shared by every plan of the network at whatever size.
pub struct Weights {
    /// What was loaded for this network, in one piece.
    own: Arc<Buffer>,
    /// Where each weight begins: there, or among another network's.
    places: Vec<(Arc<Buffer>, usize)>,
    specs: Vec<WeightSpec>,
    /// The place of each, [as it is packed](folded::as_packed) for this device.
    by_spec: HashMap<WeightSpec, usize>,
    limits: Limits,
}

impl Weights {
    /// Uploads and packs all of `specs`. The device holds them once, and [`STAGE`] bytes more while this runs.
    ///
    /// # Errors
    /// Those of [`Tensors::stored`], [`Error::Checkpoint`] for NaN and infinity, or [`Error::Device`] when memory is
    /// short.
    pub fn load(device: &Arc<dyn Device>, specs: &[WeightSpec], tensors: &Tensors) -> Result<Arc<Self>> {
        Self::load_beside(device, specs, tensors, &[])
    }

    /// The same, taking what `others` of the same checkpoint hold on the device in the same form from them.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load_beside(
        device: &Arc<dyn Device>,
        specs: &[WeightSpec],
        tensors: &Tensors,
        others: &[&Weights],
    ) -> Result<Arc<Self>> {
        let limits = device.limits();
        let as_packed: Vec<_> = specs.iter().map(|spec| folded::as_packed(spec, limits)).collect();
        // Addresses mean nothing on another device.
        let others: Vec<_> = others.iter().filter(|other| other.is_on(device)).collect();
        let find = |spec| others.iter().find_map(|other| Some(other.places[*other.by_spec.get(spec)?].clone()));
        let found: Vec<Option<(Arc<Buffer>, usize)>> = as_packed.iter().map(find).collect();
        let lacking = as_packed.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(spec, _)| spec);
        let lacking: Vec<_> = lacking.map(|spec| (spec, spec.norm_vector())).collect();
        // All that can be wrong but the numbers is found before anything is allocated.
        let loading = lacking.iter().map(|(spec, norm)| Loading::find(spec, norm.as_ref(), tensors));
        let loading: Vec<Loading> = loading.collect::<Result<_>>()?;
        let own = Arc::new(Buffer::zeroed(device, loading.iter().map(|weight| padded_bytes(weight.spec)).sum())?);
        let offsets = upload(device, &own, &loading, STAGE)?;
        let mut offsets = offsets.into_iter();
        let mut place = |found: Option<_>| found.or_else(|| Some((own.clone(), offsets.next()?)));
        let places = found.into_iter().filter_map(&mut place).collect();
        let by_spec = as_packed.into_iter().enumerate().map(|(place, spec)| (spec, place)).collect();
        Ok(Arc::new(Weights { own, places, specs: specs.to_vec(), by_spec, limits }))
    }

    /// The list that they were loaded for.
    pub fn specs(&self) -> &[WeightSpec] {
        &self.specs
    }

    /// True if they are on `device`.
    pub(super) fn is_on(&self, device: &Arc<dyn Device>) -> bool {
        self.own.is_on(device)
    }

    /// Bytes of device memory, but for what others hold.
    pub fn bytes(&self) -> usize {
        self.own.len()
    }

    /// Bytes that `specs` would take beside these.
    pub fn missing(&self, specs: &[WeightSpec]) -> usize {
        let as_packed = specs.iter().map(|spec| folded::as_packed(spec, self.limits));
        as_packed.filter(|spec| !self.by_spec.contains_key(spec)).map(|spec| padded_bytes(&spec)).sum()
    }

    /// Where each weight begins, by its number in the network.
    pub(super) fn addresses(&self) -> Vec<u64> {
        self.places.iter().map(|(buffer, offset)| buffer.address() + *offset as u64).collect()
    }
}

/// A weight and its tensors, and as much of the norm that is folded into it.
struct Loading<'a> {
    spec: &'a WeightSpec,
    parts: Vec<Stored<'a>>,
    norm: Option<(&'a WeightSpec, Vec<Stored<'a>>)>,
}

impl<'a> Loading<'a> {
    fn find(spec: &'a WeightSpec, norm: Option<&'a WeightSpec>, tensors: &'a Tensors) -> Result<Self> {
        let norm = norm.map(|norm| Ok::<_, Error>((norm, tensors.stored(norm)?))).transpose()?;
        Ok(Loading { spec, parts: tensors.stored(spec)?, norm })
    }

    /// All tensors in the order in which they are uploaded.
    fn tensors(&self) -> impl Iterator<Item = &Stored<'a>> {
        self.norm.iter().flat_map(|(_, parts)| parts).chain(&self.parts)
    }
}

/// Bytes from one weight to the next on a device.
fn padded_bytes(spec: &WeightSpec) -> usize {
    behind(spec) + (phases_bytes(spec) + sums_bytes(spec)).next_multiple_of(ALIGN)
}

/// How far behind a weight's first byte its second part begins: the form for a doubled source, or the sums for a norm.
/// No weight has both.
pub(super) fn behind(spec: &WeightSpec) -> usize {
    packed_bytes(spec).next_multiple_of(ALIGN)
}

/// True if a matrix has sums for the norm that is folded into it.
pub(super) fn has_sums(spec: &WeightSpec) -> bool {
    spec.norm.is_some() && matches!(spec.kind, WeightKind::Matrix { .. })
}

/// Bytes of these sums: S and T of each packed column, as `kernels/weights.cu` defines them.
fn sums_bytes(spec: &WeightSpec) -> usize {
    if has_sums(spec) { spec.total_outputs() * SUMS } else { 0 }
}

/// True if a weight has a second form, for a doubled source.
pub(super) fn has_phases(spec: &WeightSpec) -> bool {
    matches!(spec.kind, WeightKind::Matrix { kernel: 3, gated: false, resized: true, .. })
}

/// Bytes of a weight's form for a doubled source, if it has one.
///
/// Behind a doubling a 3x3 kernel sees 2x2 pixels, which ones and how often depends on whether the result's row and column are
/// even: these four phases are 2x2 kernels whose taps are sums of the 3x3 one's, 4/9 of the work. They are packed as
/// `[2 * row parity + column parity][outputs][taps][inputs]`.
fn phases_bytes(spec: &WeightSpec) -> usize {
    if has_phases(spec) { packed_bytes(spec) / 9 * 16 } else { 0 }
}

fn packed_bytes(spec: &WeightSpec) -> usize {
    match spec.kind {
        WeightKind::Vector => spec.len() * size_of::<f32>(),
        WeightKind::Table => spec.len() * size_of::<f16>(),
        WeightKind::Matrix { kernel, inputs, .. } => {
            spec.total_outputs() * kernel * kernel * inputs.next_multiple_of(CHUNK) * size_of::<f16>()
        }
        WeightKind::Mirrored { kernel, wanted, .. } => {
            wanted * kernel * kernel * spec.total_outputs().next_multiple_of(CHUNK) * size_of::<f16>()
        }
    }
}

/// Uploads weights into `own`, one after the other, and packs them there, at most `limit` bytes of a file at a time.
/// Gives their offsets.
fn upload(device: &Arc<dyn Device>, own: &Buffer, weights: &[Loading], limit: usize) -> Result<Vec<usize>> {
    let whole_rows = |part: &Stored| (limit / row_bytes(part)).max(1);
    let largest = weights
        .iter()
        .flat_map(Loading::tensors)
        .map(|part| part.bytes_in_file().min(whole_rows(part) * row_bytes(part)))
        .max();
    let stage = Buffer::new(device, largest.unwrap_or(0))?;
    // A word for every weight, so that the first damaged one can be named.
    let faults = Buffer::zeroed(device, weights.len() * size_of::<u32>())?;
    // Scale and shift of the norm that is folded into the next weight.
    let norms = weights.iter().flat_map(|weight| &weight.norm).map(|(norm, _)| packed_bytes(norm));
    let norm = Buffer::new(device, norms.max().unwrap_or(0))?;
    let packing = |number: usize, spec: &WeightSpec, to: u64| Packing {
        form: Form::of(spec),
        to,
        fault: faults.address() + (number * size_of::<u32>()) as u64,
        from: stage.address(),
        outputs: spec.total_outputs(),
        phases: has_phases(spec).then(|| behind(spec) / size_of::<f16>()),
        norm: spec.norm.is_some().then(|| norm.address()),
        sums: has_sums(spec).then(|| to + behind(spec) as u64),
    };
    let pack = |packing: Packing, parts: &[Stored]| {
        let mut first_output = 0;
        for part in parts {
            let (row, rows_at_once) = (row_bytes(part), whole_rows(part));
            for (i, chunk) in part.bytes().chunks(rows_at_once * row).enumerate() {
                let first = i * rows_at_once;
                let rows = first..first + chunk.len() / row;
                stage.write(0, chunk)?;
                // SAFETY: the launches read `stage` and `norm` and write inside `own`, `norm` and `faults`, which outlive
                // the work: the faults are read after it. The next write to `stage` comes after it on the device, too.
                unsafe { device.run(&packing.launches(part, first_output, rows))? };
            }
            first_output += part.outputs;
        }
        Ok::<_, Error>(())
    };
    let (mut offsets, mut end) = (Vec::new(), 0);
    for (number, Loading { spec, parts, norm: folded }) in weights.iter().enumerate() {
        if let Some((vector, parts)) = folded {
            pack(packing(number, vector, norm.address()), parts)?;
        }
        pack(packing(number, spec, own.address() + end as u64), parts)?;
        offsets.push(end);
        end += padded_bytes(spec);
    }
    let mut bytes = vec![0; faults.len()];
    faults.read(0, &mut bytes)?;
    if let Some(bad) = bytes.iter().position(|&byte| byte != 0) {
        let weight = &weights[bad / size_of::<u32>()];
        weight.tensors().try_for_each(Stored::check_finite)?;
        let problem = format!("the device found NaN or infinity in {:?} where the file holds none", weight.spec.names);
        return Err(Error::device_lost(problem).advise("its memory or its link is faulty"));
    }
    Ok(offsets)
}

/// Bytes of a row of the matrix as the file holds it.
fn row_bytes(part: &Stored) -> usize {
    let numbers = if part.transposed { part.outputs } else { part.width };
    numbers * part.format.bytes()
}

crate::params! {
    pub(super) struct PackParams {
        from: u64,
        to: u64,
        fault: u64,
        norm_scale: u64,
        norm_shift: u64,
        sums: u64,
        from_line: i64,
        from_group: i64,
        from_element: i64,
        to_line: i64,
        to_group: i64,
        to_element: i64,
        length: i32,
        format: i32,
        full: i32,
        down: i32,
        across: i32,
        input_line: i32,
        input_element: i32,
        column_line: i32,
    }
}

/// How the numbers of a weight `[outputs, inputs, taps]` are packed. Strides are in numbers.
///
/// A matrix becomes `[outputs, taps, inputs]` with the inputs filled up to a multiple of [`CHUNK`]; a gated one's
/// values and gates take turns. A mirrored one becomes `[inputs, taps, outputs]`, its taps in reverse and its outputs
/// filled up.
struct Form {
    /// How many inputs are packed; others follow them in the file.
    inputs: usize,
    taps: usize,
    /// The place of the first number in the packed form.
    start: i64,
    /// From there to the next output, input and tap.
    output: i64,
    input: i64,
    tap: i64,
    /// Of a gated matrix, the number of outputs that are values: as many gates follow them in the file.
    values: Option<usize>,
    /// True if numbers stay fp32.
    full: bool,
}

impl Form {
    fn of(spec: &WeightSpec) -> Self {
        let plain = Form {
            inputs: spec.width,
            taps: 1,
            start: 0,
            output: spec.width as i64,
            input: 1,
            tap: 0,
            values: None,
            full: false,
        };
        match spec.kind {
            // Its numbers are outputs, and neighbours.
            WeightKind::Vector => Form { full: true, output: 1, input: 0, ..plain },
            WeightKind::Table => plain,
            WeightKind::Matrix { kernel, inputs, gated, .. } => {
                let (taps, padded) = (kernel * kernel, inputs.next_multiple_of(CHUNK) as i64);
                let values = gated.then_some(spec.total_outputs() / 2);
                Form { inputs, taps, output: taps as i64 * padded, tap: padded, values, ..plain }
            }
            WeightKind::Mirrored { kernel, wanted, .. } => {
                let (taps, padded) = (kernel * kernel, spec.total_outputs().next_multiple_of(CHUNK) as i64);
                let start = (taps as i64 - 1) * padded;
                Form { inputs: wanted, taps, start, output: 1, input: taps as i64 * padded, tap: -padded, ..plain }
            }
        }
    }
}

/// A weight that is being packed from `from` to `to`.
struct Packing {
    form: Form,
    from: u64,
    to: u64,
    fault: u64,
    outputs: usize,
    /// Where the form for a doubled source begins, in numbers, if it is wanted.
    phases: Option<usize>,
    /// Where the scale and the shift of the norm lie that is folded into the matrix.
    norm: Option<u64>,
    /// Where the matrix's sums for it begin, if they are wanted.
    sums: Option<u64>,
}

/// What the lines of a copy have to do with a norm that is folded into the matrix: fields of [`PackParams`].
#[derive(Default)]
struct Folded {
    norm_scale: u64,
    norm_shift: u64,
    sums: u64,
    input_line: i32,
    input_element: i32,
    column_line: i32,
}

/// One dimension of a strided copy.
#[derive(Clone, Copy)]
struct Dimension {
    length: usize,
    from: i64,
    to: i64,
}

impl Packing {
    /// The launches that pack a part of the weight, of which `from` holds these rows as they lie in the file. The
    /// part's first output is number `first_output` of the weight's.
    fn launches(&self, part: &Stored, first_output: usize, rows: Range<usize>) -> Vec<Launch> {
        let form = &self.form;
        // The file's rows are outputs, or inputs if it holds the matrix transposed.
        let (outputs, inputs) = match part.transposed {
            true => (first_output..first_output + part.outputs, rows.start..rows.end.min(form.inputs)),
            false => (first_output + rows.start..first_output + rows.end, 0..form.inputs),
        };
        let [from_output, from_input, from_tap] = match part.transposed {
            true => [1, part.outputs as i64, 0],
            false => [part.width as i64, form.taps as i64, 1],
        };
        // A gated matrix is two copies: values go to even rows of the packed form, gates to odd ones.
        let split = form.values.map_or(outputs.end, |values| values.clamp(outputs.start, outputs.end));
        let of_gates = form.values.unwrap_or(0);
        let spread = if form.values.is_some() { 2 } else { 1 };
        // `column` is the packed place of the piece's first output.
        let piece = |outputs_of_piece: Range<usize>, column: i64| {
            let output = Dimension { length: outputs_of_piece.len(), from: from_output, to: spread * form.output };
            let input = Dimension { length: inputs.len(), from: from_input, to: form.input };
            let tap = Dimension { length: form.taps, from: from_tap, to: form.tap };
            let from = (outputs_of_piece.start - outputs.start) as i64 * from_output;
            let to = form.start + column * form.output + inputs.start as i64 * form.input;
            // The last dimension is the one in which packed numbers are neighbours, for threads to write side by side.
            let across_inputs = form.input == 1;
            let dimensions = if across_inputs { [output, tap, input] } else { [input, tap, output] };
            let folded = self.norm.map(|norm| Folded {
                norm_scale: norm + (inputs.start * size_of::<f32>()) as u64,
                norm_shift: norm + ((part.width + inputs.start) * size_of::<f32>()) as u64,
                sums: self.sums.map_or(0, |sums| sums.wrapping_add_signed(column * SUMS as i64)),
                input_line: i32::from(!across_inputs),
                input_element: i32::from(across_inputs),
                column_line: spread as i32,
            });
            self.launch(part, from, to, [1, 1], dimensions, folded.unwrap_or_default())
        };
        let values = piece(outputs.start..split, spread * outputs.start as i64);
        let gates = piece(split..outputs.end, 2 * (split as i64 - of_gates as i64) + 1);
        let phases = self.phases.into_iter().flat_map(|start| self.phase_launches(part, start, outputs.clone()));
        values.into_iter().chain(gates).chain(phases).collect()
    }

    /// The launches that pack outputs for a doubled source (see [`phases_bytes`]): one for each phase and tap, which sums taps
    /// of the file.
    fn phase_launches(&self, part: &Stored, start: usize, outputs: Range<usize>) -> Vec<Launch> {
        /// By the parity of the result's row and the row of the tap: the first row of the 3x3 kernel, and how many. Columns
        /// likewise.
        const SUMMED: [[(i64, i32); 2]; 2] = [[(0, 1), (1, 2)], [(0, 2), (2, 1)]];
        let (inputs, pixel) = (self.form.inputs, self.form.inputs.next_multiple_of(CHUNK));
        let mut launches = Vec::new();
        for (phase, tap) in (0..4).flat_map(|phase| (0..4).map(move |tap| (phase, tap))) {
            let ((row, down), (column, across)) = (SUMMED[phase / 2][tap / 2], SUMMED[phase % 2][tap % 2]);
            let output = Dimension { length: outputs.len(), from: part.width as i64, to: 4 * pixel as i64 };
            let one = Dimension { length: 1, from: 0, to: 0 };
            let input = Dimension { length: inputs, from: 9, to: 1 };
            let to = start + ((phase * self.outputs + outputs.start) * 4 + tap) * pixel;
            let dimensions = [output, one, input];
            let launch = self.launch(part, 3 * row + column, to as i64, [down, across], dimensions, Folded::default());
            launches.extend(launch);
        }
        launches
    }

    /// A copy that is `from` and `to` numbers further on, unless there is nothing to copy. Each number is the sum of so many,
    /// down and across a 3x3 kernel.
    fn launch(
        &self,
        part: &Stored,
        from: i64,
        to: i64,
        [down, across]: [i32; 2],
        [line, group, element]: [Dimension; 3],
        folded: Folded,
    ) -> Option<Launch> {
        let bytes = if self.form.full { size_of::<f32>() } else { size_of::<f16>() } as i64;
        let params = PackParams {
            from: self.from.wrapping_add_signed(from * part.format.bytes() as i64),
            to: self.to.wrapping_add_signed(to * bytes),
            fault: self.fault,
            norm_scale: folded.norm_scale,
            norm_shift: folded.norm_shift,
            sums: folded.sums,
            from_line: line.from,
            from_group: group.from,
            from_element: element.from,
            to_line: line.to,
            to_group: group.to,
            to_element: element.to,
            length: element.length as i32,
            format: part.format as i32,
            full: self.form.full.into(),
            down,
            across,
            input_line: folded.input_line,
            input_element: folded.input_element,
            column_line: folded.column_line,
        };
        let shared = if folded.sums == 0 { 0 } else { THREADS / 32 * SUMS };
        let any = line.length * group.length * element.length > 0;
        any.then(|| Launch::new("pack_weights", [line.length, group.length, 1], THREADS, shared, &params))
    }
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use super::super::{Emulated, Limits};
    use super::*;
    use crate::weights::cases::{Case, Random};
    use respodiff_emulated_kernels::Schedule;

    /// The packed form by its definition, in which every number is put into its place.
    fn packed_by_definition(case: &Case) -> Vec<u8> {
        let (spec, outputs) = (&case.spec, case.spec.total_outputs());
        if spec.kind == WeightKind::Vector {
            return case.numbers().flat_map(|(_, x)| x.to_le_bytes()).collect();
        }
        let norm: Option<Vec<f32>> = case.norm.as_ref().map(|norm| norm.numbers().map(|(_, x)| x).collect());
        let mut halves = vec![f16::ZERO; packed_bytes(spec) / size_of::<f16>()];
        for ([output, input, tap], x) in case.numbers() {
            let x = x * norm.as_ref().map_or(1.0, |norm| norm[input]);
            let place = match spec.kind {
                WeightKind::Vector | WeightKind::Table => output * spec.width + input,
                WeightKind::Matrix { kernel, inputs, gated, .. } => {
                    let row = match gated {
                        false => output,
                        true => output % (outputs / 2) * 2 + output / (outputs / 2),
                    };
                    (row * kernel * kernel + tap) * inputs.next_multiple_of(CHUNK) + input
                }
                WeightKind::Mirrored { wanted, .. } if input >= wanted => continue,
                WeightKind::Mirrored { kernel, .. } => {
                    let taps = kernel * kernel;
                    (input * taps + taps - 1 - tap) * outputs.next_multiple_of(CHUNK) + output
                }
            };
            halves[place] = f16::from_f32(x.clamp(-65504.0, 65504.0));
        }
        bytemuck::cast_slice(&halves).to_vec()
    }

    fn load(device: &Arc<dyn Device>, cases: &[Case], limit: usize) -> Result<Vec<Vec<u8>>> {
        let loading = cases.iter().map(|case| Loading {
            spec: &case.spec,
            parts: case.stored(),
            norm: case.norm.as_ref().map(|norm| (&norm.spec, norm.stored())),
        });
        let weights: Vec<_> = loading.collect();
        let own = Buffer::zeroed(device, cases.iter().map(|case| padded_bytes(&case.spec)).sum())?;
        let read = |(case, offset): (&Case, usize)| {
            let second = phases_bytes(&case.spec) + sums_bytes(&case.spec);
            let mut bytes = vec![0; if second > 0 { behind(&case.spec) + second } else { packed_bytes(&case.spec) }];
            own.read(offset, &mut bytes).map(|()| bytes)
        };
        cases.iter().zip(upload(device, &own, &weights, limit)?).map(read).collect()
    }

    /// Compares S and T with sums in float64, of the packed numbers and of the file's.
    fn assert_sums(case: &Case, packed: &[u8], sums: &[u8]) {
        let numbers = |norm: &Case| norm.numbers().map(|(_, x)| f64::from(x)).collect::<Vec<_>>();
        let (inputs, outputs) = (case.spec.width, case.spec.total_outputs());
        let shift = &numbers(case.norm.as_ref().unwrap())[inputs..];
        let gated = matches!(case.spec.kind, WeightKind::Matrix { gated: true, .. });
        // Each sum with the sum of what it is made of without signs.
        let mut truth = vec![[(0.0, 0.0); 2]; outputs];
        let mut add = |column: usize, of: usize, x: f64| {
            truth[column][of].0 += x;
            truth[column][of].1 += x.abs();
        };
        for (place, x) in bytemuck::pod_collect_to_vec::<u8, f16>(packed).into_iter().enumerate() {
            add(place / inputs.next_multiple_of(CHUNK), 0, x.to_f64());
        }
        for ([output, input, _], x) in case.numbers() {
            let column = if gated { output % (outputs / 2) * 2 + output / (outputs / 2) } else { output };
            add(column, 1, f64::from(x) * shift[input]);
        }
        let sums: Vec<f32> = bytemuck::pod_collect_to_vec(sums);
        assert_eq!(sums.len(), 2 * outputs, "{case:?}");
        for (&sum, &(right, size)) in sums.iter().zip(truth.iter().flatten()) {
            // At most 70 additions in fp32, in whatever order.
            assert!((f64::from(sum) - right).abs() <= 70.0 * 2f64.powi(-24) * size, "{sum} for {right}: {case:?}");
        }
    }

    /// Every kind, format and layout, with and without a norm, bit for bit, a row at a time, a few, and whole.
    #[test]
    fn forms_are_packed_as_defined() {
        let mut random = Random(1);
        for schedule in Schedule::hostile(3) {
            let device = Emulated::new(Limits::A100, schedule);
            for limit in [1, 1000, 1 << 20] {
                let cases: Vec<Case> = (0..12).map(|_| Case::random(&mut random)).collect();
                for (case, bytes) in cases.iter().zip(load(&device, &cases, limit).unwrap()) {
                    let packed = packed_by_definition(case);
                    assert!(bytes[..packed.len()] == packed, "limit {limit}: {case:?}");
                    if has_sums(&case.spec) {
                        assert_sums(case, &packed, &bytes[behind(&case.spec)..]);
                    }
                }
            }
        }
    }

    /// A 3x3 kernel behind a resize is packed a second time, for doubled sources: row 2 of a doubled image, which is even, and
    /// row 3, which is odd, see its rows 1 to 3 and 2 to 4, which are rows 0, 1, 1 and 1, 1, 2 of the source.
    #[test]
    fn phases_of_a_doubled_source() {
        let (outputs, inputs, pixel) = (5, 61, 64);
        let kind = WeightKind::Matrix { kernel: 3, inputs, gated: false, resized: true };
        let cases = [Case::new(kind, vec![outputs], 9 * inputs, &mut Random(3))];
        let half = |x: f32| f16::from_f32(x.clamp(-65504.0, 65504.0));
        let seen = |parity: usize, k: usize| [[0, 1, 1], [0, 0, 1]][parity][k];
        for limit in [1, 9000, 1 << 20] {
            let both = load(&Emulated::new(Limits::A100, Emulated::QUICK), &cases, limit).unwrap().remove(0);
            let exact = packed_by_definition(&cases[0]);
            assert!(both[..exact.len()] == exact, "limit {limit}");
            let phases: Vec<f16> = bytemuck::pod_collect_to_vec(&both[behind(&cases[0].spec)..]);
            let mut wanted = vec![0.0; 4 * outputs * 4 * pixel];
            for ([output, input, tap], x) in cases[0].numbers() {
                for phase in 0..4 {
                    let to = seen(phase / 2, tap / 3) * 2 + seen(phase % 2, tap % 3);
                    wanted[((phase * outputs + output) * 4 + to) * pixel + input] += x;
                }
            }
            assert!(phases.iter().zip(&wanted).all(|(&x, &y)| x == half(y)), "limit {limit}");
            assert_eq!(phases.len(), wanted.len());
        }
    }

    /// The first bad number of the first bad weight is told, wherever it is and however bad.
    #[test]
    fn damaged_numbers_are_found() {
        let device = Emulated::new(Limits::A100, Emulated::QUICK);
        let mut random = Random(2);
        let kind = WeightKind::Matrix { kernel: 1, inputs: 300, gated: false, resized: false };
        for (position, value, text) in
            [(0, f64::NAN, "NaN"), (299, f64::INFINITY, "inf"), (11_999, f64::NEG_INFINITY, "-inf")]
        {
            for _ in 0..4 {
                let mut cases = [(); 3].map(|()| Case::new(kind.clone(), vec![40], 300, &mut random));
                cases[1].spec.names[0] = "damaged".into();
                cases[1..].iter_mut().for_each(|case| case.damage(0, position, value));
                let problem = load(&device, &cases, 1000).unwrap_err().to_string();
                let words = format!("tensor `damaged` holds {text} at position {position};");
                assert!(problem.contains(&words), "{problem}: {:?}", cases[1]);
            }
        }
    }
}
