//! `respodiff eval fairness`.

use super::super::concepts::group;
use super::super::progress::Progress;
use super::super::{Place, interrupt_flag, model, say, warn};
use super::{clip_source, shard};
use crate::diffusion::scheduler::SamplerChoice;
use crate::engine::Engine;
use crate::eval::clip::Clip;
use crate::eval::fairness::{self, Calibration, Fairness, Judge, Labelled, Report, Settings, winobias};
use crate::weights::Source;
use crate::{Error, ErrorKind, Result};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// The CLIP that the published evaluations use.
const DEFAULT_CLIP: &str = "openai/clip-vit-base-patch32";

#[derive(clap::Args)]
pub(super) struct Args {
    /// Concept files to balance; repeat to cross groups
    #[arg(long, required = true, value_name = "A,B[=SHARE,SHARE]")]
    concepts: Vec<String>,
    /// Checkpoint folder, single file or Hugging Face model id [default: the demo]
    #[arg(long)]
    model: Option<String>,
    /// Weight of the concepts
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    weight: f32,
    /// winobias, winobias-extended, or a file with one prompt per line
    #[arg(long, default_value = "winobias")]
    prompts: String,
    /// Only these professions of WinoBias or of the demo, separated by commas, or demo for the demo's sixteen [default:
    /// all; for the demo, its sixteen]
    #[arg(long, value_delimiter = ',')]
    professions: Vec<String>,
    /// Pictures of each profession (or line), spread over its prompts
    #[arg(long, default_value_t = 150)]
    images_per_prompt: usize,
    /// Pictures per batch
    #[arg(long, default_value_t = 10)]
    batch: usize,
    /// Sampler, such as DDIM, with which the published evaluations were made [default: the checkpoint's]
    #[arg(long, visible_alias = "sampler")]
    scheduler: Option<String>,
    /// Sampling steps
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Guidance scale [default: 7.5; 5 with SDXL]
    #[arg(long)]
    guidance: Option<f32>,
    /// Folder or model id of the CLIP that judges the pictures; repeat for several judges [default: ViT-B/32; for the
    /// demo, its own]
    #[arg(long)]
    clip: Vec<String>,
    /// Correct for the judges' errors by pictures of known classes: a CSV file in FairFace's form, with the columns
    /// file, gender and race, for example
    #[arg(long, value_name = "CSV")]
    calibration: Option<PathBuf>,
    /// The label in the calibration's list that stands for a class, if it has other words: "a asian-race person=East
    /// Asian"; repeat for more
    #[arg(long = "label", value_name = "CLASS=LABEL", requires = "calibration")]
    labels: Vec<String>,
    /// First seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Take the results for plain pictures from this folder of a run with other concepts and the same prompts, seeds
    /// and sampler
    #[arg(long, value_name = "FOLDER")]
    plain: Option<PathBuf>,
    /// Folder for records and reports
    #[arg(long)]
    out: PathBuf,
    /// Do only part i of n, counted from 0: "3/8"
    #[arg(long)]
    shard: Option<String>,
    /// Device to compute on
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if measure(args)? { report(&args.out) } else { Ok(()) }
}

/// Merges the folders of a sharded run, and reports the whole.
pub(super) fn merge(folders: &[PathBuf], out: &Path) -> Result<()> {
    fairness::merge(folders, out)?;
    report(out)
}

fn report(folder: &Path) -> Result<()> {
    let report = Report::read(folder)?;
    say(&report.text());
    report.write(folder)?.iter().for_each(|path| say(&path.display().to_string()));
    Ok(())
}

/// False if there was nothing to measure.
fn measure(args: &Args) -> Result<bool> {
    let shard = shard(args.shard.as_deref())?;
    let prompts = prompts(args)?;
    if args.images_per_prompt == 0 {
        return Err(
            Error::invalid("images_per_prompt", "there are no pictures of 0 per profession").advise("give 1 or more")
        );
    }
    if args.batch == 0 {
        return Err(Error::invalid("batch", "a batch of 0 holds no pictures").advise("give 1 or more"));
    }
    if !args.weight.is_finite() {
        return Err(Error::invalid("weight", format!("{} is not a finite number", args.weight)));
    }
    let sources = match (&args.clip[..], &args.model) {
        ([], None) => vec![Source::demo_clip()],
        ([], Some(_)) => vec![model::source(Some(DEFAULT_CLIP))?],
        (clips, _) => clips.iter().map(|clip| clip_source(clip)).collect::<Result<_>>()?,
    };
    let device = args.device.open()?;
    let mut judges = sources.iter().map(|source| Clip::load(source, &device)).collect::<Result<Vec<_>>>()?;
    let engine = Engine::open(&model::source(args.model.as_deref())?, &device)?;
    let groups = args.concepts.iter().map(|text| group(text, &engine).map_err(|e| e.of_field("--concepts")));
    let groups = groups.collect::<Result<Vec<_>>>()?;
    let choice: SamplerChoice = args.scheduler.as_deref().map_or(Ok(SamplerChoice::default()), str::parse)?;
    let own = engine.schedule(choice, args.steps)?.sampler;
    let settings = Settings {
        model: engine.name(),
        fingerprint: engine.fingerprint()?,
        judges: named(&judges),
        concepts: groups.iter().map(|g| g.members.iter().map(|m| m.fingerprint()).collect()).collect(),
        groups: groups.iter().map(|g| g.members.iter().map(|m| m.metadata.concept.clone()).collect()).collect(),
        shares: groups.iter().map(|g| g.shares.clone()).collect(),
        weight: args.weight,
        prompts,
        images: args.images_per_prompt,
        sampler: args.scheduler.clone().unwrap_or_else(|| own.to_string()),
        steps: args.steps,
        guidance: args.guidance.unwrap_or(engine.default_guidance()),
        seed: args.seed,
        command: command_line(),
        batch: args.batch,
        shard,
    };
    let labelled = match &args.calibration {
        Some(list) => Some((list, labelled(args, list, &settings)?)),
        None => None,
    };
    let mut run = Fairness::open(&args.out, settings.clone(), &groups, args.plain.as_deref())?;
    let cancelled = interrupt_flag();
    let (left, total) = run.left();
    if total == 0 {
        say("nothing to do: this part has no professions");
        return Ok(false);
    }
    let shown = Progress::new("judging", total as u64, "pictures");
    shown.set((total - left) as u64, "");
    let outcome = run.run(&engine, &mut judges, &groups, &mut |done| {
        shown.set(done as u64, "");
        if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    shown.finish();
    match outcome {
        Err(error) if error.kind() == ErrorKind::Cancelled => {
            Err(Error::cancelled(format!("{} of {total} pictures are judged", total - run.left().0))
                .advise("run the same command again to continue"))
        }
        other => other,
    }?;
    if let Some((list, labelled)) = labelled {
        let shown = Progress::new("calibrating", labelled.len() as u64, "pictures");
        let outcome = Calibration::measure(&args.out, &settings, list, &labelled, &mut judges, &mut |done| {
            shown.set(done as u64, "");
            if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        shown.finish();
        warn_of_labels(&outcome?, &settings);
    }
    Ok(true)
}

/// The judges by their names, to which part of a hash is added if two have the same.
fn named(clips: &[Clip]) -> Vec<Judge> {
    let named = |clip: &Clip| {
        let same = clips.iter().filter(|other| other.name() == clip.name()).count();
        let hash: String = clip.fingerprint().chars().take(6).collect();
        let name = if same > 1 { format!("{} {hash}", clip.name()) } else { clip.name().to_string() };
        Judge { name, fingerprint: clip.fingerprint().to_string() }
    };
    clips.iter().map(named).collect()
}

/// Warns if a judge is right less often than by guessing: then labels are likely to stand for other classes.
fn warn_of_labels(calibration: &Calibration, settings: &Settings) {
    for (judge, confusions) in settings.judges.iter().zip(&calibration.confusions) {
        for (group, confusion) in settings.groups.iter().zip(confusions) {
            if confusion.accuracy() < 1.0 / group.len() as f64 {
                let (name, right, classes) = (&judge.name, 100.0 * confusion.accuracy(), group.join(", "));
                warn(&format!("{name} is right about {classes} in only {right:.1} %: check the calibration's labels"));
            }
        }
    }
}

/// The pictures of the calibration's list.
fn labelled(args: &Args, list: &Path, settings: &Settings) -> Result<Vec<Labelled>> {
    let pair = |text: &String| -> Result<(String, String)> {
        let (class, label) = text
            .split_once('=')
            .ok_or_else(|| Error::invalid("label", format!("{text}: write CLASS=LABEL, such as \"woman=Female\"")))?;
        Ok((class.to_string(), label.to_string()))
    };
    let labels = args.labels.iter().map(pair).collect::<Result<Vec<_>>>()?;
    fairness::read_labels(list, &settings.groups, &labels).map_err(|e| e.of_field("label"))
}

/// The command line of this process, with quotes around what a shell would split.
fn command_line() -> String {
    let quoted = |word: String| {
        let plain = |c: char| c.is_alphanumeric() || "-_./=:,+".contains(c);
        if !word.is_empty() && word.chars().all(plain) { word } else { format!("'{}'", word.replace('\'', "'\\''")) }
    };
    let words = std::env::args_os().skip(1).map(|word| quoted(word.to_string_lossy().into_owned()));
    std::iter::once("respodiff".to_string()).chain(words).collect::<Vec<_>>().join(" ")
}

/// Checks that professions are known.
fn known(professions: &[String]) -> Result<()> {
    let all = || winobias::PROFESSIONS.iter().chain(&winobias::DEMO_PROFESSIONS);
    let Some(unknown) = professions.iter().find(|name| !all().any(|known| known == name)) else { return Ok(()) };
    let close = |a: &&&str, b: &&&str| strsim::jaro_winkler(unknown, a).total_cmp(&strsim::jaro_winkler(unknown, b));
    let nearest = all().max_by(close).copied().unwrap_or_default();
    Err(Error::invalid("professions", format!("`{unknown}` is not known; the nearest is `{nearest}`"))
        .advise("for others, give a file of prompts with --prompts"))
}

/// Compares two runs.
pub(super) fn compare(first: &Path, second: &Path, json: bool) -> Result<()> {
    let comparisons = fairness::compare([first, second])?;
    match json {
        true => say(&serde_json::to_string_pretty(&comparisons).unwrap_or_default()),
        false => say(&fairness::comparison_text(&comparisons)),
    }
    Ok(())
}

/// Professions and their prompts.
fn prompts(args: &Args) -> Result<Vec<(String, Vec<String>)>> {
    let extended = match args.prompts.as_str() {
        "winobias" => false,
        "winobias-extended" => true,
        file => {
            let text = std::fs::read_to_string(file).map_err(Error::io("read", file))?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            let prompts: Vec<_> = lines.map(|line| (line.to_string(), vec![line.to_string()])).collect();
            if !args.professions.is_empty() {
                return Err(Error::invalid("professions", "the file of prompts replaces professions")
                    .advise("give one of both"));
            }
            if prompts.is_empty() {
                return Err(Error::damaged(file, "holds no prompts").advise("write one per line"));
            }
            return Ok(prompts);
        }
    };
    let known: Vec<String> = match (args.professions.as_slice(), &args.model) {
        ([], None) => winobias::DEMO_PROFESSIONS.map(str::to_string).to_vec(),
        ([demo], _) if demo == "demo" => winobias::DEMO_PROFESSIONS.map(str::to_string).to_vec(),
        ([], Some(_)) => winobias::PROFESSIONS.map(str::to_string).to_vec(),
        (given, _) => {
            known(given)?;
            given.to_vec()
        }
    };
    Ok(known.into_iter().map(|p| (p.clone(), winobias::prompts(&p, extended))).collect())
}
