//! The public face: an [`Engine`] is a loaded checkpoint, a [`Session`] its plans for one size and batch.

use crate::cpu::{self, Executor, Weights};
use crate::diffusion::noise::{NormalGenerator, Rng};
use crate::diffusion::scheduler::{SamplerChoice, SamplerState, Schedule, SchedulerConfig};
use crate::graph::{Graph, Shape};
use crate::layout::{nchw_to_nhwc, nhwc_to_nchw};
use crate::models::tokenizer::{Encoded, Tokenizer};
use crate::models::{ClipConfig, UNetConfig, VaeConfig, text_encoder, unet, vae_decoder};
use crate::plan::Plan;
use crate::respodiff::{Concept, Shift};
use crate::weights::{Source, Tensors};
use crate::{Error, Image, Result};
use std::ops::ControlFlow;
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
    tokenizer: Arc<Tokenizer>,
    text: Network<ClipConfig>,
    unet: Network<UNetConfig>,
    vae: Network<VaeConfig>,
    scheduler: SchedulerConfig,
}

#[derive(Clone)]
struct Network<C> {
    config: C,
    weights: Arc<Weights>,
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
    /// Loads a checkpoint.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] or [`Error::Io`] about the first file that is missing, damaged or not supported.
    pub fn open(source: &Source) -> Result<Self> {
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
        let load = |component: &str, graph: Graph| Weights::load(graph.weights(), &source.tensors(component)?);
        let parts = Parts {
            source: source.clone(),
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
    pub(crate) fn unet(&self) -> Result<(&UNetConfig, Tensors, &Weights)> {
        Ok((&self.0.unet.config, self.0.source.tensors("unet")?, &self.0.unet.weights))
    }

    /// The hidden states of prompts, `[prompts, tokens, c]`.
    ///
    /// # Errors
    /// What the tokenizer finds.
    pub(crate) fn states(&self, prompts: &[&str]) -> Result<Vec<f32>> {
        let plan = Plan::new(text_encoder(&self.0.text.config, prompts.len()), &[], &cpu::Fp32);
        let mut text = Executor::new(Arc::new(plan), self.0.text.weights.clone());
        self.encode(&mut text, prompts)?;
        Ok(text.output("last_hidden_state").to_vec())
    }

    /// Runs a text encoder, made for as many, on prompts.
    fn encode(&self, text: &mut Executor, prompts: &[&str]) -> Result<()> {
        let per_prompt = self.0.text.config.max_position_embeddings;
        for (prompt, row) in prompts.iter().zip(text.input_mut("input_ids").chunks_exact_mut(per_prompt)) {
            self.0.tokenizer.encode(prompt)?.fill(row);
        }
        text.step();
        Ok(())
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
        Ok([
            Plan::new(text_encoder(&self.0.text.config, rows), &[], &cpu::Fp32),
            Plan::new(unet(&self.0.unet.config, rows * batch, h, w, tokens, shifted), UNET_CONSTANTS, &cpu::Fp32),
            Plan::new(vae_decoder(&self.0.vae.config, 1, h, w), &[], &cpu::Fp32),
        ])
    }

    /// Plans and allocates everything for one size and batch.
    ///
    /// # Errors
    /// [`Error::Usage`] for sizes that are not possible or do not fit into the machine's free memory.
    pub fn session(&self, options: SessionOptions) -> Result<Session> {
        let plans = self.plans(options)?;
        let needed = self.memory_of(&plans).session();
        if let Some(free) = free_memory().filter(|&free| needed > free) {
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
        let [text, unet, vae] = plans.map(Arc::new);
        let parts = &*self.0;
        Ok(Session {
            text: Executor::new(text, parts.text.weights.clone()),
            unet: Executor::new(unet, parts.unet.weights.clone()),
            vae: Executor::new(vae, parts.vae.weights.clone()),
            engine: self.clone(),
            options,
        })
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
fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<usize>().ok().map(|kib| kib * 1024)
}

/// An engine's plans for one size and batch: warm, and free of allocations while it steps.
pub struct Session {
    engine: Engine,
    options: SessionOptions,
    text: Executor,
    unet: Executor,
    vae: Executor,
}

impl Session {
    /// What it was made for.
    pub fn options(&self) -> SessionOptions {
        self.options
    }

    /// Makes the pictures. `progress` is told of every step and may end the run.
    ///
    /// # Errors
    /// [`Error::Usage`] for a request that cannot be, [`Error::Cancelled`] when `progress` breaks, and
    /// [`Error::NonFinite`] when the network leaves the range of numbers.
    pub fn generate(
        &mut self,
        request: &Request,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Output> {
        let schedule = self.engine.schedule(request.sampler, request.steps)?;
        let guided = self.options.guided;
        if !request.guidance.is_finite() || (request.guidance > 1.0 && !guided) {
            return Err(Error::usage(format!(
                "guidance {} is not possible here: give a number, and a guided session for one above 1",
                request.guidance
            )));
        }
        if !request.concepts.is_empty() && (!self.options.concepts || request.concepts.len() != self.options.batch) {
            return Err(Error::usage(format!(
                "concepts for {} images, where the session is for {}{}; list the concepts of every image",
                request.concepts.len(),
                self.options.batch,
                if self.options.concepts { "" } else { " without concepts" }
            )));
        }
        let shift = Shift::new(self.engine.bottleneck(self.options), self.options.batch, &request.concepts)?;
        if self.options.concepts {
            self.unet.input_mut("shift").copy_from_slice(shift.constant());
        }
        self.encode(request)?;
        let mut generators: Vec<NormalGenerator> = (0..self.options.batch as u64)
            .map(|i| NormalGenerator::new(request.rng, request.seed.wrapping_add(i)))
            .collect();
        let mut latents = self.initial_latents(request, &mut generators)?;
        latents.iter_mut().for_each(|x| *x *= schedule.init_noise_sigma);
        self.denoise(&schedule, request.guidance, &shift, &mut generators, &mut latents, progress)?;
        let (c, pixels) = self.latent_size();
        let mut output = Output { images: Vec::new(), latents: vec![0.0; latents.len()] };
        nhwc_to_nchw(&latents, c, pixels, &mut output.latents);
        let scale = self.engine.0.vae.config.scaling_factor;
        for latents in latents.chunks_exact(c * pixels) {
            self.vae.input_mut("latents").iter_mut().zip(latents).for_each(|(v, x)| *v = x / scale);
            self.vae.step();
            let image = Image::from_hwc(self.vae.output("image"), self.options.height, self.options.width)?;
            output.images.push(image);
            let done = output.images.len();
            if progress(Progress::Decoded { done, total: self.options.batch }).is_break() && done < self.options.batch {
                break;
            }
        }
        Ok(output)
    }

    /// Channels and pixels of an image's latents.
    fn latent_size(&self) -> (usize, usize) {
        let vae = &self.engine.0.vae.config;
        (vae.latent_channels, self.options.width / vae.scale() * (self.options.height / vae.scale()))
    }

    /// Prompts to the UNet's hidden states (the unconditional rows first), and what depends on them alone.
    fn encode(&mut self, request: &Request) -> Result<()> {
        let prompts = [request.negative_prompt.as_str(), request.prompt.as_str()];
        let prompts = if self.options.guided { &prompts[..] } else { &prompts[1..] };
        self.engine.clone().encode(&mut self.text, prompts)?;
        let states = self.text.output("last_hidden_state");
        let one = states.len() / prompts.len();
        let rows = self.unet.input_mut("encoder_hidden_states").chunks_exact_mut(one);
        for (i, row) in rows.enumerate() {
            row.copy_from_slice(&states[i / self.options.batch * one..][..one]);
        }
        self.unet.prologue();
        Ok(())
    }

    fn initial_latents(&self, request: &Request, generators: &mut [NormalGenerator]) -> Result<Vec<f32>> {
        let (c, pixels) = self.latent_size();
        let one = c * pixels;
        let mut latents = vec![0.0; self.options.batch * one];
        match &request.latents {
            Some(given) if given.len() != latents.len() => {
                return Err(Error::usage(format!(
                    "the latents hold {} numbers where this size and batch have {}",
                    given.len(),
                    latents.len()
                )));
            }
            Some(given) => nchw_to_nhwc(given, c, pixels, &mut latents),
            None => draw(generators, (c, pixels), &mut vec![0.0; one], &mut latents),
        }
        Ok(latents)
    }

    /// The sampling loop, on latents `[batch, h, w, c]`.
    fn denoise(
        &mut self,
        schedule: &Schedule,
        guidance: f32,
        shift: &Shift,
        generators: &mut [NormalGenerator],
        latents: &mut [f32],
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<()> {
        let size = self.latent_size();
        let mut state = SamplerState::new(latents.len());
        let (mut prediction, mut noise) = (vec![0.0; latents.len()], vec![0.0; latents.len()]);
        let mut draft = vec![0.0; size.0 * size.1];
        let total = schedule.steps.len();
        for (done, step) in schedule.steps.iter().enumerate() {
            if progress(Progress::Step { done, total }).is_break() {
                return Err(Error::Cancelled(format!("stopped after {done} of {total} steps; no picture was made")));
            }
            for half in self.unet.input_mut("sample").chunks_exact_mut(latents.len()) {
                half.iter_mut().zip(&*latents).for_each(|(s, x)| *s = x * step.input_scale);
            }
            self.unet.input_mut("timestep").fill(step.timestep);
            match shift.is_constant() {
                true => self.unet.step(),
                false => self.unet.step_shifting(|mid, out| shift.follow(mid, out)),
            }
            let out = self.unet.output("sample");
            if self.options.guided {
                let (without, with) = out.split_at(latents.len());
                for ((p, u), c) in prediction.iter_mut().zip(without).zip(with) {
                    *p = u + guidance * (c - u);
                }
            } else {
                prediction.copy_from_slice(out);
            }
            if step.needs_noise() {
                draw(generators, size, &mut draft, &mut noise);
            }
            state.step(step, &prediction, latents, if step.needs_noise() { &noise } else { &[] });
            if !latents.iter().all(|x| x.is_finite()) {
                return Err(Error::NonFinite(format!(
                    "step {} of {total} gave NaN or infinite latents; lower the guidance, take more steps or another scheduler",
                    done + 1
                )));
            }
        }
        // Nothing is left to break off.
        let _ = progress(Progress::Step { done: total, total });
        Ok(())
    }
}

/// Normal numbers for each image from its own generator, drawn in NCHW as diffusers does.
fn draw(generators: &mut [NormalGenerator], (c, pixels): (usize, usize), draft: &mut [f32], out: &mut [f32]) {
    for (generator, out) in generators.iter_mut().zip(out.chunks_exact_mut(c * pixels)) {
        generator.fill(draft);
        nchw_to_nhwc(draft, c, pixels, out);
    }
}
