//! `respodiff probe`: it runs single components, to compare the engine with another implementation.

use super::files::{TensorFile, write};
use super::{Place, adapters, parts, sampler, say, tell, text, warn};
use crate::backend::{Executor, Precision};
use crate::concept::{Form, Module};
use crate::device::Device;
use crate::diffusion::scheduler::{SamplerChoice, SamplerState, Schedule, SchedulerConfig};
use crate::engine::{Adapted, TextModel, UNET_CONSTANTS, read_config};
use crate::files::check_writable;
use crate::graph::{Extent, Graph, Keep, Shape};
use crate::layout::{nchw_to_nhwc, nhwc_to_nchw};
use crate::models::chunks::{Chunk, needs_nothing, weigh};
use crate::models::prompt::PromptSyntax;
use crate::models::tokenizer::TokenizerRules;
use crate::models::{
    ClipConfig, MASK_AND_IMAGE, UNetConfig, UNetInput, VaeConfig, text_encoder, unet, vae_decoder, vae_encoder,
};
use crate::train::{Halves, Objective};
use crate::weights::{Source, Tensors};
use crate::{Error, Result};
use clap::ValueEnum;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Clone, Copy, ValueEnum)]
enum Component {
    /// input_ids [B,77] or --prompt -> last_hidden_state, penultimate_hidden_state, states (what the UNet reads:
    /// of a prompt [1,77 k,D], with the weights of its words), text_embeds
    Text,
    /// sample [B,4,H,W], timestep [1] or [B], encoder_hidden_states [B,77,D] (text_embeds, time_ids, timestep_cond;
    /// ram, sam [C,R,R], added to the bottleneck) -> sample, mid
    Unet,
    /// latents [B,4,H,W], already divided by the scaling factor -> image
    VaeDecode,
    /// image [B,3,H,W] in [-1, 1] -> mean, logvar; of TAESD latents
    VaeEncode,
    /// latents [B,4,H,W], timestep [1], neutral_embeds [1,77,D], target [B,4,H,W], ram, sam [C,R,R] (text_embeds,
    /// time_ids) -> loss_resp, loss_sem, grad_ram (of L_resp), grad_sam (of lambda L_sem)
    Grad,
    /// sample, eps [N,...] (noise [N,...]) -> timesteps, model_input, prev_sample; row i of eps and noise belongs to
    /// the i-th call of the model
    Scheduler,
}

#[derive(clap::Args)]
pub(super) struct Args {
    /// Component to run
    component: Component,
    /// Checkpoint folder, single file or Hugging Face model id [default: the demo]
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    parts: parts::Flags,
    /// safetensors file with the inputs
    #[arg(long, required_unless_present = "prompt")]
    inputs: Option<PathBuf>,
    /// safetensors file to write
    #[arg(long)]
    output: PathBuf,
    /// Prompt to encode, instead of input_ids
    #[arg(long, conflicts_with = "inputs")]
    prompt: Option<String>,
    /// Syntax of --prompt
    #[arg(long, default_value_t = PromptSyntax::Plain, value_name = "plain|a1111|comfy")]
    prompt_syntax: PromptSyntax,
    /// Clip skip as A1111 counts it: how far from its end the text encoder's `states` are taken; 1 skips nothing
    #[arg(long, default_value_t = 1, value_name = "N")]
    clip_skip: usize,
    #[command(flatten)]
    embeddings: text::Embeddings,
    /// Text encoder to run
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    encoder: u8,
    /// Sampler [default: the checkpoint's]
    #[arg(long)]
    scheduler: Option<String>,
    /// Sampling steps
    #[arg(long, default_value_t = 50)]
    steps: usize,
    #[command(flatten)]
    tuning: sampler::Tunings,
    /// Weight of L_sem
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    lambda: f64,
    /// Device to compute on
    #[arg(long, default_value_t = Place::Cpu)]
    device: Place,
    /// Number format of a network's linear layers; gradients always use the device's own
    #[arg(long, default_value_t = Precision::Full, value_name = "full|bf16|int8")]
    precision: Precision,
    /// Recipe by which --prompt is split into tokens
    #[arg(long, default_value_t = TokenizerRules::Fast, value_name = "fast|slow")]
    tokenizer: TokenizerRules,
    #[command(flatten)]
    adapters: adapters::Flags,
}

/// A named result: shape and numbers.
type Named = (&'static str, Vec<usize>, Vec<f32>);

pub(super) fn run(args: &Args) -> Result<()> {
    check_writable(&args.output)?;
    if args.precision != Precision::Full && matches!(args.component, Component::Grad | Component::Scheduler) {
        return Err(Error::invalid("precision", "--precision is for networks: text, unet, vae-decode and vae-encode"));
    }
    if args.adapters.any() && !matches!(args.component, Component::Text | Component::Unet) {
        return Err(Error::invalid("adapters", "adapters are for networks that they change: text and unet"));
    }
    let source = args.parts.source(args.model.as_deref())?;
    let results = match (args.component, &args.inputs) {
        (Component::Text, Some(path)) => text_of_ids(args, &source, &TensorFile::read(path)?)?,
        (Component::Text, None) => text_of_prompt(args, &source)?,
        (_, None) => return Err(Error::invalid("prompt", "--prompt is for `probe text`").advise("give --inputs FILE")),
        (Component::Unet, Some(path)) => probe_unet(args, &source, &TensorFile::read(path)?)?,
        (Component::Grad, Some(path)) => grad(args, &source, &TensorFile::read(path)?)?,
        (Component::VaeDecode, Some(path)) => decode(args, &source, &TensorFile::read(path)?)?,
        (Component::VaeEncode, Some(path)) => encode(args, &source, &TensorFile::read(path)?)?,
        (Component::Scheduler, Some(path)) => scheduler(args, &source, &TensorFile::read(path)?)?,
    };
    write(&args.output, &results)?;
    say(&args.output.display().to_string());
    Ok(())
}

fn executor(args: &Args, source: &Source, component: &str, graph: Graph) -> Result<Box<dyn Executor>> {
    load(args, component, &Adapted::new(source, &args.adapters.load()?)?.tensors(component)?, graph)
}

fn load(args: &Args, component: &str, tensors: &Tensors, graph: Graph) -> Result<Box<dyn Executor>> {
    let device: Device = args.device.open()?;
    let plan = device.plan(graph, UNET_CONSTANTS);
    let start = Instant::now();
    let weights = device.weights(plan.graph().weights(), tensors, &[], args.precision)?;
    let loading = start.elapsed();
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    let (held, arena) = (mib(weights.bytes()), mib(plan.arena_bytes()));
    let told = format!("{held:.1} MiB of weights in {:.2} s, {arena:.1} MiB of activations", loading.as_secs_f64());
    tell(&format!("{component}: {told}"));
    device.executor(plan, &weights)
}

/// Makes the call twice and prints both times, since the first call also pays for one-time work.
fn call(executor: &mut dyn Executor) -> Result<()> {
    let mut timed = || -> Result<f64> {
        let start = Instant::now();
        executor.prologue()?;
        executor.step()?;
        // Up to here, a GPU's work has only been queued.
        executor.wait()?;
        Ok(start.elapsed().as_secs_f64())
    };
    tell(&format!("call: {:.4} s, again {:.4} s", timed()?, timed()?));
    Ok(())
}

/// An output of the graph, converted from NHWC to NCHW.
fn image_output(executor: &dyn Executor, name: &'static str) -> Result<Named> {
    let graph = executor.plan().graph();
    let shape = graph.shape(graph.output(name));
    let mut values = vec![0.0; shape.len()];
    nhwc_to_nchw(&executor.read(name)?, shape.c, shape.tokens(), &mut values);
    Ok((name, vec![shape.n, shape.c, shape.h, shape.w], values))
}

fn text_of_ids(args: &Args, source: &Source, file: &TensorFile) -> Result<Vec<Named>> {
    let component = if args.encoder == 2 { "text_encoder_2" } else { "text_encoder" };
    let sdxl = source.has("text_encoder_2/config.json");
    let config = read_config(source, component, ClipConfig::parse)?.with_clip_skip(args.clip_skip, sdxl)?;
    let ids = file.get("input_ids", &[None, Some(config.tokens)])?;
    let wrong = |id: &&f64| **id < 0.0 || **id >= config.vocab_size as f64 || id.fract() != 0.0;
    if let Some(bad) = ids.values.iter().find(wrong) {
        return Err(file.error(format!("`input_ids` holds {bad}; the vocabulary has {}", config.vocab_size)));
    }
    let ids: Vec<i64> = ids.values.iter().map(|&id| id as i64).collect();
    encode_ids(args, component, &Adapted::new(source, &args.adapters.load()?)?.tensors(component)?, &config, &ids)
}

fn text_of_prompt(args: &Args, source: &Source) -> Result<Vec<Named>> {
    let models = TextModel::read(source, args.tokenizer, &args.embeddings.open()?)?;
    let model = models.into_iter().nth(usize::from(args.encoder) - 1).ok_or_else(|| {
        Error::invalid("encoder", "this checkpoint has one text encoder").advise("give 1, or an SDXL checkpoint")
    })?;
    let chunks = model.tokenizer.chunks(args.prompt.as_deref().unwrap_or_default(), args.prompt_syntax)?;
    if !chunks.lost.is_empty() {
        warn(&format!("the prompt is too long; these words are not used: {}", chunks.lost));
    }
    let chunks = chunks.chunks;
    let config = model.config.clone().with_clip_skip(args.clip_skip, !model.config.states.normed)?;
    let mut ids: Vec<i64> = chunks.iter().flat_map(|chunk: &Chunk| chunk.ids.iter().copied()).collect();
    if needs_nothing(&chunks, args.prompt_syntax) {
        ids.extend(model.tokenizer.framed(&[]));
    }
    let adapters = args.adapters.load()?;
    let tensors = model.tensors(&Adapted::new(source, &adapters)?)?;
    let mut results = encode_ids(args, model.folder, &tensors, &config, &ids)?;
    for (name, shape, values) in &mut results {
        // The row of the empty prompt is not part of the result.
        let row = values.len() / shape[0];
        let nothing = values.split_off(row * chunks.len().min(shape[0]));
        shape[0] = shape[0].min(chunks.len());
        match *name {
            "states" => {
                weigh(values, &chunks, &nothing, args.prompt_syntax);
                (shape[0], shape[1]) = (1, shape[0] * shape[1]);
            }
            // The UNet reads that of the first chunk.
            "text_embeds" => {
                values.truncate(row);
                shape[0] = 1;
            }
            _ => {}
        }
    }
    Ok(results)
}

/// Runs a text encoder on rows of ids.
fn encode_ids(args: &Args, component: &str, tensors: &Tensors, config: &ClipConfig, ids: &[i64]) -> Result<Vec<Named>> {
    let width = config.tokens;
    let n = ids.len() / width;
    let mut executor = load(args, component, tensors, text_encoder(config, n))?;
    executor.write("input_ids", &ids.iter().map(|&id| id as f32).collect::<Vec<_>>())?;
    if executor.plan().graph().find_input("pooled_index").is_some() {
        let indices = ids.chunks_exact(width).map(|row| config.pooled_index(row) as f32);
        executor.write("pooled_index", &indices.collect::<Vec<_>>())?;
    }
    call(&mut *executor)?;
    let mut results: Vec<Named> = vec![("input_ids", vec![n, width], ids.iter().map(|&id| id as f32).collect())];
    for name in ["last_hidden_state", "penultimate_hidden_state", "states"] {
        results.push((name, vec![n, width, config.layers.width], executor.read(name)?));
    }
    if executor.plan().graph().find_output("text_embeds").is_some() {
        let values = executor.read("text_embeds")?;
        results.push(("text_embeds", vec![n, values.len() / n], values));
    }
    Ok(results)
}

fn probe_unet(args: &Args, source: &Source, file: &TensorFile) -> Result<Vec<Named>> {
    let config = read_config(source, "unet", UNetConfig::parse)?;
    let sample = file.get("sample", &[None, Some(config.in_channels), None, None])?;
    let [n, c, h, w] = sample.shape[..] else { return Err(file.error("`sample` is not [B,C,H,W]")) };
    let states = file.get("encoder_hidden_states", &[Some(n), None, Some(config.cross_attention_dim)])?;
    let timestep = file.get("timestep", &[None])?.floats();
    if timestep.len() != 1 && timestep.len() != n {
        return Err(file.error(format!("`timestep` has {} numbers; 1 or {n} are wanted", timestep.len())));
    }
    let modules: Vec<&str> = ["ram", "sam"].into_iter().filter(|name| file.find(name).is_some()).collect();
    let shifted = if modules.is_empty() { 0 } else { n };
    let input = UNetInput { rows: n, h, w, tokens: states.shape[1], shifted };
    let mut executor = executor(args, source, "unet", unet(&config, input))?;
    if shifted > 0 {
        let graph = executor.plan().graph();
        let shape = Shape { n: 1, ..graph.shape(graph.input("shift")) };
        let mut shift = vec![0.0; shape.len()];
        for name in modules {
            constant(file, name, shape)?.add_to(&[], 1.0, &mut shift);
        }
        executor.write("shift", &shift.repeat(n))?;
    }
    let pixels = nhwc(&sample.floats(), c, h * w);
    let (latents, more): (Vec<&[f32]>, Vec<&[f32]>) =
        pixels.chunks_exact(c).map(|pixel| pixel.split_at(config.out_channels)).unzip();
    executor.write("sample", &latents.concat())?;
    if c > config.out_channels {
        executor.write(MASK_AND_IMAGE, &more.concat())?;
    }
    executor.write("timestep", &(0..n).map(|i| timestep[i % timestep.len()]).collect::<Vec<_>>())?;
    executor.write("encoder_hidden_states", &states.floats())?;
    for name in ["text_embeds", "time_ids", "timestep_cond"] {
        if executor.plan().graph().find_input(name).is_some() {
            let graph = executor.plan().graph();
            let width = graph.shape(graph.input(name)).len() / n;
            executor.write(name, &file.get(name, &[Some(n), Some(width)])?.floats())?;
        }
    }
    call(&mut *executor)?;
    Ok(vec![image_output(&*executor, "sample")?, image_output(&*executor, "mid")?])
}

fn nhwc(nchw: &[f32], channels: usize, pixels: usize) -> Vec<f32> {
    let mut out = vec![0.0; nchw.len()];
    nchw_to_nhwc(nchw, channels, pixels, &mut out);
    out
}

/// A constant module from a tensor `[C, H, W]` of a file.
fn constant(file: &TensorFile, name: &str, shape: Shape) -> Result<Module> {
    let values = file.get(name, &[Some(shape.c), Some(shape.h), Some(shape.w)])?.floats();
    let mut parameters = vec![0.0; values.len()];
    nchw_to_nhwc(&values, shape.c, shape.tokens(), &mut parameters);
    Module::with_parameters(Form::Constant, shape, parameters).ok_or_else(|| file.error("holds another shape"))
}

fn grad(args: &Args, source: &Source, file: &TensorFile) -> Result<Vec<Named>> {
    let config = read_config(source, "unet", UNetConfig::parse)?;
    let latents = file.get("latents", &[None, Some(config.out_channels), None, None])?;
    let [n, _, h, w] = latents.shape[..] else { return Err(file.error("`latents` is not [B,C,H,W]")) };
    let states = file.get("neutral_embeds", &[Some(1), None, Some(config.cross_attention_dim)])?;
    let wanted = [Some(n), Some(config.out_channels), Some(h), Some(w)];
    let input = UNetInput { rows: n, h, w, tokens: states.shape[1], shifted: 0 };
    let mut halves = Halves::new(&args.device.open()?, &config, &source.tensors("unet")?, &[], input, Some(Keep::All))?;
    let extra = |name: &str, width: Option<usize>| -> Result<Vec<f32>> {
        width.map_or(Ok(vec![]), |width| Ok(file.get(name, &[Some(n), Some(width)])?.floats()))
    };
    let embeds = extra("text_embeds", config.text_time.as_ref().map(|t| t.text_embed_dim))?;
    let ids = extra("time_ids", config.text_time.as_ref().map(|_| 6))?;
    let states = states.floats().repeat(n);
    halves.condition(&[("encoder_hidden_states", states), ("text_embeds", embeds), ("time_ids", ids)])?;
    let target = nhwc(&file.get("target", &wanted)?.floats(), config.out_channels, h * w);
    let timestep = file.get("timestep", &[Some(1)])?.floats()[0];
    let shape = Shape { n: 1, ..halves.mid_shape() };
    let (ram, sam) = (constant(file, "ram", shape)?, constant(file, "sam", shape)?);
    halves.descend(&nhwc(&latents.floats(), config.out_channels, h * w), timestep)?;
    let mut objective = Objective::new(&mut halves);
    let resp = objective.match_score(&[&ram], &target, 1.0)?;
    let neutral = objective.predict(&[])?;
    let sem = objective.match_score(&[&ram, &sam], &neutral, args.lambda)?;
    let gradient = |module: &Module, by_shift: &[f32]| {
        let mut nchw = vec![0.0; shape.len()];
        nhwc_to_nchw(&module.gradient(objective.mid(), by_shift), shape.c, shape.tokens(), &mut nchw);
        (vec![shape.c, shape.h, shape.w], nchw)
    };
    let (by_ram, by_sam) = (gradient(&ram, &resp.by_shift), gradient(&sam, &sem.by_shift));
    Ok(vec![
        ("loss_resp", vec![1], vec![resp.loss as f32]),
        ("loss_sem", vec![1], vec![sem.loss as f32]),
        ("grad_ram", by_ram.0, by_ram.1),
        ("grad_sam", by_sam.0, by_sam.1),
    ])
}

fn decode(args: &Args, source: &Source, file: &TensorFile) -> Result<Vec<Named>> {
    let config = read_config(source, "vae", VaeConfig::parse)?;
    let latents = file.get("latents", &[None, Some(config.latent_channels), None, None])?;
    let [n, c, h, w] = latents.shape[..] else { return Err(file.error("`latents` is not [B,C,H,W]")) };
    let mut executor = executor(args, source, "vae", vae_decoder(&config, n, Extent { h, w }))?;
    executor.write("latents", &nhwc(&latents.floats(), c, h * w))?;
    call(&mut *executor)?;
    Ok(vec![image_output(&*executor, "image")?])
}

fn encode(args: &Args, source: &Source, file: &TensorFile) -> Result<Vec<Named>> {
    let config = read_config(source, "vae", VaeConfig::parse)?;
    let image = file.get("image", &[None, Some(config.in_channels), None, None])?;
    let [n, c, h, w] = image.shape[..] else { return Err(file.error("`image` is not [B,C,H,W]")) };
    if h % config.scale() != 0 || w % config.scale() != 0 {
        return Err(file.error(format!("`image` is {w}x{h}; both must be multiples of {}", config.scale())));
    }
    let mut executor = executor(args, source, "vae", vae_encoder(&config, n, Extent { h, w }))?;
    executor.write("image", &nhwc(&image.floats(), c, h * w))?;
    call(&mut *executor)?;
    let (_, shape, moments) = image_output(&*executor, "moments")?;
    if shape[1] == config.latent_channels {
        return Ok(vec![("latents", shape, moments)]);
    }
    let one = moments.len() / n;
    let half =
        |from: usize| moments.chunks_exact(one).flat_map(|m| m[from..from + one / 2].to_vec()).collect::<Vec<_>>();
    let shape = vec![n, shape[1] / 2, shape[2], shape[3]];
    // diffusers clamps the logarithm of the variance, so that the deviation exp(logvar / 2) stays within fp16.
    let logvar = half(one / 2).into_iter().map(|x| x.clamp(-30.0, 20.0)).collect();
    Ok(vec![("mean", shape.clone(), half(0)), ("logvar", shape, logvar)])
}

fn scheduler(args: &Args, source: &Source, file: &TensorFile) -> Result<Vec<Named>> {
    let name = "scheduler/scheduler_config.json";
    let config = SchedulerConfig::parse(&source.read_text(name)?, source.path(name))?;
    let config = config.of_sdxl(source.has("text_encoder_2/config.json"));
    let mut choice: SamplerChoice = args.scheduler.as_deref().map_or(Ok(SamplerChoice::default()), str::parse)?;
    choice.tuning = args.tuning.or(choice.tuning);
    let schedule = Schedule::new(&config, choice, args.steps)?;
    let calls = schedule.steps.len();
    let Some(sample) = file.find("sample") else { return Err(file.error("has no tensor `sample`")) };
    let sample = file.get("sample", &vec![None; sample.shape.len()])?;
    let shape: Vec<usize> = std::iter::once(calls).chain(sample.shape.iter().copied()).collect();
    let wanted: Vec<Option<usize>> = shape.iter().copied().map(Some).collect();
    let eps = file.get("eps", &wanted)?.floats();
    let noise = match schedule.steps.iter().any(|s| s.needs_noise()) {
        true => file.get("noise", &wanted)?.floats(),
        false => vec![],
    };
    let mut x: Vec<f32> = sample.floats().into_iter().map(|x| x * schedule.init_noise_sigma).collect();
    let len = x.len();
    let mut state = SamplerState::new(len);
    let (mut inputs, mut results) = (Vec::new(), Vec::new());
    for (i, step) in schedule.steps.iter().enumerate() {
        let noise = if step.needs_noise() { &noise[i * len..][..len] } else { &[] };
        step.churn(&mut x, noise);
        inputs.extend(x.iter().map(|x| x * step.input_scale));
        state.step(step, &eps[i * len..][..len], &mut x, noise);
        results.extend_from_slice(&x);
    }
    let timesteps = schedule.steps.iter().map(|s| s.timestep).collect();
    Ok(vec![
        ("timesteps", vec![calls], timesteps),
        ("model_input", shape.clone(), inputs),
        ("prev_sample", shape, results),
    ])
}
