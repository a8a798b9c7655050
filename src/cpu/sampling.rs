//! The [`Denoiser`] of the CPU.

use super::{CpuExecutor, loaded};
use crate::backend::{
    AddedToBottleneck, Denoiser, Executor, Guidance, Kept, Parts, Piece, RunImage, Slots, UNetBatch, Weights, capacity,
    level_after,
};
use crate::diffusion::scheduler::{NoiseLevel, SamplerState, Step};
use crate::graph::Shape;
use crate::image::Picture;
use crate::plan::Plan;
use crate::{Error, Result};
use std::sync::Arc;

/// A UNet and its samplers on the CPU, with a session's VAE.
pub(super) struct CpuDenoiser {
    unet: CpuExecutor,
    plans: Vec<(UNetBatch, Arc<Plan>)>,
    /// That of the present plan.
    batch: UNetBatch,
    vae: Option<Parts<CpuExecutor>>,
    slots: Slots,
    samples: Vec<Sample>,
    /// One image's noise and prediction.
    noise: Vec<f32>,
    prediction: Vec<f32>,
}

/// An image's latents.
struct Sample {
    /// NHWC.
    latents: Vec<f32>,
    state: SamplerState,
    /// The first step that gave latents that are not finite.
    fault: Option<usize>,
}

impl CpuDenoiser {
    /// `unet` has memory for the largest of `plans`.
    pub fn new(unet: CpuExecutor, plans: Vec<(UNetBatch, Arc<Plan>)>, vae: Option<Parts<CpuExecutor>>) -> Self {
        let graph = unet.plan().graph();
        let shape = Shape { n: 1, ..graph.shape(graph.input("sample")) };
        let bottleneck = graph.find_input("shift").map_or(0, |shift| Shape { n: 1, ..graph.shape(shift) }.len());
        let slots = capacity(&plans, usize::MAX);
        let sample = || Sample { latents: vec![0.0; shape.len()], state: SamplerState::new(shape.len()), fault: None };
        CpuDenoiser {
            plans,
            // The first images bring their own.
            batch: UNetBatch { images: 0, guided: false },
            vae,
            slots: Slots::new(slots, shape, bottleneck),
            samples: (0..slots).map(|_| sample()).collect(),
            noise: vec![0.0; shape.len()],
            prediction: vec![0.0; shape.len()],
            unet,
        }
    }
}

impl Denoiser for CpuDenoiser {
    fn capacity(&self, images: usize) -> usize {
        capacity(&self.plans, images)
    }

    fn begin(&mut self, slot: usize, image: RunImage) -> Result<()> {
        let sample = &mut self.samples[slot];
        sample.fault = None;
        sample.state.reset();
        if let Some(latents) = self.slots.begin(slot, image, false) {
            sample.latents.copy_from_slice(&latents);
        }
        Ok(())
    }

    fn place(&mut self, slots: &[usize], guided: bool, inputs: &[(&'static str, Vec<f32>)]) -> Result<()> {
        self.slots.place(slots);
        self.batch = UNetBatch { images: self.capacity(slots.len()), guided };
        let plan = self.plans.iter().find(|(batch, _)| *batch == self.batch);
        let (_, plan) = plan.ok_or_else(|| Error::internal(format!("no plan for {:?}", self.batch)))?;
        self.unet.switch(plan);
        for (name, values) in inputs {
            self.unet.write(name, values)?;
        }
        self.unet.prologue()
    }

    fn step(&mut self, reusing: bool) -> Result<()> {
        let (UNetBatch { images, guided }, one) = (self.batch, self.noise.len());
        let rows: Vec<_> = self.slots.active().map(|(row, slot, _, step)| (row, slot, *step)).collect();
        for (_, slot, step) in rows.iter().filter(|(.., step)| step.churn != 0.0) {
            self.slots.draw(*slot, &mut self.noise);
            step.churn(&mut self.samples[*slot].latents, &self.noise);
        }
        // The rows without an image have zeros for inputs, as on a GPU.
        self.unet.input_mut("sample").fill(0.0);
        self.unet.input_mut("timestep").fill(0.0);
        for (row, slot, _, step) in self.slots.active() {
            let copies = if guided { 2 } else { 1 };
            for row in (0..copies).map(|copy| copy * images + row) {
                let input = &mut self.unet.input_mut("sample")[row * one..][..one];
                input.iter_mut().zip(&self.samples[slot].latents).for_each(|(s, x)| *s = x * step.input_scale);
                self.unet.input_mut("timestep")[row] = step.timestep;
            }
        }
        if let Some(constant) = self.slots.added(images) {
            self.unet.write("shift", &constant)?;
        }
        let networks = |added: &dyn AddedToBottleneck| added.depends_on_bottleneck();
        let any = self.slots.active().any(|(_, _, active, _)| active.image.added.as_deref().is_some_and(networks));
        match any {
            false => self.unet.run_step(reusing, None),
            true => {
                let slots = &self.slots;
                let write = |mid: &[f32], out: &mut [f32]| {
                    let (mid, one) = (&mid[mid.len() - out.len()..], out.len() / images);
                    for (row, _, active, step) in slots.active() {
                        if let Some(added) = &active.image.added {
                            let range = row * one..(row + 1) * one;
                            added.write(step.timestep, &mid[range.clone()], &mut out[range]);
                        }
                    }
                };
                self.unet.run_step(reusing, Some(&write));
            }
        }
        for (row, slot, step) in rows {
            let out = self.unet.output("sample");
            let Some(active) = self.slots.get(slot) else { continue };
            let guidance = active.image.guidance;
            let first = &out[row * one..][..one];
            match guided {
                false => self.prediction.copy_from_slice(first),
                true => {
                    let with = &out[(images + row) * one..][..one];
                    guide(&guidance, &step, first, with, &mut self.prediction);
                }
            }
            if step.next.noise != 0.0 {
                self.slots.draw(slot, &mut self.noise);
            }
            let Sample { latents, state, fault } = &mut self.samples[slot];
            state.step(&step, &self.prediction, latents, &self.noise);
            let active = self.slots.get(slot);
            let done = active.map_or(0, |active| active.done);
            if let Some((active, kept)) = active.and_then(|active| Some((active, active.image.kept.as_ref()?))) {
                keep(kept, level_after(&active.image.steps, done), latents);
            }
            if fault.is_none() && !latents.iter().all(|x| x.is_finite()) {
                *fault = Some(done);
            }
        }
        self.slots.advance();
        Ok(())
    }

    fn switch(&mut self, weights: &Weights) -> Result<()> {
        self.unet.switch_weights(loaded(weights)?)
    }

    fn fault(&mut self, slot: usize) -> Result<Option<usize>> {
        Ok(self.samples[slot].fault)
    }

    fn latents(&mut self, slot: usize) -> Result<Vec<f32>> {
        Ok(self.samples[slot].latents.clone())
    }

    fn picture(&mut self, slot: usize, scaling_factor: f32) -> Result<Picture> {
        let Some(vae) = &mut self.vae else { return Err(Error::internal("this UNet was made without a VAE")) };
        let input = vae.input().input_mut("latents");
        input.iter_mut().zip(&self.samples[slot].latents).for_each(|(v, x)| *v = x / scaling_factor);
        let shape = vae.shape();
        let mut image = vec![0.0; shape.len()];
        vae.run(&mut |vae, Piece { numbers, place }| {
            image[place..][..numbers.len()].copy_from_slice(&vae.output("image")[numbers]);
            Ok(())
        })?;
        Picture::from_hwc(&image, shape.h, shape.w)
    }
}

/// Writes the latents that stay as they are, at a noise level.
fn keep(kept: &Kept, level: NoiseLevel, latents: &mut [f32]) {
    let channels = latents.len() / kept.repaint.len();
    let (signal, noise) = (level.signal as f32, level.noise as f32);
    let own = kept.latents.iter().zip(&kept.noise).map(|(x, e)| signal * x + noise * e);
    for (i, (latent, own)) in latents.iter_mut().zip(own).enumerate() {
        if !kept.repaint[i / channels] {
            *latent = own;
        }
    }
}

/// Writes the prediction of a step from those without and with the prompt.
fn guide(guidance: &Guidance, step: &Step, without: &[f32], with: &[f32], prediction: &mut [f32]) {
    let scale = guidance.at(step);
    if scale == 1.0 {
        return prediction.copy_from_slice(with);
    }
    for ((p, u), c) in prediction.iter_mut().zip(without).zip(with) {
        *p = u + scale * (c - u);
    }
    if guidance.rescale != 0.0 {
        let factor = rescaling(guidance.rescale, with, prediction);
        prediction.iter_mut().for_each(|p| *p *= factor);
    }
}

/// The factor that brings the standard deviation of `prediction` nearer to that of `with`, by a share of `rescale`
/// (section 3.4 of arXiv 2305.08891). The order of its sums is that of `kernels/sampler.cu`, so that the kernels give
/// the same number.
fn rescaling(rescale: f32, with: &[f32], prediction: &[f32]) -> f32 {
    const THREADS: usize = 256;
    let variance = |values: &[f32]| {
        let mut sums = [(0.0f64, 0.0f64); THREADS];
        for (i, value) in values.iter().map(|&value| value as f64).enumerate() {
            let (sum, squares) = &mut sums[i % THREADS];
            (*sum, *squares) = (*sum + value, *squares + value * value);
        }
        let mut half = THREADS / 2;
        while half > 0 {
            for i in 0..half {
                sums[i] = (sums[i].0 + sums[i + half].0, sums[i].1 + sums[i + half].1);
            }
            half /= 2;
        }
        let (sum, squares) = sums[0];
        squares - sum * sum / values.len() as f64
    };
    let ratio = (variance(with) / variance(prediction)).sqrt();
    (rescale as f64).mul_add(ratio - 1.0, 1.0) as f32
}
