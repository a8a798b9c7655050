//! Parts of a checkpoint from elsewhere: `--vae`, `--text-encoder`, `--text-encoder-2` and `--ema`.

use super::{model, tell};
use crate::Result;
use crate::weights::Source;
use std::path::{Path, PathBuf};

/// The flags of every command that loads a checkpoint.
#[derive(clap::Args, Clone, Default)]
#[group(skip)]
pub(super) struct Flags {
    /// VAE in place of the checkpoint's, or for one without: a diffusers folder or a file; TAESD too
    #[arg(long, value_name = "DIR|FILE")]
    vae: Option<PathBuf>,
    /// Text encoder likewise
    #[arg(long, value_name = "DIR|FILE")]
    text_encoder: Option<PathBuf>,
    /// SDXL: second text encoder likewise
    #[arg(long, value_name = "DIR|FILE")]
    text_encoder_2: Option<PathBuf>,
    /// Take the moving averages (EMA) of the UNet's weights, which some checkpoints hold beside the weights
    #[arg(long)]
    ema: bool,
}

impl Flags {
    /// The given parts, by component.
    pub(super) fn given(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let all = [("vae", &self.vae), ("text_encoder", &self.text_encoder), ("text_encoder_2", &self.text_encoder_2)];
        all.into_iter().filter_map(|(component, path)| Some((component, path.as_deref()?)))
    }

    /// True if one of the flags is given.
    pub(super) fn any(&self) -> bool {
        self.ema || self.given().next().is_some()
    }

    /// Finds a checkpoint, or downloads it, and puts in the given parts.
    pub(super) fn source(&self, model: Option<&str>) -> Result<Source> {
        let mut source = model::source(model)?;
        if self.ema {
            source = source.averaged()?;
        }
        for (component, path) in self.given() {
            source = source.with_part(component, path)?;
        }
        if let (Source::Single(file), None) = (&source, &self.vae)
            && let Some(vae) = beside(file.path())
        {
            tell(&format!("tip: {} lies beside the checkpoint; --vae takes it", vae.display()));
        }
        Ok(source)
    }
}

/// A VAE under the name by which the A1111 web UI takes it for a checkpoint's.
fn beside(checkpoint: &Path) -> Option<PathBuf> {
    let names = ["vae.safetensors", "vae.pt", "vae.ckpt"].map(|ending| checkpoint.with_extension(ending));
    names.into_iter().find(|path| path.is_file())
}
