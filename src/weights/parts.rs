//! Checkpoints some of whose parts are from elsewhere.

use super::single::Family;
use super::{SingleFile, Source, Tensors, inside};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A checkpoint with other parts in place of some of its own, or of those that it lacks.
#[derive(Debug)]
pub struct Composed {
    base: Source,
    /// By component.
    parts: BTreeMap<&'static str, Part>,
}

/// A component of another checkpoint, or a component alone.
#[derive(Clone, Debug)]
struct Part {
    source: Source,
    /// The component's folder in the source; empty if the source is the component's folder.
    place: &'static str,
    path: PathBuf,
}

/// The origin of a tokenizer.
pub(super) enum Vocabulary<'a> {
    /// That of another source.
    Of(&'a Source),
    /// CLIP's, with this padding token.
    Clip(&'static str),
}

impl Source {
    /// The same checkpoint with `component`, which is `vae`, `text_encoder` or `text_encoder_2`, from elsewhere: from a
    /// diffusers folder of a component or of a whole checkpoint, or from a file in the original layout or in that of
    /// diffusers, of safetensors or of `torch.save`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] or [`crate::ErrorKind::Unsupported`] if there is no such component; those of
    /// [`Source::open`].
    pub fn with_part(self, component: &'static str, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let has = |file: &str| path.join(file).is_file();
        let part = |source, place| Part { source, place, path: path.to_path_buf() };
        let part = if !path.is_dir() {
            part(Source::Single(Arc::new(SingleFile::part(path, component, self.family()?)?)), component)
        } else if has(&format!("{component}/config.json")) {
            part(Source::Folder(path.to_path_buf()), component)
        } else if has("config.json") {
            part(Source::Folder(path.to_path_buf()), "")
        } else {
            let problem = format!("holds no {component}: neither config.json nor {component}/config.json is there");
            return Err(Error::not_found(path, problem).advise("give a folder that save_pretrained wrote, or a file"));
        };
        Ok(self.with(component, part))
    }

    /// The same checkpoint with the moving averages (EMA) of its UNet in place of the UNet: of a single file those that
    /// latent diffusion's trainer saved in it, of a folder those in `unet_ema`, as diffusers' scripts save them.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if there are none.
    pub fn averaged(self) -> Result<Self> {
        match &self {
            Source::Single(file) => {
                let file = SingleFile::open(file.path(), true)?;
                Ok(Source::Single(Arc::new(file)))
            }
            Source::Folder(path) if path.join("unet_ema/config.json").is_file() => {
                let part = Part { source: self.clone(), place: "unet_ema", path: path.join("unet_ema") };
                Ok(self.with("unet", part))
            }
            _ => Err(Error::unsupported(
                self.path("unet"),
                "there are no moving averages of the UNet's weights beside it",
            )
            .advise("use its plain weights")),
        }
    }

    /// True if the UNet's weights are moving averages ([`Source::averaged`]).
    pub fn is_averaged(&self) -> bool {
        match self {
            Source::Single(file) => file.is_averaged(),
            Source::Composed(composed) => composed.parts.contains_key("unet") || composed.base.is_averaged(),
            _ => false,
        }
    }

    /// The components that are from elsewhere, and where from.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let parts = match self {
            Source::Composed(composed) => Some(composed.parts.iter().map(|(name, part)| (*name, part.path.as_path()))),
            _ => None,
        };
        parts.into_iter().flatten().filter(|(component, _)| *component != "unet")
    }

    /// [`Source::name`] with what tells the checkpoint from the plain one of this name: for records of measurements.
    pub fn title(&self) -> String {
        let averages = self.is_averaged().then(|| "averages".to_string());
        let parts = self.parts().map(|(component, path)| format!("{component} {}", path.display()));
        let all: Vec<String> = averages.into_iter().chain(parts).collect();
        if all.is_empty() { self.name() } else { format!("{} ({})", self.name(), all.join(", ")) }
    }

    fn with(self, component: &'static str, part: Part) -> Self {
        let (base, mut parts) = match self {
            Source::Composed(composed) => (composed.base.clone(), composed.parts.clone()),
            base => (base, BTreeMap::new()),
        };
        parts.insert(component, part);
        Source::Composed(Arc::new(Composed { base, parts }))
    }

    /// The family of the checkpoint's UNet.
    pub(super) fn family(&self) -> Result<Family> {
        let file = "unet/config.json";
        Ok(Family::configured(&crate::json::parse(&self.read_text(file)?, &self.path(file))?))
    }
}

impl Composed {
    pub(super) fn base(&self) -> &Source {
        &self.base
    }

    /// The source of a file, and the file's path there.
    pub(super) fn file(&self, relative: &str) -> (&Source, String) {
        let (component, name) = relative.split_once('/').unwrap_or(("", relative));
        match self.parts.get(component) {
            Some(part) => (&part.source, inside(part.place, name)),
            None => (&self.base, relative.into()),
        }
    }

    /// The origin of a tokenizer: beside another text encoder, or else the checkpoint's own, or if it has none CLIP's.
    pub(super) fn tokenizer(&self, component: &str) -> Result<Vocabulary<'_>> {
        let encoder = component.replace("tokenizer", "text_encoder");
        let beside = self.parts.get(encoder.as_str()).filter(|part| !part.place.is_empty());
        let mut sources = beside.map(|part| &part.source).into_iter().chain([&self.base]);
        Ok(match sources.find(|source| has_tokenizer(source, component)) {
            Some(source) => Vocabulary::Of(source),
            // OpenCLIP pads with token 0.
            None if component == "tokenizer_2" || self.base.family()? == Family::Sd2 => Vocabulary::Clip("!"),
            None => Vocabulary::Clip("<|endoftext|>"),
        })
    }

    pub(super) fn tensors(&self, component: &str) -> Result<Tensors> {
        match self.parts.get(component) {
            Some(Part { source: Source::Single(file), .. }) => file.tensors(component),
            Some(part) => Tensors::open(&part.source, part.place, component),
            None => self.base.tensors(component),
        }
    }
}

fn has_tokenizer(source: &Source, component: &str) -> bool {
    match source {
        // The vocabulary of a file is assumed and not read, so that a folder's is preferred.
        Source::Single(file) => file.padding(component).is_some(),
        Source::Random(..) => true,
        _ => ["vocab.json", "tokenizer.json"].iter().any(|name| source.has(&format!("{component}/{name}"))),
    }
}
