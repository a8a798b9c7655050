//! Random weights in files of every format and layout, for tests of the code that packs weights.

use super::stored::{Data, Format, Stored};
use crate::graph::{WeightKind, WeightSpec};
use half::{bf16, f16};

/// Random numbers from a seed.
pub(crate) struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

/// All number formats.
pub(crate) const FORMATS: [Format; 6] =
    [Format::F16, Format::BF16, Format::F32, Format::F64, Format::F8E4M3, Format::F8E5M2];

/// The number of a byte with `exponent` bits of exponent and the rest but one of mantissa, by the formats' definition.
fn eight_bits(byte: u8, exponent: u32) -> f64 {
    let mantissa = 7 - exponent;
    let bias = (1 << (exponent - 1)) - 1;
    let (e, m) =
        (i32::from(byte & 0x7f) >> mantissa, f64::from(byte & ((1 << mantissa) - 1)) / f64::from(1 << mantissa));
    let sign = if byte > 127 { -1.0 } else { 1.0 };
    let last = e == (1 << exponent) - 1;
    sign * match (exponent, e) {
        (4, _) if byte & 0x7f == 0x7f => f64::NAN,
        (5, _) if last && m == 0.0 => f64::INFINITY,
        (5, _) if last => f64::NAN,
        (_, 0) => m * 2f64.powi(1 - bias),
        _ => (1.0 + m) * 2f64.powi(e - bias),
    }
}

/// The byte whose number is nearest; NaN for infinity, if the format has none.
fn to_eight_bits(x: f64, exponent: u32) -> (Vec<u8>, f32) {
    let number = |byte: &u8| eight_bits(*byte, exponent);
    let near = |byte: &u8| match x.is_finite() {
        true => (number(byte) - x).abs(),
        false => f64::from(u8::from(number(byte).is_nan() != x.is_nan() || number(byte) * x < 0.0)),
    };
    let bytes = (0..=255u8).filter(|byte| x.is_finite() == number(byte).is_finite());
    let byte = bytes.min_by(|a, b| near(a).total_cmp(&near(b))).expect("a byte");
    (vec![byte], number(&byte) as f32)
}

/// The bytes of a number in a file of this format, and the number that they hold, in fp32.
fn written(format: Format, x: f64) -> (Vec<u8>, f32) {
    match format {
        Format::F16 => (f16::from_f64(x).to_le_bytes().to_vec(), f16::from_f64(x).to_f32()),
        Format::BF16 => (bf16::from_f64(x).to_le_bytes().to_vec(), bf16::from_f64(x).to_f32()),
        Format::F32 => ((x as f32).to_le_bytes().to_vec(), x as f32),
        Format::F64 => (x.to_le_bytes().to_vec(), x as f32),
        Format::F8E4M3 => to_eight_bits(x, 4),
        Format::F8E5M2 => to_eight_bits(x, 5),
    }
}

/// A tensor's file. One unrelated byte precedes the numbers, so that they are not aligned.
struct File {
    format: Format,
    transposed: bool,
    scale: f32,
    bytes: Vec<u8>,
}

/// A weight with its tensors in files, and its numbers in fp32.
pub(crate) struct Case {
    pub spec: WeightSpec,
    /// Scale and shift of the layer norm whose result the matrix multiplies. Only the kernels' weights are folded with
    /// it.
    #[cfg_attr(not(feature = "emulated"), expect(dead_code))]
    pub norm: Option<Box<Case>>,
    files: Vec<File>,
    /// The numbers of each output, with the outputs of all tensors one after the other.
    rows: Vec<Vec<f32>>,
}

impl Case {
    /// A weight with numbers of many magnitudes, some beyond fp16's range if the format can hold them. Half of the
    /// matrices whose kernel is 1 multiply the result of a layer norm.
    pub fn new(kind: WeightKind, outputs: Vec<usize>, width: usize, random: &mut Random) -> Self {
        let is_table = kind == WeightKind::Table;
        let names = (0..outputs.len()).map(|i| format!("tensor {i}")).collect();
        let matrix = matches!(kind, WeightKind::Matrix { kernel: 1, .. } | WeightKind::Mirrored { kernel: 1, .. });
        let norm = (matrix && random.below(2) == 0).then(|| ["scale", "shift"].map(String::from));
        let spec = WeightSpec { names, outputs, width, kind, norm };
        let norm = spec.norm_vector().map(|vector| Box::new(Case::new(vector.kind, vector.outputs, 1, random)));
        let (mut files, mut rows) = (Vec::new(), Vec::new());
        for &outputs in &spec.outputs {
            let format = FORMATS[random.below(FORMATS.len())];
            let most = if format == Format::F16 { 6e4 } else { 1e6 };
            // Not every product with it is exact.
            let scale = if format.bytes() == 1 && random.below(2) == 0 { 0.0317 } else { 1.0 };
            let transposed = (matrix || is_table) && random.below(2) == 0;
            let mut number = || {
                let unit = random.below(1 << 20) as f64 / (1 << 19) as f64 - 1.0;
                let (bytes, x) = written(format, unit * most * 0.1f64.powi(random.below(12) as i32));
                (bytes, x * scale)
            };
            let numbers: Vec<(Vec<u8>, f32)> = (0..outputs * width).map(|_| number()).collect();
            let mut bytes = vec![0xff];
            for i in 0..numbers.len() {
                let place = if transposed { i % outputs * width + i / outputs } else { i };
                bytes.extend(&numbers[place].0);
            }
            files.push(File { format, transposed, scale, bytes });
            rows.extend(numbers.chunks(width).map(|row| row.iter().map(|number| number.1).collect::<Vec<f32>>()));
        }
        Case { spec, norm, files, rows }
    }

    /// A small weight of any kind.
    pub fn random(random: &mut Random) -> Self {
        let sizes = |random: &mut Random, most| (0..1 + random.below(3)).map(|_| 1 + random.below(most)).collect();
        let (kernel, inputs) = ([1, 1, 2, 3][random.below(4)], 1 + random.below(70));
        let width = kernel * kernel * inputs;
        match random.below(5) {
            0 => Self::new(WeightKind::Vector, sizes(random, 300), 1, random),
            1 => Self::new(WeightKind::Table, sizes(random, 40), inputs, random),
            2 => Self::new(
                WeightKind::Matrix { kernel, inputs, gated: false, resized: false },
                sizes(random, 90),
                width,
                random,
            ),
            3 => {
                let outputs = vec![2 * (1 + random.below(60))];
                Self::new(WeightKind::Matrix { kernel, inputs, gated: true, resized: false }, outputs, width, random)
            }
            _ => {
                let wanted = 1 + random.below(inputs);
                Self::new(WeightKind::Mirrored { kernel, inputs, wanted }, sizes(random, 60), width, random)
            }
        }
    }

    /// The tensors as [`super::Tensors::stored`] would find them.
    pub fn stored(&self) -> Vec<Stored<'_>> {
        let named = self.spec.names.iter().zip(&self.spec.outputs);
        let stored = named.zip(&self.files).map(|((name, &outputs), file)| Stored {
            name,
            path: "file".as_ref(),
            format: file.format,
            transposed: file.transposed,
            scale: file.scale,
            outputs,
            width: self.spec.width,
            data: Data::File(&file.bytes[1..]),
        });
        stored.collect()
    }

    /// Every number with its output, input and tap.
    pub fn numbers(&self) -> impl Iterator<Item = ([usize; 3], f32)> {
        let taps = match self.spec.kind {
            WeightKind::Matrix { kernel, .. } | WeightKind::Mirrored { kernel, .. } => kernel * kernel,
            WeightKind::Vector | WeightKind::Table => 1,
        };
        let row = move |(output, row): (usize, &Vec<f32>)| {
            let numbers = row.iter().enumerate();
            numbers.map(|(i, &x)| ([output, i / taps, i % taps], x)).collect::<Vec<_>>()
        };
        self.rows.iter().enumerate().flat_map(row)
    }

    /// Writes `value`, which is not finite, at a position of a tensor's file. Returns what the file then holds: NaN, if
    /// its format has no infinity.
    pub fn damage(&mut self, tensor: usize, position: usize, value: f64) -> f32 {
        let File { format, bytes, .. } = &mut self.files[tensor];
        let (value, held) = written(*format, value);
        bytes[1 + position * value.len()..][..value.len()].copy_from_slice(&value);
        held
    }
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let layouts: Vec<_> = self.files.iter().map(|file| (file.format, file.transposed, file.scale)).collect();
        write!(f, "{:?}, formats, whether transposed, and scales: {layouts:?}", self.spec)
    }
}
