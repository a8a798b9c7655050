//! The encoding of prompts into inputs of the UNet: the hidden states of one text encoder in Stable Diffusion 1.x and
//! 2.x; in SDXL those of two encoders side by side, a pooled prompt and the picture's sizes.

use super::adapters::{Adaptable, Adapted};
use super::read_config;
use crate::backend::{Executor, Precision};
use crate::device::Device;
use crate::models::tokenizer::{Tokenizer, TokenizerRules};
use crate::models::{ClipConfig, UNetConfig, text_encoder};
use crate::weights::Source;
use crate::{Error, Result, Subject};
use rayon::prelude::*;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// A checkpoint's text encoders, and how their outputs become inputs of its UNet.
pub(super) struct TextEncoders {
    encoders: Vec<TextEncoder>,
    /// The output that is read as hidden states.
    states: &'static str,
    /// True if the UNet also reads a pooled prompt and the picture's sizes.
    sized: bool,
    /// True if the absence of a prompt is encoded as zeros, false if as an empty prompt.
    zeros: bool,
    /// The encoding of the absence of a prompt.
    none: OnceLock<Conditioning>,
    /// Distinguishes the encodings made by these encoders from all others.
    identity: Arc<()>,
}

struct TextEncoder {
    /// Its folder in the checkpoint.
    component: &'static str,
    tokenizer: Arc<Tokenizer>,
    config: ClipConfig,
    weights: Adaptable,
    /// Ready to run for one prompt.
    executor: Mutex<Box<dyn Executor>>,
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
        let folders = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")];
        let folders = if has("text_encoder_2") { &folders[..] } else { &folders[..1] };
        let mut configs: Vec<ClipConfig> =
            folders.iter().map(|(folder, _)| read_config(source, folder, ClipConfig::parse)).collect::<Result<_>>()?;
        let tokenizers: Vec<_> = folders
            .par_iter()
            .zip(&configs)
            .map(|((_, folder), config)| tokenizer(source, folder, config, rules))
            .collect();
        // Of several problems the first in this order is reported, whichever was found first.
        let tokenizers = tokenizers.into_iter().collect::<Result<Vec<_>>>()?;
        // As in diffusers, a prompt has the tokenizer's length, even if the encoder has more positions.
        configs.iter_mut().zip(&tokenizers).for_each(|(config, tokenizer)| config.tokens = tokenizer.length());
        if let Some(problem) = misfit(&configs, unet) {
            return Err(Error::mismatch(source.path("unet/config.json"), problem));
        }
        let load = |((folder, _), config): (&(&str, &str), &ClipConfig)| {
            let graph = text_encoder(config, 1);
            let weights = Adaptable::load(device, graph.weights(), &adapted.tensors(folder)?, Precision::Full)?;
            Ok((device.executor(device.plan(graph, &[]), weights.weights())?, weights))
        };
        let networks: Vec<_> = folders.par_iter().zip(&configs).map(load).collect();
        let networks = networks.into_iter().collect::<Result<Vec<_>>>()?;
        let sized = unet.text_time.is_some();
        Ok(TextEncoders {
            encoders: (folders.iter().zip(tokenizers).zip(configs).zip(networks))
                .map(|(((&(component, _), tokenizer), config), (executor, weights))| TextEncoder {
                    component,
                    tokenizer: Arc::new(tokenizer),
                    config,
                    weights,
                    executor: Mutex::new(executor),
                })
                .collect(),
            states: if sized { "penultimate_hidden_state" } else { "last_hidden_state" },
            sized,
            zeros: sized && index["force_zeros_for_empty_prompt"].as_bool().unwrap_or(true),
            none: OnceLock::new(),
            identity: Arc::new(()),
        })
    }

    /// The same text encoders with other adapters; `None` if these change nothing. Encodings of these encoders are not
    /// those of the others.
    ///
    /// # Errors
    /// Those of reading the files, and [`crate::ErrorKind::OutOfMemory`].
    pub fn adapt(&self, device: &Device, adapted: &Adapted) -> Result<Option<Self>> {
        let adapt = |encoder: &TextEncoder| {
            let graph = text_encoder(&encoder.config, 1);
            let tensors = adapted.tensors(encoder.component)?;
            encoder.weights.adapt(device, graph.weights(), &tensors, Precision::Full)
        };
        let weights = self.encoders.iter().map(adapt).collect::<Result<Vec<_>>>()?;
        if weights.iter().all(Option::is_none) {
            return Ok(None);
        }
        let encoder = |(encoder, weights): (&TextEncoder, Option<Adaptable>)| {
            let weights = weights.unwrap_or_else(|| encoder.weights.clone());
            let plan = device.plan(text_encoder(&encoder.config, 1), &[]);
            let executor = Mutex::new(device.executor(plan, weights.weights())?);
            let (tokenizer, config) = (encoder.tokenizer.clone(), encoder.config.clone());
            Ok(TextEncoder { component: encoder.component, tokenizer, config, weights, executor })
        };
        Ok(Some(TextEncoders {
            encoders: self.encoders.iter().zip(weights).map(encoder).collect::<Result<_>>()?,
            none: OnceLock::new(),
            identity: Arc::new(()),
            ..*self
        }))
    }

    /// True if the UNet reads the picture's sizes, as SDXL's does.
    pub fn sized(&self) -> bool {
        self.sized
    }

    /// Tokens of a prompt, padding included.
    pub fn tokens(&self) -> usize {
        self.encoders[0].config.tokens
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> usize {
        self.encoders.iter().map(|encoder| encoder.weights.bytes()).sum()
    }

    /// Bytes of the activations.
    pub fn arena_bytes(&self) -> usize {
        self.encoders.iter().map(|encoder| lock(&encoder.executor).plan().arena_bytes()).sum()
    }

    /// Encodes a prompt; `None` is the absence of a prompt, for an unconditional row.
    ///
    /// # Errors
    /// Those of the tokenizers, and the device's.
    pub fn encode(&self, prompt: Option<&str>) -> Result<Conditioning> {
        if prompt.is_none()
            && let Some(none) = self.none.get()
        {
            return Ok(none.clone());
        }
        let mut each = Vec::new();
        let mut pooled = Vec::new();
        let mut lost = String::new();
        for encoder in &self.encoders {
            let mut executor = lock(&encoder.executor);
            let truncated = encoder.run(&mut **executor, prompt.unwrap_or(""))?;
            // The tokenizers of one checkpoint almost always lose the same words.
            if lost.is_empty() {
                lost = truncated;
            }
            each.push((encoder.config.layers.width, executor.read(self.states)?));
            if self.sized && pooled.is_empty() && encoder.config.projection_dim.is_some() {
                pooled = executor.read("text_embeds")?;
            }
        }
        let mut states: Vec<f32> = (0..self.tokens())
            .flat_map(|token| each.iter().flat_map(move |(width, x)| &x[token * width..][..*width]))
            .copied()
            .collect();
        if self.zeros && prompt.is_none() {
            states.fill(0.0);
            pooled.fill(0.0);
        }
        let encoding = Encoding { states, pooled, lost, encoders: self.identity.clone() };
        let conditioning = Conditioning(Arc::new(encoding));
        Ok(match prompt {
            None => self.none.get_or_init(|| conditioning).clone(),
            Some(_) => conditioning,
        })
    }

    /// True if these encoders made the encoding.
    pub fn made(&self, conditioning: &Conditioning) -> bool {
        Arc::ptr_eq(&conditioning.0.encoders, &self.identity)
    }

    /// The UNet's inputs for these rows: those of [`super::UNET_CONSTANTS`] that it reads, `[rows, ...]`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] for a prompt that another checkpoint has encoded.
    pub fn inputs(&self, rows: &[Row]) -> Result<UNetInputs> {
        if !rows.iter().all(|(row, _)| self.made(row)) {
            let problem = "a prompt was encoded by another engine, whose states this UNet cannot read";
            return Err(Error::mismatch(Subject::Field("prompt"), problem).advise("encode it by the session's engine"));
        }
        let all = |part: fn(&Encoding) -> &Vec<f32>| rows.iter().flat_map(|(row, _)| part(&row.0)).copied().collect();
        let mut inputs: UNetInputs = vec![("encoder_hidden_states", all(|encoding| &encoding.states))];
        if self.sized {
            inputs.push(("text_embeds", all(|encoding| &encoding.pooled)));
            inputs.push(("time_ids", rows.iter().flat_map(|(_, ids)| *ids).collect()));
        }
        Ok(inputs)
    }
}

/// Locks an executor, also after a panic of another thread: every run writes all inputs anew.
fn lock(executor: &Mutex<Box<dyn Executor>>) -> MutexGuard<'_, Box<dyn Executor>> {
    executor.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl TextEncoder {
    /// Encodes a prompt. Returns the words at its end that did not fit.
    fn run(&self, executor: &mut dyn Executor, prompt: &str) -> Result<String> {
        let encoded = self.tokenizer.encode(prompt)?;
        let mut ids = vec![0.0; self.config.tokens];
        encoded.fill(&mut ids);
        executor.write("input_ids", &ids)?;
        if self.config.projection_dim.is_some() {
            executor.write("pooled_index", &[self.config.pooled_index(&encoded.ids) as f32])?;
        }
        executor.step()?;
        Ok(encoded.lost)
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
    /// Hidden states, `[tokens, width]`, those of several encoders side by side.
    states: Vec<f32>,
    /// The pooled prompt, `[width]`; empty if the UNet reads none.
    pooled: Vec<f32>,
    lost: String,
    /// [`TextEncoders::identity`] of those that made it.
    encoders: Arc<()>,
}

impl Conditioning {
    /// The words at the prompt's end that did not fit into the text encoder's tokens and are not used; usually empty.
    pub fn truncated(&self) -> &str {
        &self.0.lost
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
fn misfit(encoders: &[ClipConfig], unet: &UNetConfig) -> Option<String> {
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

fn tokenizer(source: &Source, folder: &str, config: &ClipConfig, rules: TokenizerRules) -> Result<Tokenizer> {
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
    Ok(tokenizer)
}
