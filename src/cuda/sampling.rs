//! The [`Denoiser`] of the kernels: the latents stay on the device, and one recording for each batch that is planned
//! serves every step of every request.

use super::{Buffer, CudaExecutor, DeviceSampler, Recording, SampledImage};
use crate::backend::{Active, Denoiser, Executor, Parts, Piece, RunImage, Slots, UNetBatch, Weights, capacity};
use crate::diffusion::noise::Rng;
use crate::graph::Shape;
use crate::image::Picture;
use crate::plan::Plan;
use crate::{Error, Result, Subject};

/// Largest number of an image's UNet calls.
const CAPACITY: usize = 4096;

/// A UNet and its samplers on the kernels, with a session's VAE.
pub(super) struct CudaDenoiser {
    /// The UNet for several batches. All share one arena.
    unets: Vec<(UNetBatch, Unet)>,
    /// The index of the present one.
    current: usize,
    sampler: DeviceSampler,
    slots: Slots,
    /// The VAE, and memory for one picture's bytes.
    vae: Option<(Parts<CudaExecutor>, Buffer)>,
    /// One image's noise.
    noise: Vec<f32>,
}

struct Unet {
    executor: CudaExecutor,
    /// The launches that prepare the UNet's inputs, those of the UNet, and that of guidance and the samplers' steps;
    /// recorded at the first step. The second recording is that of a step that reuses activations.
    steps: [Option<Box<dyn Recording>>; 2],
}

impl CudaDenoiser {
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] when memory is short.
    pub fn new(unets: Vec<(UNetBatch, CudaExecutor)>, vae: Option<Parts<CudaExecutor>>) -> Result<Self> {
        let Some((_, unet)) = unets.last() else {
            return Err(Error::internal("a denoiser without a UNet"));
        };
        let slots = capacity(&unets, usize::MAX);
        let graph = unet.plan().graph();
        let one = Shape { n: 1, ..graph.shape(graph.input("sample")) };
        let bottleneck = graph.find_input("shift").map_or(0, |shift| Shape { n: 1, ..graph.shape(shift) }.len());
        let sampler = DeviceSampler::new(unet.device(), Shape { n: slots, ..one }, CAPACITY)?;
        let picture = |vae: &Parts<CudaExecutor>| Buffer::new(unet.device(), vae.shape().len());
        Ok(CudaDenoiser {
            sampler,
            slots: Slots::new(slots, one, bottleneck),
            vae: vae.map(|vae| picture(&vae).map(|rgb| (vae, rgb))).transpose()?,
            noise: vec![0.0; one.len()],
            current: unets.len() - 1,
            unets: unets.into_iter().map(|(batch, executor)| (batch, Unet { executor, steps: [None, None] })).collect(),
        })
    }

    /// Bytes of the samplers' memory and of a picture, for networks of these plans and the images of the largest batch.
    pub fn own_bytes(unet: &Plan, images: usize, vae: Option<&Parts<Plan>>) -> usize {
        let graph = unet.graph();
        let latents = Shape { n: images, ..graph.shape(graph.input("sample")) };
        DeviceSampler::bytes(latents, CAPACITY) + vae.map_or(0, |vae| vae.shape().len())
    }
}

impl Unet {
    /// The recorded step of its batch, `reusing` activations or not.
    fn recording(&mut self, batch: UNetBatch, sampler: &DeviceSampler, reusing: bool) -> Result<&dyn Recording> {
        let UNetBatch { images, guided } = batch;
        let step = &mut self.steps[usize::from(reusing)];
        let recording = match step.take() {
            Some(recording) => recording,
            None => {
                let unet = &self.executor;
                let (sample, timestep) = (unet.input_address("sample"), unet.input_address("timestep"));
                let mut launches = vec![sampler.prepare(images, sample, timestep, guided)];
                launches.extend_from_slice(match reusing {
                    true => unet.reusing_step_launches(),
                    false => unet.step_launches(),
                });
                let out = unet.output_address("sample");
                launches.extend(guided.then(|| sampler.rescale(images, out)));
                launches.push(sampler.guide_and_step(images, out, guided));
                // SAFETY: the launches use the UNet's arena and weights and the samplers' memory, all of which live as
                // long as the recording.
                unsafe { unet.device().clone().record(&launches)? }
            }
        };
        Ok(&**step.insert(recording))
    }
}

impl Denoiser for CudaDenoiser {
    fn capacity(&self, images: usize) -> usize {
        capacity(&self.unets, images)
    }

    fn begin(&mut self, slot: usize, image: RunImage) -> Result<()> {
        if image.steps.len() > CAPACITY {
            return Err(Error::invalid("steps", format!("{} steps are too many", image.steps.len()))
                .advise(format!("take {CAPACITY} at most")));
        }
        if image.added.as_ref().is_some_and(|added| added.depends_on_bottleneck()) {
            let problem = "concepts that are networks (mlp, conv) run on the CPU alone";
            return Err(Error::unsupported(Subject::Device, problem).advise("choose the CPU"));
        }
        let (seed, guidance, sigma, steps) = (image.seed, image.guidance, image.sigma, image.steps.clone());
        let (drawn, drawn_here) = (image.drawn + u32::from(image.latents.is_none()), image.rng == Rng::TorchCuda);
        let kept = image.kept.is_some();
        if let Some(kept) = &image.kept {
            self.sampler.write_kept(slot, kept)?;
        }
        let latents = self.slots.begin(slot, image, drawn_here);
        let philox = self.slots.get(slot).is_some_and(Active::is_drawn_by_device);
        self.sampler.begin(slot, &steps, SampledImage { seed, guidance, drawn, philox, kept })?;
        match latents {
            Some(latents) => self.sampler.write_latents(slot, &latents),
            None => {
                let launch = self.sampler.draw(slot, sigma);
                // SAFETY: the launch uses the samplers' memory alone.
                unsafe { self.unets[self.current].1.executor.device().run(&[launch]) }
            }
        }
    }

    fn place(&mut self, slots: &[usize], guided: bool, inputs: &[(&'static str, Vec<f32>)]) -> Result<()> {
        let wanted = UNetBatch { images: self.capacity(slots.len()), guided };
        let place = self.unets.iter().position(|(batch, _)| *batch == wanted);
        self.current = place.ok_or_else(|| Error::internal(format!("no plan for {wanted:?}")))?;
        self.slots.place(slots);
        self.sampler.place(slots)?;
        let unet = &mut self.unets[self.current].1.executor;
        for (name, values) in inputs {
            unet.write(name, values)?;
        }
        unet.prologue()
    }

    fn step(&mut self, reusing: bool) -> Result<()> {
        let (batch, unet) = &mut self.unets[self.current];
        if let Some(constant) = self.slots.added(batch.images) {
            unet.executor.write("shift", &constant)?;
        }
        let drawn_here =
            self.slots.active().filter(|(.., active, step)| step.needs_noise() && !active.is_drawn_by_device());
        for slot in drawn_here.map(|(_, slot, ..)| slot).collect::<Vec<_>>() {
            self.slots.draw(slot, &mut self.noise);
            self.sampler.write_noise(slot, &self.noise)?;
        }
        unet.recording(*batch, &self.sampler, reusing)?.replay()?;
        self.slots.advance();
        Ok(())
    }

    fn switch(&mut self, weights: &Weights) -> Result<()> {
        self.unets.iter_mut().try_for_each(|(_, unet)| {
            // The launches that it holds read the weights so far.
            unet.steps = [None, None];
            unet.executor.switch_weights(weights)
        })
    }

    fn fault(&mut self, slot: usize) -> Result<Option<usize>> {
        self.sampler.fault(slot)
    }

    fn latents(&mut self, slot: usize) -> Result<Vec<f32>> {
        self.sampler.read_latents(slot)
    }

    fn picture(&mut self, slot: usize, scaling_factor: f32) -> Result<Picture> {
        let Some((vae, rgb)) = &mut self.vae else {
            return Err(Error::internal("this UNet was made without a VAE"));
        };
        self.sampler.begin_picture(slot)?;
        let input = vae.input();
        let device = input.device().clone();
        let first = self.sampler.latents_for_vae(slot, scaling_factor, input.input_address("latents"));
        // SAFETY: the launches use the samplers' memory, the VAE's arenas and `rgb`, all owned by `self`.
        unsafe { device.run(&[first])? };
        vae.run(&mut |vae, Piece { numbers, place }| {
            let image = vae.output_address("image") + (numbers.start * size_of::<f32>()) as u64;
            let launch = self.sampler.to_rgb8(slot, image, numbers.len(), rgb.address() + place as u64);
            // SAFETY: as above.
            unsafe { device.run(&[launch]) }
        })?;
        let mut bytes = vec![0; rgb.len()];
        rgb.read(0, &mut bytes)?;
        if self.sampler.picture_fault(slot)? {
            return Err(Error::non_finite("the VAE gave NaN or infinity, so no picture is made"));
        }
        let Shape { h, w, .. } = vae.shape();
        Ok(Picture { width: w as u32, height: h as u32, rgb: bytes })
    }
}
