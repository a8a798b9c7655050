//! DDIM: equation 12 of arXiv 2010.02502.

use super::{Convert, Setup, Step, cfg_pp};
use crate::Result;

pub(super) fn steps(setup: &Setup) -> Result<Vec<Step>> {
    let last = setup.table.final_level(setup.config.set_alpha_to_one.unwrap_or(true));
    let step = |timestep: usize| {
        let from = setup.table.level(timestep)?;
        let to = timestep.checked_sub(setup.stride()).map_or(Ok(last), |previous| setup.table.level(previous))?;
        let (x0, epsilon) = (setup.prediction.x0(from), setup.prediction.epsilon(from));
        let mut step = Step::at(timestep as f64, from);
        step.convert = Convert { x: x0.x, out: x0.out, clip: setup.config.clip(true) };
        step.next.m = to.alpha;
        // Equation 16: eta times the standard deviation of the reverse process.
        let fresh = setup.tuned.eta * to.sigma / from.sigma * (1.0 - (from.alpha / to.alpha).powi(2)).sqrt();
        // From a level without signal nothing is left, and rounding must not make it less.
        let left = (to.sigma.powi(2) - fresh.powi(2)).max(0.0).sqrt();
        // The predicted noise is that of the model, not that of the clipped sample.
        step.next.base = left * epsilon.x;
        step.next.out = left * epsilon.out;
        step.next.noise = fresh;
        if setup.cfg_pp {
            step.guidance = cfg_pp((left * from.alpha) / (to.alpha * from.sigma));
        }
        Ok(step)
    };
    setup.whole_timesteps()?.into_iter().map(step).collect()
}
