//! Sessions: plans for one size and batch, run from prompts to pictures.

use super::text::{Conditioning, time_ids};
use super::{Engine, Image, Output, Plans, Progress, Prompt, Request, SessionOptions, Size, Start};
use crate::backend::{AddedToBottleneck, Denoiser, Run, RunImage};
use crate::concept::Shift;
use crate::graph::Shape;
use crate::layout::{nchw_to_nhwc, nhwc_to_nchw};
use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::ControlFlow;

/// An engine's plans for one size and batch: warm, and free of allocations while it steps. It is [`Send`]: a server may
/// move it between threads, and several sessions of one engine may run at once.
pub struct Session {
    engine: Engine,
    options: SessionOptions,
    denoiser: Box<dyn Denoiser>,
    /// The UNet's rows as they were conditioned last.
    conditioned: Option<(Vec<Conditioning>, [f32; 6])>,
}

/// Steps that the host may run ahead of the device. They are few, so that reported progress is nearly true and a
/// cancelled run ends soon.
const AHEAD: usize = 4;

impl Session {
    pub(super) fn new(engine: Engine, options: SessionOptions, plans: Plans) -> Result<Self> {
        let parts = &*engine.0;
        let (unet, vae) = ((plans.unet, &parts.unet.weights), (plans.vae, &parts.vae.weights));
        let denoiser = parts.device.denoiser(unet, options.batch, Some(vae))?;
        Ok(Session { denoiser, engine, options, conditioned: None })
    }

    /// The options that it was made with.
    pub fn options(&self) -> SessionOptions {
        self.options
    }

    /// Makes the pictures of a request with as many images as [`SessionOptions::batch`]. `progress` is called with
    /// every step and every decoded picture, and may end the run. If it does so while pictures are decoded, the output
    /// holds those that are done.
    ///
    /// A picture is the same to the last bit whatever else is in its batch.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a request that cannot be served, [`crate::ErrorKind::Mismatch`] for a concept
    /// or an encoded prompt of another model, [`crate::ErrorKind::Cancelled`] when `progress` breaks,
    /// [`crate::ErrorKind::NonFinite`] when the network leaves the range of numbers, and
    /// [`crate::ErrorKind::DeviceLost`].
    pub fn generate(
        &mut self,
        request: &Request,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Output> {
        let SessionOptions { batch, guided, concepts, .. } = self.options;
        let schedule = self.engine.schedule(request.sampler, request.steps)?;
        if request.images.len() != batch {
            let problem = format!("{} images in a session for {batch}", request.images.len());
            return Err(Error::invalid("images", problem).advise("give as many as the session's batch"));
        }
        if !self.engine.0.text.sized() && (request.original_size.is_some() || request.crop != (0, 0)) {
            let problem = "this checkpoint does not read the picture's sizes, as SDXL does";
            return Err(Error::invalid("original_size", problem).advise("leave original size and crop out"));
        }
        let images = request.images.iter().map(|image| self.check(image)).collect::<Result<Vec<_>>>()?;
        let lists: Vec<&[_]> = request.images.iter().map(|image| &image.concepts[..]).collect();
        let shift = concepts.then(|| Shift::new(self.engine.bottleneck(self.options), &lists)).transpose()?;
        self.condition(request)?;
        let shape = self.latents();
        let run = Run {
            steps: &schedule.steps,
            images: &start(images, schedule.init_noise_sigma),
            guided,
            added: shift.as_ref().map(|shift| shift as &dyn AddedToBottleneck),
            sigma: schedule.init_noise_sigma,
            rng: request.rng,
            shape,
            ahead: AHEAD,
        };
        let total = schedule.steps.len();
        let latents = self.denoiser.sample(&run, &mut |done| match progress(Progress::Step { done, total }) {
            ControlFlow::Break(()) if done < total => {
                Err(Error::cancelled(format!("stopped after {done} of {total} steps, with no picture made")))
            }
            // After the last step nothing is left to cancel.
            _ => Ok(()),
        })?;
        let mut output = Output { pictures: Vec::new(), latents: vec![0.0; latents.len()] };
        nhwc_to_nchw(&latents, shape.c, shape.tokens(), &mut output.latents);
        for image in 0..batch {
            output.pictures.push(self.denoiser.picture(image, self.engine.0.vae.config.scaling_factor)?);
            let done = output.pictures.len();
            if progress(Progress::Decoded { done, total: batch }).is_break() && done < batch {
                break;
            }
        }
        Ok(output)
    }

    /// Shape of one image's latents.
    fn latents(&self) -> Shape {
        let [_, c, h, w] = self.engine.latent_shape(self.options);
        Shape::new(1, h, w, c)
    }

    /// Checks an image's settings. The result holds its unit noise in NHWC, if the image brings its own.
    fn check(&self, image: &Image) -> Result<RunImage> {
        let guidance = image.guidance.unwrap_or(self.engine.default_guidance());
        if !guidance.is_finite() {
            return Err(Error::invalid("guidance", format!("{guidance} is not finite")).advise("7.5 is usual"));
        }
        if guidance > 1.0 && !self.options.guided {
            let problem = format!("{guidance} in a session without guidance");
            return Err(Error::invalid("guidance", problem).advise("give 1, or make a session with guidance"));
        }
        if !image.concepts.is_empty() && !self.options.concepts {
            let problem = "an image has concepts in a session without them";
            return Err(Error::invalid("concepts", problem).advise("make a session with concepts"));
        }
        let latents = match &image.start {
            Start::Noise => None,
            Start::Latents(given) => {
                let shape = self.latents();
                if given.len() != shape.len() {
                    let problem = format!("{} numbers, but an image of this size has {}", given.len(), shape.len());
                    return Err(Error::invalid("latents", problem).advise("give [c, height / 8, width / 8] numbers"));
                }
                let mut latents = vec![0.0; shape.len()];
                nchw_to_nhwc(given, shape.c, shape.tokens(), &mut latents);
                Some(latents)
            }
        };
        Ok(RunImage { seed: image.seed, guidance: guidance.max(1.0), latents })
    }

    /// Writes the UNet's inputs for the prompts and sizes (the unconditional rows first), and runs the nodes that
    /// depend on them alone, unless the last request had the same encodings and sizes.
    fn condition(&mut self, request: &Request) -> Result<()> {
        let text = &self.engine.0.text;
        let mut texts = HashMap::new();
        let mut encode = |prompt: Option<&Prompt>| match prompt {
            None => text.encode(None),
            Some(Prompt::Encoded(conditioning)) => Ok(conditioning.clone()),
            Some(Prompt::Text(words)) => match texts.get(words) {
                Some(conditioning) => Ok(Conditioning::clone(conditioning)),
                None => Ok(texts.entry(words.clone()).insert_entry(text.encode(Some(words))?).get().clone()),
            },
        };
        let mut rows = Vec::new();
        if self.options.guided {
            for image in &request.images {
                rows.push(encode(image.negative.as_ref())?);
            }
        }
        for image in &request.images {
            rows.push(encode(Some(&image.prompt))?);
        }
        let Size { width, height } = self.options.size;
        let size = (width, height);
        let ids = time_ids(request.original_size.unwrap_or(size), request.crop, size);
        let same = |(last, last_ids): &(Vec<Conditioning>, _)| {
            *last_ids == ids && last.iter().zip(&rows).all(|(last, row)| last.is(row))
        };
        if !self.conditioned.as_ref().is_some_and(same) {
            // A failure leaves the inputs half written.
            self.conditioned = None;
            self.denoiser.condition(&text.inputs(&rows, ids)?)?;
            self.conditioned = Some((rows, ids));
        }
        Ok(())
    }
}

/// Scales the unit noise that images bring to the first noise level.
fn start(mut images: Vec<RunImage>, sigma: f32) -> Vec<RunImage> {
    images.iter_mut().filter_map(|image| image.latents.as_mut()).flatten().for_each(|x| *x *= sigma);
    images
}

// Sessions are made for servers, which move them between threads and share engines.
const _: () = {
    const fn is_send<T: Send>() {}
    const fn is_shared<T: Send + Sync>() {}
    is_send::<Session>();
    is_shared::<Engine>();
    is_shared::<Conditioning>();
};
