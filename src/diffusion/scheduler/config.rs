//! `scheduler_config.json`: the noise levels that a checkpoint was trained at, and the settings to sample it with.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::names::list;
use super::{Sampler, SamplerChoice, Spacing};
use crate::{Error, Result};

/// Fields of models that were trained in another way: with EDM's preconditioning (arXiv 2206.00364), or by flow
/// matching.
const OTHER_MODELS: [&str; 6] =
    ["sigma_data", "shift", "base_shift", "max_shift", "stochastic_sampling", "invert_sigmas"];

/// A `scheduler_config.json` of diffusers, under its own field names.
///
/// A field is `None` if the file has no such field or has null. Its default differs from sampler to sampler, and is in
/// the sampler's code. As in diffusers' `from_config`, a config may hold fields of other samplers, also of those that
/// are not supported here, and notes; they are ignored. A field that tells how the model was trained is honoured or
/// refused by every sampler.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    #[serde(rename = "_class_name")]
    pub(super) class_name: Option<String>,

    num_train_timesteps: Option<usize>,
    pub(super) beta_start: Option<f64>,
    pub(super) beta_end: Option<f64>,
    pub(super) beta_schedule: Option<BetaSchedule>,
    pub(super) trained_betas: Option<Vec<f32>>,
    pub(super) rescale_betas_zero_snr: Option<bool>,
    pub(super) prediction_type: Option<Prediction>,
    pub(super) variance_type: Option<VarianceType>,

    pub(super) timestep_spacing: Option<Spacing>,
    pub(super) steps_offset: Option<u32>,
    pub(super) timestep_type: Option<TimestepType>,
    pub(super) interpolation_type: Option<InterpolationType>,
    use_karras_sigmas: Option<bool>,
    use_exponential_sigmas: Option<bool>,
    use_beta_sigmas: Option<bool>,
    use_lu_lambdas: Option<bool>,
    use_flow_sigmas: Option<bool>,
    /// Read by flow sigmas alone, which are refused.
    #[serde(rename = "flow_shift")]
    _flow_shift: Option<f64>,
    use_dynamic_shifting: Option<bool>,
    /// Read by dynamic shifting alone, which is refused.
    #[serde(rename = "time_shift_type")]
    _time_shift_type: Option<String>,
    pub(super) sigma_min: Option<f64>,
    pub(super) sigma_max: Option<f64>,
    pub(super) final_sigmas_type: Option<FinalSigma>,
    pub(super) lambda_min_clipped: Option<f64>,
    pub(super) set_alpha_to_one: Option<bool>,

    pub(super) clip_sample: Option<bool>,
    pub(super) clip_sample_range: Option<f64>,
    thresholding: Option<bool>,
    /// Read by thresholding alone, which is refused.
    #[serde(rename = "dynamic_thresholding_ratio")]
    _dynamic_thresholding_ratio: Option<f64>,
    /// Read by thresholding alone, which is refused.
    #[serde(rename = "sample_max_value")]
    _sample_max_value: Option<f64>,

    skip_prk_steps: Option<bool>,
    pub(super) solver_order: Option<usize>,
    pub(super) solver_type: Option<String>,
    algorithm_type: Option<String>,
    pub(super) lower_order_final: Option<bool>,
    pub(super) euler_at_final: Option<bool>,
    pub(super) predict_x0: Option<bool>,
    pub(super) disable_corrector: Option<Vec<usize>>,
    solver_p: Option<Value>,
    pub(super) original_inference_steps: Option<usize>,
    pub(super) timestep_scaling: Option<f64>,

    /// True if the model is SDXL or a descendant of it.
    #[serde(skip)]
    pub(super) xl: bool,
    /// For messages.
    #[serde(skip)]
    path: PathBuf,
}

/// The course of the betas of training from `beta_start` to `beta_end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum BetaSchedule {
    Linear,
    /// Linear in the square root (latent diffusion).
    ScaledLinear,
    /// The cosine of arXiv 2102.09672, which does not depend on `beta_start` and `beta_end`.
    SquaredcosCapV2,
}

/// The quantity that the model predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity of arXiv 2202.00512.
    #[serde(rename = "v_prediction")]
    Velocity,
    /// The sample without noise.
    Sample,
}

/// The variance of the noise in DDPM's steps (section 3.2 of arXiv 2006.11239).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum VarianceType {
    /// The lower bound of the reverse process' variance.
    FixedSmall,
    /// The same by way of its logarithm.
    FixedSmallLog,
    /// The upper bound, which is the forward process' variance.
    FixedLarge,
    /// In diffusers this takes the root of a negative number.
    FixedLargeLog,
    Learned,
    LearnedRange,
}

/// The timestep that the model reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum TimestepType {
    Discrete,
    /// A quarter of ln sigma (arXiv 2206.00364), for models that predict velocity.
    Continuous,
}

/// Euler's interpolation of a sigma between two timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum InterpolationType {
    Linear,
    LogLinear,
}

/// The sigma at which the last step ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FinalSigma {
    Zero,
    SigmaMin,
}

impl SchedulerConfig {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] if it cannot be read; those of [`SchedulerConfig::parse`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        Self::parse(&text, path)
    }

    /// Parses the text of the file at `path`, which is there for messages alone.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] for text that is not such a file, [`crate::ErrorKind::Unsupported`] for settings
    /// that no sampler here honours.
    pub fn parse(text: &str, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut fields: Map<String, Value> = crate::json::parse(text, path)?;
        fields.retain(|key, value| key == "_class_name" || !(key.starts_with('_') || value.is_null()));
        if let Some(name) =
            OTHER_MODELS.iter().find(|name| fields.get(**name).is_some_and(|v| *v != Value::Bool(false)))
        {
            let problem = format!("{name} = {} belongs to models of another kind", fields[*name]);
            return Err(Error::unsupported(path, problem).advise("give a Stable Diffusion checkpoint"));
        }
        // Each field is first parsed alone, because serde's message about a value does not name the field.
        for (key, value) in &fields {
            let alone = Value::Object(Map::from_iter([(key.clone(), value.clone())]));
            Self::deserialize(alone).map_err(|e| Error::damaged(path, format!("{key} = {value}: {e}")))?;
        }
        let parsed = Self::deserialize(Value::Object(fields)).map_err(|e| Error::damaged(path, e.to_string()))?;
        let config = Self { path: path.to_path_buf(), ..parsed };
        config.refuse_unsupported()?;
        Ok(config)
    }

    /// Refuses settings that no sampler here supports.
    fn refuse_unsupported(&self) -> Result<()> {
        let latent = "it is for pixels, not for latents; set it to false";
        let flow = "flow matching models are not supported";
        for (field, value, advice) in [
            ("thresholding", self.thresholding, latent),
            ("use_flow_sigmas", self.use_flow_sigmas, flow),
            ("use_dynamic_shifting", self.use_dynamic_shifting, flow),
        ] {
            if value == Some(true) {
                return Err(self.refuse(field, true, advice));
            }
        }
        let learned = match self.variance_type {
            Some(VarianceType::Learned) => Some("learned"),
            Some(VarianceType::LearnedRange) => Some("learned_range"),
            _ => None,
        };
        if let Some(learned) = learned {
            return Err(self.refuse("variance_type", learned, "models that predict their variance are not supported"));
        }
        if let Some(solver) = &self.solver_p {
            return Err(self.refuse("solver_p", solver, "UniPC has its own predictor here; set it to null"));
        }
        for (field, value) in [
            ("sigma_min", self.sigma_min),
            ("sigma_max", self.sigma_max),
            ("clip_sample_range", self.clip_sample_range),
        ] {
            if let Some(value) = value.filter(|value| *value <= 0.0) {
                return Err(self.refuse(field, value, "it must be positive"));
            }
        }
        Ok(())
    }

    /// The same for a checkpoint that is SDXL or not. [`super::Spacing::AlignYourSteps`] depends on it.
    #[must_use]
    pub fn of_sdxl(self, xl: bool) -> Self {
        Self { xl, ..self }
    }

    /// The sampler that the checkpoint names.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if it names none, [`crate::ErrorKind::Unsupported`] if it names one that is not
    /// among [`Sampler::ALL`].
    pub fn sampler(&self) -> Result<Sampler> {
        let classes: Vec<&str> = Sampler::ALL.into_iter().filter_map(Sampler::diffusers_name).collect();
        let known = list(&classes);
        let Some(name) = self.class_name.as_deref() else {
            let problem = format!("no _class_name: name a sampler, or put one of {known} there");
            return Err(Error::damaged(&self.path, problem));
        };
        let own = Sampler::ALL.into_iter().find(|sampler| sampler.diffusers_name() == Some(name));
        let own = own.ok_or_else(|| {
            self.refuse("_class_name", name, &format!("supported are {known}; name one of them as the sampler"))
        })?;
        if !matches!(own, Sampler::DpmSolverMultistep | Sampler::DpmSolverSinglestep) {
            return Ok(own);
        }
        match (self.algorithm_type.as_deref(), own) {
            // "deis" belongs to another sampler; diffusers reads it as the default.
            (None | Some("dpmsolver++" | "deis"), own) => Ok(own),
            (Some("sde-dpmsolver++"), Sampler::DpmSolverMultistep) => Ok(Sampler::DpmSolverMultistepSde),
            (Some(other), _) => {
                let advice = "supported are dpmsolver++ and, if it is multistep, sde-dpmsolver++; set one of them, or \
                              choose another sampler";
                Err(self.refuse("algorithm_type", other, advice))
            }
        }
    }

    /// The sampler in use, if it can sample this model at all.
    pub(super) fn chosen_sampler(&self, choice: SamplerChoice) -> Result<Sampler> {
        let sampler = choice.sampler.map_or_else(|| self.sampler(), Ok)?;
        if sampler == Sampler::Pndm {
            // In diffusers an absent field means false. A user who names PLMS wants no Runge-Kutta steps, so the field
            // is required only if PNDM is the checkpoint's own sampler.
            if self.skip_prk_steps.or(choice.sampler.map(|_| true)) != Some(true) {
                let advice = "only true is supported; set it, or choose another sampler";
                return Err(self.refuse("skip_prk_steps", false, advice));
            }
            if self.rescale_betas_zero_snr == Some(true) {
                let advice = "PNDM cannot honour it; choose another sampler";
                return Err(self.refuse("rescale_betas_zero_snr", true, advice));
            }
        }
        Ok(sampler)
    }

    /// The `timestep_spacing` in use, and the spacing of the sigmas if they have one of their own.
    pub(super) fn chosen_spacing(
        &self,
        sampler: Sampler,
        choice: Option<Spacing>,
    ) -> Result<(Spacing, Option<Spacing>)> {
        let (default, sigmas) = match sampler {
            Sampler::Ddim | Sampler::Ddpm | Sampler::Pndm | Sampler::Lcm | Sampler::Tcd => (Spacing::Leading, false),
            _ => (Spacing::Linspace, true),
        };
        // In diffusers, the singlestep solver has no such setting.
        let own = self.timestep_spacing.filter(|_| sampler != Sampler::DpmSolverSinglestep).unwrap_or(default);
        match choice {
            Some(spacing) if sampler.is_distilled() => Err(Error::invalid(
                "spacing",
                format!("{sampler} takes its steps where the model was distilled: it cannot be spaced {spacing}"),
            )
            .advise("leave the spacing out")),
            Some(spacing) if spacing.is_of_sigmas() && !sigmas => Err(Error::invalid(
                "spacing",
                format!("{sampler} steps on whole timesteps: it cannot be spaced {spacing}"),
            )
            .advise("choose leading, trailing or linspace")),
            Some(spacing) if spacing.is_of_sigmas() => Ok((own, Some(spacing))),
            Some(spacing) => Ok((spacing, None)),
            // In diffusers Euler a reads none of these flags.
            None if sigmas && sampler != Sampler::EulerAncestral => Ok((own, self.own_sigmas(sampler)?)),
            None => Ok((own, None)),
        }
    }

    /// The spacing of the sigmas that the flags name.
    fn own_sigmas(&self, sampler: Sampler) -> Result<Option<Spacing>> {
        let lu = self.use_lu_lambdas.filter(|_| sampler.is_dpm_multistep());
        let flags = [
            ("use_karras_sigmas", self.use_karras_sigmas, Spacing::Karras),
            ("use_exponential_sigmas", self.use_exponential_sigmas, Spacing::Exponential),
            ("use_beta_sigmas", self.use_beta_sigmas, Spacing::Beta),
            ("use_lu_lambdas", lu, Spacing::LuLambdas),
        ];
        let mut named = flags.into_iter().filter(|(_, value, _)| *value == Some(true));
        match (named.next(), named.next()) {
            (Some((first, ..)), Some((second, ..))) => {
                Err(self.refuse(second, true, &format!("{first} is true too; only one can be")))
            }
            (one, _) => Ok(one.map(|(_, _, spacing)| spacing)),
        }
    }

    pub(super) fn num_train_timesteps(&self) -> Result<usize> {
        let len = self.num_train_timesteps.unwrap_or(1000);
        match len {
            1..=1_000_000 => Ok(len),
            _ => Err(self.refuse("num_train_timesteps", len, "it must be from 1 to 1000000")),
        }
    }

    /// The order of a DPM-Solver or UniPC.
    pub(super) fn solver_order(&self) -> Result<usize> {
        let order = self.solver_order.unwrap_or(2);
        match order {
            1..=3 => Ok(order),
            _ => Err(self.refuse("solver_order", order, "supported are 1, 2 and 3")),
        }
    }

    /// The bound on predicted samples, infinite when they are not clipped.
    pub(super) fn clip(&self, default: bool) -> f64 {
        match self.clip_sample.unwrap_or(default) {
            true => self.clip_sample_range.unwrap_or(1.0),
            false => f64::INFINITY,
        }
    }

    /// The error about a field with a value that is not supported.
    pub(super) fn refuse(&self, field: &str, value: impl Display, advice: &str) -> Error {
        Error::unsupported(&self.path, format!("{field} = {value} is not supported: {advice}"))
    }
}
