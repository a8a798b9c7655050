//! The images that a UNet works on at once: what a [`super::Session`] and a [`super::RunningBatch`] have in common.

use super::init_image::{Begun, EncodedPicture, InitImage, Original, nhwc};
use super::preview::PreviewVae;
use super::text::{Conditioning, Row, time_ids};
use super::{Engine, Image, Plans, Request, SessionOptions, Start};
use crate::backend::{AddedToBottleneck, Denoiser, Executor, Guidance, RunImage};
use crate::concept::Shift;
use crate::diffusion::noise::{NormalGenerator, Rng};
use crate::diffusion::scheduler::{SamplerChoice, Schedule};
use crate::graph::Shape;
use crate::image::Picture;
use crate::layout::nhwc_to_nchw;
use crate::models::MASK_AND_IMAGE;
use crate::{Error, Result, Subject};
use std::borrow::Cow;
use std::sync::Arc;

/// Steps that the host may run ahead of the device. They are few, so that reported progress is nearly true and a
/// cancelled run ends soon.
pub(super) const AHEAD: usize = 4;

/// The settings of a request that all its images share.
pub(super) struct Settings {
    /// All steps; an image that begins with a picture leaves out the first.
    schedule: Schedule,
    sampler: SamplerChoice,
    pub steps: usize,
    pub rng: Rng,
    /// The UNet's size conditioning.
    pub time_ids: [f32; 6],
}

impl Settings {
    /// # Errors
    /// Those of [`Engine::schedule`], and [`crate::ErrorKind::Invalid`] for sizes that the UNet does not read.
    pub fn new(engine: &Engine, options: SessionOptions, request: &Request) -> Result<Self> {
        if !engine.0.text.sized() && (request.original_size.is_some() || request.crop != (0, 0)) {
            let problem = "this checkpoint does not read the picture's sizes, as SDXL does";
            return Err(Error::invalid("original_size", problem).advise("leave original size and crop out"));
        }
        let size = (options.size.width, options.size.height);
        Ok(Settings {
            schedule: engine.schedule(request.sampler, request.steps)?,
            sampler: request.sampler,
            steps: request.steps,
            rng: request.rng,
            time_ids: time_ids(request.original_size.unwrap_or(size), request.crop, size),
        })
    }
}

impl Settings {
    /// The steps from `first` on.
    ///
    /// # Errors
    /// Those of [`Engine::schedule`].
    fn schedule(&self, engine: &Engine, first: usize) -> Result<Cow<'_, Schedule>> {
        Ok(match first {
            0 => Cow::Borrowed(&self.schedule),
            first => Cow::Owned(engine.0.outline.schedule_from(self.sampler, self.steps, first)?),
        })
    }
}

/// An image in a slot.
struct InWork {
    /// The encoded prompt and, for a UNet with guidance, the negative prompt.
    prompt: Conditioning,
    negative: Option<Conditioning>,
    time_ids: [f32; 6],
    guidance: f32,
    /// [`Begun::masked`].
    masked: Option<Arc<[f32]>>,
    done: usize,
    /// True for the steps in which it is guided, of all that it takes.
    guided: Vec<bool>,
}

impl InWork {
    /// True if its next step needs an unconditional row. Steps that reuse activations have the rows of the last whole
    /// step, so those up to the next whole one have the same.
    fn needs_guidance(&self, reuse: usize) -> bool {
        let whole = self.done / reuse * reuse;
        self.guided.iter().skip(whole).take(reuse).any(|&guided| guided)
    }
}

/// The conditioning of the rows of the UNet's batch.
struct Placed {
    /// The slots of the rows.
    slots: Vec<usize>,
    /// True if there are unconditional rows.
    guided: bool,
    /// The encodings of all rows.
    rows: Vec<Row>,
    /// The guidance scale of each row, if the UNet reads it.
    guidance: Vec<f32>,
    /// [`Begun::masked`] of each row, if the UNet reads it.
    masked: Vec<Arc<[f32]>>,
}

impl Placed {
    fn is(&self, other: &Placed) -> bool {
        let Placed { slots, guided, rows, guidance, masked } = other;
        let row = |((a, a_ids), (b, b_ids)): (&Row, &Row)| a.is(b) && a_ids == b_ids;
        let same_rows = self.rows.len() == rows.len() && self.rows.iter().zip(rows).all(row);
        let same_masked = self.masked.iter().zip(masked).all(|(a, b)| Arc::ptr_eq(a, b));
        self.slots == *slots && self.guided == *guided && self.guidance == *guidance && same_rows && same_masked
    }
}

/// The slots of the images, and the rows of the UNet's batch that serve them.
pub(super) struct Rows {
    engine: Engine,
    options: SessionOptions,
    denoiser: Box<dyn Denoiser>,
    images: Vec<Option<InWork>>,
    /// The conditioning that was written last.
    placed: Option<Placed>,
    /// For a UNet for inpainting: its mask and picture if an image begins with noise.
    blank: Option<EncodedPicture>,
    /// The VAE for previews with its memory, if the engine has one.
    preview: Option<(Arc<PreviewVae>, Box<dyn Executor>)>,
}

impl Rows {
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] when memory is short.
    pub fn new(engine: Engine, options: SessionOptions, plans: Plans) -> Result<Self> {
        let parts = &*engine.0;
        let vae = (plans.vae, &parts.vae);
        let denoiser = parts.device.denoiser(plans.unet, parts.unet.weights(), Some(vae))?;
        let preview = match parts.preview.clone().zip(plans.preview) {
            Some((vae, plan)) => Some((vae.clone(), parts.device.executor(plan, &vae.weights)?)),
            None => None,
        };
        let images = (0..options.batch).map(|_| None).collect();
        Ok(Rows { denoiser, engine, options, images, placed: None, blank: None, preview })
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub fn options(&self) -> SessionOptions {
        self.options
    }

    /// Goes over to another engine of the same checkpoint, which differs in its adapters. No image may be in work.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] for an engine of another checkpoint or device.
    pub fn switch(&mut self, engine: &Engine) -> Result<()> {
        let (own, other) = (&*self.engine.0, &*engine.0);
        if !own.unet.has_first_of(&other.unet) {
            let problem = "the engine is not one of the session's own, with other adapters";
            return Err(Error::mismatch(Subject::Run, problem).advise("make it of the session's by with_adapters"));
        }
        self.denoiser.switch(other.unet.weights())?;
        // What depends on the prompts alone depends on the weights as well.
        self.placed = None;
        self.engine = engine.clone();
        Ok(())
    }

    /// A slot without an image.
    pub fn free(&self) -> Option<usize> {
        self.images.iter().position(Option::is_none)
    }

    /// The slots with an image that has steps to take.
    pub fn active(&self) -> Vec<usize> {
        let unfinished = |image: &InWork| image.done < image.guided.len();
        (0..self.images.len()).filter(|&slot| self.images[slot].as_ref().is_some_and(unfinished)).collect()
    }

    /// The steps that an image has taken, and all that it takes.
    pub fn progress(&self, slot: usize) -> (usize, usize) {
        self.images[slot].as_ref().map_or((0, 0), |image| (image.done, image.guided.len()))
    }

    /// Checks that images which took no step yet can reuse activations of the same steps: if they reuse any at all,
    /// their rows must be the same in all steps.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`].
    pub fn check_reuse(&self) -> Result<()> {
        let SessionOptions { reuse, gate, .. } = self.options;
        let all = || self.images.iter().flatten().map(|image| &image.guided);
        let differ = |of: &dyn Fn(&Vec<bool>) -> usize| all().any(|guided| all().any(|other| of(guided) != of(other)));
        if (reuse > 1 || gate.is_some()) && differ(&Vec::len) {
            let problem = "images that take different numbers of steps cannot reuse activations together";
            return Err(Error::invalid("strength", problem).advise("give all the same, or make sessions of their own"));
        }
        // An unconditional prediction would be averaged into the outputs of an image that has none alone.
        let gate = |guided: &Vec<bool>| gate.filter(|&gate| gate < guided.len());
        let last = |guided: &Vec<bool>| gate(guided).map_or(0, |gate| usize::from(guided[gate - 1]));
        if differ(&last) {
            let problem = "images with guidance in the last step before the gate, and others without, cannot share it";
            return Err(Error::invalid("guidance", problem).advise("give all the same, or make sessions of their own"));
        }
        Ok(())
    }

    /// Checks an image's settings. What cannot be checked before an image joins is checked by [`Rows::join`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`].
    pub fn check(&self, image: &Image, settings: &Settings) -> Result<()> {
        let sampler = settings.schedule.sampler;
        let guidance = image.guidance.unwrap_or(sampler.default_guidance(self.engine.default_guidance()));
        if !guidance.is_finite() {
            return Err(Error::invalid("guidance", format!("{guidance} is not finite")).advise("7.5 is usual"));
        }
        if !(0.0..=1.0).contains(&image.guidance_rescale) {
            let problem = format!("{} is not possible", image.guidance_rescale);
            return Err(Error::invalid("guidance_rescale", problem).advise("give 0 to 1; 0.7 is usual"));
        }
        if image.guidance_interval.is_some_and(|(from, until)| from.is_nan() || until.is_nan()) {
            return Err(Error::invalid("guidance_interval", "NaN is no timestep").advise("give two timesteps"));
        }
        if sampler.guides(guidance) && !self.options.guided && !self.engine.reads_guidance() {
            let problem = format!("{guidance} in a session without guidance");
            return Err(Error::invalid("guidance", problem).advise("give 1, or make a session with guidance"));
        }
        if !image.concepts.is_empty() && !self.options.concepts {
            let problem = "an image has concepts in a session without them";
            return Err(Error::invalid("concepts", problem).advise("make a session with concepts"));
        }
        let wanted = self.latents_shape().len();
        let noise = match &image.start {
            Start::Noise => None,
            Start::Latents(given) => Some(given),
            Start::Image(init) => {
                init.first_step(settings.steps)?;
                init.noise.as_ref()
            }
        };
        match noise {
            Some(given) if given.len() != wanted => {
                let problem = format!("{} numbers, but an image of this size has {wanted}", given.len());
                Err(Error::invalid("latents", problem).advise("give [c, height / 8, width / 8] numbers"))
            }
            _ => Ok(()),
        }
    }

    /// Puts an image into a slot.
    ///
    /// # Errors
    /// Those of [`Rows::check`], of the concepts and the text encoder, and [`crate::ErrorKind::DeviceLost`].
    pub fn join(&mut self, slot: usize, image: &Image, settings: &Settings) -> Result<()> {
        self.check(image, settings)?;
        let sampler = settings.schedule.sampler;
        let scale = image.guidance.unwrap_or(sampler.default_guidance(self.engine.default_guidance()));
        let [prompt, negative] = self.engine.pair(image, sampler)?;
        for prompt in [&prompt, &negative] {
            if !self.options.chunks.is_multiple_of(prompt.chunks()) {
                let problem = format!(
                    "has {} chunks of tokens in a session whose prompts have {}",
                    prompt.chunks(),
                    self.options.chunks
                );
                return Err(Error::invalid("prompt", problem).advise("make a session for the image's own chunks"));
            }
        }
        let negative = self.engine.has_negatives(self.options).then_some(negative);
        let shift = self.options.concepts.then(|| Shift::new(self.engine.bottleneck(self.options), &image.concepts));
        let mut guidance = Guidance::new(if sampler.guides(scale) { scale } else { 1.0 });
        guidance.rescale = image.guidance_rescale;
        if let Some((a, b)) = image.guidance_interval {
            guidance.interval = (a.max(b), a.min(b));
        }
        let first = match &image.start {
            Start::Image(init) => init.first_step(settings.steps)?,
            _ => 0,
        };
        let schedule = settings.schedule(&self.engine, first)?;
        let gate = self.options.gate.unwrap_or(usize::MAX);
        let guides = |(i, step)| negative.is_some() && i < gate && guidance.at(step) != 1.0;
        let guided = schedule.steps.iter().enumerate().map(guides).collect();
        let begun = self.begin(&image.start, &schedule, NormalGenerator::new(settings.rng, image.seed))?;
        let Begun { latents, drawn, kept, masked } = begun;
        let run = RunImage {
            steps: schedule.steps.as_slice().into(),
            rng: settings.rng,
            seed: image.seed,
            drawn,
            guidance,
            sigma: schedule.init_noise_sigma,
            latents,
            kept,
            added: shift.transpose()?.map(|shift| Box::new(shift) as Box<dyn AddedToBottleneck>),
        };
        self.denoiser.begin(slot, run)?;
        let time_ids = settings.time_ids;
        self.images[slot] = Some(InWork { prompt, negative, time_ids, guidance: scale, masked, done: 0, guided });
        Ok(())
    }

    /// An image before the first step of its schedule.
    fn begin(&mut self, start: &Start, schedule: &Schedule, noise: NormalGenerator) -> Result<Begun> {
        let shape = self.latents_shape();
        let init = match start {
            Start::Image(init) => init,
            // A UNet that knows masks paints on an empty canvas.
            Start::Noise | Start::Latents(_) if self.engine.reads_masks() => {
                let blank = match &self.blank {
                    Some(blank) => blank,
                    None => self.blank.insert(self.engine.blank(self.options.size)?),
                };
                let init = InitImage::encoded(blank.clone(), 1.0);
                &match start {
                    Start::Latents(given) => init.noise(given.clone()),
                    _ => init,
                }
            }
            Start::Noise => return Ok(Begun::default()),
            Start::Latents(given) => {
                let latents = nhwc(shape, given).into_iter().map(|x| x * schedule.init_noise_sigma).collect();
                return Ok(Begun { latents: Some(latents), ..Begun::default() });
            }
        };
        let encoded = match &init.original {
            Original::Encoded(encoded) => encoded,
            Original::Picture { picture, mask } => {
                &self.engine.encode_picture(picture, mask.as_deref(), self.options.size)?
            }
        };
        encoded.begin(init, &self.engine, shape, schedule, noise)
    }

    /// Empties a slot.
    pub fn leave(&mut self, slot: usize) {
        self.images[slot] = None;
    }

    /// Takes a step of every image that has one to take.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`], and [`crate::ErrorKind::Mismatch`] for a prompt that another engine encoded.
    pub fn step(&mut self) -> Result<()> {
        let (active, SessionOptions { reuse, gate, .. }) = (self.active(), self.options);
        let guided = active.iter().any(|&slot| self.images[slot].as_ref().is_some_and(|i| i.needs_guidance(reuse)));
        self.place(&active, guided)?;
        let reuses = |done: usize| match gate {
            Some(gate) => done >= gate,
            None => !done.is_multiple_of(reuse),
        };
        let reusing = active.iter().all(|&slot| reuses(self.progress(slot).0));
        self.denoiser.step(reusing)?;
        for slot in active {
            self.images[slot].iter_mut().for_each(|image| image.done += 1);
        }
        Ok(())
    }

    /// Gives rows to slots and conditions them, if `guided` the unconditional rows first, unless they are so already.
    fn place(&mut self, slots: &[usize], guided: bool) -> Result<()> {
        let images = || slots.iter().filter_map(|&slot| self.images[slot].as_ref());
        // Rows without an image are conditioned as the last one with an image.
        let capacity = self.denoiser.capacity(slots.len());
        let filled = || images().chain(images().next_back().into_iter().cycle()).take(capacity);
        let without = filled().filter(|_| guided).filter_map(|image| Some((image.negative.clone()?, image.time_ids)));
        let rows: Vec<_> = without.chain(filled().map(|image| (image.prompt.clone(), image.time_ids))).collect();
        let guidance: Vec<f32> = match self.engine.reads_guidance() {
            true => filled().map(|image| image.guidance).collect(),
            false => Vec::new(),
        };
        // The same for each half of a guided batch.
        let masked = filled().filter_map(|image| image.masked.clone());
        let masked = masked.clone().chain(masked.take(rows.len() - capacity)).collect();
        let placed = Placed { slots: slots.to_vec(), guided, rows, guidance, masked };
        if !self.placed.as_ref().is_some_and(|last| last.is(&placed)) {
            // A failure leaves the inputs half written.
            self.placed = None;
            let mut inputs = self.engine.0.text.inputs(&placed.rows, self.options.chunks)?;
            inputs.extend(self.engine.guidance_input(placed.guidance.iter().copied()));
            if !placed.masked.is_empty() {
                inputs.push((MASK_AND_IMAGE, placed.masked.iter().flat_map(|pixels| pixels.iter().copied()).collect()));
            }
            self.denoiser.place(slots, guided, &inputs)?;
            self.placed = Some(placed);
        }
        Ok(())
    }

    /// Waits for the device, and checks an image's latents.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`], [`crate::ErrorKind::DeviceLost`].
    pub fn check_latents(&mut self, slot: usize) -> Result<()> {
        let (_, total) = self.progress(slot);
        match self.denoiser.fault(slot)? {
            None => Ok(()),
            Some(step) => Err(Error::non_finite(format!("step {} of {total} gave NaN or infinite latents", step + 1))
                .advise("lower the guidance or the weights of concepts, take more steps or another sampler")),
        }
    }

    /// An image's latents, `[c, height / 8, width / 8]`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`].
    pub fn latents(&mut self, slot: usize) -> Result<Vec<f32>> {
        let (shape, latents) = (self.latents_shape(), self.denoiser.latents(slot)?);
        let mut nchw = vec![0.0; latents.len()];
        nhwc_to_nchw(&latents, shape.c, shape.tokens(), &mut nchw);
        Ok(nchw)
    }

    /// A rough picture of an image, without the checkpoint's VAE.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`], [`crate::ErrorKind::DeviceLost`].
    pub fn preview(&mut self, slot: usize) -> Result<Picture> {
        let Shape { h, w, .. } = self.latents_shape();
        let latents = self.denoiser.latents(slot)?;
        match &mut self.preview {
            Some((vae, executor)) => vae.picture(&mut **executor, &latents),
            None => self.engine.projection()?.picture(&latents, h, w),
        }
    }

    /// Decodes an image.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`], [`crate::ErrorKind::DeviceLost`].
    pub fn picture(&mut self, slot: usize) -> Result<Picture> {
        self.denoiser.picture(slot, self.engine.0.outline.vae.scaling_factor)
    }

    /// Shape of one image's latents.
    fn latents_shape(&self) -> Shape {
        let [_, c, h, w] = self.engine.latent_shape(self.options);
        Shape::new(1, h, w, c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::backend::Weights;
    use crate::engine::Size;
    use crate::weights::Source;
    use std::sync::Mutex;

    /// A denoiser that notes of every step if there were unconditional rows.
    struct Noting {
        of: Box<dyn Denoiser>,
        guided: bool,
        steps: Arc<Mutex<Vec<bool>>>,
    }

    impl Denoiser for Noting {
        fn capacity(&self, images: usize) -> usize {
            self.of.capacity(images)
        }

        fn begin(&mut self, slot: usize, image: RunImage) -> Result<()> {
            self.of.begin(slot, image)
        }

        fn place(&mut self, slots: &[usize], guided: bool, inputs: &[(&'static str, Vec<f32>)]) -> Result<()> {
            self.guided = guided;
            self.of.place(slots, guided, inputs)
        }

        fn step(&mut self, reusing: bool) -> Result<()> {
            self.steps.lock().unwrap().push(self.guided);
            self.of.step(reusing)
        }

        fn switch(&mut self, weights: &Weights) -> Result<()> {
            self.of.switch(weights)
        }

        fn fault(&mut self, slot: usize) -> Result<Option<usize>> {
            self.of.fault(slot)
        }

        fn latents(&mut self, slot: usize) -> Result<Vec<f32>> {
            self.of.latents(slot)
        }

        fn picture(&mut self, slot: usize, scaling_factor: f32) -> Result<Picture> {
            self.of.picture(slot, scaling_factor)
        }
    }

    /// The latents of two images, and for each step if it had unconditional rows.
    fn run(engine: &Engine, options: SessionOptions, images: &[Image; 2]) -> ([Vec<f32>; 2], Vec<bool>) {
        let request = Request::new(images.to_vec()).steps(6).sampler("ddim".parse().unwrap());
        let settings = Settings::new(engine, options, &request).unwrap();
        let rows = Rows::new(engine.clone(), options, engine.plans(options, &[2]).unwrap()).unwrap();
        let steps = Arc::new(Mutex::new(Vec::new()));
        let noting = Noting { of: rows.denoiser, guided: false, steps: steps.clone() };
        let mut rows = Rows { denoiser: Box::new(noting), ..rows };
        for (slot, image) in images.iter().enumerate() {
            rows.join(slot, image, &settings).unwrap();
        }
        while !rows.active().is_empty() {
            rows.step().unwrap();
        }
        let latents = [0, 1].map(|slot| rows.latents(slot).unwrap());
        (latents, steps.lock().unwrap().clone())
    }

    /// Unconditional rows are computed only where an image is guided, and make no difference to one that is not.
    #[test]
    fn only_guided_steps_have_unconditional_rows() {
        let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/checkpoints/sd1");
        let devices = [
            Device::cpu(),
            #[cfg(feature = "emulated")]
            Device::kernels(crate::cuda::Emulated::new(crate::cuda::Limits::A100, crate::cuda::Emulated::QUICK)),
        ];
        for device in devices {
            let engine = Engine::open(&Source::folder(checkpoint).unwrap(), device).unwrap();
            let schedule = engine.schedule("ddim".parse().unwrap(), 6).unwrap();
            let of_steps = |first: usize, last: usize| (schedule.steps[first].timestep, schedule.steps[last].timestep);
            let image = Image::new("a cat").guidance(2.0).seed(5);
            let other = |guidance| Image::new("a hat").negative("a dog").guidance(guidance).seed(6);
            let options = SessionOptions::new(Size::new(40, 56)).batch(2).concepts(true);
            let cases = [
                (1, of_steps(1, 2), [false, true, true, false, false, false]),
                (1, of_steps(4, 5), [false, false, false, false, true, true]),
                // The rows stay the same from one whole step to the next.
                (2, of_steps(1, 2), [true, true, true, true, false, false]),
                (4, of_steps(0, 0), [true, true, true, true, false, false]),
            ];
            // The emulator is slow.
            let cases = if engine.device().is_cpu() { &cases[..] } else { &cases[..1] };
            for &(reuse, interval, expected) in cases {
                let image = image.clone().guidance_interval(interval);
                let ([few, _], steps) = run(&engine, options.reuse(reuse), &[image.clone(), other(1.0)]);
                assert_eq!(steps, expected, "reuse {reuse}, interval {interval:?}");
                let ([all, _], steps) = run(&engine, options.reuse(reuse), &[image.clone(), other(1.5)]);
                assert_eq!(steps, [true; 6]);
                assert!(few == all, "reuse {reuse}, interval {interval:?}: other latents");
                let ([never, _], steps) = run(&engine, options.reuse(reuse), &[image.guidance(1.0), other(1.0)]);
                assert_eq!(steps, [false; 6]);
                assert!(few != never, "reuse {reuse}, interval {interval:?}: guidance changes nothing");
            }
        }
    }
}
