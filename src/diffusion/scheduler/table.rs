//! The noise levels of training, and the choice of those that the steps of a sampler visit.

use super::config::{BetaSchedule, Prediction, SchedulerConfig};
use crate::{Error, Result};

/// One noise level: `x = alpha * x0 + sigma * epsilon` with `alpha² + sigma² = 1`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Level {
    pub alpha: f64,
    pub sigma: f64,
}

impl Level {
    /// From the cumulative product of training's alphas.
    pub fn from_cumprod(alpha_cumprod: f64) -> Self {
        Self { alpha: alpha_cumprod.sqrt(), sigma: (1.0 - alpha_cumprod).sqrt() }
    }

    /// From k-diffusion's sigma, which is `sigma / alpha`.
    pub fn from_sigma(sigma: f64) -> Self {
        let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
        Self { alpha, sigma: sigma * alpha }
    }

    /// Half the logarithm of the signal-to-noise ratio.
    pub fn lambda(self) -> f64 {
        self.alpha.ln() - self.sigma.ln()
    }
}

/// The weights of the noisy sample and of the model's output in a prediction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weights {
    pub x: f64,
    pub out: f64,
}

impl Prediction {
    /// The predicted sample.
    pub(super) fn x0(self, at: Level) -> Weights {
        match self {
            Prediction::Epsilon => Weights { x: 1.0 / at.alpha, out: -at.sigma / at.alpha },
            Prediction::Velocity => Weights { x: at.alpha, out: -at.sigma },
            Prediction::Sample => Weights { x: 0.0, out: 1.0 },
        }
    }

    /// The predicted noise.
    pub(super) fn epsilon(self, at: Level) -> Weights {
        match self {
            Prediction::Epsilon => Weights { x: 0.0, out: 1.0 },
            Prediction::Velocity => Weights { x: at.sigma, out: at.alpha },
            Prediction::Sample => Weights { x: 1.0 / at.sigma, out: -at.alpha / at.sigma },
        }
    }
}

/// The noise levels of training, by timestep.
///
/// They are in fp32, as when the models were trained: near timestep 0 the rounding of `1 - beta` moves sigma by 2e-5.
pub(super) struct Table {
    alphas_cumprod: Vec<f32>,
    /// k-diffusion's sigmas, rising.
    sigmas: Vec<f32>,
    log_sigmas: Vec<f32>,
}

impl Table {
    /// The table of `config`, with `trained` levels. `defaults` are those of the sampler's class for `(beta_start,
    /// beta_end, beta_schedule)`.
    ///
    /// If `floor` is true, a last level without signal (`rescale_betas_zero_snr`) is raised to one whose sigma is
    /// finite.
    pub fn new(
        config: &SchedulerConfig,
        trained: usize,
        defaults: (f64, f64, BetaSchedule),
        floor: bool,
    ) -> Result<Self> {
        let betas = betas(config, trained, defaults)?;
        let mut alphas_cumprod = cumprod(betas.iter().map(|beta| 1.0 - beta));
        if config.rescale_betas_zero_snr == Some(true) {
            alphas_cumprod = rescale_zero_terminal_snr(&alphas_cumprod);
            if let (true, Some(last)) = (floor, alphas_cumprod.last_mut()) {
                // diffusers' choice: the least positive number of fp16.
                *last = 2f32.powi(-24);
            }
        }
        let sigmas: Vec<f32> = alphas_cumprod.iter().map(|a| ((1.0 - a) / a).sqrt()).collect();
        let log_sigmas = sigmas.iter().map(|sigma| (*sigma as f64).ln() as f32).collect();
        Ok(Self { alphas_cumprod, sigmas, log_sigmas })
    }

    /// The level at a timestep.
    pub fn level(&self, timestep: usize) -> Result<Level> {
        let alpha_cumprod = self.alphas_cumprod.get(timestep).ok_or_else(|| {
            let len = self.alphas_cumprod.len();
            Error::invalid("steps", format!("timestep {timestep} lies beyond training's {len}"))
                .advise("take fewer steps or another spacing")
        })?;
        Ok(Level::from_cumprod(*alpha_cumprod as f64))
    }

    /// The level before timestep 0, at which DDIM and PNDM end.
    pub fn final_level(&self, set_alpha_to_one: bool) -> Level {
        Level::from_cumprod(if set_alpha_to_one { 1.0 } else { self.alphas_cumprod[0] as f64 })
    }

    /// The least and the greatest sigma.
    pub fn sigma_range(&self) -> (f64, f64) {
        (self.sigmas[0] as f64, self.sigmas[self.sigmas.len() - 1] as f64)
    }

    /// The number of timesteps whose [`Level::lambda`] is at least `min`.
    pub fn clipped_len(&self, min: f64) -> usize {
        self.alphas_cumprod.iter().filter(|a| Level::from_cumprod(**a as f64).lambda() >= min).count()
    }

    /// The sigma at a timestep, whole or not.
    pub fn sigma(&self, timestep: f64) -> f64 {
        let last = self.sigmas.len() - 1;
        let low = (timestep.max(0.0) as usize).min(last);
        let (a, b) = (self.sigmas[low] as f64, self.sigmas[(low + 1).min(last)] as f64);
        a + (b - a) * (timestep - low as f64)
    }

    /// The number of timesteps.
    pub fn len(&self) -> usize {
        self.sigmas.len()
    }

    /// The sigma at a timestep, interpolated in the logarithm of sigma, as in k-diffusion.
    pub fn sigma_by_logarithm(&self, timestep: f64) -> f64 {
        let low = timestep as usize;
        let (a, b) = (self.log_sigmas[low] as f64, self.log_sigmas[(low + 1).min(self.len() - 1)] as f64);
        (a + (b - a) * (timestep - low as f64)).exp()
    }

    /// The timestep of a sigma: the inverse of [`Table::sigma_by_logarithm`].
    pub fn timestep(&self, sigma: f64) -> f64 {
        let log_sigma = sigma.max(1e-10).ln();
        let above = self.log_sigmas.partition_point(|log| *log as f64 <= log_sigma);
        let low = above.saturating_sub(1).min(self.log_sigmas.len().saturating_sub(2));
        let (a, b) = (self.log_sigmas[low], self.log_sigmas[(low + 1).min(self.log_sigmas.len() - 1)]);
        let weight = (a as f64 - log_sigma) / (a - b) as f64;
        low as f64 + weight.clamp(0.0, 1.0)
    }
}

fn betas(config: &SchedulerConfig, len: usize, defaults: (f64, f64, BetaSchedule)) -> Result<Vec<f32>> {
    let (start, end) = (config.beta_start.unwrap_or(defaults.0), config.beta_end.unwrap_or(defaults.1));
    for (field, beta) in [("beta_start", start), ("beta_end", end)] {
        if !(beta > 0.0 && beta < 1.0) {
            return Err(config.refuse(field, beta, "it must be between 0 and 1"));
        }
    }
    if let Some(betas) = &config.trained_betas {
        if betas.len() != len || !betas.iter().all(|beta| *beta > 0.0 && *beta < 1.0) {
            let advice = format!("it must be num_train_timesteps = {len} numbers between 0 and 1");
            return Err(config.refuse("trained_betas", format!("[{} values]", betas.len()), &advice));
        }
        return Ok(betas.clone());
    }
    let linear = |start: f64, end: f64| {
        let (start, end) = (start as f32, end as f32);
        let step = (end - start) / (len - 1).max(1) as f32;
        // Each number is computed from the nearer end with one rounding, as in torch's `linspace`.
        (0..len).map(move |i| match i < len / 2 {
            true => step.mul_add(i as f32, start),
            false => (-step).mul_add((len - 1 - i) as f32, end),
        })
    };
    Ok(match config.beta_schedule.unwrap_or(defaults.2) {
        BetaSchedule::Linear => linear(start, end).collect(),
        BetaSchedule::ScaledLinear => linear(start.sqrt(), end.sqrt()).map(|root| root * root).collect(),
        BetaSchedule::SquaredcosCapV2 => {
            // Equation 17 of arXiv 2102.09672, with its cap.
            let alpha_bar =
                |i: usize| ((i as f64 / len as f64 + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
            (0..len).map(|i| (1.0 - alpha_bar(i + 1) / alpha_bar(i)).min(0.999) as f32).collect()
        }
    })
}

/// The cumulative product, computed in f64 and rounded at every element, as torch does.
fn cumprod(alphas: impl Iterator<Item = f32>) -> Vec<f32> {
    alphas
        .scan(1.0f64, |product, alpha| {
            *product *= alpha as f64;
            Some(*product as f32)
        })
        .collect()
}

/// Algorithm 1 of arXiv 2305.08891: shifts and scales the roots so that the last is 0 and the first stays.
fn rescale_zero_terminal_snr(alphas_cumprod: &[f32]) -> Vec<f32> {
    let (first, last) = (alphas_cumprod[0].sqrt(), alphas_cumprod[alphas_cumprod.len() - 1].sqrt());
    let scale = first / (first - last);
    let rescaled: Vec<f32> = alphas_cumprod.iter().map(|a| ((a.sqrt() - last) * scale).powi(2)).collect();
    // The levels are computed by way of the betas, as in training: the rounding of the betas is part of the levels that
    // the model was trained at.
    let ratios = rescaled.iter().zip(std::iter::once(&1.0).chain(&rescaled)).map(|(a, before)| a / before);
    cumprod(ratios.map(|alpha| 1.0 - (1.0 - alpha)))
}
