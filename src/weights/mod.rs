//! Checkpoints: the places of their files, and the tensors in them.

mod adapter;
#[cfg(test)]
pub(crate) mod cases;
mod convert;
mod embedding;
mod foreign;
#[cfg(feature = "download")]
pub mod hub;
mod parts;
pub(crate) mod pickle;
mod single;
mod stored;
mod tensors;

pub use adapter::{Adapter, AdapterInfo, Edition};
pub(crate) use adapter::{Network, adapted, stem};
pub use embedding::Embedding;
pub use parts::Composed;
use parts::Vocabulary;
pub use single::SingleFile;
pub use stored::{Format, Number, Stored};
pub use tensors::Tensors;

use crate::models::tokenizer::{Tokenizer, clip_files};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A diffusers checkpoint, on disk or compiled in, or a source that can be read like one.
#[derive(Clone, Debug)]
pub enum Source {
    /// A folder as `save_pretrained` writes it.
    Folder(PathBuf),
    /// One file in the original layout.
    Single(Arc<SingleFile>),
    /// A checkpoint with parts from elsewhere.
    Composed(Arc<Composed>),
    /// Compiled-in files by relative path.
    Embedded(&'static [(&'static str, &'static [u8])]),
    /// A name, and configurations by relative path. The weights are random, and the vocabulary is CLIP's. For
    /// benchmarks.
    Random(&'static str, &'static [(&'static str, &'static [u8])]),
}

impl Source {
    /// The demo checkpoint.
    #[cfg(feature = "demo")]
    pub fn demo() -> Self {
        Source::Embedded(&respodiff_demo::MODEL)
    }

    /// The demo's CLIP, a `CLIPModel`'s folder.
    #[cfg(feature = "demo")]
    pub fn demo_clip() -> Self {
        Source::Embedded(&respodiff_demo::CLIP)
    }

    /// A folder that holds a `model_index.json` or at least one component.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] if it does not look like a checkpoint.
    pub fn folder(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let parts =
            ["config.json", "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"];
        if parts.iter().any(|part| path.join(part).is_file()) {
            return Ok(Source::Folder(path.to_path_buf()));
        }
        Err(Error::not_found(
            path,
            "not a diffusers checkpoint: neither model_index.json nor unet/, vae/ or text_encoder/ with a config.json",
        )
        .advise("give the folder that save_pretrained wrote"))
    }

    /// A single file in the original layout of Stable Diffusion 1.x, 2.x or SDXL, of safetensors or of `torch.save`.
    /// Its UNet suffices if the other parts come from elsewhere ([`Source::with_part`]).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if it is anything else, [`crate::ErrorKind::Damaged`] if it is not whole,
    /// [`crate::ErrorKind::Io`] if it cannot be opened.
    pub fn file(path: impl AsRef<Path>) -> Result<Self> {
        SingleFile::open(path.as_ref(), false).map(|file| Source::Single(Arc::new(file)))
    }

    /// A checkpoint on disk: a folder or a single file.
    ///
    /// # Errors
    /// Those of [`Source::folder`] and [`Source::file`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() { Self::folder(path) } else { Self::file(path) }
    }

    /// The checkpoint that a text names: a folder or file that exists, otherwise a Hugging Face model id, which is
    /// taken from the cache or downloaded. `config` is asked for an id alone; `progress` is called after every piece of
    /// a download.
    ///
    /// # Errors
    /// Those of [`Source::open`] and [`hub::resolve`].
    #[cfg(feature = "download")]
    pub fn find(
        model: &str,
        config: &dyn Fn() -> Result<hub::HubConfig>,
        progress: &mut dyn FnMut(hub::Downloaded),
    ) -> Result<Self> {
        let path = Path::new(model);
        if path.exists() || [".safetensors", ".ckpt", ".pt", ".pth", ".bin"].iter().any(|end| model.ends_with(end)) {
            return Self::open(path);
        }
        Self::folder(hub::resolve(model, &config()?, progress)?)
    }

    /// True if the file exists.
    pub fn has(&self, relative: &str) -> bool {
        match self {
            Source::Folder(folder) => folder.join(relative).is_file(),
            Source::Single(file) => file.has(relative),
            Source::Composed(composed) => {
                let (source, file) = composed.file(relative);
                source.has(&file)
            }
            Source::Embedded(files) | Source::Random(_, files) => files.iter().any(|(name, _)| *name == relative),
        }
    }

    /// The file's path, for messages.
    pub fn path(&self, relative: &str) -> PathBuf {
        match self {
            Source::Folder(folder) => folder.join(relative),
            Source::Single(file) => file.path().to_path_buf(),
            Source::Composed(composed) => {
                let (source, file) = composed.file(relative);
                source.path(&file)
            }
            Source::Embedded(_) => Path::new("<demo>").join(relative),
            Source::Random(name, _) => Path::new(&format!("<{name}>")).join(relative),
        }
    }

    /// A short name for the checkpoint.
    pub fn name(&self) -> String {
        match self {
            Source::Folder(folder) => {
                let folder = folder.canonicalize().unwrap_or_else(|_| folder.clone());
                let names: Vec<_> = folder.iter().rev().take(3).map(|name| name.to_string_lossy()).collect();
                match &names[..] {
                    // `models--OWNER--NAME/snapshots/COMMIT` is Hugging Face's cache: the model is called by its id.
                    [_, snapshots, model] if snapshots == "snapshots" && model.starts_with("models--") => {
                        model["models--".len()..].replace("--", "/")
                    }
                    [name, ..] => name.to_string(),
                    [] => "checkpoint".into(),
                }
            }
            Source::Single(file) => {
                file.path().file_stem().map_or_else(|| "checkpoint".into(), |n| n.to_string_lossy().into_owned())
            }
            Source::Composed(composed) => composed.base().name(),
            Source::Embedded(_) => "respodiff-demo".into(),
            Source::Random(name, _) => (*name).into(),
        }
    }

    /// A file's bytes.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] if there is none, [`crate::ErrorKind::Io`] if it cannot be read.
    pub fn read(&self, relative: &str) -> Result<Vec<u8>> {
        let path = self.path(relative);
        match self {
            Source::Folder(_) => std::fs::read(&path).map_err(Error::io("read", &path)),
            Source::Single(file) => file.read(relative),
            Source::Composed(composed) => {
                let (source, file) = composed.file(relative);
                source.read(&file)
            }
            Source::Embedded(files) | Source::Random(_, files) => {
                let file = files.iter().find(|(name, _)| *name == relative);
                file.map(|(_, bytes)| bytes.to_vec()).ok_or_else(|| Error::not_found(path, "not compiled in"))
            }
        }
    }

    /// A text file.
    ///
    /// # Errors
    /// As for [`Source::read`], and [`crate::ErrorKind::Damaged`] if it is not UTF-8.
    pub fn read_text(&self, relative: &str) -> Result<String> {
        String::from_utf8(self.read(relative)?)
            .map_err(|_| Error::damaged(self.path(relative), "not UTF-8 text").advise("download the file again"))
    }

    /// The tokenizer in a component's folder, or for "" the one at the top of the checkpoint.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] if there is none, [`crate::ErrorKind::Damaged`] if a file is malformed.
    pub fn tokenizer(&self, component: &str) -> Result<Tokenizer> {
        match self {
            Source::Folder(folder) => Tokenizer::load(&folder.join(component)),
            Source::Single(file) => file.tokenizer(component),
            Source::Composed(composed) => match composed.tokenizer(component)? {
                Vocabulary::Of(source) => source.tokenizer(component),
                Vocabulary::Clip(padding) => Tokenizer::clip(padding),
            },
            Source::Random(..) => Tokenizer::clip("<|endoftext|>"),
            Source::Embedded(_) => {
                let read = |name: &str| self.read(&inside(component, name));
                Tokenizer::from_bytes(
                    &read("vocab.json")?,
                    &read("merges.txt")?,
                    Some(&read("tokenizer_config.json")?),
                    Some(&read("special_tokens_map.json")?),
                )
            }
        }
    }

    /// The files of a tokenizer's folder, by name.
    ///
    /// # Errors
    /// As for [`Source::read`].
    fn tokenizer_files(&self, component: &str) -> Result<Vec<(&'static str, Vec<u8>)>> {
        const FILES: [&str; 6] = [
            "vocab.json",
            "merges.txt",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ];
        match self {
            Source::Single(file) => Ok(clip_files(file.padding(component).unwrap_or("<|endoftext|>"))),
            Source::Random(..) => Ok(clip_files("<|endoftext|>")),
            Source::Composed(composed) => match composed.tokenizer(component)? {
                Vocabulary::Of(source) => source.tokenizer_files(component),
                Vocabulary::Clip(padding) => Ok(clip_files(padding)),
            },
            Source::Folder(_) | Source::Embedded(_) => {
                let there = FILES.into_iter().filter(|name| self.has(&inside(component, name)));
                there.map(|name| Ok((name, self.read(&inside(component, name))?))).collect()
            }
        }
    }

    /// The weights of a component, "" for a model without components.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if there are none, or their files are damaged.
    pub fn tensors(&self, component: &str) -> Result<Tensors> {
        match self {
            Source::Single(file) => file.tensors(component),
            Source::Composed(composed) => composed.tensors(component),
            Source::Random(..) => Ok(Tensors::random()),
            _ => Tensors::open(self, component, component),
        }
    }
}

/// The path of a component's file; in a model without components it is at the top.
fn inside(component: &str, name: &str) -> String {
    if component.is_empty() { name.to_string() } else { format!("{component}/{name}") }
}
