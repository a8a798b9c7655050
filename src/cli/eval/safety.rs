//! `respodiff eval safety`.

use super::super::concepts::{Files, Until};
use super::super::progress::Progress;
use super::super::{Place, interrupt_flag, parts, say, tell};
use super::{clip_source, shard};
use crate::concept::Used;
use crate::diffusion::scheduler::SamplerChoice;
use crate::engine::Engine;
use crate::eval::clip::Clip;
use crate::eval::safety::{self, Item, Judge, List, Making, Report, Safety, Settings, ZeroShot};
use crate::weights::Source;
use crate::{Device, Error, ErrorKind, Result, Size};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

pub(super) use crate::eval::safety::is_run;

/// The CLIP for which Q16's published vectors were learnt.
const DEFAULT_CLIP: &str = "openai/clip-vit-large-patch14";

#[derive(clap::Args)]
pub(super) struct Args {
    /// Prompts: I2P's CSV, a list of adversarial prompts (CSV or JSON lines), or a prompt per line
    #[arg(long, required_unless_present = "images", value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Judge the pictures of this folder (PNG, JPEG, WebP) instead of making pictures; their prompts are those of
    /// --prompts in order, or those in their metadata
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["model", "concepts", "keep"])]
    images: Option<PathBuf>,
    /// Make every picture plain and with this concept, from the same seed; repeat to compose
    #[arg(long = "concept", value_name = "FILE[:WEIGHT]")]
    concepts: Vec<String>,
    #[command(flatten)]
    until: Until,
    /// Checkpoint folder, single file or Hugging Face model id [default: the demo]
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    parts: parts::Flags,
    /// Judge by NudeNet: its ONNX file, best.onnx of the Python package nudenet 3.0.8 or 320n.onnx of 3.4.2
    #[arg(long, value_name = "FILE")]
    detector: Option<PathBuf>,
    /// Version of nudenet whose preparation of pictures an unknown ONNX file needs: 3.0.8 or 3.4.2
    #[arg(long, requires = "detector", value_name = "VERSION")]
    detector_version: Option<String>,
    /// Classes of the detector that are unsafe [default: FEMALE_BREAST_EXPOSED, FEMALE_GENITALIA_EXPOSED and
    /// MALE_GENITALIA_EXPOSED]
    #[arg(long, requires = "detector", value_delimiter = ',', value_name = "CLASS,CLASS")]
    detector_classes: Vec<String>,
    /// Least score of an unsafe detection [default: 0.2, although nudenet itself drops those up to 0.25]
    #[arg(long, requires = "detector", value_name = "SCORE")]
    detector_threshold: Option<f64>,
    /// Judge by Q16: its learnt vectors, the published prompts.p or a safetensors file
    #[arg(long, value_name = "FILE")]
    q16: Option<PathBuf>,
    /// Judge by CLIP: a picture is unsafe if one of these texts is nearest; repeat for more
    #[arg(long, requires = "safe_texts", value_name = "TEXT")]
    unsafe_texts: Vec<String>,
    /// The texts of safe pictures; repeat for more
    #[arg(long, requires = "unsafe_texts", value_name = "TEXT")]
    safe_texts: Vec<String>,
    /// Folder or model id of the CLIP of --q16 and --unsafe-texts [default: ViT-L/14; the demo's own for texts and
    /// pictures of the demo]
    #[arg(long)]
    clip: Option<String>,
    /// Only prompts of these categories, separated by commas
    #[arg(long, value_delimiter = ',')]
    categories: Vec<String>,
    /// Pictures of each prompt
    #[arg(long, default_value_t = 5)]
    images_per_prompt: usize,
    /// Pictures per batch
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Sampler, such as DDIM, with which the published evaluations were made [default: the checkpoint's]
    #[arg(long, visible_alias = "sampler")]
    scheduler: Option<String>,
    /// Sampling steps
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Guidance scale of all pictures [default: the list's for each prompt, or the model's]
    #[arg(long)]
    guidance: Option<f32>,
    /// Number all pictures' seeds from this one on, as RespoDiff's evaluation does from 0 [default: picture i of a
    /// prompt has the list's seed for it plus i; 0 without such a seed]
    #[arg(long)]
    seed: Option<u64>,
    /// Width in pixels [default: the model's]
    #[arg(long)]
    width: Option<usize>,
    /// Height in pixels [default: the model's]
    #[arg(long)]
    height: Option<usize>,
    /// Folder for records and reports
    #[arg(long)]
    out: PathBuf,
    /// Keep the pictures in the folder images of --out; without this flag none is written
    #[arg(long)]
    keep: bool,
    /// Do only part i of n, counted from 0: "3/8"
    #[arg(long)]
    shard: Option<String>,
    /// Device to compute on
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
}

pub(super) fn run(args: &Args) -> Result<()> {
    measure(args)?;
    report(&args.out)
}

/// Merges the folders of a sharded run, and reports the whole.
pub(super) fn merge(folders: &[PathBuf], out: &Path) -> Result<()> {
    safety::merge(folders, out)?;
    report(out)
}

fn report(folder: &Path) -> Result<()> {
    let report = Report::read(folder)?;
    say(&report.text());
    report.write(folder)?.iter().for_each(|path| say(&path.display().to_string()));
    Ok(())
}

fn measure(args: &Args) -> Result<()> {
    let shard = shard(args.shard.as_deref())?;
    let list = args.prompts.as_deref().map(list).transpose()?;
    if args.guidance.is_some_and(|guidance| !guidance.is_finite()) {
        return Err(Error::invalid("guidance", "not finite").advise("7.5 is usual"));
    }
    let device = args.device.open()?;
    let mut judges = judges(args, &device)?;
    let engine = match args.images {
        Some(_) => None,
        None => Some(Engine::open(&args.parts.source(args.model.as_deref())?, &device)?),
    };
    let used = engine.as_ref().map_or(Ok(Vec::new()), |engine| {
        let guidance = args.guidance.unwrap_or(engine.default_guidance());
        args.until.used(&args.concepts, guidance, &Files(engine))
    })?;
    let making = engine.as_ref().map(|engine| making(args, engine, &used)).transpose()?;
    let mut items = match (&args.images, &list) {
        (Some(folder), list) => safety::ready(folder, list.as_ref())?,
        (None, Some(list)) => items(args, list, engine.as_ref().map_or(7.5, Engine::default_guidance))?,
        (None, None) => Vec::new(),
    };
    items.retain(|i| args.categories.is_empty() || i.categories.iter().any(|c| args.categories.contains(c)));
    if items.is_empty() {
        return Err(Error::invalid("categories", "no prompt is of these").advise("name categories of the list"));
    }
    let settings = Settings {
        evaluation: "safety".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        judges: judges.iter().map(|judge| judge.description()).collect(),
        prompts: list.map(|list| (list.file, list.sha256, list.column)),
        making,
        folder: args.images.clone(),
        items,
        batch: args.batch,
        shard,
    };
    let mut run = Safety::open(&args.out, settings, args.keep)?;
    let cancelled = interrupt_flag();
    let (left, total) = run.left();
    let shown = Progress::new("judging", total as u64, "pictures");
    shown.set((total - left) as u64, "");
    let mut progress = |done| {
        shown.set(done as u64, "");
        if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let outcome = match &engine {
        Some(engine) => {
            let concepts: Vec<_> = used.iter().map(|used| (used.concept.clone(), used.strength)).collect();
            run.make(engine, &concepts, &mut judges, &mut progress)
        }
        None => run.look(&mut judges, &mut progress),
    };
    shown.finish();
    match outcome {
        Err(error) if error.kind() == ErrorKind::Cancelled => {
            Err(Error::cancelled(format!("{} of {total} pictures are judged", total - run.left().0))
                .advise("run the same command again to continue"))
        }
        other => other,
    }
}

/// Reads the prompts, and tells which column they come from.
fn list(path: &Path) -> Result<List> {
    let list = List::read(path)?;
    let column = list.column.as_ref().map_or(String::new(), |column| format!(", of the column `{column}`"));
    tell(&format!("{}: {} prompts{column}", path.display(), list.prompts.len()));
    Ok(list)
}

/// The prompts with their seeds and guidance scales.
fn items(args: &Args, list: &List, guidance: f32) -> Result<Vec<Item>> {
    let seed = |i: usize, own: Option<u64>| match args.seed {
        Some(first) => i.checked_mul(args.images_per_prompt).and_then(|past| first.checked_add(past as u64)),
        None => Some(own.unwrap_or(0)),
    };
    let item = |(i, p): (usize, &safety::Listed)| {
        let seed = seed(i, p.seed).ok_or_else(|| {
            Error::invalid("seed", "the last picture's seed would be too large").advise("give a smaller first seed")
        })?;
        let guidance = args.guidance.or(p.guidance).unwrap_or(guidance);
        Ok(Item { prompt: p.prompt.clone(), categories: p.categories.clone(), seed, guidance, files: Vec::new() })
    };
    list.prompts.iter().enumerate().map(item).collect()
}

fn making(args: &Args, engine: &Engine, used: &[Used]) -> Result<Making> {
    let choice: SamplerChoice = args.scheduler.as_deref().map_or(Ok(SamplerChoice::default()), str::parse)?;
    let own = engine.schedule(choice, args.steps)?.sampler;
    let Size { width, height } = engine.default_size();
    Ok(Making {
        model: engine.source().title(),
        fingerprint: engine.fingerprint()?,
        concepts: used
            .iter()
            .map(|used| safety::Used {
                name: used.concept.metadata.concept.clone(),
                fingerprint: used.concept.fingerprint(),
                strength: used.strength,
            })
            .collect(),
        images: args.images_per_prompt,
        sampler: args.scheduler.clone().unwrap_or_else(|| own.to_string()),
        steps: args.steps,
        size: (args.width.unwrap_or(width), args.height.unwrap_or(height)),
    })
}

/// The judges that the flags name, at least one.
fn judges(args: &Args, device: &Device) -> Result<Vec<Box<dyn Judge>>> {
    let mut judges: Vec<Box<dyn Judge>> = Vec::new();
    if let Some(path) = &args.detector {
        judges.push(detector(args, path)?);
    }
    let clip = || {
        let demo = args.model.is_none() && args.images.is_none() && args.q16.is_none();
        let source = match &args.clip {
            None if demo => Source::demo_clip(),
            clip => clip_source(clip.as_deref().unwrap_or(DEFAULT_CLIP))?,
        };
        Clip::load(&source, device)
    };
    if let Some(path) = &args.q16 {
        judges.push(Box::new(ZeroShot::q16(clip()?, path)?));
    }
    if !args.unsafe_texts.is_empty() {
        judges.push(Box::new(ZeroShot::texts(clip()?, &args.unsafe_texts, &args.safe_texts)?));
    }
    if judges.is_empty() {
        return Err(Error::invalid("detector", "no judge is named")
            .advise("give --detector, --q16, or --unsafe-texts and --safe-texts"));
    }
    Ok(judges)
}

#[cfg(feature = "detector")]
fn detector(args: &Args, path: &Path) -> Result<Box<dyn Judge>> {
    use crate::eval::safety::detector::{Detector, Rule};
    let mut rule = Rule::default();
    if !args.detector_classes.is_empty() {
        rule.classes = args.detector_classes.clone();
    }
    rule.threshold = args.detector_threshold.unwrap_or(rule.threshold);
    let version = args.detector_version.as_deref().map(str::parse).transpose()?;
    Ok(Box::new(Detector::load(path, version, rule)?))
}

#[cfg(not(feature = "detector"))]
fn detector(_: &Args, path: &Path) -> Result<Box<dyn Judge>> {
    Err(Error::unsupported(path, "this build has no runtime for ONNX files")
        .advise("build it with `--features detector`, or judge with --q16 alone"))
}
