//! Tensors whose numbers are still in a file, and the search for them in a pickle's value.

use super::machine::{Outcome, Value};
use half::{bf16, f16};
use safetensors::Dtype;
use std::ops::Range;

/// The largest number of elements that are copied from a file. The file's size does not limit it, since a tensor may
/// repeat the numbers of its storage.
const MAX_NUMBERS: usize = 1 << 28;
/// The levels of dictionaries that are searched: a state dict, one inside a checkpoint, and one more.
const MAX_DEPTH: usize = 3;
/// The largest number of dictionary entries that are searched, since a dictionary may contain another one many times,
/// or itself.
const MAX_ENTRIES: usize = 100_000;
/// The longest key in bytes.
const MAX_KEY: usize = 1000;

/// Tensors by their names.
pub(super) type Found = Vec<(String, Lazy)>;

/// A tensor whose numbers are still in the file.
#[derive(Clone, Debug)]
pub(super) struct Lazy {
    pub dtype: Dtype,
    pub storage: String,
    /// The first element in the storage; strides are in elements too.
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// Bytes of a number.
pub(super) fn size(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// True for numbers that [`Lazy::gather`] reads.
pub(super) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64)
}

/// Refuses tensors that have too many numbers to be copied.
pub(super) fn check_sizes(found: &Found) -> Outcome<()> {
    let mut numbers = 0usize;
    for (name, lazy) in found {
        numbers = numbers.saturating_add(lazy.len());
        if numbers > MAX_NUMBERS {
            return Err(format!("holds more than {MAX_NUMBERS} numbers up to tensor `{name}`, too large"));
        }
    }
    Ok(())
}

impl Lazy {
    /// The number of its elements, at most `usize::MAX`.
    fn len(&self) -> usize {
        match self.shape.contains(&0) {
            true => 0,
            false => self.shape.iter().fold(1, |n: usize, &d| n.saturating_mul(d)),
        }
    }

    /// Bytes of its numbers, at most `usize::MAX`.
    pub fn bytes(&self) -> usize {
        self.len().saturating_mul(size(self.dtype))
    }

    /// False if its numbers lie one after the other in the row-major order, true if they are those of a transposed
    /// matrix, `None` if there are gaps.
    pub fn layout(&self) -> Option<bool> {
        let axes: Vec<(usize, usize)> = self.shape.iter().copied().zip(self.strides.iter().copied()).collect();
        let dense = |axes: &[(usize, usize)]| {
            let mut step = 1usize;
            axes.iter().rev().all(|&(length, stride)| {
                let fits = length == 1 || stride == step;
                step = step.saturating_mul(length);
                fits
            })
        };
        match axes[..] {
            _ if dense(&axes) || self.len() == 0 => Some(false),
            [rows, columns] if dense(&[columns, rows]) => Some(true),
            _ => None,
        }
    }

    /// The bytes of a tensor without gaps in the file, where its storage has the range `storage`; `None` if they are
    /// not within it.
    pub fn range(&self, storage: &Range<usize>) -> Option<Range<usize>> {
        let start = self.offset.checked_mul(size(self.dtype))?.checked_add(storage.start)?;
        let range = start..start.checked_add(self.bytes())?;
        (range.end <= storage.end).then_some(range)
    }

    /// Its numbers in row-major order, from the bytes of its storage.
    pub fn gather(&self, bytes: &[u8]) -> Outcome<Vec<f32>> {
        let len = self.len();
        let last = self.shape.iter().zip(&self.strides).try_fold(self.offset, |at, (&d, &s)| {
            d.saturating_sub(1).checked_mul(s).and_then(|step| at.checked_add(step))
        });
        let size = size(self.dtype);
        if len > 0 && last.is_none_or(|last| last >= bytes.len() / size) {
            return Err("reaches beyond its storage".into());
        }
        let number = |at: usize| -> f32 {
            let b = &bytes[at * size..][..size];
            match self.dtype {
                Dtype::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
                Dtype::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                Dtype::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
                _ => f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32,
            }
        };
        let place = |mut index: usize| {
            let mut at = self.offset;
            for (&d, &s) in self.shape.iter().zip(&self.strides).rev() {
                at += index % d * s;
                index /= d;
            }
            at
        };
        Ok((0..len).map(|i| number(place(i))).collect())
    }
}

/// The search for tensors in a value.
pub(super) struct Search {
    found: Found,
    entries: usize,
}

impl Search {
    pub fn run(value: &Value) -> Outcome<Found> {
        let mut search = Search { found: Vec::new(), entries: 0 };
        search.collect(value, "", MAX_DEPTH)?;
        Ok(search.found)
    }

    fn collect(&mut self, value: &Value, name: &str, depth: usize) -> Outcome<()> {
        match value {
            Value::Tensor(tensor) => self.found.push((name.into(), Lazy::clone(tensor))),
            Value::Dict(dict) if depth > 0 => {
                for (key, value) in dict.borrow().iter() {
                    self.entries += 1;
                    if self.entries > MAX_ENTRIES {
                        return Err(format!("holds more than {MAX_ENTRIES} entries, too many for one model"));
                    }
                    let Value::Text(key) = key else { continue };
                    if key.len() > MAX_KEY {
                        return Err(format!("has a key of {} bytes, too long for a tensor's name", key.len()));
                    }
                    let name = if name.is_empty() { key.to_string() } else { format!("{name}/{key}") };
                    self.collect(value, &name, depth - 1)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}
