//! Evaluation runs: one CLIP or several judge pictures of every profession, plain and balanced, and each picture's
//! record is written at once.

use super::super::clip::{Clip, cosine, fitted};
use super::super::journal::{self, Journal, Settings as _, read_records, read_settings};
use crate::concept::{Group, Strength, assign};
use crate::engine::{Engine, Image, Request};
use crate::image::Picture;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::Path;

/// Largest number of pictures of a profession.
const MOST_IMAGES: usize = 1_000_000;

/// A CLIP that judges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judge {
    /// Its name.
    pub name: String,
    /// Its [`Clip::fingerprint`].
    pub fingerprint: String,
}

/// Everything that decides the pictures and their judgement. All records of a folder have the same settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Name of the checkpoint.
    pub model: String,
    /// The checkpoint's [`Engine::fingerprint`].
    pub fingerprint: String,
    /// The CLIPs that judge.
    pub judges: Vec<Judge>,
    /// The classes of each group, the names of its concepts. A judge chooses among these texts.
    pub groups: Vec<Vec<String>>,
    /// The [`crate::Concept::fingerprint`]s of each group: a concept that is trained further may keep its name. Without
    /// concepts no pictures are balanced.
    pub concepts: Vec<Vec<String>>,
    /// The wanted shares of each group's classes.
    pub shares: Vec<Vec<f64>>,
    /// The strengths of each group's concepts in balanced pictures.
    pub strengths: Vec<Vec<Strength>>,
    /// Professions and the prompts of each.
    pub prompts: Vec<(String, Vec<String>)>,
    /// Pictures of each profession, plain and again balanced, spread over its prompts.
    pub images: usize,
    /// Sampler, as [`crate::SamplerChoice`] parses it.
    pub sampler: String,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f32,
    /// Seed of the first profession's first picture; each next picture has the next seed.
    pub seed: u64,
    /// The command that began the run, for the report.
    #[serde(default)]
    pub command: String,
    /// Batch size; results do not depend on it.
    #[serde(skip)]
    pub batch: usize,
    /// The part of the professions that is run, counted from 0, and the number of parts.
    #[serde(skip)]
    pub shard: (usize, usize),
}

impl journal::Settings for Settings {
    fn same_run(&self, other: &Self) -> bool {
        let kept = |s: &Self| Settings { command: String::new(), batch: 0, shard: (0, 0), ..s.clone() };
        kept(self) == kept(other)
    }
}

impl Settings {
    /// Checks that a run of these settings is possible with these groups.
    fn check(&self, groups: &[Group]) -> Result<()> {
        let refused =
            |field, problem: &'static str, advice: &'static str| Err(Error::invalid(field, problem).advise(advice));
        let (part, parts) = self.shard;
        let seeds = self.prompts.len().checked_mul(self.images).and_then(|seeds| self.seed.checked_add(seeds as u64));
        fn sizes<T>(lists: &[Vec<T>]) -> Vec<usize> {
            lists.iter().map(Vec::len).collect()
        }
        let members: Vec<usize> = groups.iter().map(|group| group.members.len()).collect();
        let twice = |names: Vec<&String>| names.iter().collect::<HashSet<_>>().len() < names.len();
        if self.images == 0 || self.images > MOST_IMAGES {
            refused("images", "no pictures, or more than a million", "give 1 to 1,000,000 for each profession")
        } else if twice(self.prompts.iter().map(|(name, _)| name).collect()) {
            refused("prompts", "a profession or prompt is there twice", "give each once")
        } else if twice(self.groups.iter().flatten().collect()) {
            refused("groups", "a class is there twice", "give each concept once")
        } else if twice(self.judges.iter().map(|judge| &judge.fingerprint).collect()) {
            refused("judges", "a judge is there twice", "give each once")
        } else if !self.guidance.is_finite() {
            refused("guidance", "not finite", "7.5 is usual")
        } else if self.prompts.is_empty() || self.prompts.iter().any(|(_, prompts)| prompts.is_empty()) {
            refused("prompts", "a profession without prompts, or no professions", "give one prompt or more for each")
        } else if part >= parts {
            refused("shard", "its part is not below the number of parts", "count parts from 0")
        } else if seeds.is_none() {
            refused("seed", "the last picture's seed would be too large", "give a smaller first seed")
        } else if let Some((problem, advice)) = self.strengths.iter().flatten().find_map(|s| s.problem()) {
            Err(Error::invalid("strengths", problem).advise(advice))
        } else if sizes(&self.concepts) != members
            || sizes(&self.strengths) != members
            || !members.is_empty() && sizes(&self.groups) != members
        {
            refused("groups", "the groups are not the settings' own", "give the groups that the settings name")
        } else {
            Ok(())
        }
    }

    /// The strengths of the concepts in words, such as `1.2 down to timestep 500`.
    pub fn strength(&self) -> String {
        let mut all: Vec<String> = self.strengths.iter().flatten().map(Strength::to_string).collect();
        all.dedup();
        all.join(", ")
    }

    /// The kinds of pictures that are made: plain and, if there are concepts, balanced.
    pub(super) fn sides(&self) -> &'static [bool] {
        if self.concepts.is_empty() { &[false] } else { &[false, true] }
    }

    /// The indices of these groups in the records of another run, whose plain pictures must be the same.
    fn columns(&self, other: &Path) -> Result<Vec<usize>> {
        let theirs: Settings = read_settings(other)?;
        let Settings { groups, concepts, shares, strengths, .. } = theirs.clone();
        let columns: Option<Vec<usize>> =
            self.groups.iter().map(|group| groups.iter().position(|theirs| theirs == group)).collect();
        let ours = Settings { groups, concepts, shares, strengths, ..self.clone() };
        columns.filter(|_| ours.same_run(&theirs)).ok_or_else(|| {
            let problem = "holds plain pictures of other settings, or lacks a group of these concepts";
            Error::mismatch(other, problem)
        })
    }
}

/// The judgement of one picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Record {
    /// True if the picture was made with concepts.
    pub balanced: bool,
    /// Index of the profession in [`Settings::prompts`].
    pub profession: usize,
    /// Index of the prompt among the profession's.
    pub prompt: usize,
    /// The picture's seed.
    pub seed: u64,
    /// Index of the concept that the picture was given, for each group. A plain picture has that of its balanced twin.
    pub given: Vec<usize>,
    /// 100 times the cosine of the embeddings of the picture and of a class's text, for each judge, group and class.
    pub scores: Vec<Vec<Vec<f32>>>,
    /// The same of the picture and its prompt, for each judge.
    pub alignment: Vec<f32>,
}

impl Record {
    /// The class that a judge sees in the picture, for each group: the one with the largest score.
    pub fn seen(&self, judge: usize) -> Vec<usize> {
        seen(&self.scores[judge])
    }
}

/// The class with the largest score, for each group.
pub(super) fn seen(scores: &[Vec<f32>]) -> Vec<usize> {
    let best = |scores: &Vec<f32>| (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0);
    scores.iter().map(best).collect()
}

/// Pictures of each profession that are kept for the report.
pub(super) const KEPT: usize = 8;

/// A run and its folder.
pub struct Fairness {
    settings: Settings,
    journal: Journal<Record>,
}

impl Fairness {
    /// Starts a run in a folder, or continues one of the same settings.
    ///
    /// Concepts do not change plain pictures. So the judgement of plain pictures is copied from the folder `plain`, if
    /// given, of another run with the same prompts, seeds and sampler. That run must have told apart the classes of
    /// these groups, and may have told apart others as well.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for settings that are not possible, [`crate::ErrorKind::Mismatch`] if a folder
    /// holds a run of other settings, [`crate::ErrorKind::Damaged`], [`crate::ErrorKind::NotFound`],
    /// [`crate::ErrorKind::Io`].
    pub fn open(folder: &Path, settings: Settings, groups: &[Group], plain: Option<&Path>) -> Result<Self> {
        settings.check(groups)?;
        let plain = plain.map(|other| settings.columns(other).map(|columns| (other, columns))).transpose()?;
        let images = folder.join("images");
        std::fs::create_dir_all(&images).map_err(Error::io("create", &images))?;
        let journal = Journal::open(folder, &settings)?;
        let mut run = Fairness { settings, journal };
        if let Some((other, columns)) = plain {
            run.take_plain(other, &columns, groups)?;
        }
        Ok(run)
    }

    /// The number of pictures that are left to make, and the number of all.
    pub fn left(&self) -> (usize, usize) {
        let total = self.settings.sides().len() * self.settings.images * self.professions().count();
        (total.saturating_sub(self.journal.records().len()), total)
    }

    /// Copies another run's judgement of plain pictures, for the groups at the indices `columns` of its records.
    fn take_plain(&mut self, other: &Path, columns: &[usize], groups: &[Group]) -> Result<()> {
        let images = self.settings.images;
        let done: HashSet<(usize, u64)> =
            self.journal.records().iter().filter(|r| !r.balanced).map(|r| (r.profession, r.seed)).collect();
        let records: Vec<Record> = read_records(other)?;
        for profession in self.professions() {
            let base = self.settings.seed + (profession * images) as u64;
            let given = assign(groups, images, base, false);
            for record in records.iter().filter(|r| !r.balanced && r.profession == profession) {
                let index = record.seed.wrapping_sub(base) as usize;
                let of_groups = |groups: &Vec<Vec<f32>>| columns.iter().map(|&c| groups.get(c).cloned()).collect();
                let scores: Option<Vec<Vec<Vec<f32>>>> = record.scores.iter().map(of_groups).collect();
                let (Some(given), Some(scores)) = (given.get(index), scores) else { continue };
                if !done.contains(&(profession, record.seed)) {
                    self.journal.push(Record { given: given.clone(), scores, ..record.clone() })?;
                }
            }
            for index in 0..KEPT {
                let name = Path::new("images").join(image_name(false, profession, index));
                if other.join(&name).exists() {
                    let to = self.journal.folder().join(name.clone());
                    crate::files::copy(&other.join(name), &to)?;
                }
            }
        }
        Ok(())
    }

    fn professions(&self) -> impl Iterator<Item = usize> + use<> {
        let (part, parts) = self.settings.shard;
        (0..self.settings.prompts.len()).filter(move |p| p % parts == part)
    }

    /// Makes and judges the pictures that are left. `progress` gets the number of pictures done, and may end the run.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Cancelled`] when `progress` breaks; everything done so far is kept. Those of
    /// [`crate::Session::generate`] and of writing.
    pub fn run(
        &mut self,
        engine: &Engine,
        judges: &mut [Clip],
        groups: &[Group],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<()> {
        self.settings.check(groups)?;
        let Settings { images, batch, .. } = self.settings;
        let classes = judges.iter().map(|judge| self.settings.classes(judge)).collect::<Result<Vec<_>>>()?;
        let options = engine.options().batch(batch).guided(self.settings.guidance > 1.0).concepts(!groups.is_empty());
        let mut session = engine.session(options)?;
        let done: HashSet<(bool, usize, u64)> =
            self.journal.records().iter().map(|r| (r.balanced, r.profession, r.seed)).collect();
        for profession in self.professions() {
            let prompts = self.settings.prompts[profession].1.clone();
            let texts = judges.iter().map(|judge| judge.texts(&prompts)).collect::<Result<Vec<_>>>()?;
            let encoded = prompts.iter().map(|prompt| engine.encode(prompt)).collect::<Result<Vec<_>>>()?;
            let base = self.settings.seed + (profession * images) as u64;
            let given = assign(groups, images, base, false);
            for &balanced in self.settings.sides() {
                // Pictures of one prompt are neighbours: image i has prompt i * prompts / images.
                let prompt_of = |i: usize| i * prompts.len() / images;
                let mut i = 0;
                while i < images {
                    let prompt = prompt_of(i);
                    let count = (i..images.min(i + batch)).take_while(|&j| prompt_of(j) == prompt).count();
                    let range = i..i + count;
                    i += count;
                    if range.clone().all(|j| done.contains(&(balanced, profession, base + j as u64))) {
                        continue;
                    }
                    // The last batch of a prompt may be short. Its other rows are computed and not used.
                    let image = |j: usize| {
                        let seed = base + (range.start + j) as u64;
                        let mut image = Image::new(&encoded[prompt]).seed(seed).guidance(self.settings.guidance);
                        let row = given.get(range.start + j).filter(|_| balanced && j < count);
                        let members = row.into_iter().flatten().zip(groups.iter().zip(&self.settings.strengths));
                        image.concepts = members.map(|(&m, (g, s))| (g.members[m].clone(), s[m])).collect();
                        image
                    };
                    let request = Request::new((0..batch).map(image).collect())
                        .steps(self.settings.steps)
                        .sampler(self.settings.sampler.parse()?);
                    let mut output = session.generate(&request, &mut |_| progress(self.journal.records().len()))?;
                    output.pictures.truncate(count);
                    let views =
                        judges.iter_mut().map(|judge| judge.images(&output.pictures)).collect::<Result<Vec<_>>>()?;
                    for ((row, j), image) in range.enumerate().zip(&output.pictures) {
                        let seed = base + j as u64;
                        if done.contains(&(balanced, profession, seed)) {
                            continue;
                        }
                        let of_judge = |(view, classes): (&Vec<Vec<f32>>, &Classes)| scores(classes, &view[row]);
                        let alignment = views.iter().zip(&texts).map(|(view, texts)| score(&texts[prompt], &view[row]));
                        let record = Record {
                            balanced,
                            profession,
                            prompt,
                            seed,
                            given: given[j].clone(),
                            scores: views.iter().zip(&classes).map(of_judge).collect(),
                            alignment: alignment.collect(),
                        };
                        self.keep(record, image, j)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn keep(&mut self, record: Record, image: &Picture, index: usize) -> Result<()> {
        // The kept pictures are spread over the prompts, so that the report shows all prompts.
        let every = (self.settings.images / KEPT).max(1);
        if index.is_multiple_of(every) && index / every < KEPT {
            let name = image_name(record.balanced, record.profession, index / every);
            crate::files::write(&self.journal.folder().join("images").join(name), &thumbnail(image)?)?;
        }
        self.journal.push(record)
    }
}

/// Embeddings of the texts of every class, for each group.
type Classes = Vec<Vec<Vec<f32>>>;

impl Settings {
    /// A judge's embeddings of the classes.
    pub(super) fn classes(&self, judge: &Clip) -> Result<Classes> {
        self.groups.iter().map(|group| judge.texts(group)).collect()
    }
}

/// 100 times the cosine between a picture's embedding and that of each class, for each group.
pub(super) fn scores(classes: &Classes, view: &[f32]) -> Vec<Vec<f32>> {
    classes.iter().map(|classes| classes.iter().map(|text| score(text, view)).collect()).collect()
}

/// 100 times a cosine, to four decimals: embeddings are not more exact.
fn score(text: &[f32], view: &[f32]) -> f32 {
    ((cosine(text, view) * 1e6).round() / 1e4) as f32
}

/// Side of the pictures that are kept for the report.
const THUMBNAIL: usize = 96;

/// A small square JPEG of a picture.
fn thumbnail(image: &Picture) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let side = THUMBNAIL as u16;
    let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 85);
    encoder
        .add_app_segment(1, crate::image::xmp_segment())
        .and_then(|()| encoder.encode(&fitted(image, THUMBNAIL), side, side, jpeg_encoder::ColorType::Rgb))
        .map_err(|error| Error::internal(format!("a thumbnail cannot be encoded: {error}")))?;
    Ok(bytes)
}

/// File name of a picture that is kept for the report.
pub(super) fn image_name(balanced: bool, profession: usize, index: usize) -> String {
    format!("{}-{profession:02}-{index}.jpg", if balanced { "balanced" } else { "plain" })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::Subject;

    pub(in super::super) fn possible() -> Settings {
        Settings {
            model: "m".into(),
            fingerprint: String::new(),
            judges: vec![],
            groups: vec![],
            concepts: vec![],
            shares: vec![],
            strengths: Vec::new(),
            prompts: vec![("nurse".into(), vec!["a nurse".into()]), ("cook".into(), vec!["a cook".into()])],
            images: 3,
            sampler: "DDIM".into(),
            steps: 2,
            guidance: 7.5,
            seed: u64::MAX - 6,
            command: String::new(),
            batch: 1,
            shard: (0, 1),
        }
    }

    #[test]
    fn impossible_settings_are_refused() {
        let possible = possible();
        possible.check(&[]).unwrap();
        let refused = |field, change: fn(&mut Settings)| {
            let mut settings = possible.clone();
            change(&mut settings);
            assert_eq!(settings.check(&[]).unwrap_err().subject(), &Subject::Field(field));
        };
        refused("images", |settings| settings.images = 0);
        refused("images", |settings| settings.images = 1_000_001);
        refused("guidance", |settings| settings.guidance = f32::NAN);
        refused("prompts", |settings| settings.prompts[1].0 = settings.prompts[0].0.clone());
        refused("prompts", |settings| settings.prompts.clear());
        refused("prompts", |settings| settings.prompts[1].1.clear());
        refused("shard", |settings| settings.shard = (0, 0));
        refused("shard", |settings| settings.shard = (2, 2));
        refused("seed", |settings| settings.seed += 1);
        refused("strengths", |settings| settings.strengths = vec![vec![f32::NAN.into()]]);
        refused("groups", |settings| settings.concepts = vec![vec!["a hash".into()]]);
    }
}
