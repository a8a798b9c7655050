//! Results of a run, as JSON and text.

use super::super::statistics::{counted, mean_interval};
use super::cmmd::cmmd;
use super::fid::Moments;
use super::run::{Run, Settings};
use super::set::Record;
use crate::{Error, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The results of a run.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Fréchet inception distance, as clean-fid computes it in its mode `clean`.
    pub fid: Option<f64>,
    /// CMMD, 1000 times the squared discrepancy.
    pub cmmd: Option<f64>,
    /// CLIP score, as torchmetrics computes it: 100 times the mean cosine of pictures and prompts, at least 0.
    pub clip: Option<f64>,
    /// The 95 % interval of the CLIP score.
    pub clip_interval: Option<[f64; 2]>,
    /// Number of pictures.
    pub pictures: usize,
    /// Number of references; 0 if they are statistics.
    pub references: usize,
    /// Warnings about these results.
    pub notes: Vec<String>,
    /// The settings of the run.
    pub settings: Settings,
}

impl Report {
    /// Computes the results of what has been judged.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] if there are no pictures, [`crate::ErrorKind::Invalid`] for too few,
    /// [`crate::ErrorKind::NonFinite`].
    pub fn of(run: &Run) -> Result<Self> {
        let (pictures, references) = (run.pictures.sorted(), run.reference.sorted());
        if pictures.is_empty() {
            let folder = run.folder.clone().unwrap_or_default();
            return Err(Error::not_found(folder, "holds no pictures yet").advise("run the evaluation first"));
        }
        let (features, embedding) = run.settings.widths();
        let cut = |rows: &[(&'_ Record, &'_ [f32])], embeds: bool| -> Vec<Vec<f32>> {
            let range = if embeds { features..features + embedding } else { 0..features };
            rows.iter().map(|(_, row)| row[range.clone()].to_vec()).collect()
        };
        let mut notes = Vec::new();
        let (all, all_references) = run.settings.totals();
        if pictures.len() < all || references.len() < all_references {
            notes.push(format!(
                "{} of {all} pictures and {} of {all_references} references are judged",
                pictures.len(),
                references.len()
            ));
        }
        let wanted = features > 0 && (run.statistics.is_some() || !references.is_empty());
        let compared = wanted && pictures.len() > 1 && (run.statistics.is_some() || references.len() > 1);
        if wanted && !compared {
            notes.push("FID takes two pictures and two references or more".into());
        }
        let fid = match &run.statistics {
            _ if !compared => None,
            Some(statistics) => Some(Moments::of(&cut(&pictures, false))?.distance(statistics)?),
            None => Some(Moments::of(&cut(&pictures, false))?.distance(&Moments::of(&cut(&references, false))?)?),
        };
        let fewest = if run.statistics.is_some() { pictures.len() } else { pictures.len().min(references.len()) };
        if fid.is_some() && fewest < features {
            notes.push(format!(
                "FID of {fewest} pictures has covariances of {features} features without full rank, and is biased: \
                 compare it only with FID of as many pictures"
            ));
        }
        let cmmd =
            (embedding > 0 && !references.is_empty()).then(|| cmmd(&cut(&pictures, true), &cut(&references, true)));
        let scores: Vec<f64> = pictures.iter().filter_map(|(record, _)| record.score).collect();
        let clip = (!scores.is_empty()).then(|| mean_interval(&scores));
        if embedding > 0 && clip.is_none() {
            notes.push("the pictures have no prompts, so there is no CLIP score".into());
        }
        let results = [fid, cmmd, clip.map(|(mean, _)| mean)];
        if !results.iter().flatten().all(|x| x.is_finite()) {
            return Err(Error::non_finite("the results are not finite"));
        }
        Ok(Report {
            fid,
            cmmd,
            clip: clip.map(|(mean, _)| mean.max(0.0)),
            clip_interval: clip.map(|(_, interval)| interval.map(|x| x.max(0.0))),
            pictures: pictures.len(),
            references: references.len(),
            notes,
            settings: run.settings.clone(),
        })
    }

    /// Writes `report.json` into the folder.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        let path = folder.join("report.json");
        crate::files::write(&path, self.json().as_bytes())?;
        Ok(path)
    }

    /// All fields as JSON.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// A short table for terminals.
    pub fn text(&self) -> String {
        let weights = |fingerprint: &str| fingerprint.chars().take(8).collect::<String>();
        let mut lines = vec![match self.references {
            0 => counted(self.pictures, "picture"),
            references => format!("{}, {}", counted(self.pictures, "picture"), counted(references, "reference")),
        }];
        let inception = self.settings.inception.as_ref().map(|(fingerprint, _)| weights(fingerprint));
        let clip = self.settings.clip.as_ref().map(|(name, fingerprint, _)| format!("{name} {}", weights(fingerprint)));
        if let Some((fid, inception)) = self.fid.zip(inception) {
            lines.push(format!("  FID         {fid:9.4}   clean-fid's, Inception {inception}"));
        }
        if let Some((cmmd, clip)) = self.cmmd.zip(clip.as_ref()) {
            lines.push(format!("  CMMD        {cmmd:9.4}   {clip}"));
        }
        if let Some(((score, [low, high]), clip)) = self.clip.zip(self.clip_interval).zip(clip) {
            lines.push(format!("  CLIP score  {score:9.4}   [{low:.4}, {high:.4}], {clip}"));
        }
        lines.extend(self.notes.iter().map(|note| format!("  note: {note}")));
        lines.join("\n")
    }
}
