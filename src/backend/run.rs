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
    pub added: Option<&'a dyn AddedToBottleneck>,
    /// Factor of the noise that images start from.
    pub sigma: f32,
    /// The generator of the images' noise.
    pub rng: Rng,
    /// Shape of one image's latents.
    pub shape: Shape,
    /// The number of steps that the host may run ahead of the device.
    pub ahead: usize,
}

/// The numbers that are added to the bottleneck of a run's images, `[images, h, w, c]`.
pub trait AddedToBottleneck: Sync {
    /// True if other constants are added in the step at `timestep` than in that at `before`.
    fn changes_between(&self, before: f32, timestep: f32) -> bool;

    /// The numbers that do not depend on the bottleneck, in the step at a timestep.
    fn constant(&self, timestep: f32) -> Vec<f32>;

    /// True if some numbers depend on the bottleneck which they are added to.
    fn depends_on_bottleneck(&self) -> bool;

    /// Writes all numbers for the step at a timestep. `mid` is the bottleneck of all CFG rows, of which the last are the
    /// conditional rows of the images.
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
    /// The constants that are added to the bottleneck from one step on; `None` if they are those of the step before.
    pub fn constant_from(&self, index: usize) -> Option<Vec<f32>> {
        let timestep = |index: usize| self.steps[index].timestep;
        let added =
            self.added.filter(|added| index == 0 || added.changes_between(timestep(index - 1), timestep(index)));
        added.map(|added| added.constant(timestep(index)))
    }

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
