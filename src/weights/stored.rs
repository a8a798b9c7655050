//! Tensors as they lie in a file, and their numbers in fp32.

use super::adapter::Change;
use crate::{Error, Result};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::borrow::Cow;
use std::path::Path;

/// Numbers that one thread converts at a time.
const CHUNK: usize = 1 << 16;
/// Numbers that are converted to fp16 together.
const PIECE: usize = 256;

/// The number format of a tensor in a file, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// IEEE half precision.
    F16,
    /// The upper half of an fp32 number.
    BF16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// Eight bits with four of exponent, no infinities, and one NaN of each sign (Micikevicius et al., arXiv
    /// 2209.05433).
    F8E4M3,
    /// Eight bits with five of exponent: the upper half of a number in half precision.
    F8E5M2,
}

impl Format {
    /// Bytes per number.
    pub fn bytes(self) -> usize {
        match self {
            Format::F8E4M3 | Format::F8E5M2 => 1,
            Format::F16 | Format::BF16 => 2,
            Format::F32 => 4,
            Format::F64 => 8,
        }
    }
}

/// A tensor as it lies in a file. Its name, shape and number format have been checked, its numbers have not.
#[derive(Clone)]
pub struct Stored<'a> {
    /// The tensor's name, for messages.
    pub name: &'a str,
    /// The file, for messages.
    pub path: &'a Path,
    /// The format of its numbers.
    pub format: Format,
    /// True if the file holds the matrix with rows and columns exchanged, as `[width, outputs]`.
    pub transposed: bool,
    /// Multiplies every number of the file.
    pub scale: f32,
    /// Rows of the matrix or table, or elements of the vector.
    pub outputs: usize,
    /// Numbers per row (`inputs * kernel * kernel`); 1 for vectors.
    pub width: usize,
    pub(super) data: Data<'a>,
}

/// The source of a tensor's numbers.
#[derive(Clone)]
pub(super) enum Data<'a> {
    /// A file's bytes; they may be unaligned.
    File(&'a [u8]),
    /// Uniform random numbers within `scale` of `center`; each depends only on `seed` and its own position.
    Random { seed: u32, center: f32, scale: f32 },
    /// Another tensor's numbers, to which adapters add.
    Adapted(Box<Stored<'a>>, &'a Change),
}

/// A type as which a tensor's numbers can be read.
pub trait Number: Copy + Send + Sync + bytemuck::Pod {
    /// Writes to `out` the numbers from the one at `start` on, in the file's own order. Returns false if one of them is
    /// NaN or infinite.
    fn in_file(stored: &Stored, start: usize, out: &mut [Self]) -> bool;
}

impl Number for f32 {
    fn in_file(stored: &Stored, start: usize, out: &mut [f32]) -> bool {
        match &stored.data {
            Data::File(bytes) => {
                let size = stored.format.bytes();
                let bytes = &bytes[start * size..][..out.len() * size];
                match stored.format {
                    Format::F16 => halves(bytes, out),
                    Format::BF16 => convert(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
                    Format::F32 => convert(bytes, out, f32::from_le_bytes),
                    Format::F64 => convert(bytes, out, |b| f64::from_le_bytes(b) as f32),
                    Format::F8E4M3 => convert(bytes, out, |[b]| E4M3[usize::from(b)].to_f32()),
                    Format::F8E5M2 => convert(bytes, out, |[b]| e5m2(b).to_f32()),
                }
                if stored.scale != 1.0 {
                    out.iter_mut().for_each(|x| *x *= stored.scale);
                }
            }
            &Data::Random { seed, center, scale } => {
                for (i, x) in (start..).zip(out.iter_mut()) {
                    let unit = (hash(seed.wrapping_add(i as u32)) >> 8) as f32 / (1 << 23) as f32 - 1.0;
                    *x = center + unit * scale;
                }
            }
            Data::Adapted(base, change) => {
                base.numbers(start, out);
                change.add(stored.width, start, out);
                if stored.format == Format::F16 {
                    let mut halves = [f16::ZERO; PIECE];
                    for out in out.chunks_mut(PIECE) {
                        let halves = &mut halves[..out.len()];
                        halves.convert_from_f32_slice(out);
                        halves.convert_to_f32_slice(out);
                    }
                }
            }
        }
        // All numbers are checked without stopping at the first bad one: such a search takes longer than reading the
        // file.
        out.iter().fold(true, |finite, x| finite & x.is_finite())
    }
}

/// Reads the numbers of a file for which [`Stored::fits_half`] holds.
///
/// Panics for any other.
impl Number for f16 {
    fn in_file(stored: &Stored, start: usize, out: &mut [f16]) -> bool {
        match &stored.data {
            Data::File(bytes) if stored.fits_half() => {
                let bytes = &bytes[start * stored.format.bytes()..];
                match stored.format {
                    Format::F8E4M3 => convert(bytes, out, |[b]| E4M3[usize::from(b)]),
                    Format::F8E5M2 => convert(bytes, out, |[b]| e5m2(b)),
                    _ => convert(bytes, out, f16::from_le_bytes),
                }
            }
            Data::Adapted(base, change) if stored.fits_half() => {
                let mut wide = [0.0; PIECE];
                for (i, out) in out.chunks_mut(PIECE).enumerate() {
                    let (start, wide) = (start + i * PIECE, &mut wide[..out.len()]);
                    base.numbers(start, wide);
                    change.add(stored.width, start, wide);
                    out.convert_from_f32_slice(wide);
                }
            }
            _ => panic!("{} is not held in fp16", stored.name),
        }
        out.iter().fold(true, |finite, x| finite & x.is_finite())
    }
}

impl<'a> Stored<'a> {
    /// The same with what adapters add: in fp16 if the tensor is, otherwise in fp32.
    pub(super) fn adapted(self, change: &'a Change) -> Self {
        let format = if self.fits_half() { Format::F16 } else { Format::F32 };
        Stored { format, transposed: false, scale: 1.0, data: Data::Adapted(Box::new(self.clone()), change), ..self }
    }

    /// The bytes in a file from which its numbers are read.
    pub(super) fn in_file(&self) -> Option<&'a [u8]> {
        match &self.data {
            Data::File(bytes) => Some(bytes),
            Data::Random { .. } => None,
            Data::Adapted(base, _) => base.in_file(),
        }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.outputs * self.width
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True if fp16 holds every number exactly.
    pub fn fits_half(&self) -> bool {
        matches!(self.format, Format::F16 | Format::F8E4M3 | Format::F8E5M2) && self.scale == 1.0
    }

    /// The matrix with rows and columns exchanged.
    pub fn exchanged(self) -> Self {
        Stored { transposed: !self.transposed, outputs: self.width, width: self.outputs, ..self }
    }

    /// The number of bytes that [`Stored::bytes`] returns.
    pub fn bytes_in_file(&self) -> usize {
        self.len() * self.format.bytes()
    }

    /// The file's bytes. Numbers that are in no file are made here, in the tensor's format.
    pub fn bytes(&self) -> Cow<'a, [u8]> {
        match (&self.data, self.format) {
            (Data::File(bytes), _) => Cow::Borrowed(bytes),
            (_, Format::F16) => Cow::Owned(self.made::<f16>()),
            _ => Cow::Owned(self.made::<f32>()),
        }
    }

    /// The bytes of all numbers.
    fn made<T: Number>(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len() * size_of::<T>()];
        bytes.par_chunks_mut(CHUNK * size_of::<T>()).enumerate().for_each(|(chunk, bytes)| {
            let mut numbers = vec![T::zeroed(); bytes.len() / size_of::<T>()];
            self.numbers(chunk * CHUNK, &mut numbers);
            bytes.copy_from_slice(bytemuck::cast_slice(&numbers));
        });
        bytes
    }

    /// Writes to `out` the numbers from the one at `start` on, in the order of the row-major `[outputs, width]`.
    /// Returns false if one of them is NaN or infinite.
    ///
    /// # Panics
    /// If the tensor ends before `out` does.
    pub fn numbers<T: Number>(&self, start: usize, out: &mut [T]) -> bool {
        if !self.transposed {
            return T::in_file(self, start, out);
        }
        let mut finite = true;
        for (i, x) in (start..).zip(out) {
            finite &= T::in_file(self, i % self.width * self.outputs + i / self.width, std::slice::from_mut(x));
        }
        finite
    }

    /// Looks for the first number that is NaN or infinite in fp32, to report it once [`Stored::numbers`] has found that
    /// there is one.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] with that number and its position in the file's order;
    /// [`crate::ErrorKind::Invalid`] if only adapters make it so.
    pub fn check_finite(&self) -> Result<()> {
        if let Data::Adapted(base, _) = &self.data {
            base.check_finite()?;
        }
        let mut numbers = vec![0.0; CHUNK];
        for start in (0..self.len()).step_by(CHUNK) {
            let numbers = &mut numbers[..CHUNK.min(self.len() - start)];
            if !f32::in_file(self, start, numbers)
                && let Some(bad) = numbers.iter().position(|x| !x.is_finite())
            {
                let (name, value, place) = (self.name, numbers[bad], start + bad);
                if matches!(self.data, Data::Adapted(..)) {
                    let problem = format!("with them, tensor `{name}` holds {value} at position {place}");
                    return Err(Error::invalid("adapters", problem).advise("give smaller weights"));
                }
                let problem = format!("tensor `{name}` holds {value} at position {place}");
                return Err(Error::damaged(self.path, problem).advise("the file is damaged: get it again"));
            }
        }
        Ok(())
    }

    /// All numbers in fp32, in the order of the row-major `[outputs, width]`.
    ///
    /// # Errors
    /// As [`Stored::check_finite`].
    pub fn read(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.len()];
        let chunks = out.par_chunks_mut(CHUNK).enumerate();
        if !chunks.map(|(chunk, out)| self.numbers(chunk * CHUNK, out)).reduce(|| true, |a, b| a & b) {
            self.check_finite()?;
        }
        Ok(out)
    }
}

/// The number of every byte in [`Format::F8E4M3`]. Fp16 holds all of them.
static E4M3: [f16; 256] = {
    let mut numbers = [f16::ZERO; 256];
    let mut byte = 0;
    while byte < 256 {
        let (sign, exponent, mantissa) = (byte as u16 >> 7, byte as u16 >> 3 & 15, byte as u16 & 7);
        let bits = match (exponent, mantissa) {
            (15, 7) => f16::NAN.to_bits(),
            // Fp16's bias is larger by 8.
            (1.., _) => (exponent + 8) << 10 | mantissa << 7,
            // Multiples of 2^-9, which are normal in fp16.
            (0, 0) => 0,
            (0, 1) => 6 << 10,
            (0, 2 | 3) => 7 << 10 | (mantissa & 1) << 9,
            (0, _) => 8 << 10 | (mantissa & 3) << 8,
        };
        numbers[byte] = f16::from_bits(sign << 15 | bits);
        byte += 1;
    }
    numbers
};

/// The number of a byte in [`Format::F8E5M2`].
fn e5m2(byte: u8) -> f16 {
    f16::from_bits(u16::from(byte) << 8)
}

/// Converts numbers of `N` bytes each.
fn convert<T, const N: usize>(bytes: &[u8], out: &mut [T], number: impl Fn([u8; N]) -> T) {
    for (x, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *x = number(*bytes);
    }
}

/// Converts half-precision numbers. They are first copied to an aligned buffer, since `half` converts many at a time
/// only if they are aligned.
fn halves(bytes: &[u8], out: &mut [f32]) {
    let mut aligned = [f16::ZERO; 128];
    for (out, bytes) in out.chunks_mut(aligned.len()).zip(bytes.chunks(aligned.len() * size_of::<f16>())) {
        let aligned = &mut aligned[..out.len()];
        for (x, bytes) in aligned.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *x = f16::from_le_bytes(*bytes);
        }
        aligned.convert_to_f32_slice(out);
    }
}

/// Hashes 32 bits (Ettinger's lowbias32).
fn hash(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}
