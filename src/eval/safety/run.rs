//! Runs: judges look at pictures that are made for it or that lie in a folder, and each picture's record is written at
//! once.

use super::super::journal::{self, Journal, read_settings};
use super::super::pictures;
use super::prompts::List;
use super::{Judge, Verdict};
use crate::concept::{Concept, Strength};
use crate::engine::{Engine, Image, Request, Size};
use crate::image::Picture;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest number of pictures of a prompt.
const MOST_IMAGES: usize = 1_000_000;

/// Everything that decides the pictures and their judgement. All records of a folder have the same settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// `safety`, which tells the folder from that of another evaluation.
    pub evaluation: String,
    /// Version of this program.
    pub version: String,
    /// The command, for the report; it decides nothing.
    pub command: String,
    /// [`Judge::description`] of every judge.
    pub judges: Vec<serde_json::Value>,
    /// File, SHA-256 and column of the list of prompts, if there is one.
    pub prompts: Option<(String, String, Option<String>)>,
    /// The settings of making pictures; `None` for ready ones.
    pub making: Option<Making>,
    /// The folder of ready pictures, if they are not made.
    pub folder: Option<PathBuf>,
    /// The prompts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<Item>,
    /// Pictures per batch; results do not depend on it.
    #[serde(skip)]
    pub batch: usize,
    /// The part of the prompts that is run, counted from 0, and the number of parts.
    #[serde(skip)]
    pub shard: (usize, usize),
}

/// The settings of making pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Making {
    /// Name of the checkpoint.
    pub model: String,
    /// The checkpoint's [`Engine::fingerprint`].
    pub fingerprint: String,
    /// Concepts; without any, pictures are made plain only.
    pub concepts: Vec<Used>,
    /// Pictures of each prompt, plain and again with the concepts.
    pub images: usize,
    /// Sampler, as [`crate::SamplerChoice`] parses it.
    pub sampler: String,
    /// Sampling steps.
    pub steps: usize,
    /// Columns and rows of pixels.
    pub size: (usize, usize),
}

/// A concept that pictures are made with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Used {
    /// The concept's own name.
    pub name: String,
    /// [`Concept::fingerprint`].
    pub fingerprint: String,
    /// Its strength.
    #[serde(flatten)]
    pub strength: Strength,
}

/// A prompt of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// The prompt.
    pub prompt: String,
    /// Its categories.
    pub categories: Vec<String>,
    /// Seed of its first picture, if pictures are made; each next picture has the next seed.
    pub seed: u64,
    /// Guidance scale, if pictures are made.
    pub guidance: f32,
    /// Names of its ready pictures.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
}

/// The judgement of one picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Record {
    /// True if the picture was made with concepts.
    pub concepts: bool,
    /// Index of the prompt in [`Settings::items`].
    pub item: usize,
    /// Index of the picture among the prompt's.
    pub index: usize,
    /// The verdict of each judge.
    pub verdicts: Vec<Verdict>,
}

impl Record {
    /// True if one of the judges calls the picture unsafe.
    pub fn is_unsafe(&self) -> bool {
        self.verdicts.iter().any(|verdict| verdict.is_unsafe)
    }
}

impl journal::Settings for Settings {
    fn same_run(&self, other: &Self) -> bool {
        let kept = |s: &Self| Settings { command: String::new(), batch: 0, shard: (0, 0), ..s.clone() };
        kept(self) == kept(other)
    }
}

impl Settings {
    /// Pictures of a prompt, plain or with concepts.
    pub(super) fn images(&self, item: &Item) -> usize {
        self.making.as_ref().map_or(item.files.len(), |making| making.images)
    }

    /// True if pictures are made with concepts too.
    pub(super) fn compares(&self) -> bool {
        self.making.as_ref().is_some_and(|making| !making.concepts.is_empty())
    }

    fn check(&self, judges: usize) -> Result<()> {
        let refused =
            |field, problem: &'static str, advice: &'static str| Err(Error::invalid(field, problem).advise(advice));
        let (part, parts) = self.shard;
        let images = self.making.as_ref().map_or(1, |making| making.images);
        let mut used = self.making.iter().flat_map(|making| &making.concepts);
        if self.judges.is_empty() || self.judges.len() != judges {
            refused("judges", "no judges, or others than the settings name", "give one or more")
        } else if images == 0 || images > MOST_IMAGES {
            refused("images_per_prompt", "no pictures, or more than a million", "give 1 to 1,000,000 for each prompt")
        } else if self.batch == 0 {
            refused("batch", "no pictures per batch", "give 1 or more")
        } else if self.items.is_empty() {
            refused("prompts", "no prompts", "give a list with one or more")
        } else if self.making.as_ref().is_some_and(|m| m.size.0 == 0 || !m.size.0.is_multiple_of(8)) {
            refused("width", "not a multiple of 8 pixels", "give a multiple of 8")
        } else if self.making.as_ref().is_some_and(|m| m.size.1 == 0 || !m.size.1.is_multiple_of(8)) {
            refused("height", "not a multiple of 8 pixels", "give a multiple of 8")
        } else if part >= parts {
            refused("shard", "its part is not below the number of parts", "count parts from 0")
        } else if self.items.iter().any(|item| item.seed.checked_add(images as u64).is_none()) {
            refused("seed", "the last picture's seed would be too large", "give a smaller first seed")
        } else if let Some((problem, advice)) = used.find_map(|used| used.strength.problem()) {
            Err(Error::invalid("concepts", problem).advise(advice))
        } else {
            Ok(())
        }
    }
}

/// True if a folder holds a run of this evaluation.
pub fn is_run(folder: &Path) -> bool {
    read_settings::<serde_json::Value>(folder).is_ok_and(|settings| settings["evaluation"] == "safety")
}

/// The pictures of a folder, by name with numbers in order of size. If there is a list of prompts and the pictures
/// are a multiple of its prompts, so many neighbours belong to each prompt, as the official evaluation names its
/// pictures. Otherwise a picture's prompt is that in its metadata (this program's or A1111's), and the list tells the
/// categories.
///
/// # Errors
/// [`crate::ErrorKind::NotFound`] if the folder has no pictures, [`crate::ErrorKind::Mismatch`] if a picture names no
/// prompt or one that the list has not, [`crate::ErrorKind::Io`], [`crate::ErrorKind::Damaged`].
pub fn ready(folder: &Path, list: Option<&List>) -> Result<Vec<Item>> {
    let relative = |path: &PathBuf| Some(path.strip_prefix(folder).ok()?.to_str()?.to_string());
    let mut names: Vec<String> = pictures::list(folder)?.iter().filter_map(relative).collect();
    names.sort_by_cached_key(|name| (natural(name), name.clone()));
    let item = |prompt: String, categories: Vec<String>, files: Vec<String>| Item {
        prompt,
        categories,
        seed: 0,
        guidance: 0.0,
        files,
    };
    if let Some(list) = list
        && names.len().is_multiple_of(list.prompts.len())
    {
        let each = names.len() / list.prompts.len();
        let groups = list.prompts.iter().zip(names.chunks(each));
        return Ok(groups.map(|(p, files)| item(p.prompt.clone(), p.categories.clone(), files.to_vec())).collect());
    }
    let mut items: Vec<Item> = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for name in names {
        let path = folder.join(&name);
        let prompt = match pictures::prompt(&path)? {
            Some(prompt) => prompt,
            None if list.is_none() => String::new(),
            None => {
                let problem = "records no prompt, and the folder's pictures are no multiple of the list's prompts";
                return Err(Error::mismatch(path, problem).advise("give a list with a prompt for each picture"));
            }
        };
        let categories = match list.map(|list| list.prompts.iter().find(|p| p.prompt == prompt.trim())) {
            Some(Some(listed)) => listed.categories.clone(),
            Some(None) => {
                let problem = format!("was made from a prompt that the list does not have: {prompt:?}");
                return Err(Error::mismatch(path, problem).advise("give the list of these pictures"));
            }
            None => Vec::new(),
        };
        let place = *places.entry(prompt.clone()).or_insert(items.len());
        if place == items.len() {
            items.push(item(prompt, categories, Vec::new()));
        }
        items[place].files.push(name);
    }
    Ok(items)
}

/// A file's name as pieces that sort numbers by size.
fn natural(name: &str) -> Vec<(String, u64)> {
    let mut pieces = vec![(String::new(), 0u64)];
    let mut in_number = false;
    for c in name.chars() {
        let last = pieces.len() - 1;
        match c.to_digit(10) {
            Some(digit) => pieces[last].1 = pieces[last].1.saturating_mul(10).saturating_add(digit.into()),
            None if in_number => pieces.push((c.to_string(), 0)),
            None => pieces[last].0.push(c),
        }
        in_number = c.is_ascii_digit();
    }
    pieces
}

/// A run and its folder.
pub struct Safety {
    settings: Settings,
    journal: Journal<Record>,
    keep: bool,
}

impl Safety {
    /// Starts a run in a folder, or continues one of the same settings. Pictures that are made are kept in the folder
    /// `images` only if `keep` says so.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for settings that are not possible, [`crate::ErrorKind::Mismatch`] if the folder
    /// holds a run of other settings, [`crate::ErrorKind::Damaged`], [`crate::ErrorKind::Io`].
    pub fn open(folder: &Path, settings: Settings, keep: bool) -> Result<Self> {
        settings.check(settings.judges.len())?;
        let journal = Journal::open(folder, &settings)?;
        let images = folder.join("images");
        if keep {
            std::fs::create_dir_all(&images).map_err(Error::io("create", &images))?;
        }
        Ok(Safety { settings, journal, keep })
    }

    /// The number of pictures that are left to judge, and the number of all.
    pub fn left(&self) -> (usize, usize) {
        let total = self.jobs().len();
        (total.saturating_sub(self.journal.records().len()), total)
    }

    /// Prompt, index and concepts of every picture of this shard. A picture with concepts follows its plain twin.
    fn jobs(&self) -> Vec<(usize, usize, bool)> {
        let (part, parts) = self.settings.shard;
        let arms: &[bool] = if self.settings.compares() { &[false, true] } else { &[false] };
        let pictures = |i: usize| (0..self.settings.images(&self.settings.items[i])).map(move |index| (i, index));
        let items = (0..self.settings.items.len()).filter(|i| i % parts == part);
        items.flat_map(pictures).flat_map(|(i, index)| arms.iter().map(move |&arm| (i, index, arm))).collect()
    }

    /// The pictures that have no record yet, in batches.
    fn batches(&self) -> Vec<Vec<(usize, usize, bool)>> {
        let done: HashSet<_> = self.journal.records().iter().map(|r| (r.item, r.index, r.concepts)).collect();
        let left: Vec<_> = self.jobs().into_iter().filter(|job| !done.contains(job)).collect();
        left.chunks(self.settings.batch).map(<[_]>::to_vec).collect()
    }

    /// Makes and judges the pictures that are left. `concepts` are those that the settings name. `progress` gets the
    /// number of pictures done, and may end the run.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Cancelled`] when `progress` breaks; everything done so far is kept. Those of
    /// [`crate::Session::generate`], of the judges and of writing.
    pub fn make(
        &mut self,
        engine: &Engine,
        concepts: &[(Arc<Concept>, Strength)],
        judges: &mut [Box<dyn Judge>],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<()> {
        self.settings.check(judges.len())?;
        let Some(making) = self.settings.making.clone() else {
            return Err(Error::invalid("model", "this run judges ready pictures").advise("call `look`"));
        };
        if making.concepts.len() != concepts.len() {
            return Err(Error::invalid("concepts", "not the settings' own").advise("give those that the settings name"));
        }
        let guided = self.settings.items.iter().any(|item| item.guidance > 1.0);
        let batch = self.settings.batch;
        let size = Size::new(making.size.0, making.size.1);
        let options = engine.options().size(size).batch(batch).guided(guided).concepts(!concepts.is_empty());
        let mut session = engine.session(options)?;
        for jobs in self.batches() {
            let mut encoded = BTreeMap::new();
            for &(item, ..) in &jobs {
                if let std::collections::btree_map::Entry::Vacant(entry) = encoded.entry(item) {
                    entry.insert(engine.encode(&self.settings.items[item].prompt)?);
                }
            }
            // The last batch may be short. Its other rows repeat the first picture and are not used.
            let image = |j: usize| {
                let (i, index, arm) = jobs[if j < jobs.len() { j } else { 0 }];
                let item = &self.settings.items[i];
                let mut image = Image::new(&encoded[&i]).seed(item.seed + index as u64).guidance(item.guidance);
                image.concepts = if arm { concepts.to_vec() } else { Vec::new() };
                image
            };
            let request =
                Request::new((0..batch).map(image).collect()).steps(making.steps).sampler(making.sampler.parse()?);
            let done = self.journal.records().len();
            let mut output = session.generate(&request, &mut |_| progress(done))?;
            if output.pictures.len() < jobs.len() {
                return Err(Error::cancelled("stopped while pictures were decoded"));
            }
            output.pictures.truncate(jobs.len());
            self.judge(&jobs, &output.pictures, judges)?;
        }
        Ok(())
    }

    /// Judges the ready pictures that are left; as [`Safety::make`].
    ///
    /// # Errors
    /// As [`Safety::make`], and those of [`pictures::read`].
    pub fn look(
        &mut self,
        judges: &mut [Box<dyn Judge>],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<()> {
        self.settings.check(judges.len())?;
        let Some(folder) = self.settings.folder.clone() else {
            return Err(Error::invalid("images", "this run makes its pictures").advise("call `make`"));
        };
        for jobs in self.batches() {
            if progress(self.journal.records().len()).is_break() {
                return Err(Error::cancelled("stopped between pictures"));
            }
            let picture = |&(i, index, _): &(usize, usize, bool)| {
                pictures::read(&folder.join(&self.settings.items[i].files[index]))
            };
            let pictures = jobs.iter().map(picture).collect::<Result<Vec<_>>>()?;
            self.judge(&jobs, &pictures, judges)?;
        }
        Ok(())
    }

    fn judge(
        &mut self,
        jobs: &[(usize, usize, bool)],
        pictures: &[Picture],
        judges: &mut [Box<dyn Judge>],
    ) -> Result<()> {
        let verdicts = judges.iter_mut().map(|judge| judge.judge(pictures)).collect::<Result<Vec<_>>>()?;
        for (i, (&(item, index, concepts), picture)) in jobs.iter().zip(pictures).enumerate() {
            if self.keep && self.settings.making.is_some() {
                let name = format!("{item:05}-{index:02}-{}.png", if concepts { "concepts" } else { "plain" });
                picture.save_png(&self.journal.folder().join("images").join(name), &[])?;
            }
            let verdicts = verdicts.iter().map(|judge| judge[i].clone()).collect();
            self.journal.push(Record { concepts, item, index, verdicts })?;
        }
        Ok(())
    }
}
