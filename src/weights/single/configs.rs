//! The configurations of a single file's networks. They follow from the shapes of the tensors and, where shapes do not
//! suffice, from properties that all checkpoints of a family share.

use super::super::tensors::Tensors;
use super::prediction::Prediction;
use crate::{Error, Result};
use serde_json::{Value, json};

/// Channels of an attention head wherever the number of heads is not fixed.
const HEAD_CHANNELS: usize = 64;

/// More than the layers of any TAESD.
const MAX_LAYERS: usize = 100;

/// The families of Stable Diffusion models.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::weights) enum Family {
    /// 1.x: 8 heads everywhere.
    Sd1,
    /// 2.x: transformers with linear projections.
    Sd2,
    /// SDXL: size conditioning.
    Xl,
}

impl Family {
    /// The family of a UNet, whose tensors have diffusers' names.
    pub(super) fn of(unet: &Tensors) -> Result<Self> {
        let projections = unet.entries().filter(|(name, _)| name.ends_with(".attentions.0.proj_in.weight"));
        let Some((_, shape)) = projections.min() else {
            return Err(problem(unet, "has no cross attention in its UNet, so that no prompt could act".into()));
        };
        let linear = shape.len() == 2;
        Ok(match (linear, unet.has("add_embedding.linear_1.weight")) {
            (false, false) => Family::Sd1,
            (true, false) => Family::Sd2,
            (_, true) => Family::Xl,
        })
    }

    /// The family of a UNet with this configuration.
    pub(in crate::weights) fn configured(config: &Value) -> Self {
        match (config["addition_embed_type"] == "text_time", config["use_linear_projection"] == true) {
            (true, _) => Family::Xl,
            (false, true) => Family::Sd2,
            (false, false) => Family::Sd1,
        }
    }

    pub(super) fn unet(self, t: &Tensors, prediction: Prediction, pooled: Option<usize>) -> Result<Value> {
        let levels = count(t, |i| format!("down_blocks.{i}.resnets.0.conv1.weight"));
        let each = |level: &dyn Fn(usize) -> Result<Value>| (0..levels).map(level).collect::<Result<Vec<_>>>();
        let channels = |i: usize| size(t, &format!("down_blocks.{i}.resnets.0.conv1.weight"), 0);
        let layers = |i: usize| count(t, |j| format!("down_blocks.{i}.resnets.{j}.conv1.weight"));
        let (depths, up_depths) = depths(t, &(0..levels).map(layers).collect::<Vec<_>>());
        let types = |way: &str, kinds: [&str; 2]| {
            let attends = |i: &usize| t.has(&format!("{way}_blocks.{i}.attentions.0.proj_in.weight"));
            (0..levels).map(|i| kinds[usize::from(attends(&i))].to_string()).collect::<Vec<_>>()
        };
        let keys = t.entries().map(|(name, _)| name).filter(|name| name.ends_with(".attn2.to_k.weight"));
        let keys = keys.min().unwrap_or("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight");
        let mut config = json!({
            "_class_name": "UNet2DConditionModel",
            "sample_size": match (self, prediction) {
                (Family::Xl, _) => 128,
                (Family::Sd2, Prediction::Velocity) => 96,
                _ => 64,
            },
            "in_channels": size(t, "conv_in.weight", 1)?,
            "out_channels": size(t, "conv_out.weight", 0)?,
            "block_out_channels": each(&|i| Ok(channels(i)?.into()))?,
            "layers_per_block": each(&|i| Ok(layers(i).into()))?,
            "transformer_layers_per_block": depths,
            "reverse_transformer_layers_per_block": up_depths,
            "mid_block_type": middle(t),
            "attention_head_dim": match self {
                Family::Sd1 => json!(8),
                _ => each(&|i| heads(t, channels(i)?).map(Value::from))?.into(),
            },
            "down_block_types": types("down", ["DownBlock2D", "CrossAttnDownBlock2D"]),
            "up_block_types": types("up", ["UpBlock2D", "CrossAttnUpBlock2D"]),
            "cross_attention_dim": size(t, keys, 1)?,
            "use_linear_projection": self != Family::Sd1,
        });
        if t.has("time_embedding.cond_proj.weight") {
            config["time_cond_proj_dim"] = size(t, "time_embedding.cond_proj.weight", 1)?.into();
        }
        if self == Family::Xl {
            let width = size(t, "add_embedding.linear_1.weight", 1)?;
            config["addition_embed_type"] = "text_time".into();
            config["projection_class_embeddings_input_dim"] = width.into();
            // Six numbers are embedded beside the pooled prompt.
            config["addition_time_embed_dim"] = pooled.map_or(256, |pooled| width.saturating_sub(pooled) / 6).into();
        }
        Ok(config)
    }

    pub(super) fn vae(self, t: &Tensors) -> Result<Value> {
        let levels = count(t, |i| format!("encoder.down_blocks.{i}.resnets.0.conv1.weight"));
        let channels = (0..levels).map(|i| size(t, &format!("encoder.down_blocks.{i}.resnets.0.conv1.weight"), 0));
        Ok(json!({
            "_class_name": "AutoencoderKL",
            "in_channels": size(t, "encoder.conv_in.weight", 1)?,
            "out_channels": size(t, "decoder.conv_out.weight", 0)?,
            "latent_channels": size(t, "decoder.conv_in.weight", 1)?,
            "block_out_channels": channels.collect::<Result<Vec<_>>>()?,
            "down_block_types": vec!["DownEncoderBlock2D"; levels],
            "up_block_types": vec!["UpDecoderBlock2D"; levels],
            "layers_per_block": count(t, |j| format!("encoder.down_blocks.0.resnets.{j}.conv1.weight")),
            "scaling_factor": if self == Family::Xl { 0.13025 } else { 0.18215 },
            "use_quant_conv": t.has("quant_conv.weight"),
            "use_post_quant_conv": t.has("post_quant_conv.weight"),
            "mid_block_add_attention": t.has("decoder.mid_block.attentions.0.to_q.weight"),
        }))
    }

    /// The scheduler's configuration in the family's first release. If `zero_snr` is true, it is the schedule of arXiv
    /// 2305.08891, which must begin at the last timestep.
    pub(super) fn scheduler(self, prediction: Prediction, zero_snr: bool) -> Value {
        let mut config = json!({
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": prediction.name(),
            "steps_offset": 1,
            "timestep_spacing": if zero_snr { "trailing" } else { "leading" },
        });
        let more = match self {
            Family::Sd1 => {
                json!({"_class_name": "PNDMScheduler", "skip_prk_steps": true, "set_alpha_to_one": false, "clip_sample": false})
            }
            Family::Sd2 => json!({"_class_name": "DDIMScheduler", "set_alpha_to_one": false, "clip_sample": false}),
            Family::Xl => json!({"_class_name": "EulerDiscreteScheduler"}),
        };
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        if zero_snr {
            config["rescale_betas_zero_snr"] = true.into();
        }
        config
    }

    pub(super) fn index(self) -> Value {
        match self {
            Family::Xl => json!({"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": true}),
            _ => json!({"_class_name": "StableDiffusionPipeline"}),
        }
    }
}

/// The configuration of TAESD. If only the decoder is there, the encoder is assumed to be its mirror image.
pub(super) fn taesd(t: &Tensors) -> Result<Value> {
    let layer = |part: &str, i: usize| format!("{part}.layers.{i}.weight");
    let last = |part: &str| (0..MAX_LAYERS).rev().find(|i| t.has(&layer(part, *i)));
    // Convolutions outside of blocks begin and end the levels.
    let blocks = |part: &str| {
        let mut levels = vec![0usize];
        for i in 1..last(part).unwrap_or(0) {
            if t.has(&layer(part, i)) {
                levels.push(0);
            } else if t.has(&format!("{part}.layers.{i}.conv.0.weight")) {
                levels.last_mut().into_iter().for_each(|blocks| *blocks += 1);
            }
        }
        levels
    };
    let decoder = blocks("decoder");
    let channels = size(t, "decoder.layers.0.weight", 0)?;
    let outputs = size(t, &layer("decoder", last("decoder").unwrap_or(0)), 0)?;
    let (encoder, encoder_channels, inputs) = match last("encoder") {
        Some(_) => {
            let first = |axis| size(t, "encoder.layers.0.weight", axis);
            (blocks("encoder"), first(0)?, first(1)?)
        }
        None => (decoder.iter().rev().copied().collect(), channels, outputs),
    };
    Ok(json!({
        "_class_name": "AutoencoderTiny",
        "in_channels": inputs,
        "out_channels": outputs,
        "latent_channels": size(t, "decoder.layers.0.weight", 1)?,
        "encoder_block_out_channels": vec![encoder_channels; encoder.len()],
        "decoder_block_out_channels": vec![channels; decoder.len()],
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
    }))
}

/// The class of the middle block; null if there is none.
fn middle(t: &Tensors) -> Value {
    let has = |part: &str| t.entries().any(|(name, _)| name.starts_with(&format!("mid_block.{part}")));
    match (has("resnets."), has("attentions.")) {
        (_, true) => "UNetMidBlock2DCrossAttn".into(),
        (true, false) => "UNetMidBlock2D".into(),
        (false, false) => Value::Null,
    }
}

/// `transformer_layers_per_block` and `reverse_transformer_layers_per_block` of a UNet with so many resnets in each
/// level of the down half: a number for each level and null, or if they differ within a level, a list for each.
fn depths(t: &Tensors, layers: &[usize]) -> (Value, Value) {
    let depth =
        |place: &str, j: usize| count(t, |k| format!("{place}.attentions.{j}.transformer_blocks.{k}.norm1.weight"));
    let each = |way: &str, i: usize, layers: usize| -> Vec<usize> {
        (0..layers).map(|j| depth(&format!("{way}_blocks.{i}"), j)).collect()
    };
    let last = layers.len().saturating_sub(1);
    let mut down: Vec<Vec<usize>> = layers.iter().enumerate().map(|(i, &layers)| each("down", i, layers)).collect();
    let up: Vec<Vec<usize>> = layers.iter().rev().enumerate().map(|(i, &layers)| each("up", i, layers + 1)).collect();
    // The middle block's is the last level's.
    if let Some(depths) = down.last_mut().filter(|depths| depths.iter().all(|&depth| depth == 0)) {
        depths.fill(depth("mid_block", 0));
    }
    let level = |i: usize| {
        let mut found = down[i].iter().chain(&up[last - i]).copied().filter(|&depth| depth > 0);
        let first = found.next().unwrap_or(1);
        found.all(|depth| depth == first).then_some(first)
    };
    match (0..layers.len()).map(level).collect::<Option<Vec<usize>>>() {
        Some(depths) => (depths.into(), Value::Null),
        None => (json!(down), json!(up)),
    }
}

/// The configuration of a text encoder; `activation` is the one that it was trained with.
pub(super) fn text(t: &Tensors, activation: &str) -> Result<Value> {
    let width = size(t, "text_model.embeddings.token_embedding.weight", 1)?;
    let projection = t.has("text_projection.weight").then(|| size(t, "text_projection.weight", 0)).transpose()?;
    Ok(json!({
        "architectures": [if projection.is_some() { "CLIPTextModelWithProjection" } else { "CLIPTextModel" }],
        "vocab_size": size(t, "text_model.embeddings.token_embedding.weight", 0)?,
        "max_position_embeddings": size(t, "text_model.embeddings.position_embedding.weight", 0)?,
        "hidden_size": width,
        "intermediate_size": size(t, "text_model.encoder.layers.0.mlp.fc1.weight", 0)?,
        "num_hidden_layers": count(t, |i| format!("text_model.encoder.layers.{i}.layer_norm1.weight")),
        "num_attention_heads": heads(t, width)?,
        "hidden_act": activation,
        "projection_dim": projection.unwrap_or(width),
    }))
}

/// The number of consecutive indices, from 0 on, for which there is a tensor called `name(index)`.
fn count(t: &Tensors, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|&i| t.has(&name(i))).count()
}

/// The length of an axis of a tensor.
fn size(t: &Tensors, name: &str, axis: usize) -> Result<usize> {
    let shape = t.shape(name)?;
    shape
        .get(axis)
        .copied()
        .ok_or_else(|| problem(t, format!("tensor `{name}` has shape {shape:?}; a matrix is expected")))
}

fn heads(t: &Tensors, channels: usize) -> Result<usize> {
    match channels % HEAD_CHANNELS {
        0 => Ok(channels / HEAD_CHANNELS),
        _ => Err(problem(
            t,
            format!(
                "the number of attention heads over {channels} channels is not known from a single file unless each \
                 has {HEAD_CHANNELS} channels; give the model as a diffusers folder"
            ),
        )),
    }
}

fn problem(t: &Tensors, problem: String) -> Error {
    Error::damaged(t.files().next().unwrap_or("".as_ref()), problem)
}
