//! Reads tensors from `torch.save` files and numpy's arrays from pickles without executing anything.
//!
//! A pickle is a program. This reader knows only those instructions that tensors in dictionaries and arrays need, and
//! only those functions that build a tensor or an array. It refuses any other by name. A few classes that trainers
//! leave in their checkpoints are known by name too, and stand for nothing.
//!
//! Storages are not read: a checkpoint's tensors are ranges of the mapped file.

mod archive;
mod functions;
mod machine;
mod tensor;

use super::tensors::map_file;
use crate::{Error, Result};
use machine::{Machine, Value};
use safetensors::Dtype;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

pub(super) use archive::is_pickled;

/// The largest size in bytes of the pickle of an array.
const MAX_ARRAY: u64 = 1 << 20;

/// A tensor of a file, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// The keys that lead to it, joined by slashes; empty if the file holds nothing but this tensor.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Numbers.
    pub values: Vec<f32>,
}

/// A tensor that lies in a file without gaps.
pub(super) struct Placed {
    /// Its key in the state dict.
    pub name: String,
    /// The format of its numbers.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// True if the file holds the matrix with rows and columns exchanged.
    pub transposed: bool,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

/// All tensors of floating-point numbers in a small file that `torch.save` wrote: the zip format of PyTorch 1.6 and
/// later, or the format before it. Tensors of integers, which count batches, are left out.
///
/// # Errors
/// [`crate::ErrorKind::Io`], [`crate::ErrorKind::Damaged`] if the file is damaged or asks for anything other than
/// tensors, or [`crate::ErrorKind::Unsupported`] if it holds a program.
pub(crate) fn tensors(path: &Path) -> Result<Vec<Tensor>> {
    let bytes = map_file(path)?;
    let (found, storages) = archive::read(&bytes, path)?;
    let read = |(name, lazy): (String, tensor::Lazy)| {
        let values = storages.get(&lazy.storage).ok_or_else(|| format!("has no storage {}", lazy.storage));
        let values = values.and_then(|range| lazy.gather(&bytes[range.clone()]));
        match values {
            Ok(values) => Ok(Tensor { name, shape: lazy.shape, values }),
            Err(problem) => Err(suspect(path, format!("tensor `{name}` {problem}"))),
        }
    };
    tensor::check_sizes(&found).map_err(|problem| suspect(path, problem))?;
    found.into_iter().filter(|(_, lazy)| tensor::is_float(lazy.dtype)).map(read).collect()
}

/// The tensors of a checkpoint that `torch.save` wrote into the file with these bytes: of its state dict, or of the
/// dictionary that it is. What trainers save beside the state dict is left out.
///
/// # Errors
/// As for [`tensors`], and [`crate::ErrorKind::Unsupported`] for a tensor with gaps between its numbers.
pub(super) fn placed(bytes: &[u8], path: &Path) -> Result<Vec<Placed>> {
    let (found, storages) = archive::read(bytes, path)?;
    let mut outer = String::new();
    while found.iter().any(|(name, _)| name.starts_with(&format!("{outer}state_dict/"))) {
        outer += "state_dict/";
    }
    let mut placed = Vec::new();
    for (name, lazy) in found {
        let Some(name) = name.strip_prefix(&outer).filter(|name| !name.contains('/')) else { continue };
        let bad = |problem: &str| suspect(path, format!("tensor `{name}` {problem}"));
        let storage = storages.get(&lazy.storage).ok_or_else(|| bad(&format!("has no storage {}", lazy.storage)))?;
        let Some(transposed) = lazy.layout() else {
            return Err(Error::unsupported(path, format!("tensor `{name}` has gaps between its numbers"))
                .advise("save it again with every tensor contiguous"));
        };
        let range = lazy.range(storage).ok_or_else(|| bad("reaches beyond its storage"))?;
        placed.push(Placed { name: name.to_string(), dtype: lazy.dtype, shape: lazy.shape, transposed, range });
    }
    Ok(placed)
}

/// The array of a file that is one pickled numpy array of floating-point numbers (pickle's protocols 3 to 5).
///
/// # Errors
/// [`crate::ErrorKind::Io`], or [`crate::ErrorKind::Damaged`] if the file is damaged or asks for anything other than
/// one array.
pub fn array(path: &Path) -> Result<Tensor> {
    let bad = |problem: String| suspect(path, problem);
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut program = Vec::new();
    file.take(MAX_ARRAY + 1).read_to_end(&mut program).map_err(Error::io("read", path))?;
    if program.len() as u64 > MAX_ARRAY {
        return Err(bad(format!("a pickle of more than {MAX_ARRAY} bytes, too large for a small array")));
    }
    let mut machine = Machine::new(&program);
    match machine.run().map_err(bad)? {
        Value::Array(array) => {
            let array = array.borrow();
            let Some((lazy, bytes)) = &*array else { return Err(bad("its array was left without numbers".into())) };
            if lazy.bytes() != bytes.len() {
                let problem = format!("its array of shape {:?} has {} bytes", lazy.shape, bytes.len());
                return Err(bad(problem));
            }
            let values = lazy.gather(bytes).map_err(|problem| bad(format!("its array {problem}")))?;
            Ok(Tensor { name: String::new(), shape: lazy.shape.clone(), values })
        }
        _ => Err(Error::damaged(path, "its pickle holds something other than one numpy array")
            .advise("load it in Python, and save the array alone, as safetensors")),
    }
}

/// An error about a file that is damaged or meant to harm.
fn suspect(path: &Path, problem: String) -> Error {
    Error::damaged(path, problem).advise("get the file again from a source that you trust; nothing was run")
}
