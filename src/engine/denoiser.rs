//! A UNet with its sampler on a device: what sampling and the rollouts of a training have in common.

use crate::diffusion::noise::{NormalGenerator, Rng};
use crate::diffusion::scheduler::Step;
use crate::layout::nchw_to_nhwc;
use crate::respodiff::Shift;
use crate::{Error, Result};

/// A UNet with its sampler on a device.
pub(crate) trait Denoiser: Send {
    /// Writes what conditions the rows, the unconditional ones first, and runs what depends on that alone.
    fn condition(&mut self, inputs: &[(&str, &[f32])]) -> Result<()>;

    /// Takes the steps. `check` is called with the number of steps done, before each and after the last, and may end the
    /// run. Gives the latents, `[batch, h, w, c]`.
    fn sample(&mut self, run: &Run, check: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<f32>>;
}

/// What a [`Denoiser`] is to do.
pub(crate) struct Run<'a> {
    pub steps: &'a [Step],
    pub guidance: f32,
    pub guided: bool,
    /// What is added to the bottleneck; `None` for a UNet that has no such input.
    pub shift: Option<&'a Shift>,
    pub start: Start,
    /// Of the first image; every other image's is one more.
    pub seed: u64,
    pub rng: Rng,
    pub batch: usize,
    /// Channels and pixels of an image's latents.
    pub size: (usize, usize),
    /// Steps the host may run ahead of the device.
    pub ahead: usize,
}

/// The latents before the first step.
pub(crate) enum Start {
    /// The seed's noise times this.
    Noise(f32),
    /// These, NHWC.
    Latents(Vec<f32>),
}

impl Run<'_> {
    /// The latents before the first step, NHWC.
    pub(super) fn start(&self, noise: &mut Noise) -> Vec<f32> {
        match &self.start {
            Start::Latents(latents) => latents.clone(),
            Start::Noise(sigma) => {
                let mut latents = vec![0.0; self.batch * self.size.0 * self.size.1];
                noise.draw(&mut latents);
                latents.iter_mut().for_each(|x| *x *= sigma);
                latents
            }
        }
    }

    /// About the step after `done` others.
    pub fn non_finite(&self, done: usize) -> Error {
        Error::non_finite(format!("step {} of {} gave NaN or infinite latents", done + 1, self.steps.len()))
            .advise("lower the guidance, take more steps or another scheduler")
    }
}

/// Normal numbers for each image from its own generator.
pub(super) struct Noise {
    generators: Vec<NormalGenerator>,
    size: (usize, usize),
}

impl Noise {
    pub fn new(run: &Run) -> Self {
        let generator = |i| NormalGenerator::new(run.rng, run.seed.wrapping_add(i));
        Noise { generators: (0..run.batch as u64).map(generator).collect(), size: run.size }
    }

    /// Draws in NCHW, as diffusers does, and writes NHWC.
    pub fn draw(&mut self, out: &mut [f32]) {
        let (c, pixels) = self.size;
        let mut draft = vec![0.0; c * pixels];
        for (generator, out) in self.generators.iter_mut().zip(out.chunks_exact_mut(c * pixels)) {
            generator.fill(&mut draft);
            nchw_to_nhwc(&draft, c, pixels, out);
        }
    }
}
