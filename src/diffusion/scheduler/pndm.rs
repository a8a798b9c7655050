//! PNDM without its Runge-Kutta steps, which is PLMS: algorithm 2 of arXiv 2202.09778 on predicted noise.
//!
//! Lacking a history, the first step is taken twice: once as DDIM would take it, and again from the same sample with
//! the mean of the outputs at both its ends. This holds for the first step of a schedule that begins later, too.
//! (diffusers takes no step twice there, but computes as if it had: from the third call on, its sample has more noise
//! than the timestep says.)

use super::{HISTORY, Setup, Step};
use crate::Result;

/// The weights of the outputs (Adams-Bashforth), the latest first, for one to four outputs.
const ADAMS_BASHFORTH: [[f64; 1 + HISTORY]; 4] = [
    [1.0, 0.0, 0.0, 0.0],
    [3.0 / 2.0, -1.0 / 2.0, 0.0, 0.0],
    [23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0, 0.0],
    [55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
];

pub(super) fn steps(setup: &Setup) -> Result<Vec<Step>> {
    let mut timesteps = setup.whole_timesteps()?;
    if let Some(second) = timesteps.get(1).copied() {
        timesteps.insert(1, second);
    }
    timesteps.iter().enumerate().map(|(index, timestep)| step(setup, index, *timestep)).collect()
}

fn step(setup: &Setup, index: usize, timestep: usize) -> Result<Step> {
    let again = index == 1;
    // The second call evaluates the model at the end of the first step, and then takes that step anew.
    let (start, end) = match again {
        true => (timestep + setup.stride(), Some(timestep)),
        false => (timestep, timestep.checked_sub(setup.stride())),
    };
    let last = setup.table.final_level(setup.config.set_alpha_to_one.unwrap_or(false));
    let from = setup.table.level(start)?;
    let to = end.map_or(Ok(last), |end| setup.table.level(end))?;
    let weights = match index {
        0 => ADAMS_BASHFORTH[0],
        1 => [0.5, 0.5, 0.0, 0.0],
        _ => ADAMS_BASHFORTH[(index - 1).min(3)],
    };

    let mut step = Step::at(timestep as f64, if again { to } else { from });
    step.convert.out = 1.0;
    step.push = !again;
    step.save = index == 0;
    if again {
        (step.base.x, step.base.saved) = (0.0, 1.0);
    }
    // Equation 9 of the paper: DDIM's step with these outputs in place of one.
    let ratio = to.alpha / from.alpha;
    let noise = to.sigma - from.sigma * ratio;
    let epsilon = setup.prediction.epsilon(from);
    step.next.base = ratio + noise * epsilon.x;
    let [latest, earlier @ ..] = weights.map(|weight| noise * epsilon.out * weight);
    (step.next.m, step.next.history) = (latest, earlier);
    Ok(step)
}
