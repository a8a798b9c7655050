//! Training of a concept (arXiv 2509.15257, algorithm 1).
//!
//! A rollout denoises latents to a random noise level under the neutral prompt, with the modules as learnt so far.
//! There the target is computed, then `L_resp` moves RAM, and `L_sem` moves SAM with the new RAM. The three predictions
//! of the neutral prompt share one run of the down half ([`Halves`]); at guidance 1 they need no unconditional rows.

use super::rollout::Rollout;
use super::{Adam, Halves, HalvesMemory, Objective, Recipe, Variant};
use crate::concept::{Concept, Form, Kind, Metadata, Module};
use crate::draws::Draws;
use crate::engine::{Engine, SessionOptions, Size};
use crate::graph::Keep;
use crate::image::UsedAdapter;
use crate::models::UNetInput;
use crate::{Error, ErrorKind, Result, Subject};
use std::time::{Duration, Instant};

/// The goal of a training: the prompts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[must_use]
pub struct Task {
    /// The direction: toward a concept, or away from it.
    pub kind: Kind,
    /// The prompt of the concept: what to move toward ([`Kind::Fair`]) or away from ([`Kind::Safe`]).
    pub concept: String,
    /// The prompt that the concept is learnt on.
    pub neutral: String,
}

impl Task {
    /// Learns to move toward a concept, such as "a woman", on a neutral prompt, such as "a person".
    pub fn toward(concept: impl Into<String>, neutral: impl Into<String>) -> Self {
        Task { kind: Kind::Fair, concept: concept.into(), neutral: neutral.into() }
    }

    /// Learns to move away from a concept, such as "violence", on a neutral prompt, such as "a scene".
    pub fn away_from(concept: impl Into<String>, neutral: impl Into<String>) -> Self {
        Task { kind: Kind::Safe, concept: concept.into(), neutral: neutral.into() }
    }
}

/// The losses of an iteration: mean squared errors over all numbers of the UNet's prediction.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Losses {
    /// `L_resp`, the distance to the responsible target.
    pub resp: f64,
    /// `L_sem`, the distance to the neutral prompt's prediction, before it is multiplied by lambda; 0 for
    /// [`Variant::RamOnly`].
    pub sem: f64,
}

/// Time that a training has taken, by kind of work.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Times {
    /// Rollouts.
    pub rollout: Duration,
    /// Number of guided steps in the rollouts.
    pub rollout_steps: usize,
    /// Responsible targets.
    pub target: Duration,
    /// The down half for the neutral prompt, and `L_resp` with its gradient.
    pub predictions: Duration,
    /// `L_sem` with its gradient, and the steps of both modules.
    pub backward: Duration,
}

/// The memory plan of a training, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrainingMemory {
    /// The UNet's weights.
    pub model: usize,
    /// The memory that training adds: the rollouts' UNet, and the halves for the losses.
    pub halves: HalvesMemory,
    /// The activations that are kept for the gradients.
    pub keep: Keep,
}

impl std::fmt::Display for TrainingMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
        let [model, weights, activations] = [self.model, self.halves.weights, self.halves.activations].map(mib);
        let kept = match self.keep {
            Keep::All => "",
            Keep::Sums => ", computed a second time for the gradients",
        };
        write!(f, "{model:.0} MiB UNet, {weights:.0} MiB weights for gradients, {activations:.0} MiB activations{kept}")
    }
}

/// A training of a concept. On one device equal settings give equal bits, also after a resumption.
pub struct Trainer {
    task: Task,
    recipe: Recipe,
    seed: u64,
    base_model: String,
    fingerprint: String,
    adapters: Vec<UsedAdapter>,
    neutral: Halves,
    pub(super) state: State,
    rollout: Rollout,
    memory: TrainingMemory,
    /// Time taken so far.
    pub times: Times,
}

/// The state that a checkpoint holds. Between two rollouts a training has no other.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub ram: Module,
    pub sam: Option<Module>,
    pub adam: [Adam; 2],
    pub history: Vec<Losses>,
    pub rollouts: u64,
}

impl Trainer {
    /// Plans and allocates a training at a picture size. `seed` decides the noise, the noise levels and the initial
    /// modules.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a recipe or size that is not possible, [`crate::ErrorKind::OutOfMemory`], and
    /// those of the weights.
    pub fn new(engine: &Engine, task: Task, recipe: Recipe, seed: u64, size: Size) -> Result<Self> {
        recipe.check()?;
        if engine.reads_guidance() {
            let problem = "its UNet reads the guidance scale, and concepts are trained with guidance";
            return Err(Error::unsupported(Subject::Model(engine.name()), problem)
                .advise("train on the model that it was distilled from; the concept may serve both"));
        }
        if engine.reads_masks() {
            let problem = "is an inpainting model, for which no concepts are trained";
            return Err(Error::unsupported(Subject::Model(engine.name()), problem)
                .advise("train on the model that it was made from"));
        }
        let options = SessionOptions::new(size).batch(recipe.batch).concepts(true);
        engine.memory(options)?;
        let [batch, _, h, w] = engine.latent_shape(options);
        let form = match recipe.variant {
            Variant::Constant | Variant::RamOnly | Variant::Shared => Form::Constant,
            Variant::Mlp => Form::Mlp,
            Variant::Conv => Form::Conv,
        };

        // The target leads from the first prompt toward the second.
        let (base, toward) = match task.kind {
            Kind::Fair => (None, task.concept.as_str()),
            Kind::Safe => (Some(task.concept.as_str()), task.neutral.as_str()),
        };
        let neutral = Some(task.neutral.as_str());
        let rolling = engine.inputs(&[None, neutral], batch, size)?;
        let targeting = engine.inputs(&[base, Some(toward)], batch, size)?;
        let conditioning = engine.inputs(&[neutral], batch, size)?;
        let device = engine.device();
        let (config, tensors, weights) = engine.unet()?;
        let input = UNetInput { rows: batch, h, w, tokens: engine.tokens(), shifted: 0 };
        let rollouts = Rollout::memory(engine, options, form)?;
        let memory = |keep| {
            let halves = rollouts + Halves::memory(device, config, weights, input, Some(keep));
            TrainingMemory { model: weights.bytes(), halves, keep }
        };
        // Computing activations a second time costs one forward pass per iteration, so it is only done if memory is
        // short.
        let memory = engine.free_memory().map_or(memory(Keep::All), |free| {
            let fits = |memory: &TrainingMemory| memory.halves.weights + memory.halves.activations <= free;
            Some(memory(Keep::All)).filter(fits).unwrap_or_else(|| memory(Keep::Sums))
        });
        engine.afford(memory.halves.weights + memory.halves.activations, "training")?;
        let guide = (recipe.rollout_steps, recipe.rollout_guidance);
        let rollout = Rollout::new(engine, options, form, guide, rolling, targeting)?;
        let mut neutral = Halves::new(device, config, &tensors, &[weights], input, Some(memory.keep))?;
        neutral.condition(&conditioning)?;

        let shape = engine.bottleneck(options);
        let mut draws = Draws::new(seed, u64::MAX);
        let mut module = || {
            let mut module = Module::new(form, shape, || draws.unit() * 2.0 - 1.0);
            if form == Form::Constant {
                module.parameters.iter_mut().for_each(|p| *p = recipe.init * (draws.unit() * 2.0 - 1.0));
            }
            module
        };
        let ram = module();
        let sam = matches!(recipe.variant, Variant::Constant | Variant::Mlp | Variant::Conv).then(module);
        let adam = [ram.parameters.len(), sam.as_ref().map_or(0, |s| s.parameters.len())].map(Adam::new);
        Ok(Trainer {
            seed,
            base_model: engine.name(),
            fingerprint: engine.fingerprint()?,
            adapters: engine.adapters().iter().map(|(adapter, weight)| adapter.record(*weight)).collect(),
            neutral,
            state: State { ram, sam, adam, history: Vec::new(), rollouts: 0 },
            rollout,
            times: Times::default(),
            memory,
            task,
            recipe,
        })
    }

    /// The recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The task.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The name and the fingerprint of the model that it trains on.
    pub fn base(&self) -> (&str, &str) {
        (&self.base_model, &self.fingerprint)
    }

    /// The adapters that change that model.
    pub(super) fn adapters(&self) -> &[UsedAdapter] {
        &self.adapters
    }

    /// Losses of all iterations so far.
    pub fn history(&self) -> &[Losses] {
        &self.state.history
    }

    /// True between two rollouts, where [`Trainer::save`] holds the whole state.
    pub fn between_rollouts(&self) -> bool {
        self.rollout.is_used_up()
    }

    /// The memory plan.
    pub fn memory(&self) -> TrainingMemory {
        self.memory
    }

    /// One iteration: a step of RAM and one of SAM.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`] if a loss or a module is not finite any more; the modules stay as they were
    /// before. [`crate::ErrorKind::DeviceLost`].
    pub fn iterate(&mut self) -> Result<Losses> {
        let start = Instant::now();
        let not_finite = |error: Error| match error.kind() {
            ErrorKind::NonFinite => diverged(&self.state.history),
            _ => error,
        };
        if self.rollout.is_used_up() {
            let mut draws = Draws::new(self.seed, self.state.rollouts);
            self.rollout.begin(&mut draws, self.recipe.latents_per_rollout);
            self.state.rollouts += 1;
        }
        let modules: Vec<&Module> = [Some(&self.state.ram), self.state.sam.as_ref()].into_iter().flatten().collect();
        self.times.rollout_steps += self.rollout.advance(&modules).map_err(not_finite)?;
        let timestep = self.rollout.timestep() + self.recipe.timestep_offset;
        let rolled = Instant::now();
        let target = self.rollout.target(timestep, self.recipe.target_guidance).map_err(not_finite)?;
        let aimed = Instant::now();

        let before = self.state.clone();
        let learnt = self.learn(&target, timestep);
        if learnt.is_err() {
            self.state = before;
        }
        let (losses, stepped) = learnt?;
        self.state.history.push(losses);
        let end = Instant::now();
        self.times.rollout += rolled - start;
        self.times.target += aimed - rolled;
        self.times.predictions += stepped - aimed;
        self.times.backward += end - stepped;
        Ok(losses)
    }

    /// Takes one step of the modules at the rollout's latents. Returns the losses, and the time at which `L_resp` was
    /// done.
    fn learn(&mut self, target: &[f32], timestep: f32) -> Result<(Losses, Instant)> {
        let recipe = &self.recipe;
        let State { ram, sam, adam, history, .. } = &mut self.state;
        self.neutral.descend(self.rollout.latents(), timestep)?;
        let mut objective = Objective::new(&mut self.neutral);
        let resp = objective.match_score(&[ram], target, 1.0)?;
        let mut gradient = ram.gradient(objective.mid(), &resp.by_shift);
        let mut losses = Losses { resp: resp.loss, sem: 0.0 };
        let stepped = Instant::now();
        // One tensor is moved by the sum of both gradients.
        if recipe.variant == Variant::Shared {
            let neutral = objective.predict(&[])?;
            let sem = objective.match_score(&[ram], &neutral, recipe.lambda)?;
            let other = ram.gradient(objective.mid(), &sem.by_shift);
            gradient.iter_mut().zip(other).for_each(|(g, o)| *g += o);
            losses.sem = sem.loss;
        }
        adam[0].step(&mut ram.parameters, &gradient, recipe.lr_ram);
        if let Some(sam) = sam {
            let neutral = objective.predict(&[])?;
            let sem = objective.match_score(&[ram, sam], &neutral, recipe.lambda)?;
            let gradient = sam.gradient(objective.mid(), &sem.by_shift);
            adam[1].step(&mut sam.parameters, &gradient, recipe.lr_sam);
            losses.sem = sem.loss;
        }
        let finite = |m: &Module| m.parameters.iter().all(|x| x.is_finite());
        if !losses.resp.is_finite() || !losses.sem.is_finite() || !finite(ram) || !sam.as_ref().is_none_or(finite) {
            return Err(diverged(history));
        }
        Ok((losses, stepped))
    }

    /// The concept as learnt so far.
    pub fn concept(&self) -> Concept {
        let State { ram, sam, history, .. } = &self.state;
        let tail = &history[history.len() - history.len().div_ceil(10)..];
        let mean = |f: fn(&Losses) -> f64| tail.iter().map(f).sum::<f64>() / tail.len() as f64;
        let metadata = Metadata {
            concept: self.task.concept.clone(),
            kind: self.task.kind,
            neutral: self.task.neutral.clone(),
            base_model: self.base_model.clone(),
            fingerprint: self.fingerprint.clone(),
            adapters: self.adapters.clone(),
            recipe: self.recipe.to_toml(),
            iterations: history.len() as u64,
            losses: (!tail.is_empty()).then(|| [mean(|l| l.resp), mean(|l| l.sem)]),
            ..Default::default()
        };
        Concept { metadata, ram: ram.clone(), sam: sam.clone() }
    }

    /// Signs that the result is of no use: a training that had no effect, or RAM and SAM that cancel.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let history = &self.state.history;
        let tenth = history.len().div_ceil(10);
        if history.len() >= 20 {
            let mean = |part: &[Losses]| part.iter().map(|l| l.resp).sum::<f64>() / part.len() as f64;
            let (first, last) = (mean(&history[..tenth]), mean(&history[history.len() - tenth..]));
            if last > 0.99 * first {
                let (what, advice) = match last > 1.1 * first {
                    true => ("rose", "train at a lower lr_ram"),
                    false => ("hardly fell", "train longer, or at a higher lr_ram"),
                };
                warnings.push(format!("L_resp {what} ({first:.2e} to {last:.2e}); {advice}"));
            }
        }
        if let (Form::Constant, Some(sam)) = (self.state.ram.form(), &self.state.sam) {
            let (ram, sam) = (&self.state.ram.parameters, &sam.parameters);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
            let (r, s, both) = (dot(ram, ram).sqrt(), dot(sam, sam).sqrt(), dot(ram, sam));
            if r > 0.0 && both < -0.8 * r * s && s > 0.6 * r {
                warnings.push("RAM and SAM all but cancel; lower lambda or lr_sam".into());
            }
        }
        warnings
    }
}

/// The error about the iteration that follows `history`.
fn diverged(history: &[Losses]) -> Error {
    Error::non_finite(format!("iteration {} gave NaN or infinity; the modules before it are kept", history.len() + 1))
        .advise("lower the learning rates")
}
