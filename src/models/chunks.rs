//! Prompts as chunks: rows of tokens that a text encoder reads one at a time, and the weights of the tokens.

use super::prompt::{Part, PromptSyntax};
use super::tokenizer::Tokenizer;
use crate::{Error, Result};
use std::collections::BTreeSet;

/// The largest number of chunks of a prompt.
pub const MAX_CHUNKS: usize = 64;
/// A1111 ends a chunk behind a comma if at most so many of its tokens follow it (`comma_padding_backtrack`).
const BACKTRACK: usize = 20;
/// ComfyUI splits only words of so many tokens or more between chunks.
const LONG_WORD: usize = 8;

/// The input of one call of a text encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// [`Tokenizer::length`] ids: start, tokens of the prompt, end, padding.
    pub ids: Vec<i64>,
    /// The weight of each.
    pub weights: Vec<f32>,
}

/// A prompt as a tokenizer sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunks {
    /// At least one.
    pub chunks: Vec<Chunk>,
    /// The end of the prompt that is not used because it did not fit.
    pub lost: String,
    /// The names of the embeddings ([`Tokenizer::with_embeddings`]) that the prompt uses.
    pub embeddings: BTreeSet<String>,
}

/// Tokens that belong together: a word, or an embedding with all its vectors.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    pub ids: Vec<u32>,
    /// The embedding's name.
    pub embedding: Option<String>,
}

/// Chunks while they are filled.
struct Filling {
    /// The most tokens of a chunk.
    room: usize,
    full: Vec<Vec<(u32, f32)>>,
    open: Vec<(u32, f32)>,
    embeddings: BTreeSet<String>,
}

impl Filling {
    fn next(&mut self) {
        self.full.push(std::mem::take(&mut self.open));
    }

    fn push(&mut self, ids: &[u32], weight: f64) {
        self.open.extend(ids.iter().map(|&id| (id, weight as f32)));
    }
}

impl Tokenizer {
    /// Turns a prompt into chunks. In plain syntax there is one, and words beyond it are lost.
    ///
    /// # Errors
    /// Those of [`PromptSyntax::parts`] and [`Tokenizer::encode`]; [`crate::ErrorKind::Invalid`] for more than
    /// [`MAX_CHUNKS`], and [`crate::ErrorKind::NotFound`] for an embedding that ComfyUI's syntax names and that is not
    /// there.
    pub fn chunks(&self, prompt: &str, syntax: PromptSyntax) -> Result<Chunks> {
        let parts = syntax.parts(prompt)?;
        let mut filling =
            Filling { room: self.length() - 2, full: Vec::new(), open: Vec::new(), embeddings: BTreeSet::new() };
        match syntax {
            PromptSyntax::Plain => {
                let encoded = self.encode(prompt)?;
                let weights = vec![1.0; encoded.ids.len()];
                let chunks = vec![Chunk { ids: encoded.ids, weights }];
                return Ok(Chunks { chunks, lost: encoded.lost, embeddings: encoded.embeddings });
            }
            PromptSyntax::A1111 => self.fill_as_a1111(&parts, &mut filling)?,
            PromptSyntax::Comfy => self.fill_as_comfy(&parts, &mut filling)?,
        }
        if !filling.open.is_empty() || filling.full.is_empty() {
            filling.next();
        }
        if filling.full.len() > MAX_CHUNKS {
            let problem = format!("takes {} chunks of {} tokens", filling.full.len(), self.length());
            return Err(Error::invalid("prompt", problem).advise(format!("shorten it to {MAX_CHUNKS} or fewer")));
        }
        let chunk = |tokens: &Vec<(u32, f32)>| {
            let ids: Vec<u32> = tokens.iter().map(|(id, _)| *id).collect();
            let mut weights = vec![1.0; self.length()];
            tokens.iter().zip(&mut weights[1..]).for_each(|((_, from), to)| *to = *from);
            Chunk { ids: self.framed(&ids), weights }
        };
        let chunks = filling.full.iter().map(chunk).collect();
        Ok(Chunks { chunks, lost: String::new(), embeddings: filling.embeddings })
    }

    /// A1111's `tokenize_line`. A chunk that is full when a further token comes gives the tokens behind its last comma
    /// to the next chunk, if these are few.
    fn fill_as_a1111(&self, parts: &[Part], filling: &mut Filling) -> Result<()> {
        let mut comma = None;
        for part in parts {
            let Part::Text { text, weight } = part else {
                filling.next();
                comma = None;
                continue;
            };
            for Group { ids, embedding } in self.groups(text, true)? {
                // Words have no meaning here: every token is placed on its own, but for embeddings.
                let together = if embedding.is_some() { ids.len() } else { 1 };
                for ids in ids.chunks(together) {
                    if self.is_comma(ids) {
                        comma = Some(filling.open.len());
                    } else if filling.open.len() == filling.room
                        && let Some(at) = comma.filter(|at| filling.room - at <= BACKTRACK)
                    {
                        let moved = filling.open.split_off(at + 1);
                        filling.next();
                        filling.open = moved;
                        comma = None;
                    }
                    if filling.open.len() + ids.len() > filling.room {
                        filling.next();
                        comma = None;
                    }
                    filling.push(ids, *weight);
                }
                filling.embeddings.extend(embedding);
            }
        }
        Ok(())
    }

    /// ComfyUI's `tokenize_with_weights`. A word that does not fit into a chunk begins the next one, unless it is long.
    fn fill_as_comfy(&self, parts: &[Part], filling: &mut Filling) -> Result<()> {
        for part in parts {
            let Part::Text { text, weight } = part else { continue };
            for word in text.split([' ', '\n']).filter(|word| !word.is_empty()) {
                for Group { ids, embedding } in self.comfy_word(word)? {
                    let mut rest = &ids[..];
                    while !rest.is_empty() {
                        let free = filling.room - filling.open.len();
                        if rest.len() <= free {
                            filling.push(rest, *weight);
                            break;
                        }
                        if ids.len() >= LONG_WORD {
                            let (head, tail) = rest.split_at(free);
                            filling.push(head, *weight);
                            rest = tail;
                        }
                        filling.next();
                    }
                    filling.embeddings.extend(embedding);
                }
            }
        }
        Ok(())
    }

    /// A word of a prompt in ComfyUI's syntax, in which `embedding:name` is an embedding, and commas may follow it.
    fn comfy_word(&self, word: &str) -> Result<Vec<Group>> {
        // The tokens of all other words stay together, whatever words the tokenizer sees in them.
        let joined = |text: &str| -> Result<Group> {
            let ids = self.groups(text, false)?.into_iter().flat_map(|group| group.ids).collect();
            Ok(Group { ids, embedding: None })
        };
        let Some(name) = word.strip_prefix("embedding:") else { return Ok(vec![joined(word)?]) };
        let bare = name.trim_end_matches(',');
        let (found, rest) = match self.embedding(name) {
            Some(found) => (Some(found), ""),
            None => (self.embedding(bare), &name[bare.len()..]),
        };
        let found = found.ok_or_else(|| {
            let known: Vec<&str> = self.embeddings().collect();
            let advice = if known.is_empty() { "load it".into() } else { format!("there are {}", known.join(", ")) };
            Error::not_found(crate::Subject::Field("embedding"), format!("there is no embedding `{bare}`"))
                .advise(advice)
        })?;
        Ok(vec![found, joined(rest)?])
    }
}

/// Applies the weights of a prompt's chunks to the hidden states of one text encoder, `[chunks, tokens, width]`.
/// `nothing` are the states of the empty prompt, `[tokens, width]`; they are read in ComfyUI's syntax alone.
///
/// A1111 multiplies the states of a token by its weight, and then all of a chunk by one factor that restores the
/// chunk's mean. ComfyUI moves the states of a token away from those of the empty prompt at its place, or toward them.
pub fn weigh(states: &mut [f32], chunks: &[Chunk], nothing: &[f32], syntax: PromptSyntax) {
    let size = states.len() / chunks.len().max(1);
    for (states, chunk) in states.chunks_exact_mut(size.max(1)).zip(chunks) {
        if chunk.weights.iter().all(|&weight| weight == 1.0) {
            continue;
        }
        let width = size / chunk.weights.len();
        let mean = |states: &[f32]| states.iter().map(|&x| f64::from(x)).sum::<f64>() / states.len() as f64;
        let before = mean(states);
        for (token, (states, &weight)) in states.chunks_exact_mut(width).zip(&chunk.weights).enumerate() {
            match syntax {
                PromptSyntax::Comfy => {
                    let nothing = &nothing[token * width..][..width];
                    states.iter_mut().zip(nothing).for_each(|(x, from)| *x = (*x - from) * weight + from);
                }
                _ => states.iter_mut().for_each(|x| *x *= weight),
            }
        }
        let factor = before / mean(states);
        if syntax == PromptSyntax::A1111 && factor.is_finite() {
            states.iter_mut().for_each(|x| *x *= factor as f32);
        }
    }
}

/// True if [`weigh`] needs the states of the empty prompt.
pub fn needs_nothing(chunks: &[Chunk], syntax: PromptSyntax) -> bool {
    syntax == PromptSyntax::Comfy && chunks.iter().flat_map(|chunk| &chunk.weights).any(|&weight| weight != 1.0)
}
