//! The options of engines and sessions, and the memory that they take.

use crate::backend::Precision;
use crate::device::Device;
use crate::models::tokenizer::TokenizerRules;
use crate::weights::{Adapter, Embedding};
use std::path::PathBuf;
use std::sync::Arc;

/// A picture's width and height in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Size {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl Size {
    /// A size in pixels.
    pub const fn new(width: usize, height: usize) -> Self {
        Size { width, height }
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// The device of an [`crate::Engine`] and choices about its networks. A [`Device`] alone converts into it.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
#[must_use]
pub struct EngineOptions {
    /// The device on which the networks run.
    pub device: Device,
    /// Number format of the UNet's linear layers; only the CPU supports others than [`Precision::Full`].
    pub precision: Precision,
    /// The recipe by which prompts are split into tokens.
    pub tokenizer: TokenizerRules,
    /// Adapters and their weights, which are merged while the networks are loaded.
    pub adapters: Vec<(Arc<Adapter>, f32)>,
    /// Learnt words that prompts may use.
    pub embeddings: Vec<Arc<Embedding>>,
    /// Decode and encode pictures of more than so many pixels squared in strips as large, which takes less memory and
    /// several times as long. The pictures are the same up to the order of sums. `None` for the whole picture at once.
    pub vae_tile: Option<usize>,
    /// The folder or file of a small VAE for the same latents, such as TAESD, by which previews are decoded.
    pub preview_vae: Option<PathBuf>,
}

impl EngineOptions {
    /// The defaults on a device.
    pub fn new(device: Device) -> Self {
        EngineOptions { device, ..Self::default() }
    }

    /// The same with another number format.
    pub fn precision(self, precision: Precision) -> Self {
        EngineOptions { precision, ..self }
    }

    /// The same with another recipe for tokens.
    pub fn tokenizer(self, tokenizer: TokenizerRules) -> Self {
        EngineOptions { tokenizer, ..self }
    }

    /// The same with adapters and their weights, which are merged while the networks are loaded.
    /// [`crate::Engine::with_adapters`] exchanges them later.
    pub fn adapters(self, adapters: Vec<(Arc<Adapter>, f32)>) -> Self {
        EngineOptions { adapters, ..self }
    }

    /// The same with learnt words (textual inversion) that prompts may use.
    pub fn embeddings(self, embeddings: Vec<Arc<Embedding>>) -> Self {
        EngineOptions { embeddings, ..self }
    }

    /// The same with pictures of more than `pixels` squared decoded and encoded in strips of that size:
    /// [`EngineOptions::vae_tile`].
    pub fn vae_tile(self, pixels: usize) -> Self {
        EngineOptions { vae_tile: Some(pixels), ..self }
    }

    /// The same with a small VAE for previews ([`crate::RunningBatch::preview`]), from a folder or file as
    /// [`crate::Source::with_part`] takes it. Its memory is planned with that of sessions and running batches.
    pub fn preview_vae(self, path: impl Into<PathBuf>) -> Self {
        EngineOptions { preview_vae: Some(path.into()), ..self }
    }
}

impl From<Device> for EngineOptions {
    fn from(device: Device) -> Self {
        Self::new(device)
    }
}

impl From<&Device> for EngineOptions {
    fn from(device: &Device) -> Self {
        Self::new(device.clone())
    }
}

/// The shape of the requests that a [`crate::Session`] serves. [`crate::Engine::options`] gives it with the size that
/// the checkpoint was trained for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[must_use]
pub struct SessionOptions {
    /// Size of the pictures; both sides are multiples of 8.
    pub size: Size,
    /// Images per request.
    pub batch: usize,
    /// True if images may have a guidance scale above 1: classifier-free guidance (Ho and Salimans, arXiv 2207.12598)
    /// doubles the UNet's batch.
    pub guided: bool,
    /// True if images may have concepts.
    pub concepts: bool,
    /// Every how many steps the whole UNet is computed; 1 for all steps. The steps between take the activations deep in
    /// the UNet from the step before, which is faster and less exact (DeepCache, arXiv 2312.00858). If images may have
    /// concepts, they take only the down half (Faster Diffusion, arXiv 2312.09608), so that concepts act in every step.
    pub reuse: usize,
    /// The number of steps, counted in calls of the UNet, after which there is no guidance, and cross attention is no
    /// longer computed: the later steps take its outputs from the last of these, averaged over the two predictions of
    /// guidance (T-GATE, arXiv 2404.02747, without its reuse of self attention). Not together with `reuse`. Concepts
    /// act in every step.
    pub gate: Option<usize>,
    /// The length of the prompts as the UNet reads them, in chunks of 77 tokens. An image's prompts are repeated to it,
    /// so it must be a multiple of the chunks of each. The UNet's sums depend on it: [`crate::Engine::chunks`] tells
    /// the number that an image has of its own.
    pub chunks: usize,
}

impl SessionOptions {
    /// One image at a time, with guidance and without concepts.
    pub const fn new(size: Size) -> Self {
        SessionOptions { size, batch: 1, guided: true, concepts: false, reuse: 1, gate: None, chunks: 1 }
    }

    /// The same for pictures of another size.
    pub const fn size(self, size: Size) -> Self {
        SessionOptions { size, ..self }
    }

    /// The same for `batch` images at a time.
    pub const fn batch(self, batch: usize) -> Self {
        SessionOptions { batch, ..self }
    }

    /// The same with guidance or without.
    pub const fn guided(self, guided: bool) -> Self {
        SessionOptions { guided, ..self }
    }

    /// The same with concepts or without.
    pub const fn concepts(self, concepts: bool) -> Self {
        SessionOptions { concepts, ..self }
    }

    /// The same with the whole UNet in every `reuse`-th step alone.
    pub const fn reuse(self, reuse: usize) -> Self {
        SessionOptions { reuse, ..self }
    }

    /// The same with guidance and cross attention in the first `gate` steps alone.
    pub const fn gate(self, gate: Option<usize>) -> Self {
        SessionOptions { gate, ..self }
    }

    /// The same for prompts of other lengths.
    pub const fn chunks(self, chunks: usize) -> Self {
        SessionOptions { chunks, ..self }
    }
}

/// Bytes of memory of an engine with one session, known before the session allocates anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryPlan {
    /// Packed weights of all networks, shared between sessions.
    pub weights: usize,
    /// The text encoders' activations, shared between sessions.
    pub text: usize,
    /// The UNet's activations.
    pub unet: usize,
    /// The VAE decoder's activations; in strips those of one, and of the picture at low resolution.
    pub vae: usize,
    /// The activations of the VAE for previews ([`EngineOptions::preview_vae`]).
    pub preview: usize,
    /// The latents, the sampler's history and coefficients, and one picture; on the CPU these are not counted.
    pub sampler: usize,
}

impl MemoryPlan {
    /// Bytes that a session itself allocates.
    pub fn session(&self) -> usize {
        self.unet + self.vae + self.preview + self.sampler
    }

    /// All of it: the memory of a device that an engine with one session occupies while it samples.
    pub fn total(&self) -> usize {
        self.weights + self.text + self.session()
    }
}
