//! The work of a [`super::Denoiser`], and the random numbers that it starts from. Sampling and the rollouts of a
//! training share this.

use crate::Error;
use crate::diffusion::noise::{NormalGenerator, Rng};
use crate::diffusion::scheduler::Step;
use crate::graph::Shape;
use crate::layout::nchw_to_nhwc;
use crate::plan::Plan;

/// Shape of a picture.
pub fn picture_shape(vae: &Plan) -> Shape {
    vae.graph().shape(vae.graph().output("image"))
}

/// The work of a [`super::Denoiser`].
pub struct Run<'a> {
    /// The sampler's steps.
    pub steps: &'a [Step],
    /// One for each image of the batch.
    pub images: &'a [RunImage],
    /// True if the UNet has unconditional rows.
    pub guided: bool,
    /// `None` for a UNet whose bottleneck nothing is added to.
    pub added: Option<AddedToBottleneck<'a>>,
    /// Factor of the noise that images start from.
    pub sigma: f32,
    /// The generator of the images' noise.
    pub rng: Rng,
    /// Shape of one image's latents.
    pub shape: Shape,
    /// The number of steps that the host may run ahead of the device.
    pub ahead: usize,
}

/// The numbers that are added to the bottleneck.
#[derive(Clone, Copy)]
pub struct AddedToBottleneck<'a> {
    /// Those that are the same in every step, `[images, h, w, c]`.
    pub constant: &'a [f32],
    /// For each image the timestep below which nothing is added any more; 0 if something is added in every step.
    pub until: &'a [f32],
    /// If some depend on the bottleneck, the function that computes all of them in each step.
    pub of_bottleneck: Option<&'a dyn OfBottleneck>,
}

impl AddedToBottleneck<'_> {
    /// The constants that are added from one step on; `None` if they are those of the step before.
    pub fn beginning_at(&self, steps: &[Step], index: usize) -> Option<Vec<f32>> {
        let acting = |step: &Step| self.until.iter().map(|&until| acts(until, step.timestep)).collect::<Vec<_>>();
        let now = acting(&steps[index]);
        if index > 0 && now == acting(&steps[index - 1]) {
            return None;
        }
        let mut constant = self.constant.to_vec();
        let one = constant.len() / now.len().max(1);
        for (image, _) in constant.chunks_exact_mut(one.max(1)).zip(now).filter(|(_, acts)| !acts) {
            image.fill(0.0);
        }
        Some(constant)
    }
}

/// True if something that acts until a timestep acts at this one.
pub fn acts(until: f32, timestep: f32) -> bool {
    until <= 0.0 || timestep >= until
}

/// Numbers that depend on the bottleneck which they are added to.
pub trait OfBottleneck: Sync {
    /// Writes them for the step at a timestep, `[images, h, w, c]`. `mid` is the bottleneck of all CFG rows, of which
    /// the last are the conditional rows of the images.
    fn write(&self, timestep: f32, mid: &[f32], out: &mut [f32]);
}

/// One image of a [`Run`].
pub struct RunImage {
    /// Seed of its noise.
    pub seed: u64,
    /// The prediction is `u + guidance * (c - u)`, with the unconditional prediction u and the conditional prediction
    /// c; at 1 it is c itself.
    pub guidance: f32,
    /// The latents before the first step, NHWC; `None` for the seed's noise.
    pub latents: Option<Vec<f32>>,
}

impl Run<'_> {
    /// The latents before the first step, NHWC.
    pub fn start(&self, noise: &mut Noise) -> Vec<f32> {
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
pub struct Noise {
    generators: Vec<NormalGenerator>,
    shape: Shape,
    /// One image's numbers in NCHW.
    draft: Vec<f32>,
}

impl Noise {
    /// A generator for each image of a run.
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
