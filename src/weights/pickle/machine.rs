//! The interpreter of a pickle's instructions.

use super::functions::{Function, function};
use super::tensor::Lazy;
use safetensors::Dtype;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// The largest number of instructions of a pickle: some thirty times those of SDXL.
const MAX_INSTRUCTIONS: usize = 2_000_000;

/// The result of a step, or what is wrong with the file.
pub(super) type Outcome<T> = Result<T, String>;

/// A tensor and its numbers.
pub(super) type Whole = (Lazy, Rc<[u8]>);

/// A value on the stack or in the memo. Dictionaries and lists are shared, since they are filled after they are stored.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Mark,
    Nothing,
    Int(i64),
    Text(Rc<str>),
    Tuple(Rc<Vec<Value>>),
    List(Rc<RefCell<Vec<Value>>>),
    Dict(Rc<RefCell<Vec<(Value, Value)>>>),
    Function(Function),
    Storage(Dtype, Rc<str>),
    Tensor(Rc<Lazy>),
    Bytes(Rc<[u8]>),
    NumberType(Dtype),
    /// A numpy array, which gets its shape and its numbers after it is made.
    Array(Rc<RefCell<Option<Whole>>>),
}

/// The state of a run.
pub(super) struct Machine<'a> {
    program: &'a [u8],
    /// The next instruction.
    pub at: usize,
    pub stack: Vec<Value>,
    memo: HashMap<u64, Value>,
    /// Every tuple, list and dictionary, in the order in which they were made.
    made: Vec<Value>,
    /// The numbers of the storages that the program names, by their keys.
    pub storages: HashMap<String, Dtype>,
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

impl<'a> Machine<'a> {
    pub fn new(program: &'a [u8]) -> Self {
        Machine { program, at: 0, stack: Vec::new(), memo: HashMap::new(), made: Vec::new(), storages: HashMap::new() }
    }

    pub fn take(&mut self, len: usize) -> Outcome<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.program.len());
        let end = end.ok_or("its pickle ends in the middle")?;
        let bytes = &self.program[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    pub fn number(&mut self, len: usize) -> Outcome<u64> {
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
        Ok(Value::Text(String::from_utf8_lossy(self.take(len)?).into()))
    }

    fn bytes(&mut self, len: u64) -> Outcome<Value> {
        let len = usize::try_from(len).map_err(|_| "its pickle ends in the middle")?;
        Ok(Value::Bytes(self.take(len)?.into()))
    }

    pub fn pop(&mut self) -> Outcome<Value> {
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
        self.memo.insert(key, value);
        Ok(())
    }

    fn recall(&self, key: u64) -> Outcome<Value> {
        self.memo.get(&key).cloned().ok_or_else(|| "its pickle is damaged: nothing in the memo".into())
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

    pub fn run(&mut self) -> Outcome<Value> {
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
}
