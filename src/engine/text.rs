//! From prompts to what the UNet reads of them: one text encoder's states in Stable Diffusion 1.x and 2.x, in SDXL those of
//! two side by side, with a pooled prompt and the picture's sizes.

use super::{Network, read_config};
use crate::device::{Device, Executor};
use crate::models::tokenizer::{Encoded, Tokenizer};
use crate::models::{ClipConfig, UNetConfig, text_encoder};
use crate::plan::Plan;
use crate::weights::Source;
use crate::{Error, Result};
use rayon::prelude::*;

/// A checkpoint's text encoders, and how their outputs become inputs of its UNet.
pub(super) struct TextEncoders {
    encoders: Vec<TextEncoder>,
    /// The output that is read as hidden states.
    states: &'static str,
    /// Whether the UNet also reads a pooled prompt and the picture's sizes.
    sized: bool,
    /// Whether no prompt at all is zeros, and not an empty prompt.
    zeros: bool,
}

struct TextEncoder {
    tokenizer: Tokenizer,
    network: Network<ClipConfig>,
}

impl TextEncoders {
    /// Loads the text encoders of a checkpoint with this UNet.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] or [`Error::Io`] about what is missing, damaged or does not fit together.
    pub fn open(source: &Source, device: &Device, unet: &UNetConfig) -> Result<Self> {
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
        let configs: Vec<ClipConfig> =
            folders.iter().map(|(folder, _)| read_config(source, folder, ClipConfig::parse)).collect::<Result<_>>()?;
        if let Some(problem) = misfit(&configs, unet) {
            return Err(Error::mismatch(source.path("unet/config.json"), problem));
        }
        let both = || folders.par_iter().zip(&configs);
        let tokenizer = |((_, folder), config): (&(&str, &str), &ClipConfig)| tokenizer(source, folder, config);
        let load = |((folder, _), config): (&(&str, &str), &ClipConfig)| {
            device.weights(text_encoder(config, 1).weights(), &source.tensors(folder)?)
        };
        let (tokenizers, weights): (Vec<_>, Vec<_>) =
            rayon::join(|| both().map(tokenizer).collect(), || both().map(load).collect());
        // In this order, whichever of several problems was found first.
        let tokenizers = tokenizers.into_iter().collect::<Result<Vec<_>>>()?;
        let weights = weights.into_iter().collect::<Result<Vec<_>>>()?;
        let networks = configs.into_iter().zip(weights).map(|(config, weights)| Network { config, weights });
        let encoders = tokenizers.into_iter().zip(networks);
        let sized = unet.text_time.is_some();
        Ok(TextEncoders {
            encoders: encoders.map(|(tokenizer, network)| TextEncoder { tokenizer, network }).collect(),
            states: if sized { "penultimate_hidden_state" } else { "last_hidden_state" },
            sized,
            zeros: sized && index["force_zeros_for_empty_prompt"].as_bool().unwrap_or(true),
        })
    }

    /// Whether the UNet reads the picture's sizes, as SDXL's does.
    pub fn sized(&self) -> bool {
        self.sized
    }

    /// Tokens of a prompt, padding included.
    pub fn tokens(&self) -> usize {
        self.encoders[0].network.config.max_position_embeddings
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> usize {
        self.encoders.iter().map(|encoder| encoder.network.weights.bytes()).sum()
    }

    /// A prompt for each tokenizer.
    pub fn tokenize(&self, prompt: &str) -> Result<Vec<Encoded>> {
        self.encoders.iter().map(|encoder| encoder.tokenizer.encode(prompt)).collect()
    }

    /// A plan of each encoder, for so many prompts.
    pub fn plans(&self, device: &Device, prompts: usize) -> Vec<Plan> {
        let plan = |encoder: &TextEncoder| device.plan(text_encoder(&encoder.network.config, prompts), &[]);
        self.encoders.iter().map(plan).collect()
    }

    /// Readies [`TextEncoders::plans`] to run.
    pub fn executors(&self, device: &Device, plans: Vec<Plan>) -> Result<Vec<Executor>> {
        let executor = |(plan, encoder): (Plan, &TextEncoder)| device.executor(plan, &encoder.network.weights);
        plans.into_iter().zip(&self.encoders).map(executor).collect()
    }

    /// Runs [`TextEncoders::executors`] for as many prompts; `None` is no prompt, the unconditional row. `time_ids` is what
    /// [`time_ids`] makes of the picture's sizes.
    pub fn condition(
        &self,
        executors: &mut [Executor],
        prompts: &[Option<&str>],
        time_ids: [f32; 6],
    ) -> Result<Conditioning> {
        let mut states = Vec::new();
        let mut pooled = None;
        for (encoder, executor) in self.encoders.iter().zip(executors) {
            encoder.run(executor, prompts)?;
            states.push((encoder.network.config.layers.width, executor.read(self.states)?));
            if self.sized && pooled.is_none() && encoder.network.config.projection_dim.is_some() {
                pooled = Some(executor.read("text_embeds")?);
            }
        }
        let tokens = 0..prompts.len() * self.tokens();
        let states = tokens.flat_map(|t| states.iter().flat_map(move |(width, x)| &x[t * width..][..*width])).copied();
        let mut inputs = vec![("encoder_hidden_states", states.collect::<Vec<_>>())];
        inputs.extend(pooled.map(|pooled| ("text_embeds", pooled)));
        if self.zeros {
            for (_, values) in &mut inputs {
                let one = values.len() / prompts.len();
                let rows = values.chunks_exact_mut(one).zip(prompts);
                rows.filter(|(_, prompt)| prompt.is_none()).for_each(|(row, _)| row.fill(0.0));
            }
        }
        if self.sized {
            inputs.push(("time_ids", time_ids.repeat(prompts.len())));
        }
        Ok(Conditioning { rows: prompts.len(), inputs })
    }
}

impl TextEncoder {
    fn run(&self, executor: &mut Executor, prompts: &[Option<&str>]) -> Result<()> {
        let config = &self.network.config;
        let mut ids = vec![0.0; prompts.len() * config.max_position_embeddings];
        let mut indices = Vec::new();
        for (prompt, row) in prompts.iter().zip(ids.chunks_exact_mut(config.max_position_embeddings)) {
            let encoded = self.tokenizer.encode(prompt.unwrap_or(""))?;
            encoded.fill(row);
            indices.push(config.pooled_index(&encoded.ids) as f32);
        }
        executor.write("input_ids", &ids)?;
        if config.projection_dim.is_some() {
            executor.write("pooled_index", &indices)?;
        }
        executor.step()
    }
}

/// What conditions rows of a UNet beside latents and timestep: each of [`super::UNET_CONSTANTS`] that it reads, `[rows, ...]`.
#[derive(Clone)]
pub(crate) struct Conditioning {
    rows: usize,
    inputs: Vec<(&'static str, Vec<f32>)>,
}

impl Conditioning {
    /// These rows, in this order, each of them `times` times.
    pub fn pick(&self, rows: &[usize], times: usize) -> Self {
        let picked = |values: &Vec<f32>| {
            let one = values.len() / self.rows;
            rows.iter().flat_map(|row| values[row * one..][..one].repeat(times)).collect()
        };
        let inputs = self.inputs.iter().map(|(name, values)| (*name, picked(values))).collect();
        Conditioning { rows: rows.len() * times, inputs }
    }

    /// The inputs by name.
    pub fn inputs(&self) -> Vec<(&str, &[f32])> {
        self.inputs.iter().map(|(name, values)| (*name, values.as_slice())).collect()
    }
}

/// SDXL's size conditioning (arXiv 2307.01952, section 2.2) of a picture of `target` pixels, as if cut at `crop` from one that
/// was of `original` pixels before it was resized; all are width and height, or left and top.
pub(super) fn time_ids(original: (usize, usize), crop: (usize, usize), target: (usize, usize)) -> [f32; 6] {
    [original.1, original.0, crop.1, crop.0, target.1, target.0].map(|pixels| pixels as f32)
}

/// `model_index.json`; null where there is none.
fn read_index(source: &Source) -> Result<serde_json::Value> {
    let file = "model_index.json";
    if !source.has(file) {
        return Ok(serde_json::Value::Null);
    }
    serde_json::from_str(&source.read_text(file)?).map_err(|e| {
        Error::damaged(source.path(file), format!("not valid JSON: {e}")).advise("download the file again")
    })
}

/// What keeps the text encoders from serving the UNet.
fn misfit(encoders: &[ClipConfig], unet: &UNetConfig) -> Option<String> {
    let width: usize = encoders.iter().map(|encoder| encoder.layers.width).sum();
    let pooled = encoders.iter().find_map(|encoder| encoder.projection_dim);
    let tokens: Vec<usize> = encoders.iter().map(|encoder| encoder.max_position_embeddings).collect();
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

fn tokenizer(source: &Source, folder: &str, config: &ClipConfig) -> Result<Tokenizer> {
    let tokenizer = source.tokenizer(folder)?;
    if tokenizer.vocab_size() > config.vocab_size || tokenizer.length() > config.max_position_embeddings {
        let problem = format!(
            "{} tokens in prompts of {} do not fit the text encoder, which knows {} in prompts of {}",
            tokenizer.vocab_size(),
            tokenizer.length(),
            config.vocab_size,
            config.max_position_embeddings
        );
        return Err(Error::mismatch(source.path(folder), problem));
    }
    Ok(tokenizer)
}
