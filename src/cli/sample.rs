//! `respodiff sample`.

use super::{Device, check_writable, concepts, files, interrupt_flag, progress_bar, random_seed, say, warn};
use crate::diffusion::noise::Rng;
use crate::diffusion::scheduler::{SamplerChoice, Spacing};
use crate::engine::{Engine, Progress, Request, SessionOptions};
use crate::image::{GenerationInfo, JSON_KEYWORD, PARAMETERS_KEYWORD};
use crate::weights::Source;
use crate::{Error, Result};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

#[derive(clap::Args)]
pub(super) struct Args {
    /// What to show
    prompt: String,
    /// Checkpoint folder or Hugging Face model id [default: the demo]
    #[arg(long)]
    model: Option<String>,
    /// What to stay away from
    #[arg(long, default_value = "")]
    negative_prompt: String,
    /// Sampling steps
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Guidance scale; 1 or less turns guidance off and halves the work
    #[arg(long, default_value_t = 7.5, allow_negative_numbers = true)]
    guidance: f32,
    /// Sampler by diffusers' or k-diffusion's name, such as "DDIM" or "DPM++ 2M Karras" [default: the checkpoint's]
    #[arg(long)]
    scheduler: Option<String>,
    /// Spacing of the steps: leading, trailing, linspace, karras, exponential [default: the checkpoint's]
    #[arg(long)]
    spacing: Option<String>,
    /// Seed of the first image; the others count on [default: random]
    #[arg(long)]
    seed: Option<u64>,
    /// Whose random numbers a seed means: torch-cpu or torch-cuda
    #[arg(long, default_value = "torch-cpu")]
    rng: String,
    /// Images at once
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Pixels, a multiple of 8 [default: the checkpoint's]
    #[arg(long)]
    width: Option<usize>,
    /// Pixels, a multiple of 8 [default: the checkpoint's]
    #[arg(long)]
    height: Option<usize>,
    /// Start from this file's unit noise: safetensors, `latents` [B,4,H/8,W/8]
    #[arg(long)]
    latents: Option<PathBuf>,
    /// Write the final latents to this file
    #[arg(long)]
    save_latents: Option<PathBuf>,
    /// PNG file or folder; a batch adds -0, -1, ... [default: the prompt and seed, in this folder]
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    concepts: concepts::Flags,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
}

pub(super) fn run(args: &Args) -> Result<()> {
    args.device.check()?;
    let mut sampler: SamplerChoice = args.scheduler.as_deref().map_or(Ok(SamplerChoice::default()), str::parse)?;
    if let Some(spacing) = &args.spacing {
        sampler.spacing = Some(spacing.parse::<Spacing>()?);
    }
    let rng: Rng = args.rng.parse()?;
    let seed = args.seed.unwrap_or_else(random_seed);
    let files = output_files(args, seed)?;

    let source = Source::resolve(args.model.as_deref(), true)?;
    let engine = Engine::open(&source)?;
    let schedule = engine.schedule(sampler, args.steps)?;
    for (name, prompt) in [("prompt", &args.prompt), ("negative prompt", &args.negative_prompt)] {
        let lost = engine.tokenize(prompt)?.lost;
        if !lost.is_empty() {
            warn(&format!("the {name} is too long; these words are not used: {lost}"));
        }
    }
    let (width, height) = engine.default_size();
    let options = SessionOptions {
        width: args.width.unwrap_or(width),
        height: args.height.unwrap_or(height),
        batch: args.batch,
        guided: args.guidance > 1.0,
        concepts: args.concepts.any(),
    };
    let mut session = engine.session(options)?;
    let shape = engine.latent_shape(options).to_vec();
    let latents = match &args.latents {
        Some(path) => {
            let wanted: Vec<Option<usize>> = shape.iter().copied().map(Some).collect();
            Some(files::TensorFile::read(path)?.get("latents", &wanted)?.floats())
        }
        None => None,
    };
    let assignment = match options.concepts {
        true => args.concepts.assign(&engine, &args.prompt, args.batch, seed)?,
        false => Vec::new(),
    };
    let request = Request {
        prompt: args.prompt.clone(),
        negative_prompt: args.negative_prompt.clone(),
        steps: args.steps,
        guidance: args.guidance,
        sampler,
        seed,
        rng,
        latents,
        concepts: assignment.clone(),
    };

    let cancelled = interrupt_flag();
    let bar = progress_bar(schedule.steps.len() as u64, "{bar:30} {pos}/{len} {per_sec} {eta} {msg}");
    let output = session.generate(&request, &mut |progress| {
        match progress {
            Progress::Step { done, .. } => bar.set_position(done as u64),
            Progress::Decoded { done, total } => bar.set_message(format!("decoded {done}/{total}")),
        }
        if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let output = output?;

    let mut manifest = Vec::new();
    for (i, (image, path)) in output.images.iter().zip(&files).enumerate() {
        let info = GenerationInfo {
            prompt: args.prompt.clone(),
            negative_prompt: args.negative_prompt.clone(),
            steps: args.steps,
            sampler: schedule.sampler.a1111_name().into(),
            spacing: schedule.spacing.map_or("Automatic", Spacing::a1111_name).into(),
            guidance: args.guidance,
            seed: seed.wrapping_add(i as u64),
            rng: rng.name().into(),
            width: options.width as u32,
            height: options.height as u32,
            model: engine.name(),
            model_sha256: None,
            concepts: assignment
                .get(i)
                .map_or_else(Vec::new, |list| list.iter().map(|(c, w)| (c.metadata.concept.clone(), *w)).collect()),
            version: env!("CARGO_PKG_VERSION").into(),
        };
        image.save_png(path, &[(PARAMETERS_KEYWORD, &info.parameters()), (JSON_KEYWORD, &info.json()?)])?;
        say(&path.display().to_string());
        manifest.push(serde_json::json!({"file": path.file_name().map(|n| n.to_string_lossy()), "info": info}));
    }
    if options.concepts {
        // Which image got what, for audits.
        let path = files[0].with_extension("json");
        let text = serde_json::to_string_pretty(&manifest).unwrap_or_default() + "\n";
        crate::files::write(&path, text.as_bytes())?;
        say(&path.display().to_string());
    }
    if let Some(path) = &args.save_latents {
        files::write(path, &[("latents", shape, output.latents)])?;
        say(&path.display().to_string());
    }
    if output.images.len() < args.batch {
        return Err(Error::Cancelled(format!("{} of {} pictures were saved", output.images.len(), args.batch)));
    }
    Ok(())
}

/// A file for each image, in folders that can be written to.
fn output_files(args: &Args, seed: u64) -> Result<Vec<PathBuf>> {
    let words: String = args.prompt.chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    let mut slug = words.split_whitespace().collect::<Vec<_>>().join("-");
    // File systems limit names to 255 bytes.
    slug.truncate(slug.floor_char_boundary(100));
    let default = format!("{}-{seed}.png", if slug.is_empty() { "image" } else { &slug });
    let path = match &args.out {
        Some(path) if path.is_dir() => free_name(path.join(default), args.batch),
        Some(path) => path.clone(),
        None => free_name(PathBuf::from(default), args.batch),
    };
    for file in [Some(&path), args.save_latents.as_ref()].into_iter().flatten() {
        check_writable(file)?;
    }
    Ok(numbered(&path, args.batch))
}

fn numbered(path: &Path, batch: usize) -> Vec<PathBuf> {
    if batch == 1 {
        return vec![path.to_path_buf()];
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or("png".into(), |e| e.to_string_lossy());
    (0..batch.min(256)).map(|i| path.with_file_name(format!("{stem}-{i}.{extension}"))).collect()
}

/// The first of `name.png`, `name_1.png`, ... that would overwrite nothing: only a name the user gave does.
fn free_name(path: PathBuf, batch: usize) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut candidate = path.clone();
    let mut count = 1;
    while numbered(&candidate, batch).iter().any(|p| p.exists()) {
        candidate = path.with_file_name(format!("{stem}_{count}.png"));
        count += 1;
    }
    candidate
}
