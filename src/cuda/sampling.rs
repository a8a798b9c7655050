//! The [`Denoiser`] of the kernels: the latents stay on the device, and one recording serves every
//! step of every request.

use super::{Buffer, CudaExecutor, DeviceSampler, Recording, SampledImage};
use crate::backend::{Denoiser, Executor, Noise, Run, picture_shape};
use crate::diffusion::noise::Rng;
use crate::graph::Shape;
use crate::image::Picture;
use crate::plan::Plan;
use crate::{Error, Result, Subject};

/// Largest number of UNet calls in a run.
const CAPACITY: usize = 4096;

/// A UNet and its sampler on the kernels, with a session's VAE.
pub(super) struct CudaDenoiser {
    unet: CudaExecutor,
    sampler: DeviceSampler,
    /// The VAE, and memory for one picture's bytes.
    vae: Option<(CudaExecutor, Buffer)>,
    /// The launches that prepare the UNet's inputs, those of the UNet, and that of guidance and the sampler's step;
    /// recorded at the first run.
    step: Option<Box<dyn Recording>>,
}

impl CudaDenoiser {
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] when memory is short.
    pub fn new(unet: CudaExecutor, batch: usize, vae: Option<CudaExecutor>) -> Result<Self> {
        let sampler = DeviceSampler::new(unet.device(), latents_shape(unet.plan(), batch), CAPACITY)?;
        let picture = |vae: &CudaExecutor| Buffer::new(vae.device(), picture_shape(vae.plan()).len());
        let vae = vae.map(|vae| picture(&vae).map(|rgb| (vae, rgb))).transpose()?;
        Ok(CudaDenoiser { unet, sampler, vae, step: None })
    }

    /// Bytes of the sampler's memory and of a picture, for networks of these plans.
    pub fn own_bytes(unet: &Plan, batch: usize, vae: Option<&Plan>) -> usize {
        DeviceSampler::bytes(latents_shape(unet, batch), CAPACITY) + vae.map_or(0, |vae| picture_shape(vae).len())
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
        if run.added.is_some_and(|added| added.depends_on_bottleneck()) {
            let problem = "concepts that are networks (mlp, conv) run on the CPU alone";
            return Err(Error::unsupported(Subject::Device, problem).advise("choose the CPU"));
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
            if let Some(constant) = run.constant_from(done) {
                self.unet.write("shift", &constant)?;
            }
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

    fn picture(&mut self, image: usize, scaling_factor: f32) -> Result<Picture> {
        let Some((vae, rgb)) = &mut self.vae else {
            return Err(Error::internal("this UNet was made without a VAE"));
        };
        let device = vae.device().clone();
        let first = self.sampler.latents_for_vae(image, scaling_factor, vae.input_address("latents"));
        let last = self.sampler.to_rgb8(vae.output_address("image"), rgb.len(), rgb.address());
        // SAFETY: the launches use the sampler's memory, the VAE's arena and `rgb`, all owned by `self`.
        unsafe { device.run(&[first])? };
        vae.step()?;
        // SAFETY: as above.
        unsafe { device.run(&[last])? };
        let mut bytes = vec![0; rgb.len()];
        rgb.read(0, &mut bytes)?;
        if self.sampler.picture_fault()? {
            return Err(Error::non_finite("the VAE gave NaN or infinity, so no picture is made"));
        }
        let Shape { h, w, .. } = picture_shape(vae.plan());
        Ok(Picture { width: w as u32, height: h as u32, rgb: bytes })
    }
}
