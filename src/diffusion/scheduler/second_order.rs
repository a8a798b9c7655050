//! k-diffusion's samplers that call the model twice in a step: at its start, and again at a second point, from which
//! the step is taken anew. The last step, which ends at sigma 0, takes one call, as Euler's method.

use super::sigmas::Sigmas;
use super::{Sampler, Setup, Step};
use crate::Result;

/// The calls of all steps and the standard deviation of the first sample.
pub(super) fn steps(setup: &Setup) -> Result<(Vec<Step>, f64)> {
    if setup.sampler == Sampler::Heun && setup.config.clip(false).is_finite() {
        let advice = "it is for pixels, not for latents; set it to false, or choose another sampler";
        return Err(setup.config.refuse("clip_sample", true, advice));
    }
    let sigmas = Sigmas::new(setup);
    let mut calls = Vec::with_capacity(2 * setup.steps);
    for (index, timestep, from, to) in sigmas.steps() {
        let (mut first, from) = setup.churned_call(timestep, from);
        if to == 0.0 {
            // From the derivative, which is (x - m) / from, the whole way to m.
            first.convert = setup.to_denoised(from);
            (first.next.base, first.next.m) = (0.0, 1.0);
            calls.push(first);
            continue;
        }
        first.save = true;
        let second = match setup.sampler {
            Sampler::Heun => heun(setup, &mut first, (from, to), sigmas.timesteps[index + 1]),
            Sampler::Dpm2 | Sampler::Dpm2Ancestral => dpm2(setup, &mut first, (from, to)),
            Sampler::Dpmpp2sAncestral => dpmpp_2s(setup, &mut first, (from, to)),
            _ => dpmpp_sde(setup, &mut first, (from, to)),
        };
        calls.extend([first, second]);
    }
    Ok((calls, sigmas.init_noise_sigma(setup)))
}

/// Heun's method: the mean of the derivatives at both ends.
fn heun(setup: &Setup, first: &mut Step, (from, to): (f64, f64), end: f64) -> Step {
    first.convert = setup.to_derivative(from);
    first.push = true;
    first.next.m = to - from;
    let mut second = setup.call(end, to);
    second.convert = setup.to_derivative(to);
    (second.base.x, second.base.saved) = (0.0, 1.0);
    (second.next.m, second.next.history[0]) = (0.5 * (to - from), 0.5 * (to - from));
    second
}

/// DPM-Solver-2: the derivative in the middle, by the logarithm of sigma.
fn dpm2(setup: &Setup, first: &mut Step, (from, to): (f64, f64)) -> Step {
    let (to, fresh) = match setup.sampler {
        Sampler::Dpm2Ancestral => setup.tuned.ancestral(from, to),
        _ => (to, 0.0),
    };
    let middle = (from * to).sqrt();
    first.convert = setup.to_derivative(from);
    first.next.m = middle - from;
    let mut second = setup.call(setup.table.timestep(middle), middle);
    second.convert = setup.to_derivative(middle);
    (second.base.x, second.base.saved) = (0.0, 1.0);
    second.next.m = to - from;
    second.next.noise = setup.tuned.s_noise * fresh;
    second
}

/// DPM-Solver++(2S): the sample without noise as it is seen in the middle, by the logarithm of sigma.
fn dpmpp_2s(setup: &Setup, first: &mut Step, (from, to): (f64, f64)) -> Step {
    let (to, fresh) = setup.tuned.ancestral(from, to);
    let middle = (from * to).sqrt();
    first.convert = setup.to_denoised(from);
    (first.next.base, first.next.m) = (middle / from, 1.0 - middle / from);
    let mut second = setup.call(setup.table.timestep(middle), middle);
    second.convert = setup.to_denoised(middle);
    (second.base.x, second.base.saved) = (0.0, 1.0);
    (second.next.base, second.next.m) = (to / from, 1.0 - to / from);
    second.next.noise = setup.tuned.s_noise * fresh;
    second
}

/// DPM-Solver++ for the stochastic equation: as [`dpmpp_2s`], but the way to the middle has its noise too.
fn dpmpp_sde(setup: &Setup, first: &mut Step, (from, to): (f64, f64)) -> Step {
    let middle = (from * to).sqrt();
    let (left, fresh) = setup.tuned.ancestral(from, middle);
    first.convert = setup.to_denoised(from);
    (first.next.base, first.next.m) = (left / from, 1.0 - left / from);
    first.next.noise = setup.tuned.s_noise * fresh;
    first.span = setup.span(from, middle);
    let (left, fresh) = setup.tuned.ancestral(from, to);
    let mut second = setup.call(setup.table.timestep(middle), middle);
    second.convert = setup.to_denoised(middle);
    (second.base.x, second.base.saved) = (0.0, 1.0);
    (second.next.base, second.next.m) = (left / from, 1.0 - left / from);
    second.next.noise = setup.tuned.s_noise * fresh;
    second.span = setup.span(from, to);
    second
}
