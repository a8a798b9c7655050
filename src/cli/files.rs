//! Tensor files of the command line, in safetensors: floating-point numbers and integers are read, and fp32 is written.

use crate::{Error, Result};
use half::f16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A tensor in memory.
#[derive(Clone)]
pub struct Tensor {
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Row-major numbers. Integers are exact below 2^53.
    pub values: Vec<f64>,
}

impl Tensor {
    /// The numbers in fp32.
    pub fn floats(&self) -> Vec<f32> {
        self.values.iter().map(|&x| x as f32).collect()
    }
}

/// A file that was read, with its path for messages.
pub struct TensorFile {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
}

impl TensorFile {
    /// Reads a whole file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let bad = |e: safetensors::SafeTensorError| Error::damaged(path, format!("not a safetensors file: {e}"));
        let mut tensors = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(&bytes).map_err(bad)?.iter() {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F16 => numbers(data, |b| f16::from_le_bytes(b).to_f64()),
                Dtype::F32 => numbers(data, |b| f32::from_le_bytes(b).into()),
                Dtype::F64 => numbers(data, f64::from_le_bytes),
                Dtype::I32 => numbers(data, |b| i32::from_le_bytes(b).into()),
                Dtype::I64 => numbers(data, |b| i64::from_le_bytes(b) as f64),
                other => {
                    let problem =
                        format!("tensor `{name}` holds {other:?} numbers; F16, F32, F64, I32 and I64 are read");
                    return Err(Error::unsupported(path, problem));
                }
            };
            tensors.insert(name.to_string(), Tensor { shape: view.shape().to_vec(), values });
        }
        Ok(TensorFile { path: path.to_path_buf(), tensors })
    }

    /// The tensor of that name, if the file has one.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// The tensor of that name, whose dimensions must be those of `shape`; `None` stands for any size.
    pub fn get(&self, name: &str, shape: &[Option<usize>]) -> Result<&Tensor> {
        let Some(tensor) = self.find(name) else {
            let known: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
            return Err(Error::not_found(&self.path, format!("has no tensor `{name}`, only [{}]", known.join(", "))));
        };
        let fits = tensor.shape.len() == shape.len()
            && tensor.shape.iter().zip(shape).all(|(&have, want)| have > 0 && want.is_none_or(|w| w == have));
        if !fits {
            let want: Vec<String> = shape.iter().map(|d| d.map_or("any".into(), |d| d.to_string())).collect();
            let problem = format!("tensor `{name}` has shape {:?}; [{}] is wanted", tensor.shape, want.join(", "));
            return Err(Error::damaged(&self.path, problem));
        }
        if !tensor.values.iter().all(|&x| (x as f32).is_finite()) {
            return Err(Error::damaged(&self.path, format!("tensor `{name}` holds NaN or infinity in fp32")));
        }
        Ok(tensor)
    }

    /// An error about the file.
    pub fn error(&self, problem: impl Into<Cow<'static, str>>) -> Error {
        Error::damaged(&self.path, problem)
    }
}

fn numbers<const N: usize>(data: &[u8], number: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    data.as_chunks::<N>().0.iter().map(|&b| number(b)).collect()
}

/// Writes fp32 tensors; the file appears whole or not at all.
pub fn write(path: &Path, tensors: &[(&str, Vec<usize>, Vec<f32>)]) -> Result<()> {
    let views = tensors
        .iter()
        .map(|(name, shape, values)| {
            TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values)).map(|view| (*name, view))
        })
        .collect::<std::result::Result<Vec<_>, _>>();
    let bytes = views
        .and_then(|views| safetensors::serialize(views, None))
        .map_err(|e| Error::damaged(path, format!("cannot be written: {e}")))?;
    crate::files::write(path, &bytes)
}
