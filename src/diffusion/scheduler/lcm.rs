//! Multistep sampling of latent consistency models: algorithm 3 of arXiv 2310.04378.

use super::{Convert, Setup, Step};
use crate::{Error, Result};

/// The standard deviation of the data in the boundary condition (arXiv 2303.01469).
const SIGMA_DATA: f64 = 0.5;

/// The timesteps, spread evenly over those of the distillation, from the noisiest down.
pub(super) fn timesteps(setup: &Setup) -> Result<Vec<usize>> {
    let config = setup.config;
    let (trained, distilled) = (setup.trained, config.original_inference_steps.unwrap_or(50));
    if !(1..=trained).contains(&distilled) {
        let advice = format!("it must be from 1 to num_train_timesteps = {trained}");
        return Err(config.refuse("original_inference_steps", distilled, &advice));
    }
    if setup.steps > distilled {
        let (sampler, steps) = (setup.sampler, setup.steps);
        return Err(Error::invalid("steps", format!("{sampler} cannot sample in {steps} steps"))
            .advise(format!("choose from 1 to {distilled}")));
    }
    let stride = distilled as f64 / setup.steps as f64;
    let at = |i: usize| (distilled - (i as f64 * stride) as usize) * (trained / distilled) - 1;
    Ok((setup.first..setup.steps).map(at).collect())
}

pub(super) fn steps(setup: &Setup) -> Result<Vec<Step>> {
    let (config, timesteps) = (setup.config, timesteps(setup)?);
    let step = |(index, timestep): (usize, &usize)| {
        let from = setup.table.level(*timestep)?;
        let x0 = setup.prediction.x0(from);
        let mut step = Step::at(*timestep as f64, from);
        step.convert = Convert { x: x0.x, out: x0.out, clip: config.clip(false) };
        // The boundary condition: far from the data the result is the model's prediction, at the data it is the sample
        // itself.
        let scaled = *timestep as f64 * config.timestep_scaling.unwrap_or(10.0);
        let (skip, out) =
            (SIGMA_DATA.powi(2) / (scaled.powi(2) + SIGMA_DATA.powi(2)), scaled / scaled.hypot(SIGMA_DATA));
        let (alpha, sigma) = match timesteps.get(index + 1) {
            Some(next) => setup.table.level(*next).map(|level| (level.alpha, level.sigma))?,
            None => (1.0, 0.0),
        };
        step.next.base = alpha * skip;
        step.next.m = alpha * out;
        step.next.noise = sigma;
        Ok(step)
    };
    timesteps.iter().enumerate().map(step).collect()
}
