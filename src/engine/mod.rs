//! The public face: an [`Engine`] is a loaded checkpoint, a [`Session`] its plans for one size and batch.

mod denoiser;
mod on_cpu;
mod on_cuda;
mod session;
mod text;

pub(crate) use denoiser::{Denoiser, Run, Start};
pub use session::Session;
pub(crate) use text::Conditioning;

use crate::cpu::MatrixPrecision;
use crate::device::{Device, Executor, Weights};
use crate::diffusion::noise::Rng;
use crate::diffusion::scheduler::{SamplerChoice, Schedule, SchedulerConfig};
use crate::graph::{Extent, Graph, Shape};
use crate::models::tokenizer::Encoded;
use crate::models::{UNetConfig, UNetInput, VaeConfig, unet, vae_decoder};
use crate::plan::Plan;
use crate::respodiff::Concept;
use crate::weights::{Source, Tensors};
use crate::{Error, Image, Result};
use on_cpu::CpuDenoiser;
use on_cuda::CudaDenoiser;
use std::sync::Arc;
use text::{TextEncoders, time_ids};

/// Inputs of a UNet that stay the same over the steps of an image: what depends on them alone runs once.
pub const UNET_CONSTANTS: &[&str] = &["encoder_hidden_states", "text_embeds", "time_ids"];

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

/// The plans of a session's networks.
struct Plans {
    text: Vec<Plan>,
    unet: Plan,
    vae: Plan,
}

/// What a [`Session`] is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Pixels, divisible by 8.
    pub width: usize,
    /// Pixels, divisible by 8.
    pub height: usize,
    /// Images at once.
    pub batch: usize,
    /// Whether classifier-free guidance (Ho and Salimans, arXiv 2207.12598) doubles the UNet's batch.
    pub guided: bool,
    /// Whether requests may shift the bottleneck by concepts.
    pub concepts: bool,
}

/// One call for images.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to show.
    pub prompt: String,
    /// What to stay away from; used with guidance only. None is an empty prompt, or where SDXL's `model_index.json` says
    /// `force_zeros_for_empty_prompt` zeros instead of any prompt's states, as in diffusers.
    pub negative_prompt: Option<String>,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale; above 1 needs a guided session.
    pub guidance: f32,
    /// Sampler and spacing; the checkpoint's own by default.
    pub sampler: SamplerChoice,
    /// SDXL alone: width and height of the picture that this one is to look made of; its own by default.
    pub original_size: Option<(usize, usize)>,
    /// SDXL alone: pixels cut off that picture at its left and its top.
    pub crop: (usize, usize),
    /// Image `i` is drawn with `seed + i`.
    pub seed: u64,
    /// Whose random numbers the seed means.
    pub rng: Rng,
    /// Unit noise to start from instead of the seed's, `[batch, c, height / 8, width / 8]`.
    pub latents: Option<Vec<f32>>,
    /// For each image its concepts and their weights, which add up; empty for none at all.
    pub concepts: Vec<Vec<(Arc<Concept>, f32)>>,
}

impl Default for Request {
    /// diffusers' defaults for Stable Diffusion 1.x and 2.x: 50 steps, guidance 7.5.
    fn default() -> Self {
        Request {
            prompt: String::new(),
            negative_prompt: None,
            steps: 50,
            guidance: 7.5,
            sampler: SamplerChoice::default(),
            original_size: None,
            crop: (0, 0),
            seed: 0,
            rng: Rng::default(),
            latents: None,
            concepts: Vec::new(),
        }
    }
}

/// Where a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// This many UNet calls of `total` are done.
    Step {
        /// Calls done.
        done: usize,
        /// Calls in all; some samplers make one more than the steps asked for.
        total: usize,
    },
    /// This many images of `total` are decoded.
    Decoded {
        /// Images done.
        done: usize,
        /// Images in all.
        total: usize,
    },
}

/// What a run made.
#[derive(Clone)]
pub struct Output {
    /// The pictures.
    pub images: Vec<Image>,
    /// The final latents, `[batch, c, height / 8, width / 8]`, as the UNet sees them (the VAE's scale not yet undone).
    pub latents: Vec<f32>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Output {{ images: {:?}, latents: [{} numbers] }}", self.images, self.latents.len())
    }
}

/// Bytes of memory, known before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Packed weights of all networks, shared between sessions.
    pub weights: usize,
    /// The text encoders' arenas.
    pub text: usize,
    /// The UNet's arena.
    pub unet: usize,
    /// The VAE decoder's arena.
    pub vae: usize,
    /// The latents, the sampler's history and coefficients, and one picture; on the CPU these are not counted.
    pub sampler: usize,
}

impl Memory {
    /// What a session itself allocates.
    pub fn session(&self) -> usize {
        self.text + self.unet + self.vae + self.sampler
    }

    /// All of it: what a device holds while the engine's one session samples.
    pub fn total(&self) -> usize {
        self.weights + self.session()
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
    /// Loads a checkpoint onto a device.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] or [`Error::Io`] about the first file that is missing, damaged or not supported;
    /// [`Error::Device`] when the weights do not fit the device's memory.
    pub fn open(source: &Source, device: &Device) -> Result<Self> {
        Self::open_in(source, device, MatrixPrecision::Fp32)
    }

    /// The same with the UNet's linear layers in another precision, which only the CPU has.
    ///
    /// # Errors
    /// As [`Engine::open`], and [`Error::Usage`] for a precision that the device has not.
    pub fn open_in(source: &Source, device: &Device, precision: MatrixPrecision) -> Result<Self> {
        let unet_config = read_config(source, "unet", UNetConfig::parse)?;
        let vae = read_config(source, "vae", VaeConfig::parse)?;
        check_latents(source, &unet_config, &vae)?;
        let load = |component: &str, graph: Graph, precision| {
            device.weights_beside(graph.weights(), &source.tensors(component)?, &[], precision)
        };
        let (text, (unet_weights, vae_weights)) = rayon::join(
            || TextEncoders::open(source, device, &unet_config),
            || {
                let unet = || load("unet", unet(&unet_config, UNetInput::default()), precision);
                let vae = || load("vae", vae_decoder(&vae, 1, Extent::square(8)), MatrixPrecision::Fp32);
                rayon::join(unet, vae)
            },
        );
        // In this order, whichever of several problems was found first.
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

    /// Which UNet it is, whatever file format and precision it came in; see [`crate::weights::Tensors::fingerprint`].
    ///
    /// # Errors
    /// What the weights have wrong.
    pub fn fingerprint(&self) -> Result<String> {
        self.0.source.tensors("unet")?.fingerprint()
    }

    /// Shape of one image's bottleneck.
    pub fn bottleneck(&self, options: SessionOptions) -> Shape {
        // Every level but the last halves the size, rounding up.
        let levels = &self.0.unet.config.levels;
        let [_, _, h, w] = self.latent_shape(options);
        let halved = |size: usize| (1..levels.len()).fold(size, |size, _| size.div_ceil(2));
        Shape::new(1, halved(h), halved(w), levels.last().map_or(0, |level| level.channels))
    }

    /// Where it runs.
    pub(crate) fn device(&self) -> &Device {
        &self.0.device
    }

    /// The UNet and its weights, for training.
    pub(crate) fn unet(&self) -> Result<(&UNetConfig, Tensors, &Weights)> {
        Ok((&self.0.unet.config, self.0.source.tensors("unet")?, &self.0.unet.weights))
    }

    /// What prompts for pictures of `size` (width, height) come to for the UNet, a row for each; `None` is no prompt, as
    /// [`Request::negative_prompt`].
    ///
    /// # Errors
    /// What the tokenizers find.
    pub(crate) fn condition(&self, prompts: &[Option<&str>], size: (usize, usize)) -> Result<Conditioning> {
        let Parts { text, device, .. } = &*self.0;
        let mut executors = text.executors(device, text.plans(device, prompts.len()))?;
        text.condition(&mut executors, prompts, time_ids(size, (0, 0), size))
    }

    /// Tokens of a prompt, padding included.
    pub(crate) fn tokens(&self) -> usize {
        self.0.text.tokens()
    }

    /// The same checkpoint with another scheduler configuration.
    pub fn with_scheduler(&self, scheduler: SchedulerConfig) -> Self {
        Engine(Arc::new(Parts { scheduler, ..Parts::clone(&self.0) }))
    }

    /// The steps a sampler would take.
    ///
    /// # Errors
    /// [`Error::Usage`] for what the sampler cannot do, [`Error::Checkpoint`] for a config it cannot honour.
    pub fn schedule(&self, choice: SamplerChoice, steps: usize) -> Result<Schedule> {
        Schedule::new(&self.0.scheduler, choice, steps)
    }

    /// Width and height in pixels for which the checkpoint was trained.
    pub fn default_size(&self) -> (usize, usize) {
        let (h, w) = self.0.unet.config.sample_size.unwrap_or((64, 64));
        (w * self.0.vae.config.scale(), h * self.0.vae.config.scale())
    }

    /// Shape of a session's latents in files, `[batch, channels, height, width]`.
    pub fn latent_shape(&self, options: SessionOptions) -> [usize; 4] {
        let vae = &self.0.vae.config;
        [options.batch, vae.latent_channels, options.height / vae.scale(), options.width / vae.scale()]
    }

    /// The guidance that diffusers takes for such a checkpoint where none is asked for.
    pub fn default_guidance(&self) -> f32 {
        if self.0.text.sized() { 5.0 } else { 7.5 }
    }

    /// The tokens of a prompt, and the words that do not fit, for each text encoder.
    ///
    /// # Errors
    /// What the tokenizers find.
    pub fn tokenize(&self, prompt: &str) -> Result<Vec<Encoded>> {
        self.0.text.tokenize(prompt)
    }

    /// Memory of a session, without making it.
    ///
    /// # Errors
    /// [`Error::Usage`] for sizes that are not possible.
    pub fn memory(&self, options: SessionOptions) -> Result<Memory> {
        Ok(self.memory_of(&self.plans(options)?, options.batch))
    }

    fn memory_of(&self, plans: &Plans, batch: usize) -> Memory {
        let parts = &*self.0;
        Memory {
            weights: parts.text.weight_bytes() + parts.unet.weights.bytes() + parts.vae.weights.bytes(),
            text: plans.text.iter().map(Plan::arena_bytes).sum(),
            unet: plans.unet.arena_bytes(),
            vae: plans.vae.arena_bytes(),
            sampler: self.own_bytes(&plans.unet, batch, session::picture_shape(&plans.vae).len()),
        }
    }

    /// Bytes beside the networks' arenas: a sampler for this UNet, and `picture`. On the CPU they are not counted.
    fn own_bytes(&self, unet: &Plan, batch: usize, picture: usize) -> usize {
        match self.0.device {
            Device::Cpu => 0,
            Device::Cuda(_) => CudaDenoiser::sampler_bytes(unet, batch) + picture,
        }
    }

    fn plans(&self, options: SessionOptions) -> Result<Plans> {
        let Parts { device, text, vae, .. } = &*self.0;
        let [_, _, h, w] = self.latent_shape(options);
        Ok(Plans {
            unet: self.unet_plan(options)?,
            text: text.plans(device, if options.guided { 2 } else { 1 }),
            vae: device.plan(vae_decoder(&vae.config, 1, Extent { h, w }), &[]),
        })
    }

    fn unet_plan(&self, options: SessionOptions) -> Result<Plan> {
        let SessionOptions { width, height, batch, guided, concepts } = options;
        let scale = self.0.vae.config.scale();
        for (name, size) in [("width", width), ("height", height)] {
            if size == 0 || size % scale != 0 || size > MAX_SIZE {
                let near = ((size.min(MAX_SIZE) + scale / 2) / scale).max(1) * scale;
                return Err(Error::usage(format!(
                    "{name} {size} is not possible: it must be a multiple of {scale} up to {MAX_SIZE}; {near} is near"
                )));
            }
        }
        if batch == 0 || batch > MAX_BATCH {
            return Err(Error::usage(format!("batch {batch} is not possible: give 1 to {MAX_BATCH}")));
        }
        let rows = if guided { 2 * batch } else { batch };
        let shifted = if concepts { batch } else { 0 };
        let Parts { device, text, unet: network, .. } = &*self.0;
        let input = UNetInput { rows, h: height / scale, w: width / scale, tokens: text.tokens(), shifted };
        Ok(device.plan(unet(&network.config, input), UNET_CONSTANTS))
    }

    /// Plans and allocates the UNet with its sampler alone.
    ///
    /// # Errors
    /// [`Error::Usage`] for sizes that are not possible, [`Error::Device`] when memory is short.
    pub(crate) fn denoiser(&self, options: SessionOptions) -> Result<Box<dyn Denoiser>> {
        let Parts { device, unet: network, .. } = &*self.0;
        Ok(match device.executor(self.unet_plan(options)?, &network.weights)? {
            Executor::Cpu(unet) => Box::new(CpuDenoiser::new(unet)),
            Executor::Cuda(unet) => Box::new(CudaDenoiser::new(unet, options.batch)?),
        })
    }

    /// Memory of [`Engine::denoiser`] beside the weights.
    ///
    /// # Errors
    /// [`Error::Usage`] for sizes that are not possible.
    pub(crate) fn denoiser_bytes(&self, options: SessionOptions) -> Result<usize> {
        let unet = self.unet_plan(options)?;
        Ok(unet.arena_bytes() + self.own_bytes(&unet, options.batch, 0))
    }

    /// Plans and allocates everything for one size and batch.
    ///
    /// # Errors
    /// [`Error::Usage`] for sizes that are not possible or do not fit into the device's free memory.
    pub fn session(&self, options: SessionOptions) -> Result<Session> {
        let plans = self.plans(options)?;
        let SessionOptions { width, height, batch, .. } = options;
        let what = format!("{width}x{height} in a batch of {batch}; make a smaller picture or batch");
        self.afford(self.memory_of(&plans, batch).session(), &what)?;
        Session::new(self.clone(), options, plans)
    }

    /// Bytes of the device's memory that are taken since it was opened, by the driver's count; on the CPU that is not
    /// known.
    pub fn used_memory(&self) -> Option<usize> {
        match &self.0.device {
            Device::Cpu => None,
            Device::Cuda(device) => device.used_bytes(),
        }
    }

    /// Free memory of the device, where that is known.
    pub(crate) fn free_memory(&self) -> Option<usize> {
        match &self.0.device {
            Device::Cpu => free_memory(),
            Device::Cuda(device) => device.free_bytes(),
        }
    }

    /// Whether there are so many bytes for `what`, which ends with advice.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are not.
    pub(crate) fn afford(&self, needed: usize, what: &str) -> Result<()> {
        let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
        match self.free_memory() {
            Some(free) if needed > free => Err(Error::usage(format!(
                "{:.1} GiB of memory are free where {:.1} GiB are needed for {what}",
                gib(free),
                gib(needed)
            ))),
            _ => Ok(()),
        }
    }
}

fn check_latents(source: &Source, unet: &UNetConfig, vae: &VaeConfig) -> Result<()> {
    if unet.in_channels == vae.latent_channels && unet.out_channels == vae.latent_channels {
        return Ok(());
    }
    let problem = format!(
        "has {} input and {} output channels for {} latent channels; inpainting and depth models are not supported",
        unet.in_channels, unet.out_channels, vae.latent_channels
    );
    Err(Error::checkpoint(source.path("unet/config.json"), problem))
}

/// The scheduler's config, with what diffusers' StableDiffusionPipeline forces on checkpoints from before these fields, and
/// its StableDiffusionXLPipeline does not: an offset of one step, and no clipping of latents as if they were pixels.
fn read_scheduler(source: &Source, xl: bool) -> Result<SchedulerConfig> {
    let file = "scheduler/scheduler_config.json";
    let path = source.path(file);
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&source.read_text(file)?)
        .map_err(|e| Error::checkpoint(&path, format!("not a JSON object: {e}; download the file again")))?;
    if !xl {
        fields.insert("steps_offset".into(), 1.into());
        fields.insert("clip_sample".into(), false.into());
    }
    SchedulerConfig::parse(&serde_json::Value::Object(fields).to_string(), path)
}

/// Free memory as Linux counts it; other systems are not asked.
pub(crate) fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<usize>().ok().map(|kib| kib * 1024)
}
