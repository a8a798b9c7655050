//! The names of the original layout for tensors that have those of diffusers and transformers: the way back from
//! `names.rs`.

use crate::models::{KlConfig, UNetConfig};

/// CompVis' name of a UNet's tensor. Blocks are numbered in one row, each level's downsampler after its layers; an
/// upsampler is within the last block of its level.
pub(in crate::weights) fn unet(name: &str, config: &UNetConfig) -> Option<String> {
    let parts: Vec<&str> = name.split('.').collect();
    let levels = &config.levels;
    Some(match parts[..] {
        ["time_embedding", "linear_1", leaf] => format!("time_embed.0.{leaf}"),
        ["time_embedding", "linear_2", leaf] => format!("time_embed.2.{leaf}"),
        ["time_embedding", "cond_proj", leaf] => format!("time_embed.cond_proj.{leaf}"),
        ["add_embedding", "linear_1", leaf] => format!("label_emb.0.0.{leaf}"),
        ["add_embedding", "linear_2", leaf] => format!("label_emb.0.2.{leaf}"),
        ["conv_in", leaf] => format!("input_blocks.0.0.{leaf}"),
        ["conv_norm_out", leaf] => format!("out.0.{leaf}"),
        ["conv_out", leaf] => format!("out.2.{leaf}"),
        ["mid_block", "resnets", j, layer, leaf] => {
            format!("middle_block.{}.{}.{leaf}", 2 * j.parse::<usize>().ok()?, resnet(layer)?)
        }
        ["mid_block", "attentions", "0", ref rest @ ..] => format!("middle_block.1.{}", rest.join(".")),
        [way @ ("down_blocks" | "up_blocks"), i, kind, j, ref rest @ ..] => {
            let (i, j): (usize, usize) = (i.parse().ok()?, j.parse().ok()?);
            let down = way == "down_blocks";
            // Block 0 is the first convolution.
            let before: usize = match down {
                true => 1 + levels.iter().take(i).map(|level| level.layers + 1).sum::<usize>(),
                false => levels.iter().rev().take(i).map(|level| level.layers + 1).sum(),
            };
            let level = if down { levels.get(i)? } else { levels.get(levels.len().checked_sub(i + 1)?)? };
            let blocks = if down { "input_blocks" } else { "output_blocks" };
            match (kind, rest) {
                ("resnets", [layer, leaf]) => format!("{blocks}.{}.0.{}.{leaf}", before + j, resnet(layer)?),
                ("attentions", rest) => format!("{blocks}.{}.1.{}", before + j, rest.join(".")),
                ("downsamplers", ["conv", leaf]) => format!("{blocks}.{}.0.op.{leaf}", before + level.layers),
                ("upsamplers", ["conv", leaf]) => {
                    let child = if level.up.is_empty() { 1 } else { 2 };
                    format!("{blocks}.{}.{child}.conv.{leaf}", before + level.layers)
                }
                _ => return None,
            }
        }
        _ => return None,
    })
}

fn resnet(layer: &str) -> Option<&'static str> {
    Some(match layer {
        "norm1" => "in_layers.0",
        "conv1" => "in_layers.2",
        "time_emb_proj" => "emb_layers.1",
        "norm2" => "out_layers.0",
        "conv2" => "out_layers.3",
        "conv_shortcut" => "skip_connection",
        _ => return None,
    })
}

/// CompVis' name of a VAE's tensor, and true if it is a matrix of the attention, which is a 1x1 convolution there. The
/// levels of the up half are numbered from the finest.
pub(in crate::weights) fn vae(name: &str, config: &KlConfig) -> Option<(String, bool)> {
    let parts: Vec<&str> = name.split('.').collect();
    let layer = |layer: &str| if layer == "conv_shortcut" { "nin_shortcut".to_string() } else { layer.to_string() };
    let name = match parts[..] {
        [side, "mid_block", "attentions", "0", ref rest @ ..] => {
            let (layer, leaf) = match *rest {
                ["group_norm", leaf] => ("norm", leaf),
                ["to_q", leaf] => ("q", leaf),
                ["to_k", leaf] => ("k", leaf),
                ["to_v", leaf] => ("v", leaf),
                ["to_out", "0", leaf] => ("proj_out", leaf),
                _ => return None,
            };
            return Some((format!("{side}.mid.attn_1.{layer}.{leaf}"), layer != "norm" && leaf == "weight"));
        }
        [side, "mid_block", "resnets", j, name, leaf] => {
            format!("{side}.mid.block_{}.{}.{leaf}", j.parse::<usize>().ok()? + 1, layer(name))
        }
        [side, way @ ("down_blocks" | "up_blocks"), i, kind, j, name, leaf] => {
            let (i, way) = match way {
                "down_blocks" => (i.parse::<usize>().ok()?, "down"),
                _ => (config.block_out_channels.len().checked_sub(i.parse::<usize>().ok()? + 1)?, "up"),
            };
            match kind {
                "resnets" => format!("{side}.{way}.{i}.block.{j}.{}.{leaf}", layer(name)),
                "downsamplers" => format!("{side}.{way}.{i}.downsample.conv.{leaf}"),
                "upsamplers" => format!("{side}.{way}.{i}.upsample.conv.{leaf}"),
                _ => return None,
            }
        }
        [side, "conv_norm_out", leaf] => format!("{side}.norm_out.{leaf}"),
        _ => name.to_string(),
    };
    Some((name, false))
}

/// The form of a tensor in OpenCLIP's layout.
pub(in crate::weights) enum OpenClip {
    /// The tensor itself under this name.
    Whole(String),
    /// The matrix with rows and columns exchanged.
    Transposed(String),
    /// The queries', keys' or values' part of a tensor that holds all three in this order.
    Third(String),
}

/// OpenCLIP's name of a tensor of a text encoder.
pub(in crate::weights) fn open_clip(name: &str) -> Option<OpenClip> {
    let parts: Vec<&str> = name.split('.').collect();
    Some(OpenClip::Whole(match parts[..] {
        ["text_projection", "weight"] => return Some(OpenClip::Transposed("text_projection".into())),
        ["text_model", "embeddings", "token_embedding", leaf] => format!("token_embedding.{leaf}"),
        ["text_model", "embeddings", "position_embedding", "weight"] => "positional_embedding".into(),
        ["text_model", "final_layer_norm", leaf] => format!("ln_final.{leaf}"),
        ["text_model", "encoder", "layers", i, ref rest @ ..] => {
            let block = format!("transformer.resblocks.{i}");
            match *rest {
                ["layer_norm1", leaf] => format!("{block}.ln_1.{leaf}"),
                ["layer_norm2", leaf] => format!("{block}.ln_2.{leaf}"),
                ["mlp", "fc1", leaf] => format!("{block}.mlp.c_fc.{leaf}"),
                ["mlp", "fc2", leaf] => format!("{block}.mlp.c_proj.{leaf}"),
                ["self_attn", "out_proj", leaf] => format!("{block}.attn.out_proj.{leaf}"),
                ["self_attn", projection, leaf] => {
                    return ["q_proj", "k_proj", "v_proj"]
                        .contains(&projection)
                        .then(|| OpenClip::Third(format!("{block}.attn.in_proj_{leaf}")));
                }
                _ => return None,
            }
        }
        _ => return None,
    }))
}
