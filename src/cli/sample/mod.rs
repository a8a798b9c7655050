//! `respodiff sample`.

mod plan;
mod report;
mod saved;

use super::hires::{self, Pass, Passes};
use super::init_image::{self, Canvas};
use super::out::{self, Named, Pictures};
use super::progress::Progress as Shown;
use super::prompts::Item;
use super::{Place, adapters, concepts, files, hashes, interrupt_flag, parts, sampler, sign, text};
use crate::backend::Precision;
use crate::concept::Assignment;
use crate::diffusion::noise::Rng;
use crate::diffusion::scheduler::Spacing;
use crate::draws::random_seed;
use crate::engine::{Engine, EngineOptions, Image, MemoryPlan, Progress, Prompt, Request, SessionOptions, Size, Start};
use crate::files::{check_not_input, check_writable};
use crate::image::GenerationInfo;
use crate::models::tokenizer::TokenizerRules;
use crate::pipeline::record;
use crate::{Error, ErrorKind, Result};
use plan::{MAX_IMAGES, Planned, batches, encode, plan};
use report::Report;
use saved::Saved;
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The prompt, which describes the picture
    #[arg(required_unless_present_any = ["prompt_flag", "prompts"], conflicts_with_all = ["prompt_flag", "prompts"])]
    prompt: Option<String>,
    /// The prompt as a flag, for one that begins with a dash
    #[arg(short, long = "prompt", value_name = "PROMPT", allow_hyphen_values = true, conflicts_with = "prompts")]
    prompt_flag: Option<String>,
    /// A file with a prompt per line, or with a JSON object per line: prompt, negative_prompt, prompt_2,
    /// negative_prompt_2, seed, guidance
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Checkpoint folder, single file or Hugging Face model id [default: the demo]
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    parts: parts::Flags,
    /// Negative prompt; with SDXL, an empty one ("") is not the same as none
    #[arg(short, long, allow_hyphen_values = true)]
    negative_prompt: Option<String>,
    #[command(flatten)]
    sampling: sampler::Flags,
    /// Seed of the first image; each further image adds 1 [default, and -1: random]
    #[arg(short, long, allow_negative_numbers = true)]
    seed: Option<Seed>,
    /// Random number generator of the seeds: torch-cpu or torch-cuda
    #[arg(long, default_value = "torch-cpu")]
    rng: String,
    /// Images per batch
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Images of each prompt, in as many batches as needed [default: one batch; with --prompts, 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_IMAGES as i64))]
    images: Option<u32>,
    /// Width in pixels, a multiple of 8 [default: the checkpoint's]
    #[arg(short = 'W', long)]
    width: Option<usize>,
    /// Height in pixels, a multiple of 8 [default: the checkpoint's]
    #[arg(short = 'H', long)]
    height: Option<usize>,
    /// SDXL: original size on which the UNet is conditioned [default: the picture's own size]
    #[arg(long, value_name = "WxH", value_parser = |text: &str| pair(text, 'x'))]
    original_size: Option<(usize, usize)>,
    /// SDXL: crop on which the UNet is conditioned, in pixels from the left and from the top
    #[arg(long, value_name = "X,Y", default_value = "0,0", value_parser = |text: &str| pair(text, ','))]
    crop: (usize, usize),
    /// Take the noise of unit variance from this safetensors file in place of the seed's: `latents`
    /// [IMAGES,4,H/8,W/8]. With --image it is the noise that the picture is put under
    #[arg(long)]
    latents: Option<PathBuf>,
    /// Write the final latents to this file
    #[arg(long)]
    save_latents: Option<PathBuf>,
    /// A .png, .jpg or .webp file, a template such as {seed}-{i}.png, a folder (created if it ends in a slash), or -
    /// for stdout; several images add -0, -1, ... [default: the prompt and seed, in this folder]
    #[arg(short, long, allow_hyphen_values = true)]
    out: Option<PathBuf>,
    /// Print one JSON object instead of file names: files and seeds, times, memory
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    text: text::Flags,
    #[command(flatten)]
    init_image: init_image::Flags,
    #[command(flatten)]
    hires: hires::Flags,
    #[command(flatten)]
    concepts: concepts::Flags,
    #[command(flatten)]
    adapters: adapters::Flags,
    #[command(flatten)]
    sign: sign::Flags,
    /// Device to compute on: auto, cpu, cuda, or a GPU by its number, such as cuda:1
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
    /// Number format of the UNet's linear layers
    #[arg(long, default_value_t = Precision::Full, value_name = "full|bf16|int8")]
    precision: Precision,
    /// Compute the whole UNet in every Nth step alone; the steps between take its inner activations from the step
    /// before. Faster, and less like the picture that all steps make. Concepts still act in every step
    #[arg(long, default_value_t = 1, value_name = "N")]
    reuse: usize,
    /// Decode and encode pictures of more than PIXELS x PIXELS in strips as large. Takes less memory and several times
    /// as long; the picture is the same, but for roundings
    #[arg(long, value_name = "PIXELS")]
    vae_tile: Option<usize>,
    /// Guide in the first STEPS steps alone; the later ones also take the outputs of cross attention from the last of
    /// these. Faster, and less like the picture that all steps make. Concepts still act in every step
    #[arg(long, value_name = "STEPS")]
    gate: Option<usize>,
    /// Recipe by which prompts are split into tokens: that of transformers today, or of its slow tokenizer up to
    /// version 4. They differ on Chinese characters, emoji and control characters
    #[arg(long, default_value_t = TokenizerRules::Fast, value_name = "fast|slow")]
    tokenizer: TokenizerRules,
}

/// `started` is the time at which the process started.
pub(super) fn run(args: &Args, started: Instant) -> Result<()> {
    let device = args.device.open()?;
    let sampling = args.sampling.sampling()?;
    let rng: Rng = args.rng.parse()?;
    let base = args.seed.and_then(|seed| seed.0).unwrap_or_else(random_seed);
    let (mut items, each) = args.items()?;
    let mut adapters = args.adapters.load()?;
    adapters.extend(args.adapters.take_tags(&mut items, args.text.syntax)?);
    let plan: Vec<Planned> = plan(&items, each, base)?;
    let names: Vec<Named> = plan.iter().map(|p| Named { prompt: &p.item.prompt, seed: p.seed }).collect();
    let canvas = args.init_image.open()?;
    let own_size = canvas.as_ref().and_then(|canvas| canvas.size(args.width, args.height));
    let size = own_size.or(args.width.zip(args.height).map(|(width, height)| Size::new(width, height)));
    let files = out::pictures(args.out.as_deref(), &names, base, size)?;
    args.check_files(&files, adapters.iter().map(|(adapter, _)| adapter.path().into()))?;

    let signing = args.sign.open()?;
    let embeddings = args.text.embeddings.open()?;
    let source = args.parts.source(args.model.as_deref())?;
    let opening = Instant::now();
    let options = EngineOptions::new(device).precision(args.precision).tokenizer(args.tokenizer);
    let mut options = options.adapters(adapters).embeddings(embeddings.clone());
    options.vae_tile = args.vae_tile;
    let engine = Engine::open(&source, options.clone())?;
    let loading = opening.elapsed();
    // Every picture records hashes of the weights. They are computed while the first pictures are made, since all
    // weights have to be read for them.
    let hashing = std::thread::spawn({
        let engine = engine.clone();
        move || hashes::of(engine.outline())
    });
    sampling.check(&engine)?;
    let schedule = engine.schedule(sampling.choice, sampling.steps)?;
    let encoded = encode(&engine, args, &items)?;
    let guidance = |item: &Item| item.guidance.unwrap_or(sampling.guidance(&engine));
    let Size { width, height } = engine.default_size();
    let size = own_size.unwrap_or(Size::new(args.width.unwrap_or(width), args.height.unwrap_or(height)));
    let images = plan.len();
    let image = |item: usize| {
        let (prompt, negative) = &encoded[item];
        let mut image = Image::new(prompt).guidance(guidance(&items[item]));
        image.negative = negative.as_ref().map(Prompt::from);
        image
    };
    // Every image has the chunks of its own prompts, so that it does not depend on those of others.
    let chunks =
        (0..items.len()).map(|item| engine.chunks(&image(item), schedule.sampler)).collect::<Result<Vec<usize>>>()?;
    engine.outline().check_size(engine.options().size(size).batch(args.batch.min(images)))?;
    let batches = batches(images, args.batch, |i| chunks[i / each]);
    let shared = engine
        .options()
        .size(size)
        .guided(items.iter().any(|item| schedule.sampler.guides(guidance(item))))
        .reuse(args.reuse)
        .gate(args.gate)
        .concepts(args.concepts.any());
    let shape = |batch: &Range<usize>| shared.batch(batch.len()).chunks(chunks[batch.start / each]);
    let second = args.hires.pass(size, sampling.steps)?;
    let second_steps = match &second {
        Some(pass) => {
            // The size and its memory are checked before the first pass.
            engine.check_affordable(shape(&batches[0]).size(pass.size))?;
            let schedule = engine.outline().schedule_from(sampling.choice, pass.steps, pass.first_step()?);
            schedule.map_err(|error| error.of_field("hires_steps"))?.steps.len()
        }
        None => 0,
    };
    let mut passes = Passes::new(&engine, canvas.as_ref(), second.as_ref());
    passes.prepare(shape(&batches[0]))?;
    let latents = match &args.latents {
        Some(path) => {
            let wanted = engine.latent_shape(shared.batch(images)).map(Some);
            Some(files::TensorFile::read(path)?.get("latents", &wanted)?.floats())
        }
        None => None,
    };
    let init = match &canvas {
        Some(canvas) => Some(canvas.begin(&canvas.encode(&engine, size)?)),
        None => None,
    };
    let first = init.as_ref().map_or(Ok(0), |init| init.first_step(sampling.steps))?;
    let mut assignment = Assignment::new();
    for (i, item) in items.iter().enumerate() {
        assignment.extend(match args.concepts.any() {
            true => args.concepts.assign(&engine, &item.prompt, guidance(item), each, plan[i * each].seed)?,
            false => vec![Vec::new(); each],
        });
    }
    let mut info = GenerationInfo {
        steps: sampling.steps,
        sampler: schedule.sampler.a1111_name().into(),
        spacing: schedule.spacing.map_or("Automatic", Spacing::a1111_name).into(),
        guidance_rescale: Some(sampling.guidance_rescale).filter(|share| *share != 0.0),
        guidance_interval: sampling.guidance_interval,
        tuning: schedule.tuning,
        rng: rng.name().into(),
        width: size.width as u32,
        height: size.height as u32,
        original_size: args.original_size,
        crop: Some(args.crop).filter(|&crop| crop != (0, 0)),
        init_image: canvas.as_ref().map(Canvas::record),
        hires: second.as_ref().map(Pass::record),
        given_latents: latents.is_some(),
        reuse: Some(args.reuse).filter(|&reuse| reuse != 1),
        gate: args.gate,
        ..record(engine.outline(), &options)
    };
    args.text.record(&mut info);
    let final_size = second.as_ref().map_or(size, |pass| pass.size);
    let memory = largest_memory(&engine, batches.iter().map(|batch| shape(batch).size(final_size)))?;
    let mut saved = Saved {
        files: &files,
        signing: &signing,
        plan: &plan,
        assignment: &assignment,
        audited: args.concepts.any() && matches!(files, Pictures::Files(_)),
        named: !args.json,
        manifest: Vec::new(),
        first: None,
        hashing: Some(hashing),
        guidance: &guidance,
        each,
        negative: args.negative_prompt.as_deref(),
        embeddings: encoded
            .iter()
            .map(|(prompt, negative)| text::used(&embeddings, [prompt].into_iter().chain(negative)))
            .collect(),
        info,
    };

    let cancelled = interrupt_flag();
    let first_steps = engine.outline().schedule_from(sampling.choice, sampling.steps, first)?.steps.len();
    let steps = first_steps + second_steps;
    // The decoding of a picture counts as one step.
    let shown = Shown::new("sampling", (batches.len() * steps + images) as u64, "steps");
    let one: usize = engine.latent_shape(shared)[1..].iter().product();
    let mut final_latents = Vec::with_capacity(images * one);
    let sampling_since = Instant::now();
    // Makes a batch. The result is false if the run was interrupted meanwhile.
    let mut make = |number: usize| -> Result<bool> {
        let batch = &batches[number];
        let image = |i: usize| {
            let mut image = sampling.guide(image(i / each).seed(plan[i].seed));
            image.concepts = assignment[i].iter().map(|used| (used.concept.clone(), used.strength)).collect();
            let noise = latents.as_ref().map(|all| all[i * one..(i + 1) * one].into());
            image.start(match (init.clone(), noise) {
                (Some(init), Some(noise)) => Start::Image(init.noise(noise)),
                (Some(init), None) => Start::Image(init),
                (None, Some(noise)) => Start::Latents(noise),
                (None, None) => Start::Noise,
            })
        };
        let request = Request::new(batch.clone().map(image).collect())
            .steps(sampling.steps)
            .sampler(sampling.choice)
            .rng(rng)
            .conditioned_on_size(args.original_size, args.crop);
        let before = number * steps + batch.start;
        let last = usize::from(second.is_some());
        let mut follow = |progress, pass: usize| {
            match progress {
                Progress::Step { done, .. } => shown.set((before + pass * first_steps + done) as u64, ""),
                Progress::Decoded { done, .. } if pass == last => {
                    shown.set((before + steps + done) as u64, &format!("decoded {}/{images}", batch.start + done));
                }
                Progress::Decoded { .. } => (),
            }
            if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let output = passes.make(shape(batch), &request, &mut follow)?;
        // The bar is hidden meanwhile, since printed lines would mix with it.
        shown.suspend(|| saved.add(&output.pictures))?;
        final_latents.extend_from_slice(&output.latents);
        Ok(output.pictures.len() == batch.len())
    };
    let mut failure = None;
    for number in 0..batches.len() {
        match make(number) {
            Ok(true) => {}
            Ok(false) => break,
            // Pictures of earlier batches exist, and are reported before the error.
            Err(problem) if number > 0 => {
                failure = Some(problem);
                break;
            }
            Err(problem) => return Err(problem),
        }
    }
    shown.finish();
    let sampling_took = sampling_since.elapsed();
    if let Some(path) = &args.save_latents {
        let shape = engine.latent_shape(shared.size(final_size));
        let one: usize = shape[1..].iter().product();
        let shape = [&[final_latents.len() / one], &shape[1..]].concat();
        files::write(path, &[("latents", shape, final_latents)])?;
    }
    let made = saved.manifest.len();
    Report { args, engine: &engine, saved: &saved, started, loading, sampling: sampling_took, memory }.print();
    match failure {
        Some(problem) if problem.kind() != ErrorKind::Cancelled => Err(problem),
        _ if made < images => Err(Error::cancelled(format!("{made} of {images} pictures were saved"))),
        _ => Ok(()),
    }
}

impl Args {
    /// Checks that the outputs of a run can be written and replace no file that the run reads.
    fn check_files(&self, pictures: &Pictures, adapters: impl Iterator<Item = PathBuf>) -> Result<()> {
        if self.json && matches!(pictures, Pictures::Stdout) {
            return Err(Error::invalid("json", "stdout already takes the picture").advise("name a file with --out"));
        }
        let given = self.concepts.files()?.into_iter().chain(self.prompts.clone()).chain(self.latents.clone());
        let inputs: Vec<PathBuf> = given.chain(self.init_image.files()).chain(adapters).collect();
        if let Pictures::Files(names) = pictures {
            let manifest = saved::manifest_path(names).filter(|_| self.concepts.any());
            names.iter().chain(&manifest).try_for_each(|path| check_not_input(path, &inputs))?;
        }
        if let Some(path) = &self.save_latents {
            check_writable(path)?;
            check_not_input(path, &inputs).map_err(|error| error.of_field("save_latents"))?;
        }
        Ok(())
    }
}

/// The memory of that shape of a batch which takes the most.
fn largest_memory(engine: &Engine, shapes: impl Iterator<Item = SessionOptions>) -> Result<MemoryPlan> {
    let mut different: Vec<SessionOptions> = Vec::new();
    for shape in shapes {
        if !different.contains(&shape) {
            different.push(shape);
        }
    }
    let plans = different.into_iter().map(|shape| engine.memory(shape)).collect::<Result<Vec<_>>>()?;
    plans.into_iter().max_by_key(MemoryPlan::total).ok_or_else(|| Error::internal("no batches"))
}

/// Parses two whole numbers with a separator between them.
fn pair(text: &str, separator: char) -> std::result::Result<(usize, usize), String> {
    let numbers = text.split_once(separator).and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
    numbers.ok_or_else(|| format!("write two whole numbers with `{separator}` between them"))
}

/// A seed; -1 is a random one, as in the A1111 web UI and others.
#[derive(Clone, Copy)]
struct Seed(Option<u64>);

impl std::str::FromStr for Seed {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "-1" => Ok(Seed(None)),
            text => {
                let known = text.parse().map_err(|_| format!("give 0 to {}, or -1 for a random one", u64::MAX))?;
                Ok(Seed(Some(known)))
            }
        }
    }
}
