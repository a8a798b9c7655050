//! DPM-Solver++, multistep (arXiv 2211.01095): order 2 is known as DPM++ 2M.

use super::config::{BetaSchedule, FinalSigma};
use super::table::{Level, spaced_sigmas};
use super::{Convert, Sampler, Setup, Spacing, Step};
use crate::Result;

pub(super) fn steps(setup: &Setup) -> Result<Vec<Step>> {
    let config = setup.config;
    let algorithm = config.algorithm_type.as_deref().unwrap_or("dpmsolver++");
    // "deis" belongs to another sampler; diffusers reads it as the default.
    if !matches!(algorithm, "dpmsolver++" | "deis") {
        let advice = "only dpmsolver++ is supported; set it, or choose another sampler";
        return Err(config.refuse("algorithm_type", algorithm, advice));
    }
    let heun = match config.solver_type.as_deref().unwrap_or("midpoint") {
        "heun" => true,
        // The last three belong to other samplers; diffusers reads them as the default.
        "midpoint" | "bh1" | "bh2" | "logrho" => false,
        other => return Err(config.refuse("solver_type", other, "supported are midpoint and heun")),
    };
    let order = config.solver_order()?;
    let (timesteps, levels) = multistep_levels(setup);
    let len = timesteps.len();
    let few = config.lower_order_final.unwrap_or(true) && len < 15;
    let first_order_last = few
        || config.euler_at_final.unwrap_or(false)
        || config.final_sigmas_type.unwrap_or(FinalSigma::Zero) == FinalSigma::Zero;

    let step = |index: usize| {
        let mut order = order.min(index + 1);
        if few && index + 2 == len {
            order = order.min(2);
        }
        if first_order_last && index + 1 == len {
            order = 1;
        }
        let (from, to) = (levels[index], levels[index + 1]);
        let mut step = Step::at(timesteps[index]);
        let x0 = setup.prediction.x0(from);
        step.convert = Convert { x: x0.x, out: x0.out, clip: f64::INFINITY };
        step.push = true;
        let h = to.lambda() - from.lambda();
        // The integrals of the first, second and third terms of the Taylor expansion (equation 3.3 of the paper).
        let first = -to.alpha * (-h).exp_m1();
        let second = to.alpha * ((-h).exp_m1() / h + 1.0);
        let third = -to.alpha * (((-h).exp_m1() + h) / (h * h) - 0.5);
        step.next.base = to.sigma / from.sigma;
        step.next.m = first;
        if order >= 2 {
            // Finite differences of the outputs: (m - m1) / r0, and (m1 - m2) / r1.
            let r0 = (from.lambda() - levels[index - 1].lambda()) / h;
            let (mut d0, mut d1) = (if heun { second } else { 0.5 * first }, 0.0);
            let mut r1 = 1.0;
            if order == 3 {
                r1 = (levels[index - 1].lambda() - levels[index - 2].lambda()) / h;
                let both = (second * r0 + third) / (r0 + r1);
                (d0, d1) = (second + both, -both);
            }
            step.next.m += d0 / r0;
            step.next.history = [d1 / r1 - d0 / r0, -d1 / r1, 0.0];
        }
        step
    };
    Ok((0..len).map(step).collect())
}

/// The timesteps of a multistep solver, and the noise levels at them, followed by the final one.
pub(super) fn multistep_levels(setup: &Setup) -> (Vec<f64>, Vec<Level>) {
    let (config, table) = (setup.config, &setup.table);
    let dpm = setup.sampler == Sampler::DpmSolverMultistep;
    let end = match config.lambda_min_clipped {
        Some(min) if dpm => table.clipped_len(min),
        _ => setup.trained,
    };
    let mut timesteps: Vec<f64> = setup.timesteps(end, true).into_iter().map(f64::round_ties_even).collect();
    let mut sigmas: Vec<f64> = timesteps.iter().map(|timestep| table.sigma(*timestep)).collect();
    let (mut min, max) = table.sigma_range();
    if let Some(spacing) = setup.sigma_spacing {
        let least = config.sigma_min.unwrap_or(min);
        sigmas = spaced_sigmas(spacing, config.sigma_max.unwrap_or(max), least, setup.steps);
        // diffusers rounds the timesteps of Karras' spacing, and truncates those of the others.
        let rounded =
            spacing == Spacing::Karras && !(dpm && config.beta_schedule == Some(BetaSchedule::SquaredcosCapV2));
        let whole = |timestep: f64| if rounded { timestep.round_ties_even() } else { timestep.trunc() };
        timesteps = sigmas.iter().map(|sigma| whole(table.timestep(*sigma))).collect();
        if !dpm {
            min = least;
        }
    }
    sigmas.push(match config.final_sigmas_type {
        Some(FinalSigma::SigmaMin) => min,
        _ => 0.0,
    });
    (timesteps, sigmas.into_iter().map(Level::from_sigma).collect())
}
