//! Samplers as tables of numbers.
//!
//! Every sampler here is linear in the noisy sample, the model's output, the values that it keeps from earlier steps,
//! and fresh noise; the one exception is the clipping of the predicted sample. So a [`Schedule`] computes the
//! coefficients of all steps once, in f64, and [`SamplerState::step`] applies them, whatever the sampler. One file per
//! family of samplers computes them: `ddim`, `ddpm`, `pndm`, `euler`, `lms`, `second_order`, `dpm`, `unipc`, `lcm`,
//! `tcd`. A [`Step`] is one call of the model, so a sampler that calls it twice in a step has two of them.
//!
//! ```
//! use respodiff::diffusion::noise::{NormalGenerator, Rng};
//! use respodiff::diffusion::scheduler::{SamplerState, Schedule, SchedulerConfig};
//!
//! let config = r#"{"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
//!     "beta_schedule": "scaled_linear", "clip_sample": false, "steps_offset": 1}"#;
//! let config = SchedulerConfig::parse(config, "scheduler_config.json")?;
//! let schedule = Schedule::new(&config, "Euler a".parse()?, 20)?;
//!
//! let mut generator = NormalGenerator::new(Rng::TorchCpu, 42);
//! let (mut x, mut noise) = ([0f32; 64], [0f32; 64]);
//! generator.fill(&mut x);
//! x.iter_mut().for_each(|x| *x *= schedule.init_noise_sigma);
//! let mut state = SamplerState::new(x.len());
//! for step in &schedule.steps {
//!     if step.needs_noise() {
//!         generator.fill(&mut noise);
//!     }
//!     step.churn(&mut x, &noise);
//!     let out = x.map(|x| x * step.input_scale); // The model would see this, and `step.timestep`.
//!     state.step(step, &out, &mut x, &noise);
//! }
//! # Ok::<(), respodiff::Error>(())
//! ```

mod config;
mod ddim;
mod ddpm;
mod dpm;
mod euler;
mod lcm;
mod lms;
mod names;
mod pndm;
mod presets;
mod second_order;
mod sigmas;
mod spacing;
mod table;
mod tcd;
mod tuning;
mod unipc;

pub use config::{Prediction, SchedulerConfig};
pub use names::{Sampler, SamplerChoice, Spacing};
pub use presets::Preset;
pub use tuning::{StepNoise, Tuning};

use config::BetaSchedule;
use spacing::Timesteps;
use table::{Level, Table};
use tuning::Tuned;

use crate::{Error, Result};

/// The number of converted outputs of earlier steps that a step can use.
pub const HISTORY: usize = 3;

/// One step of any sampler: one call of the model and the arithmetic that follows it.
///
/// ```text
/// x    = x + churn * noise
/// out  = model(input_scale * x, timestep)
/// m    = clamp(convert.x * x + convert.out * out, -convert.clip, convert.clip)
/// base = base.x * x + base.saved * saved + base.m * m + base.history · history
/// x    = next.base * base + next.out * out + next.m * m + next.history · history + next.noise * noise
/// if save { saved = base }
/// if push { history = [m, history[0], history[1]] }
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// The timestep that the model reads.
    pub timestep: f32,
    /// The noise level of the sample with which the step begins: before `churn`, and before `input_scale`.
    pub level: NoiseLevel,
    /// The coefficient of fresh noise that is added before the model reads the sample. A step takes noise here or in
    /// `next`, and never in both.
    pub churn: f64,
    /// Factor of the noisy sample before the model reads it.
    pub input_scale: f32,
    /// Factor of the guidance scale: 1 except for CFG++ ([`Sampler::is_cfg_pp`]).
    pub guidance: f64,
    /// The conversion of the model's output to the quantity that the sampler works with.
    pub convert: Convert,
    /// The sample from which the step is taken.
    pub base: Base,
    /// The sample that the step leads to.
    pub next: Next,
    /// True if `base` is kept as `saved`.
    pub save: bool,
    /// True if `m` is put at the front of the history.
    pub push: bool,
    /// If the noise is the increment of a Brownian motion over sigma, over the square root of its length: the sigmas
    /// where it begins and ends, falling. Steps that overlap, as those of DPM++ SDE do, then have noise in common.
    /// `None` for noise that is drawn anew.
    pub span: Option<[f64; 2]>,
}

/// A noise level, in the units of the sampler's samples: a sample at it is `signal * x0 + noise * epsilon`, where x0 is
/// free of noise and epsilon is unit noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseLevel {
    /// The coefficient of the sample without noise.
    pub signal: f64,
    /// The coefficient of unit noise.
    pub noise: f64,
}

impl NoiseLevel {
    /// No noise: the level after the last step.
    pub const CLEAN: Self = Self { signal: 1.0, noise: 0.0 };
}

impl From<Level> for NoiseLevel {
    fn from(level: Level) -> Self {
        Self { signal: level.alpha, noise: level.sigma }
    }
}

/// The coefficients of the converted output `m`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Convert {
    /// The coefficient of the noisy sample.
    pub x: f64,
    /// The coefficient of the model's output.
    pub out: f64,
    /// The bound on `m`; infinite when it is not clipped.
    pub clip: f64,
}

/// The coefficients of the sample from which a step is taken: `x` itself, or a sample corrected (UniPC) or kept from
/// the step before (PNDM).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Base {
    /// The coefficient of the noisy sample.
    pub x: f64,
    /// The coefficient of the saved sample.
    pub saved: f64,
    /// The coefficient of the converted output.
    pub m: f64,
    /// The coefficients of earlier converted outputs, the latest first.
    pub history: [f64; HISTORY],
}

/// The coefficients of the next sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Next {
    /// The coefficient of the sample from which the step is taken.
    pub base: f64,
    /// The coefficient of the model's output.
    pub out: f64,
    /// The coefficient of the converted output.
    pub m: f64,
    /// The coefficients of earlier converted outputs, the latest first.
    pub history: [f64; HISTORY],
    /// The coefficient of fresh noise.
    pub noise: f64,
}

impl Step {
    /// True if fresh noise goes into this step.
    pub fn needs_noise(&self) -> bool {
        self.churn != 0.0 || self.next.noise != 0.0
    }

    /// Adds the noise that goes into `x` before the model reads it. `noise` is read only if there is such noise.
    pub fn churn(&self, x: &mut [f32], noise: &[f32]) {
        if self.churn != 0.0 {
            x.iter_mut().zip(noise).for_each(|(x, noise)| *x += self.churn as f32 * noise);
        }
    }

    /// A step to the model's own output at `timestep`.
    pub(crate) fn to_output(timestep: f32) -> Self {
        let mut step = Step::at(timestep.into(), NoiseLevel::CLEAN);
        (step.next.base, step.next.out) = (0.0, 1.0);
        step
    }

    /// A step from a noise level, which changes nothing yet.
    fn at(timestep: f64, level: impl Into<NoiseLevel>) -> Self {
        Self {
            timestep: timestep as f32,
            level: level.into(),
            churn: 0.0,
            input_scale: 1.0,
            guidance: 1.0,
            convert: Convert { x: 0.0, out: 0.0, clip: f64::INFINITY },
            base: Base { x: 1.0, saved: 0.0, m: 0.0, history: [0.0; HISTORY] },
            next: Next { base: 1.0, out: 0.0, m: 0.0, history: [0.0; HISTORY], noise: 0.0 },
            save: false,
            push: false,
            span: None,
        }
    }

    /// True if every coefficient is finite, in fp32 too.
    fn is_finite(&self) -> bool {
        let Step { timestep, level, churn, input_scale, guidance, convert, base, next, .. } = self;
        let scalars = [convert.x, convert.out, base.x, base.saved, base.m, next.base, next.out, next.m, next.noise];
        let others = [churn, guidance, &level.signal, &level.noise];
        let mut all = scalars.iter().chain(&base.history).chain(&next.history).chain(others);
        timestep.is_finite() && input_scale.is_finite() && all.all(|c| (*c as f32).is_finite())
    }
}

/// All steps of a sampler.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// The sampler that takes the steps.
    pub sampler: Sampler,
    /// The spacing of the steps; `None` if the sampler leaves no choice (LCM).
    pub spacing: Option<Spacing>,
    /// The calls of the model, in their order. Samplers that call it twice in a step have two for each step but the
    /// last, and PNDM has one more than steps.
    pub steps: Vec<Step>,
    /// Factor of unit noise that gives the first sample.
    pub init_noise_sigma: f32,
    /// The choice of settings, with the noise of steps that follows from the way in which the sampler was chosen.
    pub tuning: Tuning,
}

impl Schedule {
    /// The schedule of `steps` steps for a checkpoint with the configuration `config` and the user's `choice`.
    ///
    /// A sampler other than the checkpoint's own reads from `config` the fields that it knows, and has its own defaults
    /// for the rest, as with `from_config` in diffusers.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a number of steps, or a choice, that the sampler does not support;
    /// [`crate::ErrorKind::Unsupported`] for settings of the checkpoint with which it cannot sample;
    /// [`crate::ErrorKind::Damaged`] if neither the user nor the checkpoint names a sampler.
    pub fn new(config: &SchedulerConfig, choice: SamplerChoice, steps: usize) -> Result<Self> {
        Self::from_step(config, choice, steps, 0)
    }

    /// The same schedule without its first steps, for a sample that is brought to the noise level at which step `first`
    /// begins: [`Step::level`] of the first of the steps that are left. A sampler that uses earlier outputs begins
    /// without them there, as it does at step 0.
    ///
    /// # Errors
    /// Those of [`Schedule::new`].
    ///
    /// # Panics
    /// If no step is left.
    pub fn from_step(config: &SchedulerConfig, choice: SamplerChoice, steps: usize, first: usize) -> Result<Self> {
        let sampler = config.chosen_sampler(choice)?;
        let method = sampler.without_cfg_pp();
        let (timestep_spacing, sigma_spacing) = config.chosen_spacing(method, choice.spacing)?;
        let tuned = choice.tuning.of(sampler, choice.sampler.is_some())?;
        let trained = config.num_train_timesteps()?;
        if steps == 0 || steps > trained {
            return Err(Error::invalid("steps", format!("{sampler} cannot sample in {steps} steps"))
                .advise(format!("choose from 1 to {trained}")));
        }
        use Sampler::*;
        use Sampler::{
            Ddim, Ddpm, Dpm2, Dpm2Ancestral, DpmSolverSinglestep, Euler, EulerAncestral, Heun, Lcm, Lms, Pndm,
        };
        let defaults = match method {
            Lcm | Tcd => (0.00085, 0.012, BetaSchedule::ScaledLinear),
            Heun | Dpm2 | Dpm2Ancestral | DpmppSde => (0.00085, 0.012, BetaSchedule::Linear),
            _ => (0.0001, 0.02, BetaSchedule::Linear),
        };
        assert!(first < steps, "no step of {steps} is left after {first}");
        // These can start from a level without signal. The other samplers cannot, because its sigma is infinite.
        let floor = !matches!(method, Ddim | Ddpm | Lcm | Tcd);
        let setup = Setup {
            config,
            sampler: method,
            cfg_pp: sampler.is_cfg_pp(),
            tuned,
            trained,
            table: Table::new(config, trained, defaults, floor)?,
            prediction: choice.tuning.prediction.or(config.prediction_type).unwrap_or(Prediction::Epsilon),
            timestep_spacing,
            sigma_spacing,
            steps,
            first,
        };
        let (steps, init_noise_sigma) = match method {
            Ddpm => (ddpm::steps(&setup)?, 1.0),
            Pndm => (pndm::steps(&setup)?, 1.0),
            Euler | EulerAncestral => euler::steps(&setup),
            Lms => lms::steps(&setup),
            Heun | Dpm2 | Dpm2Ancestral | Dpmpp2sAncestral | DpmppSde => second_order::steps(&setup)?,
            DpmSolverMultistep | DpmSolverMultistepSde | DpmSolverMultistep3Sde => (dpm::steps(&setup)?, 1.0),
            DpmSolverSinglestep => (dpm::singlestep(&setup)?, 1.0),
            UniPc => (unipc::steps(&setup)?, 1.0),
            Lcm => (lcm::steps(&setup)?, 1.0),
            Tcd => (tcd::steps(&setup)?, 1.0),
            // [`Sampler::without_cfg_pp`] leaves DDIM alone.
            _ => (ddim::steps(&setup)?, 1.0),
        };
        let spacing = Some(sigma_spacing.unwrap_or(timestep_spacing)).filter(|_| !method.is_distilled());
        let tuning = Tuning { step_noise: tuned.step_noise, ..choice.tuning };
        let schedule = Self { sampler, spacing, steps, init_noise_sigma: init_noise_sigma as f32, tuning };
        schedule.refuse_degenerate(setup.steps)?;
        Ok(schedule)
    }

    /// Refuses settings that have no sampling equation: noise predicted from a level that is all noise, or two steps at
    /// one noise level.
    fn refuse_degenerate(&self, asked: usize) -> Result<()> {
        let sampler = self.sampler;
        let spaced = self.spacing.map(|spacing| format!(" with {spacing} spacing")).unwrap_or_default();
        if self.steps.is_empty() {
            return Err(Error::invalid(
                "spacing",
                format!("{sampler}{spaced} has no timesteps for {asked} steps: take another spacing"),
            ));
        }
        if !(self.init_noise_sigma > 0.0 && self.init_noise_sigma.is_finite()) {
            let sigma = self.init_noise_sigma;
            return Err(Error::invalid(
                "spacing",
                format!("{sampler}{spaced} would start at sigma {sigma}: take another spacing"),
            ));
        }
        match self.steps.iter().find(|step| !step.is_finite()) {
            None => Ok(()),
            Some(step) => Err(Error::invalid(
                "steps",
                format!(
                    "{sampler}{spaced} in {asked} steps has no finite step at timestep {}: choose another sampler, \
                 spacing or number of steps",
                    step.timestep
                ),
            )),
        }
    }
}

/// The numbers from which each family of samplers computes its coefficients.
struct Setup<'a> {
    config: &'a SchedulerConfig,
    /// The sampler whose steps are taken: [`Sampler::without_cfg_pp`].
    sampler: Sampler,
    /// True if the unconditional prediction is what noises again.
    cfg_pp: bool,
    tuned: Tuned,
    /// `num_train_timesteps`.
    trained: usize,
    table: Table,
    prediction: Prediction,
    timestep_spacing: Spacing,
    sigma_spacing: Option<Spacing>,
    steps: usize,
    /// The step with which the schedule begins, counted from 0.
    first: usize,
}

impl Setup<'_> {
    /// The timesteps of the spacing, those of `Linspace` not rounded.
    fn timesteps(&self, end: usize, skip_zero: bool) -> Vec<f64> {
        let timesteps = Timesteps {
            spacing: self.timestep_spacing,
            num_train_timesteps: self.trained,
            end,
            steps: self.steps,
            skip_zero,
            steps_offset: self.config.steps_offset.unwrap_or(0),
        };
        timesteps.list()
    }

    /// The timesteps of the steps to take, for samplers whose steps lie on the noise levels of training, which have
    /// whole timesteps.
    fn whole_timesteps(&self) -> Result<Vec<usize>> {
        let timesteps = self.timesteps(self.trained, false);
        let timesteps: Vec<usize> = timesteps.into_iter().map(|t| t.round_ties_even() as usize).collect();
        let offset = self.config.steps_offset.unwrap_or(0) as usize;
        if timesteps.first().is_some_and(|first| *first >= self.trained) {
            // Only the leading spacing has an offset that may lead out of the table.
            let fits = |steps: &usize| (steps - 1) * (self.trained / steps) + offset < self.trained;
            let most = (1..self.trained).take_while(fits).count();
            let (sampler, spacing, steps) = (self.sampler, self.timestep_spacing, self.steps);
            let problem = format!("{sampler} with {spacing} spacing cannot sample in {steps} steps");
            return Err(Error::invalid("steps", problem).advise(format!("choose from 1 to {most}, or another spacing")));
        }
        Ok(timesteps.into_iter().skip(self.first).collect())
    }

    /// The span of a step's noise between two sigmas.
    fn span(&self, from: f64, to: f64) -> Option<[f64; 2]> {
        (self.tuned.step_noise == Some(StepNoise::Brownian)).then_some([from, to])
    }

    /// The stride of DDIM and PNDM, whatever the spacing.
    fn stride(&self) -> usize {
        self.trained / self.steps
    }
}

/// The factor of the guidance scale with which a step of the plain sampler is one of CFG++ (arXiv 2406.08070).
///
/// The guided prediction of the noise is `u + scale * (c - u)`. The plain step uses it to remove the noise and to bring
/// back `kept` of it, the ratio of the sigmas after and before. CFG++ brings back the unconditional prediction u
/// instead. Both are linear in `c - u`, so the one is the other with another scale. A step that keeps all noise, as
/// DDIM's from timestep 0 to the level there, has no such scale and stays plain.
fn cfg_pp(kept: f64) -> f64 {
    if kept == 1.0 { 1.0 } else { 1.0 / (1.0 - kept) }
}

/// The state that a running sampler keeps from step to step, for one image.
#[derive(Debug, Clone)]
pub struct SamplerState {
    saved: Vec<f32>,
    history: [Vec<f32>; HISTORY],
}

impl SamplerState {
    /// The state before the first step of a sample of `len` elements. No step allocates anything after that.
    pub fn new(len: usize) -> Self {
        Self { saved: vec![0.0; len], history: std::array::from_fn(|_| vec![0.0; len]) }
    }

    /// Goes back to the state before the first step.
    pub fn reset(&mut self) {
        self.saved.fill(0.0);
        self.history.iter_mut().for_each(|kept| kept.fill(0.0));
    }

    /// Takes `x` one step further, given the model's output for it after [`Step::churn`]. `noise` is read only if
    /// [`Step::needs_noise`].
    ///
    /// # Panics
    ///
    /// If the lengths differ from that of the state.
    pub fn step(&mut self, step: &Step, out: &[f32], x: &mut [f32], noise: &[f32]) {
        let len = self.saved.len();
        let noise = if step.needs_noise() { noise } else { out };
        assert!(out.len() == len && x.len() == len && noise.len() == len, "a sample of another length than the state");
        let Step { convert, base, next, .. } = step;
        let clip = convert.clip as f32;
        let [h0, h1, h2] = &mut self.history;
        for i in 0..len {
            let history = [h0[i], h1[i], h2[i]];
            let m = (convert.x as f32 * x[i] + convert.out as f32 * out[i]).clamp(-clip, clip);
            let from = base.x as f32 * x[i]
                + base.saved as f32 * self.saved[i]
                + base.m as f32 * m
                + dot(&base.history, history);
            x[i] = next.base as f32 * from
                + next.out as f32 * out[i]
                + next.m as f32 * m
                + dot(&next.history, history)
                + next.noise as f32 * noise[i];
            if step.save {
                self.saved[i] = from;
            }
            if step.push {
                (h0[i], h1[i], h2[i]) = (m, history[0], history[1]);
            }
        }
    }
}

fn dot(coefficients: &[f64; HISTORY], history: [f32; HISTORY]) -> f32 {
    coefficients.iter().zip(history).map(|(c, h)| *c as f32 * h).sum()
}
