//! `respodiff sample`.

use super::{
    Place, Precision, check_writable, concepts, files, interrupt_flag, model, note, progress_bar, random_seed, say,
    warn,
};
use crate::diffusion::noise::Rng;
use crate::diffusion::scheduler::{SamplerChoice, Spacing};
use crate::engine::{Engine, EngineOptions, Progress, Prompt, Request, Size, Start};
use crate::image::{GenerationInfo, JSON_KEYWORD, PARAMETERS_KEYWORD};
use crate::{Error, ErrorKind, Picture, Result};
use serde_json::json;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Most images of a run.
const MAX_IMAGES: usize = 1_000_000;

#[derive(clap::Args)]
pub(super) struct Args {
    /// What to show
    prompt: String,
    /// Checkpoint folder, single file or Hugging Face model id [default: the demo]
    #[arg(long)]
    model: Option<String>,
    /// What to stay away from; with SDXL "" is an empty prompt, which is not the same as none
    #[arg(long)]
    negative_prompt: Option<String>,
    /// Sampling steps
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Guidance scale; 1 or less turns guidance off and halves the work [default: 7.5; 5 with SDXL]
    #[arg(long, allow_negative_numbers = true)]
    guidance: Option<f32>,
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
    /// Images in all, in as many batches as that takes [default: one batch]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_IMAGES as i64))]
    images: Option<u32>,
    /// Pixels, a multiple of 8 [default: the checkpoint's]
    #[arg(long)]
    width: Option<usize>,
    /// Pixels, a multiple of 8 [default: the checkpoint's]
    #[arg(long)]
    height: Option<usize>,
    /// SDXL: the size of the picture that this one is to look made of [default: its own]
    #[arg(long, value_name = "WxH", value_parser = |text: &str| pair(text, 'x'))]
    original_size: Option<(usize, usize)>,
    /// SDXL: pixels cut off that picture at its left and its top
    #[arg(long, value_name = "X,Y", default_value = "0,0", value_parser = |text: &str| pair(text, ','))]
    crop: (usize, usize),
    /// Start from this file's unit noise: safetensors, `latents` [IMAGES,4,H/8,W/8]
    #[arg(long)]
    latents: Option<PathBuf>,
    /// Write the final latents to this file
    #[arg(long)]
    save_latents: Option<PathBuf>,
    /// PNG file or folder; several images add -0, -1, ... [default: the prompt and seed, in this folder]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Print one JSON object instead of file names: files and seeds, times, memory
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    concepts: concepts::Flags,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = Place::Auto)]
    device: Place,
    /// Number format of the UNet's linear layers
    #[arg(long, value_enum, default_value_t = Precision::Full)]
    precision: Precision,
}

/// `started` is when the process was.
pub(super) fn run(args: &Args, started: Instant) -> Result<()> {
    let device = args.device.open()?;
    let mut sampler: SamplerChoice = args.scheduler.as_deref().map_or(Ok(SamplerChoice::default()), str::parse)?;
    if let Some(spacing) = &args.spacing {
        sampler.spacing = Some(spacing.parse::<Spacing>()?);
    }
    let rng: Rng = args.rng.parse()?;
    let seed = args.seed.unwrap_or_else(random_seed);
    let files = output_files(args, seed)?;

    let source = model::source(args.model.as_deref())?;
    let opening = Instant::now();
    let engine = Engine::open(&source, EngineOptions::new(device.clone()).precision(args.precision.of_matrices()))?;
    let loading = opening.elapsed();
    let schedule = engine.schedule(sampler, args.steps)?;
    let prompt = engine.encode(&args.prompt)?;
    let negative = args.negative_prompt.as_deref().map(|prompt| engine.encode(prompt)).transpose()?;
    for (name, encoded) in [("prompt", Some(&prompt)), ("negative prompt", negative.as_ref())] {
        if let Some(lost) = encoded.map(|encoded| encoded.truncated()).filter(|lost| !lost.is_empty()) {
            warn(&format!("the {name} is too long; these words are not used: {lost}"));
        }
    }
    let guidance = args.guidance.unwrap_or(engine.default_guidance());
    let Size { width, height } = engine.default_size();
    let size = Size::new(args.width.unwrap_or(width), args.height.unwrap_or(height));
    let images = args.total();
    let mut options =
        engine.options().size(size).batch(args.batch.min(images)).guided(guidance > 1.0).concepts(args.concepts.any());
    let mut session = Some(engine.session(options)?);
    let shape = engine.latent_shape(options.batch(images)).to_vec();
    let latents = match &args.latents {
        Some(path) => {
            let wanted: Vec<Option<usize>> = shape.iter().copied().map(Some).collect();
            Some(files::TensorFile::read(path)?.get("latents", &wanted)?.floats())
        }
        None => None,
    };
    let assignment = match options.concepts {
        true => args.concepts.assign(&engine, &args.prompt, images, seed)?,
        false => vec![Vec::new(); images],
    };
    let info = GenerationInfo {
        prompt: args.prompt.clone(),
        negative_prompt: args.negative_prompt.clone(),
        steps: args.steps,
        sampler: schedule.sampler.a1111_name().into(),
        spacing: schedule.spacing.map_or("Automatic", Spacing::a1111_name).into(),
        guidance,
        seed,
        rng: rng.name().into(),
        width: size.width as u32,
        height: size.height as u32,
        original_size: args.original_size,
        crop: Some(args.crop).filter(|&crop| crop != (0, 0)),
        model: engine.name(),
        model_sha256: None,
        precision: args.precision.told(),
        concepts: Vec::new(),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    let memory = engine.memory(options)?;
    let mut saved = Saved {
        files: &files,
        assignment: &assignment,
        audited: options.concepts,
        named: !args.json,
        manifest: Vec::new(),
        first: None,
        info,
    };

    let cancelled = interrupt_flag();
    let (batch, steps) = (options.batch, schedule.steps.len());
    let bar = progress_bar((images.div_ceil(batch) * steps) as u64, "{bar:30} {pos}/{len} {per_sec} {eta} {msg}");
    let one: usize = shape[1..].iter().product();
    let mut final_latents = Vec::with_capacity(images * one);
    let sampling = Instant::now();
    // Makes a batch; false if the run was broken off meanwhile.
    let mut make = |start: usize| -> Result<bool> {
        let end = images.min(start + batch);
        if end - start < options.batch {
            // The last batch is smaller. Its session needs the room of the other.
            options.batch = end - start;
            session = None;
        }
        let image = |i: usize| {
            let mut image = crate::Image::new(&prompt).seed(seed.wrapping_add(i as u64)).guidance(guidance);
            image.negative = negative.as_ref().map(Prompt::from);
            image.concepts = assignment[i].clone();
            match &latents {
                Some(all) => image.start(Start::Latents(all[i * one..(i + 1) * one].into())),
                None => image,
            }
        };
        let request = Request::new((start..end).map(image).collect())
            .steps(args.steps)
            .sampler(sampler)
            .rng(rng)
            .conditioned_on_size(args.original_size, args.crop);
        let session = match &mut session {
            Some(session) => session,
            none => none.insert(engine.session(options)?),
        };
        let output = session.generate(&request, &mut |progress| {
            match progress {
                Progress::Step { done, .. } => bar.set_position((start / batch * steps + done) as u64),
                Progress::Decoded { done, .. } => bar.set_message(format!("decoded {}/{images}", start + done)),
            }
            if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        // Printed lines and the bar would mix.
        bar.suspend(|| saved.add(&output.pictures))?;
        final_latents.extend_from_slice(&output.latents);
        Ok(output.pictures.len() == options.batch)
    };
    let mut failure = None;
    for start in (0..images).step_by(batch) {
        match make(start) {
            Ok(true) => {}
            Ok(false) => break,
            // Pictures of earlier batches are there: they are reported first.
            Err(problem) if start > 0 => {
                failure = Some(problem);
                break;
            }
            Err(problem) => return Err(problem),
        }
    }
    bar.finish_and_clear();
    let made = saved.manifest.len();
    let (loading, each) = (loading.as_secs_f64(), sampling.elapsed().as_secs_f64() / made as f64);
    let others =
        [("manifest", options.concepts.then(|| saved.manifest_path())), ("latents", args.save_latents.clone())];
    if let (_, Some(path)) = &others[1] {
        let shape = [&[final_latents.len() / one], &shape[1..]].concat();
        files::write(path, &[("latents", shape, final_latents)])?;
    }
    let taken = engine.used_memory();
    let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
    note(&format!(
        "loaded in {loading:.2} s; {made} image{}, {each:.2} s each; {:.2} GiB of memory planned{}",
        if made == 1 { "" } else { "s" },
        gib(memory.total()),
        taken.map_or(String::new(), |taken| format!(", {:.2} taken by the device's count", gib(taken)))
    ));
    if args.json {
        let seeds = (0..).map(|i| seed.wrapping_add(i));
        let pictures = files[..made]
            .iter()
            .zip(seeds)
            .map(|(file, seed)| json!({"file": file.display().to_string(), "seed": seed}));
        let mut report = json!({
            "version": env!("CARGO_PKG_VERSION"), "device": device.name(), "precision": args.precision.told(),
            "images": pictures.collect::<Vec<_>>(),
            "load_seconds": loading, "seconds_per_image": each,
            "first_image_seconds": saved.first.map(|first| (first - started).as_secs_f64()),
            "memory": {"weights": memory.weights, "text": memory.text, "unet": memory.unet, "vae": memory.vae,
                "sampler": memory.sampler, "total": memory.total(), "taken": taken},
        });
        others.into_iter().for_each(|(name, path)| report[name] = json!(path.map(|path| path.display().to_string())));
        say(&format!("{report:#}"));
    } else {
        others.iter().filter_map(|(_, path)| path.as_ref()).for_each(|path| say(&path.display().to_string()));
    }
    match failure {
        Some(problem) if problem.kind() != ErrorKind::Cancelled => Err(problem),
        _ if made < images => Err(Error::cancelled(format!("{made} of {images} pictures were saved"))),
        _ => Ok(()),
    }
}

/// Two whole numbers.
fn pair(text: &str, separator: char) -> std::result::Result<(usize, usize), String> {
    let numbers = text.split_once(separator).and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
    numbers.ok_or_else(|| format!("write two whole numbers with `{separator}` between them"))
}

impl Args {
    /// Images in all.
    fn total(&self) -> usize {
        self.images.map_or(self.batch, |images| images as usize)
    }
}

/// The pictures written so far.
struct Saved<'a> {
    files: &'a [PathBuf],
    assignment: &'a concepts::Assignment,
    /// Whether a manifest is kept.
    audited: bool,
    /// True if files are named on stdout, each as it is written.
    named: bool,
    manifest: Vec<serde_json::Value>,
    /// When the first one was there.
    first: Option<Instant>,
    /// Of the first image, without concepts.
    info: GenerationInfo,
}

impl Saved<'_> {
    /// Writes the next pictures, and after every batch which picture got what so far.
    fn add(&mut self, images: &[Picture]) -> Result<()> {
        for image in images {
            let i = self.manifest.len();
            let (path, list) = (&self.files[i], &self.assignment[i]);
            let info = GenerationInfo {
                seed: self.info.seed.wrapping_add(i as u64),
                concepts: list.iter().map(|(c, w)| (c.metadata.concept.clone(), *w)).collect(),
                ..self.info.clone()
            };
            image.save_png(path, &[(PARAMETERS_KEYWORD, &info.parameters()), (JSON_KEYWORD, &info.json()?)])?;
            self.first.get_or_insert_with(Instant::now);
            if self.named {
                say(&path.display().to_string());
            }
            self.manifest.push(json!({"file": path.file_name().map(|n| n.to_string_lossy()), "info": info}));
        }
        if self.audited {
            let text = serde_json::to_string_pretty(&self.manifest).unwrap_or_default() + "\n";
            crate::files::write(&self.manifest_path(), text.as_bytes())?;
        }
        Ok(())
    }

    fn manifest_path(&self) -> PathBuf {
        self.files[0].with_extension("json")
    }
}

/// A file for each image, in folders that can be written to.
fn output_files(args: &Args, seed: u64) -> Result<Vec<PathBuf>> {
    let words: String = args.prompt.chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    let mut slug = words.split_whitespace().collect::<Vec<_>>().join("-");
    // File systems limit names to 255 bytes.
    slug.truncate(slug.floor_char_boundary(100));
    let default = format!("{}-{seed}.png", if slug.is_empty() { "image" } else { &slug });
    let path = match &args.out {
        Some(path) if path.is_dir() => free_name(path.join(default), args.total()),
        Some(path) => path.clone(),
        None => free_name(PathBuf::from(default), args.total()),
    };
    for file in [Some(&path), args.save_latents.as_ref()].into_iter().flatten() {
        check_writable(file)?;
    }
    Ok(numbered(&path, args.total()))
}

fn numbered(path: &Path, images: usize) -> Vec<PathBuf> {
    if images == 1 {
        return vec![path.to_path_buf()];
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or("png".into(), |e| e.to_string_lossy());
    // A batch beyond is refused later, with the right words.
    (0..images.min(MAX_IMAGES)).map(|i| path.with_file_name(format!("{stem}-{i}.{extension}"))).collect()
}

/// The first of `name.png`, `name_1.png`, ... that would overwrite nothing: only a name the user gave does.
fn free_name(path: PathBuf, images: usize) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut candidate = path.clone();
    let mut count = 1;
    while numbered(&candidate, images).iter().any(|p| p.exists()) {
        candidate = path.with_file_name(format!("{stem}_{count}.png"));
        count += 1;
    }
    candidate
}
