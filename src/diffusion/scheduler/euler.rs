//! Euler's method on k-diffusion's sigmas (arXiv 2206.00364), plain and ancestral.

use super::config::{FinalSigma, InterpolationType, Prediction, TimestepType};
use super::table::{Level, spaced_sigmas};
use super::{Sampler, Setup, Spacing, Step};

/// The steps and the standard deviation of the first sample.
pub(super) fn steps(setup: &Setup) -> (Vec<Step>, f64) {
    let (timesteps, sigmas) = sigmas(setup);
    let max = sigmas.iter().copied().fold(0.0, f64::max);
    let init_noise_sigma = match setup.timestep_spacing {
        Spacing::Leading => max.hypot(1.0),
        _ => max,
    };
    let steps = timesteps.iter().zip(sigmas.windows(2)).map(|(t, pair)| step(setup, *t, pair[0], pair[1])).collect();
    (steps, init_noise_sigma)
}

fn step(setup: &Setup, timestep: f64, from: f64, to: f64) -> Step {
    // The amounts of old noise that is left, and of fresh noise (equation 16 of arXiv 2010.02502 with eta 1).
    let (left, fresh) = match setup.sampler {
        Sampler::EulerAncestral => (to * to / from, to * (1.0 - (to / from).powi(2)).sqrt()),
        _ => (to, 0.0),
    };
    let level = Level::from_sigma(from);
    // The noise that is predicted from the scaled sample is the derivative of the unscaled sample with respect to
    // sigma.
    let epsilon = setup.prediction.epsilon(level);
    let mut step = Step::at(timestep);
    step.input_scale = level.alpha as f32;
    step.next.base = 1.0 + (left - from) * epsilon.x * level.alpha;
    step.next.out = (left - from) * epsilon.out;
    step.next.noise = fresh;
    step
}

/// The timesteps, and the sigmas at them, followed by the final one.
fn sigmas(setup: &Setup) -> (Vec<f64>, Vec<f64>) {
    let (config, table) = (setup.config, &setup.table);
    let end = setup.trained;
    let mut timesteps: Vec<f64> = setup.timesteps(end, false).into_iter().map(|t| t as f32 as f64).collect();
    let (table_min, table_max) = table.sigma_range();
    // In diffusers, Euler a has none of the settings that are read only if this is true.
    let own = setup.sampler == Sampler::Euler;
    let mut sigmas: Vec<f64> = match config.interpolation_type.filter(|_| own) {
        Some(InterpolationType::LogLinear) => {
            // There is one sigma more than timesteps: the last step ends at the least of them.
            spaced_sigmas(Spacing::Exponential, table_max, table_min, setup.steps + 1)
        }
        _ => timesteps.iter().map(|timestep| table.sigma(*timestep)).collect(),
    };
    if let (Some(spacing), [first, .., last] | [first @ last]) = (setup.sigma_spacing, &sigmas[..]) {
        let (max, min) = (config.sigma_max.unwrap_or(*first), config.sigma_min.unwrap_or(*last));
        sigmas = spaced_sigmas(spacing, max, min, setup.steps);
        timesteps = sigmas.iter().map(|sigma| table.timestep(*sigma)).collect();
    }
    sigmas.push(match config.final_sigmas_type.filter(|_| own) {
        Some(FinalSigma::SigmaMin) => table_min,
        _ => 0.0,
    });
    if own && config.timestep_type == Some(TimestepType::Continuous) && setup.prediction == Prediction::Velocity {
        timesteps = sigmas[..setup.steps].iter().map(|sigma| 0.25 * sigma.ln()).collect();
    }
    (timesteps, sigmas)
}
