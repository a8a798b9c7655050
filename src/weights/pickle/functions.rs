//! The functions that a pickle may name, and what a call of each makes.

use super::machine::{Machine, Outcome, Value};
use super::tensor::Lazy;
use safetensors::Dtype;
use std::cell::RefCell;
use std::rc::Rc;

/// The longest name that is told in a message, in bytes.
const MAX_NAME: usize = 200;

#[derive(Clone, Copy, Debug)]
pub(super) enum Function {
    Storage(Dtype),
    RebuildTensor,
    RebuildParameter,
    Dictionary,
    Reconstruct,
    FromBuffer,
    NumpyArray,
    NumpyType,
    /// An object that trainers leave in checkpoints beside tensors. Calling it gives nothing.
    Inert,
}

/// A function or a type by its name.
///
/// # Errors
/// The name of one that is not known.
pub(super) fn function(module: &str, name: &str) -> Outcome<Value> {
    let function = match (module, name) {
        ("torch", name) if name.ends_with("Storage") => match storage(name) {
            Some(dtype) => Function::Storage(dtype),
            None => return Err(format!("asks for `torch.{name}`, whose numbers are not known")),
        },
        // Its numbers have the type that the tensor's own arguments give.
        ("torch.storage", "UntypedStorage") => Function::Storage(Dtype::U8),
        ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor_v3") => Function::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => Function::RebuildParameter,
        ("collections", "OrderedDict" | "defaultdict") | ("__builtin__" | "builtins", "dict") => Function::Dictionary,
        // Of numpy 1, and since numpy 2.
        ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Function::Reconstruct,
        ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => Function::FromBuffer,
        ("numpy", "ndarray") => Function::NumpyArray,
        ("numpy", "dtype") => Function::NumpyType,
        ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar")
        | ("_codecs", "encode")
        | ("__builtin__" | "builtins", "set")
        | ("torch", "Size" | "device")
        | (
            "pytorch_lightning.callbacks.model_checkpoint" | "lightning.pytorch.callbacks.model_checkpoint",
            "ModelCheckpoint",
        ) => Function::Inert,
        ("torch", name) => match number_type(name) {
            Some(dtype) => return Ok(Value::NumberType(dtype)),
            None => return Err(unknown(module, name)),
        },
        _ => return Err(unknown(module, name)),
    };
    Ok(Value::Function(function))
}

fn unknown(module: &str, name: &str) -> String {
    let mut text = format!("{module}.{name}");
    if text.len() > MAX_NAME {
        text.truncate(text.floor_char_boundary(MAX_NAME));
        text.push('…');
    }
    format!("asks for `{text}`, which is not part of a tensor")
}

/// The numbers in a class of storages of torch.
fn storage(name: &str) -> Option<Dtype> {
    Some(match name {
        "FloatStorage" => Dtype::F32,
        "DoubleStorage" => Dtype::F64,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        _ => return None,
    })
}

/// A type of numbers by torch's name.
fn number_type(name: &str) -> Option<Dtype> {
    Some(match name {
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float32" => Dtype::F32,
        "float64" => Dtype::F64,
        "int64" => Dtype::I64,
        _ => return None,
    })
}

impl Machine<'_> {
    /// Reads the identifier of a storage, `("storage", kind, key, device, length)`.
    pub(super) fn persistent(&mut self) -> Outcome<Value> {
        let Value::Tuple(id) = self.pop()? else { return Err("its pickle is damaged: no storage".into()) };
        match &id[..] {
            [Value::Text(tag), Value::Function(Function::Storage(dtype)), Value::Text(key), ..]
                if &**tag == "storage" =>
            {
                // The key becomes the name of a file in the archive.
                match key.len() <= MAX_NAME && key.bytes().all(|b| b.is_ascii_alphanumeric()) {
                    true => {
                        self.storages.insert(key.to_string(), *dtype);
                        Ok(Value::Storage(*dtype, key.clone()))
                    }
                    false => Err(format!("a storage is called {:?}", key.chars().take(MAX_NAME).collect::<String>())),
                }
            }
            _ => Err("its pickle is damaged: no storage".into()),
        }
    }

    /// Gives the value on the stack its state. Attributes of a dictionary, such as the versions in a state dict, are
    /// not read.
    pub(super) fn build(&mut self) -> Outcome<()> {
        let state = self.pop()?;
        match (self.stack.last(), &state) {
            (Some(Value::NumberType(_)), Value::Tuple(state)) => match state.get(1) {
                Some(Value::Text(order)) if &**order == "<" => Ok(()),
                _ => Err("its array's numbers are not in little-endian order".into()),
            },
            (Some(Value::Array(array)), Value::Tuple(state)) => match &state[..] {
                [_, shape, Value::NumberType(dtype), Value::Int(fortran), Value::Bytes(bytes)] => {
                    let lazy = contiguous(*dtype, shape, *fortran != 0)?;
                    array.replace(Some((lazy, bytes.clone())));
                    Ok(())
                }
                _ => Err("its array does not hold floating-point numbers".into()),
            },
            (Some(Value::Array(_)), _) => Err("its pickle is damaged: an array's state".into()),
            _ => Ok(()),
        }
    }

    pub(super) fn call(&mut self) -> Outcome<Value> {
        let (Value::Tuple(arguments), function) = (self.pop()?, self.pop()?) else {
            return Err("its pickle is damaged: a call without arguments".into());
        };
        match (function, &arguments[..]) {
            (Value::Function(Function::Dictionary), []) => Ok(Value::Dict(Rc::default())),
            (Value::Function(Function::Dictionary), [Value::Function(Function::Dictionary)]) => {
                Ok(Value::Dict(Rc::default()))
            }
            (Value::Function(Function::Inert), _) => Ok(Value::Nothing),
            (Value::Function(Function::RebuildParameter), [Value::Tensor(tensor), ..]) => {
                Ok(Value::Tensor(tensor.clone()))
            }
            (
                Value::Function(Function::RebuildTensor),
                [Value::Storage(dtype, storage), Value::Int(offset), shape, strides, rest @ ..],
            ) => {
                let lazy = sizes(shape).zip(sizes(strides)).zip(usize::try_from(*offset).ok());
                let ((shape, strides), offset) = lazy.ok_or("its pickle is damaged: a tensor's shape")?;
                if shape.len() != strides.len() {
                    return Err("its pickle is damaged: a tensor's shape".into());
                }
                // After the flag of gradients and the hooks.
                let dtype = match rest.get(2) {
                    Some(Value::NumberType(own)) => *own,
                    _ => *dtype,
                };
                Ok(Value::Tensor(Rc::new(Lazy { dtype, storage: storage.to_string(), offset, shape, strides })))
            }
            (Value::Function(Function::NumpyType), [Value::Text(name), ..]) => match &**name {
                "f2" => Ok(Value::NumberType(Dtype::F16)),
                "f4" => Ok(Value::NumberType(Dtype::F32)),
                "f8" => Ok(Value::NumberType(Dtype::F64)),
                // Of counters beside the weights. They become no array, since these hold floating-point numbers.
                "i4" | "i8" => Ok(Value::NumberType(Dtype::I64)),
                other => Err(format!(
                    "its array holds `{}`, not floating-point numbers",
                    other.chars().take(MAX_NAME).collect::<String>()
                )),
            },
            // The shape and the type of the numbers that these arguments give are replaced by the state.
            (Value::Function(Function::Reconstruct), [Value::Function(Function::NumpyArray), ..]) => {
                Ok(Value::Array(Rc::default()))
            }
            (
                Value::Function(Function::FromBuffer),
                [Value::Bytes(bytes), Value::NumberType(dtype), shape, Value::Text(order)],
            ) => {
                let lazy = contiguous(*dtype, shape, &**order == "F")?;
                Ok(Value::Array(Rc::new(RefCell::new(Some((lazy, bytes.clone()))))))
            }
            _ => Err("its pickle makes a call that tensors do not need".into()),
        }
    }
}

/// A tuple of sizes.
fn sizes(value: &Value) -> Option<Vec<usize>> {
    let Value::Tuple(list) = value else { return None };
    let size = |v: &Value| match v {
        Value::Int(i) => usize::try_from(*i).ok(),
        _ => None,
    };
    list.iter().map(size).collect()
}

/// A numpy array without gaps, row-major or, in Fortran's order, column-major.
fn contiguous(dtype: Dtype, shape: &Value, fortran: bool) -> Outcome<Lazy> {
    if !super::tensor::is_float(dtype) {
        return Err("its array does not hold floating-point numbers".into());
    }
    let shape = sizes(shape).ok_or("its pickle is damaged: an array's shape")?;
    let mut strides = vec![0; shape.len()];
    let mut step = 1usize;
    let mut place = |axis: usize| {
        strides[axis] = step;
        step = step.saturating_mul(shape[axis]);
    };
    match fortran {
        true => (0..shape.len()).for_each(&mut place),
        false => (0..shape.len()).rev().for_each(&mut place),
    }
    Ok(Lazy { dtype, storage: String::new(), offset: 0, shape, strides })
}
