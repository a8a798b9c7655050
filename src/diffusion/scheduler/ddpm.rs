//! DDPM: algorithm 2 of arXiv 2006.11239, over a part of training's timesteps.

use super::config::VarianceType;
use super::table::Level;
use super::{Convert, Setup, Step};
use crate::Result;

pub(super) fn steps(setup: &Setup) -> Result<Vec<Step>> {
    let config = setup.config;
    let large = match config.variance_type {
        Some(VarianceType::FixedLarge) => true,
        Some(VarianceType::FixedLargeLog) => {
            let advice = "it is the root of a negative number; set fixed_large or fixed_small";
            return Err(config.refuse("variance_type", "fixed_large_log", advice));
        }
        _ => false,
    };
    let timesteps = setup.whole_timesteps()?;
    let step = |(index, timestep): (usize, &usize)| {
        let from = setup.table.level(*timestep)?;
        let to = match timesteps.get(index + 1) {
            Some(next) => setup.table.level(*next)?,
            None => Level { alpha: 1.0, sigma: 0.0 },
        };
        let x0 = setup.prediction.x0(from);
        let mut step = Step::at(*timestep as f64, from);
        step.convert = Convert { x: x0.x, out: x0.out, clip: config.clip(true) };
        // Equation 7: alpha and beta are those of the whole step.
        let alpha = (from.alpha / to.alpha).powi(2);
        let beta = 1.0 - alpha;
        step.next.m = to.alpha * beta / from.sigma.powi(2);
        step.next.base = alpha.sqrt() * (to.sigma / from.sigma).powi(2);
        // As in diffusers, the step from timestep 0 adds no noise.
        if *timestep > 0 {
            step.next.noise = if large { beta.sqrt() } else { beta.sqrt() * to.sigma / from.sigma };
        }
        Ok(step)
    };
    timesteps.iter().enumerate().map(step).collect()
}
