//! The encoding of prompts into inputs of the UNet: the hidden states of one text encoder in Stable Diffusion 1.x and
//! 2.x; in SDXL those of two encoders side by side, a pooled prompt and the picture's sizes.

use super::encoder::{TextEncoder, TextModel, Texts, texts};
use super::{Adapted, Image, Prompt, PromptText};
use crate::device::Device;
use crate::models::tokenizer::TokenizerRules;
use crate::models::{ClipConfig, UNetConfig};
use crate::weights::{Embedding, Source};
use crate::{Error, Result, Subject};
use rayon::prelude::*;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

/// A checkpoint's text encoders, and how their outputs become inputs of its UNet.
pub(super) struct TextEncoders {
    encoders: Vec<TextEncoder>,
    /// True if the UNet also reads a pooled prompt and the picture's sizes.
    sized: bool,
    /// True if the absence of a prompt is encoded as zeros, false if as an empty prompt.
    zeros: bool,
    /// The encoding of the absence of a prompt, by clip skip.
    nothing: Mutex<HashMap<usize, Conditioning>>,
    /// Distinguishes the encodings made by these encoders from all others.
    identity: Arc<()>,
}

impl TextEncoders {
    /// Loads the text encoders of a checkpoint with this UNet, and makes them ready to run.
    ///
    /// # Errors
    /// Those of reading the files, [`crate::ErrorKind::Mismatch`] for parts that do not belong together, and
    /// [`crate::ErrorKind::OutOfMemory`].
    pub fn open(
        source: &Source,
        adapted: &Adapted,
        device: &Device,
        unet: &UNetConfig,
        rules: TokenizerRules,
        embeddings: &[Arc<Embedding>],
    ) -> Result<Self> {
        let has = |folder: &str| source.has(&format!("{folder}/config.json"));
        let index = read_index(source)?;
        if index["requires_aesthetics_score"] == true || (has("text_encoder_2") && !has("text_encoder")) {
            return Err(Error::unsupported(
                source.path("model_index.json"),
                "this is SDXL's refiner, which is not supported",
            )
            .advise("give the base model"));
        }
        let models = TextModel::read(source, rules, embeddings)?;
        let configs: Vec<&ClipConfig> = models.iter().map(|model| &model.config).collect();
        if let Some(problem) = misfit(&configs, unet) {
            return Err(Error::mismatch(source.path("unet/config.json"), problem));
        }
        let encoders: Vec<_> = models.into_par_iter().map(|model| TextEncoder::load(model, adapted, device)).collect();
        let sized = unet.text_time.is_some();
        Ok(TextEncoders {
            // Of several problems the first in this order is reported, whichever was found first.
            encoders: encoders.into_iter().collect::<Result<_>>()?,
            sized,
            zeros: sized && index["force_zeros_for_empty_prompt"].as_bool().unwrap_or(true),
            nothing: Mutex::default(),
            identity: Arc::new(()),
        })
    }

    /// The same text encoders with other adapters; `None` if these change nothing. Encodings of these encoders are not
    /// those of the others.
    ///
    /// # Errors
    /// Those of reading the files, and [`crate::ErrorKind::OutOfMemory`].
    pub fn adapt(&self, adapted: &Adapted) -> Result<Option<Self>> {
        let changed = self.encoders.iter().map(|encoder| encoder.adapt(adapted)).collect::<Result<Vec<_>>>()?;
        if changed.iter().all(Option::is_none) {
            return Ok(None);
        }
        let encoder = |(encoder, changed): (&TextEncoder, Option<_>)| {
            encoder.with_weights(changed.unwrap_or_else(|| encoder.weights().clone()))
        };
        let encoders = self.encoders.iter().zip(changed).map(encoder).collect::<Result<_>>()?;
        Ok(Some(TextEncoders { encoders, nothing: Mutex::default(), identity: Arc::new(()), ..*self }))
    }

    /// The encoders without their weights.
    pub fn texts(&self) -> Texts {
        Texts::of(&self.encoders)
    }

    /// True if these encoders made the encoding.
    pub fn made(&self, conditioning: &Conditioning) -> bool {
        Arc::ptr_eq(&conditioning.0.encoders, &self.identity)
    }

    /// True if the UNet reads the picture's sizes, as SDXL's does.
    pub fn sized(&self) -> bool {
        self.sized
    }

    /// Tokens of a chunk, padding included.
    pub fn tokens(&self) -> usize {
        self.encoders[0].model.config.tokens
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> usize {
        self.encoders.iter().map(TextEncoder::weight_bytes).sum()
    }

    /// Bytes of the activations.
    pub fn arena_bytes(&self) -> usize {
        self.encoders.iter().map(TextEncoder::arena_bytes).sum()
    }

    /// Encodes a prompt. SDXL's encoders read as many chunks as the longer of their prompts has.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a second prompt without a second encoder, those of [`TextEncoder::encode`],
    /// and [`crate::ErrorKind::NonFinite`] if a word's weight leaves the range of numbers.
    pub fn encode(&self, prompt: &PromptText) -> Result<Conditioning> {
        let PromptText { syntax, clip_skip, .. } = prompt;
        let texts = texts(prompt, self.encoders.len())?;
        let encode = |least: usize| -> Result<Vec<_>> {
            let each = self.encoders.iter().zip(texts);
            each.map(|(encoder, text)| encoder.encode(text, *syntax, *clip_skip, least)).collect()
        };
        let mut each = encode(1)?;
        let chunks = each.iter().map(|encoded| encoded.chunks.chunks.len()).max().unwrap_or(1);
        if each.iter().any(|encoded| encoded.chunks.chunks.len() < chunks) {
            each = encode(chunks)?;
        }
        let widths = self.encoders.iter().map(|encoder| encoder.model.config.layers.width);
        let parts: Vec<_> = widths.zip(&each).collect();
        let states: Vec<f32> = (0..chunks * self.tokens())
            .flat_map(|token| parts.iter().flat_map(move |(width, x)| &x.states[token * width..][..*width]))
            .copied()
            .collect();
        if states.iter().any(|x| !x.is_finite()) {
            return Err(Error::non_finite("a word's weight leaves the range of numbers").advise("lower it"));
        }
        let pooled = each.iter().find(|encoded| self.sized && !encoded.pooled.is_empty());
        let pooled = pooled.map_or(Vec::new(), |encoded| encoded.pooled.clone());
        // The tokenizers of one checkpoint almost always lose the same words.
        let lost = each.iter().map(|encoded| &encoded.chunks.lost).find(|lost| !lost.is_empty());
        let lost = lost.cloned().unwrap_or_default();
        let embeddings = each.iter().flat_map(|encoded| encoded.chunks.embeddings.iter().cloned()).collect();
        let (clip_skip, encoders) = (*clip_skip, self.identity.clone());
        Ok(Conditioning(Arc::new(Encoding { states, chunks, pooled, lost, embeddings, clip_skip, encoders })))
    }

    /// The encoding of the absence of a prompt, for an unconditional row.
    ///
    /// # Errors
    /// As for [`TextEncoders::encode`].
    pub fn nothing(&self, clip_skip: usize) -> Result<Conditioning> {
        let lock = || self.nothing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = lock().get(&clip_skip) {
            return Ok(known.clone());
        }
        let mut encoded = self.encode(&PromptText::default().clip_skip(clip_skip))?;
        if self.zeros
            && let Some(encoding) = Arc::get_mut(&mut encoded.0)
        {
            encoding.states.fill(0.0);
            encoding.pooled.fill(0.0);
        }
        Ok(lock().entry(clip_skip).or_insert(encoded).clone())
    }

    /// An image's prompt and its negative prompt, or without guidance the prompt twice.
    ///
    /// # Errors
    /// As for [`TextEncoders::encode`].
    pub fn pair(&self, image: &Image, guided: bool) -> Result<[Conditioning; 2]> {
        let encode = |prompt: &Prompt| match prompt {
            Prompt::Encoded(conditioning) => Ok(conditioning.clone()),
            Prompt::Text(text) => self.encode(text),
        };
        let prompt = encode(&image.prompt)?;
        let negative = match &image.negative {
            _ if !guided => prompt.clone(),
            Some(negative) => encode(negative)?,
            None => self.nothing(prompt.0.clip_skip)?,
        };
        Ok([prompt, negative])
    }

    /// The UNet's inputs for these rows, whose prompts are repeated to `chunks` chunks: those of
    /// [`super::UNET_CONSTANTS`] that it reads, `[rows, ...]`.
    ///
    /// Attention to a sequence of keys and values and to the same sequence repeated has one result, so a prompt means
    /// what it means alone.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] for a prompt that another checkpoint has encoded.
    pub fn inputs(&self, rows: &[Row], chunks: usize) -> Result<UNetInputs> {
        if !rows.iter().all(|(row, _)| self.made(row)) {
            let problem = "a prompt was encoded by another engine, whose states this UNet cannot read";
            return Err(Error::mismatch(Subject::Field("prompt"), problem).advise("encode it by the session's engine"));
        }
        let states = rows.iter().flat_map(|(row, _)| row.0.states.repeat(chunks / row.0.chunks)).collect();
        let mut inputs: UNetInputs = vec![("encoder_hidden_states", states)];
        if self.sized {
            inputs.push(("text_embeds", rows.iter().flat_map(|(row, _)| row.0.pooled.iter().copied()).collect()));
            inputs.push(("time_ids", rows.iter().flat_map(|(_, ids)| *ids).collect()));
        }
        Ok(inputs)
    }
}

/// The conditioning of a row of the UNet's batch: a prompt, and the result of [`time_ids`] for its picture's sizes.
pub(super) type Row = (Conditioning, [f32; 6]);

/// Inputs of a UNet by name.
pub(crate) type UNetInputs = Vec<(&'static str, Vec<f32>)>;

/// A prompt as a checkpoint's text encoders see it, for any number of images. Cloning shares it.
#[derive(Clone)]
pub struct Conditioning(Arc<Encoding>);

struct Encoding {
    /// Hidden states, `[chunks * tokens, width]`, those of several encoders side by side.
    states: Vec<f32>,
    chunks: usize,
    /// The pooled prompt, `[width]`; empty if the UNet reads none.
    pooled: Vec<f32>,
    lost: String,
    embeddings: BTreeSet<String>,
    clip_skip: usize,
    /// [`TextEncoders::identity`] of those that made it.
    encoders: Arc<()>,
}

impl Conditioning {
    /// The words at the prompt's end that did not fit into the text encoder's tokens and are not used; usually empty.
    pub fn truncated(&self) -> &str {
        &self.0.lost
    }

    /// The number of chunks of 77 tokens: 1, or more for a prompt in a syntax that loses no words.
    pub fn chunks(&self) -> usize {
        self.0.chunks
    }

    /// The names of the embeddings that the prompt uses, in lower case.
    pub fn embeddings(&self) -> impl Iterator<Item = &str> {
        self.0.embeddings.iter().map(String::as_str)
    }

    /// True if both are the same encoding.
    pub(crate) fn is(&self, other: &Conditioning) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl std::fmt::Debug for Conditioning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Conditioning([{} numbers])", self.0.states.len() + self.0.pooled.len())
    }
}

/// SDXL's size conditioning (arXiv 2307.01952, section 2.2) of a picture of `target` pixels, as if cropped at `crop`
/// from a picture that had `original` pixels before it was resized. Sizes are width and height, and the crop is left
/// and top.
pub(super) fn time_ids(original: (usize, usize), crop: (usize, usize), target: (usize, usize)) -> [f32; 6] {
    [original.1, original.0, crop.1, crop.0, target.1, target.0].map(|pixels| pixels as f32)
}

/// `model_index.json`; null if there is none.
fn read_index(source: &Source) -> Result<serde_json::Value> {
    let file = "model_index.json";
    if !source.has(file) {
        return Ok(serde_json::Value::Null);
    }
    crate::json::parse(&source.read_text(file)?, &source.path(file))
}

/// The reason why the text encoders cannot serve the UNet, if there is one.
fn misfit(encoders: &[&ClipConfig], unet: &UNetConfig) -> Option<String> {
    let width: usize = encoders.iter().map(|encoder| encoder.layers.width).sum();
    let pooled = encoders.iter().find_map(|encoder| encoder.projection_dim);
    let tokens: Vec<usize> = encoders.iter().map(|encoder| encoder.tokens).collect();
    match &unet.text_time {
        None if encoders.len() > 1 => Some("reads no pooled prompt, as a UNet beside text_encoder_2 must".into()),
        Some(_) if encoders.len() < 2 => {
            Some("asks for SDXL's size conditioning, but the folder has no text_encoder_2".into())
        }
        Some(added) if pooled != Some(added.text_embed_dim) => Some(format!(
            "reads a pooled prompt of width {}, but the text encoders {}",
            added.text_embed_dim,
            pooled.map_or("have no projection".into(), |width| format!("project to {width}"))
        )),
        _ if width != unet.cross_attention_dim => {
            Some(format!("reads text of width {}, but the text encoders give {width}", unet.cross_attention_dim))
        }
        _ if tokens.iter().any(|&t| t != tokens[0]) => {
            Some(format!("reads two text encoders' tokens side by side, but prompts have {tokens:?} of them"))
        }
        _ => None,
    }
}
