//! `respodiff eval fairness`.

use super::super::concepts::{Until, groups};
use super::super::progress::Progress;
use super::super::{interrupt_flag, say, warn};
use super::audit;
use super::survey::{Opened, REPORTED_IMAGES, Survey};
use crate::eval::fairness::{self, Calibration, Labelled, Report, Settings};
use crate::{Error, Result};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Concept files to balance; repeat to cross groups
    #[arg(long, required = true, value_name = "A,B[=SHARE,SHARE]")]
    concepts: Vec<String>,
    /// Weight of the concepts [default: a concept's own by `concept calibrate`, or 1]
    #[arg(long, allow_negative_numbers = true)]
    weight: Option<f32>,
    #[command(flatten)]
    until: Until,
    /// Correct for the judges' errors by pictures of known classes: a CSV file in FairFace's form, with the columns
    /// file, gender and race, for example
    #[arg(long, value_name = "CSV")]
    calibration: Option<PathBuf>,
    /// The label in the calibration's list that stands for a class, if it has other words: "a asian-race person=East
    /// Asian"; repeat for more
    #[arg(long = "label", value_name = "CLASS=LABEL", requires = "calibration")]
    labels: Vec<String>,
    /// Take the results for plain pictures from this folder of a run with other concepts and the same prompts, seeds
    /// and sampler
    #[arg(long, value_name = "FOLDER")]
    plain: Option<PathBuf>,
    #[command(flatten)]
    survey: Survey,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if measure(args)? { report(&args.survey.out) } else { Ok(()) }
}

/// Merges the folders of a sharded run, and reports the whole.
pub(super) fn merge(folders: &[PathBuf], out: &Path) -> Result<()> {
    fairness::merge(folders, out)?;
    report(out)
}

fn report(folder: &Path) -> Result<()> {
    let report = Report::read(folder)?;
    if report.settings.concepts.is_empty() {
        return audit::report(folder, false).map(|_| ());
    }
    say(&report.text());
    report.write(folder)?.iter().for_each(|path| say(&path.display().to_string()));
    Ok(())
}

/// False if there was nothing to measure.
fn measure(args: &Args) -> Result<bool> {
    if let Some(weight) = args.weight.filter(|weight| !weight.is_finite()) {
        return Err(Error::invalid("weight", format!("{weight} is not a finite number")));
    }
    let mut opened = args.survey.open(REPORTED_IMAGES)?;
    let groups = groups(&args.concepts, &opened.engine)?;
    let guidance = opened.settings.guidance;
    opened.balance(&groups, |concept| args.until.strength(concept, args.weight, guidance));
    let labelled = match &args.calibration {
        Some(list) => Some((list, labelled(args, list, &opened.settings)?)),
        None => None,
    };
    if !args.survey.make(&mut opened, &groups, args.plain.as_deref(), &args.survey.out)? {
        return Ok(false);
    }
    if let Some((list, labelled)) = labelled {
        let Opened { judges, settings, .. } = &mut opened;
        let cancelled = interrupt_flag();
        let shown = Progress::new("calibrating", labelled.len() as u64, "pictures");
        let outcome = Calibration::measure(&args.survey.out, settings, list, &labelled, judges, &mut |done| {
            shown.set(done as u64, "");
            if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        shown.finish();
        warn_of_labels(&outcome?, settings);
    }
    Ok(true)
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

/// Compares two runs.
pub(super) fn compare(first: &Path, second: &Path, json: bool) -> Result<()> {
    let comparisons = fairness::compare([first, second])?;
    match json {
        true => say(&serde_json::to_string_pretty(&comparisons).unwrap_or_default()),
        false => say(&fairness::comparison_text(&comparisons)),
    }
    Ok(())
}
