//! Sampling: plans for one size and batch, run from prompts to pictures.

use super::{Engine, Output, Progress, Request, SessionOptions};
use crate::device::Executor;
use crate::diffusion::noise::NormalGenerator;
use crate::diffusion::scheduler::{SamplerState, Schedule};
use crate::image::Image;
use crate::layout::{nchw_to_nhwc, nhwc_to_nchw};
use crate::plan::Plan;
use crate::respodiff::Shift;
use crate::{Error, Result};
use std::ops::ControlFlow;

/// An engine's plans for one size and batch: warm, and free of allocations while it steps.
pub struct Session {
    engine: Engine,
    options: SessionOptions,
    text: Executor,
    unet: Executor,
    vae: Executor,
}

impl Session {
    pub(super) fn new(engine: Engine, options: SessionOptions, plans: [Plan; 3]) -> Result<Self> {
        let [text, unet, vae] = plans;
        let parts = &*engine.0;
        Ok(Session {
            text: parts.device.executor(text, &parts.text.weights)?,
            unet: parts.device.executor(unet, &parts.unet.weights)?,
            vae: parts.device.executor(vae, &parts.vae.weights)?,
            engine,
            options,
        })
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
        let shift = Shift::new(self.engine.bottleneck(self.options), self.options.batch, &request.concepts)?;
        if self.options.concepts {
            self.unet.write("shift", shift.constant())?;
        }
        self.encode(request)?;
        let mut noise = Noise {
            generators: (0..self.options.batch as u64)
                .map(|i| NormalGenerator::new(request.rng, request.seed.wrapping_add(i)))
                .collect(),
            size: self.latent_size(),
        };
        let mut latents = self.initial_latents(request, &mut noise)?;
        latents.iter_mut().for_each(|x| *x *= schedule.init_noise_sigma);
        self.denoise(&schedule, request.guidance, &shift, &mut noise, &mut latents, progress)?;
        let (c, pixels) = self.latent_size();
        let mut output = Output { images: Vec::new(), latents: vec![0.0; latents.len()] };
        nhwc_to_nchw(&latents, c, pixels, &mut output.latents);
        let scale = self.engine.0.vae.config.scaling_factor;
        latents.iter_mut().for_each(|x| *x /= scale);
        for latents in latents.chunks_exact(c * pixels) {
            self.vae.write("latents", latents)?;
            self.vae.step()?;
            let image = Image::from_hwc(&self.vae.read("image")?, self.options.height, self.options.width)?;
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
        let states = self.engine.clone().encode(&mut self.text, prompts)?;
        let rows = states.chunks_exact(states.len() / prompts.len()).map(|row| row.repeat(self.options.batch));
        self.unet.write("encoder_hidden_states", &rows.collect::<Vec<_>>().concat())?;
        self.unet.prologue()
    }

    fn initial_latents(&self, request: &Request, noise: &mut Noise) -> Result<Vec<f32>> {
        let (c, pixels) = self.latent_size();
        let mut latents = vec![0.0; self.options.batch * c * pixels];
        match &request.latents {
            Some(given) if given.len() != latents.len() => {
                return Err(Error::usage(format!(
                    "the latents hold {} numbers where this size and batch have {}",
                    given.len(),
                    latents.len()
                )));
            }
            Some(given) => nchw_to_nhwc(given, c, pixels, &mut latents),
            None => noise.draw(&mut latents),
        }
        Ok(latents)
    }

    /// The sampling loop, on latents `[batch, h, w, c]`.
    fn denoise(
        &mut self,
        schedule: &Schedule,
        guidance: f32,
        shift: &Shift,
        noise: &mut Noise,
        latents: &mut [f32],
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<()> {
        let total = schedule.steps.len();
        let mut check = |done: usize| match progress(Progress::Step { done, total }) {
            ControlFlow::Break(()) if done < total => {
                Err(Error::Cancelled(format!("stopped after {done} of {total} steps; no picture was made")))
            }
            _ => Ok(()),
        };
        let non_finite = |done: usize| {
            Error::NonFinite(format!(
                "step {} of {total} gave NaN or infinite latents; lower the guidance, take more steps or another scheduler",
                done + 1
            ))
        };
        let Executor::Cpu(unet) = &mut self.unet else { todo!() };
        let mut state = SamplerState::new(latents.len());
        let (mut prediction, mut fresh) = (vec![0.0; latents.len()], vec![0.0; latents.len()]);
        for (done, step) in schedule.steps.iter().enumerate() {
            check(done)?;
            for half in unet.input_mut("sample").chunks_exact_mut(latents.len()) {
                half.iter_mut().zip(&*latents).for_each(|(s, x)| *s = x * step.input_scale);
            }
            unet.input_mut("timestep").fill(step.timestep);
            match shift.is_constant() {
                true => unet.step(),
                false => unet.step_shifting(|mid, out| shift.follow(mid, out)),
            }
            let out = unet.output("sample");
            if self.options.guided {
                let (without, with) = out.split_at(latents.len());
                for ((p, u), c) in prediction.iter_mut().zip(without).zip(with) {
                    *p = u + guidance * (c - u);
                }
            } else {
                prediction.copy_from_slice(out);
            }
            if step.needs_noise() {
                noise.draw(&mut fresh);
            }
            state.step(step, &prediction, latents, if step.needs_noise() { &fresh } else { &[] });
            if !latents.iter().all(|x| x.is_finite()) {
                return Err(non_finite(done));
            }
        }
        check(total)
    }
}

/// Normal numbers for each image from its own generator.
struct Noise {
    generators: Vec<NormalGenerator>,
    /// Channels and pixels of an image.
    size: (usize, usize),
}

impl Noise {
    /// Draws in NCHW, as diffusers does, and writes NHWC.
    fn draw(&mut self, out: &mut [f32]) {
        let (c, pixels) = self.size;
        let mut draft = vec![0.0; c * pixels];
        for (generator, out) in self.generators.iter_mut().zip(out.chunks_exact_mut(c * pixels)) {
            generator.fill(&mut draft);
            nchw_to_nhwc(&draft, c, pixels, out);
        }
    }
}
