//! The flags that say how prompts are read.

use super::warn;
use crate::engine::{Conditioning, PromptText};
use crate::image::{GenerationInfo, UsedEmbedding};
use crate::models::prompt::PromptSyntax;
use crate::weights::Embedding;
use crate::{Error, Result, Subject};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Learnt words.
#[derive(clap::Args)]
#[group(skip)]
pub(super) struct Embeddings {
    /// Textual inversion: a file or a folder of them; repeatable. Its word in prompts is the file's name without the
    /// extension, or the token in the file
    #[arg(long, value_name = "FILE")]
    embedding: Vec<PathBuf>,
}

#[derive(clap::Args)]
#[group(skip)]
pub(super) struct Flags {
    /// Syntax of the prompts: plain text, or that of the A1111 web UI or ComfyUI, with (words:1.3) and long prompts
    #[arg(long = "prompt-syntax", default_value_t = PromptSyntax::Plain, value_name = "plain|a1111|comfy")]
    pub(super) syntax: PromptSyntax,
    /// Clip skip as A1111 counts it: how far from its end the text encoder's states are taken; 1 skips nothing
    #[arg(long, default_value_t = 1, value_name = "N")]
    clip_skip: usize,
    /// SDXL: prompt of the second text encoder [default: the prompt]
    #[arg(long, allow_hyphen_values = true, value_name = "PROMPT")]
    prompt_2: Option<String>,
    /// SDXL: negative prompt of the second text encoder [default: the negative prompt]
    #[arg(long, allow_hyphen_values = true, value_name = "PROMPT")]
    negative_prompt_2: Option<String>,
    #[command(flatten)]
    pub(super) embeddings: Embeddings,
}

/// A prompt with its words for SDXL's second text encoder.
#[derive(Clone, Copy)]
pub(super) struct Words<'a> {
    pub(super) first: Option<&'a str>,
    pub(super) second: Option<&'a str>,
}

impl Words<'_> {
    /// None if both are missing; only the second is beside an empty text.
    pub(super) fn read(self, syntax: PromptSyntax, clip_skip: usize) -> Option<PromptText> {
        self.first.or(self.second)?;
        let text = PromptText::new(self.first.unwrap_or_default()).second(self.second.map(str::to_string));
        Some(text.syntax(syntax).clip_skip(clip_skip))
    }
}

impl Embeddings {
    /// All of them, those of a folder in the order of their names.
    pub(super) fn open(&self) -> Result<Vec<Arc<Embedding>>> {
        let mut files = Vec::new();
        for path in &self.embedding {
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
}

impl Flags {
    /// A prompt; `second` are the words for the second text encoder that an item of a list has of its own.
    pub(super) fn prompt(&self, text: &str, second: Option<&str>) -> PromptText {
        let second = second.or(self.prompt_2.as_deref()).map(str::to_string);
        PromptText::new(text).second(second).syntax(self.syntax).clip_skip(self.clip_skip)
    }

    /// A negative prompt, if there is one.
    pub(super) fn negative(&self, text: Option<&str>, second: Option<&str>) -> Option<PromptText> {
        let second = second.or(self.negative_prompt_2.as_deref());
        Words { first: text, second }.read(self.syntax, self.clip_skip)
    }

    /// Warns of a prompt that is not read as it was probably meant.
    pub(super) fn warn(&self, what: &str, prompt: &PromptText, encoded: &Conditioning) {
        let remedy = "--prompt-syntax a1111 or comfy";
        if self.syntax.is_suspect(&prompt.text) {
            warn(&format!("the {what} looks weighted, but is read as plain text; {remedy} reads its signs"));
        }
        if !encoded.truncated().is_empty() {
            let lost = shortened(encoded.truncated());
            warn(&format!("the {what} is too long; these words are not used: {lost}; {remedy} uses all words"));
        }
    }

    /// The record of these prompts.
    pub(super) fn record(&self, info: &mut GenerationInfo) {
        (info.prompt_2, info.negative_prompt_2) = (self.prompt_2.clone(), self.negative_prompt_2.clone());
        record(info, self.syntax, self.clip_skip);
    }
}

/// Records how a picture's prompts are read.
pub(super) fn record(info: &mut GenerationInfo, syntax: PromptSyntax, clip_skip: usize) {
    info.prompt_syntax = crate::pipeline::told(syntax);
    info.clip_skip = (clip_skip != 1).then_some(clip_skip);
}

/// The record of those of the `loaded` embeddings that prompts use.
pub(super) fn used<'a>(
    loaded: &[Arc<Embedding>],
    prompts: impl IntoIterator<Item = &'a Conditioning> + Clone,
) -> Vec<UsedEmbedding> {
    let is_used = |embedding: &Arc<Embedding>| {
        let mut used = prompts.clone().into_iter().flat_map(Conditioning::embeddings);
        used.any(|name| embedding.names().iter().any(|own| own.to_lowercase() == name))
    };
    let record = |embedding: &Arc<Embedding>| UsedEmbedding {
        name: embedding.names().first().cloned().unwrap_or_default(),
        sha256: embedding.sha256().to_string(),
        file: embedding.path().display().to_string(),
    };
    loaded.iter().filter(|embedding| is_used(embedding)).map(record).collect()
}

/// The embeddings that a picture records.
pub(super) fn recorded_embeddings(info: &GenerationInfo) -> Result<Vec<Arc<Embedding>>> {
    let open = |used: &UsedEmbedding| {
        let path = Path::new(&used.file);
        let embedding = Embedding::open(path)?;
        if embedding.sha256() != used.sha256 {
            let problem = format!("holds another embedding than the picture's `{}`", used.name);
            return Err(Error::mismatch(path, problem).advise("put the picture's embedding there"));
        }
        Ok(Arc::new(embedding))
    };
    info.embeddings.iter().map(open).collect()
}

/// The prompt and the negative prompt that a picture records, with the syntax that it records.
pub(super) fn recorded_prompts(info: &GenerationInfo, syntax: PromptSyntax) -> (PromptText, Option<PromptText>) {
    let clip_skip = info.clip_skip.unwrap_or(1);
    let read = |first: Option<&str>, second: Option<&str>| Words { first, second }.read(syntax, clip_skip);
    let prompt = read(Some(&info.prompt), info.prompt_2.as_deref());
    let negative = read(info.negative_prompt.as_deref(), info.negative_prompt_2.as_deref());
    (prompt.unwrap_or_default(), negative)
}

/// The same error about a negative prompt.
pub(super) fn of_negative(error: Error) -> Error {
    match error.subject() {
        Subject::Field("prompt") => error.of_field("negative_prompt"),
        Subject::Field("prompt_2") => error.of_field("negative_prompt_2"),
        _ => error,
    }
}

/// The beginning of a text, for a message.
fn shortened(text: &str) -> String {
    const SHOWN: usize = 1000;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{} ... ({} bytes more)", &text[..end], text.len() - end),
        None => text.to_string(),
    }
}
