//! Runs: a UNet takes the steps of a sampler on a device, and a VAE decodes. Sampling and the rollouts of a training
//! share this, on the CPU (`on_cpu.rs`) and on the kernels (`on_cuda.rs`).

use crate::concept::Shift;
use crate::diffusion::noise::{NormalGenerator, Rng};
use crate::diffusion::scheduler::Step;
use crate::graph::Shape;
use crate::image::Picture;
use crate::layout::nchw_to_nhwc;
use crate::plan::Plan;
use crate::{Error, Result};

/// A UNet with its sampler on a device.
pub(crate) trait Denoiser: Send {
    /// Writes the inputs that condition the rows, the unconditional rows first, and runs the nodes that depend on them
    /// alone.
    fn condition(&mut self, inputs: &[(&'static str, Vec<f32>)]) -> Result<()>;

    /// Takes the steps. `check` is called with the number of steps done, before each and after the last, and may end
    /// the run. Returns the latents, `[batch, h, w, c]`.
    fn sample(&mut self, run: &Run, check: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<f32>>;
}

/// The UNet and the VAE of a session, on a device.
pub(crate) trait Networks: Send {
    /// The UNet with its sampler.
    fn denoiser(&mut self) -> &mut dyn Denoiser;

    /// Decodes an image of the denoiser's last run, whose latents are the VAE's times `scaling_factor`.
    fn picture(&mut self, image: usize, scaling_factor: f32) -> Result<Picture>;
}

/// Shape of a picture.
pub(super) fn picture_shape(vae: &Plan) -> Shape {
    vae.graph().shape(vae.graph().output("image"))
}

/// The work of a [`Denoiser`].
pub(crate) struct Run<'a> {
    pub steps: &'a [Step],
    /// One for each image of the batch.
    pub images: &'a [RunImage],
    /// True if the UNet has unconditional rows.
    pub guided: bool,
    /// The numbers that are added to the bottleneck; `None` for a UNet that has no such input.
    pub shift: Option<&'a Shift>,
    /// Factor of the noise that images start from.
    pub sigma: f32,
    pub rng: Rng,
    /// Shape of one image's latents.
    pub shape: Shape,
    /// The number of steps that the host may run ahead of the device.
    pub ahead: usize,
}

/// One image of a [`Run`].
pub(crate) struct RunImage {
    pub seed: u64,
    /// The prediction is `u + guidance * (c - u)`, with the unconditional prediction u and the conditional prediction
    /// c; at 1 it is c itself.
    pub guidance: f32,
    /// The latents before the first step, NHWC; `None` for the seed's noise.
    pub latents: Option<Vec<f32>>,
}

impl Run<'_> {
    /// The latents before the first step, NHWC.
    pub(super) fn start(&self, noise: &mut Noise) -> Vec<f32> {
        let mut latents = vec![0.0; self.images.len() * self.shape.len()];
        for (index, (image, out)) in self.images.iter().zip(latents.chunks_exact_mut(self.shape.len())).enumerate() {
            match &image.latents {
                Some(latents) => out.copy_from_slice(latents),
                None => {
                    noise.draw(index, out);
                    out.iter_mut().for_each(|x| *x *= self.sigma);
                }
            }
        }
        latents
    }

    /// The error about the step that follows `done` others.
    pub fn non_finite(&self, done: usize) -> Error {
        Error::non_finite(format!("step {} of {} gave NaN or infinite latents", done + 1, self.steps.len()))
            .advise("lower the guidance, take more steps or another sampler")
    }
}

/// Normal random numbers for each image, from its own generator.
pub(super) struct Noise {
    generators: Vec<NormalGenerator>,
    shape: Shape,
    /// One image's numbers in NCHW.
    draft: Vec<f32>,
}

impl Noise {
    pub fn new(run: &Run) -> Self {
        let generators = run.images.iter().map(|image| NormalGenerator::new(run.rng, image.seed)).collect();
        Noise { generators, shape: run.shape, draft: vec![0.0; run.shape.len()] }
    }

    /// Draws for one image in NCHW, as diffusers does, and writes NHWC.
    pub fn draw(&mut self, image: usize, out: &mut [f32]) {
        self.generators[image].fill(&mut self.draft);
        nchw_to_nhwc(&self.draft, self.shape.c, self.shape.tokens(), out);
    }

    /// Draws for every image.
    pub fn draw_all(&mut self, out: &mut [f32]) {
        let one = self.shape.len();
        (0..self.generators.len()).for_each(|image| self.draw(image, &mut out[image * one..][..one]));
    }
}
