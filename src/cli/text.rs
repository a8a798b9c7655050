//! The flags that say how prompts are read.

use super::warn;
use crate::engine::{Conditioning, PromptText};
use crate::image::{GenerationInfo, UsedEmbedding};
use crate::models::prompt::PromptSyntax;
use crate::pipeline::{open_embeddings, record_reading, used_embeddings, words};
use crate::weights::Embedding;
use crate::{Error, Result};
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

impl Embeddings {
    /// All of them, those of a folder in the order of their names.
    pub(super) fn open(&self) -> Result<Vec<Arc<Embedding>>> {
        open_embeddings(&self.embedding)
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
        words((text, second.or(self.negative_prompt_2.as_deref())), self.syntax, self.clip_skip)
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
        record_reading(info, self.syntax, self.clip_skip);
    }
}

/// The record of those of the `loaded` embeddings that prompts use.
pub(super) fn used<'a>(
    loaded: &[Arc<Embedding>],
    prompts: impl Iterator<Item = &'a Conditioning>,
) -> Vec<UsedEmbedding> {
    used_embeddings(loaded, &prompts.flat_map(Conditioning::embeddings).collect())
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
    let prompt = words((Some(&info.prompt), info.prompt_2.as_deref()), syntax, clip_skip);
    let negative = words((info.negative_prompt.as_deref(), info.negative_prompt_2.as_deref()), syntax, clip_skip);
    (prompt.unwrap_or_default(), negative)
}

/// The beginning of a text, for a message.
fn shortened(text: &str) -> String {
    const SHOWN: usize = 1000;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{} ... ({} bytes more)", &text[..end], text.len() - end),
        None => text.to_string(),
    }
}
