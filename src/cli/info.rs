//! `respodiff info`.

use super::{Place, adapters, parts, say};
use crate::engine::{UNET_CONSTANTS, read_config};
use crate::graph::{Extent, Graph};
use crate::models::{ClipConfig, MidBlock, UNetConfig, UNetInput, VaeConfig, VaeKind, text_encoder, unet, vae_decoder};
use crate::weights::Source;
use crate::{Device, Result};
use serde_json::{Value, json};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Checkpoint folder, single file or Hugging Face model id [default: the demo]
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    parts: parts::Flags,
    /// Describe this adapter (LoRA and the like) in place of a checkpoint
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "batch", "device"])]
    lora: Option<PathBuf>,
    /// Images per batch, for the memory plan
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    batch: u16,
    /// Device to plan for
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if let Some(file) = &args.lora {
        return adapters::show(file, args.json);
    }
    let source = args.parts.source(args.model.as_deref())?;
    let device = args.device.open()?;
    let batch = args.batch as usize;
    let mut report = json!({"model": source.name(), "device": device.name(), "batch": batch});
    let mut components = Vec::new();
    let mut tokens = 77;
    for encoder in ["text_encoder", "text_encoder_2"] {
        if source.has(&format!("{encoder}/config.json")) {
            let config = read_config(&source, encoder, ClipConfig::parse)?;
            tokens = config.tokens;
            components.push(component(&device, &source, encoder, text_encoder(&config, 2))?);
        }
    }
    let (mut h, mut w) = (64, 64);
    if source.has("unet/config.json") {
        let config = read_config(&source, "unet", UNetConfig::parse)?;
        (h, w) = config.sample_size.unwrap_or((h, w));
        let input = UNetInput { rows: 2 * batch, h, w, tokens, shifted: 0 };
        components.push(component(&device, &source, "unet", unet(&config, input))?);
        report["family"] = family(&config).into();
        report["fingerprint"] = source.tensors("unet")?.fingerprint()?.into();
    }
    if source.has("vae/config.json") {
        let config = read_config(&source, "vae", VaeConfig::parse)?;
        report["vae"] = match &config.kind {
            VaeKind::Kl(_) => config.kind.class().into(),
            VaeKind::Tiny(_) => format!("{} (TAESD)", config.kind.class()).into(),
        };
        report["width"] = (w * config.scale()).into();
        report["height"] = (h * config.scale()).into();
        components.push(component(&device, &source, "vae", vae_decoder(&config, 1, Extent { h, w }))?);
    }
    let scheduler = "scheduler/scheduler_config.json";
    if source.has(scheduler) {
        let config: Value = crate::json::parse(&source.read_text(scheduler)?, &source.path(scheduler))?;
        report["scheduler"] = config["_class_name"].clone();
        report["prediction"] = config["prediction_type"].as_str().unwrap_or("epsilon").into();
    }
    report["components"] = components.into();
    match args.json {
        true => say(&format!("{report:#}")),
        false => print(&report),
    }
    Ok(())
}

/// The model family, as recognised by the UNet's shape.
fn family(unet: &UNetConfig) -> String {
    let mut family = match (unet.text_time.is_some(), unet.cross_attention_dim) {
        (true, _) => "SDXL",
        (false, 768) => "Stable Diffusion 1.x",
        (false, 1024) => "Stable Diffusion 2.x",
        (false, _) => "Stable Diffusion 1.x or 2.x, of another width",
    }
    .to_string();
    // Beside the latents, a mask and the latents of a masked picture.
    if unet.in_channels == 2 * unet.out_channels + 1 {
        family += ", for inpainting";
    }
    match unet.mid {
        MidBlock::None => family += ", distilled, without a middle block",
        MidBlock::Resnet => family += ", distilled",
        MidBlock::Attention(_) => {}
    }
    if unet.time_cond_proj_dim.is_some() {
        family += ", reads the guidance scale";
    }
    family
}

/// A component's size on a device.
fn component(device: &Device, source: &Source, name: &str, graph: Graph) -> Result<Value> {
    let tensors = source.tensors(name)?;
    let parameters = graph.parameters();
    let plan = device.plan(graph, UNET_CONSTANTS);
    let (number, format) = if device.is_cpu() { (4, "fp32") } else { (2, "fp16") };
    let files: Vec<String> =
        tensors.files().filter_map(|file| Some(file.file_name()?.to_string_lossy().into_owned())).collect();
    Ok(json!({
        "component": name, "parameters": parameters, "weight_bytes": parameters * number, "format": format,
        "activation_bytes": plan.arena_bytes(), "files": files,
        "prologue_nodes": plan.prologue().count(), "nodes": plan.step().count(),
    }))
}

fn print(report: &Value) {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_string);
    let keys = [
        ("model", "model"),
        ("family", "family"),
        ("prediction", "prediction"),
        ("scheduler", "scheduler"),
        ("vae", "VAE"),
    ];
    for (key, name) in keys.into_iter().chain([("fingerprint", "weights"), ("device", "device")]) {
        if !report[key].is_null() {
            say(&format!("{name:11}{}", text(&report[key])));
        }
    }
    if !report["width"].is_null() {
        let [width, height, batch] = ["width", "height", "batch"].map(|key| text(&report[key]));
        say(&format!("picture    {width}x{height} in a batch of {batch}, guided"));
    }
    for part in report["components"].as_array().into_iter().flatten() {
        let mib = |key: &str| part[key].as_f64().unwrap_or(0.0) / f64::from(1 << 20);
        let files: Vec<&str> = part["files"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        say(&format!(
            "{:14} {:>8.2} M parameters, {:>8.1} MiB of weights and {:>8.1} MiB of activations in {}, {} nodes, {}",
            text(&part["component"]),
            part["parameters"].as_f64().unwrap_or(0.0) / 1e6,
            mib("weight_bytes"),
            mib("activation_bytes"),
            text(&part["format"]),
            part["nodes"],
            files.join(" ")
        ));
    }
}
