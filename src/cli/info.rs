//! `respodiff info`.

use super::{Place, model, say};
use crate::device::Backend;
use crate::engine::{UNET_CONSTANTS, read_config};
use crate::graph::{Extent, Graph};
use crate::models::{ClipConfig, UNetConfig, UNetInput, VaeConfig, text_encoder, unet, vae_decoder};
use crate::weights::Source;
use crate::{Device, Result};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Checkpoint folder, single file or Hugging Face model id [default: the demo]
    #[arg(long)]
    model: Option<String>,
    /// Images at once, for the memory plan
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    batch: u16,
    /// Where it would run
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let source = model::source(args.model.as_deref())?;
    let device = args.device.open()?;
    say(&format!("model      {}", source.name()));
    say(&format!("device     {}", device.name()));
    let batch = args.batch as usize;
    let mut tokens = 77;
    for encoder in ["text_encoder", "text_encoder_2"] {
        if source.has(&format!("{encoder}/config.json")) {
            let config = read_config(&source, encoder, ClipConfig::parse)?;
            tokens = config.max_position_embeddings;
            report(&device, &source, encoder, text_encoder(&config, 2))?;
        }
    }
    let (mut h, mut w) = (64, 64);
    if source.has("unet/config.json") {
        let config = read_config(&source, "unet", UNetConfig::parse)?;
        (h, w) = config.sample_size.unwrap_or((h, w));
        let input = UNetInput { rows: 2 * batch, h, w, tokens, shifted: 0 };
        report(&device, &source, "unet", unet(&config, input))?;
    }
    if source.has("vae/config.json") {
        let config = read_config(&source, "vae", VaeConfig::parse)?;
        say(&format!("picture    {}x{} in a batch of {batch}, guided", w * config.scale(), h * config.scale()));
        report(&device, &source, "vae", vae_decoder(&config, 1, Extent { h, w }))?;
    }
    Ok(())
}

fn report(device: &Device, source: &Source, component: &str, graph: Graph) -> Result<()> {
    let tensors = source.tensors(component)?;
    let parameters = graph.parameters();
    let plan = device.plan(graph, UNET_CONSTANTS);
    let (number, format) = match &device.0 {
        Backend::Cpu => (4, "fp32"),
        Backend::Cuda(_) => (2, "fp16"),
    };
    let files: Vec<String> =
        tensors.files().filter_map(|f| Some(f.file_name()?.to_string_lossy().into_owned())).collect();
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    say(&format!(
        "{component:14} {:>8.2} M parameters, {:>8.1} MiB of weights and {:>8.1} MiB of activations in {format}, {} + {} nodes, {}",
        parameters as f64 / 1e6,
        mib(parameters * number),
        mib(plan.arena_bytes()),
        plan.prologue().count(),
        plan.step().count(),
        files.join(" ")
    ));
    Ok(())
}
