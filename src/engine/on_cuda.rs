//! The [`Denoiser`] and the [`Networks`] of the kernels: the latents stay on the device, and one recording serves every
//! step of every request.

use super::run::{Denoiser, Networks, Noise, Run, picture_shape};
use crate::cuda::{Buffer, CudaExecutor, DeviceSampler, Recording, SampledImage};
use crate::diffusion::noise::Rng;
use crate::graph::Shape;
use crate::image::Picture;
use crate::plan::Plan;
use crate::{Error, Result, Subject};

/// Largest number of UNet calls in a run.
const CAPACITY: usize = 4096;

/// The UNet and its sampler on the kernels.
pub(super) struct CudaDenoiser {
    unet: CudaExecutor,
    sampler: DeviceSampler,
    /// The launches that prepare the UNet's inputs, those of the UNet, and that of guidance and the sampler's step;
    /// recorded at the first run.
    step: Option<Box<dyn Recording>>,
}

impl CudaDenoiser {
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] when memory is short.
    pub fn new(unet: CudaExecutor, batch: usize) -> Result<Self> {
        let sampler = DeviceSampler::new(unet.device(), latents_shape(unet.plan(), batch), CAPACITY)?;
        Ok(CudaDenoiser { unet, sampler, step: None })
    }

    /// Bytes of the sampler's memory, for a UNet of this plan.
    pub fn sampler_bytes(unet: &Plan, batch: usize) -> usize {
        DeviceSampler::bytes(latents_shape(unet, batch), CAPACITY)
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

impl Denoiser for CudaDenoiser {
    fn condition(&mut self, inputs: &[(&'static str, Vec<f32>)]) -> Result<()> {
        for (name, values) in inputs {
            self.unet.write(name, values)?;
        }
        self.unet.prologue()
    }

    fn sample(&mut self, run: &Run, check: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<f32>> {
        let steps = run.steps;
        if steps.len() > CAPACITY {
            return Err(Error::invalid("steps", format!("{} steps are too many", steps.len()))
                .advise(format!("take {CAPACITY} at most")));
        }
        if let Some(shift) = run.shift {
            if !shift.is_constant() {
                let problem = "concepts that are networks (mlp, conv) run on the CPU alone";
                return Err(Error::unsupported(Subject::Device, problem).advise("choose the CPU"));
            }
            self.unet.write("shift", shift.constant())?;
        }
        let mut noise = Noise::new(run);
        let drawn = run.rng == Rng::TorchCuda;
        let images = run.images.iter().map(|image| SampledImage {
            seed: image.seed,
            guidance: image.guidance,
            // If latents are given, the first step that needs noise uses the seed's first draw.
            drawn: image.latents.is_none().into(),
        });
        self.sampler.begin(steps, &images.collect::<Vec<_>>(), drawn)?;
        if drawn && run.images.iter().all(|image| image.latents.is_none()) {
            let launch = self.sampler.draw(run.sigma);
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
        let mut fresh = vec![0.0; run.images.len() * run.shape.len()];
        for (done, step) in steps.iter().enumerate() {
            check(done)?;
            if step.needs_noise() && !drawn {
                noise.draw_all(&mut fresh);
                self.sampler.write_noise(&fresh)?;
            }
            recording.replay()?;
            let waits = (done + 1).is_multiple_of(run.ahead) || done + 1 == steps.len();
            if waits && let Some(step) = self.sampler.fault()? {
                return Err(run.non_finite(step));
            }
        }
        check(steps.len())?;
        self.sampler.read_latents()
    }
}

/// The UNet and the VAE on the kernels.
pub(super) struct OnCuda {
    denoiser: CudaDenoiser,
    vae: CudaExecutor,
    /// One picture's bytes.
    rgb: Buffer,
}

impl OnCuda {
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] when memory is short.
    pub fn new(denoiser: CudaDenoiser, vae: CudaExecutor) -> Result<Self> {
        let rgb = Buffer::new(vae.device(), picture_shape(vae.plan()).len())?;
        Ok(OnCuda { denoiser, vae, rgb })
    }
}

impl Networks for OnCuda {
    fn denoiser(&mut self) -> &mut dyn Denoiser {
        &mut self.denoiser
    }

    fn picture(&mut self, image: usize, scaling_factor: f32) -> Result<Picture> {
        let (device, sampler) = (self.vae.device().clone(), &self.denoiser.sampler);
        let first = sampler.latents_for_vae(image, scaling_factor, self.vae.input_address("latents"));
        let last = sampler.to_rgb8(self.vae.output_address("image"), self.rgb.len(), self.rgb.address());
        // SAFETY: the launches use the sampler's memory, the VAE's arena and `rgb`, all owned by `self`.
        unsafe { device.run(&[first])? };
        self.vae.step()?;
        // SAFETY: as above.
        unsafe { device.run(&[last])? };
        let mut rgb = vec![0; self.rgb.len()];
        self.rgb.read(0, &mut rgb)?;
        if sampler.picture_fault()? {
            return Err(Error::non_finite("the VAE gave NaN or infinity, so no picture is made"));
        }
        let Shape { h, w, .. } = picture_shape(self.vae.plan());
        Ok(Picture { width: w as u32, height: h as u32, rgb })
    }
}
