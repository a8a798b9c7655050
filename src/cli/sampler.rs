//! The flags that choose a sampler, its steps and guidance.

use crate::Result;
use crate::diffusion::scheduler::{Preset, SamplerChoice, Spacing, StepNoise, Tuning};
use crate::engine::{Engine, Image};

/// The choice of a sampler and of its steps and guidance.
#[derive(clap::Args)]
#[group(id = "sampling")]
pub(super) struct Flags {
    /// Sampler, steps and guidance as the cards of distilled models say: lcm, tcd, turbo, lightning-1, -2, -4, -8,
    /// hyper-1, -2, -4, -8. Flags beside it take precedence
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Sampling steps [default: 50, or the preset's]
    #[arg(long)]
    steps: Option<usize>,
    /// Guidance scale; 1 or less turns guidance off and halves the work, except with CFG++ [default: 7.5; 5 with SDXL;
    /// 0.6 with CFG++; or the preset's]
    #[arg(long, visible_alias = "cfg-scale", allow_negative_numbers = true)]
    guidance: Option<f32>,
    /// Share, from 0 to 1, by which guided predictions get back the contrast of those without guidance; 0.7 suits
    /// v-prediction and high scales
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, allow_negative_numbers = true)]
    guidance_rescale: f32,
    /// Guidance only between these two timesteps (1000 is noise, 0 the picture), such as 900,200; the other steps take
    /// half the time
    #[arg(long, value_name = "FROM,UNTIL", value_parser = interval)]
    guidance_interval: Option<(f32, f32)>,
    /// Sampler by diffusers', k-diffusion's or A1111's name, such as "DDIM" or "DPM++ 2M Karras" [default: the
    /// checkpoint's]
    #[arg(long, visible_alias = "sampler")]
    scheduler: Option<String>,
    /// Spacing of the steps: leading, trailing, linspace, karras, exponential, beta, kl-optimal, ays, sgm-uniform,
    /// simple, lu [default: the checkpoint's]
    #[arg(long)]
    spacing: Option<String>,
    #[command(flatten)]
    tuning: Tunings,
}

/// Settings of a sampler's own.
#[derive(clap::Args)]
#[group(id = "tuning")]
pub(super) struct Tunings {
    /// Fresh noise, from 0 to 1, in DDIM [default: 0], TCD (its gamma) [default: 0.3], and the ancestral and SDE
    /// samplers [default: 1]
    #[arg(long, allow_negative_numbers = true)]
    eta: Option<f64>,
    /// Noise that Euler, Heun and DPM2 add before their steps [default: 0]
    #[arg(long, allow_negative_numbers = true)]
    s_churn: Option<f64>,
    /// Least sigma at which --s-churn adds noise [default: 0]
    #[arg(long, allow_negative_numbers = true)]
    s_tmin: Option<f64>,
    /// Greatest sigma at which --s-churn adds noise [default: any]
    #[arg(long, allow_negative_numbers = true)]
    s_tmax: Option<f64>,
    /// Factor of the noise that k-diffusion's samplers add [default: 1]
    #[arg(long, allow_negative_numbers = true)]
    s_noise: Option<f64>,
    /// Noise of SDE samplers: fresh, drawn anew in each step as in diffusers, or brownian, as in k-diffusion, so that
    /// seeds are those of A1111 and ComfyUI [default: brownian, but fresh if the checkpoint itself names diffusers'
    /// sampler]
    #[arg(long, value_name = "fresh|brownian")]
    step_noise: Option<StepNoise>,
}

impl Tunings {
    /// The numbers given here, and `otherwise` for the rest.
    pub(super) fn or(&self, otherwise: Tuning) -> Tuning {
        Tuning {
            eta: self.eta.or(otherwise.eta),
            s_churn: self.s_churn.or(otherwise.s_churn),
            s_tmin: self.s_tmin.or(otherwise.s_tmin),
            s_tmax: self.s_tmax.or(otherwise.s_tmax),
            s_noise: self.s_noise.or(otherwise.s_noise),
            step_noise: self.step_noise.or(otherwise.step_noise),
            prediction: otherwise.prediction,
        }
    }
}

/// Parses two timesteps.
fn interval(text: &str) -> std::result::Result<(f32, f32), String> {
    let numbers = text.split_once(',').and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
    numbers.ok_or_else(|| "write two timesteps with a comma between them, such as 900,200".into())
}

/// The settings that the flags choose.
#[derive(Clone, Copy)]
pub(super) struct Sampling {
    pub choice: SamplerChoice,
    pub steps: usize,
    /// The guidance scale that was given.
    guidance: Option<f32>,
    pub guidance_rescale: f32,
    pub guidance_interval: Option<(f32, f32)>,
    preset: Option<Preset>,
}

impl Flags {
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a name that is not known.
    pub(super) fn sampling(&self) -> Result<Sampling> {
        let preset: Option<Preset> = self.preset.as_deref().map(str::parse).transpose()?;
        let preset_choice = preset.map_or(SamplerChoice::default(), |preset| preset.choice);
        // Another sampler has neither the spacing nor the numbers of the preset's.
        let mut choice = match &self.scheduler {
            Some(name) => {
                let named: SamplerChoice = name.parse()?;
                let same = named.sampler == preset_choice.sampler;
                let prediction = preset_choice.tuning.prediction;
                SamplerChoice {
                    spacing: named.spacing.or(preset_choice.spacing.filter(|_| same)),
                    tuning: if same { preset_choice.tuning } else { Tuning { prediction, ..Tuning::default() } },
                    ..named
                }
            }
            None => preset_choice,
        };
        if let Some(spacing) = &self.spacing {
            choice.spacing = Some(spacing.parse::<Spacing>()?);
        }
        choice.tuning = self.tuning.or(choice.tuning);
        Ok(Sampling {
            choice,
            steps: self.steps.or(preset.map(|preset| preset.steps)).unwrap_or(50),
            guidance: self.guidance,
            guidance_rescale: self.guidance_rescale,
            guidance_interval: self.guidance_interval,
            preset,
        })
    }
}

impl Sampling {
    /// Checks that the preset is one for such a checkpoint.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if it is not.
    pub(super) fn check(&self, engine: &Engine) -> Result<()> {
        self.preset.map_or(Ok(()), |preset| preset.check(engine.is_sdxl()))
    }

    /// The guidance scale of an image that has none of its own, with the checkpoint's own sampler or another.
    pub(super) fn guidance(&self, engine: &Engine) -> f32 {
        // A UNet that reads the scale was not distilled for one alone.
        let model = match self.preset.filter(|_| !engine.reads_guidance()) {
            Some(preset) => preset.guidance,
            None => engine.default_guidance(),
        };
        self.guidance.unwrap_or(self.choice.sampler.map_or(model, |sampler| sampler.default_guidance(model)))
    }

    /// An image with the guidance that is not its scale.
    pub(super) fn guide(&self, image: Image) -> Image {
        let image = image.guidance_rescale(self.guidance_rescale);
        Image { guidance_interval: self.guidance_interval, ..image }
    }
}
