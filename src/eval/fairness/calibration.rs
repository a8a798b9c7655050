//! Correction for a judge's errors, from pictures whose classes are known.

use super::super::clip::Clip;
use super::super::pictures;
use super::super::statistics::standard_error;
use super::deviation::{Measure, deviation_ratio};
use super::run::{Settings, scores, seen};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The classes that a judge saw in pictures whose classes are known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Confusion {
    /// `counts[known][seen]` pictures.
    pub counts: Vec<Vec<usize>>,
}

impl Confusion {
    /// No pictures of `classes` classes.
    pub(super) fn new(classes: usize) -> Self {
        Confusion { counts: vec![vec![0; classes]; classes] }
    }

    /// The share of the pictures in which the judge saw the known class.
    pub fn accuracy(&self) -> f64 {
        let right: usize = self.counts.iter().enumerate().map(|(known, seen)| seen[known]).sum();
        right as f64 / self.counts.iter().flatten().sum::<usize>().max(1) as f64
    }

    /// The probability of seeing each class in a picture of each, with half a picture added everywhere (Jeffreys'
    /// prior).
    fn probabilities(&self) -> Vec<Vec<f64>> {
        let row = |seen: &Vec<usize>| {
            let total = seen.iter().sum::<usize>() as f64 + 0.5 * seen.len() as f64;
            seen.iter().map(|&n| (n as f64 + 0.5) / total).collect()
        };
        self.counts.iter().map(row).collect()
    }

    /// The smallest distance between two classes' answers: 0 if the judge cannot tell them apart, 1 if it never
    /// confuses them (the total variation between the rows; for two classes Youden's index, 1950).
    pub fn distinction(&self) -> f64 {
        let rows = self.probabilities();
        let distance = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / 2.0;
        let pairs = rows.iter().enumerate().flat_map(|(i, a)| rows[..i].iter().map(move |b| distance(a, b)));
        pairs.fold(1.0, f64::min)
    }

    /// The shares of the true classes that make the counts of the seen ones most likely.
    ///
    /// For two classes and shares within 0 and 1 this is the estimator of Rogan and Gladen (1978). In general the most
    /// likely shares are found by the EM algorithm (Dempster et al., 1977), which keeps them within 0 and 1.
    pub fn corrected(&self, seen: &[usize]) -> Vec<f64> {
        most_likely(&self.probabilities(), &seen.iter().map(|&n| n as f64).collect::<Vec<_>>())
    }

    /// The mean deviation ratio of the corrected shares over professions. Its interval follows from drawing both the
    /// pictures and the calibration's pictures anew.
    pub(super) fn mean_deviation_ratio(&self, professions: &[Vec<usize>], shares: &[f64]) -> Measure {
        let mean = |probabilities: &[Vec<f64>], professions: &[Vec<f64>]| {
            let ratios = professions.iter().map(|seen| deviation_ratio(&most_likely(probabilities, seen), shares));
            ratios.sum::<f64>() / professions.len().max(1) as f64
        };
        let floats = |counts: &Vec<usize>| counts.iter().map(|&n| n as f64).collect::<Vec<f64>>();
        let value = mean(&self.probabilities(), &professions.iter().map(floats).collect::<Vec<_>>());
        let error = standard_error(|draw| {
            let counts = self.counts.iter().map(|seen| redrawn(seen, draw)).collect();
            let professions: Vec<Vec<f64>> = professions.iter().map(|seen| floats(&redrawn(seen, draw))).collect();
            mean(&Confusion { counts }.probabilities(), &professions)
        });
        Measure::ratio(value, error)
    }
}

/// As many pictures, drawn from these with replacement.
fn redrawn(counts: &[usize], draw: &mut dyn FnMut(usize) -> usize) -> Vec<usize> {
    let total = counts.iter().sum();
    let mut out = vec![0; counts.len()];
    for _ in 0..total {
        let mut index = draw(total);
        let class = counts.iter().position(|&n| {
            let here = index < n;
            index = index.saturating_sub(n);
            here
        });
        out[class.unwrap_or(0)] += 1;
    }
    out
}

fn most_likely(probabilities: &[Vec<f64>], seen: &[f64]) -> Vec<f64> {
    const ROUNDS: usize = 300;
    let (classes, total) = (seen.len(), seen.iter().sum::<f64>().max(1.0));
    let mut shares = vec![1.0 / classes as f64; classes];
    for _ in 0..ROUNDS {
        let mut next = vec![0.0; classes];
        for (class, n) in seen.iter().enumerate().filter(|(_, n)| **n > 0.0) {
            let all: f64 = (0..classes).map(|known| shares[known] * probabilities[known][class]).sum();
            for known in 0..classes {
                next[known] += n / total * shares[known] * probabilities[known][class] / all;
            }
        }
        let change = next.iter().zip(&shares).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        shares = next;
        if change < 1e-6 {
            break;
        }
    }
    shares
}

/// The answers of the judges of a run for pictures whose classes are known. It is a file in the run's folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The list of the pictures, and its SHA-256.
    pub list: String,
    /// For each judge and group.
    pub confusions: Vec<Vec<Confusion>>,
}

/// A picture whose class is known, for some groups.
#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    /// The picture's file.
    pub file: PathBuf,
    /// The class in each group.
    pub classes: Vec<Option<usize>>,
}

const FILE: &str = "calibration.json";

impl Calibration {
    /// Lets the judges of a run judge pictures of known classes, and writes the result into the run's folder.
    /// `progress` gets the number of pictures done, and may end the work.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if a class has no pictures, [`crate::ErrorKind::Cancelled`], and those of reading
    /// and judging pictures.
    pub fn measure(
        folder: &Path,
        settings: &Settings,
        list: &Path,
        labelled: &[Labelled],
        judges: &mut [Clip],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Self> {
        let none: Vec<Confusion> = settings.groups.iter().map(|group| Confusion::new(group.len())).collect();
        let mut confusions = vec![none; judges.len()];
        let classes = judges.iter().map(|judge| settings.classes(judge)).collect::<Result<Vec<_>>>()?;
        for (done, chunk) in labelled.chunks(BATCH).enumerate() {
            if progress(done * BATCH).is_break() {
                return Err(Error::cancelled("stopped before the calibration was done"));
            }
            let pictures = chunk.iter().map(|labelled| pictures::read(&labelled.file)).collect::<Result<Vec<_>>>()?;
            for ((judge, classes), confusions) in judges.iter_mut().zip(&classes).zip(&mut confusions) {
                for (view, labelled) in judge.images(&pictures)?.iter().zip(chunk) {
                    let seen = seen(&scores(classes, view));
                    for ((confusion, known), seen) in confusions.iter_mut().zip(&labelled.classes).zip(seen) {
                        if let Some(known) = *known {
                            confusion.counts[known][seen] += 1;
                        }
                    }
                }
            }
        }
        for (group, confusion) in settings.groups.iter().zip(&confusions[0]) {
            if let Some(class) = confusion.counts.iter().position(|seen| seen.iter().sum::<usize>() == 0) {
                let problem = format!("no picture is labelled `{}`", group[class]);
                return Err(Error::invalid("calibration", problem).advise("name the label that stands for this class"));
            }
        }
        let bytes = std::fs::read(list).map_err(Error::io("read", list))?;
        let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let calibration = Calibration { list: format!("{} {hash}", list.display()), confusions };
        let text = serde_json::to_string_pretty(&calibration).unwrap_or_default();
        crate::files::write(&folder.join(FILE), text.as_bytes())?;
        Ok(calibration)
    }

    /// Reads the calibration of a run's folder, if it has one.
    pub(super) fn read(folder: &Path, settings: &Settings) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let calibration: Calibration = crate::json::parse(&text, &path)?;
        let fits = |confusions: &Vec<Confusion>| {
            confusions.len() == settings.groups.len()
                && confusions.iter().zip(&settings.groups).all(|(confusion, group)| {
                    let sizes = confusion.counts.iter().map(Vec::len);
                    confusion.counts.len() == group.len() && sizes.into_iter().all(|size| size == group.len())
                })
        };
        if calibration.confusions.len() != settings.judges.len() || !calibration.confusions.iter().all(fits) {
            return Err(Error::damaged(&path, "does not belong to the run's settings").advise("delete it"));
        }
        Ok(Some(calibration))
    }

    /// Copies the calibration of a folder, if it has one.
    pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
        let file = from.join(FILE);
        if file.exists() { crate::files::copy(&file, &to.join(FILE)) } else { Ok(()) }
    }
}

/// Pictures that are read at a time.
const BATCH: usize = 32;

/// Reads a list of pictures with labels: a CSV file with a column `file` (paths relative to the list), and a column for
/// each kind of label, such as FairFace's `gender` and `race`. A label stands for a class if `labels` says so (class
/// and label), or if all its words are in the class's name, or the other way round; `Female` and `Male` stand for
/// `woman` and `man`. Pictures without a label for a group are left out of that group.
///
/// # Errors
/// [`crate::ErrorKind::NotFound`] for the list or a picture, [`crate::ErrorKind::Damaged`] for a list that cannot be
/// read, and [`crate::ErrorKind::Invalid`] for a label that could stand for two classes of a group, or a class that is
/// not known.
pub fn read_labels(list: &Path, groups: &[Vec<String>], labels: &[(String, String)]) -> Result<Vec<Labelled>> {
    let known = |class: &str| groups.iter().flatten().any(|name| name == class);
    if let Some((class, _)) = labels.iter().find(|(class, _)| !known(class)) {
        let names = groups.concat().join(", ");
        return Err(Error::invalid("labels", format!("`{class}` is no class")).advise(format!("give one of {names}")));
    }
    let damaged = |error: csv::Error| Error::damaged(list, format!("not a list of labelled pictures: {error}"));
    let file = std::fs::File::open(list).map_err(Error::io("read", list))?;
    let mut reader = csv::Reader::from_reader(file);
    let columns = reader.headers().map_err(damaged)?.clone();
    let Some(place) = columns.iter().position(|name| name.trim().eq_ignore_ascii_case("file")) else {
        return Err(
            Error::damaged(list, "has no column `file`").advise("give a list in FairFace's form: file, gender, race")
        );
    };
    let folder = list.parent().unwrap_or(Path::new(""));
    let mut labelled = Vec::new();
    for row in reader.records() {
        let row = row.map_err(damaged)?;
        let values: Vec<&str> = row.iter().enumerate().filter(|(i, _)| *i != place).map(|(_, value)| value).collect();
        let class = |group: &Vec<String>| -> Result<Option<usize>> {
            let means = |class: &String| values.iter().any(|value| stands_for(value, class, labels));
            let classes: Vec<usize> = (0..group.len()).filter(|&c| means(&group[c])).collect();
            match classes[..] {
                [] => Ok(None),
                [class] => Ok(Some(class)),
                [a, b, ..] => {
                    let row = values.join(", ");
                    let problem = format!("`{row}` could be `{}` or `{}`", group[a], group[b]);
                    Err(Error::invalid("labels", problem).advise("say which label stands for which class"))
                }
            }
        };
        let classes = groups.iter().map(class).collect::<Result<Vec<_>>>()?;
        let file = folder.join(&row[place]);
        if !file.is_file() {
            let line = row.position().map_or(0, csv::Position::line);
            return Err(Error::not_found(list, format!("line {line} names {}, which is no file", file.display()))
                .advise("give paths from the list's own folder"));
        }
        labelled.push(Labelled { file, classes });
    }
    Ok(labelled)
}

/// True if a label stands for a class.
fn stands_for(label: &str, class: &str, labels: &[(String, String)]) -> bool {
    let mut given = labels.iter().filter(|(of, _)| of == class).peekable();
    if given.peek().is_some() {
        return given.any(|(_, name)| name == label);
    }
    let words = |text: &str| -> Vec<String> {
        let lower = text.to_lowercase();
        let words = lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty() && *word != "a");
        words
            .map(|word| match word {
                "female" => "woman".to_string(),
                "male" => "man".to_string(),
                other => other.to_string(),
            })
            .collect()
    };
    let (label, class) = (words(label), words(class));
    let within = |a: &[String], b: &[String]| !a.is_empty() && a.iter().all(|word| b.contains(word));
    within(&label, &class) || within(&class, &label)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rogan and Gladen: the true share is (seen share + specificity - 1) / (sensitivity + specificity - 1).
    #[test]
    fn two_classes_follow_the_known_formula() {
        let confusion = Confusion { counts: vec![vec![900, 100], vec![200, 800]] };
        let (sensitivity, specificity) = (900.5 / 1001.0, 800.5 / 1001.0);
        for seen in [[700, 300], [500, 500], [250, 750]] {
            let share = seen[0] as f64 / 1000.0;
            let truth = (share + specificity - 1.0) / (sensitivity + specificity - 1.0);
            let ours = confusion.corrected(&seen);
            assert!((ours[0] - truth).abs() < 1e-4, "{ours:?} {truth}");
            assert!((ours.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        }
        // Fewer than the judge's errors alone would give: none at all.
        assert!(confusion.corrected(&[50, 950])[0] < 1e-2);
        assert!((confusion.accuracy() - 0.85).abs() < 1e-12);
        assert!((confusion.distinction() - (sensitivity + specificity - 1.0)).abs() < 1e-12);
    }

    /// Counts that follow from known shares lead back to them, here for four classes.
    #[test]
    fn shares_are_recovered() {
        let mut confusion = Confusion::new(4);
        for known in 0..4 {
            for seen in 0..4 {
                confusion.counts[known][seen] = if known == seen { 7000 } else { 500 + 500 * ((known + seen) % 3) };
            }
        }
        let (truth, probabilities) = ([0.1, 0.2, 0.3, 0.4], confusion.probabilities());
        let seen: Vec<usize> = (0..4)
            .map(|class| (0..4).map(|known| 1e6 * truth[known] * probabilities[known][class]).sum::<f64>() as usize)
            .collect();
        let ours = confusion.corrected(&seen);
        assert!(ours.iter().zip(truth).all(|(a, b)| (a - b).abs() < 1e-3), "{ours:?}");
    }

    #[test]
    fn labels_are_matched_to_classes() {
        let folder = tempfile::tempdir().unwrap();
        let list = folder.path().join("labels.csv");
        std::fs::create_dir(folder.path().join("val")).unwrap();
        for name in ["val/1.png", "b.png", "c.png", "a.png"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        std::fs::write(
            &list,
            "file,age,gender,race\nval/1.png,3-9,Male,East Asian\nb.png,20-29,Female,Black\nc.png,,,Indian\n",
        )
        .unwrap();
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let groups =
            [names(&["woman", "man"]), names(&["white-race person", "black-race person", "a asian-race person"])];
        let ours = read_labels(&list, &groups, &[("a asian-race person".into(), "East Asian".into())]).unwrap();
        let classes: Vec<_> = ours.iter().map(|labelled| labelled.classes.clone()).collect();
        assert_eq!(classes, [vec![Some(1), Some(2)], vec![Some(0), Some(1)], vec![None, None]]);
        assert_eq!(ours[0].file, folder.path().join("val/1.png"));
        // Without being told, East Asian is not all of the class's words.
        assert_eq!(read_labels(&list, &groups, &[]).unwrap()[0].classes[1], None);
        let other = [names(&["a man", "a man with a hat"])];
        assert!(read_labels(&list, &other, &[]).unwrap_err().to_string().contains("could be"));
        assert!(read_labels(&list, &groups, &[("x".into(), "y".into())]).unwrap_err().to_string().contains("no class"));
        std::fs::write(&list, "picture,gender\na.png,Male\n").unwrap();
        assert!(read_labels(&list, &groups, &[]).unwrap_err().to_string().contains("`file`"));
    }
}
