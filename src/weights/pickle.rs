//! Reads tensors from `torch.save` files and numpy's arrays from pickles without executing anything.
//!
//! A pickle is a program. This reader knows only those instructions that tensors in dictionaries and arrays need, and
//! only those functions that build a tensor or an array. It refuses any other by name.

use crate::{Error, Result};
use half::{bf16, f16};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

/// The largest number of instructions of a pickle, which is enough for a thousand tensors.
const MAX_INSTRUCTIONS: usize = 40_000;
/// The largest size of a pickle in bytes.
const MAX_PICKLE: u64 = 1 << 20;
/// The pickle of a magic number with which `torch.save` began its files before PyTorch 1.6.
const OLD_FORMAT: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
/// The largest number of elements of all tensors together. The file's size does not limit it, since a tensor may repeat
/// the numbers of its storage.
const MAX_NUMBERS: usize = 1 << 28;
/// The levels of dictionaries that are searched: a state dict, one inside a checkpoint, and one more.
const MAX_DEPTH: usize = 3;
/// The largest number of dictionary entries that are searched, since a dictionary may contain another one many times,
/// or itself.
const MAX_ENTRIES: usize = 10_000;

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

/// All tensors of floating-point numbers in a file that `torch.save` wrote: the zip format of PyTorch 1.6 and later, or
/// the format before it. Tensors of integers, which count batches, are left out.
///
/// # Errors
/// [`crate::ErrorKind::Io`], [`crate::ErrorKind::Damaged`] if the file is damaged or asks for anything other than
/// tensors, or [`crate::ErrorKind::Unsupported`] if it holds a program.
pub(crate) fn tensors(path: &Path) -> Result<Vec<Tensor>> {
    let bad = |problem: String| {
        Error::damaged(path, problem).advise("get the file again from a source that you trust; nothing was run")
    };
    let mut file = BufReader::new(File::open(path).map_err(Error::io("open", path))?);
    if file.fill_buf().map_err(Error::io("read", path))?.starts_with(OLD_FORMAT) {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        let (found, storages) = old_format(&bytes).map_err(bad)?;
        return gather_all(found, |lazy| match storages.get(&lazy.storage) {
            Some(range) => Ok(Cow::Borrowed(&bytes[range.clone()])),
            None => Err(format!("has no storage {}", lazy.storage)),
        })
        .map_err(bad);
    }
    let mut archive = zip::ZipArchive::new(file)
        .map_err(|e| Error::damaged(path, format!("not a file that torch.save wrote ({e})")).advise("save it anew"))?;
    // Names that cannot be decoded are not from torch.
    let names: Vec<String> = archive.file_names().flatten().map(Cow::into_owned).collect();
    if names.iter().any(|name| name.contains("/code/")) {
        return Err(Error::unsupported(path, "a TorchScript archive, which is a program and no list of tensors")
            .advise("give a file of the same model's state_dict"));
    }
    let Some(pickle) = names.into_iter().find(|name| name.ends_with("/data.pkl")) else {
        return Err(bad("holds no data.pkl, as torch.save writes it".into()));
    };
    let folder = pickle.trim_end_matches("data.pkl").to_string();
    let program = member(&mut archive, &pickle, MAX_PICKLE).map_err(bad)?;
    let mut machine = Machine::new(&program);
    let value = machine.run().map_err(bad)?;
    let found = Search::run(&value).map_err(bad)?;
    gather_all(found, |lazy| {
        let limit = (MAX_NUMBERS * lazy.kind.size()) as u64;
        member(&mut archive, &format!("{folder}data/{}", lazy.storage), limit).map(Cow::Owned)
    })
    .map_err(bad)
}

/// The array of a file that is one pickled numpy array of floating-point numbers (pickle's protocols 3 to 5).
///
/// # Errors
/// [`crate::ErrorKind::Io`], or [`crate::ErrorKind::Damaged`] if the file is damaged or asks for anything other than
/// one array.
pub fn array(path: &Path) -> Result<Tensor> {
    let bad = |problem: String| {
        Error::damaged(path, problem).advise("get the file again from a source that you trust; nothing was run")
    };
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut program = Vec::new();
    file.take(MAX_PICKLE + 1).read_to_end(&mut program).map_err(Error::io("read", path))?;
    if program.len() as u64 > MAX_PICKLE {
        return Err(bad(format!("a pickle of more than {MAX_PICKLE} bytes, too large for a small array")));
    }
    let mut machine = Machine::new(&program);
    match machine.run().map_err(bad)? {
        Value::Array(array) => {
            let array = array.borrow();
            let Some((lazy, bytes)) = &*array else { return Err(bad("its array was left without numbers".into())) };
            if lazy.len().saturating_mul(lazy.kind.size()) != bytes.len() {
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

/// Finds the tensors in a file of the old format, and the range of each storage's bytes by its key. After the magic
/// number there are pickles of the protocol's number, of the saving system's sizes, of the value, and of the storages'
/// keys. Then follow the storages, each as its length in elements and its numbers.
fn old_format(bytes: &[u8]) -> Outcome<(Found, HashMap<String, Range<usize>>)> {
    let mut machine = Machine::new(bytes);
    machine.at = OLD_FORMAT.len();
    machine.run()?;
    machine.run()?;
    let value = machine.run()?;
    let found = Search::run(&value)?;
    let Value::List(keys) = machine.run()? else { return Err("its list of storages is damaged".into()) };
    let mut storages = HashMap::new();
    for key in keys.borrow().iter() {
        let Value::Text(key) = key else { return Err("its list of storages is damaged".into()) };
        let Some(kind) = machine.storages.get(key).copied() else {
            return Err("its list of storages is damaged".into());
        };
        let size = usize::try_from(machine.number(8)?).ok().and_then(|len| len.checked_mul(kind.size()));
        let start = machine.at;
        machine.take(size.ok_or("the length of a storage is damaged")?)?;
        storages.insert(key.clone(), start..machine.at);
    }
    Ok((found, storages))
}

fn gather_all<'a>(found: Found, mut bytes: impl FnMut(&Lazy) -> Outcome<Cow<'a, [u8]>>) -> Outcome<Vec<Tensor>> {
    let read = |(name, lazy): (String, Lazy)| {
        let values = lazy.gather(&bytes(&lazy)?).map_err(|problem| format!("tensor `{name}` {problem}"))?;
        Ok(Tensor { name, shape: lazy.shape, values })
    };
    found.into_iter().filter(|(_, lazy)| !matches!(lazy.kind, Kind::Long)).map(read).collect()
}

fn member(archive: &mut zip::ZipArchive<BufReader<File>>, name: &str, limit: u64) -> Outcome<Vec<u8>> {
    let damaged = |e: &dyn std::fmt::Display| format!("its member {name} cannot be read ({e})");
    let mut file = archive.by_name(name).map_err(|e| damaged(&e))?;
    if file.size() > limit {
        return Err(format!("its member {name} has {} bytes, which is too large", file.size()));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|e| damaged(&e))?;
    Ok(bytes)
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Float,
    Double,
    Half,
    BFloat16,
    Long,
}

impl Kind {
    fn size(self) -> usize {
        match self {
            Kind::Half | Kind::BFloat16 => 2,
            Kind::Float => 4,
            Kind::Double | Kind::Long => 8,
        }
    }
}

/// Tensors by their names.
type Found = Vec<(String, Lazy)>;

/// A tensor whose numbers are still in the file.
#[derive(Clone, Debug)]
struct Lazy {
    kind: Kind,
    storage: String,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl Lazy {
    /// The number of its elements, at most `usize::MAX`.
    fn len(&self) -> usize {
        match self.shape.contains(&0) {
            true => 0,
            false => self.shape.iter().fold(1, |n: usize, &d| n.saturating_mul(d)),
        }
    }

    fn gather(&self, bytes: &[u8]) -> std::result::Result<Vec<f32>, String> {
        let len = self.len();
        let last = self.shape.iter().zip(&self.strides).try_fold(self.offset, |at, (&d, &s)| {
            d.saturating_sub(1).checked_mul(s).and_then(|step| at.checked_add(step))
        });
        let size = self.kind.size();
        if len > 0 && last.is_none_or(|last| last >= bytes.len() / size) {
            return Err("reaches beyond its storage".into());
        }
        let number = |at: usize| -> f32 {
            let b = &bytes[at * size..][..size];
            match self.kind {
                Kind::Half => f16::from_le_bytes([b[0], b[1]]).to_f32(),
                Kind::BFloat16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                Kind::Float => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
                Kind::Double => f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32,
                Kind::Long => i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32,
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

/// A tensor and its numbers.
type Whole = (Lazy, Rc<[u8]>);

/// A value on the stack or in the memo. Dictionaries and lists are shared, since they are filled after they are stored.
#[derive(Clone, Debug)]
enum Value {
    Mark,
    Nothing,
    Int(i64),
    Text(String),
    Tuple(Rc<Vec<Value>>),
    List(Rc<RefCell<Vec<Value>>>),
    Dict(Rc<RefCell<Vec<(Value, Value)>>>),
    Function(Function),
    Storage(Kind, String),
    Tensor(Rc<Lazy>),
    Bytes(Rc<[u8]>),
    NumberType(Kind),
    /// A numpy array, which gets its shape and its numbers after it is made.
    Array(Rc<RefCell<Option<Whole>>>),
}

#[derive(Clone, Copy, Debug)]
enum Function {
    Storage(Kind),
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    Reconstruct,
    FromBuffer,
    NumpyArray,
    NumpyType,
}

impl Function {
    fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("torch", "FloatStorage") => Function::Storage(Kind::Float),
            ("torch", "DoubleStorage") => Function::Storage(Kind::Double),
            ("torch", "HalfStorage") => Function::Storage(Kind::Half),
            ("torch", "BFloat16Storage") => Function::Storage(Kind::BFloat16),
            ("torch", "LongStorage") => Function::Storage(Kind::Long),
            ("torch._utils", "_rebuild_tensor_v2") => Function::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Function::RebuildParameter,
            ("collections", "OrderedDict") => Function::OrderedDict,
            // Of numpy 1, and since numpy 2.
            ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Function::Reconstruct,
            ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => Function::FromBuffer,
            ("numpy", "ndarray") => Function::NumpyArray,
            ("numpy", "dtype") => Function::NumpyType,
            _ => return None,
        })
    }
}

struct Machine<'a> {
    program: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    memo: Vec<(u32, Value)>,
    /// Every tuple, list and dictionary, in the order in which they were made.
    made: Vec<Value>,
    /// The kinds of the storages that the program names, by their keys.
    storages: HashMap<String, Kind>,
}

impl Drop for Machine<'_> {
    /// Drops all values one by one. If a deeply nested value were dropped from its outermost one, the recursion would
    /// be as deep as the nesting and overflow the stack.
    fn drop(&mut self) {
        self.stack.clear();
        self.memo.clear();
        for value in &self.made {
            match value {
                Value::List(list) => drop(list.take()),
                Value::Dict(dict) => drop(dict.take()),
                _ => {}
            }
        }
        // A tuple holds only values older than itself, so the newest values are dropped first.
        while self.made.pop().is_some() {}
    }
}

type Outcome<T> = std::result::Result<T, String>;

impl<'a> Machine<'a> {
    fn new(program: &'a [u8]) -> Self {
        Machine { program, at: 0, stack: Vec::new(), memo: Vec::new(), made: Vec::new(), storages: HashMap::new() }
    }

    fn take(&mut self, len: usize) -> Outcome<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.program.len());
        let end = end.ok_or("its pickle ends in the middle")?;
        let bytes = &self.program[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn number(&mut self, len: usize) -> Outcome<u64> {
        Ok(self.take(len)?.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)))
    }

    fn line(&mut self) -> Outcome<String> {
        let rest = &self.program[self.at..];
        let len = rest.iter().position(|&b| b == b'\n').ok_or("its pickle ends in the middle")?;
        let line = String::from_utf8_lossy(self.take(len)?).into_owned();
        self.at += 1;
        Ok(line)
    }

    fn text(&mut self, len: u64) -> Outcome<Value> {
        let len = usize::try_from(len).map_err(|_| "a text in its pickle is too long")?;
        Ok(Value::Text(String::from_utf8_lossy(self.take(len)?).into_owned()))
    }

    fn bytes(&mut self, len: u64) -> Outcome<Value> {
        let len = usize::try_from(len).map_err(|_| "its pickle ends in the middle")?;
        Ok(Value::Bytes(self.take(len)?.into()))
    }

    fn pop(&mut self) -> Outcome<Value> {
        self.stack.pop().ok_or_else(|| "its pickle is damaged: an empty stack".into())
    }

    fn since_mark(&mut self) -> Outcome<Vec<Value>> {
        let mark = self.stack.iter().rposition(|v| matches!(v, Value::Mark));
        let mark = mark.ok_or("its pickle is damaged: no mark")?;
        let values = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(values)
    }

    fn tuple(&mut self, len: usize) -> Outcome<Value> {
        let start = self.stack.len().checked_sub(len).ok_or("its pickle is damaged: an empty stack")?;
        Ok(Value::Tuple(Rc::new(self.stack.split_off(start))))
    }

    fn remember(&mut self, key: u64) -> Outcome<()> {
        let value = self.stack.last().cloned().ok_or("its pickle is damaged: an empty stack")?;
        self.memo.push((key as u32, value));
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Outcome<Value> {
        let found = self.memo.iter().rev().find(|(k, _)| u64::from(*k) == key);
        found.map(|(_, v)| v.clone()).ok_or_else(|| "its pickle is damaged: nothing in the memo".into())
    }

    fn set(&mut self, pairs: Vec<Value>) -> Outcome<()> {
        let Some(Value::Dict(dict)) = self.stack.last() else { return Err("its pickle is damaged: no dict".into()) };
        let mut values = pairs.into_iter();
        while let (Some(key), Some(value)) = (values.next(), values.next()) {
            dict.borrow_mut().push((key, value));
        }
        Ok(())
    }

    fn append(&mut self, values: Vec<Value>) -> Outcome<()> {
        let Some(Value::List(list)) = self.stack.last() else { return Err("its pickle is damaged: no list".into()) };
        list.borrow_mut().extend(values);
        Ok(())
    }

    fn run(&mut self) -> Outcome<Value> {
        for _ in 0..MAX_INSTRUCTIONS {
            let instruction = self.take(1)?[0];
            let value = match instruction {
                0x80 => {
                    self.take(1)?;
                    continue;
                }
                b'(' => Value::Mark,
                // The length of a frame.
                0x95 => {
                    self.take(8)?;
                    continue;
                }
                b'N' => Value::Nothing,
                0x88 => Value::Int(1),
                0x89 => Value::Int(0),
                b'}' => Value::Dict(Rc::default()),
                b']' => Value::List(Rc::default()),
                b')' => self.tuple(0)?,
                0x85..=0x87 => self.tuple(usize::from(instruction) - 0x84)?,
                b't' => Value::Tuple(Rc::new(self.since_mark()?)),
                b'J' => Value::Int(i64::from(self.number(4)? as u32 as i32)),
                b'K' => Value::Int(self.number(1)? as i64),
                b'M' => Value::Int(self.number(2)? as i64),
                0x8a => match self.number(1)? {
                    len @ 0..=8 => {
                        let shift = 64 - 8 * len as u32;
                        let bits = self.number(len as usize)? as i64;
                        Value::Int(if len == 0 { 0 } else { bits << shift >> shift })
                    }
                    _ => return Err("a number in its pickle is too large".into()),
                },
                b'G' => {
                    self.take(8)?;
                    Value::Nothing
                }
                b'X' => {
                    let len = self.number(4)?;
                    self.text(len)?
                }
                0x8c => {
                    let len = self.number(1)?;
                    self.text(len)?
                }
                b'C' | b'B' | 0x8e | 0x96 => {
                    let width = match instruction {
                        b'C' => 1,
                        b'B' => 4,
                        _ => 8,
                    };
                    let len = self.number(width)?;
                    self.bytes(len)?
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    function(&module, &name)?
                }
                0x93 => match (self.pop()?, self.pop()?) {
                    (Value::Text(name), Value::Text(module)) => function(&module, &name)?,
                    _ => return Err("its pickle is damaged: a function without a name".into()),
                },
                b'Q' => self.persistent()?,
                b'R' => self.call()?,
                b'q' | b'r' => {
                    let key = self.number(if instruction == b'q' { 1 } else { 4 })?;
                    self.remember(key)?;
                    continue;
                }
                0x94 => {
                    self.remember(self.memo.len() as u64)?;
                    continue;
                }
                b'h' | b'j' => {
                    let key = self.number(if instruction == b'h' { 1 } else { 4 })?;
                    self.recall(key)?
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(vec![key, value])?;
                    continue;
                }
                b'u' => {
                    let pairs = self.since_mark()?;
                    self.set(pairs)?;
                    continue;
                }
                b'a' => {
                    let value = self.pop()?;
                    self.append(vec![value])?;
                    continue;
                }
                b'e' => {
                    let values = self.since_mark()?;
                    self.append(values)?;
                    continue;
                }
                b'b' => {
                    self.build()?;
                    continue;
                }
                b'.' => return self.pop(),
                other => {
                    return Err(format!("its pickle has the instruction {other:#04x}, which tensors do not need"));
                }
            };
            if matches!(value, Value::Tuple(_) | Value::List(_) | Value::Dict(_)) {
                self.made.push(value.clone());
            }
            self.stack.push(value);
        }
        Err("its pickle is too long".into())
    }

    /// Reads the identifier of a storage, `("storage", kind, key, device, length)`.
    fn persistent(&mut self) -> Outcome<Value> {
        let Value::Tuple(id) = self.pop()? else { return Err("its pickle is damaged: no storage".into()) };
        match &id[..] {
            [Value::Text(tag), Value::Function(Function::Storage(kind)), Value::Text(key), ..] if tag == "storage" => {
                // The key becomes the name of a file in the archive.
                match key.bytes().all(|b| b.is_ascii_alphanumeric()) {
                    true => {
                        self.storages.insert(key.clone(), *kind);
                        Ok(Value::Storage(*kind, key.clone()))
                    }
                    false => Err(format!("a storage is called {key:?}")),
                }
            }
            _ => Err("its pickle is damaged: no storage".into()),
        }
    }

    /// Gives the value on the stack its state. Attributes of a dictionary, such as the versions in a state dict, are
    /// not read.
    fn build(&mut self) -> Outcome<()> {
        let state = self.pop()?;
        match (self.stack.last(), &state) {
            (Some(Value::NumberType(_)), Value::Tuple(state)) => match state.get(1) {
                Some(Value::Text(order)) if order == "<" => Ok(()),
                _ => Err("its array's numbers are not in little-endian order".into()),
            },
            (Some(Value::Array(array)), Value::Tuple(state)) => match &state[..] {
                [_, shape, Value::NumberType(kind), Value::Int(fortran), Value::Bytes(bytes)] => {
                    let lazy = contiguous(*kind, shape, *fortran != 0)?;
                    array.replace(Some((lazy, bytes.clone())));
                    Ok(())
                }
                _ => Err("its array does not hold floating-point numbers".into()),
            },
            (Some(Value::Array(_)), _) => Err("its pickle is damaged: an array's state".into()),
            _ => Ok(()),
        }
    }

    fn call(&mut self) -> Outcome<Value> {
        let (Value::Tuple(arguments), function) = (self.pop()?, self.pop()?) else {
            return Err("its pickle is damaged: a call without arguments".into());
        };
        match (function, &arguments[..]) {
            (Value::Function(Function::OrderedDict), []) => Ok(Value::Dict(Rc::default())),
            (Value::Function(Function::RebuildParameter), [Value::Tensor(tensor), ..]) => {
                Ok(Value::Tensor(tensor.clone()))
            }
            (
                Value::Function(Function::RebuildTensor),
                [Value::Storage(kind, storage), Value::Int(offset), shape, strides, ..],
            ) => {
                let lazy = sizes(shape).zip(sizes(strides)).zip(usize::try_from(*offset).ok());
                let ((shape, strides), offset) = lazy.ok_or("its pickle is damaged: a tensor's shape")?;
                if shape.len() != strides.len() {
                    return Err("its pickle is damaged: a tensor's shape".into());
                }
                Ok(Value::Tensor(Rc::new(Lazy { kind: *kind, storage: storage.clone(), offset, shape, strides })))
            }
            (Value::Function(Function::NumpyType), [Value::Text(name), ..]) => match name.as_str() {
                "f2" => Ok(Value::NumberType(Kind::Half)),
                "f4" => Ok(Value::NumberType(Kind::Float)),
                "f8" => Ok(Value::NumberType(Kind::Double)),
                other => Err(format!("its array holds `{other}`, not floating-point numbers")),
            },
            // The shape and the type of the numbers that these arguments give are replaced by the state.
            (Value::Function(Function::Reconstruct), [Value::Function(Function::NumpyArray), ..]) => {
                Ok(Value::Array(Rc::default()))
            }
            (
                Value::Function(Function::FromBuffer),
                [Value::Bytes(bytes), Value::NumberType(kind), shape, Value::Text(order)],
            ) => {
                let lazy = contiguous(*kind, shape, order == "F")?;
                Ok(Value::Array(Rc::new(RefCell::new(Some((lazy, bytes.clone()))))))
            }
            _ => Err("its pickle makes a call that tensors do not need".into()),
        }
    }
}

/// A function by its name.
fn function(module: &str, name: &str) -> Outcome<Value> {
    let known = Function::named(module, name).map(Value::Function);
    known.ok_or_else(|| format!("asks for `{module}.{name}`, which is not part of a tensor"))
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
fn contiguous(kind: Kind, shape: &Value, fortran: bool) -> Outcome<Lazy> {
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
    Ok(Lazy { kind, storage: String::new(), offset: 0, shape, strides })
}

/// The search for tensors in a value.
struct Search {
    found: Found,
    entries: usize,
    numbers: usize,
}

impl Search {
    fn run(value: &Value) -> Outcome<Found> {
        let mut search = Search { found: Vec::new(), entries: 0, numbers: 0 };
        search.collect(value, "", MAX_DEPTH)?;
        Ok(search.found)
    }

    fn collect(&mut self, value: &Value, name: &str, depth: usize) -> Outcome<()> {
        match value {
            Value::Tensor(tensor) => {
                self.numbers = self.numbers.saturating_add(tensor.len());
                if self.numbers > MAX_NUMBERS {
                    return Err(format!("holds more than {MAX_NUMBERS} numbers up to tensor `{name}`, too large"));
                }
                self.found.push((name.into(), Lazy::clone(tensor)));
            }
            Value::Dict(dict) if depth > 0 => {
                for (key, value) in dict.borrow().iter() {
                    self.entries += 1;
                    if self.entries > MAX_ENTRIES {
                        return Err(format!("holds more than {MAX_ENTRIES} entries, too many for one model"));
                    }
                    if let Value::Text(key) = key {
                        let name = if name.is_empty() { key.clone() } else { format!("{name}/{key}") };
                        self.collect(value, &name, depth - 1)?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}
