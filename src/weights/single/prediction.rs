//! The prediction type of a single file's UNet, which the shapes of its tensors do not show.

use super::super::tensors::Tensors;
use super::configs::Family;
use crate::Result;

/// The quantity that a UNet predicts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Prediction {
    Epsilon,
    /// arXiv 2202.00512.
    Velocity,
}

impl Prediction {
    /// diffusers' name for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Prediction::Epsilon => "epsilon",
            Prediction::Velocity => "v_prediction",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        match name {
            "epsilon" | "eps" => Some(Prediction::Epsilon),
            "v" | "v_prediction" | "v-prediction" | "velocity" => Some(Prediction::Velocity),
            _ => None,
        }
    }

    /// The prediction type, from the first of these sources that gives it: `beside`, the LDM configuration that A1111
    /// expects beside the file; the metadata in the file's header (Stability AI's ModelSpec); a tensor `v_pred`, which
    /// SDXL checkpoints that predict v carry; and for 2.x ComfyUI's rule of thumb that the first norm of the last
    /// transformer has wide biases if the model predicts v. All others predict epsilon.
    pub(super) fn of(file: &Tensors, unet: &Tensors, family: Family, beside: Option<&str>) -> Result<Self> {
        let declared = beside.and_then(|yaml| {
            let value = yaml.lines().find_map(|line| line.trim().strip_prefix("parameterization:"))?;
            Self::parse(value.split('#').next()?.trim().trim_matches(['"', '\'']))
        });
        let notes = file.metadata();
        let note = |key: &str| notes.get(&format!("modelspec.{key}")).map(String::as_str);
        let noted = ["prediction_type", "predict_key"].iter().find_map(|key| note(key).and_then(Self::parse));
        let architecture = match note("architecture").and_then(|name| name.split('/').next()) {
            Some("stable-diffusion-v2-768-v") => Some(Prediction::Velocity),
            Some("stable-diffusion-v2-512") => Some(Prediction::Epsilon),
            _ => None,
        };
        let marked = file.has("v_pred").then_some(Prediction::Velocity);
        match declared.or(noted).or(architecture).or(marked) {
            Some(prediction) => Ok(prediction),
            None if family == Family::Sd2 && has_wide_biases(unet)? => Ok(Prediction::Velocity),
            None => Ok(Prediction::Epsilon),
        }
    }
}

fn has_wide_biases(unet: &Tensors) -> Result<bool> {
    let last = |name: &dyn Fn(usize) -> String| (0..).take_while(|&i| unet.has(&name(i))).last();
    let Some(level) = last(&|i| format!("up_blocks.{i}.resnets.0.conv1.weight")) else { return Ok(false) };
    let name = |j| format!("up_blocks.{level}.attentions.{j}.transformer_blocks.0.norm1.bias");
    let Some(name) = last(&name).map(name) else { return Ok(false) };
    let biases = unet.read(&name, &[unet.shape(&name)?])?;
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / biases.len() as f64;
    let center = mean(&mut biases.iter().map(|&x| f64::from(x)));
    Ok(mean(&mut biases.iter().map(|&x| (f64::from(x) - center).powi(2))).sqrt() > 0.09)
}
