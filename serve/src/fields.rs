//! The fields of a JSON object that a client sent, taken one by one. What is left over is unknown.

use crate::backend::{Kind, Problem};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The fields of a body.
pub struct Fields {
    values: Map<String, Value>,
    /// The names that were asked for.
    known: Vec<&'static str>,
}

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it is not a JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, Problem> {
        let values = serde_json::from_slice(body)
            .map_err(|problem| Problem::new(Kind::Invalid, format!("the body is not a JSON object: {problem}")))?;
        Ok(Fields { values, known: Vec::new() })
    }

    /// Takes a field; null is as if it was not there. `what` says what it should be.
    ///
    /// # Errors
    /// [`Kind::Invalid`] with the field's name.
    pub fn take<T: DeserializeOwned>(&mut self, name: &'static str, what: &str) -> Result<Option<T>, Problem> {
        self.known.push(name);
        match self.values.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let shown: String = value.to_string().chars().take(80).collect();
                let parsed = serde_json::from_value(value);
                parsed.map(Some).map_err(|_| Problem::invalid(name, format!("{shown} is not {what}")))
            }
        }
    }

    /// The names of the fields that were asked for.
    #[cfg(test)]
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
    /// [`Kind::Invalid`] with the name of a field that is not known and the nearest one that is.
    pub fn finish(self) -> Result<(), Problem> {
        let Some(unknown) = self.values.keys().next() else { return Ok(()) };
        let near = |name: &&str| strsim::jaro_winkler(name, unknown);
        let nearest = self.known.iter().copied().max_by(|a, b| near(a).total_cmp(&near(b))).unwrap_or_default();
        Err(Problem::invalid(unknown.clone(), format!("this field is not known; the nearest one is `{nearest}`")))
    }
}
