//! The names of samplers and spacings.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use crate::{Error, Result};

/// The method by which a step is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sampler {
    /// Denoising diffusion implicit models with eta 0 (arXiv 2010.02502).
    Ddim,
    /// Pseudo linear multistep of order 4 (arXiv 2202.09778, without its Runge-Kutta warm-up).
    Pndm,
    /// Euler's method (algorithm 2 of arXiv 2206.00364, without churn).
    Euler,
    /// Euler's method with ancestral steps, which replace a part of the noise by fresh noise, as in k-diffusion.
    EulerAncestral,
    /// DPM-Solver++, multistep, order 2 unless the checkpoint says 1 or 3 (arXiv 2211.01095).
    DpmSolverMultistep,
    /// UniPC, order 2 unless the checkpoint says 1 or 3 (arXiv 2302.04867).
    UniPc,
    /// Multistep sampling of a latent consistency model (arXiv 2310.04378).
    Lcm,
}

impl Sampler {
    /// Every sampler, in the order in which they are offered.
    pub const ALL: [Sampler; 7] = [
        Sampler::Ddim,
        Sampler::Pndm,
        Sampler::Euler,
        Sampler::EulerAncestral,
        Sampler::DpmSolverMultistep,
        Sampler::UniPc,
        Sampler::Lcm,
    ];

    /// The class of diffusers that implements it.
    pub fn diffusers_name(self) -> &'static str {
        match self {
            Sampler::Ddim => "DDIMScheduler",
            Sampler::Pndm => "PNDMScheduler",
            Sampler::Euler => "EulerDiscreteScheduler",
            Sampler::EulerAncestral => "EulerAncestralDiscreteScheduler",
            Sampler::DpmSolverMultistep => "DPMSolverMultistepScheduler",
            Sampler::UniPc => "UniPCMultistepScheduler",
            Sampler::Lcm => "LCMScheduler",
        }
    }

    /// Its name in A1111, and so in the metadata of most shared pictures.
    pub fn a1111_name(self) -> &'static str {
        match self {
            Sampler::Ddim => "DDIM",
            Sampler::Pndm => "PLMS",
            Sampler::Euler => "Euler",
            Sampler::EulerAncestral => "Euler a",
            Sampler::DpmSolverMultistep => "DPM++ 2M",
            Sampler::UniPc => "UniPC",
            Sampler::Lcm => "LCM",
        }
    }

    /// All its names, in the form that [`normalize`] returns.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Sampler::Ddim => &["ddim"],
            Sampler::Pndm => &["plms", "pndm"],
            Sampler::Euler => &["euler", "eulerdiscrete"],
            Sampler::EulerAncestral => &["eulera", "eulerancestral", "eulerancestraldiscrete"],
            Sampler::DpmSolverMultistep => &["dpmpp2m", "dpmpp", "dpmsolverpp", "dpmsolvermultistep"],
            Sampler::UniPc => &["unipc", "unipcmultistep"],
            Sampler::Lcm => &["lcm"],
        }
    }

    fn find(key: &str) -> Option<Self> {
        Sampler::ALL.into_iter().find(|sampler| sampler.keys().contains(&key))
    }
}

impl fmt::Display for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.a1111_name())
    }
}

/// The choice of the points on the training schedule where steps are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spacing {
    /// Evenly spaced timesteps from 0 up; the noisiest are left out (table 2 of arXiv 2305.08891).
    Leading,
    /// Evenly spaced timesteps from the noisiest down (table 2 of arXiv 2305.08891).
    Trailing,
    /// Evenly spaced timesteps from the first to the last (table 2 of arXiv 2305.08891).
    Linspace,
    /// Sigmas whose seventh roots are evenly spaced (equation 5 of arXiv 2206.00364). Not a `timestep_spacing`.
    #[serde(skip)]
    Karras,
    /// Sigmas whose logarithms are evenly spaced. Not a `timestep_spacing`.
    #[serde(skip)]
    Exponential,
}

impl Spacing {
    /// Every spacing, in the order in which they are offered.
    pub const ALL: [Spacing; 5] =
        [Spacing::Leading, Spacing::Trailing, Spacing::Linspace, Spacing::Karras, Spacing::Exponential];

    /// The name under which it is offered.
    pub fn name(self) -> &'static str {
        self.keys()[0]
    }

    /// The "Schedule type" of A1111 that comes nearest; "Automatic" if A1111 has no name for it.
    pub fn a1111_name(self) -> &'static str {
        match self {
            Spacing::Leading => "Automatic",
            Spacing::Trailing => "SGM Uniform",
            Spacing::Linspace => "Uniform",
            Spacing::Karras => "Karras",
            Spacing::Exponential => "Exponential",
        }
    }

    /// All its names, in the form that [`normalize`] returns.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Spacing::Leading => &["leading"],
            Spacing::Trailing => &["trailing", "sgmuniform", "simple"],
            Spacing::Linspace => &["linspace", "normal", "uniform"],
            Spacing::Karras => &["karras"],
            Spacing::Exponential => &["exponential"],
        }
    }
}

impl fmt::Display for Spacing {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Spacing {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let key = normalize(name);
        let known = Spacing::ALL.into_iter().find(|spacing| spacing.keys().contains(&key.as_str()));
        known.ok_or_else(|| {
            Error::invalid("spacing", format!("unknown spacing {name:?}: choose one of {}", list(&Spacing::ALL)))
        })
    }
}

/// The user's choice of a sampler; `None` leaves a field to the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SamplerChoice {
    /// Another sampler than the checkpoint's own.
    pub sampler: Option<Sampler>,
    /// Another spacing than the checkpoint's own.
    pub spacing: Option<Spacing>,
}

/// Reads a sampler by its name in diffusers, A1111 or k-diffusion, alone or followed by a spacing: "Euler a",
/// "DPMSolverMultistepScheduler", "dpmpp_2m", "DPM++ 2M Karras". Case, spaces and punctuation are ignored.
impl FromStr for SamplerChoice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let key = normalize(name);
        if let Some(sampler) = Sampler::find(&key) {
            return Ok(Self { sampler: Some(sampler), spacing: None });
        }
        for spacing in Spacing::ALL {
            for suffix in spacing.keys() {
                if let Some(sampler) = key.strip_suffix(suffix).and_then(Sampler::find) {
                    return Ok(Self { sampler: Some(sampler), spacing: Some(spacing) });
                }
            }
        }
        Err(Error::invalid(
            "sampler",
            format!(
                "unknown sampler {name:?}: choose one of {} (or its class in diffusers), optionally followed by {}",
                list(&Sampler::ALL),
                list(&Spacing::ALL)
            ),
        ))
    }
}

/// `name` in lower case, without the differences between common spellings: "sample_" before it (k-diffusion),
/// "Scheduler" after it (diffusers), spaces and punctuation are removed, and "++" becomes "pp".
fn normalize(name: &str) -> String {
    let plain = name.to_lowercase().replace('+', "p").replace(|c: char| !c.is_ascii_alphanumeric(), "");
    let plain = plain.strip_prefix("sample").unwrap_or(&plain);
    plain.strip_suffix("scheduler").unwrap_or(plain).to_owned()
}

pub(super) fn list(names: &[impl fmt::Display]) -> String {
    names.iter().map(|name| name.to_string()).collect::<Vec<_>>().join(", ")
}
