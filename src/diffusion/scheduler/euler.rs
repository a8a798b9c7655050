//! Euler's method on k-diffusion's sigmas (arXiv 2206.00364), plain and ancestral.

use super::sigmas::Sigmas;
use super::{Sampler, Setup, Step, cfg_pp};

/// The steps and the standard deviation of the first sample.
pub(super) fn steps(setup: &Setup) -> (Vec<Step>, f64) {
    let sigmas = Sigmas::new(setup);
    let step = |(_, timestep, from, to)| {
        let (left, fresh) = match setup.sampler {
            Sampler::EulerAncestral => setup.tuned.ancestral(from, to),
            _ => (to, 0.0),
        };
        let (mut step, from) = setup.churned_call(timestep, from);
        let derivative = setup.to_derivative(from);
        step.next.base = 1.0 + (left - from) * derivative.x;
        step.next.out = (left - from) * derivative.out;
        step.next.noise = setup.tuned.s_noise * fresh;
        if setup.cfg_pp {
            step.guidance = cfg_pp(left / from);
        }
        step
    };
    (sigmas.steps().map(step).collect(), sigmas.init_noise_sigma(setup))
}
