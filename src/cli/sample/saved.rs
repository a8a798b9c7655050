//! The pictures of a run that are written, and their manifest.

use super::plan::Planned;
use crate::cli::out::{self, Pictures};
use crate::cli::prompts::Item;
use crate::cli::say;
use crate::cli::sign::Signing;
use crate::concept::{Assignment, Used};
use crate::image::{GenerationInfo, UsedEmbedding};
use crate::pipeline::Hashes;
use crate::{Error, Picture, Result};
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

/// The manifest's file beside pictures of these names.
pub(super) fn manifest_path(pictures: &[PathBuf]) -> Option<PathBuf> {
    pictures.first().map(|file| file.with_extension("json"))
}

/// The pictures written so far.
pub(super) struct Saved<'a> {
    pub(super) files: &'a Pictures,
    pub(super) signing: &'a Signing,
    pub(super) plan: &'a [Planned<'a>],
    pub(super) assignment: &'a Assignment,
    /// True if a manifest is kept.
    pub(super) audited: bool,
    /// True if the name of each file is printed to stdout once the file is written.
    pub(super) named: bool,
    pub(super) manifest: Vec<serde_json::Value>,
    /// The time at which the first picture was written.
    pub(super) first: Option<Instant>,
    /// The thread that hashes the weights, until the first picture needs its result.
    pub(super) hashing: Option<std::thread::JoinHandle<Result<Hashes>>>,
    pub(super) guidance: &'a dyn Fn(&Item) -> f32,
    /// Images of each item.
    pub(super) each: usize,
    pub(super) negative: Option<&'a str>,
    /// The embeddings of each item's prompts.
    pub(super) embeddings: Vec<Vec<UsedEmbedding>>,
    /// The values that all pictures share.
    pub(super) info: GenerationInfo,
}

impl Saved<'_> {
    /// Writes the pictures of the next batch, and then the manifest of all pictures so far.
    pub(super) fn add(&mut self, pictures: &[Picture]) -> Result<()> {
        if let Some(hashing) = self.hashing.take() {
            let hashes = hashing.join().map_err(|_| Error::internal("the thread that hashes the weights ended"))?;
            let Hashes { sha256, fingerprint, parts } = hashes?;
            self.info = GenerationInfo {
                model_sha256: sha256,
                model_fingerprint: Some(fingerprint),
                parts,
                ..self.info.clone()
            };
        }
        for picture in pictures {
            let i = self.manifest.len();
            let Planned { item, seed } = &self.plan[i];
            let info = GenerationInfo {
                prompt: item.prompt.clone(),
                negative_prompt: item.negative_prompt.as_deref().or(self.negative).map(str::to_string),
                prompt_2: item.prompt_2.clone().or_else(|| self.info.prompt_2.clone()),
                negative_prompt_2: item.negative_prompt_2.clone().or_else(|| self.info.negative_prompt_2.clone()),
                embeddings: self.embeddings[i / self.each].clone(),
                guidance: (self.guidance)(item),
                seed: *seed,
                concepts: self.assignment[i].iter().map(Used::record).collect(),
                ..self.info.clone()
            };
            let file = match self.files {
                Pictures::Stdout => {
                    out::print(picture, &info, self.signing)?;
                    None
                }
                Pictures::Files(files) => {
                    out::save(picture, &files[i], &info, self.signing)?;
                    if self.named {
                        say(&files[i].display().to_string());
                    }
                    files[i].file_name().map(|name| name.to_string_lossy().into_owned())
                }
            };
            self.first.get_or_insert_with(Instant::now);
            self.manifest.push(json!({"file": file, "info": info}));
        }
        if let Some(path) = self.manifest_path() {
            let text = serde_json::to_string_pretty(&self.manifest).unwrap_or_default() + "\n";
            crate::files::write(&path, text.as_bytes())?;
        }
        Ok(())
    }

    /// The manifest's file, if one is kept.
    pub(super) fn manifest_path(&self) -> Option<PathBuf> {
        match self.files {
            Pictures::Files(files) if self.audited => manifest_path(files),
            _ => None,
        }
    }
}
