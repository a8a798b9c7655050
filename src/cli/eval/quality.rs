//! `respodiff eval quality`.

use super::super::concepts::{Files, Until};
use super::super::progress::Progress;
use super::super::{Place, interrupt_flag, parts, say};
use super::{clip_source, shard};
use crate::concept::{Concept, Strength};
use crate::diffusion::scheduler::SamplerChoice;
use crate::engine::Engine;
use crate::eval::clip::Clip;
use crate::eval::pictures;
use crate::eval::quality::captions::{self, Caption};
use crate::eval::quality::{self, Folder, Inception, Judges, Made, Origin, Reference, Report, Run, Settings};
use crate::{Device, Error, ErrorKind, Result};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder of pictures to measure [default: pictures are made of the captions in --prompts]
    #[arg(long, value_name = "FOLDER", required_unless_present = "prompts")]
    images: Option<PathBuf>,
    /// Folder of pictures to compare with, for FID and CMMD; or statistics as .npz of clean-fid, for FID alone
    #[arg(long, value_name = "FOLDER")]
    reference: Option<PathBuf>,
    /// Weights of FID's Inception: pt_inception-2015-12-05-6726825d.pth, or its tensors as .safetensors
    #[arg(long, value_name = "FILE")]
    inception: Option<PathBuf>,
    /// Folder or model id of the CLIP for CMMD (published with openai/clip-vit-large-patch14-336) and CLIP score
    #[arg(long)]
    clip: Option<String>,
    /// Captions: COCO's JSON, a table with tabs, or a file with one per line; for ready pictures by their file names or
    /// in their order [default: the prompts in the pictures' metadata]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Make pictures of the first captions only
    #[arg(long, conflicts_with = "images")]
    count: Option<usize>,
    /// Checkpoint that makes the pictures: folder, single file or Hugging Face model id [default: the demo]
    #[arg(long, conflicts_with = "images")]
    model: Option<String>,
    #[command(flatten)]
    parts: parts::Flags,
    /// Apply this concept to every picture; repeat to compose
    #[arg(long = "concept", value_name = "FILE[:WEIGHT]", conflicts_with = "images")]
    concepts: Vec<String>,
    #[command(flatten)]
    until: Until,
    /// Pictures per batch
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Sampler, such as DDIM [default: the checkpoint's]
    #[arg(long, visible_alias = "sampler")]
    scheduler: Option<String>,
    /// Sampling steps
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Guidance scale [default: 7.5; 5 with SDXL]
    #[arg(long)]
    guidance: Option<f32>,
    /// Seed of the first caption
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder for features and the report; a run that was interrupted continues there
    #[arg(long)]
    out: Option<PathBuf>,
    /// Do only part i of n, counted from 0: "3/8"
    #[arg(long, requires = "out")]
    shard: Option<String>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Device to compute on; FID's Inception runs on the CPU
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
}

/// The pictures that are measured.
enum Pictures {
    Ready { files: Vec<PathBuf>, prompts: Vec<String> },
    Made { engine: Box<Engine>, captions: Vec<Caption>, concepts: Vec<(Arc<Concept>, Strength)> },
}

pub(super) fn run(args: &Args) -> Result<()> {
    let run = measure(args)?;
    report(&run, args.out.as_deref(), args.json)
}

/// Merges the folders of a sharded run, and reports the whole.
pub(super) fn merge(folders: &[PathBuf], out: &Path) -> Result<()> {
    quality::merge(folders, out)?;
    report(&Run::read(out)?, Some(out), false)
}

fn report(run: &Run, folder: Option<&Path>, json: bool) -> Result<()> {
    let report = Report::of(run)?;
    let written = folder.map(|folder| report.write(folder)).transpose()?;
    match json {
        true => say(report.json().trim_end()),
        false => say(&report.text()),
    }
    if let Some(path) = written.filter(|_| !json) {
        say(&path.display().to_string());
    }
    Ok(())
}

fn measure(args: &Args) -> Result<Run> {
    let shard = shard(args.shard.as_deref())?;
    if args.inception.is_none() && args.clip.is_none() {
        return Err(Error::invalid("inception", "neither --inception nor --clip is given, so nothing can be measured"));
    }
    if args.batch == 0 {
        return Err(Error::invalid("batch", "a batch of 0 holds no pictures").advise("give 1 or more"));
    }
    if args.count == Some(0) {
        return Err(Error::invalid("count", "0 pictures cannot be measured").advise("give 1 or more"));
    }
    // Everything that can be wrong with the files is found before the work begins.
    let is_statistics = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "npz");
    let statistics = args.reference.as_ref().filter(is_statistics);
    let references = match &args.reference {
        Some(folder) if statistics.is_none() => pictures::list(folder)?,
        _ => Vec::new(),
    };
    let reference = match (&args.reference, statistics) {
        (_, Some(file)) => {
            let bytes = std::fs::read(file).map_err(Error::io("read", file))?;
            Some(Reference::Statistics(Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()))
        }
        (Some(folder), None) => Some(Reference::Folder(Folder::of(folder, &references, &[])?)),
        (None, None) => None,
    };
    let device = args.device.open()?;
    let (images, origin) = match &args.images {
        Some(folder) => ready(folder, args.prompts.as_deref(), args.clip.is_some())?,
        None => made(args, &device)?,
    };
    let clip = args.clip.as_deref().map(|clip| Clip::load(&clip_source(clip)?, &device)).transpose()?;
    let mut judges = Judges { inception: args.inception.as_deref().map(Inception::load).transpose()?, clip };
    let settings = Settings::new(&judges, origin, reference);
    let mut run = Run::open(args.out.as_deref(), settings, statistics.map(PathBuf::as_path), shard)?;
    let cancelled = interrupt_flag();
    let (done, total) = run.progress();
    let shown = Progress::new("judging", total as u64, "pictures");
    shown.set(done as u64, "");
    let watch = &mut |done| {
        shown.set(done as u64, "");
        if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let outcome = run.judge_reference(&mut judges, &references, watch).and_then(|()| match &images {
        Pictures::Ready { files, prompts } => run.judge(&mut judges, files, prompts, watch),
        Pictures::Made { engine, captions, concepts } => {
            run.make(&mut judges, engine, captions, concepts, args.batch, watch)
        }
    });
    shown.finish();
    match outcome {
        Err(error) if error.kind() == ErrorKind::Cancelled => {
            let advice = match args.out {
                Some(_) => "run the same command again to continue",
                None => "with --out, the same command would continue",
            };
            Err(Error::cancelled(format!("{} of {total} pictures are judged", run.progress().0)).advise(advice))
        }
        other => other.map(|()| run),
    }
}

/// The pictures of a folder and their prompts, which only CLIP needs.
fn ready(folder: &Path, file: Option<&Path>, clip: bool) -> Result<(Pictures, Origin)> {
    let files = pictures::list(folder)?;
    let prompts = match file {
        Some(file) => captions::assign(&captions::read(file)?, &files, file)?,
        None if !clip => Vec::new(),
        None => {
            let found: Vec<Result<Option<String>>> = files.par_iter().map(|path| pictures::prompt(path)).collect();
            let found = found.into_iter().collect::<Result<Vec<_>>>()?;
            match found.iter().position(Option::is_none) {
                Some(without) if found.iter().any(Option::is_some) => {
                    return Err(Error::damaged(&files[without], "has no prompt in its metadata, as others have")
                        .advise("give a file of captions, --prompts"));
                }
                Some(_) => Vec::new(),
                None => found.into_iter().flatten().collect(),
            }
        }
    };
    let origin = Origin::Folder(Folder::of(folder, &files, &prompts)?);
    Ok((Pictures::Ready { files, prompts }, origin))
}

/// The engine and the captions of pictures that are made here.
fn made(args: &Args, device: &Device) -> Result<(Pictures, Origin)> {
    let mut captions = args.prompts.as_deref().map_or(Ok(Vec::new()), captions::read)?;
    captions.truncate(args.count.unwrap_or(usize::MAX));
    let engine = Engine::open(&args.parts.source(args.model.as_deref())?, device)?;
    let guidance = args.guidance.unwrap_or(engine.default_guidance());
    let concepts = args.until.used(&args.concepts, guidance, &Files(&engine))?.into_iter();
    let concepts: Vec<_> = concepts.map(|used| (used.concept, used.strength)).collect();
    let choice: SamplerChoice = args.scheduler.as_deref().map_or(Ok(SamplerChoice::default()), str::parse)?;
    let own = engine.schedule(choice, args.steps)?.sampler;
    let sampler = args.scheduler.clone().unwrap_or_else(|| own.to_string());
    let made = Made::of(&engine, &captions, &concepts, sampler, args.steps, guidance, args.seed)?;
    Ok((Pictures::Made { engine: Box::new(engine), captions, concepts }, Origin::Made(made)))
}
