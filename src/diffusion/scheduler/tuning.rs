//! Settings by which a sampler's steps can be tuned, and which samplers have them.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Sampler;
use super::config::Prediction;
use crate::{Error, Result};

/// Where the noise of the samplers for the stochastic equation (DPM++ SDE, 2M SDE and 3M SDE) comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepNoise {
    /// Each step draws its noise anew, as in diffusers' `DPMSolverMultistepScheduler`.
    Fresh,
    /// It is the increment of a Brownian motion (`torchsde.BrownianTree`), as in k-diffusion, and so in A1111 and
    /// ComfyUI, whose seeds then give the same noise.
    Brownian,
}

impl FromStr for StepNoise {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "fresh" => Ok(StepNoise::Fresh),
            "brownian" => Ok(StepNoise::Brownian),
            _ => Err(Error::invalid("step_noise", format!("unknown noise {name:?}")).advise("give fresh or brownian")),
        }
    }
}

/// Settings of a sampler's own. `None` is the sampler's default. One that the sampler does not have is refused.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Tuning {
    /// The amount of fresh noise, from 0 (none) to 1. DDIM: 0 unless set (arXiv 2010.02502). TCD: its gamma, 0.3 unless
    /// set (arXiv 2402.19159). Ancestral and stochastic samplers: 1 unless set, as in k-diffusion.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta: Option<f64>,
    /// Noise that Euler, Heun and DPM2 add before their steps: S_churn of arXiv 2206.00364, 0 unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s_churn: Option<f64>,
    /// The least sigma at which noise is added: S_tmin, 0 unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s_tmin: Option<f64>,
    /// The greatest sigma at which noise is added: S_tmax, infinite unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s_tmax: Option<f64>,
    /// Factor of all noise that k-diffusion's samplers add: S_noise, 1 unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s_noise: Option<f64>,
    /// The noise of the samplers for the stochastic equation. Unless set, it is k-diffusion's, except if the checkpoint
    /// itself names diffusers' `DPMSolverMultistepScheduler`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_noise: Option<StepNoise>,
    /// Another quantity than the checkpoint's own that the model predicts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
}

/// The settings in use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tuned {
    /// `None` if the sampler has no such noise.
    pub step_noise: Option<StepNoise>,
    pub eta: f64,
    pub s_churn: f64,
    pub s_tmin: f64,
    pub s_tmax: f64,
    pub s_noise: f64,
}

impl Tuning {
    /// Every setting at its default.
    pub const NONE: Tuning = Tuning {
        eta: None,
        s_churn: None,
        s_tmin: None,
        s_tmax: None,
        s_noise: None,
        step_noise: None,
        prediction: None,
    };

    /// The settings that a sampler uses, which is the checkpoint's own or was named by the user.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a setting that it does not have, or that lies beyond the possible.
    pub(super) fn of(&self, sampler: Sampler, named: bool) -> Result<Tuned> {
        let step_noise = match sampler {
            Sampler::DpmSolverMultistepSde if !named => Some(StepNoise::Fresh),
            Sampler::DpmSolverMultistepSde | Sampler::DpmSolverMultistep3Sde | Sampler::DpmppSde => {
                Some(StepNoise::Brownian)
            }
            _ => None,
        };
        let churns = matches!(sampler, Sampler::Euler | Sampler::EulerCfgPp | Sampler::Heun | Sampler::Dpm2);
        let eta = match sampler {
            Sampler::Ddim | Sampler::DdimCfgPp => Some(0.0),
            Sampler::Tcd => Some(0.3),
            Sampler::EulerAncestral | Sampler::EulerAncestralCfgPp | Sampler::Dpm2Ancestral => Some(1.0),
            Sampler::DpmSolverMultistepSde | Sampler::DpmSolverMultistep3Sde => Some(1.0),
            Sampler::Dpmpp2sAncestral | Sampler::DpmppSde => Some(1.0),
            _ => None,
        };
        let noisy = eta.is_some() && !matches!(sampler, Sampler::Ddim | Sampler::DdimCfgPp | Sampler::Tcd);
        let known = [
            ("eta", self.eta, eta.is_some()),
            ("s_churn", self.s_churn, churns),
            ("s_tmin", self.s_tmin, churns),
            ("s_tmax", self.s_tmax, churns),
            ("s_noise", self.s_noise, churns || noisy),
        ];
        let lacks = |field| {
            let advice = "leave it out, or choose a sampler that has it";
            Err(Error::invalid(field, format!("{sampler} has no such setting")).advise(advice))
        };
        if self.step_noise.is_some() && step_noise.is_none() {
            return lacks("step_noise");
        }
        for (field, value, has) in known {
            let Some(value) = value else { continue };
            if !has {
                return lacks(field);
            }
            // S_tmax alone may be infinite.
            if value.is_nan() || value < 0.0 || (value.is_infinite() && field != "s_tmax") {
                return Err(Error::invalid(field, format!("{value} is not possible")).advise("give 0 or more"));
            }
        }
        if let Some(eta) = self.eta.filter(|eta| *eta > 1.0) {
            return Err(Error::invalid("eta", format!("{eta} is not possible")).advise("give 0 to 1"));
        }
        Ok(Tuned {
            step_noise: step_noise.map(|default| self.step_noise.unwrap_or(default)),
            eta: self.eta.or(eta).unwrap_or(0.0),
            s_churn: self.s_churn.unwrap_or(0.0),
            s_tmin: self.s_tmin.unwrap_or(0.0),
            s_tmax: self.s_tmax.unwrap_or(f64::INFINITY),
            s_noise: self.s_noise.unwrap_or(1.0),
        })
    }
}

impl Tuned {
    /// The sigma to which noise is raised before a step from `sigma`, in a schedule of `steps` steps (algorithm 2 of
    /// arXiv 2206.00364).
    pub fn churned(&self, sigma: f64, steps: usize) -> f64 {
        match self.s_tmin <= sigma && sigma <= self.s_tmax {
            true => sigma * (1.0 + (self.s_churn / steps as f64).min(2f64.sqrt() - 1.0)),
            false => sigma,
        }
    }

    /// The sigma to which a step from one sigma to another goes without noise, and the standard deviation of the noise
    /// that is then added: equation 16 of arXiv 2010.02502 in k-diffusion's terms.
    pub fn ancestral(&self, from: f64, to: f64) -> (f64, f64) {
        let up = self.eta * to * (1.0 - (to / from).powi(2)).sqrt();
        ((to * to - up * up).sqrt(), up)
    }
}
