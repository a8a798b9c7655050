//! Reading of `config.json`: every key is accounted for, so that a setting that matters is never ignored.

use std::borrow::Cow;
use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// The keys of a configuration that have not been read yet.
pub(super) struct Reader<'a> {
    keys: Map<String, Value>,
    path: &'a Path,
}

impl<'a> Reader<'a> {
    /// Parses `text`; `path` is for messages.
    pub(super) fn new(text: &str, path: &'a Path) -> Result<Self> {
        match crate::json::parse(text, path)? {
            Value::Object(keys) => Ok(Reader { keys, path }),
            _ => Err(Error::damaged(path, "not a model configuration: a JSON object is expected")),
        }
    }

    /// An error about the whole file.
    pub(super) fn error(&self, problem: impl Into<Cow<'static, str>>) -> Error {
        Error::damaged(self.path, problem)
    }

    fn unsupported(&self, key: &str, value: &Value, supported: impl AsRef<str>) -> Error {
        let mut value = value.to_string();
        if value.len() > 200 {
            value = value.chars().take(200).chain(['…']).collect();
        }
        let problem = format!("`{key}` is {value}, which is not supported; supported: {}", supported.as_ref());
        Error::unsupported(self.path, problem)
    }

    /// True if the key is there and not null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.keys.get(key).is_some_and(|v| !v.is_null())
    }

    /// Removes keys that do not change the computation.
    pub(super) fn ignore(&mut self, keys: &[&str]) {
        for key in keys {
            self.keys.remove(*key);
        }
    }

    /// A whole number in `1..=max`.
    pub(super) fn size(&mut self, key: &str, default: usize, max: usize) -> Result<usize> {
        let Some(value) = self.keys.remove(key) else { return Ok(default) };
        self.as_size(key, &value, max)
    }

    /// A whole number in `1..=max` for each of `count` levels, written as a list, or as one number that they share.
    pub(super) fn sizes(&mut self, key: &str, default: usize, count: usize, max: usize) -> Result<Vec<usize>> {
        let default = Value::from(default);
        self.each(key, default, count, |r, v| r.as_size(key, v, max))
    }

    /// A whole number for each layer of each level: one from 1 that all share, or a list with an entry for each level,
    /// which is a number for all of its layers, 0 included, or a list with one for each of them.
    pub(super) fn depths(&mut self, key: &str, layers: &[usize], max: usize) -> Result<Vec<Vec<usize>>> {
        let value = self.keys.remove(key).unwrap_or_else(|| 1.into());
        let Value::Array(_) = value else {
            let depth = self.as_size(key, &value, max)?;
            return Ok(layers.iter().map(|&layers| vec![depth; layers]).collect());
        };
        let depth = |value: &Value| if value == 0 { Ok(0) } else { self.as_size(key, value, max) };
        let level = |(value, &layers): (&Value, &usize)| match value {
            Value::Array(list) if list.len() == layers => list.iter().map(depth).collect(),
            Value::Array(_) => Err(self.unsupported(key, value, format!("a list of {layers}, one for each layer"))),
            _ => Ok(vec![depth(value)?; layers]),
        };
        self.as_list(key, &value, layers.len())?.iter().zip(layers).map(level).collect()
    }

    fn as_size(&self, key: &str, value: &Value, max: usize) -> Result<usize> {
        let size = value.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|v| (1..=max).contains(v));
        size.ok_or_else(|| self.unsupported(key, value, format!("a whole number from 1 to {max}")))
    }

    /// A whole number, zero included, such as the id of a token.
    pub(super) fn id(&mut self, key: &str, default: i64) -> Result<i64> {
        let Some(value) = self.keys.remove(key) else { return Ok(default) };
        value.as_i64().ok_or_else(|| self.unsupported(key, &value, "a whole number"))
    }

    /// A positive number.
    pub(super) fn positive(&mut self, key: &str, default: f64) -> Result<f32> {
        let value = self.keys.remove(key).unwrap_or_else(|| default.into());
        // In this range the square of an f32 neither overflows nor vanishes.
        let number = value.as_f64().filter(|v| (1e-15..=1e15).contains(v));
        number.map(|v| v as f32).ok_or_else(|| self.unsupported(key, &value, "a positive number"))
    }

    /// A boolean.
    pub(super) fn flag(&mut self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.keys.remove(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.unsupported(key, &value, "true, false"))
    }

    /// A boolean for each of `count` levels, written as a list, or as one that they share.
    pub(super) fn flags(&mut self, key: &str, default: bool, count: usize) -> Result<Vec<bool>> {
        self.each(key, default.into(), count, |r, v| {
            v.as_bool().ok_or_else(|| r.unsupported(key, v, "true, false, or one of them for each block"))
        })
    }

    /// One of a few values, or `default` if the key is absent. A default that is not among them makes the key
    /// mandatory.
    pub(super) fn choice<T: Copy>(&mut self, key: &str, default: Value, choices: &[(Value, T)]) -> Result<T> {
        let value = self.keys.remove(key).unwrap_or(default);
        self.as_choice(key, &value, choices)
    }

    /// One of a few strings for each of `count` levels.
    pub(super) fn names<T: Copy>(
        &mut self,
        key: &str,
        default: Value,
        count: usize,
        choices: &[(Value, T)],
    ) -> Result<Vec<T>> {
        let value = self.keys.remove(key).unwrap_or(default);
        let list = self.as_list(key, &value, count)?;
        list.iter().map(|v| self.as_choice(key, v, choices)).collect()
    }

    fn as_choice<T: Copy>(&self, key: &str, value: &Value, choices: &[(Value, T)]) -> Result<T> {
        // 1 and 1.0 are the same setting.
        let same = |a: &Value| a == value || (a.is_number() && a.as_f64() == value.as_f64());
        let found = choices.iter().find(|(name, _)| same(name));
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<_> = choices.iter().map(|(name, _)| name.to_string()).collect();
            self.unsupported(key, value, names.join(", "))
        })
    }

    /// Refuses every value of `key` but these; the first is the default.
    pub(super) fn only(&mut self, key: &str, allowed: &[Value]) -> Result<()> {
        let choices: Vec<_> = allowed.iter().map(|v| (v.clone(), ())).collect();
        self.choice(key, allowed[0].clone(), &choices)
    }

    /// A list of 1 to `longest` sizes, whose length does not follow from another key.
    pub(super) fn list(&mut self, key: &str, default: &[usize], longest: usize, max: usize) -> Result<Vec<usize>> {
        let value = self.keys.remove(key).unwrap_or_else(|| default.into());
        match &value {
            Value::Array(list) if (1..=longest).contains(&list.len()) => {
                list.iter().map(|v| self.as_size(key, v, max)).collect()
            }
            _ => Err(self.unsupported(key, &value, format!("a list of 1 to {longest} whole numbers"))),
        }
    }

    fn as_list<'v>(&self, key: &str, value: &'v Value, count: usize) -> Result<&'v [Value]> {
        match value {
            Value::Array(list) if list.len() == count => Ok(list),
            _ => Err(self.unsupported(key, value, format!("a list of {count}, one for each of `block_out_channels`"))),
        }
    }

    fn each<T: Clone>(
        &mut self,
        key: &str,
        default: Value,
        count: usize,
        read: impl Fn(&Self, &Value) -> Result<T>,
    ) -> Result<Vec<T>> {
        let value = self.keys.remove(key).unwrap_or(default);
        match value {
            Value::Array(_) => self.as_list(key, &value, count)?.iter().map(|v| read(self, v)).collect(),
            _ => Ok(vec![read(self, &value)?; count]),
        }
    }

    /// Refuses every key that is left, unless its value is null or false. Keys that begin with `_` are notes, not
    /// settings.
    pub(super) fn finish(self) -> Result<()> {
        let is_set =
            |key: &str, value: &Value| !key.starts_with('_') && !matches!(value, Value::Null | Value::Bool(false));
        match self.keys.iter().find(|(key, value)| is_set(key, value)) {
            Some((key, value)) => Err(self.unsupported(key, value, "leaving this field out")),
            None => Ok(()),
        }
    }
}
