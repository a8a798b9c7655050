//! The public face: an [`Engine`] is a loaded checkpoint, a [`Session`] its plans for one size and batch.

mod on_cpu;
mod on_cuda;
mod session;

pub use session::Session;

use crate::cpu;
use crate::device::{Device, Executor, Weights};
use crate::diffusion::noise::Rng;
use crate::diffusion::scheduler::{SamplerChoice, Schedule, SchedulerConfig};
use crate::graph::{Graph, Shape};
use crate::models::tokenizer::{Encoded, Tokenizer};
use crate::models::{ClipConfig, UNetConfig, VaeConfig, text_encoder, unet, vae_decoder};
use crate::plan::Plan;
use crate::respodiff::Concept;
use crate::weights::{Source, Tensors};
use crate::{Error, Image, Result};
use std::sync::Arc;

/// Inputs of a UNet that stay the same over the steps of an image: what depends on them alone runs once.
pub const UNET_CONSTANTS: &[&str] = &["encoder_hidden_states", "text_embeds", "time_ids"];

/// Largest width and height.
const MAX_SIZE: usize = 8192;
/// Largest batch.
const MAX_BATCH: usize = 256;

/// A checkpoint of Stable Diffusion 1.x or 2.x, its weights packed and ready. Cloning shares them.
#[derive(Clone)]
pub struct Engine(Arc<Parts>);

#[derive(Clone)]
struct Parts {
    source: Source,
    device: Device,
    tokenizer: Arc<Tokenizer>,
    text: Network<ClipConfig>,
    unet: Network<UNetConfig>,
    vae: Network<VaeConfig>,
    scheduler: SchedulerConfig,
}

#[derive(Clone)]
struct Network<C> {
    config: C,
    weights: Weights,
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
    /// What to stay away from; used with guidance only.
    pub negative_prompt: String,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale; above 1 needs a guided session.
    pub guidance: f32,
    /// Sampler and spacing; the checkpoint's own by default.
    pub sampler: SamplerChoice,
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
    /// diffusers' defaults: 50 steps, guidance 7.5.
    fn default() -> Self {
        Request {
            prompt: String::new(),
            negative_prompt: String::new(),
            steps: 50,
            guidance: 7.5,
            sampler: SamplerChoice::default(),
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
    /// The text encoder's arena.
    pub text: usize,
    /// The UNet's arena.
    pub unet: usize,
    /// The VAE decoder's arena.
    pub vae: usize,
}

impl Memory {
    /// What a session itself allocates.
    pub fn session(&self) -> usize {
        self.text + self.unet + self.vae
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
        if source.has("text_encoder_2/config.json") {
            return Err(Error::checkpoint(
                source.path("text_encoder_2"),
                "this is an SDXL checkpoint, whose text-to-image pipeline is not supported yet; its parts can be run with `probe`",
            ));
        }
        let text = read_config(source, "text_encoder", ClipConfig::parse)?;
        let unet_config = read_config(source, "unet", UNetConfig::parse)?;
        let vae = read_config(source, "vae", VaeConfig::parse)?;
        check_fit(source, &text, &unet_config, &vae)?;
        let tokenizer = source.tokenizer("tokenizer")?;
        if tokenizer.vocab_size() > text.vocab_size || tokenizer.length() > text.max_position_embeddings {
            let problem = format!(
                "{} tokens in prompts of {} do not fit the text encoder, which knows {} in prompts of {}",
                tokenizer.vocab_size(),
                tokenizer.length(),
                text.vocab_size,
                text.max_position_embeddings
            );
            return Err(Error::checkpoint(source.path("tokenizer"), problem));
        }
        let load = |component: &str, graph: Graph| device.weights(graph.weights(), &source.tensors(component)?);
        let parts = Parts {
            source: source.clone(),
            device: device.clone(),
            tokenizer: Arc::new(tokenizer),
            scheduler: read_scheduler(source)?,
            text: Network { weights: load("text_encoder", text_encoder(&text, 1))?, config: text },
            unet: Network { weights: load("unet", unet(&unet_config, 1, 8, 8, 1, 0))?, config: unet_config },
            vae: Network { weights: load("vae", vae_decoder(&vae, 1, 8, 8))?, config: vae },
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

    /// The UNet and its weights, for training.
    pub(crate) fn unet(&self) -> Result<(&UNetConfig, Tensors, &cpu::Weights)> {
        match &self.0.unet.weights {
            Weights::Cpu(weights) => Ok((&self.0.unet.config, self.0.source.tensors("unet")?, weights)),
            Weights::Cuda(_) => Err(Error::Device("training runs on the CPU; open the checkpoint there".into())),
        }
    }

    /// The hidden states of prompts, `[prompts, tokens, c]`.
    ///
    /// # Errors
    /// What the tokenizer finds.
    pub(crate) fn states(&self, prompts: &[&str]) -> Result<Vec<f32>> {
        let plan = self.0.device.plan(text_encoder(&self.0.text.config, prompts.len()), &[]);
        self.encode(&mut self.0.device.executor(plan, &self.0.text.weights)?, prompts)
    }

    /// Runs a text encoder, made for as many, on prompts: their hidden states.
    fn encode(&self, text: &mut Executor, prompts: &[&str]) -> Result<Vec<f32>> {
        let per_prompt = self.0.text.config.max_position_embeddings;
        let mut ids = vec![0.0; prompts.len() * per_prompt];
        for (prompt, row) in prompts.iter().zip(ids.chunks_exact_mut(per_prompt)) {
            self.0.tokenizer.encode(prompt)?.fill(row);
        }
        text.write("input_ids", &ids)?;
        text.step()?;
        text.read("last_hidden_state")
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

    /// The tokens of a prompt, and the words that do not fit.
    ///
    /// # Errors
    /// What the tokenizer finds.
    pub fn tokenize(&self, prompt: &str) -> Result<Encoded> {
        self.0.tokenizer.encode(prompt)
    }

    /// Memory of a session, without making it.
    ///
    /// # Errors
    /// [`Error::Usage`] for sizes that are not possible.
    pub fn memory(&self, options: SessionOptions) -> Result<Memory> {
        Ok(self.memory_of(&self.plans(options)?))
    }

    fn memory_of(&self, [text, unet, vae]: &[Plan; 3]) -> Memory {
        let bytes = Plan::arena_bytes;
        let parts = &*self.0;
        let weights = parts.text.weights.bytes() + parts.unet.weights.bytes() + parts.vae.weights.bytes();
        Memory { weights, text: bytes(text), unet: bytes(unet), vae: bytes(vae) }
    }

    fn plans(&self, options: SessionOptions) -> Result<[Plan; 3]> {
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
        let rows = if guided { 2 } else { 1 };
        let (h, w) = (height / scale, width / scale);
        let tokens = self.0.text.config.max_position_embeddings;
        let shifted = if concepts { batch } else { 0 };
        let device = &self.0.device;
        Ok([
            device.plan(text_encoder(&self.0.text.config, rows), &[]),
            device.plan(unet(&self.0.unet.config, rows * batch, h, w, tokens, shifted), UNET_CONSTANTS),
            device.plan(vae_decoder(&self.0.vae.config, 1, h, w), &[]),
        ])
    }

    /// Plans and allocates everything for one size and batch.
    ///
    /// # Errors
    /// [`Error::Usage`] for sizes that are not possible or do not fit into the machine's free memory,
    /// [`Error::Device`] for what does not fit into the device's.
    pub fn session(&self, options: SessionOptions) -> Result<Session> {
        let plans = self.plans(options)?;
        let needed = self.memory_of(&plans).session();
        let free = matches!(self.0.device, Device::Cpu).then(free_memory).flatten();
        if let Some(free) = free.filter(|&free| needed > free) {
            let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
            return Err(Error::usage(format!(
                "{}x{} in a batch of {} needs {:.1} GiB of memory where {:.1} GiB are free; make a smaller picture or batch",
                options.width,
                options.height,
                options.batch,
                gib(needed),
                gib(free)
            )));
        }
        Session::new(self.clone(), options, plans)
    }
}

fn check_fit(source: &Source, text: &ClipConfig, unet: &UNetConfig, vae: &VaeConfig) -> Result<()> {
    let problem = if unet.text_time.is_some() {
        "asks for SDXL's size conditioning, but the folder has one text encoder".to_string()
    } else if unet.in_channels != vae.latent_channels || unet.out_channels != vae.latent_channels {
        format!(
            "has {} input and {} output channels for {} latent channels; inpainting and depth models are not supported",
            unet.in_channels, unet.out_channels, vae.latent_channels
        )
    } else if unet.cross_attention_dim != text.layers.width {
        format!("reads text of width {}, but the text encoder's is {}", unet.cross_attention_dim, text.layers.width)
    } else {
        return Ok(());
    };
    Err(Error::checkpoint(source.path("unet/config.json"), problem))
}

/// The scheduler's config, with what diffusers' StableDiffusionPipeline forces on checkpoints from before these fields:
/// an offset of one step, and no clipping of latents as if they were pixels.
fn read_scheduler(source: &Source) -> Result<SchedulerConfig> {
    let file = "scheduler/scheduler_config.json";
    let path = source.path(file);
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&source.read_text(file)?)
        .map_err(|e| Error::checkpoint(&path, format!("not a JSON object: {e}; download the file again")))?;
    fields.insert("steps_offset".into(), 1.into());
    fields.insert("clip_sample".into(), false.into());
    SchedulerConfig::parse(&serde_json::Value::Object(fields).to_string(), path)
}

/// Free memory as Linux counts it; other systems are not asked.
pub(crate) fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<usize>().ok().map(|kib| kib * 1024)
}
