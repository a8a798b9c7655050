//! The sigmas of k-diffusion's samplers (arXiv 2206.00364), and the steps between them.

use super::config::{FinalSigma, InterpolationType, Prediction, TimestepType};
use super::spacing::spaced_sigmas;
use super::table::Level;
use super::{Convert, NoiseLevel, Sampler, Setup, Spacing, Step};

/// The timesteps of a sampler that works with k-diffusion's sigmas, and the sigmas at them, followed by the final one.
pub(super) struct Sigmas {
    pub timesteps: Vec<f64>,
    pub sigmas: Vec<f64>,
    /// The step with which the schedule begins.
    first: usize,
}

impl Sigmas {
    pub fn new(setup: &Setup) -> Self {
        let (config, table, sampler) = (setup.config, &setup.table, setup.sampler);
        let mut timesteps: Vec<f64> =
            setup.timesteps(setup.trained, false).into_iter().map(|t| t as f32 as f64).collect();
        let (table_min, table_max) = table.sigma_range();
        // In diffusers, only Euler has the settings that are read if this is true.
        let own = sampler == Sampler::Euler;
        let mut sigmas: Vec<f64> = match config.interpolation_type.filter(|_| own) {
            Some(InterpolationType::LogLinear) => {
                // There is one sigma more than timesteps: the last step ends at the least of them.
                let range = (table_max, table_min);
                spaced_sigmas(Spacing::Exponential, range, setup.steps + 1, table, config.xl)
            }
            _ => timesteps.iter().map(|timestep| table.sigma(*timestep)).collect(),
        };
        if let (Some(spacing), [first, .., last] | [first @ last]) = (setup.sigma_spacing, &sigmas[..]) {
            // In k-diffusion all of training's range, and in diffusers' classes that of the timesteps.
            let (max, min) = match sampler == Sampler::Dpmpp2sAncestral || spacing == Spacing::KlOptimal {
                true => (table_max, table_min),
                false => (config.sigma_max.unwrap_or(*first), config.sigma_min.unwrap_or(*last)),
            };
            sigmas = spaced_sigmas(spacing, (max, min), setup.steps, table, config.xl);
            let dpm2 = matches!(sampler, Sampler::Dpm2 | Sampler::Dpm2Ancestral);
            let whole = matches!(spacing, Spacing::Karras if dpm2) || spacing == Spacing::LuLambdas;
            let timestep = |sigma: &f64| match table.timestep(*sigma) {
                timestep if whole => timestep.round_ties_even(),
                timestep => timestep,
            };
            timesteps = sigmas.iter().map(timestep).collect();
        }
        sigmas.push(match config.final_sigmas_type.filter(|_| own) {
            Some(FinalSigma::SigmaMin) => table_min,
            _ => 0.0,
        });
        if setup.is_continuous() {
            timesteps = sigmas[..setup.steps].iter().map(|sigma| setup.timestep_of(*sigma)).collect();
        }
        Sigmas { timesteps, sigmas, first: setup.first }
    }

    /// The standard deviation of the first sample.
    pub fn init_noise_sigma(&self, setup: &Setup) -> f64 {
        let max = self.sigmas.iter().copied().fold(0.0, f64::max);
        match setup.timestep_spacing {
            Spacing::Leading => max.hypot(1.0),
            _ => max,
        }
    }

    /// The steps to take: the index, the timestep, the sigma at which it begins and that at which it ends.
    pub fn steps(&self) -> impl Iterator<Item = (usize, f64, f64, f64)> {
        let pairs = self.timesteps.iter().zip(self.sigmas.windows(2)).enumerate();
        pairs.skip(self.first).map(|(i, (timestep, pair))| (i, *timestep, pair[0], pair[1]))
    }
}

impl Setup<'_> {
    /// True if the model reads a quarter of ln sigma in place of a timestep. In diffusers, Euler alone knows it.
    fn is_continuous(&self) -> bool {
        let continuous = self.config.timestep_type == Some(TimestepType::Continuous);
        continuous && self.sampler == Sampler::Euler && self.prediction == Prediction::Velocity
    }

    /// The timestep that the model reads at a sigma.
    fn timestep_of(&self, sigma: f64) -> f64 {
        if self.is_continuous() { 0.25 * sigma.ln() } else { self.table.timestep(sigma) }
    }

    /// A call of the model at a timestep, on a sample with noise of this sigma.
    pub(super) fn call(&self, timestep: f64, sigma: f64) -> Step {
        let mut step = Step::at(timestep, NoiseLevel { signal: 1.0, noise: sigma });
        step.input_scale = Level::from_sigma(sigma).alpha as f32;
        step
    }

    /// A call after noise was added to a sample at `from`, as much as [`super::Tuning::s_churn`] says. Returns the
    /// sigma then, too.
    pub(super) fn churned_call(&self, timestep: f64, from: f64) -> (Step, f64) {
        let sigma = self.tuned.churned(from, self.steps);
        if sigma == from {
            return (self.call(timestep, from), from);
        }
        let mut step = self.call(self.timestep_of(sigma), sigma);
        step.level.noise = from;
        step.churn = self.tuned.s_noise * (sigma * sigma - from * from).sqrt();
        (step, sigma)
    }

    /// The conversion of the output to the derivative of the sample with respect to sigma, which is the noise.
    pub(super) fn to_derivative(&self, sigma: f64) -> Convert {
        let level = Level::from_sigma(sigma);
        let epsilon = self.prediction.epsilon(level);
        Convert { x: epsilon.x * level.alpha, out: epsilon.out, clip: f64::INFINITY }
    }

    /// The conversion of the output to the sample without noise.
    pub(super) fn to_denoised(&self, sigma: f64) -> Convert {
        let level = Level::from_sigma(sigma);
        let x0 = self.prediction.x0(level);
        Convert { x: x0.x * level.alpha, out: x0.out, clip: f64::INFINITY }
    }
}
