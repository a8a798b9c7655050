//! The two losses of RespoDiff and their gradients (arXiv 2509.15257, section 3).

use super::Halves;
use crate::Result;
use crate::concept::Module;

/// The losses at latents that have passed the down half with the neutral prompt. All numbers are NHWC.
pub struct Objective<'a>(&'a mut Halves);

/// A loss and its gradient.
#[non_exhaustive]
pub struct Slope {
    /// Mean squared error over all numbers of the prediction.
    pub loss: f64,
    /// Gradient with respect to the sum that the modules add to the bottleneck, `[rows, h, w, c]`; for
    /// [`Module::gradient`].
    pub by_shift: Vec<f32>,
}

impl<'a> Objective<'a> {
    /// The losses at the bottleneck that `halves` computed last. They must have been made with a gradient.
    pub fn new(halves: &'a mut Halves) -> Self {
        Objective(halves)
    }

    /// The bottleneck, `[rows, h, w, c]`.
    pub fn mid(&self) -> &[f32] {
        self.0.mid()
    }

    /// The prediction from the bottleneck plus the values of `modules` there.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`].
    pub fn predict(&mut self, modules: &[&Module]) -> Result<Vec<f32>> {
        self.0.ascend(modules, 0)
    }

    /// The loss `mean((g(h + sum of modules) - target)^2)`, with the up half g and the bottleneck h, and the gradient
    /// of `weight` times the loss.
    ///
    /// `L_resp` is this loss with RAM alone and the responsible target; `L_sem` is it with RAM and SAM, lambda as the
    /// weight, and the neutral prediction ([`Objective::predict`] without modules) as the target.
    ///
    /// # Errors
    /// Those of [`Objective::predict`].
    pub fn match_score(&mut self, modules: &[&Module], target: &[f32], weight: f64) -> Result<Slope> {
        let prediction = self.predict(modules)?;
        let n = prediction.len() as f64;
        let loss = prediction.iter().zip(target).map(|(p, t)| (*p as f64 - *t as f64).powi(2)).sum::<f64>() / n;
        let seed: Vec<f32> =
            prediction.iter().zip(target).map(|(p, t)| (2.0 * weight / n * (*p as f64 - *t as f64)) as f32).collect();
        Ok(Slope { loss, by_shift: self.0.gradient(&seed)? })
    }
}

/// Adam (Kingma and Ba, arXiv 1412.6980) as PyTorch computes it, without weight decay.
#[derive(Clone, Debug, Default)]
pub struct Adam {
    /// Number of steps taken.
    pub steps: u64,
    /// Running mean of the gradient.
    pub first: Vec<f32>,
    /// Running mean of the gradient's square.
    pub second: Vec<f32>,
}

impl Adam {
    const BETAS: (f64, f64) = (0.9, 0.999);
    const EPS: f64 = 1e-8;

    /// The state before the first step, for a module of `len` numbers.
    pub fn new(len: usize) -> Self {
        Adam { steps: 0, first: vec![0.0; len], second: vec![0.0; len] }
    }

    /// Takes a step: moves the numbers of `module` against `gradient` at a learning rate.
    pub fn step(&mut self, module: &mut [f32], gradient: &[f32], rate: f64) {
        self.steps += 1;
        let (b1, b2) = Self::BETAS;
        let size = rate / (1.0 - b1.powf(self.steps as f64));
        let correction = (1.0 - b2.powf(self.steps as f64)).sqrt();
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((x, g), (m, v)) in module.iter_mut().zip(gradient).zip(moments) {
            let g = *g as f64;
            *m = (*m as f64 + (1.0 - b1) * (g - *m as f64)) as f32;
            *v = (b2 * *v as f64 + (1.0 - b2) * g * g) as f32;
            *x -= (size * *m as f64 / ((*v as f64).sqrt() / correction + Self::EPS)) as f32;
        }
    }
}
