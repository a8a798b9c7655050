//! UniPC (arXiv 2302.04867): a multistep predictor, and a corrector that uses the next output, which is computed
//! anyway.

use super::config::FinalSigma;
use super::dpm::multistep_levels;
use super::table::Level;
use super::{Convert, HISTORY, Setup, Step};
use crate::Result;

pub(super) fn steps(setup: &Setup) -> Result<Vec<Step>> {
    let config = setup.config;
    let bh1 = match config.solver_type.as_deref().unwrap_or("bh2") {
        "bh1" => true,
        // The last three belong to other samplers; diffusers reads them as the default.
        "bh2" | "midpoint" | "heun" | "logrho" => false,
        other => return Err(config.refuse("solver_type", other, "supported are bh1 and bh2")),
    };
    let predict_x0 = config.predict_x0.unwrap_or(true);
    if !predict_x0 && config.final_sigmas_type != Some(FinalSigma::SigmaMin) {
        let advice =
            "noise prediction cannot end at sigma 0; set final_sigmas_type to sigma_min, or predict_x0 to true";
        return Err(config.refuse("predict_x0", false, advice));
    }
    let max_order = config.solver_order()?;
    let (timesteps, levels) = multistep_levels(setup);
    let len = timesteps.len();
    let order_at = |index: usize| {
        let order = max_order.min(index - setup.first + 1);
        if config.lower_order_final.unwrap_or(true) { order.min(len - index) } else { order }
    };
    let no_corrector = config.disable_corrector.as_deref().unwrap_or_default();

    let step = |index: usize| {
        let mut step = Step::at(timesteps[index], levels[index]);
        let m = if predict_x0 { setup.prediction.x0(levels[index]) } else { setup.prediction.epsilon(levels[index]) };
        step.convert = Convert { x: m.x, out: m.out, clip: f64::INFINITY };
        (step.push, step.save) = (true, true);
        if index > setup.first && !no_corrector.contains(&(index - 1)) {
            let order = order_at(index - 1);
            let update = Update::new(&levels, index - 1, order, order, bh1, predict_x0);
            // The predictor has only earlier outputs; the corrector also has the output at the end of its step, which
            // comes first.
            step.base.x = 0.0;
            step.base.saved = update.base;
            (step.base.m, step.base.history) = (update.end, update.outputs);
        }
        let order = order_at(index);
        let update = Update::new(&levels, index, order, order - 1, bh1, predict_x0);
        step.next.base = update.base;
        step.next.m = update.outputs[0];
        step.next.history[..HISTORY - 1].copy_from_slice(&update.outputs[1..]);
        step
    };
    Ok((setup.first..len).map(step).collect())
}

/// One update from level `index` to the next.
struct Update {
    /// The weight of the sample.
    base: f64,
    /// The weight of the output at the end of the update.
    end: f64,
    /// The weights of the outputs at its start and before, the latest first.
    outputs: [f64; HISTORY],
}

impl Update {
    /// The update uses the output at the start, and `differences` differences of other outputs from it: one for each
    /// earlier output that takes part, and in a corrector (`differences == order`) one for the output at the end.
    fn new(levels: &[Level], index: usize, order: usize, differences: usize, bh1: bool, predict_x0: bool) -> Self {
        let (from, to) = (levels[index], levels[index + 1]);
        let h = to.lambda() - from.lambda();
        // Table 1 of the paper: the data prediction and the noise prediction differ in the sign of h and in the factors
        // of the sample and of the outputs.
        let (base, scale, hh) = match predict_x0 {
            true => (to.sigma / from.sigma, to.alpha, -h),
            false => (to.alpha / from.alpha, to.sigma, h),
        };
        let b_h = if bh1 { hh } else { hh.exp_m1() };
        let mut update = Self { base, end: 0.0, outputs: [-scale * hh.exp_m1(), 0.0, 0.0] };
        if differences == 0 {
            return update;
        }
        // The positions of the outputs relative to the step: those of the earlier ones, and last the end of the step.
        let mut r = [1.0; HISTORY];
        for (k, r) in r[..order - 1].iter_mut().enumerate() {
            *r = (levels[index - 1 - k].lambda() - from.lambda()) / h;
        }
        let corrects = differences == order;
        let rho = match (corrects, order) {
            // The paper's simplification of the lowest orders (its appendix F).
            (true, 1) | (false, 2) => [0.5, 0.0, 0.0],
            _ => rho(&r[..differences], hh, b_h),
        };
        for k in 0..differences {
            let weight = -scale * b_h * rho[k] / r[k];
            update.outputs[0] -= weight;
            match k + 1 == order {
                true => update.end = weight,
                false => update.outputs[k + 1] = weight,
            }
        }
        update
    }
}

/// The weights of the differences, taken at `r`, that give the update its order: solves the paper's order conditions
/// (theorem 3.1) by Gaussian elimination.
fn rho(r: &[f64], hh: f64, b_h: f64) -> [f64; HISTORY] {
    let n = r.len();
    let (mut rows, mut phi, mut factorial) = ([[0.0; HISTORY + 1]; HISTORY], hh.exp_m1() / hh - 1.0, 1.0);
    for (i, row) in rows[..n].iter_mut().enumerate() {
        for (cell, r) in row.iter_mut().zip(r) {
            *cell = r.powi(i as i32);
        }
        row[n] = phi * factorial / b_h;
        factorial *= (i + 2) as f64;
        phi = phi / hh - 1.0 / factorial;
    }
    // The first row is all ones, and distinct levels leave no later pivot zero.
    for pivot in 0..n {
        let above = rows[pivot];
        for row in &mut rows[pivot + 1..n] {
            let factor = row[pivot] / above[pivot];
            row.iter_mut().zip(above).for_each(|(cell, above)| *cell -= factor * above);
        }
    }
    let mut rho = [0.0; HISTORY];
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|k| rows[i][k] * rho[k]).sum();
        rho[i] = (rows[i][n] - known) / rows[i][i];
    }
    rho
}
