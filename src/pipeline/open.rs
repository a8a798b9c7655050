//! Opening a checkpoint by a name and JSON, as programs in other languages do.

use super::Pipeline;
use super::open_embeddings;
use super::plan::refused;
use crate::backend::Precision;
use crate::device::Place;
use crate::engine::EngineOptions;
use crate::models::tokenizer::TokenizerRules;
use crate::weights::hub::HubConfig;
use crate::weights::{Adapter, Source};
use crate::{Error, Result};
use respodiff_fields::Fields;
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;

/// Pictures that are made at once by default.
const MAX_BATCH: usize = 8;

/// `a.safetensors`, or `{"file": "a.safetensors", "weight": 0.8}`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Lora {
    File(PathBuf),
    Weighted { file: PathBuf, weight: Option<f32> },
}

impl Lora {
    fn load(self) -> Result<(Arc<Adapter>, f32)> {
        let (file, weight) = match self {
            Lora::File(file) => (file, None),
            Lora::Weighted { file, weight } => (file, weight),
        };
        let weight = weight.unwrap_or(1.0);
        if !weight.is_finite() {
            return Err(Error::invalid("loras", format!("the weight {weight} is not finite")).advise("give a number"));
        }
        Ok((Arc::new(Adapter::load(file)?), weight))
    }
}

impl Pipeline {
    /// Opens the checkpoint that a text names: `demo`, or what [`Source::find`] takes. `options` is a JSON object whose
    /// fields are all optional: `device` (`auto`, `cpu`, `cuda`, `cuda:1`), `precision` (`full`, `bf16`, `int8`),
    /// `tokenizer` (`fast`, `slow`), `vae`, `text_encoder` and `text_encoder_2` (parts from elsewhere), `ema` (the
    /// moving averages of the UNet's weights), `loras` (adapters: files, or objects of `file` and `weight`),
    /// `lora_folder` (a folder in which requests find adapters by name), `embeddings` (learnt words: files, or folders
    /// of them), `vae_tile` ([`EngineOptions::vae_tile`]) and `max_batch` (8).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] about a field, and those of [`Source::find`], [`Source::with_part`],
    /// [`Source::averaged`], [`Adapter::load`] and [`Pipeline::open`].
    pub fn find(model: &str, options: &[u8], hub: &dyn Fn() -> Result<HubConfig>) -> Result<Self> {
        let mut fields = Fields::parse(options).map_err(refused)?;
        let mut text = |name: &'static str| fields.take::<String>(name, "a text").map_err(refused);
        let (device, precision, tokenizer) = (text("device")?, text("precision")?, text("tokenizer")?);
        let parts = [
            ("vae", text("vae")?),
            ("text_encoder", text("text_encoder")?),
            ("text_encoder_2", text("text_encoder_2")?),
        ];
        let averaged: Option<bool> = fields.take("ema", "true or false").map_err(refused)?;
        let loras: Option<Vec<Lora>> =
            fields.take("loras", "a list of files, or of {file, weight}").map_err(refused)?;
        let lora_folder: Option<PathBuf> = fields.take("lora_folder", "a folder").map_err(refused)?;
        let embeddings: Option<Vec<PathBuf>> =
            fields.take("embeddings", "a list of files and folders").map_err(refused)?;
        let vae_tile: Option<usize> = fields.take("vae_tile", "a whole number").map_err(refused)?;
        let max_batch: Option<usize> = fields.take("max_batch", "a whole number").map_err(refused)?;
        fields.finish().map_err(refused)?;
        let device: Place = device.as_deref().map_or(Ok(Place::Auto), str::parse)?;
        let precision: Precision = precision.as_deref().map_or(Ok(Precision::Full), str::parse)?;
        let tokenizer: TokenizerRules = tokenizer.as_deref().map_or(Ok(TokenizerRules::Fast), str::parse)?;
        let adapters = loras.into_iter().flatten().map(Lora::load).collect::<Result<Vec<_>>>()?;
        let mut source = match model {
            #[cfg(feature = "demo")]
            "demo" => Source::demo(),
            model => Source::find(model, hub, &mut |_| {})?,
        };
        if averaged == Some(true) {
            source = source.averaged()?;
        }
        for (component, path) in parts {
            if let Some(path) = path {
                source = source.with_part(component, path)?;
            }
        }
        let embeddings = open_embeddings(&embeddings.unwrap_or_default())?;
        let options = EngineOptions::new(device.device()?).precision(precision).tokenizer(tokenizer);
        let options = EngineOptions { vae_tile, ..options.adapters(adapters).embeddings(embeddings) };
        Ok(Self::open(&source, options, max_batch.unwrap_or(MAX_BATCH))?.lora_folder(lora_folder))
    }
}
