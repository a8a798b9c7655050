//! Renames tensors from the names of the original code to those of diffusers and transformers, one component at a time.

use super::super::tensors::{LEGACY, Part, Tensors};
use crate::{Error, Result};
use std::collections::HashMap;

/// Renames the tensors of a UNet of CompVis' latent diffusion or Stability AI's generative models. Unknown names stay.
pub(super) fn unet(original: &Tensors) -> Result<Tensors> {
    let blocks = Blocks::new(original);
    original.renamed(|name| vec![(blocks.rename(name).unwrap_or_else(|| name.into()), Part::Whole)])
}

/// The moving averages (EMA) of the tensors under `root`, under their names. Latent diffusion's trainer saves those of
/// `model.a.b` as `model_ema.ab`, without the dots.
pub(super) fn averages(all: &Tensors, root: &str) -> Result<Tensors> {
    let average = |name: &str| format!("model_ema.{}", name.strip_prefix("model.").unwrap_or(name).replace('.', ""));
    let names: HashMap<String, &str> =
        all.entries().filter_map(|(name, _)| Some((average(name), name.strip_prefix(root)?))).collect();
    if let Some((_, lost)) = names.iter().filter(|(average, _)| !all.has(average)).min() {
        let path = all.files().next().unwrap_or("".as_ref());
        let problem = format!("holds no moving average of `{lost}`, so that its UNet has no whole set of them");
        return Err(Error::unsupported(path, problem).advise("use its plain weights"));
    }
    all.renamed(|name| names.get(name).map(|name| (name.to_string(), Part::Whole)).into_iter().collect())
}

/// The level and layer of each block. The original code numbers the blocks of the down half consecutively, with each
/// level's downsampler after its layers, and likewise those of the up half, where each level's upsampler is within its
/// last block.
struct Blocks {
    down: Vec<(usize, usize)>,
    up: Vec<(usize, usize)>,
}

impl Blocks {
    fn new(original: &Tensors) -> Self {
        // Block 0 is the first convolution.
        let (mut down, mut layers) = (vec![(0, 0)], vec![0]);
        for n in 1.. {
            let has = |part: &str| original.has(&format!("input_blocks.{n}.0.{part}"));
            let level = layers.len() - 1;
            down.push((level, layers[level]));
            match (has("op.weight"), has("in_layers.0.weight")) {
                (true, _) => layers.push(0),
                (false, true) => layers[level] += 1,
                _ => break,
            }
        }
        let up = layers.iter().rev().enumerate().flat_map(|(level, &layers)| (0..=layers).map(move |j| (level, j)));
        Blocks { down, up: up.collect() }
    }

    fn rename(&self, name: &str) -> Option<String> {
        let parts: Vec<&str> = name.split('.').collect();
        Some(match parts[..] {
            ["time_embed", "0", leaf] => format!("time_embedding.linear_1.{leaf}"),
            ["time_embed", "2", leaf] => format!("time_embedding.linear_2.{leaf}"),
            ["time_embed", "cond_proj", leaf] => format!("time_embedding.cond_proj.{leaf}"),
            ["label_emb", "0", "0", leaf] => format!("add_embedding.linear_1.{leaf}"),
            ["label_emb", "0", "2", leaf] => format!("add_embedding.linear_2.{leaf}"),
            ["input_blocks", "0", "0", leaf] => format!("conv_in.{leaf}"),
            ["out", "0", leaf] => format!("conv_norm_out.{leaf}"),
            ["out", "2", leaf] => format!("conv_out.{leaf}"),
            ["middle_block", "0", ref rest @ ..] => format!("mid_block.resnets.0.{}", resnet(rest)?),
            ["middle_block", "1", ref rest @ ..] => format!("mid_block.attentions.0.{}", rest.join(".")),
            ["middle_block", "2", ref rest @ ..] => format!("mid_block.resnets.1.{}", resnet(rest)?),
            ["input_blocks", n, _, ref rest @ ..] => block("down_blocks", &self.down, n, rest)?,
            ["output_blocks", n, _, ref rest @ ..] => block("up_blocks", &self.up, n, rest)?,
            _ => return None,
        })
    }
}

fn block(way: &str, places: &[(usize, usize)], n: &str, rest: &[&str]) -> Option<String> {
    let (level, layer) = places.get(n.parse::<usize>().ok()?)?;
    Some(match rest {
        ["op", leaf] => format!("{way}.{level}.downsamplers.0.conv.{leaf}"),
        ["conv", leaf] => format!("{way}.{level}.upsamplers.0.conv.{leaf}"),
        ["norm" | "proj_in" | "proj_out" | "transformer_blocks", ..] => {
            format!("{way}.{level}.attentions.{layer}.{}", rest.join("."))
        }
        _ => format!("{way}.{level}.resnets.{layer}.{}", resnet(rest)?),
    })
}

fn resnet(rest: &[&str]) -> Option<String> {
    let (layer, leaf) = match *rest {
        ["in_layers", "0", leaf] => ("norm1", leaf),
        ["in_layers", "2", leaf] => ("conv1", leaf),
        ["emb_layers", "1", leaf] => ("time_emb_proj", leaf),
        ["out_layers", "0", leaf] => ("norm2", leaf),
        ["out_layers", "3", leaf] => ("conv2", leaf),
        ["skip_connection", leaf] => ("conv_shortcut", leaf),
        _ => return None,
    };
    Some(format!("{layer}.{leaf}"))
}

/// Renames the tensors of CompVis' autoencoder. Unknown names stay; tensors that are left from its training are
/// dropped.
pub(super) fn vae(original: &Tensors) -> Result<Tensors> {
    // The original code numbers the levels of the up half from the finest.
    let levels = (0..).take_while(|i| original.has(&format!("decoder.up.{i}.block.0.conv1.weight"))).count();
    let rename = |name: &str| {
        let parts: Vec<&str> = name.split('.').collect();
        Some(match parts[..] {
            [side, "mid", "attn_1", layer, leaf] => {
                let layer = match layer {
                    "norm" => "group_norm",
                    "q" => "to_q",
                    "k" => "to_k",
                    "v" => "to_v",
                    "proj_out" => "to_out.0",
                    _ => return None,
                };
                (format!("{side}.mid_block.attentions.0.{layer}.{leaf}"), Part::Matrix)
            }
            [side, "mid", "block_1", layer, leaf] => {
                (format!("{side}.mid_block.resnets.0.{layer}.{leaf}"), Part::Whole)
            }
            [side, "mid", "block_2", layer, leaf] => {
                (format!("{side}.mid_block.resnets.1.{layer}.{leaf}"), Part::Whole)
            }
            ["encoder", "down", i, "downsample", "conv", leaf] => {
                (format!("encoder.down_blocks.{i}.downsamplers.0.conv.{leaf}"), Part::Whole)
            }
            [side @ ("encoder" | "decoder"), way, i, "block", j, layer, leaf] => {
                let layer = if layer == "nin_shortcut" { "conv_shortcut" } else { layer };
                let i: usize = i.parse().ok()?;
                let i = if way == "up" { levels.checked_sub(i + 1)? } else { i };
                (format!("{side}.{way}_blocks.{i}.resnets.{j}.{layer}.{leaf}"), Part::Whole)
            }
            ["decoder", "up", i, "upsample", "conv", leaf] => {
                let i = levels.checked_sub(i.parse::<usize>().ok()? + 1)?;
                (format!("decoder.up_blocks.{i}.upsamplers.0.conv.{leaf}"), Part::Whole)
            }
            [side, "norm_out", leaf] => (format!("{side}.conv_norm_out.{leaf}"), Part::Whole),
            _ => return None,
        })
    };
    original.renamed(|name| match name.split('.').next() {
        Some("loss" | "model_ema") => vec![],
        _ => vec![rename(name).unwrap_or_else(|| {
            let old = LEGACY.iter().find(|(_, old)| name.contains(old));
            (old.map_or_else(|| name.into(), |(new, old)| name.replace(old, new)), Part::Whole)
        })],
    })
}

/// Renames the tensors of TAESD's `encoder` or `decoder`, which its authors save in files of their own. The layers of
/// the original decoder are numbered from its first one, a clamp, which is none in diffusers. Unknown names stay.
pub(super) fn taesd(original: &Tensors, part: &str) -> Result<Tensors> {
    let before = usize::from(part == "decoder");
    let rename = |name: &str| {
        let (layer, rest) = name.split_once('.')?;
        Some(format!("{part}.layers.{}.{rest}", layer.parse::<usize>().ok()?.checked_sub(before)?))
    };
    original.renamed(|name| vec![(rename(name).unwrap_or_else(|| name.into()), Part::Whole)])
}

/// The tensors of OpenAI's text encoder, which the original code loads from transformers, under transformers' full
/// names, with the projection if `projected` is true. Others are dropped.
pub(super) fn clip(original: &Tensors, projected: bool) -> Result<Tensors> {
    original.renamed(|name| match text_model(name) {
        Some(name) if !name.ends_with(".position_ids") => vec![(name, Part::Whole)],
        None if projected && name == "text_projection.weight" => vec![(name.into(), Part::Whole)],
        _ => vec![],
    })
}

/// The full name of a tensor of transformers' text model: files of 2022, and of transformers from 5 on, may omit
/// `text_model.`. `None` for tensors outside of the model.
pub(in crate::weights) fn text_model(name: &str) -> Option<String> {
    match name.split('.').next() {
        Some("text_model") => Some(name.into()),
        Some("embeddings" | "encoder" | "final_layer_norm") => Some(format!("text_model.{name}")),
        _ => None,
    }
}

/// Renames the tensors of OpenCLIP's text encoder. Only the first `layers` layers are kept, and the projection if
/// `projected` is true: Stable Diffusion 2.x reads neither the projection nor the last layer.
pub(super) fn open_clip(original: &Tensors, layers: usize, projected: bool) -> Result<Tensors> {
    let rename = |name: &str| {
        let parts: Vec<&str> = name.split('.').collect();
        Some(match parts[..] {
            ["token_embedding", leaf] => vec![(format!("text_model.embeddings.token_embedding.{leaf}"), Part::Whole)],
            ["positional_embedding"] => {
                vec![("text_model.embeddings.position_embedding.weight".into(), Part::Whole)]
            }
            ["ln_final", leaf] => vec![(format!("text_model.final_layer_norm.{leaf}"), Part::Whole)],
            ["text_projection"] if projected => vec![("text_projection.weight".into(), Part::Transposed)],
            ["text_projection", "weight"] if projected => vec![(name.into(), Part::Whole)],
            ["transformer", "resblocks", i, ref rest @ ..] if i.parse::<usize>().is_ok_and(|i| i < layers) => {
                let layer = format!("text_model.encoder.layers.{i}");
                match *rest {
                    ["ln_1", leaf] => vec![(format!("{layer}.layer_norm1.{leaf}"), Part::Whole)],
                    ["ln_2", leaf] => vec![(format!("{layer}.layer_norm2.{leaf}"), Part::Whole)],
                    ["mlp", "c_fc", leaf] => vec![(format!("{layer}.mlp.fc1.{leaf}"), Part::Whole)],
                    ["mlp", "c_proj", leaf] => vec![(format!("{layer}.mlp.fc2.{leaf}"), Part::Whole)],
                    ["attn", "out_proj", leaf] => vec![(format!("{layer}.self_attn.out_proj.{leaf}"), Part::Whole)],
                    ["attn", "in_proj_weight"] => thirds(&layer, "weight"),
                    ["attn", "in_proj_bias"] => thirds(&layer, "bias"),
                    _ => return None,
                }
            }
            _ => return None,
        })
    };
    original.renamed(|name| rename(name).unwrap_or_default())
}

/// Queries, keys and values, which OpenCLIP keeps in one matrix.
fn thirds(layer: &str, leaf: &str) -> Vec<(String, Part)> {
    let names = ["q_proj", "k_proj", "v_proj"].iter().enumerate();
    names.map(|(i, name)| (format!("{layer}.self_attn.{name}.{leaf}"), Part::Third(i))).collect()
}
