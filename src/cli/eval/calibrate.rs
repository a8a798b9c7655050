//! `respodiff concept calibrate`.

use super::super::concepts::groups;
use super::super::{say, tell};
use super::survey::{Opened, Survey};
use crate::concept::{Calibration, Strength, members};
use crate::eval::fairness::{Report, Summary};
use crate::files;
use crate::{Concept, Error, Result, Subject};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Pictures of each profession or line, unless more or fewer are asked for: enough to tell strengths apart, not to
/// report one.
const IMAGES: usize = 16;

#[derive(clap::Args)]
pub(in super::super) struct Args {
    /// Concepts to balance; repeat to cross groups. All get the same strength
    #[arg(long, required = true, value_name = "A,B[=SHARE,SHARE]")]
    concepts: Vec<String>,
    /// Weights to try
    #[arg(
        long,
        value_delimiter = ',',
        default_values_t = [0.8, 1.0, 1.2, 1.5, 2.0],
        value_name = "WEIGHT,WEIGHT",
        allow_negative_numbers = true
    )]
    weights: Vec<f32>,
    /// Timesteps to try, until which concepts act; 0 for all steps
    #[arg(
        long,
        value_delimiter = ',',
        default_values_t = [0.0, 400.0, 500.0, 600.0],
        value_name = "TIMESTEP,TIMESTEP",
        allow_negative_numbers = true
    )]
    timesteps: Vec<f32>,
    /// The alignment with the prompt that may be lost, in percent
    #[arg(long, default_value_t = 1.0, value_name = "PERCENT")]
    alignment_loss: f64,
    #[command(flatten)]
    survey: Survey,
}

/// The pictures of one strength, measured.
#[derive(Clone, Debug, Serialize)]
struct Trial {
    #[serde(flatten)]
    strength: Strength,
    /// Mean deviation ratio of plain and of balanced pictures, over the judges.
    deviation_ratio: [f64; 2],
    /// Mean alignment of plain and of balanced pictures, over the judges.
    alignment: [f64; 2],
    /// The alignment that is lost, in percent.
    alignment_loss: f64,
}

pub(in super::super) fn run(args: &Args) -> Result<()> {
    let out = &args.survey.out;
    let names = args.concepts.iter().flat_map(|text| members(text));
    let files: Vec<PathBuf> = names.map(|name| out.join(file_name(&name))).collect();
    check(args, &files)?;
    let mut opened = args.survey.open(IMAGES)?;
    let groups = groups(&args.concepts, &opened.engine)?;
    let plain = out.join("plain");
    opened.balance(&groups, |_| Strength::default());
    make_plain(args, &mut opened, &plain)?;

    let mut trials: Vec<Trial> = Vec::new();
    for strength in strengths(args) {
        // Larger weights of the same sign change more of the picture.
        let hopeless = |trial: &Trial| {
            let smaller = trial.strength.weight.signum() == strength.weight.signum();
            smaller && trial.strength.until == strength.until && !allowed(trial, args)
        };
        if trials.iter().any(hopeless) {
            continue;
        }
        tell(&format!("weight {strength}"));
        opened.balance(&groups, |_| strength);
        let folder = out.join(format!("weight-{}-until-{}", strength.weight, strength.until));
        args.survey.make(&mut opened, &groups, Some(&plain), &folder)?;
        let trial = Trial::read(&folder, strength)?;
        tell(&trial.text());
        trials.push(trial);
        let text = serde_json::to_string_pretty(&trials).unwrap_or_default() + "\n";
        files::write(&out.join("trials.json"), text.as_bytes())?;
    }
    let best = best(&trials, args)?;
    for trial in &trials {
        say(&format!("{}{}", trial.text(), if std::ptr::eq(trial, best) { "   chosen" } else { "" }));
    }
    let calibration = Calibration {
        strength: best.strength,
        guidance: opened.settings.guidance,
        groups: opened.settings.groups.clone(),
        deviation_ratio: best.deviation_ratio,
        alignment: best.alignment,
        pictures: opened.settings.images * opened.settings.prompts.len(),
    };
    for (concept, file) in groups.iter().flat_map(|group| &group.members).zip(&files) {
        let mut concept = Concept::clone(concept);
        concept.metadata.calibration = Some(calibration.clone());
        concept.save(file)?;
        say(&file.display().to_string());
    }
    Ok(())
}

/// The name of a calibrated concept's file: that of the concept's own.
fn file_name(concept: &str) -> PathBuf {
    let name = Path::new(concept).file_name().unwrap_or_default();
    Path::new(name).with_extension("safetensors")
}

/// Refuses what can be refused before pictures are made.
fn check(args: &Args, files: &[PathBuf]) -> Result<()> {
    if args.survey.shard.is_some() {
        return Err(Error::invalid("shard", "a calibration decides from all pictures").advise("run it as one"));
    }
    if args.alignment_loss.is_nan() || args.alignment_loss < 0.0 {
        let problem = format!("{} is not a loss in percent", args.alignment_loss);
        return Err(Error::invalid("alignment_loss", problem).advise("1 is usual"));
    }
    let problem = |strength: Strength, field| match strength.problem() {
        Some((problem, advice)) => Err(Error::invalid(field, problem).advise(advice)),
        None => Ok(()),
    };
    args.weights.iter().try_for_each(|&weight| problem(weight.into(), "weights"))?;
    args.timesteps.iter().try_for_each(|&until| problem(Strength::from(1.0).until(until), "timesteps"))?;
    if let Some(twice) = (1..files.len()).find(|&i| files[..i].contains(&files[i])) {
        let problem = format!("two concepts would be written to {}", files[twice].display());
        return Err(Error::invalid("--concepts", problem).advise("rename one of the files"));
    }
    Ok(())
}

/// The strengths to try, small weights first.
fn strengths(args: &Args) -> Vec<Strength> {
    let mut weights = args.weights.clone();
    weights.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
    let of_until = |&until: &f32| weights.iter().map(move |&weight| Strength::from(weight).until(until));
    args.timesteps.iter().flat_map(of_until).collect()
}

/// Makes and judges the plain pictures, which all strengths are compared with.
fn make_plain(args: &Args, opened: &mut Opened, folder: &Path) -> Result<()> {
    opened.settings.concepts.clear();
    opened.settings.strengths.clear();
    args.survey.make(opened, &[], None, folder).map(|_| ())
}

fn allowed(trial: &Trial, args: &Args) -> bool {
    trial.alignment_loss <= args.alignment_loss
}

/// The trial with the smallest deviation ratio of those that keep the alignment.
fn best<'a>(trials: &'a [Trial], args: &Args) -> Result<&'a Trial> {
    let ratio = |trial: &&Trial| trial.deviation_ratio[1];
    let candidates = trials.iter().filter(|trial| allowed(trial, args));
    let Some(best) = candidates.min_by(|a, b| ratio(a).total_cmp(&ratio(b))) else {
        let least = trials.iter().map(|trial| trial.alignment_loss).fold(f64::INFINITY, f64::min);
        let problem = format!("every strength loses more than {} %, {least:.1} % at least", args.alignment_loss);
        return Err(Error::invalid("alignment_loss", problem)
            .advise("allow more, try smaller weights, or train the concepts again"));
    };
    let [plain, balanced] = best.deviation_ratio;
    if balanced >= plain {
        let problem = format!("no strength balances better than plain pictures, whose deviation ratio is {plain:.3}");
        return Err(Error::mismatch(Subject::Field("--concepts"), problem)
            .advise("make more pictures, try larger weights, or train the concepts again"));
    }
    Ok(best)
}

impl Trial {
    /// Reads the result of a folder: of the groups' combinations, if there are several.
    fn read(folder: &Path, strength: Strength) -> Result<Self> {
        let report = Report::read(folder)?;
        let judges = report.settings.judges.len().max(1);
        let whole: Vec<&Summary> =
            report.summaries.chunks(report.summaries.len() / judges).filter_map(|c| c.last()).collect();
        let mean = |of: &dyn Fn(&Summary) -> f64| whole.iter().map(|s| of(s)).sum::<f64>() / whole.len().max(1) as f64;
        let both = |of: &dyn Fn(&Summary, usize) -> f64| [0, 1].map(|side| mean(&|s| of(s, side)));
        let alignment = both(&|s, side| s.alignment[side]);
        let [plain, balanced] = alignment;
        Ok(Trial {
            strength,
            deviation_ratio: both(&|s, side| s.deviation_ratio[side].value),
            alignment,
            alignment_loss: 100.0 * (plain - balanced) / plain.abs(),
        })
    }

    fn text(&self) -> String {
        let Trial { strength, deviation_ratio: [a, b], alignment: [c, d], alignment_loss } = self;
        format!(
            "weight {:<4} until {:<4} deviation ratio {a:.3} -> {b:.3}   alignment {c:.2} -> {d:.2} ({:+.1} %)",
            strength.weight, strength.until, -alignment_loss
        )
    }
}
