//! Linear multistep on k-diffusion's sigmas: Adams and Bashforth's method for points that are not evenly spaced.

use super::sigmas::Sigmas;
use super::{HISTORY, Setup, Step};

/// The steps and the standard deviation of the first sample.
pub(super) fn steps(setup: &Setup) -> (Vec<Step>, f64) {
    let sigmas = Sigmas::new(setup);
    let step = |(index, timestep, from, _)| {
        let mut step = setup.call(timestep, from);
        step.convert = setup.to_derivative(from);
        step.push = true;
        let weights = weights(&sigmas.sigmas, index, (index - setup.first + 1).min(1 + HISTORY));
        step.next.m = weights[0];
        step.next.history.copy_from_slice(&weights[1..]);
        step
    };
    (sigmas.steps().map(step).collect(), sigmas.init_noise_sigma(setup))
}

/// The weights of the derivatives at sigma `index` and before, the latest first: the integrals, over the step, of the
/// polynomials that are 1 at one of the last `order` sigmas and 0 at the others.
fn weights(sigmas: &[f64], index: usize, order: usize) -> [f64; 1 + HISTORY] {
    let (from, to) = (sigmas[index], sigmas[index + 1]);
    let (middle, half) = (0.5 * (from + to), 0.5 * (to - from));
    let mut weights = [0.0; 1 + HISTORY];
    for (j, weight) in weights[..order].iter_mut().enumerate() {
        let polynomial = |sigma: f64| -> f64 {
            let others = (0..order).filter(|k| *k != j);
            others.map(|k| (sigma - sigmas[index - k]) / (sigmas[index - j] - sigmas[index - k])).product()
        };
        // Gauss's rule of two points is exact up to the third degree.
        let offset = half / 3f64.sqrt();
        *weight = half * (polynomial(middle - offset) + polynomial(middle + offset));
    }
    weights
}
