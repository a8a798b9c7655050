//! Packing of weights: the sizes of packed forms, and the launches of `kernels/weights.cu` that produce them.

use super::super::device::Launch;
use crate::graph::{WeightKind, WeightSpec};
use crate::weights::Stored;
use half::f16;
use std::ops::Range;

/// The inputs of a matrix are padded with zeros to a multiple of this: 16 bytes, which one thread copies.
pub(in crate::cuda) const CHUNK: usize = 8;
/// Weights begin at multiples of this many bytes.
const ALIGN: usize = 256;
/// Threads of a block.
const THREADS: usize = 128;
/// Bytes of S and T.
const SUMS: usize = 2 * size_of::<f32>();

/// Bytes from one weight to the next on a device.
pub(super) fn padded_bytes(spec: &WeightSpec) -> usize {
    behind(spec) + (phases_bytes(spec) + sums_bytes(spec)).next_multiple_of(ALIGN)
}

/// The offset of a weight's second part: the form for an upsampled source, or the sums for a norm. No weight has both.
pub(in crate::cuda) fn behind(spec: &WeightSpec) -> usize {
    packed_bytes(spec).next_multiple_of(ALIGN)
}

/// True if a matrix has sums for a norm that is folded into it.
pub(in crate::cuda) fn has_sums(spec: &WeightSpec) -> bool {
    spec.norm.is_some() && matches!(spec.kind, WeightKind::Matrix { .. })
}

/// Bytes of these sums: S and T of each packed column, as defined in `kernels/weights.cu`.
pub(super) fn sums_bytes(spec: &WeightSpec) -> usize {
    if has_sums(spec) { spec.total_outputs() * SUMS } else { 0 }
}

/// True if a weight has a second form, for an upsampled source.
pub(in crate::cuda) fn has_phases(spec: &WeightSpec) -> bool {
    matches!(spec.kind, WeightKind::Matrix { kernel: 3, gated: false, resized: true, .. })
}

/// Bytes of a weight's form for an upsampled source, if it has one.
///
/// Over a source upsampled by two, a 3x3 kernel sees 2x2 source pixels; which of them, and how often, depends on the
/// parity of the result's row and column. The four phases are therefore 2x2 kernels whose taps are sums of the 3x3
/// kernel's: 4/9 of the work. They are packed as `[2 * row parity + column parity][outputs][taps][inputs]`.
pub(super) fn phases_bytes(spec: &WeightSpec) -> usize {
    if has_phases(spec) { packed_bytes(spec) / 9 * 16 } else { 0 }
}

pub(super) fn packed_bytes(spec: &WeightSpec) -> usize {
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

crate::params! {
    pub(in crate::cuda) struct PackParams {
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
        inputs_across: i32,
        column_line: i32,
        scale: f32,
    }
}

/// The packed layout of a weight `[outputs, inputs, taps]`. Strides are in numbers.
///
/// A matrix becomes `[outputs, taps, inputs]` with the inputs padded to a multiple of [`CHUNK`]; the values and gates
/// of a gated one alternate. A mirrored one becomes `[inputs, taps, outputs]`, with its taps in reverse and its outputs
/// padded.
pub(super) struct Form {
    /// The number of inputs that are packed; others follow them in the file.
    inputs: usize,
    taps: usize,
    /// The index of the first number in the packed form.
    start: i64,
    /// Strides from there to the next output, input and tap.
    output: i64,
    input: i64,
    tap: i64,
    /// For a gated matrix, the number of outputs that are values: the same number of gates follows them in the file.
    values: Option<usize>,
    /// True if numbers stay fp32.
    full: bool,
}

impl Form {
    pub fn of(spec: &WeightSpec) -> Self {
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
            // The numbers of a vector are outputs, and adjacent.
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

/// A weight to be packed from `from` to `to`.
pub(super) struct Packing {
    pub form: Form,
    pub from: u64,
    pub to: u64,
    pub fault: u64,
    pub outputs: usize,
    /// The index in numbers at which the form for an upsampled source begins, if it is wanted.
    pub phases: Option<usize>,
    /// The address of the scale and shift of the norm that is folded into the matrix.
    pub norm: Option<u64>,
    /// The address of the matrix's sums for the norm, if they are wanted.
    pub sums: Option<u64>,
}

/// How the lines of a copy relate to a norm that is folded into the matrix: fields of [`PackParams`].
#[derive(Default)]
struct Folded {
    norm_scale: u64,
    norm_shift: u64,
    sums: u64,
    inputs_across: bool,
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
    /// The launches that pack a part of the weight. `from` holds the given rows of the part as they are in the file;
    /// the part's first output is output `first_output` of the weight.
    pub fn launches(&self, part: &Stored, first_output: usize, rows: Range<usize>) -> Vec<Launch> {
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
        // A gated matrix takes two copies: values go to even rows of the packed form, gates to odd ones.
        let split = form.values.map_or(outputs.end, |values| values.clamp(outputs.start, outputs.end));
        let of_gates = form.values.unwrap_or(0);
        let spread = if form.values.is_some() { 2 } else { 1 };
        // `column` is the index in the packed form of the piece's first output.
        let piece = |outputs_of_piece: Range<usize>, column: i64| {
            let output = Dimension { length: outputs_of_piece.len(), from: from_output, to: spread * form.output };
            let input = Dimension { length: inputs.len(), from: from_input, to: form.input };
            let tap = Dimension { length: form.taps, from: from_tap, to: form.tap };
            let from = (outputs_of_piece.start - outputs.start) as i64 * from_output;
            let to = form.start + column * form.output + inputs.start as i64 * form.input;
            // In the last dimension packed numbers are adjacent, so that threads write side by side.
            let across_inputs = form.input == 1;
            let dimensions = if across_inputs { [output, tap, input] } else { [input, tap, output] };
            let folded = self.norm.map(|norm| Folded {
                norm_scale: norm + (inputs.start * size_of::<f32>()) as u64,
                norm_shift: norm + ((part.width + inputs.start) * size_of::<f32>()) as u64,
                sums: self.sums.map_or(0, |sums| sums.wrapping_add_signed(column * SUMS as i64)),
                inputs_across: across_inputs,
                column_line: spread as i32,
            });
            self.launch(part, from, to, [1, 1], dimensions, folded.unwrap_or_default())
        };
        let values = piece(outputs.start..split, spread * outputs.start as i64);
        let gates = piece(split..outputs.end, 2 * (split as i64 - of_gates as i64) + 1);
        let phases = self.phases.into_iter().flat_map(|start| self.phase_launches(part, start, outputs.clone()));
        values.into_iter().chain(gates).chain(phases).collect()
    }

    /// The launches that pack outputs for an upsampled source (see [`phases_bytes`]): one for each phase and tap, which
    /// sums taps of the file.
    fn phase_launches(&self, part: &Stored, start: usize, outputs: Range<usize>) -> Vec<Launch> {
        /// Indexed by the parity of the result's row and by the row of the tap: the first row of the 3x3 kernel, and
        /// the number of rows. The same holds for columns.
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

    /// A copy with `from` and `to` as additional offsets in numbers, unless there is nothing to copy. Each number is
    /// the sum of `down` x `across` taps of a 3x3 kernel.
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
            inputs_across: folded.inputs_across.into(),
            column_line: folded.column_line,
            scale: part.scale,
        };
        let shared = if folded.sums == 0 { 0 } else { THREADS / 32 * SUMS };
        let any = line.length * group.length * element.length > 0;
        any.then(|| Launch::new("pack_weights", [line.length, group.length, 1], THREADS, shared, &params))
    }
}
