//! Samplers as tables of numbers.
//!
//! Every sampler here is linear in the noisy sample, the model's output, the values that it keeps from earlier steps,
//! and fresh noise; the one exception is the clipping of the predicted sample. So a [`Schedule`] computes the
//! coefficients of all steps once, in f64, and [`SamplerState::step`] applies them, whatever the sampler. One file per
//! family of samplers computes them: `ddim`, `pndm`, `euler`, `dpm`, `unipc`, `lcm`.
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
//!     let out = x.map(|x| x * step.input_scale); // The model would see this, and `step.timestep`.
//!     if step.needs_noise() {
//!         generator.fill(&mut noise);
//!     }
//!     state.step(step, &out, &mut x, &noise);
//! }
//! # Ok::<(), respodiff::Error>(())
//! ```

mod config;
mod ddim;
mod dpm;
mod euler;
mod lcm;
mod names;
mod pndm;
mod table;
mod unipc;

pub use config::SchedulerConfig;
pub use names::{Sampler, SamplerChoice, Spacing};

use config::{BetaSchedule, Prediction};
use table::{Table, Timesteps};

use crate::{Error, Result};

/// The number of converted outputs of earlier steps that a step can use.
pub const HISTORY: usize = 3;

/// One step of any sampler: one call of the model and the arithmetic that follows it.
///
/// ```text
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
    /// Factor of the noisy sample before the model reads it.
    pub input_scale: f32,
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
        self.next.noise != 0.0
    }

    /// A step to the model's own output at `timestep`.
    pub(crate) fn to_output(timestep: f32) -> Self {
        let mut step = Step::at(timestep.into());
        (step.next.base, step.next.out) = (0.0, 1.0);
        step
    }

    /// A step that changes nothing yet.
    fn at(timestep: f64) -> Self {
        Self {
            timestep: timestep as f32,
            input_scale: 1.0,
            convert: Convert { x: 0.0, out: 0.0, clip: f64::INFINITY },
            base: Base { x: 1.0, saved: 0.0, m: 0.0, history: [0.0; HISTORY] },
            next: Next { base: 1.0, out: 0.0, m: 0.0, history: [0.0; HISTORY], noise: 0.0 },
            save: false,
            push: false,
        }
    }

    /// True if every coefficient is finite, in fp32 too.
    fn is_finite(&self) -> bool {
        let Step { timestep, input_scale, convert, base, next, .. } = self;
        let scalars = [convert.x, convert.out, base.x, base.saved, base.m, next.base, next.out, next.m, next.noise];
        let mut all = scalars.iter().chain(&base.history).chain(&next.history);
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
    /// In the order in which they are taken. PNDM has one more than was asked for.
    pub steps: Vec<Step>,
    /// Factor of unit noise that gives the first sample.
    pub init_noise_sigma: f32,
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
        let sampler = config.chosen_sampler(choice)?;
        let (timestep_spacing, sigma_spacing) = config.chosen_spacing(sampler, choice.spacing)?;
        let trained = config.num_train_timesteps()?;
        if steps == 0 || steps > trained {
            return Err(Error::invalid("steps", format!("{sampler} cannot sample in {steps} steps"))
                .advise(format!("choose from 1 to {trained}")));
        }
        let defaults = match sampler {
            Sampler::Lcm => (0.00085, 0.012, BetaSchedule::ScaledLinear),
            _ => (0.0001, 0.02, BetaSchedule::Linear),
        };
        // DDIM and LCM can start from a level without signal. The other samplers cannot, because its sigma is infinite.
        let floor = !matches!(sampler, Sampler::Ddim | Sampler::Lcm);
        let setup = Setup {
            config,
            sampler,
            trained,
            table: Table::new(config, trained, defaults, floor)?,
            prediction: config.prediction_type.unwrap_or(Prediction::Epsilon),
            timestep_spacing,
            sigma_spacing,
            steps,
        };
        let (steps, init_noise_sigma) = match sampler {
            Sampler::Ddim => (ddim::steps(&setup)?, 1.0),
            Sampler::Pndm => (pndm::steps(&setup)?, 1.0),
            Sampler::Euler | Sampler::EulerAncestral => euler::steps(&setup),
            Sampler::DpmSolverMultistep => (dpm::steps(&setup)?, 1.0),
            Sampler::UniPc => (unipc::steps(&setup)?, 1.0),
            Sampler::Lcm => (lcm::steps(&setup)?, 1.0),
        };
        let spacing = Some(sigma_spacing.unwrap_or(timestep_spacing)).filter(|_| sampler != Sampler::Lcm);
        let schedule = Self { sampler, spacing, steps, init_noise_sigma: init_noise_sigma as f32 };
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
    sampler: Sampler,
    /// `num_train_timesteps`.
    trained: usize,
    table: Table,
    prediction: Prediction,
    timestep_spacing: Spacing,
    sigma_spacing: Option<Spacing>,
    steps: usize,
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

    /// The timesteps for samplers whose steps lie on the noise levels of training, which have whole timesteps.
    fn whole_timesteps(&self) -> Vec<usize> {
        let timesteps = self.timesteps(self.trained, false);
        timesteps.into_iter().map(|timestep| timestep.round_ties_even() as usize).collect()
    }

    /// The stride of DDIM and PNDM, whatever the spacing.
    fn stride(&self) -> usize {
        self.trained / self.steps
    }
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

    /// Takes `x` one step further, given the model's output. `noise` is read only if [`Step::needs_noise`].
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
