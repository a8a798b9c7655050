//! The file of keys: `name: key` on each line, a JSON object of names and keys, or one key alone.

use crate::{Error, Result};
use respodiff_serve::Key;
use std::collections::BTreeMap;
use std::path::Path;

/// Reads the keys. Two may have one name, while an old key is replaced; no two are equal.
pub(super) fn read(path: &Path) -> Result<Vec<Key>> {
    let text = crate::files::read_text(path)?;
    let damaged = |problem: String| {
        Error::damaged(path, problem)
            .advise("write `name: key` on each line, a JSON object of names and keys, or one line with a key alone")
    };
    let named = |(name, key): (&str, &str)| Key { tenant: Some(name.trim().into()), key: key.trim().into() };
    let keys: Vec<Key> = if text.trim_start().starts_with('{') {
        let all: BTreeMap<String, String> =
            serde_json::from_str(&text).map_err(|_| damaged("is not a JSON object of names and keys".into()))?;
        all.iter().map(|(name, key)| named((name, key))).collect()
    } else {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let lines: Vec<&str> = lines.collect();
        let parse = |line: &&str| match split(line) {
            Some(pair) => Ok(named(pair)),
            None if lines.len() == 1 => Ok(Key { tenant: None, key: (*line).into() }),
            // The line itself may be a key, so it is not shown.
            None => Err(damaged("has several lines, of which one has no name".into())),
        };
        lines.iter().map(parse).collect::<Result<_>>()?
    };
    if keys.is_empty() || keys.iter().any(|key| key.key.is_empty() || key.tenant.as_deref() == Some("")) {
        return Err(damaged("holds no key, or an empty one or an empty name".into()));
    }
    let name = |key: &Key| key.tenant.as_deref().unwrap_or_default().to_string();
    for (i, key) in keys.iter().enumerate() {
        if let Some(same) = keys[..i].iter().find(|other| other.key == key.key) {
            return Err(damaged(format!("gives one key to {} and to {}", name(same), name(key))));
        }
    }
    Ok(keys)
}

/// The name and the key of `name: key`; the key may be missing.
fn split(line: &str) -> Option<(&str, &str)> {
    line.split_once(": ").or_else(|| Some((line.strip_suffix(':')?, "")))
}
