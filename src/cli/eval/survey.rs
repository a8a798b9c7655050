//! Surveys of professions: their flags, the pictures that are made and judged, and how a run is carried out.

use super::super::progress::Progress;
use super::super::{Place, interrupt_flag, model, parts, say};
use super::{clip_source, shard};
use crate::concept::{Concept, Group, Strength};
use crate::diffusion::scheduler::SamplerChoice;
use crate::engine::Engine;
use crate::eval::clip::Clip;
use crate::eval::fairness::{Fairness, Judge, Settings, winobias};
use crate::weights::Source;
use crate::{Error, ErrorKind, Result};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// The CLIP that the published evaluations use.
const DEFAULT_CLIP: &str = "openai/clip-vit-base-patch32";

/// The flags of every survey.
#[derive(clap::Args)]
pub(super) struct Survey {
    /// Checkpoint folder, single file or Hugging Face model id [default: the demo]
    #[arg(long)]
    pub(super) model: Option<String>,
    #[command(flatten)]
    parts: parts::Flags,
    /// winobias, winobias-extended, or a file with one prompt per line
    #[arg(long, default_value = "winobias")]
    pub(super) prompts: String,
    /// Only these professions of WinoBias or of the demo, separated by commas, or demo for the demo's sixteen [default:
    /// all; for the demo, its sixteen]
    #[arg(long, value_delimiter = ',')]
    pub(super) professions: Vec<String>,
    /// Pictures of each profession (or line), spread over its prompts [default: 150; 16 to calibrate]
    #[arg(long)]
    images_per_prompt: Option<usize>,
    /// Pictures per batch
    #[arg(long, default_value_t = 10)]
    pub(super) batch: usize,
    /// Sampler, such as DDIM, with which the published evaluations were made [default: the checkpoint's]
    #[arg(long, visible_alias = "sampler")]
    pub(super) scheduler: Option<String>,
    /// Sampling steps
    #[arg(long, default_value_t = 50)]
    pub(super) steps: usize,
    /// Guidance scale [default: 7.5; 5 with SDXL]
    #[arg(long)]
    pub(super) guidance: Option<f32>,
    /// Folder or model id of the CLIP that judges the pictures; repeat for several judges [default: ViT-B/32; for the
    /// demo, its own]
    #[arg(long)]
    pub(super) clip: Vec<String>,
    /// First seed
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
    /// Folder for records and reports
    #[arg(long)]
    pub(super) out: PathBuf,
    /// Do only part i of n, counted from 0: "3/8"
    #[arg(long)]
    pub(super) shard: Option<String>,
    /// Device to compute on
    #[arg(long, default_value_t = Place::Auto)]
    pub(super) device: Place,
}

/// A survey that is ready to run: its model, its judges, and settings without groups and concepts.
pub(super) struct Opened {
    pub(super) engine: Engine,
    pub(super) judges: Vec<Clip>,
    pub(super) settings: Settings,
}

/// Pictures of each profession in a survey whose result is reported.
pub(super) const REPORTED_IMAGES: usize = 150;

impl Opened {
    /// Lets the balanced pictures have these concepts, each in the strength that `strength` tells.
    pub(super) fn balance(&mut self, groups: &[Group], strength: impl Fn(&Concept) -> Strength) {
        fn each<T>(groups: &[Group], of: impl Fn(&Concept) -> T) -> Vec<Vec<T>> {
            groups.iter().map(|group| group.members.iter().map(|member| of(member)).collect()).collect()
        }
        self.settings.concepts = each(groups, Concept::fingerprint);
        self.settings.groups = each(groups, |concept| concept.metadata.concept.clone());
        self.settings.shares = groups.iter().map(|group| group.shares.clone()).collect();
        self.settings.strengths = each(groups, strength);
    }
}

impl Survey {
    /// Checks the flags, and loads the model and the judges. By default there are `images` pictures of each profession.
    pub(super) fn open(&self, images: usize) -> Result<Opened> {
        let shard = shard(self.shard.as_deref())?;
        let prompts = prompts(self)?;
        let images = self.images_per_prompt.unwrap_or(images);
        if images == 0 {
            let problem = "there are no pictures of 0 per profession";
            return Err(Error::invalid("images_per_prompt", problem).advise("give 1 or more"));
        }
        if self.batch == 0 {
            return Err(Error::invalid("batch", "a batch of 0 holds no pictures").advise("give 1 or more"));
        }
        let sources = match (&self.clip[..], &self.model) {
            ([], None) => vec![Source::demo_clip()],
            ([], Some(_)) => vec![model::source(Some(DEFAULT_CLIP))?],
            (clips, _) => clips.iter().map(|clip| clip_source(clip)).collect::<Result<_>>()?,
        };
        let device = self.device.open()?;
        let judges = sources.iter().map(|source| Clip::load(source, &device)).collect::<Result<Vec<_>>>()?;
        let engine = Engine::open(&self.parts.source(self.model.as_deref())?, &device)?;
        let choice: SamplerChoice = self.scheduler.as_deref().map_or(Ok(SamplerChoice::default()), str::parse)?;
        let own = engine.schedule(choice, self.steps)?.sampler;
        let settings = Settings {
            model: engine.source().title(),
            fingerprint: engine.fingerprint()?,
            judges: named(&judges),
            groups: Vec::new(),
            concepts: Vec::new(),
            shares: Vec::new(),
            strengths: Vec::new(),
            prompts,
            images,
            sampler: self.scheduler.clone().unwrap_or_else(|| own.to_string()),
            steps: self.steps,
            guidance: self.guidance.unwrap_or(engine.default_guidance()),
            seed: self.seed,
            command: command_line(),
            batch: self.batch,
            shard,
        };
        Ok(Opened { engine, judges, settings })
    }

    /// Makes and judges the pictures that are left in a folder, with the concepts of these groups. False if this part
    /// has none.
    pub(super) fn make(
        &self,
        opened: &mut Opened,
        groups: &[Group],
        plain: Option<&Path>,
        folder: &Path,
    ) -> Result<bool> {
        let mut run = Fairness::open(folder, opened.settings.clone(), groups, plain)?;
        let cancelled = interrupt_flag();
        let (left, total) = run.left();
        if total == 0 {
            say("nothing to do: this part has no professions");
            return Ok(false);
        }
        let shown = Progress::new("judging", total as u64, "pictures");
        shown.set((total - left) as u64, "");
        let outcome = run.run(&opened.engine, &mut opened.judges, groups, &mut |done| {
            shown.set(done as u64, "");
            if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        shown.finish();
        match outcome {
            Err(error) if error.kind() == ErrorKind::Cancelled => {
                Err(Error::cancelled(format!("{} of {total} pictures are judged", total - run.left().0))
                    .advise("run the same command again to continue"))
            }
            other => other.map(|()| true),
        }
    }

    /// The flags that choose the same pictures and judges, without those that have their defaults.
    pub(super) fn flags(&self) -> String {
        let mut words: Vec<String> = Vec::new();
        let mut flag = |name: &str, value: Option<String>| {
            words.extend(value.map(|value| format!("--{name} {}", quoted(&value))));
        };
        let unless = |value: String, default: &str| Some(value).filter(|value| value != default);
        flag("model", self.model.clone());
        flag("prompts", unless(self.prompts.clone(), "winobias"));
        flag("professions", unless(self.professions.join(","), ""));
        flag("images-per-prompt", self.images_per_prompt.map(|images| images.to_string()));
        flag("batch", unless(self.batch.to_string(), "10"));
        flag("scheduler", self.scheduler.clone());
        flag("steps", unless(self.steps.to_string(), "50"));
        flag("guidance", self.guidance.map(|guidance| guidance.to_string()));
        self.clip.iter().for_each(|clip| flag("clip", Some(clip.clone())));
        flag("seed", unless(self.seed.to_string(), "0"));
        flag("device", unless(self.device.to_string(), "auto"));
        words.join(" ")
    }
}

/// A word of a command line, with quotes around it if a shell would split it.
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=:,+".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

/// The command line of this process.
fn command_line() -> String {
    let words = std::env::args_os().skip(1).map(|word| quoted(&word.to_string_lossy()));
    std::iter::once("respodiff".to_string()).chain(words).collect::<Vec<_>>().join(" ")
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

/// Checks that professions are known.
fn known(professions: &[String]) -> Result<()> {
    let all = || winobias::PROFESSIONS.iter().chain(&winobias::DEMO_PROFESSIONS);
    let Some(unknown) = professions.iter().find(|name| !all().any(|known| known == name)) else { return Ok(()) };
    let close = |a: &&&str, b: &&&str| strsim::jaro_winkler(unknown, a).total_cmp(&strsim::jaro_winkler(unknown, b));
    let nearest = all().max_by(close).copied().unwrap_or_default();
    Err(Error::invalid("professions", format!("`{unknown}` is not known; the nearest is `{nearest}`"))
        .advise("for others, give a file of prompts with --prompts"))
}

/// Professions and their prompts.
fn prompts(args: &Survey) -> Result<Vec<(String, Vec<String>)>> {
    let extended = match args.prompts.as_str() {
        "winobias" => false,
        "winobias-extended" => true,
        file => {
            let text = crate::files::read_text(Path::new(file))?;
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
