//! Sampling on the kernels: the latents stay on the device, and one recording serves every step of every request.

use super::session::{Networks, Noise, Run};
use crate::cuda::{Buffer, DeviceSampler, Executor, Recording, StepNoise};
use crate::diffusion::noise::Rng;
use crate::graph::Shape;
use crate::image::Image;
use crate::plan::Plan;
use crate::{Error, Result};

/// Most UNet calls of a run.
const CAPACITY: usize = 4096;
/// Steps the host may run ahead of the device: what is told of progress stays true, and Ctrl-C is heard.
const AHEAD: usize = 4;

/// The UNet and the VAE on the kernels.
pub(super) struct OnCuda {
    unet: Executor,
    vae: Executor,
    sampler: DeviceSampler,
    /// One picture's bytes.
    rgb: Buffer,
    /// Preparing the UNet's inputs, the UNet, guidance and the sampler's step; made at the first run.
    step: Option<Box<dyn Recording>>,
}

impl OnCuda {
    /// # Errors
    /// [`Error::Device`] when memory is short.
    pub fn new(unet: Executor, vae: Executor, batch: usize) -> Result<Self> {
        let rgb = Buffer::new(unet.device(), picture_bytes(vae.plan()))?;
        let sampler = DeviceSampler::new(unet.device(), latents_shape(unet.plan(), batch), CAPACITY)?;
        Ok(OnCuda { unet, vae, sampler, rgb, step: None })
    }

    /// Bytes of the device's memory beside the arenas of the networks, for images of these plans.
    pub fn own_bytes(unet: &Plan, vae: &Plan, batch: usize) -> usize {
        DeviceSampler::bytes(latents_shape(unet, batch), CAPACITY) + picture_bytes(vae)
    }

    fn record(&self, guided: bool) -> Result<Box<dyn Recording>> {
        let (sample, timestep) = (self.unet.input_address("sample"), self.unet.input_address("timestep"));
        let mut launches = vec![self.sampler.prepare(sample, timestep, guided)];
        launches.extend_from_slice(self.unet.step_launches());
        launches.push(self.sampler.guide_and_step(self.unet.output_address("sample"), guided));
        // SAFETY: the launches use the UNet's arena and weights and the sampler's memory, all owned by `self`.
        unsafe { self.unet.device().clone().record(&launches) }
    }
}

/// Shape of a batch's latents; the UNet's own batch is twice as large with guidance.
fn latents_shape(unet: &Plan, batch: usize) -> Shape {
    let graph = unet.graph();
    Shape { n: batch, ..graph.shape(graph.input("sample")) }
}

/// Bytes of one picture.
fn picture_bytes(vae: &Plan) -> usize {
    vae.graph().shape(vae.graph().output("image")).len()
}

impl Networks for OnCuda {
    fn write(&mut self, input: &str, values: &[f32]) -> Result<()> {
        self.unet.write(input, values)
    }

    fn prologue(&mut self) -> Result<()> {
        self.unet.prologue()
    }

    fn sample(&mut self, run: &Run, check: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<f32>> {
        let steps = &run.schedule.steps;
        if steps.len() > CAPACITY {
            return Err(Error::usage(format!("{} steps are too many; take {CAPACITY} at most", steps.len())));
        }
        if !run.shift.is_constant() {
            return Err(Error::Device(
                "concepts that are networks (mlp, conv) run on the CPU; use --device cpu".into(),
            ));
        }
        let mut noise = Noise::new(run);
        let drawn = run.rng == Rng::TorchCuda;
        let begun = u32::from(run.given.is_none());
        let step_noise = if drawn { StepNoise::Drawn { seed: run.seed, drawn: begun } } else { StepNoise::Written };
        self.sampler.begin(steps, run.guidance, step_noise)?;
        if drawn && run.given.is_none() {
            let launch = self.sampler.draw(run.seed, run.schedule.init_noise_sigma);
            // SAFETY: the launch uses the sampler's memory alone.
            unsafe { self.unet.device().run(&[launch])? };
        } else {
            self.sampler.write_latents(&run.start(&mut noise))?;
        }
        let recording = match self.step.take() {
            Some(recording) => recording,
            None => self.record(run.guided)?,
        };
        let recording = &*self.step.insert(recording);
        let mut fresh = vec![0.0; run.batch * run.latents.0 * run.latents.1];
        for (done, step) in steps.iter().enumerate() {
            check(done)?;
            if step.needs_noise() && !drawn {
                noise.draw(&mut fresh);
                self.sampler.write_noise(&fresh)?;
            }
            recording.replay()?;
            let waits = (done + 1).is_multiple_of(AHEAD) || done + 1 == steps.len();
            if waits && let Some(step) = self.sampler.fault()? {
                return Err(run.non_finite(step));
            }
        }
        check(steps.len())?;
        self.sampler.read_latents()
    }

    fn picture(&mut self, image: usize, run: &Run) -> Result<Image> {
        let device = self.unet.device();
        let first = self.sampler.latents_for_vae(image, run.scaling_factor, self.vae.input_address("latents"));
        let last = self.sampler.to_rgb8(self.vae.output_address("image"), self.rgb.len(), self.rgb.address());
        // SAFETY: the launches use the sampler's memory, the VAE's arena and `rgb`, all owned by `self`.
        unsafe { device.run(&[first])? };
        self.vae.step()?;
        // SAFETY: as above.
        unsafe { device.run(&[last])? };
        let mut rgb = vec![0; self.rgb.len()];
        self.rgb.read(0, &mut rgb)?;
        if self.sampler.picture_fault()? {
            return Err(Error::NonFinite("the VAE gave NaN or infinity; no picture is made of it".into()));
        }
        Ok(Image { width: run.width as u32, height: run.height as u32, rgb })
    }
}
