//! DPM-Solver++ (arXiv 2211.01095) in its multistep forms, of which order 2 is known as DPM++ 2M, and singlestep.

use super::config::{BetaSchedule, FinalSigma};
use super::spacing::spaced_sigmas;
use super::table::Level;
use super::{Convert, HISTORY, Sampler, Setup, Spacing, Step};
use crate::Result;

/// The multistep forms.
pub(super) fn steps(setup: &Setup) -> Result<Vec<Step>> {
    let config = setup.config;
    // k-diffusion's sampler of order 3 does not read the settings of diffusers' class.
    let third = setup.sampler == Sampler::DpmSolverMultistep3Sde;
    let heun = third || is_heun(setup)?;
    let order = if third { 3 } else { config.solver_order()? };
    let (timesteps, levels) = multistep_levels(setup);
    let len = timesteps.len();
    let few = !third && config.lower_order_final.unwrap_or(true) && len < 15;
    let euler_at_final = !third && config.euler_at_final.unwrap_or(false);
    let first_order_last = few || euler_at_final || ends_at_zero(setup);

    let step = |index: usize| {
        let mut order = order.min(index - setup.first + 1);
        if few && index + 2 == len {
            order = order.min(2);
        }
        if first_order_last && index + 1 == len {
            order = 1;
        }
        let (from, to) = (levels[index], levels[index + 1]);
        let mut step = Step::at(timesteps[index], from);
        let x0 = setup.prediction.x0(from);
        step.convert = Convert { x: x0.x, out: x0.out, clip: f64::INFINITY };
        step.push = true;
        let h = to.lambda() - from.lambda();
        // The stochastic equation makes the step longer by eta (k-diffusion's form; eta 1 is that of arXiv 2211.01095).
        let longer = (1.0 + setup.tuned.eta) * h;
        let [first, second, third] = integrals(to, longer);
        step.next.base = to.sigma / from.sigma;
        step.next.m = first;
        // The last step has no noise, and its length is infinite if it ends at sigma 0.
        if setup.tuned.eta > 0.0 && to.sigma > 0.0 {
            step.next.base *= (-setup.tuned.eta * h).exp();
            step.next.noise = setup.tuned.s_noise * to.sigma * (-(-2.0 * setup.tuned.eta * h).exp_m1()).sqrt();
            step.span = setup.span(from.sigma / from.alpha, to.sigma / to.alpha);
        }
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
    Ok((setup.first..len).map(step).collect())
}

/// True for the variant of order 2 that is called heun, false for that called midpoint.
fn is_heun(setup: &Setup) -> Result<bool> {
    match setup.config.solver_type.as_deref().unwrap_or("midpoint") {
        "heun" => Ok(true),
        // The last three belong to other samplers; diffusers reads them as the default.
        "midpoint" | "bh1" | "bh2" | "logrho" => Ok(false),
        other => Err(setup.config.refuse("solver_type", other, "supported are midpoint and heun")),
    }
}

fn ends_at_zero(setup: &Setup) -> bool {
    setup.config.final_sigmas_type.unwrap_or(FinalSigma::Zero) == FinalSigma::Zero
}

/// The integrals of the first, second and third terms of the Taylor expansion (equation 3.3 of the paper), for a step
/// of length h to a level.
fn integrals(to: Level, h: f64) -> [f64; 3] {
    let first = -to.alpha * (-h).exp_m1();
    let second = to.alpha * ((-h).exp_m1() / h + 1.0);
    let third = -to.alpha * (((-h).exp_m1() + h) / (h * h) - 0.5);
    [first, second, third]
}

/// The singlestep form: steps of order 1, 2 and up to `solver_order` in turn, each anew from where the first of them
/// began, with all outputs since then.
pub(super) fn singlestep(setup: &Setup) -> Result<Vec<Step>> {
    let heun = is_heun(setup)?;
    let (timesteps, levels) = multistep_levels(setup);
    let orders = singlestep_orders(setup, timesteps.len())?;
    let step = |index: usize| {
        // Where the schedule begins there are no earlier outputs.
        let order = orders[index].min(index - setup.first + 1);
        let start = index + 1 - order;
        let (base, to) = (levels[start], levels[index + 1]);
        let mut step = Step::at(timesteps[index], levels[index]);
        let x0 = setup.prediction.x0(levels[index]);
        step.convert = Convert { x: x0.x, out: x0.out, clip: f64::INFINITY };
        (step.push, step.save) = (true, order == 1);
        if order > 1 {
            (step.base.x, step.base.saved) = (0.0, 1.0);
        }
        let h = to.lambda() - base.lambda();
        let [first, second, third] = integrals(to, h);
        step.next.base = to.sigma / base.sigma;
        // The weights of the outputs, the latest first: that of the oldest, and those of the differences from it over
        // their distances.
        let mut outputs = [0.0; 1 + HISTORY];
        outputs[order - 1] = first;
        let r = |k: usize| (levels[index - k].lambda() - base.lambda()) / h;
        let mut difference = |k: usize, weight: f64| {
            outputs[k] += weight / r(k);
            outputs[order - 1] -= weight / r(k);
        };
        match (order, heun) {
            (1, _) => {}
            (2, false) => difference(0, 0.5 * first),
            (2, true) | (_, false) => difference(0, second),
            (_, true) => {
                let (r0, r1) = (r(0), r(1));
                difference(1, (second * r0 - 2.0 * third) / (r0 - r1));
                difference(0, (2.0 * third - second * r1) / (r0 - r1));
            }
        }
        step.next.m = outputs[0];
        step.next.history[..HISTORY].copy_from_slice(&outputs[1..]);
        step
    };
    Ok((setup.first..timesteps.len()).map(step).collect())
}

/// The order of each step, as diffusers chooses it.
fn singlestep_orders(setup: &Setup, len: usize) -> Result<Vec<usize>> {
    let order = setup.config.solver_order()?;
    // diffusers sets `lower_order_final` itself if the steps do not come out even, or if the last ends at sigma 0.
    let whole = len.is_multiple_of(order);
    let lower = setup.config.lower_order_final.unwrap_or(false) || !whole || ends_at_zero(setup);
    let mut orders: Vec<usize> = (0..len).map(|index| index % order + 1).collect();
    if (lower && whole) || ends_at_zero(setup) {
        orders[len - 1] = 1;
    }
    Ok(orders)
}

/// The timesteps of a multistep solver, and the noise levels at them, followed by the final one.
pub(super) fn multistep_levels(setup: &Setup) -> (Vec<f64>, Vec<Level>) {
    let (config, table) = (setup.config, &setup.table);
    let dpm = setup.sampler.is_dpm_multistep() || setup.sampler == Sampler::DpmSolverSinglestep;
    let end = match config.lambda_min_clipped {
        Some(min) if dpm => table.clipped_len(min),
        _ => setup.trained,
    };
    let mut timesteps: Vec<f64> = setup.timesteps(end, true).into_iter().map(f64::round_ties_even).collect();
    let mut sigmas: Vec<f64> = timesteps.iter().map(|timestep| table.sigma(*timestep)).collect();
    let (mut min, max) = table.sigma_range();
    if let Some(spacing) = setup.sigma_spacing {
        let mut least = min;
        let mut greatest = max;
        // In diffusers, these lambdas span all of training's range whatever the settings.
        if spacing != Spacing::LuLambdas {
            (least, greatest) = (config.sigma_min.unwrap_or(min), config.sigma_max.unwrap_or(max));
        }
        sigmas = spaced_sigmas(spacing, (greatest, least), setup.steps, table, config.xl);
        // diffusers rounds the timesteps of two spacings and truncates those of two; k-diffusion's are not whole.
        let cosine = setup.sampler.is_dpm_multistep() && config.beta_schedule == Some(BetaSchedule::SquaredcosCapV2);
        let whole = |timestep: f64| match spacing {
            Spacing::Karras | Spacing::LuLambdas if !cosine => timestep.round_ties_even(),
            Spacing::Karras | Spacing::LuLambdas | Spacing::Exponential | Spacing::Beta => timestep.trunc(),
            _ => timestep,
        };
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
