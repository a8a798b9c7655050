//! Sampling: plans for one size and batch, run from prompts to pictures.

use super::on_cpu::OnCpu;
use super::on_cuda::OnCuda;
use super::{Engine, Output, Plans, Progress, Request, SessionOptions, time_ids};
use crate::device::Executor;
use crate::diffusion::noise::{NormalGenerator, Rng};
use crate::diffusion::scheduler::Schedule;
use crate::image::Image;
use crate::layout::{nchw_to_nhwc, nhwc_to_nchw};
use crate::respodiff::Shift;
use crate::{Error, Result};
use std::ops::ControlFlow;

/// An engine's plans for one size and batch: warm, and free of allocations while it steps.
pub struct Session {
    engine: Engine,
    options: SessionOptions,
    text: Vec<Executor>,
    networks: Box<dyn Networks>,
}

/// The UNet and the VAE of a session, on a device.
pub(super) trait Networks: Send {
    /// Writes an input of the UNet.
    fn write(&mut self, input: &str, values: &[f32]) -> Result<()>;

    /// Runs what of the UNet depends on the prompts alone.
    fn prologue(&mut self) -> Result<()>;

    /// The sampling loop. `check` is called with the number of steps done, before each and after the last, and may end it.
    /// Gives the latents, `[batch, h, w, c]`.
    fn sample(&mut self, run: &Run, check: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<f32>>;

    /// Decodes an image of the last run.
    fn picture(&mut self, image: usize, run: &Run) -> Result<Image>;
}

/// What a request comes to.
pub(super) struct Run<'a> {
    pub schedule: &'a Schedule,
    pub guidance: f32,
    pub guided: bool,
    pub shift: &'a Shift,
    pub seed: u64,
    pub rng: Rng,
    /// Unit noise to start from, NHWC, instead of the seed's.
    pub given: Option<Vec<f32>>,
    pub batch: usize,
    /// Channels and pixels of an image's latents.
    pub latents: (usize, usize),
    pub scaling_factor: f32,
    pub width: usize,
    pub height: usize,
}

impl Run<'_> {
    /// The latents before the first step, NHWC.
    pub fn start(&self, noise: &mut Noise) -> Vec<f32> {
        let mut latents = self.given.clone().unwrap_or_else(|| {
            let mut latents = vec![0.0; self.batch * self.latents.0 * self.latents.1];
            noise.draw(&mut latents);
            latents
        });
        latents.iter_mut().for_each(|x| *x *= self.schedule.init_noise_sigma);
        latents
    }

    /// About the step after `done` others.
    pub fn non_finite(&self, done: usize) -> Error {
        Error::NonFinite(format!(
            "step {} of {} gave NaN or infinite latents; lower the guidance, take more steps or another scheduler",
            done + 1,
            self.schedule.steps.len()
        ))
    }
}

/// Normal numbers for each image from its own generator.
pub(super) struct Noise {
    generators: Vec<NormalGenerator>,
    size: (usize, usize),
}

impl Noise {
    pub fn new(run: &Run) -> Self {
        let generator = |i| NormalGenerator::new(run.rng, run.seed.wrapping_add(i));
        Noise { generators: (0..run.batch as u64).map(generator).collect(), size: run.latents }
    }

    /// Draws in NCHW, as diffusers does, and writes NHWC.
    pub fn draw(&mut self, out: &mut [f32]) {
        let (c, pixels) = self.size;
        let mut draft = vec![0.0; c * pixels];
        for (generator, out) in self.generators.iter_mut().zip(out.chunks_exact_mut(c * pixels)) {
            generator.fill(&mut draft);
            nchw_to_nhwc(&draft, c, pixels, out);
        }
    }
}

impl Session {
    pub(super) fn new(engine: Engine, options: SessionOptions, plans: Plans) -> Result<Self> {
        let parts = &*engine.0;
        let text = parts.text.executors(&parts.device, plans.text)?;
        let unet = parts.device.executor(plans.unet, &parts.unet.weights)?;
        let vae = parts.device.executor(plans.vae, &parts.vae.weights)?;
        let networks: Box<dyn Networks> = match (unet, vae) {
            (Executor::Cpu(unet), Executor::Cpu(vae)) => Box::new(OnCpu { unet, vae, latents: Vec::new() }),
            (Executor::Cuda(unet), Executor::Cuda(vae)) => Box::new(OnCuda::new(unet, vae, options.batch)?),
            _ => return Err(Error::Device("the UNet and the VAE are on different devices".into())),
        };
        Ok(Session { text, networks, engine, options })
    }

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
        if !self.engine.0.text.sized() && (request.original_size.is_some() || request.crop != (0, 0)) {
            let problem =
                "this checkpoint does not read the picture's sizes, as SDXL does; leave original size and crop out";
            return Err(Error::usage(problem));
        }
        let shift = Shift::new(self.engine.bottleneck(self.options), self.options.batch, &request.concepts)?;
        if self.options.concepts {
            self.networks.write("shift", shift.constant())?;
        }
        self.encode(request)?;
        let vae = &self.engine.0.vae.config;
        let size = (vae.latent_channels, self.options.width / vae.scale() * (self.options.height / vae.scale()));
        let run = Run {
            schedule: &schedule,
            guidance: request.guidance,
            guided,
            shift: &shift,
            seed: request.seed,
            rng: request.rng,
            given: self.given(request, size)?,
            batch: self.options.batch,
            latents: size,
            scaling_factor: vae.scaling_factor,
            width: self.options.width,
            height: self.options.height,
        };
        let total = schedule.steps.len();
        let latents = self.networks.sample(&run, &mut |done| match progress(Progress::Step { done, total }) {
            ControlFlow::Break(()) if done < total => {
                Err(Error::Cancelled(format!("stopped after {done} of {total} steps; no picture was made")))
            }
            // Nothing is left to break off.
            _ => Ok(()),
        })?;
        let mut output = Output { images: Vec::new(), latents: vec![0.0; latents.len()] };
        nhwc_to_nchw(&latents, size.0, size.1, &mut output.latents);
        for image in 0..self.options.batch {
            output.images.push(self.networks.picture(image, &run)?);
            let done = output.images.len();
            if progress(Progress::Decoded { done, total: self.options.batch }).is_break() && done < self.options.batch {
                break;
            }
        }
        Ok(output)
    }

    /// Writes what the UNet reads of the prompts and sizes (the unconditional rows first), and runs what depends on them alone.
    fn encode(&mut self, request: &Request) -> Result<()> {
        let SessionOptions { width, height, batch, guided, .. } = self.options;
        let prompts = [request.negative_prompt.as_deref(), Some(request.prompt.as_str())];
        let (prompts, rows) = if guided { (&prompts[..], &[0, 1][..]) } else { (&prompts[1..], &[0][..]) };
        let size = (width, height);
        let ids = time_ids(request.original_size.unwrap_or(size), request.crop, size);
        let conditioning = self.engine.0.text.condition(&mut self.text, prompts, ids)?.pick(rows, batch);
        for (name, values) in conditioning.inputs() {
            self.networks.write(name, values)?;
        }
        self.networks.prologue()
    }

    /// The request's own latents in NHWC, for images of `c` channels and so many pixels.
    fn given(&self, request: &Request, (c, pixels): (usize, usize)) -> Result<Option<Vec<f32>>> {
        let Some(given) = &request.latents else { return Ok(None) };
        let wanted = self.options.batch * c * pixels;
        if given.len() != wanted {
            return Err(Error::usage(format!(
                "the latents hold {} numbers where this size and batch have {wanted}",
                given.len()
            )));
        }
        let mut latents = vec![0.0; wanted];
        nchw_to_nhwc(given, c, pixels, &mut latents);
        Ok(Some(latents))
    }
}
