//! The flags that choose adapters, and their description.

use super::prompts::Item;
use super::say;
use crate::concept::name_and_weight;
use crate::image::UsedAdapter;
use crate::models::prompt::{LoraTag, PromptSyntax};
use crate::pipeline::{open_adapter, take_tags};
use crate::weights::{Adapter, AdapterInfo};
use crate::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The choice of adapters.
#[derive(clap::Args)]
// Groups need different names, and that of the flags for concepts would be the same.
#[group(skip)]
pub(super) struct Flags {
    /// Change the model by this adapter: a file with a LoRA, LoCon, LoHa, LoKr or DoRA, or with --lora-folder its name;
    /// the weight is 1 unless given; repeat for several
    #[arg(long = "lora", value_name = "FILE[:WEIGHT]")]
    adapters: Vec<String>,
    /// Folder in which adapters are found by name, those in folders inside of it included; prompts in A1111's syntax
    /// may name them, as <lora:name:0.8>
    #[arg(long, value_name = "FOLDER")]
    lora_folder: Option<PathBuf>,
}

impl Flags {
    /// True if any adapter is asked for.
    pub(super) fn any(&self) -> bool {
        !self.adapters.is_empty()
    }

    /// Opens the adapters.
    pub(super) fn load(&self) -> Result<Vec<(Arc<Adapter>, f32)>> {
        let load = |text: &String| {
            let (file, weight) = file_and_weight(text)?;
            Ok((self.open(file)?, weight.unwrap_or(1.0)))
        };
        self.adapters.iter().map(load).collect()
    }

    /// Takes tags such as `<lora:name:0.8>` out of prompts in A1111's syntax, and opens their adapters from the folder
    /// of adapters. Without a folder the tags stay, and are refused when the prompts are read.
    pub(super) fn take_tags(&self, prompts: &mut [Item], syntax: PromptSyntax) -> Result<Vec<(Arc<Adapter>, f32)>> {
        if syntax != PromptSyntax::A1111 || self.lora_folder.is_none() {
            return Ok(Vec::new());
        }
        let mut of_all: Option<Vec<LoraTag>> = None;
        for item in prompts {
            let (text, tags) = take_tags(&item.prompt, syntax)?;
            item.prompt = text;
            if of_all.get_or_insert_with(|| tags.clone()) != &tags {
                let problem = "prompts ask for different LoRAs, but a run has one model for all of them";
                return Err(Error::invalid("prompts", problem).advise("give prompts with different tags one run each"));
            }
        }
        let open = |tag: LoraTag| Ok((self.open(&tag.name)?, tag.weight));
        of_all.unwrap_or_default().into_iter().map(open).collect()
    }

    /// Opens an adapter's file, or if there is none of this name, that of this name in the folder of adapters.
    pub(super) fn open(&self, name: &str) -> Result<Arc<Adapter>> {
        open_adapter(self.lora_folder.as_deref(), name)
    }
}

/// Opens the adapters that a picture records, and checks that their files are the same.
pub(super) fn recorded(used: &[UsedAdapter]) -> Result<Vec<(Arc<Adapter>, f32)>> {
    let load = |used: &UsedAdapter| {
        let path = Path::new(&used.file);
        let adapter = Adapter::load(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                Error::not_found(path, "the adapter that the picture was made with is not here").advise("put it there")
            }
            _ => error,
        })?;
        if adapter.sha256() != used.sha256 {
            let problem = format!("holds another adapter than the picture's `{}`", used.name);
            return Err(Error::mismatch(path, problem).advise("put the picture's adapter there"));
        }
        Ok((Arc::new(adapter), used.weight))
    };
    used.iter().map(load).collect()
}

/// Parses `FILE` or `FILE:WEIGHT`. A colon that no number follows belongs to the name, as in `C:\loras\a.safetensors`,
/// if the part before it is no file.
fn file_and_weight(text: &str) -> Result<(&str, Option<f32>)> {
    let is_file = |name: &str| Path::new(name).exists();
    let is_name = |text: &str| match text.rsplit_once(':') {
        Some((file, end)) => {
            is_file(text) || (end.parse::<f32>().is_err() && end.contains(['/', '\\', '.']) && !is_file(file))
        }
        None => true,
    };
    name_and_weight(text, is_name).map_err(|error| error.of_field("adapters"))
}

/// Prints what an adapter's file holds.
pub(super) fn show(file: &Path, json: bool) -> Result<()> {
    let info = Adapter::load(file)?.info();
    if json {
        let text = serde_json::to_value(&info).map_err(|problem| Error::internal(problem.to_string()))?;
        say(&format!("{text:#}"));
        return Ok(());
    }
    let AdapterInfo { name, sha256, hash, kinds, networks, ranks, scales, text_width, metadata, .. } = info;
    let row = |name: &str, value: String| say(&format!("{name:11}{value}"));
    row("adapter", name);
    let counted = |counts: std::collections::BTreeMap<String, usize>| {
        let each = counts.iter().filter(|(name, _)| !name.is_empty()).map(|(name, count)| format!("{count} {name}"));
        each.collect::<Vec<_>>().join(", ")
    };
    row("layers", counted(kinds));
    row("networks", counted(networks));
    let range = |(least, most): (String, String)| if least == most { least } else { format!("{least} to {most}") };
    if let Some((least, most)) = ranks {
        row("rank", range((least.to_string(), most.to_string())));
        row("scale", range((scales.0.to_string(), scales.1.to_string())));
    }
    if let Some(width) = text_width {
        let model = match width {
            768 => " (Stable Diffusion 1.x)",
            1024 => " (Stable Diffusion 2.x)",
            2048 => " (SDXL)",
            _ => "",
        };
        row("made for", format!("a UNet that reads text of width {width}{model}"));
    }
    for (key, title) in
        [("ss_base_model_version", "base"), ("ss_sd_model_name", "trained on"), ("modelspec.title", "title")]
    {
        if let Some(value) = metadata.get(key).filter(|value| !value.is_empty()) {
            row(title, value.clone());
        }
    }
    row("hash", hash);
    row("SHA-256", sha256);
    Ok(())
}
