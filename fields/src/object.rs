//! The fields of a JSON object, taken one by one. What is left over is unknown.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::fmt::{self, Display, Formatter};

/// A field that can never work as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The field's name, borrowed if it is a known one; `None` if the whole text is wrong.
    pub field: Option<Cow<'static, str>>,
    /// What is wrong, and what to do about it.
    pub problem: String,
}

impl Wrong {
    /// A wrong field.
    pub fn new(field: impl Into<Cow<'static, str>>, problem: impl Into<String>) -> Self {
        Wrong { field: Some(field.into()), problem: problem.into() }
    }
}

impl Display for Wrong {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.field.iter().try_for_each(|field| write!(f, "{field}: "))?;
        f.write_str(&self.problem)
    }
}

impl std::error::Error for Wrong {}

/// The fields of an object.
pub struct Fields {
    values: Map<String, Value>,
    /// The names that were asked for.
    known: Vec<&'static str>,
}

impl From<Map<String, Value>> for Fields {
    fn from(values: Map<String, Value>) -> Self {
        Fields { values, known: Vec::new() }
    }
}

impl Fields {
    /// Parses a JSON object.
    ///
    /// # Errors
    /// If the text is anything else.
    pub fn parse(text: &[u8]) -> Result<Self, Wrong> {
        let values: Map<String, Value> = serde_json::from_slice(text)
            .map_err(|problem| Wrong { field: None, problem: format!("not a JSON object: {problem}") })?;
        Ok(values.into())
    }

    /// Takes a field; null is as if it was not there. `what` says what it should be.
    ///
    /// # Errors
    /// If it is something else.
    pub fn take<T: DeserializeOwned>(&mut self, name: &'static str, what: &str) -> Result<Option<T>, Wrong> {
        self.known.push(name);
        match self.values.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let shown: String = value.to_string().chars().take(80).collect();
                let parsed = serde_json::from_value(value);
                parsed.map(Some).map_err(|_| Wrong::new(name, format!("{shown} is not {what}")))
            }
        }
    }

    /// The names of the fields that were asked for.
    pub fn known(&self) -> &[&'static str] {
        &self.known
    }

    /// Drops fields that mean nothing here.
    pub fn ignore(&mut self, names: &[&'static str]) {
        for name in names {
            self.known.push(name);
            self.values.remove(*name);
        }
    }

    /// Checks that nothing is left.
    ///
    /// # Errors
    /// With the name of a field that is not known, and the nearest one that is.
    pub fn finish(self) -> Result<(), Wrong> {
        let Some(unknown) = self.values.keys().next() else { return Ok(()) };
        let near = |name: &&str| strsim::jaro_winkler(name, unknown);
        let nearest = self.known.iter().copied().max_by(|a, b| near(a).total_cmp(&near(b))).unwrap_or_default();
        Err(Wrong::new(unknown.clone(), format!("this field is not known; the nearest one is `{nearest}`")))
    }
}
