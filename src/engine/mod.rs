//! The public interface: an [`Engine`] is a loaded checkpoint, a [`Session`] its plans for one size and batch.

mod options;
mod request;
mod rows;
mod running;
mod session;
mod text;

pub use options::{EngineOptions, MemoryPlan, SessionOptions, Size};
pub use request::{Image, Output, Progress, Prompt, Request, Start};
pub use running::{Event, ImageId, RunningBatch};
pub use session::Session;
pub use text::Conditioning;
pub(crate) use text::UNetInputs;

use crate::backend::{Denoiser, Precision, Weights};
use crate::device::Device;
use crate::diffusion::scheduler::{SamplerChoice, Schedule, SchedulerConfig};
use crate::graph::{Extent, Graph, Shape};
use crate::models::{
    MidBlock, UNetConfig, UNetInput, VaeConfig, guidance_embedding, unet, unet_with_reuse, vae_decoder,
};
use crate::plan::Plan;
use crate::weights::{Source, Tensors};
use crate::{Error, Result};
use std::sync::Arc;
use text::{TextEncoders, time_ids};

/// Inputs of a UNet that stay the same over the steps of an image. Nodes that depend on them alone run once per image.
pub const UNET_CONSTANTS: &[&str] = &["encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond"];

/// Largest width and height.
const MAX_SIZE: usize = 8192;
/// Largest batch.
const MAX_BATCH: usize = 256;

/// A checkpoint of Stable Diffusion 1.x, 2.x or SDXL, its weights packed and ready. Cloning shares them.
#[derive(Clone)]
pub struct Engine(Arc<Parts>);

#[derive(Clone)]
struct Parts {
    source: Source,
    device: Device,
    text: Arc<TextEncoders>,
    unet: Network<UNetConfig>,
    vae: Network<VaeConfig>,
    scheduler: SchedulerConfig,
}

#[derive(Clone)]
struct Network<C> {
    config: C,
    weights: Weights,
}

/// The plans of a session's UNet and VAE.
struct Plans {
    /// For batches of rising size, and those sizes in images.
    unet: Vec<(usize, Plan)>,
    vae: Plan,
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
    /// for a precision that the device does not have.
    pub fn open(source: &Source, options: impl Into<EngineOptions>) -> Result<Self> {
        let EngineOptions { device, precision, tokenizer } = &options.into();
        let precision = *precision;
        crate::memory::start_threads()?;
        let unet_config = read_config(source, "unet", UNetConfig::parse)?;
        let vae = read_config(source, "vae", VaeConfig::parse)?;
        check_latents(source, &unet_config, &vae)?;
        let load = |component: &str, graph: Graph, precision| {
            device.weights(graph.weights(), &source.tensors(component)?, &[], precision)
        };
        let (text, (unet_weights, vae_weights)) = rayon::join(
            || TextEncoders::open(source, device, &unet_config, *tokenizer),
            || {
                let unet = || load("unet", unet(&unet_config, UNetInput::default()), precision);
                let vae = || load("vae", vae_decoder(&vae, 1, Extent::square(8)), Precision::Full);
                rayon::join(unet, vae)
            },
        );
        // Of several problems the first in this order is reported, whichever was found first.
        let text = text?;
        let parts = Parts {
            source: source.clone(),
            device: device.clone(),
            scheduler: read_scheduler(source, text.sized())?,
            text: Arc::new(text),
            unet: Network { weights: unet_weights?, config: unet_config },
            vae: Network { weights: vae_weights?, config: vae },
        };
        Ok(Engine(Arc::new(parts)))
    }

    /// The checkpoint's name.
    pub fn name(&self) -> String {
        self.0.source.name()
    }

    /// Identifies the UNet, whatever its file format and precision: a SHA-256 of the names and shapes of its tensors,
    /// and of the short ones (biases, norms) rounded to fp16.
    ///
    /// # Errors
    /// Those of reading the weights.
    pub fn fingerprint(&self) -> Result<String> {
        self.0.source.tensors("unet")?.fingerprint()
    }

    /// SHA-256 of the file or files that hold the UNet's weights, in hexadecimal. For a single file, its first ten
    /// digits are A1111's model hash. `None` if the weights are random. It reads the whole files, which takes a second
    /// or two per 2 GB.
    ///
    /// # Errors
    /// Those of opening the files.
    pub fn sha256(&self) -> Result<Option<String>> {
        Ok(self.0.source.tensors("unet")?.sha256())
    }

    /// The checkpoint.
    pub fn source(&self) -> &Source {
        &self.0.source
    }

    /// Shape of one image's bottleneck.
    pub fn bottleneck(&self, options: SessionOptions) -> Shape {
        // Every level but the last halves the size, rounding up.
        let levels = &self.0.unet.config.levels;
        let [_, _, h, w] = self.latent_shape(options);
        let halved = |size: usize| (1..levels.len()).fold(size, |size, _| size.div_ceil(2));
        Shape::new(1, halved(h), halved(w), levels.last().map_or(0, |level| level.channels))
    }

    /// The device that it runs on.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The UNet and its weights, for training.
    pub(crate) fn unet(&self) -> Result<(&UNetConfig, Tensors, &Weights)> {
        Ok((&self.0.unet.config, self.0.source.tensors("unet")?, &self.0.unet.weights))
    }

    /// Encodes a prompt once for any number of images, sizes and sessions of this engine.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a prompt that the tokenizer refuses, [`crate::ErrorKind::DeviceLost`].
    pub fn encode(&self, prompt: &str) -> Result<Conditioning> {
        self.0.text.encode(Some(prompt))
    }

    /// The UNet's inputs for prompts and a picture size, with `rows` rows per prompt. `None` is the absence of a
    /// prompt, as in [`Image::negative`].
    ///
    /// # Errors
    /// Those of [`Engine::encode`].
    pub(crate) fn inputs(&self, prompts: &[Option<&str>], rows: usize, size: Size) -> Result<UNetInputs> {
        let encoded = prompts.iter().map(|prompt| self.0.text.encode(*prompt)).collect::<Result<Vec<_>>>()?;
        let size = (size.width, size.height);
        let row = |row: Conditioning| (row, time_ids(size, (0, 0), size));
        let rows: Vec<_> = encoded.into_iter().flat_map(|e| std::iter::repeat_n(row(e), rows)).collect();
        self.0.text.inputs(&rows)
    }

    /// True if the UNet reads the guidance scale as an input, as latent consistency models do. Then it is called once
    /// for an image at any scale, and negative prompts have no effect.
    pub fn reads_guidance(&self) -> bool {
        self.0.unet.config.time_cond_proj_dim.is_some()
    }

    /// The UNet's input for rows of these guidance scales, if it reads them.
    fn guidance_input(&self, rows: impl Iterator<Item = f32>) -> Option<(&'static str, Vec<f32>)> {
        let width = self.0.unet.config.time_cond_proj_dim?;
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
        match self.0.unet.config.mid {
            MidBlock::None => Err(Error::unsupported(
                self.0.source.path("unet/config.json"),
                "concepts are added to the output of the UNet's middle block, and this UNet has none",
            )
            .advise("use the model that it was distilled from")),
            _ => Ok(()),
        }
    }

    /// Tokens of a prompt, padding included.
    pub(crate) fn tokens(&self) -> usize {
        self.0.text.tokens()
    }

    /// The same checkpoint with another scheduler configuration.
    pub fn with_scheduler(&self, scheduler: SchedulerConfig) -> Self {
        Engine(Arc::new(Parts { scheduler, ..Parts::clone(&self.0) }))
    }

    /// The schedule of a sampler: its UNet calls, with the coefficients of each step.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a choice or a number of steps that the sampler does not support,
    /// [`crate::ErrorKind::Unsupported`] and [`crate::ErrorKind::Damaged`] for a config that it cannot honour.
    pub fn schedule(&self, choice: SamplerChoice, steps: usize) -> Result<Schedule> {
        Schedule::new(&self.0.scheduler, choice, steps)
    }

    /// The size for which the checkpoint was trained.
    pub fn default_size(&self) -> Size {
        let (h, w) = self.0.unet.config.sample_size.unwrap_or((64, 64));
        Size::new(w * self.0.vae.config.scale(), h * self.0.vae.config.scale())
    }

    /// Options of a session for one picture of [`Engine::default_size`].
    pub fn options(&self) -> SessionOptions {
        SessionOptions::new(self.default_size())
    }

    /// Shape of a session's latents in files, `[batch, channels, height, width]`.
    pub fn latent_shape(&self, options: SessionOptions) -> [usize; 4] {
        let vae = &self.0.vae.config;
        let Size { width, height } = options.size;
        [options.batch, vae.latent_channels, height / vae.scale(), width / vae.scale()]
    }

    /// The guidance scale that is diffusers' default for such a checkpoint: 7.5, for SDXL 5, and 8.5 if the UNet reads
    /// it.
    pub fn default_guidance(&self) -> f32 {
        match (self.reads_guidance(), self.0.text.sized()) {
            (true, _) => 8.5,
            (false, true) => 5.0,
            (false, false) => 7.5,
        }
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
        let (unet, sampler) = plans.unet.last().map_or((0, 0), |(images, unet)| {
            (unet.arena_bytes(), parts.device.denoiser_bytes(unet, *images, Some(&plans.vae)))
        });
        MemoryPlan {
            weights: parts.text.weight_bytes() + parts.unet.weights.bytes() + parts.vae.weights.bytes(),
            text: parts.text.arena_bytes(),
            unet,
            vae: plans.vae.arena_bytes(),
            sampler,
        }
    }

    /// The plans for batches of these sizes.
    fn plans(&self, options: SessionOptions, batches: &[usize]) -> Result<Plans> {
        let Parts { device, vae, .. } = &*self.0;
        let [_, _, h, w] = self.latent_shape(options);
        // This checks the sizes.
        let unet = batches.iter().map(|&batch| Ok((batch, self.unet_plan(options.batch(batch))?)));
        let unet = unet.collect::<Result<_>>()?;
        Ok(Plans { unet, vae: device.plan(vae_decoder(&vae.config, 1, Extent { h, w }), &[]) })
    }

    /// Checks that pictures of this size and batch are possible, whatever memory there is.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`].
    pub(crate) fn check_size(&self, options: SessionOptions) -> Result<()> {
        let SessionOptions { size: Size { width, height }, batch, .. } = options;
        let scale = self.0.vae.config.scale();
        for (name, size) in [("width", width), ("height", height)] {
            if size == 0 || size % scale != 0 || size > MAX_SIZE {
                let near = ((size.min(MAX_SIZE) + scale / 2) / scale).max(1) * scale;
                return Err(Error::invalid(
                    name,
                    format!("{size} is not possible: it must be a multiple of {scale} up to {MAX_SIZE}"),
                )
                .advise(format!("take {near}")));
            }
        }
        if batch == 0 || batch > MAX_BATCH {
            return Err(Error::invalid("batch", format!("a batch of {batch} images is not possible"))
                .advise(format!("give 1 to {MAX_BATCH}")));
        }
        if options.reuse == 0 {
            return Err(Error::invalid("reuse", "the whole UNet has to be computed sometimes")
                .advise("give 1 to compute it in every step, or 2 or more"));
        }
        Ok(())
    }

    fn unet_plan(&self, options: SessionOptions) -> Result<Plan> {
        self.check_size(options)?;
        let SessionOptions { size: Size { width, height }, batch, concepts, reuse, .. } = options;
        if concepts {
            self.check_concepts()?;
        }
        let scale = self.0.vae.config.scale();
        let rows = if self.has_negatives(options) { 2 * batch } else { batch };
        let shifted = if concepts { batch } else { 0 };
        let Parts { device, text, unet: network, .. } = &*self.0;
        let input = UNetInput { rows, h: height / scale, w: width / scale, tokens: text.tokens(), shifted };
        let unet = if reuse > 1 { unet_with_reuse } else { unet };
        Ok(device.plan(unet(&network.config, input), UNET_CONSTANTS))
    }

    /// Plans and allocates the UNet with its sampler alone.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for sizes that are not possible, [`crate::ErrorKind::OutOfMemory`] when memory is
    /// short.
    pub(crate) fn denoiser(&self, options: SessionOptions) -> Result<Box<dyn Denoiser>> {
        let Parts { device, unet: network, .. } = &*self.0;
        device.denoiser(vec![(options.batch, self.unet_plan(options)?)], &network.weights, None)
    }

    /// Memory of [`Engine::denoiser`] beside the weights.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for sizes that are not possible.
    pub(crate) fn denoiser_bytes(&self, options: SessionOptions) -> Result<usize> {
        let unet = self.unet_plan(options)?;
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
        self.check_size(options)?;
        if options.reuse > 1 {
            // The images of a running batch are at different steps, and a picture must not depend on its neighbours.
            return Err(Error::invalid("reuse", "steps of images that join and leave cannot reuse activations")
                .advise("give 1, or make a session"));
        }
        let mut batches: Vec<usize> = (0..).map(|i| 1 << i).take_while(|&batch| batch < options.batch).collect();
        batches.push(options.batch);
        RunningBatch::new(self.clone(), options, self.affordable(options, &batches)?)
    }

    /// Plans that fit into the device's free memory.
    fn affordable(&self, options: SessionOptions, batches: &[usize]) -> Result<Plans> {
        let plans = self.plans(options, batches)?;
        let SessionOptions { size, batch, .. } = options;
        self.afford(self.memory_of(&plans).session(), &format!("{size} in a batch of {batch}"))?;
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
}

fn check_latents(source: &Source, unet: &UNetConfig, vae: &VaeConfig) -> Result<()> {
    if unet.in_channels == vae.latent_channels && unet.out_channels == vae.latent_channels {
        return Ok(());
    }
    let problem = format!(
        "has {} input and {} output channels for {} latent channels: inpainting and depth models are not supported",
        unet.in_channels, unet.out_channels, vae.latent_channels
    );
    Err(Error::unsupported(source.path("unet/config.json"), problem))
}

/// The scheduler's config. Unless the checkpoint is SDXL, two fields are set as diffusers' StableDiffusionPipeline
/// forces them on checkpoints that are older than these fields: an offset of one step, and no clipping, since latents
/// are not pixels. Its StableDiffusionXLPipeline does not force them.
fn read_scheduler(source: &Source, xl: bool) -> Result<SchedulerConfig> {
    let file = "scheduler/scheduler_config.json";
    let path = source.path(file);
    let mut fields: serde_json::Map<String, serde_json::Value> = crate::json::parse(&source.read_text(file)?, &path)?;
    if !xl {
        fields.insert("steps_offset".into(), 1.into());
        fields.insert("clip_sample".into(), false.into());
    }
    SchedulerConfig::parse(&serde_json::Value::Object(fields).to_string(), path)
}
