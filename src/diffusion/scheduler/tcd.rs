//! Strategic stochastic sampling of trajectory consistency models: algorithm 4 of arXiv 2402.19159, in diffusers' form.

use super::{Convert, Setup, Step, lcm};
use crate::Result;

pub(super) fn steps(setup: &Setup) -> Result<Vec<Step>> {
    let timesteps = lcm::timesteps(setup)?;
    let gamma = setup.tuned.eta;
    let step = |(index, timestep): (usize, &usize)| {
        let next = timesteps.get(index + 1).copied();
        // The model's step goes below the next timestep, and noise leads back up to it. The product is rounded to fp32
        // first, as in torch.
        let below = ((1.0 - gamma) as f32 * next.unwrap_or(0) as f32).floor() as usize;
        let (from, below) = (setup.table.level(*timestep)?, setup.table.level(below)?);
        let (x0, epsilon) = (setup.prediction.x0(from), setup.prediction.epsilon(from));
        let (left, fresh) = match next {
            Some(next) if gamma > 0.0 => {
                let ratio = setup.table.level(next)?.alpha / below.alpha;
                (ratio, (1.0 - ratio * ratio).sqrt())
            }
            _ => (1.0, 0.0),
        };
        let mut step = Step::at(*timestep as f64, from);
        step.convert = Convert { x: x0.x, out: x0.out, clip: f64::INFINITY };
        step.next.m = left * below.alpha;
        step.next.base = left * below.sigma * epsilon.x;
        step.next.out = left * below.sigma * epsilon.out;
        step.next.noise = fresh;
        Ok(step)
    };
    timesteps.iter().enumerate().map(step).collect()
}
