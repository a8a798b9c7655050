//! The prompts of `respodiff sample`: one on the command line, or a file of them.

use crate::{Error, Result};
use serde::Deserialize;
use std::path::Path;

/// A prompt with its optional settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Item {
    pub(super) prompt: String,
    pub(super) negative_prompt: Option<String>,
    /// Words for SDXL's second text encoder.
    pub(super) prompt_2: Option<String>,
    pub(super) negative_prompt_2: Option<String>,
    /// Seed of its first image.
    pub(super) seed: Option<u64>,
    pub(super) guidance: Option<f32>,
}

impl Item {
    pub(super) fn new(prompt: &str) -> Self {
        let (negative_prompt, prompt_2, negative_prompt_2) = (None, None, None);
        Item { prompt: prompt.into(), negative_prompt, prompt_2, negative_prompt_2, seed: None, guidance: None }
    }
}

/// Reads a file with a prompt per line, or with a JSON object per line. Empty lines are skipped.
pub(super) fn read(path: &Path) -> Result<Vec<Item>> {
    let text = crate::files::read_text(path)?;
    if serde_json::from_str::<Vec<serde_json::Value>>(&text).is_ok() {
        return Err(Error::damaged(path, "is one JSON array").advise("write a JSON object per line"));
    }
    let lines = text.lines().enumerate().map(|(i, line)| (i, line.trim())).filter(|(_, line)| !line.is_empty());
    let item = |(i, line): (usize, &str)| match line.starts_with('{') {
        false => Ok(Item::new(line)),
        true => serde_json::from_str(line).map_err(|problem| {
            Error::damaged(path, format!("line {}: {problem}", i + 1))
                .advise("write {\"prompt\": \"...\"}, with negative_prompt, prompt_2, seed and guidance if you like")
        }),
    };
    let items = lines.map(item).collect::<Result<Vec<Item>>>()?;
    let with_nul = |item: &Item| {
        let texts = [Some(&item.prompt), item.negative_prompt.as_ref(), item.prompt_2.as_ref()];
        texts.into_iter().chain([item.negative_prompt_2.as_ref()]).flatten().any(|text| text.contains('\0'))
    };
    if let Some(item) = items.iter().position(with_nul) {
        return Err(Error::damaged(path, format!("prompt {} holds a NUL character", item + 1)));
    }
    if items.is_empty() {
        return Err(Error::damaged(path, "holds no prompts").advise("write one per line"));
    }
    Ok(items)
}
