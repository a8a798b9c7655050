//! Evaluation runs: CLIP judges pictures of every profession, plain and balanced, and each picture's record is written
//! at once.

use super::super::clip::{Clip, cosine};
use super::super::journal::{self, Journal, Settings as _, read_records, read_settings};
use crate::concept::{Group, assign};
use crate::engine::{Engine, Image, Request};
use crate::image::Picture;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::Path;

/// Everything that decides the pictures and their judgement. All records of a folder have the same settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Name of the checkpoint.
    pub model: String,
    /// The checkpoint's [`Engine::fingerprint`].
    pub fingerprint: String,
    /// Name of the CLIP that judges.
    pub clip: String,
    /// Its [`Clip::fingerprint`].
    pub clip_fingerprint: String,
    /// The classes of each group, the names of its concepts. CLIP chooses among these texts.
    pub groups: Vec<Vec<String>>,
    /// The [`crate::Concept::fingerprint`]s of each group: a concept that is trained further may keep its name.
    pub concepts: Vec<Vec<String>>,
    /// The wanted shares of each group's classes.
    pub shares: Vec<Vec<f64>>,
    /// Weight of the concepts in balanced pictures.
    pub weight: f32,
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
    /// Batch size; results do not depend on it.
    #[serde(skip)]
    pub batch: usize,
    /// The part of the professions that is run, counted from 0, and the number of parts.
    #[serde(skip)]
    pub shard: (usize, usize),
}

impl journal::Settings for Settings {
    fn same_run(&self, other: &Self) -> bool {
        let kept = |s: &Self| Settings { batch: 0, shard: (0, 0), ..s.clone() };
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
        if self.images == 0 {
            refused("images", "no pictures", "give 1 or more for each profession")
        } else if self.prompts.is_empty() || self.prompts.iter().any(|(_, prompts)| prompts.is_empty()) {
            refused("prompts", "a profession without prompts, or no professions", "give one prompt or more for each")
        } else if part >= parts {
            refused("shard", "its part is not below the number of parts", "count parts from 0")
        } else if seeds.is_none() {
            refused("seed", "the last picture's seed would be too large", "give a smaller first seed")
        } else if !self.weight.is_finite() {
            refused("weight", "not finite", "give a number")
        } else if !self.groups.iter().map(Vec::len).eq(groups.iter().map(|group| group.members.len())) {
            refused("groups", "the groups are not the settings' own", "give the groups that the settings name")
        } else {
            Ok(())
        }
    }

    /// The indices of these groups in the records of another run, whose plain pictures must be the same.
    fn columns(&self, other: &Path) -> Result<Vec<usize>> {
        let theirs: Settings = read_settings(other)?;
        let Settings { groups, concepts, shares, weight, .. } = theirs.clone();
        let columns: Option<Vec<usize>> =
            self.groups.iter().map(|group| groups.iter().position(|theirs| theirs == group)).collect();
        let ours = Settings { groups, concepts, shares, weight, ..self.clone() };
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
    /// Index of the class that CLIP sees in it, for each group.
    pub seen: Vec<usize>,
    /// 100 times the cosine of the embeddings of picture and prompt.
    pub alignment: f64,
}

/// Pictures of each profession that are kept for the report.
const KEPT: usize = 8;

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
        let total = 2 * self.settings.images * self.professions().count();
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
                let seen: Option<Vec<usize>> = columns.iter().map(|&c| record.seen.get(c).copied()).collect();
                let (Some(given), Some(seen)) = (given.get(index), seen) else { continue };
                if !done.contains(&(profession, record.seed)) {
                    self.journal.push(Record { given: given.clone(), seen, ..record.clone() })?;
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
        clip: &mut Clip,
        groups: &[Group],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<()> {
        self.settings.check(groups)?;
        let Settings { images, batch, .. } = self.settings;
        let classes = groups
            .iter()
            .map(|group| clip.texts(&group.members.iter().map(|m| m.metadata.concept.clone()).collect::<Vec<_>>()))
            .collect::<Result<Vec<_>>>()?;
        let options = engine.options().batch(batch).guided(self.settings.guidance > 1.0).concepts(true);
        let mut session = engine.session(options)?;
        let done: HashSet<(bool, usize, u64)> =
            self.journal.records().iter().map(|r| (r.balanced, r.profession, r.seed)).collect();
        for profession in self.professions() {
            let prompts = self.settings.prompts[profession].1.clone();
            let embeds = clip.texts(&prompts)?;
            let encoded = prompts.iter().map(|prompt| engine.encode(prompt)).collect::<Result<Vec<_>>>()?;
            let base = self.settings.seed + (profession * images) as u64;
            let given = assign(groups, images, base, false);
            for balanced in [false, true] {
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
                        let members = row.into_iter().flatten().zip(groups);
                        image.concepts = members.map(|(&m, g)| (g.members[m].clone(), self.settings.weight)).collect();
                        image
                    };
                    let request = Request::new((0..batch).map(image).collect())
                        .steps(self.settings.steps)
                        .sampler(self.settings.sampler.parse()?);
                    let mut output = session.generate(&request, &mut |_| progress(self.journal.records().len()))?;
                    output.pictures.truncate(count);
                    for ((j, image), embed) in range.zip(&output.pictures).zip(clip.images(&output.pictures)?) {
                        let seed = base + j as u64;
                        if done.contains(&(balanced, profession, seed)) {
                            continue;
                        }
                        let best = |class: &Vec<Vec<f32>>| {
                            let scores: Vec<f64> = class.iter().map(|text| cosine(text, &embed)).collect();
                            (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0)
                        };
                        self.keep(
                            Record {
                                balanced,
                                profession,
                                prompt,
                                seed,
                                given: given[j].clone(),
                                seen: classes.iter().map(best).collect(),
                                alignment: 100.0 * cosine(&embeds[prompt], &embed),
                            },
                            image,
                            j,
                        )?;
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
            image.save_png(&self.journal.folder().join("images").join(name), &[])?;
        }
        self.journal.push(record)
    }
}

/// File name of a picture that is kept for the report.
pub(super) fn image_name(balanced: bool, profession: usize, index: usize) -> String {
    format!("{}-{profession:02}-{index}.png", if balanced { "balanced" } else { "plain" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Subject;

    #[test]
    fn impossible_settings_are_refused() {
        let possible = Settings {
            model: "m".into(),
            fingerprint: String::new(),
            clip: "c".into(),
            clip_fingerprint: String::new(),
            groups: vec![],
            concepts: vec![],
            shares: vec![],
            weight: 1.0,
            prompts: vec![("nurse".into(), vec!["a nurse".into()]), ("cook".into(), vec!["a cook".into()])],
            images: 3,
            sampler: "DDIM".into(),
            steps: 2,
            guidance: 7.5,
            seed: u64::MAX - 6,
            batch: 1,
            shard: (0, 1),
        };
        possible.check(&[]).unwrap();
        let refused = |field, change: fn(&mut Settings)| {
            let mut settings = possible.clone();
            change(&mut settings);
            assert_eq!(settings.check(&[]).unwrap_err().subject(), &Subject::Field(field));
        };
        refused("images", |settings| settings.images = 0);
        refused("prompts", |settings| settings.prompts.clear());
        refused("prompts", |settings| settings.prompts[1].1.clear());
        refused("shard", |settings| settings.shard = (0, 0));
        refused("shard", |settings| settings.shard = (2, 2));
        refused("seed", |settings| settings.seed += 1);
        refused("seed", |settings| settings.images = usize::MAX);
        refused("weight", |settings| settings.weight = f32::NAN);
        refused("groups", |settings| settings.groups = vec![vec!["a woman".into()]]);
    }
}
