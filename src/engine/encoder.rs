//! One text encoder of a checkpoint, from a prompt to hidden states.

use super::adapters::Adaptable;
use super::{Adapted, PromptText, read_config};
use crate::backend::{Executor, Precision};
use crate::device::Device;
use crate::models::chunks::{Chunk, Chunks, needs_nothing, weigh};
use crate::models::prompt::PromptSyntax;
use crate::models::tokenizer::{Tokenizer, TokenizerRules};
use crate::models::{ADDED_TOKENS, ClipConfig, text_encoder};
use crate::weights::{Embedding, Source, Tensors};
use crate::{Error, Result};
use rayon::prelude::*;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

/// A text encoder whose weights are not loaded yet.
pub(crate) struct TextModel {
    /// The folder of its weights in the checkpoint.
    pub folder: &'static str,
    pub tokenizer: Tokenizer,
    pub config: ClipConfig,
    /// The vectors of all embeddings, `[config.added_tokens, width]`.
    added: Vec<f32>,
}

impl TextModel {
    /// Reads the configurations and tokenizers of a checkpoint's text encoders: one, or SDXL's two.
    ///
    /// # Errors
    /// Those of reading the files, and [`crate::ErrorKind::Mismatch`] for parts that do not belong together.
    pub fn read(source: &Source, rules: TokenizerRules, embeddings: &[Arc<Embedding>]) -> Result<Vec<Self>> {
        let folders = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")];
        let sdxl = source.has("text_encoder_2/config.json");
        let folders = if sdxl { &folders[..] } else { &folders[..1] };
        let configs = folders.iter().map(|(folder, _)| read_config(source, folder, ClipConfig::parse));
        let configs = configs.collect::<Result<Vec<_>>>()?;
        let widths: Vec<usize> = configs.iter().map(|config| config.layers.width).collect();
        let mut added = vec![Vec::new(); configs.len()];
        for embedding in embeddings {
            added.iter_mut().zip(embedding.tables(&widths)?).for_each(|(all, own)| all.extend_from_slice(own));
        }
        let tokenizers: Vec<Result<Tokenizer>> = (folders.par_iter().zip(&configs))
            .map(|((_, folder), config)| tokenizer(source, folder, config, rules, embeddings))
            .collect();
        // Of several problems the first in this order is reported, whichever was found first.
        let tokenizers = tokenizers.into_iter().collect::<Result<Vec<_>>>()?;
        let mut models = Vec::new();
        for (((folder, _), config), (tokenizer, added)) in
            folders.iter().zip(configs).zip(tokenizers.into_iter().zip(added))
        {
            let added_tokens = added.len() / config.layers.width;
            // As in diffusers, a prompt has the tokenizer's length, even if the encoder has more positions.
            let config = ClipConfig { tokens: tokenizer.length(), added_tokens, ..config }.with_clip_skip(1, sdxl)?;
            models.push(TextModel { folder, tokenizer, config, added });
        }
        Ok(models)
    }

    /// The weights.
    ///
    /// # Errors
    /// Those of [`Adapted::tensors`].
    pub fn tensors(&self, adapted: &Adapted) -> Result<Tensors> {
        let tensors = adapted.tensors(self.folder)?;
        let shape = [self.config.added_tokens, self.config.layers.width];
        Ok(match self.added.is_empty() {
            true => tensors,
            false => tensors.with(&format!("{ADDED_TOKENS}.weight"), &shape, &self.added),
        })
    }
}

/// The tokenizers and configurations of a checkpoint's text encoders without their weights: all that it takes to check
/// a prompt.
#[derive(Clone)]
pub(crate) struct Texts(Vec<Arc<TextModel>>);

/// A prompt as text encoders would read it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    /// The number of chunks of 77 tokens.
    pub chunks: usize,
    /// The words at the end that are not used.
    pub lost: String,
    /// The names of the embeddings that the prompt uses, in lower case.
    pub embeddings: BTreeSet<String>,
}

impl Texts {
    /// # Errors
    /// Those of [`TextModel::read`].
    pub fn read(source: &Source, rules: TokenizerRules, embeddings: &[Arc<Embedding>]) -> Result<Self> {
        Ok(Texts(TextModel::read(source, rules, embeddings)?.into_iter().map(Arc::new).collect()))
    }

    /// The same as those of encoders.
    pub(super) fn of(encoders: &[TextEncoder]) -> Self {
        Texts(encoders.iter().map(|encoder| encoder.model.clone()).collect())
    }

    /// Reads a prompt without encoding it.
    ///
    /// # Errors
    /// Those of [`super::Engine::encode`] that depend on the words alone.
    pub fn measure(&self, prompt: &PromptText) -> Result<Reading> {
        let mut reading = Reading::default();
        for (model, text) in self.0.iter().zip(texts(prompt, self.0.len())?) {
            let normed = model.config.states.normed;
            model.config.clone().with_clip_skip(prompt.clip_skip, !normed)?;
            let chunks = model.tokenizer.chunks(text, prompt.syntax)?;
            reading.chunks = reading.chunks.max(chunks.chunks.len());
            reading.embeddings.extend(chunks.embeddings);
            if reading.lost.is_empty() {
                reading.lost = chunks.lost;
            }
        }
        Ok(reading)
    }
}

/// The words of a prompt for each of the text encoders, of which there are so many.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] for a second prompt without a second encoder.
pub(super) fn texts(prompt: &PromptText, encoders: usize) -> Result<[&str; 2]> {
    let second = prompt.second.as_deref().filter(|second| !second.is_empty());
    if second.is_some() && encoders < 2 {
        let problem = "this checkpoint has one text encoder, and only SDXL has two";
        return Err(Error::invalid("prompt_2", problem).advise("leave it out"));
    }
    Ok([&prompt.text, second.unwrap_or(&prompt.text)])
}

fn tokenizer(
    source: &Source,
    folder: &str,
    config: &ClipConfig,
    rules: TokenizerRules,
    embeddings: &[Arc<Embedding>],
) -> Result<Tokenizer> {
    let tokenizer = source.tokenizer(folder)?.with_rules(rules)?;
    if tokenizer.vocab_size() > config.vocab_size || tokenizer.length() > config.max_position_embeddings {
        let problem = format!(
            "a vocabulary of {} and prompts of {} tokens do not fit the text encoder, which has {} and {}",
            tokenizer.vocab_size(),
            tokenizer.length(),
            config.vocab_size,
            config.max_position_embeddings
        );
        return Err(Error::mismatch(source.path(folder), problem));
    }
    let (mut names, mut next) = (Vec::new(), config.vocab_size as u32);
    for embedding in embeddings {
        let ids = next..next + embedding.vectors() as u32;
        next = ids.end;
        names.extend(embedding.names().iter().map(|name| (name.clone(), ids.clone())));
    }
    tokenizer.with_embeddings(&names)
}

/// A text encoder that is ready to run.
pub(super) struct TextEncoder {
    pub model: Arc<TextModel>,
    device: Device,
    weights: Adaptable,
    ready: Mutex<Ready>,
}

/// The network for one prompt at a clip skip, the last one that was asked for.
struct Ready {
    clip_skip: usize,
    executor: Box<dyn Executor>,
    /// The states of the empty prompt, once they were needed.
    nothing: Option<Vec<f32>>,
}

/// A prompt as one text encoder sees it.
pub(super) struct Encoded {
    /// `[chunks, tokens, width]`, with the words' weights applied.
    pub states: Vec<f32>,
    /// The first chunk's pooled token, `[projection_dim]`; empty without a projection.
    pub pooled: Vec<f32>,
    pub chunks: Chunks,
}

impl TextEncoder {
    /// # Errors
    /// Those of reading the weights, and [`crate::ErrorKind::OutOfMemory`].
    pub fn load(model: TextModel, adapted: &Adapted, device: &Device) -> Result<Self> {
        let graph = text_encoder(&model.config, 1);
        let weights = Adaptable::load(device, graph.weights(), &model.tensors(adapted)?, Precision::Full)?;
        Self::new(Arc::new(model), device, weights)
    }

    fn new(model: Arc<TextModel>, device: &Device, weights: Adaptable) -> Result<Self> {
        let plan = device.plan(text_encoder(&model.config, 1), &[]);
        let executor = device.executor(plan, weights.weights())?;
        let ready = Mutex::new(Ready { clip_skip: 1, executor, nothing: None });
        Ok(TextEncoder { model, device: device.clone(), weights, ready })
    }

    /// The weights with other adapters; `None` if these change nothing.
    ///
    /// # Errors
    /// Those of [`TextEncoder::load`].
    pub fn adapt(&self, adapted: &Adapted) -> Result<Option<Adaptable>> {
        let graph = text_encoder(&self.model.config, 1);
        self.weights.adapt(&self.device, graph.weights(), &self.model.tensors(adapted)?, Precision::Full)
    }

    /// The same encoder with these weights.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`].
    pub fn with_weights(&self, weights: Adaptable) -> Result<Self> {
        Self::new(self.model.clone(), &self.device, weights)
    }

    /// The weights.
    pub fn weights(&self) -> &Adaptable {
        &self.weights
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// Bytes of the activations.
    pub fn arena_bytes(&self) -> usize {
        self.lock().executor.plan().arena_bytes()
    }

    /// Also after a panic of another thread: every run writes all inputs anew.
    fn lock(&self) -> MutexGuard<'_, Ready> {
        self.ready.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Encodes a prompt in `least` chunks or more.
    ///
    /// # Errors
    /// Those of [`Tokenizer::chunks`] and [`ClipConfig::with_clip_skip`], and the device's.
    pub fn encode(&self, prompt: &str, syntax: PromptSyntax, clip_skip: usize, least: usize) -> Result<Encoded> {
        let TextModel { tokenizer, config, .. } = &*self.model;
        let mut chunks = tokenizer.chunks(prompt, syntax)?;
        let empty = || Chunk { ids: tokenizer.framed(&[]), weights: vec![1.0; config.tokens] };
        chunks.chunks.resize_with(least.max(chunks.chunks.len()), empty);
        let mut ready = self.lock();
        if ready.clip_skip != clip_skip {
            let config = config.clone().with_clip_skip(clip_skip, !config.states.normed)?;
            let plan = self.device.plan(text_encoder(&config, 1), &[]);
            let executor = self.device.executor(plan, self.weights.weights())?;
            *ready = Ready { clip_skip, executor, nothing: None };
        }
        let Ready { executor, nothing, .. } = &mut *ready;
        let (mut states, mut pooled) = (Vec::new(), Vec::new());
        for chunk in &chunks.chunks {
            states.extend(run(config, &mut **executor, chunk)?);
            if pooled.is_empty() && config.projection_dim.is_some() {
                pooled = executor.read("text_embeds")?;
            }
        }
        if needs_nothing(&chunks.chunks, syntax) && nothing.is_none() {
            *nothing = Some(run(config, &mut **executor, &empty())?);
        }
        weigh(&mut states, &chunks.chunks, nothing.as_deref().unwrap_or_default(), syntax);
        Ok(Encoded { states, pooled, chunks })
    }
}

/// The hidden states of a chunk, without its weights.
fn run(config: &ClipConfig, executor: &mut dyn Executor, chunk: &Chunk) -> Result<Vec<f32>> {
    executor.write("input_ids", &chunk.ids.iter().map(|&id| id as f32).collect::<Vec<_>>())?;
    if config.projection_dim.is_some() {
        executor.write("pooled_index", &[config.pooled_index(&chunk.ids) as f32])?;
    }
    executor.step()?;
    executor.read("states")
}
