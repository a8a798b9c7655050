//! Sampling: plans for one size and batch, run from prompts to pictures.

use super::denoiser::{Denoiser, Run, Start};
use super::on_cpu::{CpuDenoiser, OnCpu};
use super::on_cuda::{CudaDenoiser, OnCuda};
use super::text::time_ids;
use super::{Engine, Output, Plans, Progress, Request, SessionOptions};
use crate::device::Executor;
use crate::graph::Shape;
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
    text: Vec<Executor>,
    networks: Box<dyn Networks>,
}

/// Steps the host may run ahead of the device: what is told of progress stays true, and Ctrl-C is heard.
const AHEAD: usize = 4;

/// The UNet and the VAE of a session, on a device.
pub(super) trait Networks: Send {
    /// The UNet with its sampler.
    fn denoiser(&mut self) -> &mut dyn Denoiser;

    /// Decodes an image of the denoiser's last run, whose latents are the VAE's times `scaling_factor`.
    fn picture(&mut self, image: usize, scaling_factor: f32) -> Result<Image>;
}

/// Shape of a picture.
pub(super) fn picture_shape(vae: &Plan) -> Shape {
    vae.graph().shape(vae.graph().output("image"))
}

impl Session {
    pub(super) fn new(engine: Engine, options: SessionOptions, plans: Plans) -> Result<Self> {
        let parts = &*engine.0;
        let text = parts.text.executors(&parts.device, plans.text)?;
        let unet = parts.device.executor(plans.unet, &parts.unet.weights)?;
        let vae = parts.device.executor(plans.vae, &parts.vae.weights)?;
        let networks: Box<dyn Networks> = match (unet, vae) {
            (Executor::Cpu(unet), Executor::Cpu(vae)) => Box::new(OnCpu { denoiser: CpuDenoiser::new(unet), vae }),
            (Executor::Cuda(unet), Executor::Cuda(vae)) => {
                Box::new(OnCuda::new(CudaDenoiser::new(unet, options.batch)?, vae)?)
            }
            _ => return Err(Error::internal("the UNet and the VAE are on different devices")),
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
            return Err(Error::invalid(
                "guidance",
                format!(
                    "guidance {} is not possible here: give a number, and a guided session for one above 1",
                    request.guidance
                ),
            ));
        }
        if !request.concepts.is_empty() && (!self.options.concepts || request.concepts.len() != self.options.batch) {
            return Err(Error::invalid(
                "concepts",
                format!(
                    "concepts for {} images, where the session is for {}{}",
                    request.concepts.len(),
                    self.options.batch,
                    if self.options.concepts { "" } else { " without concepts" }
                ),
            )
            .advise("list the concepts of every image"));
        }
        if !self.engine.0.text.sized() && (request.original_size.is_some() || request.crop != (0, 0)) {
            let problem =
                "this checkpoint does not read the picture's sizes, as SDXL does; leave original size and crop out";
            return Err(Error::invalid("original_size", problem));
        }
        let shift = || Shift::new(self.engine.bottleneck(self.options), self.options.batch, &request.concepts);
        let shift = self.options.concepts.then(shift).transpose()?;
        self.encode(request)?;
        let vae = &self.engine.0.vae.config;
        let size = (vae.latent_channels, self.options.width / vae.scale() * (self.options.height / vae.scale()));
        let sigma = schedule.init_noise_sigma;
        let run = Run {
            steps: &schedule.steps,
            guidance: request.guidance,
            guided,
            shift: shift.as_ref(),
            start: self.given(request, size, sigma)?.map_or(Start::Noise(sigma), Start::Latents),
            seed: request.seed,
            rng: request.rng,
            batch: self.options.batch,
            size,
            ahead: AHEAD,
        };
        let total = schedule.steps.len();
        let latents =
            self.networks.denoiser().sample(&run, &mut |done| match progress(Progress::Step { done, total }) {
                ControlFlow::Break(()) if done < total => {
                    Err(Error::cancelled(format!("stopped after {done} of {total} steps, with no picture made")))
                }
                // Nothing is left to break off.
                _ => Ok(()),
            })?;
        let mut output = Output { images: Vec::new(), latents: vec![0.0; latents.len()] };
        nhwc_to_nchw(&latents, size.0, size.1, &mut output.latents);
        for image in 0..self.options.batch {
            output.images.push(self.networks.picture(image, vae.scaling_factor)?);
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
        self.networks.denoiser().condition(&conditioning.inputs())
    }

    /// The request's own noise times `sigma` in NHWC, for images of `c` channels and so many pixels.
    fn given(&self, request: &Request, (c, pixels): (usize, usize), sigma: f32) -> Result<Option<Vec<f32>>> {
        let Some(given) = &request.latents else { return Ok(None) };
        let wanted = self.options.batch * c * pixels;
        if given.len() != wanted {
            return Err(Error::invalid(
                "latents",
                format!("the latents hold {} numbers where this size and batch have {wanted}", given.len()),
            ));
        }
        let mut latents = vec![0.0; wanted];
        nchw_to_nhwc(given, c, pixels, &mut latents);
        latents.iter_mut().for_each(|x| *x *= sigma);
        Ok(Some(latents))
    }
}
