//! The selection of the files of a model that make up a checkpoint, in the cache and on the server.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::{Error, Result, Subject};

/// A file of safetensors, or a file of `torch.save`.
const DIFFUSERS: [(&str, &str); 2] = [("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin")];
/// The same by transformers.
const TRANSFORMERS: [(&str, &str); 2] = [("model", "safetensors"), ("pytorch_model", "bin")];
/// Folders with weights, and the names and endings of the weight files in them, the preferred one first.
const WEIGHTS: [(&str, [(&str, &str); 2]); 4] =
    [("unet", DIFFUSERS), ("vae", DIFFUSERS), ("text_encoder", TRANSFORMERS), ("text_encoder_2", TRANSFORMERS)];
/// Folders with configuration only.
const CONFIGS: [&str; 3] = ["scheduler", "tokenizer", "tokenizer_2"];
/// Variants of the weights, the preferred one first: half precision is half the download.
const VARIANTS: [&str; 3] = [".fp16", "", ".bf16"];

/// The name of a component's weight files without what numbers the shards, the ending, and the variant.
type Kind = (&'static str, &'static str, &'static str);

/// All kinds of a component's weight files, the preferred one first.
fn kinds(files: [(&'static str, &'static str); 2]) -> impl Iterator<Item = Kind> {
    files.into_iter().flat_map(|(stem, ending)| VARIANTS.map(|variant| (stem, ending, variant)))
}

/// True if a snapshot has weights and configurations for each of our components that its `model_index.json` names.
/// Other tools leave snapshots that hold a few files or other formats only, or whose download was interrupted.
pub(super) fn is_complete(snapshot: &Path) -> bool {
    let index = fs::read(snapshot.join("model_index.json")).ok();
    let index: Option<serde_json::Value> = index.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let Some(index) = index else { return false };
    let named = |folder: &str| index[folder][0].is_string();
    let there = |file: String| snapshot.join(file).exists();
    let small =
        WEIGHTS.iter().filter(|(folder, _)| named(folder)).all(|(folder, _)| there(format!("{folder}/config.json")))
            && (!named("scheduler") || there("scheduler/scheduler_config.json".into()))
            && ["tokenizer", "tokenizer_2"].iter().filter(|folder| named(folder)).all(|folder| {
                there(format!("{folder}/tokenizer.json"))
                    || (there(format!("{folder}/vocab.json")) && there(format!("{folder}/merges.txt")))
            });
    small
        && WEIGHTS.iter().filter(|(folder, _)| index[folder][0].is_string()).all(|(folder, files)| {
            let entries = fs::read_dir(snapshot.join(folder)).into_iter().flatten().flatten();
            // `exists` follows links, so a link to a blob that is gone does not count.
            let names: Vec<String> =
                entries.filter(|e| e.path().exists()).filter_map(|e| e.file_name().into_string().ok()).collect();
            kinds(*files).any(|kind| has_weights(names.iter().map(String::as_str), kind))
        })
}

/// True if all shards of the weights are among the names.
fn has_weights<'a>(names: impl Iterator<Item = &'a str>, kind: Kind) -> bool {
    let shards: BTreeSet<(usize, usize)> = names.filter_map(|name| shard(name, kind)).collect();
    shards.iter().any(|&(_, count)| shards.iter().filter(|shard| shard.1 == count).count() == count)
}

/// The shard's number and the number of shards, from the name of a weight file: `model.safetensors` is 1 of 1. The
/// variant stands before the shard's number, or after it in files of diffusers before 0.28.
fn shard(name: &str, (stem, ending, variant): Kind) -> Option<(usize, usize)> {
    let middle = name.strip_prefix(stem)?.strip_suffix(ending)?.strip_suffix('.')?;
    let middle = middle.strip_prefix(variant).or_else(|| middle.strip_suffix(variant))?;
    if middle.is_empty() {
        return Some((1, 1));
    }
    let (index, count) = middle.strip_prefix('-')?.split_once("-of-")?;
    Some((index.parse().ok()?, count.parse().ok()?))
}

#[derive(Deserialize)]
pub(super) struct Listing {
    pub(super) sha: String,
    pub(super) siblings: Vec<RemoteFile>,
}

#[derive(Deserialize)]
pub(super) struct RemoteFile {
    #[serde(rename = "rfilename")]
    pub(super) path: String,
    pub(super) size: u64,
    #[serde(rename = "blobId")]
    blob_id: String,
    pub(super) lfs: Option<Lfs>,
}

#[derive(Deserialize)]
pub(super) struct Lfs {
    pub(super) sha256: String,
}

impl RemoteFile {
    /// The file's name in `blobs/`, which the server sends as its ETag.
    pub(super) fn etag(&self) -> &str {
        self.lfs.as_ref().map_or(&self.blob_id, |lfs| &lfs.sha256)
    }

    /// True for files of weights of this kind, and for configurations.
    fn is_wanted(&self, kind: Option<Kind>) -> bool {
        let Some((folder, name)) = self.path.split_once('/') else { return self.path == "model_index.json" };
        // A name that would leave the folder, here or on Windows, is not plain.
        if !is_plain(name) {
            return false;
        }
        let is_config = name == "merges.txt"
            || name.starts_with("tokenizer")
            || (name.ends_with(".json") && !name.contains(".index."));
        match kind {
            Some(kind) => {
                let (stem, ending, variant) = kind;
                is_config || shard(name, kind).is_some() || *name == format!("{stem}.{ending}.index{variant}.json")
            }
            None => CONFIGS.contains(&folder) && is_config,
        }
    }
}

/// The files of a listing that make up a checkpoint: those that diffusers would load, without the safety checker and
/// other formats.
pub(super) fn select(listing: Listing, name: &str) -> Result<Vec<RemoteFile>> {
    let refuse = |problem: &str| {
        Err(Error::unsupported(Subject::Model(name.to_string()), problem.to_string())
            .advise("give another model, or a local folder or file"))
    };
    let names = |folder: &str| {
        let prefix = format!("{folder}/");
        let paths = listing.siblings.iter().filter_map(move |file| file.path.strip_prefix(&prefix));
        paths.collect::<Vec<_>>()
    };
    if !listing.siblings.iter().any(|file| file.path == "model_index.json") {
        return refuse("is not a diffusers model: it has no model_index.json");
    }
    if names("unet").is_empty() {
        return refuse("is not a Stable Diffusion model: it has no unet folder");
    }
    // Each component is taken in the first variant that it has, as in diffusers' `from_pretrained(variant="fp16")`.
    let mut chosen = BTreeMap::new();
    for (folder, files) in WEIGHTS {
        let names = names(folder);
        if names.is_empty() {
            continue;
        }
        match kinds(files).find(|kind| has_weights(names.iter().copied(), *kind)) {
            Some(kind) => chosen.insert(folder, kind),
            None => return refuse("holds its weights neither as safetensors nor as torch.save writes them"),
        };
    }
    let kind = |file: &RemoteFile| file.path.split_once('/').and_then(|(folder, _)| chosen.get(folder).copied());
    let wanted = |file: &RemoteFile| file.is_wanted(kind(file));
    let files: Vec<RemoteFile> = listing.siblings.into_iter().filter(wanted).collect();
    if files.iter().any(|file| !is_hex(file.etag(), if file.lfs.is_some() { 64 } else { 40 })) {
        return refuse("is listed with malformed checksums");
    }
    Ok(files)
}

/// True if `part` is safe as one component of a path in the cache and of a URL.
pub(super) fn is_plain(part: &str) -> bool {
    !part.is_empty()
        && !part.starts_with(['.', '-'])
        && !part.ends_with(['.', '-'])
        && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

pub(super) fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
