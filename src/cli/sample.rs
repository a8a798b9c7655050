//! `respodiff sample`.

use super::hashes;
use super::hires::{self, Pass};
use super::init_image::{self, Canvas};
use super::out::{self, Named, Pictures};
use super::progress::Progress as Shown;
use super::prompts::{self, Item};
use super::{Place, adapters, concepts, files, interrupt_flag, parts, sampler, say, tell, text};
use crate::backend::Precision;
use crate::concept::{Assignment, Used};
use crate::diffusion::noise::Rng;
use crate::diffusion::scheduler::Spacing;
use crate::draws::random_seed;
use crate::engine::{
    Conditioning, Engine, EngineOptions, Image, MemoryPlan, Progress, Prompt, PromptText, Request, SessionOptions,
    Size, Start,
};
use crate::files::{check_not_input, check_writable};
use crate::image::{GenerationInfo, UsedEmbedding};
use crate::models::tokenizer::TokenizerRules;
use crate::pipeline::{Hashes, told};
use crate::{Error, ErrorKind, Picture, Result};
use serde_json::json;
use std::collections::HashMap;
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// The largest number of images of a run.
const MAX_IMAGES: usize = 1_000_000;

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
    if args.json && matches!(files, Pictures::Stdout) {
        return Err(Error::invalid("json", "stdout already takes the picture").advise("name a file with --out"));
    }
    let given = args.concepts.files()?.into_iter().chain(args.prompts.clone()).chain(args.latents.clone());
    let given = given.chain(args.init_image.files());
    let inputs: Vec<PathBuf> = given.chain(adapters.iter().map(|(adapter, _)| adapter.path().into())).collect();
    if let Pictures::Files(names) = &files {
        let manifest = manifest_path(names).filter(|_| args.concepts.any());
        names.iter().chain(&manifest).try_for_each(|path| check_not_input(path, &inputs))?;
    }
    if let Some(path) = &args.save_latents {
        check_writable(path)?;
        check_not_input(path, &inputs).map_err(|error| error.of_field("save_latents"))?;
    }

    let embeddings = args.text.embeddings.open()?;
    let source = args.parts.source(args.model.as_deref())?;
    let opening = Instant::now();
    let options = EngineOptions::new(device.clone()).precision(args.precision).tokenizer(args.tokenizer);
    let options = options.adapters(adapters.clone());
    let options = options.embeddings(embeddings.clone());
    let engine = Engine::open(&source, options)?;
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
    let options = engine
        .options()
        .size(size)
        .guided(items.iter().any(|item| schedule.sampler.guides(guidance(item))))
        .reuse(args.reuse)
        .concepts(args.concepts.any());
    let options = |batch: &Range<usize>| options.batch(batch.len()).chunks(chunks[batch.start / each]);
    let hires = args.hires.pass(size, sampling.steps)?;
    let second_steps = match &hires {
        Some(pass) => {
            // The size and its memory are checked before the first pass.
            engine.check_affordable(options(&batches[0]).size(pass.size))?;
            let schedule = engine.outline().schedule_from(sampling.choice, pass.steps, pass.first_step()?);
            schedule.map_err(|error| error.of_field("hires_steps"))?.steps.len()
        }
        None => 0,
    };
    let size_of_pictures = hires.as_ref().map_or(size, |pass| pass.size);
    let mut session = Some(engine.session(options(&batches[0]))?);
    let mut second_session = None;
    let shape = engine.latent_shape(options(&(0..images))).to_vec();
    let latents = match &args.latents {
        Some(path) => {
            let wanted: Vec<Option<usize>> = shape.iter().copied().map(Some).collect();
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
        prompt: String::new(),
        negative_prompt: None,
        prompt_2: None,
        negative_prompt_2: None,
        prompt_syntax: None,
        clip_skip: None,
        embeddings: Vec::new(),
        steps: sampling.steps,
        sampler: schedule.sampler.a1111_name().into(),
        spacing: schedule.spacing.map_or("Automatic", Spacing::a1111_name).into(),
        guidance: 0.0,
        guidance_rescale: Some(sampling.guidance_rescale).filter(|share| *share != 0.0),
        guidance_interval: sampling.guidance_interval,
        tuning: schedule.tuning,
        seed: 0,
        rng: rng.name().into(),
        width: size.width as u32,
        height: size.height as u32,
        original_size: args.original_size,
        crop: Some(args.crop).filter(|&crop| crop != (0, 0)),
        model: engine.name(),
        model_sha256: None,
        model_fingerprint: None,
        averages: source.is_averaged(),
        parts: Vec::new(),
        device: Some(device.name()),
        init_image: canvas.as_ref().map(Canvas::record),
        hires: hires.as_ref().map(Pass::record),
        given_latents: latents.is_some(),
        precision: told(args.precision),
        tokenizer: told(args.tokenizer),
        reuse: Some(args.reuse).filter(|&reuse| reuse != 1),
        concepts: Vec::new(),
        adapters: adapters.iter().map(|(adapter, weight)| adapter.record(*weight)).collect(),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    args.text.record(&mut info);
    let mut shapes: Vec<SessionOptions> = Vec::new();
    for shape in batches.iter().map(options) {
        if !shapes.contains(&shape) {
            shapes.push(shape);
        }
    }
    let plans =
        shapes.into_iter().map(|shape| engine.memory(shape.size(size_of_pictures))).collect::<Result<Vec<_>>>()?;
    let memory = plans.into_iter().max_by_key(MemoryPlan::total).ok_or_else(|| Error::internal("no batches"))?;
    let mut saved = Saved {
        files: &files,
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
    let one: usize = shape[1..].iter().product();
    let mut final_latents = Vec::with_capacity(images * one);
    let sampling_since = Instant::now();
    // Makes a batch. The result is false if the run was interrupted meanwhile.
    let mut make = |number: usize| -> Result<bool> {
        let batch = &batches[number];
        let (start, options) = (batch.start, options(batch));
        // A batch of another size or with longer prompts needs sessions of its own. The others are dropped first, to
        // free their memory.
        if !session.as_ref().is_some_and(|session: &crate::Session| session.options() == options) {
            session = None;
            second_session = None;
        }
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
        let session = match &mut session {
            Some(session) => session,
            none => none.insert(engine.session(options)?),
        };
        // `earlier` are the steps of passes before this one.
        let follow = |progress, earlier: usize, last: bool| {
            let before = number * steps + start;
            match progress {
                Progress::Step { done, .. } => shown.set((before + earlier + done) as u64, ""),
                Progress::Decoded { done, .. } if last => {
                    shown.set((before + steps + done) as u64, &format!("decoded {}/{images}", start + done));
                }
                Progress::Decoded { .. } => (),
            }
            if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let mut output = session.generate(&request, &mut |progress| follow(progress, 0, hires.is_none()))?;
        if let Some(pass) = &hires {
            if output.pictures.len() < options.batch {
                return Ok(false);
            }
            let second_session = match &mut second_session {
                Some(session) => session,
                none => none.insert(engine.session(options.size(pass.size))?),
            };
            let request = pass.request(&request, &output.pictures);
            output = second_session.generate(&request, &mut |progress| follow(progress, first_steps, true))?;
        }
        // The bar is hidden meanwhile, since printed lines would mix with it.
        let finish = |picture| match &canvas {
            Some(canvas) => canvas.finish(picture),
            None => picture,
        };
        let pictures: Vec<Picture> = output.pictures.into_iter().map(finish).collect();
        shown.suspend(|| saved.add(&pictures))?;
        final_latents.extend_from_slice(&output.latents);
        Ok(pictures.len() == options.batch)
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
    let made = saved.manifest.len();
    let (loading, each) = (loading.as_secs_f64(), sampling_since.elapsed().as_secs_f64() / made as f64);
    let others = [("manifest", saved.manifest_path()), ("latents", args.save_latents.clone())];
    if let (_, Some(path)) = &others[1] {
        let shape = engine.latent_shape(options(&batches[0]).size(size_of_pictures));
        let one: usize = shape[1..].iter().product();
        let shape = [&[final_latents.len() / one], &shape[1..]].concat();
        files::write(path, &[("latents", shape, final_latents)])?;
    }
    let taken = engine.used_memory();
    let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
    tell(&format!(
        "loaded in {loading:.2} s; {made} image{}, {each:.2} s each; {:.2} GiB of memory planned{}",
        if made == 1 { "" } else { "s" },
        gib(memory.total()),
        taken.map_or(String::new(), |taken| format!(", {:.2} in use by the device's count", gib(taken)))
    ));
    tip(args, &engine, each);
    if args.json {
        let file = |i: usize| match &files {
            Pictures::Files(files) => json!(files[i].display().to_string()),
            Pictures::Stdout => json!("-"),
        };
        let pictures = (0..made).map(|i| json!({"file": file(i), "seed": plan[i].seed, "prompt": plan[i].item.prompt}));
        let mut report = json!({
            "version": env!("CARGO_PKG_VERSION"), "device": device.name(), "precision": told(args.precision),
            "images": pictures.collect::<Vec<_>>(),
            "load_seconds": loading, "seconds_per_image": each,
            "first_image_seconds": saved.first.map(|first| (first - started).as_secs_f64()),
            "memory": {"weights": memory.weights, "text": memory.text, "unet": memory.unet, "vae": memory.vae,
                "sampler": memory.sampler, "total": memory.total(), "taken": taken},
        });
        others.into_iter().for_each(|(name, path)| report[name] = json!(path.map(|path| path.display().to_string())));
        say(&format!("{report:#}"));
    } else if matches!(files, Pictures::Files(_)) {
        others.iter().filter_map(|(_, path)| path.as_ref()).for_each(|path| say(&path.display().to_string()));
    }
    match failure {
        Some(problem) if problem.kind() != ErrorKind::Cancelled => Err(problem),
        _ if made < images => Err(Error::cancelled(format!("{made} of {images} pictures were saved"))),
        _ => Ok(()),
    }
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

/// One image of a run.
struct Planned<'a> {
    item: &'a Item,
    seed: u64,
}

/// The images of a run, prompt by prompt. Seeds count up from image to image across prompts, except that the images of
/// a prompt with a seed of its own count from that seed.
fn plan(items: &[Item], each: usize, base: u64) -> Result<Vec<Planned<'_>>> {
    let total = items.len().saturating_mul(each);
    if total > MAX_IMAGES {
        let problem = format!("{} prompts with {each} images each are more than {MAX_IMAGES} pictures", items.len());
        return Err(Error::invalid("images", problem).advise("give fewer"));
    }
    let planned = |i: usize| -> Result<Planned> {
        let (item, image) = (&items[i / each], i % each);
        let seed = item.seed.map_or(base.checked_add(i as u64), |seed| seed.checked_add(image as u64));
        let too_large =
            || Error::invalid("seed", "the last picture's seed would be too large").advise("give a smaller one");
        Ok(Planned { item, seed: seed.ok_or_else(too_large)? })
    };
    (0..total).map(planned).collect()
}

/// The batches of a run: neighbours whose prompts have as many chunks, `batch` at most.
fn batches(images: usize, batch: usize, chunks: impl Fn(usize) -> usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    for i in 0..images {
        match batches.last_mut() {
            Some(last) if last.len() < batch && chunks(last.start) == chunks(i) => last.end = i + 1,
            _ => batches.push(i..i + 1),
        }
    }
    batches
}

/// Each item's prompt and negative prompt, encoded once for all of its images.
fn encode(engine: &Engine, args: &Args, items: &[Item]) -> Result<Vec<(Conditioning, Option<Conditioning>)>> {
    let mut known: HashMap<PromptText, Conditioning> = HashMap::new();
    let mut encode = |what: &str, text: PromptText| -> Result<Conditioning> {
        if let Some(encoded) = known.get(&text) {
            return Ok(encoded.clone());
        }
        let encoded = engine.encode(text.clone())?;
        args.text.warn(what, &text, &encoded);
        known.insert(text, encoded.clone());
        Ok(encoded)
    };
    let pair = |item: &Item| {
        let negative = item.negative_prompt.as_deref().or(args.negative_prompt.as_deref());
        let negative = args.text.negative(negative, item.negative_prompt_2.as_deref());
        let negative = negative.map(|text| encode("negative prompt", text).map_err(text::of_negative)).transpose()?;
        Ok((encode("prompt", args.text.prompt(&item.prompt, item.prompt_2.as_deref()))?, negative))
    };
    items.iter().map(pair).collect()
}

/// Prints a tip on faster settings if an image took a minute or more on the CPU.
fn tip(args: &Args, engine: &Engine, seconds: f64) {
    if seconds < 60.0 || !engine.device().is_cpu() {
        return;
    }
    let faster = match args.precision == Precision::Full {
        true => ", or --precision int8 if the processor has AMX or AVX-512 VNNI",
        false => "",
    };
    tell(&format!(
        "tip: fewer --steps (20 with --sampler \"DPM++ 2M Karras\"), --reuse 3, a smaller picture{faster}, or a GPU is \
         faster"
    ));
}

impl Args {
    /// The prompts, and the number of images of each.
    fn items(&self) -> Result<(Vec<Item>, usize)> {
        let items = match (&self.prompts, self.prompt.as_ref().or(self.prompt_flag.as_ref())) {
            (Some(file), _) => prompts::read(file)?,
            (None, Some(prompt)) => vec![Item::new(prompt)],
            (None, None) => return Err(Error::invalid("prompt", "there is none").advise("give one")),
        };
        let each = match (self.images, &self.prompts) {
            (Some(images), _) => images as usize,
            (None, Some(_)) => 1,
            (None, None) if self.batch > MAX_IMAGES => {
                let problem = format!("a batch of {} images is not possible", self.batch);
                return Err(Error::invalid("batch", problem).advise("give 1 to 256"));
            }
            // A batch of 0 is refused later, with a message of its own.
            (None, None) => self.batch.max(1),
        };
        Ok((items, each))
    }
}

/// The manifest's file beside pictures of these names.
fn manifest_path(pictures: &[PathBuf]) -> Option<PathBuf> {
    pictures.first().map(|file| file.with_extension("json"))
}

/// The pictures written so far.
struct Saved<'a> {
    files: &'a Pictures,
    plan: &'a [Planned<'a>],
    assignment: &'a Assignment,
    /// True if a manifest is kept.
    audited: bool,
    /// True if the name of each file is printed to stdout once the file is written.
    named: bool,
    manifest: Vec<serde_json::Value>,
    /// The time at which the first picture was written.
    first: Option<Instant>,
    /// The thread that hashes the weights, until the first picture needs its result.
    hashing: Option<std::thread::JoinHandle<Result<Hashes>>>,
    guidance: &'a dyn Fn(&Item) -> f32,
    /// Images of each item.
    each: usize,
    negative: Option<&'a str>,
    /// The embeddings of each item's prompts.
    embeddings: Vec<Vec<UsedEmbedding>>,
    /// The values that all pictures share.
    info: GenerationInfo,
}

impl Saved<'_> {
    /// Writes the pictures of the next batch, and then the manifest of all pictures so far.
    fn add(&mut self, pictures: &[Picture]) -> Result<()> {
        if let Some(hashing) = self.hashing.take() {
            let hashes = hashing.join().map_err(|_| Error::internal("the thread that hashes the weights ended"))?;
            let Hashes { sha256, fingerprint, parts } = hashes?;
            self.info = GenerationInfo {
                model_sha256: sha256,
                model_fingerprint: Some(fingerprint),
                parts,
                ..self.info.clone()
            };
        }
        for picture in pictures {
            let i = self.manifest.len();
            let Planned { item, seed } = &self.plan[i];
            let info = GenerationInfo {
                prompt: item.prompt.clone(),
                negative_prompt: item.negative_prompt.as_deref().or(self.negative).map(str::to_string),
                prompt_2: item.prompt_2.clone().or_else(|| self.info.prompt_2.clone()),
                negative_prompt_2: item.negative_prompt_2.clone().or_else(|| self.info.negative_prompt_2.clone()),
                embeddings: self.embeddings[i / self.each].clone(),
                guidance: (self.guidance)(item),
                seed: *seed,
                concepts: self.assignment[i].iter().map(Used::record).collect(),
                ..self.info.clone()
            };
            let file = match self.files {
                Pictures::Stdout => {
                    out::print(picture, &info)?;
                    None
                }
                Pictures::Files(files) => {
                    out::save(picture, &files[i], &info)?;
                    if self.named {
                        say(&files[i].display().to_string());
                    }
                    files[i].file_name().map(|name| name.to_string_lossy().into_owned())
                }
            };
            self.first.get_or_insert_with(Instant::now);
            self.manifest.push(json!({"file": file, "info": info}));
        }
        if let Some(path) = self.manifest_path() {
            let text = serde_json::to_string_pretty(&self.manifest).unwrap_or_default() + "\n";
            crate::files::write(&path, text.as_bytes())?;
        }
        Ok(())
    }

    /// The manifest's file, if one is kept.
    fn manifest_path(&self) -> Option<PathBuf> {
        match self.files {
            Pictures::Files(files) if self.audited => manifest_path(files),
            _ => None,
        }
    }
}
