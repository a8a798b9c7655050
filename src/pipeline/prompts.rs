//! The words of requests and of runs of the command line: how they are read, and what is recorded of it.

use crate::engine::PromptText;
use crate::image::{GenerationInfo, UsedEmbedding};
use crate::models::prompt::{LoraTag, PromptSyntax, lora_tags};
use crate::weights::Embedding;
use crate::{Error, Result, Subject};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

/// A prompt of words for the first text encoder and for SDXL's second. `None` if both are missing; words for the second
/// alone stand beside an empty text.
pub(crate) fn words(
    (first, second): (Option<&str>, Option<&str>),
    syntax: PromptSyntax,
    clip_skip: usize,
) -> Option<PromptText> {
    first.or(second)?;
    let text = PromptText::new(first.unwrap_or_default()).second(second.map(str::to_string));
    Some(text.syntax(syntax).clip_skip(clip_skip))
}

/// Records how a picture's prompts are read.
pub(crate) fn record_reading(info: &mut GenerationInfo, syntax: PromptSyntax, clip_skip: usize) {
    info.prompt_syntax = super::told(syntax);
    info.clip_skip = (clip_skip != 1).then_some(clip_skip);
}

/// The record of those of the `loaded` embeddings whose names, in lower case, prompts use.
pub(crate) fn used_embeddings(loaded: &[Arc<Embedding>], names: &BTreeSet<&str>) -> Vec<UsedEmbedding> {
    let is_used =
        |embedding: &&Arc<Embedding>| embedding.names().iter().any(|own| names.contains(own.to_lowercase().as_str()));
    let record = |embedding: &Arc<Embedding>| UsedEmbedding {
        name: embedding.names().first().cloned().unwrap_or_default(),
        sha256: embedding.sha256().to_string(),
        file: embedding.path().display().to_string(),
    };
    loaded.iter().filter(is_used).map(record).collect()
}

/// Takes tags such as `<lora:name:0.8>` out of a prompt, in A1111's syntax alone.
///
/// # Errors
/// Those of [`lora_tags`].
pub(crate) fn take_tags(prompt: &str, syntax: PromptSyntax) -> Result<(String, Vec<LoraTag>)> {
    match syntax {
        PromptSyntax::A1111 => {
            let (text, tags) = lora_tags(prompt)?;
            Ok((if tags.is_empty() { text } else { text.trim().into() }, tags))
        }
        _ => Ok((prompt.into(), Vec::new())),
    }
}

/// The same error about a negative prompt.
pub(crate) fn of_negative(error: Error) -> Error {
    match error.subject() {
        Subject::Field("prompt") => error.of_field("negative_prompt"),
        Subject::Field("prompt_2") => error.of_field("negative_prompt_2"),
        _ => error,
    }
}

/// Opens embeddings: files, or folders of them. Those of a folder are in the order of their names.
///
/// # Errors
/// Those of [`Embedding::open`], [`crate::ErrorKind::NotFound`] for a folder without embeddings, and
/// [`crate::ErrorKind::Mismatch`] for two of one name.
pub(crate) fn open_embeddings(paths: &[PathBuf]) -> Result<Vec<Arc<Embedding>>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let extensions = ["safetensors", "pt", "bin"];
        let is_embedding = |file: &PathBuf| {
            file.extension().is_some_and(|own| extensions.iter().any(|known| own.eq_ignore_ascii_case(known)))
        };
        let entries = std::fs::read_dir(path).map_err(Error::io("read", path))?;
        let entries = entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>();
        let mut found: Vec<PathBuf> = entries.map_err(Error::io("read", path))?;
        found.retain(is_embedding);
        found.sort();
        if found.is_empty() {
            let problem = "no embeddings in this folder: .safetensors, .pt or .bin";
            return Err(Error::not_found(path.as_path(), problem).advise("give another one"));
        }
        files.extend(found);
    }
    let mut opened: Vec<Arc<Embedding>> = Vec::new();
    for file in files {
        let embedding = Embedding::open(&file)?;
        let same = |a: &String| embedding.names().iter().any(|b| a.to_lowercase() == b.to_lowercase());
        if let Some(other) = opened.iter().find(|other| other.names().iter().any(same)) {
            let problem = format!("has the name of {}", other.path().display());
            return Err(Error::mismatch(file, problem).advise("rename one of them"));
        }
        opened.push(Arc::new(embedding));
    }
    Ok(opened)
}
