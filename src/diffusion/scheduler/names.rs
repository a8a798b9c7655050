//! The names of samplers and spacings.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use super::Tuning;
use crate::{Error, Result};

/// The method by which a step is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sampler {
    /// Denoising diffusion implicit models (arXiv 2010.02502), with eta 0 unless it is set.
    Ddim,
    /// DDIM whose result is noised again with the unconditional prediction (arXiv 2406.08070).
    DdimCfgPp,
    /// Denoising diffusion probabilistic models (arXiv 2006.11239).
    Ddpm,
    /// Pseudo linear multistep of order 4 (arXiv 2202.09778, without its Runge-Kutta warm-up).
    Pndm,
    /// Euler's method (algorithm 2 of arXiv 2206.00364 without its second order).
    Euler,
    /// Euler's method whose result is noised again with the unconditional prediction (arXiv 2406.08070).
    EulerCfgPp,
    /// Euler's method with ancestral steps, which replace a part of the noise by fresh noise, as in k-diffusion.
    EulerAncestral,
    /// [`Sampler::EulerCfgPp`] with ancestral steps.
    EulerAncestralCfgPp,
    /// Heun's method (algorithm 2 of arXiv 2206.00364): two calls a step.
    Heun,
    /// Linear multistep of order 4 (Adams and Bashforth), as in k-diffusion.
    Lms,
    /// DPM-Solver-2 in k-diffusion's form (arXiv 2206.00927): two calls a step.
    Dpm2,
    /// [`Sampler::Dpm2`] with ancestral steps.
    Dpm2Ancestral,
    /// DPM-Solver++, multistep, order 2 unless the checkpoint says 1 or 3 (arXiv 2211.01095).
    DpmSolverMultistep,
    /// The same for the stochastic equation, with fresh noise in every step.
    DpmSolverMultistepSde,
    /// The same at order 3, as in k-diffusion.
    DpmSolverMultistep3Sde,
    /// DPM-Solver++, singlestep, as in diffusers: one call a step, orders 1 and 2 in turn unless the checkpoint says 1
    /// or 3 (arXiv 2211.01095).
    DpmSolverSinglestep,
    /// DPM-Solver++, singlestep of order 2 with ancestral steps, as in k-diffusion: two calls a step.
    Dpmpp2sAncestral,
    /// DPM-Solver++ for the stochastic equation, singlestep, as in k-diffusion: two calls a step.
    DpmppSde,
    /// UniPC, order 2 unless the checkpoint says 1 or 3 (arXiv 2302.04867).
    UniPc,
    /// Multistep sampling of a latent consistency model (arXiv 2310.04378).
    Lcm,
    /// Strategic stochastic sampling of a trajectory consistency model (arXiv 2402.19159), with gamma 0.3 unless eta is
    /// set.
    Tcd,
}

impl Sampler {
    /// Every sampler, in the order in which they are offered.
    pub const ALL: [Sampler; 21] = [
        Sampler::Ddim,
        Sampler::DdimCfgPp,
        Sampler::Ddpm,
        Sampler::Pndm,
        Sampler::Euler,
        Sampler::EulerCfgPp,
        Sampler::EulerAncestral,
        Sampler::EulerAncestralCfgPp,
        Sampler::Heun,
        Sampler::Lms,
        Sampler::Dpm2,
        Sampler::Dpm2Ancestral,
        Sampler::DpmSolverMultistep,
        Sampler::DpmSolverMultistepSde,
        Sampler::DpmSolverMultistep3Sde,
        Sampler::DpmSolverSinglestep,
        Sampler::Dpmpp2sAncestral,
        Sampler::DpmppSde,
        Sampler::UniPc,
        Sampler::Lcm,
        Sampler::Tcd,
    ];

    /// The class of diffusers that implements it. `None` if there is none, or if a class is another sampler too:
    /// `DPMSolverMultistepScheduler` is [`Sampler::DpmSolverMultistep`] unless its `algorithm_type` is
    /// `sde-dpmsolver++`.
    pub fn diffusers_name(self) -> Option<&'static str> {
        Some(match self {
            Sampler::Ddim => "DDIMScheduler",
            Sampler::Ddpm => "DDPMScheduler",
            Sampler::Pndm => "PNDMScheduler",
            Sampler::Euler => "EulerDiscreteScheduler",
            Sampler::EulerAncestral => "EulerAncestralDiscreteScheduler",
            Sampler::Heun => "HeunDiscreteScheduler",
            Sampler::Lms => "LMSDiscreteScheduler",
            Sampler::Dpm2 => "KDPM2DiscreteScheduler",
            Sampler::Dpm2Ancestral => "KDPM2AncestralDiscreteScheduler",
            Sampler::DpmSolverMultistep => "DPMSolverMultistepScheduler",
            Sampler::DpmSolverSinglestep => "DPMSolverSinglestepScheduler",
            Sampler::DpmppSde => "DPMSolverSDEScheduler",
            Sampler::UniPc => "UniPCMultistepScheduler",
            Sampler::Lcm => "LCMScheduler",
            Sampler::Tcd => "TCDScheduler",
            Sampler::DdimCfgPp | Sampler::EulerCfgPp | Sampler::EulerAncestralCfgPp => return None,
            Sampler::DpmSolverMultistepSde | Sampler::DpmSolverMultistep3Sde | Sampler::Dpmpp2sAncestral => {
                return None;
            }
        })
    }

    /// Its name in A1111 or ComfyUI, and so in the metadata of most shared pictures.
    pub fn a1111_name(self) -> &'static str {
        match self {
            Sampler::Ddim => "DDIM",
            Sampler::DdimCfgPp => "DDIM CFG++",
            Sampler::Ddpm => "DDPM",
            Sampler::Pndm => "PLMS",
            Sampler::Euler => "Euler",
            Sampler::EulerCfgPp => "Euler CFG++",
            Sampler::EulerAncestral => "Euler a",
            Sampler::EulerAncestralCfgPp => "Euler a CFG++",
            Sampler::Heun => "Heun",
            Sampler::Lms => "LMS",
            Sampler::Dpm2 => "DPM2",
            Sampler::Dpm2Ancestral => "DPM2 a",
            Sampler::DpmSolverMultistep => "DPM++ 2M",
            Sampler::DpmSolverMultistepSde => "DPM++ 2M SDE",
            Sampler::DpmSolverMultistep3Sde => "DPM++ 3M SDE",
            Sampler::DpmSolverSinglestep => "DPM++ 2S",
            Sampler::Dpmpp2sAncestral => "DPM++ 2S a",
            Sampler::DpmppSde => "DPM++ SDE",
            Sampler::UniPc => "UniPC",
            Sampler::Lcm => "LCM",
            Sampler::Tcd => "TCD",
        }
    }

    /// All its names, in the form that [`normalize`] returns.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Sampler::Ddim => &["ddim"],
            Sampler::DdimCfgPp => &["ddimcfgpp"],
            Sampler::Ddpm => &["ddpm"],
            Sampler::Pndm => &["plms", "pndm"],
            Sampler::Euler => &["euler", "eulerdiscrete"],
            Sampler::EulerCfgPp => &["eulercfgpp"],
            Sampler::EulerAncestral => &["eulera", "eulerancestral", "eulerancestraldiscrete"],
            Sampler::EulerAncestralCfgPp => &["euleracfgpp", "eulerancestralcfgpp"],
            Sampler::Heun => &["heun", "heundiscrete"],
            Sampler::Lms => &["lms", "lmsdiscrete"],
            Sampler::Dpm2 => &["dpm2", "kdpm2", "kdpm2discrete"],
            Sampler::Dpm2Ancestral => &["dpm2a", "dpm2ancestral", "kdpm2a", "kdpm2ancestral", "kdpm2ancestraldiscrete"],
            Sampler::DpmSolverMultistep => &["dpmpp2m", "dpmpp", "dpmsolverpp", "dpmsolvermultistep"],
            Sampler::DpmSolverMultistepSde => &["dpmpp2msde"],
            Sampler::DpmSolverMultistep3Sde => &["dpmpp3msde"],
            Sampler::DpmSolverSinglestep => &["dpmpp2s", "dpmsolversinglestep"],
            Sampler::Dpmpp2sAncestral => &["dpmpp2sa", "dpmpp2sancestral"],
            Sampler::DpmppSde => &["dpmppsde", "dpmsolversde"],
            Sampler::UniPc => &["unipc", "unipcmultistep"],
            Sampler::Lcm => &["lcm"],
            Sampler::Tcd => &["tcd"],
        }
    }

    fn find(key: &str) -> Option<Self> {
        // "k_" before a name says that it is k-diffusion's, as in `k_euler_a`.
        let find = |key: &str| Sampler::ALL.into_iter().find(|sampler| sampler.keys().contains(&key));
        find(key).or_else(|| find(key.strip_prefix('k')?))
    }

    /// True if the guided prediction is noised again with the unconditional one (CFG++, arXiv 2406.08070). Such a
    /// sampler has scales from 0 to about 2, and guides at each of them, 1 and less included.
    pub fn is_cfg_pp(self) -> bool {
        self.without_cfg_pp() != self
    }

    /// The guidance scale by default, where `model` is the model's ([`crate::Engine::default_guidance`]): with CFG++ it
    /// is 0.6, which its paper compares with 7.5.
    pub fn default_guidance(self, model: f32) -> f32 {
        if self.is_cfg_pp() { 0.6 } else { model }
    }

    /// True if there is guidance at a scale: above 1, and with CFG++ at any.
    pub fn guides(self, scale: f32) -> bool {
        scale > 1.0 || self.is_cfg_pp()
    }

    /// True if it steps where the model was distilled, whatever the spacing.
    pub(super) fn is_distilled(self) -> bool {
        matches!(self, Sampler::Lcm | Sampler::Tcd)
    }

    /// True for DPM-Solver++ in its multistep forms.
    pub(super) fn is_dpm_multistep(self) -> bool {
        use Sampler::{DpmSolverMultistep, DpmSolverMultistep3Sde, DpmSolverMultistepSde};
        matches!(self, DpmSolverMultistep | DpmSolverMultistepSde | DpmSolverMultistep3Sde)
    }

    /// The sampler whose steps it takes with another guidance.
    pub(super) fn without_cfg_pp(self) -> Self {
        match self {
            Sampler::DdimCfgPp => Sampler::Ddim,
            Sampler::EulerCfgPp => Sampler::Euler,
            Sampler::EulerAncestralCfgPp => Sampler::EulerAncestral,
            other => other,
        }
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
    /// Evenly spaced timesteps from the noisiest down, rounded (table 2 of arXiv 2305.08891).
    Trailing,
    /// Evenly spaced timesteps from the first to the last (table 2 of arXiv 2305.08891).
    Linspace,
    /// Sigmas whose seventh roots are evenly spaced (equation 5 of arXiv 2206.00364). This and all that follow are
    /// spacings of sigmas, and not a `timestep_spacing`.
    #[serde(skip)]
    Karras,
    /// Sigmas whose logarithms are evenly spaced.
    #[serde(skip)]
    Exponential,
    /// Sigmas at the quantiles of the beta distribution with alpha = beta = 0.6 (arXiv 2407.12173), as in diffusers and
    /// A1111. ComfyUI takes timesteps at them instead.
    #[serde(skip)]
    Beta,
    /// Sigmas whose arc tangents are evenly spaced (arXiv 2404.14507, theorem 3.1), as in ComfyUI. A1111's list has one
    /// point more, and ends at the least sigma instead of at 0.
    #[serde(skip)]
    KlOptimal,
    /// The published sigmas of Align Your Steps (arXiv 2404.14507) for ten steps, of Stable Diffusion or of SDXL, and
    /// for other numbers of steps their logarithms interpolated.
    #[serde(skip)]
    AlignYourSteps,
    /// Timesteps evenly spaced from the last one down and not rounded, without the one at the end, as in A1111 and
    /// ComfyUI.
    #[serde(skip)]
    SgmUniform,
    /// Every so many-th of training's sigmas from the greatest down, as in A1111 and ComfyUI.
    #[serde(skip)]
    Simple,
    /// [`Spacing::Exponential`] with whole timesteps: `use_lu_lambdas` of diffusers (arXiv 2211.01095).
    #[serde(skip)]
    LuLambdas,
}

impl Spacing {
    /// Every spacing, in the order in which they are offered.
    pub const ALL: [Spacing; 11] = [
        Spacing::Leading,
        Spacing::Trailing,
        Spacing::Linspace,
        Spacing::Karras,
        Spacing::Exponential,
        Spacing::Beta,
        Spacing::KlOptimal,
        Spacing::AlignYourSteps,
        Spacing::SgmUniform,
        Spacing::Simple,
        Spacing::LuLambdas,
    ];

    /// The name under which it is offered.
    pub fn name(self) -> &'static str {
        self.keys()[0]
    }

    /// The "Schedule type" of A1111; a name that A1111 does not know if it has no such spacing; "Automatic" for
    /// leading.
    pub fn a1111_name(self) -> &'static str {
        match self {
            Spacing::Leading => "Automatic",
            Spacing::Trailing => "Trailing",
            Spacing::Linspace => "Uniform",
            Spacing::Karras => "Karras",
            Spacing::Exponential => "Exponential",
            Spacing::Beta => "Beta",
            Spacing::KlOptimal => "KL Optimal",
            Spacing::AlignYourSteps => "Align Your Steps",
            Spacing::SgmUniform => "SGM Uniform",
            Spacing::Simple => "Simple",
            Spacing::LuLambdas => "Lu Lambdas",
        }
    }

    /// True if it spaces sigmas rather than timesteps.
    pub(super) fn is_of_sigmas(self) -> bool {
        !matches!(self, Spacing::Leading | Spacing::Trailing | Spacing::Linspace)
    }

    /// All its names, in the form that [`normalize`] returns.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Spacing::Leading => &["leading", "ddimuniform"],
            Spacing::Trailing => &["trailing"],
            Spacing::Linspace => &["linspace", "normal", "uniform"],
            Spacing::Karras => &["karras"],
            Spacing::Exponential => &["exponential", "polyexponential"],
            Spacing::Beta => &["beta"],
            Spacing::KlOptimal => &["kloptimal"],
            Spacing::AlignYourSteps => &["ays", "alignyoursteps"],
            Spacing::SgmUniform => &["sgmuniform"],
            Spacing::Simple => &["simple"],
            Spacing::LuLambdas => &["lu", "lulambdas"],
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
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SamplerChoice {
    /// Another sampler than the checkpoint's own.
    pub sampler: Option<Sampler>,
    /// Another spacing than the checkpoint's own.
    pub spacing: Option<Spacing>,
    /// Numbers of the sampler's own.
    pub tuning: Tuning,
}

impl SamplerChoice {
    /// [`Sampler::guides`] of the sampler, which is not a CFG++ one if it is left to the checkpoint.
    pub fn guides(&self, scale: f32) -> bool {
        self.sampler.map_or(scale > 1.0, |sampler| sampler.guides(scale))
    }
}

/// Reads a sampler by its name in diffusers, A1111 or k-diffusion, alone or followed by a spacing: "Euler a",
/// "DPMSolverMultistepScheduler", "dpmpp_2m", "DPM++ 2M Karras". Case, spaces and punctuation are ignored.
impl FromStr for SamplerChoice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let key = normalize(name);
        if let Some(sampler) = Sampler::find(&key) {
            return Ok(Self { sampler: Some(sampler), ..Self::default() });
        }
        for spacing in Spacing::ALL {
            for suffix in spacing.keys() {
                if let Some(sampler) = key.strip_suffix(suffix).and_then(Sampler::find) {
                    return Ok(Self { sampler: Some(sampler), spacing: Some(spacing), ..Self::default() });
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
