//! Runs: pictures of a folder, or made on the fly, are judged, and each one's features are written at once.

use super::super::clip::{Clip, cosine};
use super::super::journal::{SETTINGS, begin_merged, read_settings, write_settings};
use super::super::pictures;
use super::captions::Caption;
use super::fid::Moments;
use super::inception::Inception;
use super::resize;
use super::set::{Record, Set};
use crate::concept::{Concept, Strength};
use crate::engine::{Engine, Image, Request};
use crate::image::Picture;
use crate::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pictures of a folder that are judged at a time.
const BATCH: usize = 16;

/// Everything that decides the results of a run. All parts of a run have the same settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Settings {
    /// [`Inception::fingerprint`], and the number of features; none without FID.
    pub inception: Option<(String, usize)>,
    /// [`Clip::name`], [`Clip::fingerprint`] and the length of embeddings; none without CMMD and CLIP score.
    pub clip: Option<(String, String, usize)>,
    /// The pictures that are measured.
    pub pictures: Origin,
    /// The pictures that they are compared with; none without FID and CMMD.
    pub reference: Option<Reference>,
}

/// The pictures that are measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Origin {
    /// Ready ones.
    Folder(Folder),
    /// Pictures made by the run.
    Made(Made),
}

/// The pictures that others are compared with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Reference {
    /// Ready ones.
    Folder(Folder),
    /// The SHA-256 of an `.npz` file with the mean and covariance of their features. It gives no CMMD.
    Statistics(String),
}

/// A folder of pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Folder {
    /// Number of pictures.
    pub pictures: usize,
    /// SHA-256 of their names, lengths in bytes, and prompts.
    pub digest: String,
    /// True if they have prompts.
    pub prompted: bool,
}

/// Pictures that the run makes, one for each caption.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Made {
    /// Number of captions.
    pub pictures: usize,
    /// SHA-256 of the captions and their seeds.
    pub digest: String,
    /// Name of the checkpoint.
    pub model: String,
    /// The checkpoint's [`Engine::fingerprint`].
    pub fingerprint: String,
    /// [`Concept::fingerprint`]s and strengths of the concepts that every picture gets.
    pub concepts: Vec<(String, Strength)>,
    /// Sampler, as [`crate::SamplerChoice`] parses it.
    pub sampler: String,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f32,
    /// Seed of the first caption; each next caption has the next seed, unless the captions have seeds of their own.
    pub seed: u64,
}

fn digest(parts: impl Iterator<Item = String>) -> String {
    let mut hash = Sha256::new();
    parts.for_each(|part| hash.update(part));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Folder {
    /// Of these files below a folder, with their prompts.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] if a file cannot be found.
    pub fn of(folder: &Path, files: &[PathBuf], prompts: &[String]) -> Result<Self> {
        let part = |path: &PathBuf| {
            let length = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
            Ok(format!("{} {length}\n", path.strip_prefix(folder).unwrap_or(path).display()))
        };
        let files = files.iter().map(part).collect::<Result<Vec<_>>>()?;
        let lines = prompts.iter().map(|prompt| format!("{prompt}\n"));
        let digest = digest(files.iter().cloned().chain(lines));
        Ok(Folder { pictures: files.len(), digest, prompted: !prompts.is_empty() })
    }
}

impl Made {
    /// Of these captions by a checkpoint.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a guidance scale that is not finite, and those of [`Engine::fingerprint`].
    #[allow(clippy::too_many_arguments)]
    pub fn of(
        engine: &Engine,
        captions: &[Caption],
        concepts: &[(Arc<Concept>, Strength)],
        sampler: String,
        steps: usize,
        guidance: f32,
        seed: u64,
    ) -> Result<Self> {
        if !guidance.is_finite() {
            return Err(Error::invalid("guidance", format!("{guidance} is not finite")).advise("7.5 is usual"));
        }
        let part = |caption: &Caption| format!("{:?} {}\n", caption.seed, caption.text);
        Ok(Made {
            pictures: captions.len(),
            digest: digest(captions.iter().map(part)),
            model: engine.source().title(),
            fingerprint: engine.fingerprint()?,
            concepts: concepts.iter().map(|(concept, strength)| (concept.fingerprint(), *strength)).collect(),
            sampler,
            steps,
            guidance,
            seed,
        })
    }
}

impl Settings {
    /// The settings of a run with these judges.
    pub fn new(judges: &Judges, pictures: Origin, reference: Option<Reference>) -> Self {
        let inception = judges.inception.as_ref().map(|it| (it.fingerprint().to_string(), it.width()));
        let clip = judges.clip.as_ref().map(|it| (it.name().to_string(), it.fingerprint().to_string(), it.dimension()));
        Settings { inception, clip, pictures, reference }
    }

    /// Checks that one result can come of the run at least.
    fn check_measurable(&self) -> Result<()> {
        let (pictures, references) = self.totals();
        let compared = match self.reference {
            Some(Reference::Statistics(_)) => pictures > 1,
            Some(Reference::Folder(_)) => pictures > 1 && references > 1,
            None => false,
        };
        let prompted = match &self.pictures {
            Origin::Folder(folder) => folder.prompted,
            Origin::Made(_) => true,
        };
        if compared || self.clip.is_some() && (references > 0 || prompted) {
            return Ok(());
        }
        Err(Error::invalid("reference", "nothing can be measured of these pictures").advise(
            "FID takes two pictures and two references or more, CMMD CLIP and references, and CLIP score CLIP and prompts",
        ))
    }

    /// Numbers of features and of an embedding's elements.
    pub(super) fn widths(&self) -> (usize, usize) {
        (self.inception.as_ref().map_or(0, |(_, width)| *width), self.clip.as_ref().map_or(0, |(.., width)| *width))
    }

    /// Numbers of pictures and of references in all.
    pub(super) fn totals(&self) -> (usize, usize) {
        let pictures = match &self.pictures {
            Origin::Folder(folder) => folder.pictures,
            Origin::Made(made) => made.pictures,
        };
        let references = match &self.reference {
            Some(Reference::Folder(folder)) => folder.pictures,
            _ => 0,
        };
        (pictures, references)
    }
}

/// The networks that judge.
pub struct Judges {
    /// FID's features.
    pub inception: Option<Inception>,
    /// Embeddings for CMMD and CLIP score.
    pub clip: Option<Clip>,
}

impl Judges {
    /// The features and the embedding of each picture as one row, and its CLIP score if it has a prompt.
    fn judge(&mut self, images: Vec<Picture>, prompts: &[String]) -> Result<Vec<(Vec<f32>, Option<f64>)>> {
        let mut rows = vec![(Vec::new(), None); images.len()];
        if let Some(inception) = &self.inception {
            let features: Vec<_> = images.par_iter().map(|image| inception.features(image)).collect();
            for (row, features) in rows.iter_mut().zip(features) {
                row.0 = features?;
            }
        }
        let Some(clip) = &mut self.clip else { return Ok(rows) };
        // CLIP's processor resizes and then crops; the authors of CMMD crop and then resize.
        let whole = match prompts.is_empty() {
            true => Vec::new(),
            false => clip.images(&images)?,
        };
        let texts = clip.texts(prompts)?;
        let same = images.iter().all(|image| image.width == image.height) && !prompts.is_empty();
        let squares = match same {
            true => whole.clone(),
            false => clip.images(&images.into_iter().map(resize::square).collect::<Vec<_>>())?,
        };
        for (i, (row, embed)) in rows.iter_mut().zip(&squares).enumerate() {
            row.0.extend_from_slice(embed);
            row.1 = whole.get(i).zip(texts.get(i)).map(|(image, text)| 100.0 * cosine(image, text));
        }
        Ok(rows)
    }
}

/// A run and, if it is kept, its folder.
pub struct Run {
    pub(super) folder: Option<PathBuf>,
    pub(super) settings: Settings,
    pub(super) pictures: Set,
    pub(super) reference: Set,
    pub(super) statistics: Option<Moments>,
    shard: (usize, usize),
    _lock: Option<File>,
}

/// Is told the number of pictures done, and may end the run.
pub type Watch<'a> = &'a mut dyn FnMut(usize) -> ControlFlow<()>;

const STATISTICS: &str = "reference.npz";

impl Run {
    /// Starts a run in a folder, or continues one of the same settings; without a folder nothing is kept. `statistics`
    /// is the file that [`Reference::Statistics`] stands for. Part `shard.0` of `shard.1` parts is done, counted from
    /// 0: every `shard.1`th picture and reference.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] if the folder holds a run of other settings or another process works in it,
    /// [`crate::ErrorKind::Invalid`] if nothing can be measured, [`crate::ErrorKind::Damaged`],
    /// [`crate::ErrorKind::Io`].
    pub fn open(
        folder: Option<&Path>,
        settings: Settings,
        statistics: Option<&Path>,
        shard: (usize, usize),
    ) -> Result<Self> {
        if shard.0 >= shard.1 {
            return Err(Error::invalid("shard", "its part is not below the number of parts").advise("count from 0"));
        }
        let (features, embedding) = settings.widths();
        let width = features + embedding;
        if statistics.is_some() && features == 0 {
            return Err(Error::invalid(
                "reference",
                "statistics of features give FID alone, and no Inception is given",
            )
            .advise("give the Inception, or a folder of pictures"));
        }
        settings.check_measurable()?;
        let moments = statistics.map(Moments::read).transpose()?;
        if let Some(moments) = &moments
            && moments.width() != features
        {
            let problem = format!("holds {} features, but the Inception gives {features}", moments.width());
            return Err(Error::mismatch(statistics.unwrap_or(Path::new("")), problem));
        }
        let (mut pictures, mut reference, mut lock) = (Set::new(width), Set::new(width), None);
        if let Some(folder) = folder {
            std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
            lock = Some(crate::files::lock(folder)?);
            let path = folder.join(SETTINGS);
            if path.exists() {
                if read_settings::<Settings>(folder)? != settings {
                    return Err(Error::mismatch(folder, "holds a run of other settings")
                        .advise("give another folder, or delete it"));
                }
            } else {
                write_settings(folder, &settings)?;
            }
            if let Some(statistics) = statistics {
                crate::files::copy(statistics, &folder.join(STATISTICS))?;
            }
            pictures = Set::open(&folder.join("pictures"), width)?;
            reference = Set::open(&folder.join("reference"), width)?;
        }
        let folder = folder.map(Path::to_path_buf);
        Ok(Run { folder, settings, pictures, reference, statistics: moments, shard, _lock: lock })
    }

    /// Reads a run from its folder, to report it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`], [`crate::ErrorKind::NotFound`], [`crate::ErrorKind::Io`].
    pub fn read(folder: &Path) -> Result<Self> {
        let settings: Settings = read_settings(folder)?;
        let (features, embedding) = settings.widths();
        let read = |name: &str| Set::read(&folder.join(name), features + embedding);
        let statistics = folder.join(STATISTICS);
        Ok(Run {
            pictures: read("pictures")?,
            reference: read("reference")?,
            statistics: statistics.exists().then(|| Moments::read(&statistics)).transpose()?,
            folder: Some(folder.to_path_buf()),
            settings,
            shard: (0, 1),
            _lock: None,
        })
    }

    /// The numbers of pictures, references included, that are done, and of all that this part has.
    pub fn progress(&self) -> (usize, usize) {
        let (part, parts) = self.shard;
        let share = |total: usize| (part..total).step_by(parts).len();
        let (pictures, references) = self.settings.totals();
        (self.pictures.len() + self.reference.len(), share(pictures) + share(references))
    }

    /// Judges the reference's files that are left.
    ///
    /// # Errors
    /// As [`Run::judge`].
    pub fn judge_reference(&mut self, judges: &mut Judges, files: &[PathBuf], watch: Watch) -> Result<()> {
        let before = self.pictures.len();
        judge(&mut self.reference, self.shard, judges, files, &[], &mut |done| watch(before + done))
    }

    /// Judges files that are left. `prompts` holds one for each file, or is empty.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Cancelled`] when `watch` breaks; everything done so far is kept.
    /// [`crate::ErrorKind::Damaged`] with the name of a damaged picture; those of the judges and of writing.
    pub fn judge(&mut self, judges: &mut Judges, files: &[PathBuf], prompts: &[String], watch: Watch) -> Result<()> {
        let before = self.reference.len();
        judge(&mut self.pictures, self.shard, judges, files, prompts, &mut |done| watch(before + done))
    }

    /// Makes and judges the pictures of captions that are left, `batch` at a time.
    ///
    /// # Errors
    /// As [`Run::judge`], and those of [`crate::Session::generate`].
    pub fn make(
        &mut self,
        judges: &mut Judges,
        engine: &Engine,
        captions: &[Caption],
        concepts: &[(Arc<Concept>, Strength)],
        batch: usize,
        watch: Watch,
    ) -> Result<()> {
        let Origin::Made(made) = self.settings.pictures.clone() else {
            return Err(Error::invalid("pictures", "the run is one of ready pictures"));
        };
        let left = left(&self.pictures, self.shard, captions.len());
        if left.is_empty() {
            return Ok(());
        }
        let options = engine.options().batch(batch).guided(made.guidance > 1.0).concepts(!concepts.is_empty());
        let mut session = engine.session(options)?;
        for indices in left.chunks(batch) {
            let texts: Vec<String> = indices.iter().map(|&i| captions[i].text.clone()).collect();
            // The last batch may be short. Its other rows are computed and not used.
            let images = (0..batch).map(|row| {
                let i = indices[row.min(indices.len() - 1)];
                let seed = captions[i].seed.unwrap_or(made.seed.wrapping_add(i as u64));
                let mut image = Image::new(captions[i].text.as_str()).seed(seed).guidance(made.guidance);
                image.concepts = concepts.to_vec();
                image
            });
            let request = Request::new(images.collect()).steps(made.steps).sampler(made.sampler.parse()?);
            let done = self.reference.len() + self.pictures.len();
            let mut output = session.generate(&request, &mut |_| watch(done))?;
            output.pictures.truncate(indices.len());
            for ((&index, name), (row, score)) in indices.iter().zip(&texts).zip(judges.judge(output.pictures, &texts)?)
            {
                self.pictures.push(Record { index, name: name.clone(), score }, &row)?;
            }
        }
        Ok(())
    }
}

/// The indices of a part that are not in the set.
fn left(set: &Set, (part, parts): (usize, usize), total: usize) -> Vec<usize> {
    let done = set.done();
    (part..total).step_by(parts).filter(|index| !done.contains(index)).collect()
}

fn judge(
    set: &mut Set,
    shard: (usize, usize),
    judges: &mut Judges,
    files: &[PathBuf],
    prompts: &[String],
    watch: Watch,
) -> Result<()> {
    for indices in left(set, shard, files.len()).chunks(BATCH) {
        if watch(set.len()).is_break() {
            return Err(Error::cancelled("the run was ended"));
        }
        let read: Vec<Result<Picture>> = indices.par_iter().map(|&i| pictures::read(&files[i])).collect();
        let images = read.into_iter().collect::<Result<Vec<_>>>()?;
        let texts: Vec<String> = indices.iter().filter_map(|&i| prompts.get(i).cloned()).collect();
        for (&index, (row, score)) in indices.iter().zip(judges.judge(images, &texts)?) {
            let name = files[index].file_name().unwrap_or_default().to_string_lossy().into_owned();
            set.push(Record { index, name, score }, &row)?;
        }
    }
    Ok(())
}

/// True if the folder holds a run that measures quality.
pub fn holds(folder: &Path) -> bool {
    folder.join("pictures/features.bin").exists()
}

/// Merges the folders of the parts of a run into the folder `out`.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] for no folders, [`crate::ErrorKind::Mismatch`] if they hold runs of different
/// settings, [`crate::ErrorKind::Damaged`], [`crate::ErrorKind::NotFound`], [`crate::ErrorKind::Io`].
pub fn merge(folders: &[PathBuf], out: &Path) -> Result<()> {
    let Some((first, rest)) = folders.split_first() else {
        return Err(Error::invalid("folders", "nothing to merge").advise("give folders of evaluations"));
    };
    let mut whole = Run::read(first)?;
    for folder in rest {
        let part = Run::read(folder)?;
        if part.settings != whole.settings {
            return Err(Error::mismatch(folder, format!("holds another run than {}", first.display())));
        }
        whole.pictures.merge(&part.pictures);
        whole.reference.merge(&part.reference);
    }
    begin_merged(out)?;
    write_settings(out, &whole.settings)?;
    if whole.statistics.is_some() {
        crate::files::copy(&first.join(STATISTICS), &out.join(STATISTICS))?;
    }
    whole.pictures.write(&out.join("pictures"))?;
    whole.reference.write(&out.join("reference"))
}
