//! `respodiff train`.

use super::progress::Progress;
use super::{Place, adapters, interrupt_flag, parts, say, tell, warn};
use crate::concept::{Concept, Form, Kind};
use crate::engine::{Engine, EngineOptions, Image, Request, Size};
use crate::files::check_writable;
use crate::image::Picture;
use crate::train::{Recipe, Task, Trainer, Variant, loss_plot, sheet};
use crate::weights::Source;
use crate::{Device, Error, ErrorKind, Result};
use serde_json::json;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("task").required(true))]
pub(super) struct Args {
    /// Train a concept that moves pictures toward this: "a woman"
    #[arg(long, group = "task")]
    target: Option<String>,
    /// Train a concept that moves pictures away from this: "violence"
    #[arg(long, group = "task", requires = "neutral")]
    avoid: Option<String>,
    /// Neutral prompt on which it is trained [default: "a person" with --target]
    #[arg(long)]
    neutral: Option<String>,
    /// Concept file to write
    #[arg(long)]
    out: PathBuf,
    /// Checkpoint folder, single file or Hugging Face model id [default: the demo]
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    parts: parts::Flags,
    #[command(flatten)]
    adapters: adapters::Flags,
    /// Recipe: default, official (that of the authors' code), or a TOML file with fields of a recipe
    #[arg(long, default_value = "default")]
    recipe: String,
    /// Training iterations
    #[arg(long)]
    iterations: Option<u64>,
    /// Latents per iteration
    #[arg(long)]
    batch: Option<usize>,
    /// Adam's learning rate for RAM
    #[arg(long)]
    lr_ram: Option<f64>,
    /// Adam's learning rate for SAM
    #[arg(long)]
    lr_sam: Option<f64>,
    /// Weight of L_sem
    #[arg(long)]
    lambda: Option<f64>,
    /// Form of the modules: constant, or for comparison ram-only, shared, mlp or conv
    #[arg(long)]
    variant: Option<Variant>,
    /// Training iterations per rollout: more are faster, on latents that are less independent
    #[arg(long)]
    latents_per_rollout: Option<usize>,
    /// Seed of the training's random numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Width in pixels, a multiple of 8 [default: the checkpoint's]
    #[arg(long)]
    width: Option<usize>,
    /// Height in pixels, a multiple of 8 [default: the checkpoint's]
    #[arg(long)]
    height: Option<usize>,
    /// Pictures per row of the contact sheet that shows the concept at the end; 0 for no sheet
    #[arg(long, default_value_t = 8)]
    sheet: usize,
    /// Device to compute on
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
    /// Continue from OUT's .checkpoint, if there is one
    #[arg(long)]
    resume: bool,
    /// Print one JSON object instead of file names: the files, losses and times
    #[arg(long)]
    json: bool,
}

impl Args {
    fn task(&self) -> Result<Task> {
        let (kind, concept) = match (&self.target, &self.avoid) {
            (Some(target), _) => (Kind::Fair, target.clone()),
            (None, Some(avoid)) => (Kind::Safe, avoid.clone()),
            (None, None) => return Err(Error::invalid("target", "give what to learn: --target or --avoid")),
        };
        Ok(Task { kind, concept, neutral: self.neutral.clone().unwrap_or_else(|| "a person".into()) })
    }

    fn recipe(&self, task: &Task) -> Result<Recipe> {
        let mut recipe = Recipe::named(&self.recipe, task.kind, &task.concept, self.variant)?;
        let set = |field: &mut f64, flag: Option<f64>| *field = flag.unwrap_or(*field);
        set(&mut recipe.lr_ram, self.lr_ram);
        set(&mut recipe.lr_sam, self.lr_sam);
        set(&mut recipe.lambda, self.lambda);
        recipe.iterations = self.iterations.unwrap_or(recipe.iterations);
        recipe.batch = self.batch.unwrap_or(recipe.batch);
        recipe.latents_per_rollout = self.latents_per_rollout.unwrap_or(recipe.latents_per_rollout);
        Ok(recipe)
    }
}

/// The time between two checkpoints.
const SAVE_EVERY: Duration = Duration::from_secs(20);

pub(super) fn run(args: &Args) -> Result<()> {
    let task = args.task()?;
    let recipe = args.recipe(&task)?;
    recipe.check()?;
    check_writable(&args.out)?;
    let beside = |suffix: &str| args.out.with_extension(suffix);
    let checkpoint = beside("checkpoint");
    if !args.resume && checkpoint.exists() {
        return Err(Error::invalid(
            "out",
            format!("{} remains from a training that was not finished", checkpoint.display()),
        )
        .advise("continue with --resume, or delete it"));
    }

    let source = args.parts.source(args.model.as_deref())?;
    let device = args.device.open()?;
    let options = EngineOptions::new(device).adapters(args.adapters.load()?);
    let engine = Engine::open(&source, options.clone())?;
    let Size { width, height } = engine.default_size();
    let size = Size::new(args.width.unwrap_or(width), args.height.unwrap_or(height));
    let mut trainer = Trainer::new(&engine, task.clone(), recipe.clone(), args.seed, size)?;
    // The text encoders and the VAE are not needed until pictures are drawn, so their memory is freed.
    drop(engine);
    tell(&format!("memory: {}", trainer.memory()));
    if args.resume && checkpoint.exists() {
        trainer.resume(&checkpoint)?;
    }
    let began = Instant::now();
    let from = trainer.history().len();
    let result = train(&mut trainer, recipe.iterations, &checkpoint);
    let done = trainer.history().len();
    let seconds = began.elapsed().as_secs_f64();
    if done > from {
        report_time(&trainer, done - from, began.elapsed());
    }
    match result {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::Cancelled => return Err(error),
        Err(error) => {
            trainer.concept().save(&args.out)?;
            warn(&format!("{} holds the concept as of iteration {done}", args.out.display()));
            return Err(error);
        }
    }

    let concept = trainer.concept();
    concept.save(&args.out)?;
    let mut report = json!({
        "concept": args.out.display().to_string(), "fingerprint": concept.fingerprint(), "iterations": done,
        "seconds": seconds, "losses": concept.metadata.losses, "warnings": trainer.warnings(),
    });
    // The concept is saved, so the checkpoint is no longer needed, and another training may begin.
    let _ = std::fs::remove_file(&checkpoint);
    trainer.warnings().iter().for_each(|w| warn(w));
    let plot = beside("losses.png");
    crate::files::write(&plot, &loss_plot(trainer.history(), &task.concept).png(&[])?)?;
    report["plot"] = plot.display().to_string().into();
    drop(trainer);
    if args.sheet > 0 {
        let path = beside("sheet.png");
        draw(args, &source, options, &task, concept, size)?.save_png(&path, &[])?;
        report["sheet"] = path.display().to_string().into();
    }
    match args.json {
        true => say(&format!("{report:#}")),
        false => ["concept", "plot", "sheet"].iter().filter_map(|key| report[*key].as_str()).for_each(say),
    }
    Ok(())
}

/// The contact sheet: pictures of the neutral prompt, without the concept in the first row and with it in the second.
fn draw(
    args: &Args,
    source: &Source,
    mut options: EngineOptions,
    task: &Task,
    concept: Concept,
    size: Size,
) -> Result<Picture> {
    // Only the CPU can sample with concepts that are networks.
    if concept.ram.form() != Form::Constant {
        options.device = Device::cpu();
    }
    let engine = Engine::open(source, options)?;
    let mut session = engine.session(engine.options().size(size).concepts(true))?;
    let concept = Arc::new(concept);
    let mut row = |concepts: Vec<_>| -> Result<Vec<Picture>> {
        let picture = |i: usize| {
            let mut image = Image::new(task.neutral.as_str()).seed(args.seed.wrapping_add(i as u64));
            image.concepts = concepts.clone();
            let mut output = session.generate(&Request::from(image), &mut |_| ControlFlow::Continue(()))?;
            Ok(output.pictures.remove(0))
        };
        (0..args.sheet).map(picture).collect()
    };
    Ok(sheet(&[row(vec![])?, row(vec![(concept, 1.0.into())])?]))
}

/// Trains to the end, writing checkpoints between rollouts.
fn train(trainer: &mut Trainer, iterations: u64, checkpoint: &Path) -> Result<()> {
    let cancelled = interrupt_flag();
    let shown = Progress::new("training", iterations, "iterations");
    shown.set(trainer.history().len() as u64, "");
    let mut saved = Instant::now();
    let mut outcome = Ok(());
    while (trainer.history().len() as u64) < iterations {
        let stopping = cancelled.load(Ordering::Relaxed);
        if trainer.between_rollouts() && (stopping || saved.elapsed() > SAVE_EVERY) {
            outcome = trainer.save(checkpoint);
            saved = Instant::now();
        }
        if stopping && outcome.is_ok() && trainer.between_rollouts() {
            outcome = Err(Error::cancelled(format!(
                "{} of {iterations} iterations are in {}",
                trainer.history().len(),
                checkpoint.display()
            ))
            .advise("continue with --resume"));
        }
        if outcome.is_ok() {
            outcome = trainer.iterate().map(|losses| {
                let losses = format!("L_resp {:.2e}  L_sem {:.2e}", losses.resp, losses.sem);
                shown.set(trainer.history().len() as u64, &losses);
            });
        }
        if outcome.is_err() {
            break;
        }
    }
    shown.finish();
    outcome
}

fn report_time(trainer: &Trainer, iterations: usize, elapsed: Duration) {
    let times = &trainer.times;
    let each = |d: Duration| 1e3 * d.as_secs_f64() / iterations as f64;
    tell(&format!(
        "trained: {iterations} iterations at {:.2}/s: {:.1} ms rollout, {:.1} ms target, {:.1} ms L_resp, \
         {:.1} ms L_sem",
        iterations as f64 / elapsed.as_secs_f64(),
        each(times.rollout),
        each(times.target),
        each(times.predictions),
        each(times.backward)
    ));
}
