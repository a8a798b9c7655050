//! PEFT's configuration of LoRA, which diffusers writes into the header of a file.

use super::keys::{self, NETWORKS};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// The key in the header's metadata.
pub(super) const KEY: &str = "lora_adapter_metadata";

/// The configurations of an adapter's networks: PEFT's `LoraConfig`, with `unet.` and the like before each field.
#[derive(Default)]
pub(super) struct Peft(Map<String, Value>);

impl Peft {
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if it is no JSON object, [`crate::ErrorKind::Unsupported`] for patterns that are
    /// regular expressions.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let fields: Map<String, Value> = serde_json::from_str(text)
            .map_err(|problem| Error::damaged(path, format!("`{KEY}` in its header cannot be read: {problem}")))?;
        for network in NETWORKS {
            let patterns = fields.get(&format!("{network}.alpha_pattern")).and_then(Value::as_object);
            for pattern in patterns.into_iter().flat_map(Map::keys) {
                let plain = |c: char| c.is_ascii_alphanumeric() || "._".contains(c);
                if !pattern.strip_prefix('^').unwrap_or(pattern).chars().all(plain) {
                    let problem = format!("gives alphas by the regular expression `{pattern}`");
                    return Err(Error::unsupported(path, problem).advise(
                        "save it with the alpha of each module as a tensor of its own, as kohya's scripts do",
                    ));
                }
            }
        }
        Ok(Peft(fields))
    }

    /// The scale of the difference of a module of this name in the file, in which no tensor gives alpha: alpha / rank,
    /// or 1 if the configuration gives none either.
    pub fn scale(&self, module: &str, rank: usize) -> f32 {
        let (networks, name) = keys::place(module);
        let &[network] = networks else { return 1.0 };
        let field = |field: &str| self.0.get(&format!("{network}.{field}"));
        // A pattern is the whole name or its end.
        let fits = |pattern: &str| match pattern.strip_prefix('^') {
            Some(whole) => whole == name,
            None => name.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
        };
        let patterns = field("alpha_pattern").and_then(Value::as_object);
        let alpha = patterns.into_iter().flatten().find(|(pattern, _)| fits(pattern)).map(|(_, alpha)| alpha);
        let Some(alpha) = alpha.or(field("lora_alpha")).and_then(Value::as_f64) else { return 1.0 };
        // Rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732).
        let rank = rank as f64;
        let divisor = if field("use_rslora") == Some(&Value::Bool(true)) { rank.sqrt() } else { rank };
        (alpha / divisor) as f32
    }
}
