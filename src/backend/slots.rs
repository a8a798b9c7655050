//! The images that a [`super::Denoiser`] works on, each in a slot with its own steps, and what the host keeps of them.

use crate::diffusion::noise::{NormalGenerator, Rng};
use crate::diffusion::scheduler::Step;
use crate::graph::Shape;
use crate::layout::nchw_to_nhwc;
use crate::plan::Plan;
use std::sync::Arc;

/// Shape of a picture.
pub fn picture_shape(vae: &Plan) -> Shape {
    vae.graph().shape(vae.graph().output("image"))
}

/// The smallest of rising sizes of a batch that holds `images` images; the largest if none does.
pub fn capacity<T>(plans: &[(usize, T)], images: usize) -> usize {
    let fits = plans.iter().find(|(size, _)| *size >= images);
    fits.or(plans.last()).map_or(0, |(size, _)| *size)
}

/// The numbers that are added to the bottleneck of one image, `[h, w, c]`.
pub trait AddedToBottleneck: Send + Sync {
    /// True if other constants are added in the step at `timestep` than in that at `before`.
    fn changes_between(&self, before: f32, timestep: f32) -> bool;

    /// Writes the numbers that do not depend on the bottleneck, for the step at a timestep.
    fn constant(&self, timestep: f32, out: &mut [f32]);

    /// True if some numbers depend on the bottleneck which they are added to.
    fn depends_on_bottleneck(&self) -> bool;

    /// Writes all numbers for the step at a timestep. `mid` is the bottleneck of the image's conditional row.
    fn write(&self, timestep: f32, mid: &[f32], out: &mut [f32]);
}

/// One image, from noise to latents.
pub struct RunImage {
    /// The sampler's steps.
    pub steps: Arc<[Step]>,
    /// The generator of its noise.
    pub rng: Rng,
    /// Seed of its noise.
    pub seed: u64,
    /// The prediction is `u + guidance * (c - u)`, with the unconditional prediction u and the conditional prediction
    /// c; at 1 it is c itself.
    pub guidance: f32,
    /// Factor of the noise that it starts from.
    pub sigma: f32,
    /// The latents before the first step, NHWC; `None` for the seed's noise times `sigma`.
    pub latents: Option<Vec<f32>>,
    /// The numbers that are added to its bottleneck; `None` for none.
    pub added: Option<Box<dyn AddedToBottleneck>>,
}

/// An image in a slot.
pub struct Active {
    /// The image.
    pub image: RunImage,
    /// Number of its steps that have been taken.
    pub done: usize,
    noise: NormalGenerator,
}

impl Active {
    /// The next step; `None` after the last.
    pub fn next(&self) -> Option<&Step> {
        self.image.steps.get(self.done)
    }
}

/// The images in work, and the rows of the UNet's batch that serve them.
pub struct Slots {
    images: Vec<Option<Active>>,
    /// The slot of each row.
    rows: Vec<usize>,
    /// Shape of one image's latents.
    shape: Shape,
    /// Numbers that are added to the bottleneck of one image; 0 for a UNet whose bottleneck nothing is added to.
    bottleneck: usize,
    /// True if rows were given to other slots since the numbers added to the bottleneck were last written.
    moved: bool,
    /// One image's noise in NCHW.
    draft: Vec<f32>,
}

impl Slots {
    /// Free slots for images whose latents have a shape and whose bottleneck gets as many numbers.
    pub fn new(slots: usize, shape: Shape, bottleneck: usize) -> Self {
        let images = (0..slots).map(|_| None).collect();
        Slots { images, rows: Vec::new(), shape, bottleneck, moved: true, draft: vec![0.0; shape.len()] }
    }

    /// Puts an image into a slot, in place of the one that was there. Returns the latents that it starts from, unless
    /// they are noise that the device draws (`drawn`).
    pub fn begin(&mut self, slot: usize, mut image: RunImage, drawn: bool) -> Option<Vec<f32>> {
        let given = image.latents.take();
        let noise = NormalGenerator::new(image.rng, image.seed);
        let sigma = image.sigma;
        self.images[slot] = Some(Active { image, done: 0, noise });
        match given {
            Some(latents) => Some(latents),
            None if drawn => None,
            None => {
                let mut latents = vec![0.0; self.shape.len()];
                self.draw(slot, &mut latents);
                latents.iter_mut().for_each(|x| *x *= sigma);
                Some(latents)
            }
        }
    }

    /// Gives rows to slots.
    pub fn place(&mut self, rows: &[usize]) {
        self.rows = rows.to_vec();
        self.moved = true;
    }

    /// The image in a slot.
    pub fn get(&self, slot: usize) -> Option<&Active> {
        self.images.get(slot)?.as_ref()
    }

    /// The rows with an image that has a step to take: row, slot, image and step.
    pub fn active(&self) -> impl Iterator<Item = (usize, usize, &Active, &Step)> {
        self.rows.iter().enumerate().filter_map(|(row, &slot)| {
            let active = self.get(slot)?;
            Some((row, slot, active, active.next()?))
        })
    }

    /// Draws noise for an image in NCHW, as diffusers does, and writes NHWC.
    pub fn draw(&mut self, slot: usize, out: &mut [f32]) {
        if let Some(active) = &mut self.images[slot] {
            active.noise.fill(&mut self.draft);
            nchw_to_nhwc(&self.draft, self.shape.c, self.shape.tokens(), out);
        }
    }

    /// The constants that are added to the bottleneck in the next step, for `capacity` rows; `None` if they are those
    /// of the step before.
    pub fn added(&mut self, capacity: usize) -> Option<Vec<f32>> {
        let changes = |active: &Active, step: &Step| match active.done {
            0 => true,
            done => {
                let before = active.image.steps[done - 1].timestep;
                active.image.added.as_ref().is_some_and(|added| added.changes_between(before, step.timestep))
            }
        };
        let stale = self.moved || self.active().any(|(_, _, active, step)| changes(active, step));
        if self.bottleneck == 0 || !stale {
            return None;
        }
        let mut all = vec![0.0; capacity * self.bottleneck];
        for (row, _, active, step) in self.active() {
            if let Some(added) = &active.image.added {
                added.constant(step.timestep, &mut all[row * self.bottleneck..][..self.bottleneck]);
            }
        }
        self.moved = false;
        Some(all)
    }

    /// Counts a step of every image that had one to take.
    pub fn advance(&mut self) {
        for &slot in &self.rows {
            if let Some(active) = self.images[slot].as_mut().filter(|active| active.next().is_some()) {
                active.done += 1;
            }
        }
    }
}
