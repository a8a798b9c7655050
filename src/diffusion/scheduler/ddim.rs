//! DDIM with eta 0: equation 12 of arXiv 2010.02502.

use super::{Convert, Setup, Step};
use crate::Result;

pub(super) fn steps(setup: &Setup) -> Result<Vec<Step>> {
    let last = setup.table.final_level(setup.config.set_alpha_to_one.unwrap_or(true));
    let step = |timestep: usize| {
        let from = setup.table.level(timestep)?;
        let to = timestep.checked_sub(setup.stride()).map_or(Ok(last), |previous| setup.table.level(previous))?;
        let (x0, epsilon) = (setup.prediction.x0(from), setup.prediction.epsilon(from));
        let mut step = Step::at(timestep as f64);
        step.convert = Convert { x: x0.x, out: x0.out, clip: setup.config.clip(true) };
        step.next.m = to.alpha;
        // The predicted noise is that of the model, not that of the clipped sample.
        step.next.base = to.sigma * epsilon.x;
        step.next.out = to.sigma * epsilon.out;
        Ok(step)
    };
    setup.whole_timesteps().into_iter().map(step).collect()
}
