//! An audit: how far a model's own pictures are from the wanted shares, before any concept is trained.

use super::deviation::{Measure, drawn, share_as_far};
use super::report::{Report, Row, shown};
use crate::Result;
use serde::Serialize;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// The p below which a finding counts as off.
const SIGNIFICANT: f64 = 0.01;
/// Professions that the text names for each finding.
const NAMED: usize = 5;

/// The result of an audit.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Audit {
    /// Name of the checkpoint.
    pub model: String,
    /// The checkpoint's fingerprint.
    pub fingerprint: String,
    /// For each judge one finding per group, and if there are several groups, one about their combinations.
    pub findings: Vec<Finding>,
    /// Number of pictures that are still to be made, by other shards or after an interruption.
    pub missing: usize,
}

/// A judge's findings about one group in the pictures.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// The judge's name.
    pub judge: String,
    /// The classes that it told apart.
    pub classes: Vec<String>,
    /// The wanted share of each class.
    pub shares: Vec<f64>,
    /// Mean deviation ratio over the professions or prompts.
    pub deviation_ratio: Measure,
    /// The ratio to be expected of as many pictures whose classes are drawn from the shares.
    pub chance: f64,
    /// The probability of a ratio that is as large or larger, if classes were drawn from the shares.
    pub p: f64,
    /// True if `p` is below 0.01.
    pub is_off: bool,
    /// The professions or prompts, those furthest from the shares first.
    pub professions: Vec<Profession>,
}

/// The classes in the pictures of one profession or prompt.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Profession {
    /// The profession or prompt.
    pub name: String,
    /// Number of pictures of each class.
    pub counts: Vec<usize>,
    /// The deviation ratio of these counts.
    pub deviation_ratio: Measure,
}

impl Audit {
    /// Computes the result from the records of a run's plain pictures.
    ///
    /// # Errors
    /// Those of [`Report::read`].
    pub fn read(folder: &Path) -> Result<Self> {
        let Report { settings, summaries, missing, .. } = Report::read(folder)?;
        let findings = summaries.into_iter().map(|summary| {
            let plain = |Row { name, counts: [counts, _], deviation_ratio: [ratio, _] }| Profession {
                name,
                counts,
                deviation_ratio: ratio,
            };
            let mut professions: Vec<Profession> = summary.professions.into_iter().map(plain).collect();
            professions.sort_by(|a, b| b.deviation_ratio.value.total_cmp(&a.deviation_ratio.value));
            let totals: Vec<usize> = professions.iter().map(|p| p.counts.iter().sum()).collect();
            let drawn = drawn(&totals, &summary.shares);
            let [measured, _] = summary.deviation_ratio;
            let p = share_as_far(&drawn, measured.value);
            Finding {
                judge: summary.judge,
                classes: summary.classes,
                shares: summary.shares,
                deviation_ratio: measured,
                chance: drawn.iter().sum::<f64>() / drawn.len() as f64,
                p,
                is_off: p < SIGNIFICANT,
                professions,
            }
        });
        let findings = findings.collect();
        Ok(Audit { model: settings.model, fingerprint: settings.fingerprint, findings, missing })
    }

    /// Writes `audit.json` into the folder.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        let path = folder.join("audit.json");
        crate::files::write(&path, self.json().as_bytes())?;
        Ok(path)
    }

    /// All fields as JSON.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// A short table for terminals.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let several = self.findings.iter().any(|finding| finding.judge != self.findings[0].judge);
        for finding in &self.findings {
            let judge = if several { format!(", by {}", finding.judge) } else { String::new() };
            let verdict = if finding.is_off { "off" } else { "not off" };
            let _ = writeln!(out, "{}{judge}: {verdict}", finding.classes.join(" | "));
            let (ratio, chance, p) = (shown(finding.deviation_ratio), finding.chance, finding.p);
            let _ = writeln!(out, "  deviation ratio  {ratio}; drawn by chance {chance:.3}, p {p:.3}");
            for Profession { name, counts, .. } in finding.professions.iter().take(NAMED).filter(|_| finding.is_off) {
                let total = counts.iter().sum::<usize>().max(1);
                let share = |(class, &n): (&String, &usize)| format!("{class} {:.0} %", percent(n, total));
                let shares: Vec<String> = finding.classes.iter().zip(counts).map(share).collect();
                let _ = writeln!(out, "  {name:<16} {}", shares.join(", "));
            }
        }
        if self.missing > 0 {
            let _ = writeln!(out, "these figures are of a part: pictures missing: {}", self.missing);
        }
        out.trim_end().to_string()
    }
}

fn percent(count: usize, total: usize) -> f64 {
    100.0 * count as f64 / total as f64
}
