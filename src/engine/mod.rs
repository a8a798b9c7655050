//! The public interface: an [`Engine`] is a loaded checkpoint, a [`Session`] its plans for one size and batch.

mod adapters;
mod encoder;
mod init_image;
mod options;
mod outline;
mod preview;
mod request;
mod rows;
mod running;
mod session;
mod text;

pub use adapters::Adapted;
#[cfg(feature = "cli")]
pub(crate) use encoder::TextModel;
pub(crate) use encoder::{Reading, Texts};
pub use init_image::{EncodedPicture, InitImage, Original};
pub use options::{EngineOptions, MemoryPlan, SessionOptions, Size};
pub(crate) use outline::Outline;
pub use request::{Image, Output, Progress, Prompt, PromptText, Request, Start};
pub use running::{Event, ImageId, RunningBatch};
pub use session::Session;
#[cfg(feature = "pipeline")]
pub(crate) use session::encoded;
pub use text::Conditioning;
pub(crate) use text::UNetInputs;

use crate::backend::{self, Denoiser, Precision, UNetBatch, Weights};
use crate::device::Device;
use crate::diffusion::scheduler::{Sampler, SamplerChoice, Schedule, SchedulerConfig};
use crate::graph::{Divisible, Extent, Graph, Shape};
use crate::models::chunks::MAX_CHUNKS;
use crate::models::{
    MASK_AND_IMAGE, UNetConfig, UNetInput, divisible_decoder, guidance_embedding, unet, unet_with_gate,
    unet_with_reuse, vae_decoder,
};
use crate::plan::Plan;
use crate::weights::{Adapter, Source, Tensors};
use crate::{Error, Result};
use adapters::Adaptable;
use init_image::PictureEncoder;
use preview::{PreviewVae, Projection};
use std::sync::{Arc, OnceLock};
use text::{TextEncoders, time_ids};

/// Inputs of a UNet that stay the same over the steps of an image. Nodes that depend on them alone run once per image.
pub const UNET_CONSTANTS: &[&str] =
    &["encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond", MASK_AND_IMAGE];

/// Largest width and height.
const MAX_SIZE: usize = 8192;
/// Smallest side of a tile of the VAE. Of a smaller one nearly all work would be its halo.
const MIN_TILE: usize = 64;
/// Largest batch.
const MAX_BATCH: usize = 256;

/// A checkpoint of Stable Diffusion 1.x, 2.x or SDXL, its weights packed and ready. Cloning shares them.
#[derive(Clone)]
pub struct Engine(Arc<Parts>);

#[derive(Clone)]
struct Parts {
    outline: Outline,
    device: Device,
    precision: Precision,
    text: Arc<TextEncoders>,
    unet: Adaptable,
    vae: Weights,
    vae_tile: Option<usize>,
    /// The adapters of the moment.
    adapters: Vec<(Arc<Adapter>, f32)>,
    encoder: Arc<PictureEncoder>,
    /// Made for the first preview.
    projection: Arc<OnceLock<Projection>>,
    /// Decodes previews in place of the projection.
    preview: Option<Arc<PreviewVae>>,
}

/// The plans of a session's UNet and VAE.
struct Plans {
    unet: Vec<(UNetBatch, Plan)>,
    vae: backend::Parts<Plan>,
    /// That of the VAE for previews, if the engine has one.
    preview: Option<Plan>,
}

/// The number of chunks to which a prompt and a negative prompt of so many chunks are both repeated.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] if it is too large.
pub(crate) fn common_chunks(prompt: usize, negative: usize) -> Result<usize> {
    let common = (1..=MAX_CHUNKS).find(|all| all.is_multiple_of(prompt) && all.is_multiple_of(negative));
    common.ok_or_else(|| {
        let problem = format!("takes {prompt} chunks, and the negative prompt {negative}");
        Error::invalid("prompt", problem).advise("make both equally long, or shorten them")
    })
}

/// # Errors
/// [`crate::ErrorKind::Invalid`] for tiles of the VAE that are too small to be of use.
fn check_tile(pixels: Option<usize>) -> Result<()> {
    match pixels {
        Some(pixels) if !(MIN_TILE..=MAX_SIZE).contains(&pixels) => {
            let problem = format!("tiles of {pixels} pixels are not possible");
            Err(Error::invalid("vae_tile", problem).advise(format!("give {MIN_TILE} to {MAX_SIZE}; 512 is usual")))
        }
        _ => Ok(()),
    }
}

/// Reads and checks a component's config.json with `parse`.
pub(crate) fn read_config<C>(
    source: &Source,
    component: &str,
    parse: impl Fn(&str, &std::path::Path) -> Result<C>,
) -> Result<C> {
    let file = format!("{component}/config.json");
    parse(&source.read_text(&file)?, &source.path(&file))
}

impl Engine {
    /// Loads a checkpoint onto a device. A [`Device`] alone serves as options.
    ///
    /// # Errors
    /// About the first file that is missing, damaged, not supported, or does not belong to the others;
    /// [`crate::ErrorKind::OutOfMemory`] when the weights do not fit the device's memory; [`crate::ErrorKind::Invalid`]
    /// for a precision that the device does not have; for adapters those of [`Engine::with_adapters`].
    pub fn open(source: &Source, options: impl Into<EngineOptions>) -> Result<Self> {
        let EngineOptions { device, precision, tokenizer, adapters, embeddings, preview_vae, vae_tile } =
            options.into();
        check_tile(vae_tile)?;
        crate::memory::start_threads()?;
        let outline = Outline::read(source)?;
        let adapted = Adapted::new(source, &adapters)?;
        let load_unet = || {
            let graph = unet(&outline.unet, UNetInput::default());
            Adaptable::load(&device, graph.weights(), &adapted.tensors("unet")?, precision)
        };
        let load_vae = || {
            let graph = vae_decoder(&outline.vae, 1, Extent::square(8));
            device.weights(graph.weights(), &source.tensors("vae")?, &[], Precision::Full)
        };
        let (text, (unet_weights, vae_weights)) = rayon::join(
            || TextEncoders::open(source, &adapted, &device, &outline.unet, tokenizer, &embeddings),
            || rayon::join(load_unet, load_vae),
        );
        // Of several problems the first in this order is reported, whichever was found first.
        let text = Arc::new(text?);
        let (unet, vae) = (unet_weights?, vae_weights?);
        let (encoder, projection) = (Arc::default(), Arc::default());
        let preview = preview_vae.map(|path| PreviewVae::open(&outline, &path, &device)).transpose()?.map(Arc::new);
        let parts =
            Parts { outline, device, precision, text, unet, vae, vae_tile, encoder, adapters, projection, preview };
        Ok(Engine(Arc::new(parts)))
    }

    /// The same checkpoint with these adapters at their weights, in place of those that it has now. Only weights that
    /// change are read and packed anew, all others are shared. Without adapters it is the checkpoint as it is in its
    /// files, to the last bit. [`crate::Session::switch`] lets a session go over to it.
    ///
    /// The weights that were loaded first stay in memory as long as any of these engines.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a weight that is not finite, or with which the model's weights leave the range
    /// of numbers; [`crate::ErrorKind::Mismatch`] for an adapter of another model, with the modules that do not fit;
    /// [`crate::ErrorKind::OutOfMemory`], and those of reading the files.
    pub fn with_adapters(&self, adapters: &[(Arc<Adapter>, f32)]) -> Result<Self> {
        let Parts { outline, device, precision, text, unet: weights, .. } = &*self.0;
        let adapted = Adapted::new(&outline.source, adapters)?;
        let text = text.adapt(&adapted)?.map_or_else(|| text.clone(), Arc::new);
        let graph = unet(&outline.unet, UNetInput::default());
        let unet = weights.adapt(device, graph.weights(), &adapted.tensors("unet")?, *precision)?;
        let unet = unet.unwrap_or_else(|| weights.clone());
        Ok(Engine(Arc::new(Parts { text, unet, adapters: adapters.to_vec(), ..Parts::clone(&self.0) })))
    }

    /// The adapters, and their weights.
    pub fn adapters(&self) -> &[(Arc<Adapter>, f32)] {
        &self.0.adapters
    }

    /// The same checkpoint with another [`EngineOptions::vae_tile`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for tiles that are too small to be of use.
    #[cfg(feature = "cli")]
    pub(crate) fn with_vae_tile(&self, pixels: Option<usize>) -> Result<Self> {
        check_tile(pixels)?;
        Ok(Engine(Arc::new(Parts { vae_tile: pixels, ..Parts::clone(&self.0) })))
    }

    /// The configuration.
    #[cfg(feature = "pipeline")]
    pub(crate) fn outline(&self) -> &Outline {
        &self.0.outline
    }

    /// The checkpoint's name.
    pub fn name(&self) -> String {
        self.0.outline.name()
    }

    /// Identifies the UNet, whatever its file format and precision: a SHA-256 of the names and shapes of its tensors,
    /// and of the short ones (biases, norms) rounded to fp16.
    ///
    /// # Errors
    /// Those of reading the weights.
    pub fn fingerprint(&self) -> Result<String> {
        self.0.outline.fingerprint()
    }

    /// SHA-256 of the file or files that hold the UNet's weights, in hexadecimal. For a single file, its first ten
    /// digits are A1111's model hash. `None` if the weights are random. It reads the whole files, which takes a second
    /// or two per 2 GB.
    ///
    /// # Errors
    /// Those of opening the files.
    pub fn sha256(&self) -> Result<Option<String>> {
        Ok(self.0.outline.source.tensors("unet")?.sha256())
    }

    /// The checkpoint.
    pub fn source(&self) -> &Source {
        self.0.outline.source()
    }

    /// Shape of one image's bottleneck.
    pub fn bottleneck(&self, options: SessionOptions) -> Shape {
        self.0.outline.bottleneck(options)
    }

    /// The device that it runs on.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The UNet and its weights, for training.
    pub(crate) fn unet(&self) -> Result<(&UNetConfig, Tensors, &Weights)> {
        let Parts { outline, adapters, unet, .. } = &*self.0;
        Ok((&outline.unet, Adapted::new(&outline.source, adapters)?.tensors("unet")?, unet.weights()))
    }

    /// Encodes a prompt once for any number of images, sizes and sessions of this engine.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a prompt that its syntax or the tokenizer refuses, and for a clip skip or a
    /// second prompt that this checkpoint does not have; [`crate::ErrorKind::Unsupported`] for what a syntax can say
    /// and this crate cannot do, [`crate::ErrorKind::DeviceLost`].
    pub fn encode(&self, prompt: impl Into<PromptText>) -> Result<Conditioning> {
        self.0.text.encode(&prompt.into())
    }

    /// The number of chunks ([`SessionOptions::chunks`]) for which a session must be planned to make this image: the
    /// least common multiple of the chunks of its prompt and, if the sampler guides it, of its negative prompt.
    /// Pictures are equal to the last bit if they are made with this number, whatever else is in their batches.
    ///
    /// # Errors
    /// Those of [`Engine::encode`], and [`crate::ErrorKind::Invalid`] if there is no such number up to 64.
    pub fn chunks(&self, image: &Image, sampler: Sampler) -> Result<usize> {
        let [prompt, negative] = self.pair(image, sampler)?.map(|prompt| prompt.chunks());
        common_chunks(prompt, negative)
    }

    /// The text encoders without their weights.
    #[cfg(feature = "pipeline")]
    pub(crate) fn texts(&self) -> Texts {
        self.0.text.texts()
    }

    /// An image's prompt and negative prompt. Where the latter has no effect, the prompt takes its place, so that it
    /// does not matter how long it is.
    fn pair(&self, image: &Image, sampler: Sampler) -> Result<[Conditioning; 2]> {
        let scale = image.guidance.unwrap_or(sampler.default_guidance(self.default_guidance()));
        self.0.text.pair(image, sampler.guides(scale) && !self.reads_guidance())
    }

    /// True if this engine made an encoding, and so can read it.
    #[cfg(feature = "pipeline")]
    pub(crate) fn has_encoded(&self, conditioning: &Conditioning) -> bool {
        self.0.text.made(conditioning)
    }

    /// The UNet's inputs for prompts and a picture size, with `rows` rows per prompt. `None` is the absence of a
    /// prompt, as in [`Image::negative`].
    ///
    /// # Errors
    /// Those of [`Engine::encode`].
    pub(crate) fn inputs(&self, prompts: &[Option<&str>], rows: usize, size: Size) -> Result<UNetInputs> {
        let encode = |prompt: &Option<&str>| match prompt {
            Some(text) => self.encode(*text),
            None => self.0.text.nothing(1),
        };
        let encoded = prompts.iter().map(encode).collect::<Result<Vec<_>>>()?;
        let size = (size.width, size.height);
        let row = |row: Conditioning| (row, time_ids(size, (0, 0), size));
        let rows: Vec<_> = encoded.into_iter().flat_map(|e| std::iter::repeat_n(row(e), rows)).collect();
        self.0.text.inputs(&rows, 1)
    }

    /// True if the UNet reads the guidance scale as an input, as latent consistency models do. Then it is called once
    /// for an image at any scale, and negative prompts have no effect.
    pub fn reads_guidance(&self) -> bool {
        self.0.outline.reads_guidance()
    }

    /// The UNet's input for rows of these guidance scales, if it reads them.
    fn guidance_input(&self, rows: impl Iterator<Item = f32>) -> Option<(&'static str, Vec<f32>)> {
        let width = self.0.outline.unet.time_cond_proj_dim?;
        Some(("timestep_cond", rows.flat_map(|guidance| guidance_embedding(guidance, width)).collect()))
    }

    /// True if a session with these options has unconditional rows.
    fn has_negatives(&self, options: SessionOptions) -> bool {
        options.guided && !self.reads_guidance()
    }

    /// Checks that the UNet has a bottleneck to which concepts can be added.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`].
    pub(crate) fn check_concepts(&self) -> Result<()> {
        self.0.outline.check_concepts()
    }

    /// Tokens of a chunk of a prompt, padding included.
    pub(crate) fn tokens(&self) -> usize {
        self.0.text.tokens()
    }

    /// The same checkpoint with another scheduler configuration.
    pub fn with_scheduler(&self, scheduler: SchedulerConfig) -> Self {
        let outline = Outline { scheduler, ..self.0.outline.clone() };
        Engine(Arc::new(Parts { outline, ..Parts::clone(&self.0) }))
    }

    /// The schedule of a sampler: its UNet calls, with the coefficients of each step.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a choice or a number of steps that the sampler does not support,
    /// [`crate::ErrorKind::Unsupported`] and [`crate::ErrorKind::Damaged`] for a config that it cannot honour.
    pub fn schedule(&self, choice: SamplerChoice, steps: usize) -> Result<Schedule> {
        self.0.outline.schedule(choice, steps)
    }

    /// True if the checkpoint is SDXL or made from it.
    pub fn is_sdxl(&self) -> bool {
        self.0.text.sized()
    }

    /// The size for which the checkpoint was trained.
    pub fn default_size(&self) -> Size {
        self.0.outline.default_size()
    }

    /// Options of a session for one picture of [`Engine::default_size`].
    pub fn options(&self) -> SessionOptions {
        SessionOptions::new(self.default_size())
    }

    /// Shape of a session's latents in files, `[batch, channels, height, width]`.
    pub fn latent_shape(&self, options: SessionOptions) -> [usize; 4] {
        self.0.outline.latent_shape(options)
    }

    /// The guidance scale that is diffusers' default for such a checkpoint: 7.5, for SDXL 5, and 8.5 if the UNet reads
    /// it. For CFG++ see [`crate::Sampler::default_guidance`].
    pub fn default_guidance(&self) -> f32 {
        self.0.outline.default_guidance()
    }

    /// The memory plan of a session, without making the session.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for sizes that are not possible.
    pub fn memory(&self, options: SessionOptions) -> Result<MemoryPlan> {
        Ok(self.memory_of(&self.plans(options, &[options.batch])?))
    }

    fn memory_of(&self, plans: &Plans) -> MemoryPlan {
        let parts = &*self.0;
        let unet = plans.unet.iter().map(|(_, unet)| unet.arena_bytes()).max();
        let own = |(batch, unet): &(UNetBatch, _)| parts.device.denoiser_bytes(unet, batch.images, Some(&plans.vae));
        let sampler = plans.unet.iter().map(own).max();
        let preview_weights = parts.preview.as_ref().map_or(0, |vae| vae.weights.bytes());
        MemoryPlan {
            weights: parts.text.weight_bytes() + parts.unet.bytes() + parts.vae.bytes() + preview_weights,
            text: parts.text.arena_bytes(),
            unet: unet.unwrap_or(0),
            vae: plans.vae.arena_bytes(),
            preview: plans.preview.as_ref().map_or(0, Plan::arena_bytes),
            sampler: sampler.unwrap_or(0),
        }
    }

    /// The plans for batches of these sizes. A session with guidance has one for all rows and one for steps in which no
    /// image is guided: rows are the same to the last bit in both.
    fn plans(&self, options: SessionOptions, batches: &[usize]) -> Result<Plans> {
        let Parts { device, outline, .. } = &*self.0;
        let [_, _, h, w] = self.latent_shape(options);
        // This checks the sizes.
        let guided = if self.has_negatives(options) { &[true, false][..] } else { &[false] };
        let batch = |&images| guided.iter().map(move |&guided| UNetBatch { images, guided });
        let unet = |batch| Ok((batch, self.unet_plan(options, batch)?));
        let unet = batches.iter().flat_map(batch).map(unet).collect::<Result<_>>()?;
        let vae = self.vae_parts(&divisible_decoder(&outline.vae, w), Extent { h, w });
        let preview = |preview: &Arc<PreviewVae>| device.plan(vae_decoder(&preview.config, 1, Extent { h, w }), &[]);
        Ok(Plans { unet, vae, preview: self.0.preview.as_ref().map(preview) })
    }

    /// Plans the VAE's decoder or encoder, for latents of a size.
    fn vae_parts(&self, network: &Divisible<impl Fn(usize) -> Graph>, latents: Extent) -> backend::Parts<Plan> {
        let Parts { device, outline, vae_tile, .. } = &*self.0;
        let Extent { h, w } = latents;
        let scale = outline.vae.scale();
        let strip = vae_tile.map_or(h, |tile| (tile * tile / (scale * scale * w)).max(1));
        backend::Parts::new(network, h, strip, |graph| device.plan(graph, &[]))
    }

    fn unet_plan(&self, options: SessionOptions, batch: UNetBatch) -> Result<Plan> {
        self.0.outline.check_size(options.batch(batch.images))?;
        let SessionOptions { size: Size { width, height }, concepts, reuse, gate, chunks, .. } = options;
        if concepts {
            self.check_concepts()?;
        }
        let scale = self.0.outline.vae.scale();
        let UNetBatch { images, guided } = batch;
        let rows = if guided { 2 * images } else { images };
        let shifted = if concepts { images } else { 0 };
        let Parts { device, text, outline, .. } = &*self.0;
        let tokens = text.tokens() * chunks;
        let input = UNetInput { rows, h: height / scale, w: width / scale, tokens, shifted };
        let graph = match gate {
            Some(_) => unet_with_gate(&outline.unet, input, guided),
            None if reuse > 1 => unet_with_reuse(&outline.unet, input),
            None => unet(&outline.unet, input),
        };
        Ok(device.plan(graph, UNET_CONSTANTS))
    }

    /// The batch of a session that makes all its images at once.
    fn whole_batch(&self, options: SessionOptions) -> UNetBatch {
        UNetBatch { images: options.batch, guided: self.has_negatives(options) }
    }

    /// Plans and allocates the UNet with its sampler alone, for steps of all rows.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for sizes that are not possible, [`crate::ErrorKind::OutOfMemory`] when memory is
    /// short.
    pub(crate) fn denoiser(&self, options: SessionOptions) -> Result<Box<dyn Denoiser>> {
        let Parts { device, unet, .. } = &*self.0;
        let batch = self.whole_batch(options);
        device.denoiser(vec![(batch, self.unet_plan(options, batch)?)], unet.weights(), None)
    }

    /// Memory of [`Engine::denoiser`] beside the weights.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for sizes that are not possible.
    pub(crate) fn denoiser_bytes(&self, options: SessionOptions) -> Result<usize> {
        let unet = self.unet_plan(options, self.whole_batch(options))?;
        Ok(unet.arena_bytes() + self.0.device.denoiser_bytes(&unet, options.batch, None))
    }

    /// Plans and allocates everything for one size and batch.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for sizes that are not possible, [`crate::ErrorKind::OutOfMemory`] for those that
    /// do not fit into the device's free memory.
    pub fn session(&self, options: SessionOptions) -> Result<Session> {
        Session::new(self.clone(), options, self.affordable(options, &[options.batch])?)
    }

    /// Plans and allocates a batch of up to [`SessionOptions::batch`] images that join and leave between steps.
    ///
    /// # Errors
    /// Those of [`Engine::session`].
    pub fn running_batch(&self, options: SessionOptions) -> Result<RunningBatch> {
        self.0.outline.check_size(options)?;
        // The images of a running batch are at different steps, and a picture must not depend on its neighbours.
        let problem = "steps of images that join and leave cannot reuse activations";
        if options.reuse > 1 {
            return Err(Error::invalid("reuse", problem).advise("give 1, or make a session"));
        }
        if options.gate.is_some() {
            return Err(Error::invalid("gate", problem).advise("leave it out, or make a session"));
        }
        let mut batches: Vec<usize> = (0..).map(|i| 1 << i).take_while(|&batch| batch < options.batch).collect();
        batches.push(options.batch);
        RunningBatch::new(self.clone(), options, self.affordable(options, &batches)?)
    }

    /// Checks that a session is possible, and fits into the device's free memory.
    ///
    /// # Errors
    /// Those of [`Engine::session`].
    #[cfg(feature = "cli")]
    pub(crate) fn check_affordable(&self, options: SessionOptions) -> Result<()> {
        self.affordable(options, &[options.batch]).map(drop)
    }

    /// Plans that fit into the device's free memory.
    fn affordable(&self, options: SessionOptions, batches: &[usize]) -> Result<Plans> {
        let plans = self.plans(options, batches)?;
        let SessionOptions { size, batch, .. } = options;
        let affordable = self.afford(self.memory_of(&plans).session(), &format!("{size} in a batch of {batch}"));
        affordable.map_err(|error| self.advise_tiles(error))?;
        Ok(plans)
    }

    /// Bytes of the device's memory that have been taken since it was opened, by the driver's count; not known on the
    /// CPU.
    pub fn used_memory(&self) -> Option<usize> {
        self.0.device.used_bytes()
    }

    /// Free memory of the device, if that is known.
    pub(crate) fn free_memory(&self) -> Option<usize> {
        self.0.device.free_bytes()
    }

    /// Checks that `needed` bytes are free for `what`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] if they are not.
    pub(crate) fn afford(&self, needed: usize, what: &str) -> Result<()> {
        let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
        match self.free_memory() {
            Some(free) if needed > free => Err(Error::out_of_memory(format!(
                "only {:.1} GiB of memory are free, but {:.1} GiB are needed for {what}",
                gib(free),
                gib(needed)
            ))
            .advise("make a smaller picture or batch")),
            _ => Ok(()),
        }
    }

    /// The same lack of memory, with the advice to save what the VAE takes, unless that is saved already.
    fn advise_tiles(&self, error: Error) -> Error {
        match self.0.vae_tile {
            Some(_) => error,
            None => error.advise("make a smaller picture or batch, or set `vae_tile`, such as to 512"),
        }
    }
}
