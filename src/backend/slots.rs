//! The images that a [`super::Denoiser`] works on, each in a slot with its own steps, and what the host keeps of them.

use crate::diffusion::brownian::BrownianTree;
use crate::diffusion::noise::{NormalGenerator, Rng};
use crate::diffusion::scheduler::{NoiseLevel, Step};
use crate::graph::Shape;
use crate::layout::nchw_to_nhwc;
use std::sync::Arc;

/// A batch for which a UNet is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UNetBatch {
    /// The number of images.
    pub images: usize,
    /// True if every image has two rows, the unconditional rows of all images first; else it has the conditional one.
    pub guided: bool,
}

/// The number of images in the smallest batch that holds `images` images; in the largest if none does.
pub fn capacity<T>(plans: &[(UNetBatch, T)], images: usize) -> usize {
    let sizes = || plans.iter().map(|(batch, _)| batch.images);
    sizes().filter(|&size| size >= images).min().or(sizes().max()).unwrap_or(0)
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

/// Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) of an image: the combination of the unconditional
/// prediction u and the conditional prediction c.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// The prediction is `u + scale * (c - u)`; at 1 it is c itself.
    pub scale: f32,
    /// The share, from 0 to 1, by which the prediction's standard deviation over the image is brought to that of c
    /// (section 3.4 of arXiv 2305.08891).
    pub rescale: f32,
    /// The timesteps, from the first to the last, at which there is guidance (arXiv 2404.07724). At the others the
    /// prediction is c itself.
    pub interval: (f32, f32),
}

impl Guidance {
    /// Guidance of a scale at every timestep.
    pub const fn new(scale: f32) -> Self {
        Guidance { scale, rescale: 0.0, interval: (f32::INFINITY, f32::NEG_INFINITY) }
    }

    /// The scale in a step.
    pub fn at(&self, step: &Step) -> f32 {
        let (first, last) = self.interval;
        match step.timestep <= first && step.timestep >= last {
            true => self.scale * step.guidance as f32,
            false => 1.0,
        }
    }
}

/// One image, from noise to latents.
pub struct RunImage {
    /// The sampler's steps.
    pub steps: Arc<[Step]>,
    /// The generator of its noise.
    pub rng: Rng,
    /// Seed of its noise.
    pub seed: u64,
    /// Draws of one image's latents that were made of the seed already.
    pub drawn: u32,
    /// Its guidance.
    pub guidance: Guidance,
    /// Factor of the noise that it starts from.
    pub sigma: f32,
    /// The latents before the first step, NHWC; `None` for the seed's next draw times `sigma`.
    pub latents: Option<Vec<f32>>,
    /// The parts of a picture that stay as they are; `None` to make all of the image anew.
    pub kept: Option<Kept>,
    /// The numbers that are added to its bottleneck; `None` for none.
    pub added: Option<Box<dyn AddedToBottleneck>>,
}

impl RunImage {
    /// The least and the greatest sigma between which its noise is a Brownian motion, if it is one.
    pub fn brownian_range(&self) -> Option<(f64, f64)> {
        let spans = || self.steps.iter().filter_map(|step| step.span);
        let greatest = spans().map(|[from, _]| from).reduce(f64::max)?;
        Some((spans().map(|[_, to]| to).fold(greatest, f64::min), greatest))
    }
}

/// The parts of a picture that stay as they are. After every step their latents are those of the picture at the noise
/// level that the step leads to.
pub struct Kept {
    /// The picture's latents, NHWC, free of noise.
    pub latents: Vec<f32>,
    /// The unit noise that is added to them, NHWC.
    pub noise: Vec<f32>,
    /// True for the latents that are made anew, `[h, w]`.
    pub repaint: Vec<bool>,
}

/// The noise level after step `index`: that at which the next one begins.
pub fn level_after(steps: &[Step], index: usize) -> NoiseLevel {
    steps.get(index + 1).map_or(NoiseLevel::CLEAN, |next| next.level)
}

/// An image in a slot.
pub struct Active {
    /// The image.
    pub image: RunImage,
    /// Number of its steps that have been taken.
    pub done: usize,
    noise: NormalGenerator,
    /// The motion from which steps take their noise that have a [`Step::span`].
    motion: Option<BrownianTree>,
}

impl Active {
    /// The next step; `None` after the last.
    pub fn next(&self) -> Option<&Step> {
        self.image.steps.get(self.done)
    }

    /// True if a device that knows [`Rng::TorchCuda`] draws the noise of its steps by itself.
    pub fn is_drawn_by_device(&self) -> bool {
        self.image.rng == Rng::TorchCuda && self.motion.is_none()
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
        let mut noise = NormalGenerator::new(image.rng, image.seed);
        (0..image.drawn).for_each(|_| noise.fill(&mut self.draft));
        let latents = match image.latents.take() {
            None if !drawn => {
                let mut latents = vec![0.0; self.shape.len()];
                noise.fill(&mut self.draft);
                nchw_to_nhwc(&self.draft, self.shape.c, self.shape.tokens(), &mut latents);
                latents.iter_mut().for_each(|x| *x *= image.sigma);
                Some(latents)
            }
            given => given,
        };
        let motion = image
            .brownian_range()
            .map(|(least, greatest)| BrownianTree::new(image.rng, image.seed, least, greatest, self.shape.len()));
        self.images[slot] = Some(Active { image, done: 0, noise, motion });
        latents
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

    /// Draws noise for the next step of an image in NCHW, as diffusers does, and writes NHWC.
    pub fn draw(&mut self, slot: usize, out: &mut [f32]) {
        if let Some(active) = &mut self.images[slot] {
            let span = active.next().and_then(|step| step.span);
            match (span, &mut active.motion) {
                (Some([from, to]), Some(motion)) => motion.fill(from, to, &mut self.draft),
                _ => active.noise.fill(&mut self.draft),
            }
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
