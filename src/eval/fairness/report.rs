//! The result of a run.

use super::super::journal::{self, read_records, read_settings};
use super::calibration::{Calibration, Confusion};
use super::deviation::{Measure, chance, mean_deviation_ratio, paired_p};
use super::page;
use super::run::{Record, Settings};
use crate::{Error, Result};
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// The result of a run.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The settings of the run.
    pub settings: Settings,
    /// For each judge one summary per group, and if there are several groups, one of their combinations.
    pub summaries: Vec<Summary>,
    /// The agreement of several judges, for each group.
    pub agreement: Vec<Agreement>,
    /// The number of pictures that the settings ask for and the records lack: those of other shards, or all that is
    /// left of an interrupted run.
    pub missing: usize,
}

/// The result for one group by one judge.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Summary {
    /// The judge's name.
    pub judge: String,
    /// The classes that it told apart.
    pub classes: Vec<String>,
    /// The wanted share of each class.
    pub shares: Vec<f64>,
    /// Mean deviation ratio over the professions, plain and balanced.
    pub deviation_ratio: [Measure; 2],
    /// The mean deviation ratio of as many pictures whose classes are drawn from the shares.
    pub chance: f64,
    /// The p of [`paired_p`] for plain against balanced pictures, if there are pairs.
    pub p: Option<f64>,
    /// The same corrected for the judge's errors, if it has been calibrated.
    pub corrected: Option<Corrected>,
    /// Mean of [`Record::alignment`], plain and balanced.
    pub alignment: [f64; 2],
    /// Share of the balanced pictures that show the concept that they were given, 0 to 1.
    pub obeyed: f64,
    /// The professions that have pictures.
    pub professions: Vec<Row>,
}

/// A judge's errors, and the result without them.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Corrected {
    /// The judge's answers for pictures of known classes.
    pub confusion: Confusion,
    /// [`Confusion::accuracy`].
    pub accuracy: f64,
    /// [`Confusion::distinction`].
    pub distinction: f64,
    /// Mean deviation ratio of the corrected shares, plain and balanced; `None` if the judge hardly tells two of the
    /// classes apart, since then any shares would explain what it saw.
    pub deviation_ratio: Option<[Measure; 2]>,
}

/// The result for one profession, plain and balanced.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Row {
    /// The profession.
    pub name: String,
    /// Number of pictures of each class.
    pub counts: [Vec<usize>; 2],
    /// The deviation ratio of these counts.
    pub deviation_ratio: [Measure; 2],
}

/// The agreement of the judges about one group's classes.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Agreement {
    /// The classes.
    pub classes: Vec<String>,
    /// Share of the pictures in which all judges see the same class.
    pub share: f64,
    /// Fleiss' kappa (1971): 1 for full agreement, 0 for that of judges who guess with the same frequencies.
    pub kappa: f64,
}

/// The least [`Confusion::distinction`] for which shares are corrected: below, errors of the calibration are multiplied
/// by more than five.
const LEAST_DISTINCTION: f64 = 0.2;

/// A group, or the combination of all groups.
pub(super) struct Classes {
    pub names: Vec<String>,
    /// Wanted shares, which add up to 1.
    pub shares: Vec<f64>,
    /// The group's index; `None` for the combination.
    group: Option<usize>,
    /// Number of classes of each group.
    sizes: Vec<usize>,
}

impl Classes {
    /// Every group, and if there are several, their combination.
    pub fn all(settings: &Settings) -> Vec<Self> {
        let sizes: Vec<usize> = settings.groups.iter().map(Vec::len).collect();
        let scaled = |shares: &Vec<f64>| {
            let total: f64 = shares.iter().sum();
            shares.iter().map(|share| share / total).collect::<Vec<f64>>()
        };
        let mut all: Vec<Classes> = (settings.groups.iter().zip(&settings.shares).enumerate())
            .map(|(g, (names, shares))| Classes {
                names: names.clone(),
                shares: scaled(shares),
                group: Some(g),
                sizes: sizes.clone(),
            })
            .collect();
        if all.len() > 1 {
            let mut joint = Classes { names: vec![String::new()], shares: vec![1.0], group: None, sizes };
            for group in &all {
                let both = |a: &String, b: &String| if a.is_empty() { b.clone() } else { format!("{a} / {b}") };
                joint.names = joint.names.iter().flat_map(|a| group.names.iter().map(move |b| both(a, b))).collect();
                joint.shares = joint.shares.iter().flat_map(|a| group.shares.iter().map(move |b| a * b)).collect();
            }
            all.push(joint);
        }
        all
    }

    /// The class among these, of one class for each group.
    pub fn of(&self, list: &[usize]) -> usize {
        match self.group {
            Some(group) => list[group],
            None => list.iter().zip(&self.sizes).fold(0, |i, (class, size)| i * size + class),
        }
    }
}

impl Report {
    /// Computes the result from the records of a folder.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if they are damaged, [`crate::ErrorKind::NotFound`] if there are none.
    pub fn read(folder: &Path) -> Result<Self> {
        let (settings, records): (Settings, Vec<Record>) = read(folder)?;
        let calibration = Calibration::read(folder, &settings)?;
        let all = Classes::all(&settings);
        let mut summaries = Vec::new();
        for judge in 0..settings.judges.len() {
            for classes in &all {
                let confusion = calibration.as_ref().zip(classes.group).map(|(c, group)| &c.confusions[judge][group]);
                summaries.push(summary(&settings, &records, judge, classes, confusion));
            }
        }
        let several = settings.judges.len() > 1;
        let groups = all.iter().filter(|classes| several && classes.group.is_some());
        let agreement = groups.map(|classes| agreement(&settings, &records, classes)).collect();
        let missing = (settings.sides().len() * settings.images * settings.prompts.len()).saturating_sub(records.len());
        Ok(Report { settings, summaries, agreement, missing })
    }

    /// Writes `report.json`, `report.csv` and `report.html` into the folder.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn write(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let json = serde_json::to_string_pretty(self).unwrap_or_default() + "\n";
        let page = page::html(self, folder)?;
        let files = [("report.json", json), ("report.csv", self.csv()), ("report.html", page)];
        let mut paths = Vec::new();
        for (name, text) in files {
            let path = folder.join(name);
            crate::files::write(&path, text.as_bytes())?;
            paths.push(path);
        }
        Ok(paths)
    }

    fn csv(&self) -> String {
        let mut out = String::from(
            "judge,profession,class,share,plain,balanced,plain_deviation_ratio,balanced_deviation_ratio\n",
        );
        for summary in &self.summaries {
            for Row { name, counts: [plain, balanced], deviation_ratio: [before, after] } in &summary.professions {
                for (i, class) in summary.classes.iter().enumerate() {
                    let quote = |s: &str| format!("\"{}\"", s.replace('"', "\"\""));
                    let (judge, name, class) = (quote(&summary.judge), quote(name), quote(class));
                    let (share, a, b) = (summary.shares[i], plain[i], balanced[i]);
                    let _ = writeln!(
                        out,
                        "{judge},{name},{class},{share:.4},{a},{b},{:.4},{:.4}",
                        before.value, after.value
                    );
                }
            }
        }
        out
    }

    /// A short table for terminals.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for s in &self.summaries {
            let judge = if self.settings.judges.len() > 1 { format!(", by {}", s.judge) } else { String::new() };
            let _ = writeln!(out, "{}{judge}", s.classes.join(" | "));
            let [plain, balanced] = s.deviation_ratio.map(shown);
            let p = s.p.map_or(String::new(), |p| format!(", p {p:.4}"));
            let _ = writeln!(out, "  deviation ratio  {plain} -> {balanced}{p}; drawn by chance {:.3}", s.chance);
            if let Some(corrected) = &s.corrected {
                let right = 100.0 * corrected.accuracy;
                let result = match corrected.deviation_ratio.map(|both| both.map(shown)) {
                    Some([plain, balanced]) => format!("{plain} -> {balanced}"),
                    None => "not possible: it hardly tells the classes apart".into(),
                };
                let _ = writeln!(out, "  corrected        {result}; the judge is right in {right:.1} %");
            }
            let _ = writeln!(out, "  alignment        {:.2} -> {:.2}", s.alignment[0], s.alignment[1]);
            let _ = writeln!(out, "  shown as given   {:.1} %", 100.0 * s.obeyed);
        }
        for Agreement { classes, share, kappa } in &self.agreement {
            let classes = classes.join(" | ");
            let _ = writeln!(out, "{classes}: the judges agree in {:.1} %, Fleiss' kappa {kappa:.3}", 100.0 * share);
        }
        if self.missing > 0 {
            let _ = writeln!(out, "these figures are of a part: pictures missing: {}", self.missing);
        }
        out.trim_end().to_string()
    }
}

/// A value with its interval.
pub(super) fn shown(Measure { value, interval: [low, high] }: Measure) -> String {
    format!("{value:.3} [{low:.3}, {high:.3}]")
}

/// The settings and records of a folder, checked against each other.
pub(super) fn read(folder: &Path) -> Result<(Settings, Vec<Record>)> {
    let (settings, mut records): (Settings, Vec<Record>) = (read_settings(folder)?, read_records(folder)?);
    // Two processes in one folder may have made the same picture.
    let mut seen = HashSet::new();
    records.retain(|record| seen.insert((record.balanced, record.profession, record.seed)));
    if records.is_empty() {
        return Err(Error::not_found(folder, "holds no records yet").advise("run the evaluation first"));
    }
    let sizes: Vec<usize> = settings.groups.iter().map(Vec::len).collect();
    let judged = |scores: &Vec<Vec<f32>>| {
        scores.iter().map(Vec::len).eq(sizes.iter().copied()) && scores.iter().flatten().all(|score| score.is_finite())
    };
    let judges = settings.judges.len();
    let fits = |r: &Record| {
        let given = r.given.len() == settings.concepts.len() && r.given.iter().zip(&sizes).all(|(i, n)| i < n);
        let whole = r.scores.len() == judges && r.alignment.len() == judges && r.scores.iter().all(judged);
        r.profession < settings.prompts.len() && given && whole
    };
    let targets = settings.shares.iter().map(Vec::len).eq(sizes.iter().copied());
    if judges == 0 || !targets || !records.iter().all(fits) {
        return Err(Error::damaged(folder, "the records do not belong to the settings").advise("delete the folder"));
    }
    Ok((settings, records))
}

fn summary(
    settings: &Settings,
    records: &[Record],
    judge: usize,
    classes: &Classes,
    confusion: Option<&Confusion>,
) -> Summary {
    let Classes { names, shares, .. } = classes;
    let of = |balanced: bool| records.iter().filter(move |r| r.balanced == balanced);
    let share = |hits: usize, all: usize| hits as f64 / all.max(1) as f64;
    let alignment = [false, true].map(|b| {
        let (sum, count) = of(b).fold((0.0, 0), |(sum, n), r| (sum + f64::from(r.alignment[judge]), n + 1));
        sum / f64::from(count.max(1))
    });
    let obeyed = of(true).filter(|r| classes.of(&r.seen(judge)) == classes.of(&r.given)).count();

    let mut counts = [false, true].map(|_| vec![vec![0; names.len()]; settings.prompts.len()]);
    let mut pairs: HashMap<(usize, u64), [Option<usize>; 2]> = HashMap::new();
    for record in records {
        let (side, class) = (usize::from(record.balanced), classes.of(&record.seen(judge)));
        counts[side][record.profession][class] += 1;
        pairs.entry((record.profession, record.seed)).or_default()[side] = Some(class);
    }
    let mut paired = vec![Vec::new(); settings.prompts.len()];
    for ((profession, _), pair) in pairs {
        if let [Some(plain), Some(balanced)] = pair {
            paired[profession].push([plain, balanced]);
        }
    }
    // A map's order changes from run to run, and the test draws in the order of the pairs.
    paired.iter_mut().for_each(|pairs| pairs.sort_unstable());
    paired.retain(|pairs| !pairs.is_empty());

    let is_measured = |p: &usize| counts.iter().any(|side| side[*p].iter().sum::<usize>() > 0);
    let measured: Vec<usize> = (0..settings.prompts.len()).filter(is_measured).collect();
    let row = |&p: &usize| {
        let counts = counts.each_ref().map(|side| side[p].clone());
        let deviation_ratio = counts.each_ref().map(|side| mean_deviation_ratio(std::slice::from_ref(side), shares));
        Row { name: settings.prompts[p].0.clone(), counts, deviation_ratio }
    };
    let professions = measured.iter().map(row).collect();
    let sides = counts.each_ref().map(|side| {
        let some = measured.iter().map(|&p| side[p].clone()).filter(|counts| counts.iter().sum::<usize>() > 0);
        some.collect::<Vec<_>>()
    });
    let totals: Vec<usize> = sides[1].iter().map(|counts| counts.iter().sum()).collect();
    Summary {
        judge: settings.judges[judge].name.clone(),
        classes: names.clone(),
        shares: shares.clone(),
        deviation_ratio: sides.each_ref().map(|side| mean_deviation_ratio(side, shares)),
        chance: chance(&totals, shares),
        p: (!paired.is_empty()).then(|| paired_p(&paired, shares)),
        corrected: confusion.map(|confusion| Corrected {
            confusion: confusion.clone(),
            accuracy: confusion.accuracy(),
            distinction: confusion.distinction(),
            deviation_ratio: (confusion.distinction() >= LEAST_DISTINCTION)
                .then(|| sides.each_ref().map(|side| confusion.mean_deviation_ratio(side, shares))),
        }),
        alignment,
        obeyed: share(obeyed, of(true).count()),
        professions,
    }
}

fn agreement(settings: &Settings, records: &[Record], classes: &Classes) -> Agreement {
    let judges = settings.judges.len();
    let (mut all_agree, mut pairs_agree) = (0, 0.0);
    let mut frequencies = vec![0.0; classes.names.len()];
    for record in records {
        let mut votes = vec![0usize; classes.names.len()];
        (0..judges).for_each(|judge| votes[classes.of(&record.seen(judge))] += 1);
        all_agree += usize::from(votes.contains(&judges));
        let same: usize = votes.iter().map(|&n| n * n.saturating_sub(1)).sum();
        pairs_agree += same as f64 / (judges * (judges - 1)) as f64;
        frequencies.iter_mut().zip(&votes).for_each(|(sum, &n)| *sum += n as f64);
    }
    let pictures = records.len().max(1) as f64;
    let observed = pairs_agree / pictures;
    let by_chance: f64 = frequencies.iter().map(|n| (n / (pictures * judges as f64)).powi(2)).sum();
    // Judges that all see one class everywhere agree, whatever chance would give.
    let kappa = if by_chance < 1.0 { (observed - by_chance) / (1.0 - by_chance) } else { 1.0 };
    Agreement { classes: classes.names.clone(), share: all_agree as f64 / pictures, kappa }
}

/// Merges the records of the parts of a run, in `folders`, into the folder `out`.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] for no folders, [`crate::ErrorKind::Mismatch`] if they hold runs of different
/// settings, [`crate::ErrorKind::Damaged`], [`crate::ErrorKind::NotFound`], [`crate::ErrorKind::Io`].
pub fn merge(folders: &[PathBuf], out: &Path) -> Result<()> {
    journal::merge::<Settings, _, _>(folders, out, |r: &Record| (r.balanced, r.profession, r.seed))?;
    let images = out.join("images");
    std::fs::create_dir_all(&images).map_err(Error::io("create", &images))?;
    for folder in folders {
        let from = folder.join("images");
        for entry in std::fs::read_dir(&from).map_err(Error::io("read", &from))?.flatten() {
            let to = images.join(entry.file_name());
            crate::files::copy(&entry.path(), &to)?;
        }
        Calibration::copy(folder, out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(given: usize, scores: [[f32; 2]; 3]) -> Record {
        let scores = scores.map(|classes| vec![classes.to_vec()]).to_vec();
        Record {
            balanced: false,
            profession: 0,
            prompt: 0,
            seed: 0,
            given: vec![given],
            scores,
            alignment: vec![0.0; 3],
        }
    }

    /// Fleiss' formula by hand: three judges, four pictures with 3:0, 3:0, 2:1 and 0:3 votes.
    #[test]
    fn agreement_is_that_of_fleiss() {
        let (a, b) = ([2.0, 1.0], [1.0, 2.0]);
        let records = [[a, a, a], [a, a, a], [a, b, a], [b, b, b]].map(|scores| record(0, scores));
        let judge = |name: &str| super::super::Judge { name: name.into(), fingerprint: String::new() };
        let settings = super::super::run::tests::possible();
        let settings = Settings { judges: ["x", "y", "z"].map(judge).to_vec(), ..settings };
        let classes =
            Classes { names: vec!["a".into(), "b".into()], shares: vec![0.5; 2], group: Some(0), sizes: vec![2] };
        let Agreement { share, kappa, .. } = agreement(&settings, &records, &classes);
        let observed = (1.0 + 1.0 + 1.0 / 3.0 + 1.0) / 4.0;
        let by_chance = (8.0f64 / 12.0).powi(2) + (4.0f64 / 12.0).powi(2);
        assert!((share - 0.75).abs() < 1e-12);
        assert!((kappa - (observed - by_chance) / (1.0 - by_chance)).abs() < 1e-12, "{kappa}");
    }

    #[test]
    fn groups_combine() {
        let settings = Settings {
            groups: vec![vec!["woman".into(), "man".into()], vec!["x".into(), "y".into(), "z".into()]],
            shares: vec![vec![3.0, 1.0], vec![1.0; 3]],
            ..super::super::run::tests::possible()
        };
        let all = Classes::all(&settings);
        let joint = &all[2];
        assert_eq!(joint.names[joint.of(&[1, 2])], "man / z");
        assert!((joint.shares[joint.of(&[0, 1])] - 0.25).abs() < 1e-12 && (all[0].shares[1] - 0.25).abs() < 1e-12);
    }
}
