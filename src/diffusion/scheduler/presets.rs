//! Settings of distilled models, as their authors' model cards give them.

use std::str::FromStr;

use super::config::Prediction;
use super::names::list;
use super::{Sampler, SamplerChoice, Spacing, Tuning};
use crate::{Error, Result};

/// How a distilled model is sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preset {
    /// The name under which it is offered.
    pub name: &'static str,
    /// Sampler, spacing and numbers.
    pub choice: SamplerChoice,
    /// Number of steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f32,
    /// True if such models are made from SDXL alone.
    pub sdxl: bool,
}

/// A preset without guidance, as all of these models have none.
const fn preset(name: &'static str, sampler: Sampler, spacing: Option<Spacing>, steps: usize) -> Preset {
    let tuning = Tuning::NONE;
    let choice = SamplerChoice { sampler: Some(sampler), spacing, tuning };
    Preset { name, choice, steps, guidance: 1.0, sdxl: false }
}

/// Euler's method down from the last timestep.
const fn lightning(name: &'static str, steps: usize) -> Preset {
    Preset { sdxl: true, ..preset(name, Sampler::Euler, Some(Spacing::Trailing), steps) }
}

const fn hyper(name: &'static str, steps: usize) -> Preset {
    preset(name, Sampler::Ddim, Some(Spacing::Trailing), steps)
}

const fn tuned(preset: Preset, tuning: Tuning) -> Preset {
    Preset { choice: SamplerChoice { tuning, ..preset.choice }, ..preset }
}

impl Preset {
    /// Every preset, in the order in which they are offered.
    pub const ALL: [Preset; 11] = [
        // latent-consistency/lcm-lora-sdv1-5 and -sdxl
        preset("lcm", Sampler::Lcm, None, 4),
        // h1t/TCD-SD15-LoRA and -SDXL-LoRA
        preset("tcd", Sampler::Tcd, None, 4),
        // stabilityai/sd-turbo and sdxl-turbo
        preset("turbo", Sampler::EulerAncestral, Some(Spacing::Trailing), 1),
        // ByteDance/SDXL-Lightning; the model for one step predicts the sample
        tuned(lightning("lightning-1", 1), Tuning { prediction: Some(Prediction::Sample), ..Tuning::NONE }),
        lightning("lightning-2", 2),
        lightning("lightning-4", 4),
        lightning("lightning-8", 8),
        // ByteDance/Hyper-SD, for SD 1.5 and SDXL; the model for one step is sampled with the highest gamma
        tuned(preset("hyper-1", Sampler::Tcd, None, 1), Tuning { eta: Some(1.0), ..Tuning::NONE }),
        hyper("hyper-2", 2),
        hyper("hyper-4", 4),
        hyper("hyper-8", 8),
    ];

    /// Checks that it can be of use to a model that is SDXL or not.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if it is for SDXL, and the model is another.
    pub fn check(&self, sdxl: bool) -> Result<()> {
        match self.sdxl && !sdxl {
            true => {
                let problem = format!("{} is for models made from SDXL, and this checkpoint is none", self.name);
                Err(Error::invalid("preset", problem).advise("choose another, or give such a checkpoint"))
            }
            false => Ok(()),
        }
    }
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = Preset::ALL.into_iter().find(|preset| preset.name.eq_ignore_ascii_case(name.trim()));
        known.ok_or_else(|| {
            let names = list(&Preset::ALL.map(|preset| preset.name));
            Error::invalid("preset", format!("unknown preset {name:?}: choose one of {names}"))
        })
    }
}
