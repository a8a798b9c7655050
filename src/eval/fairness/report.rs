//! Results of a run, as JSON, CSV and a web page.

use super::super::journal::{self, read_records, read_settings};
use super::super::statistics::{count, deviation_ratio, mean_deviation_ratio};
use super::run::{Record, Settings, image_name};
use crate::{Error, Result};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::Serialize;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// The result of a run.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The settings of the run.
    pub settings: Settings,
    /// One summary per group, and if there are several groups, one of their combinations.
    pub summaries: Vec<Summary>,
}

/// The result for one group.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Summary {
    /// The classes that CLIP told apart.
    pub classes: Vec<String>,
    /// Mean deviation ratio over the professions and its 95 % interval, plain and balanced.
    pub deviation_ratio: [(f64, [f64; 2]); 2],
    /// Mean of [`Record::alignment`], plain and balanced.
    pub alignment: [f64; 2],
    /// Share of the balanced pictures that show the concept that they were given, 0 to 1.
    pub obeyed: f64,
    /// The professions that have pictures.
    pub professions: Vec<Row>,
}

/// The result for one profession, plain and balanced.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Row {
    /// The profession.
    pub name: String,
    /// Number of pictures of each class.
    pub counts: [Vec<usize>; 2],
    /// [`deviation_ratio`] of these counts.
    pub deviation_ratio: [f64; 2],
}

impl Report {
    /// Computes the result from the records of a folder.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if they are damaged, [`crate::ErrorKind::NotFound`] if there are none.
    pub fn read(folder: &Path) -> Result<Self> {
        let (settings, records): (Settings, Vec<Record>) = (read_settings(folder)?, read_records(folder)?);
        if records.is_empty() {
            return Err(Error::not_found(folder, "holds no records yet").advise("run the evaluation first"));
        }
        let sizes: Vec<usize> = settings.groups.iter().map(Vec::len).collect();
        let fits = |r: &Record| {
            let in_range = |list: &[usize]| list.len() == sizes.len() && list.iter().zip(&sizes).all(|(i, n)| i < n);
            r.profession < settings.prompts.len() && in_range(&r.seen) && in_range(&r.given)
        };
        if !records.iter().all(fits) {
            return Err(Error::damaged(folder, "the records do not belong to the settings").advise("delete the folder"));
        }
        let mut summaries: Vec<Summary> = (0..sizes.len())
            .map(|g| summary(&settings, &records, settings.groups[g].clone(), |list| list[g]))
            .collect();
        if sizes.len() > 1 {
            let joint = settings.groups.iter().skip(1).fold(settings.groups[0].clone(), |names, group| {
                names.iter().flat_map(|a| group.iter().map(move |b| format!("{a} / {b}"))).collect()
            });
            let index = |list: &[usize]| list.iter().zip(&sizes).fold(0, |i, (m, n)| i * n + m);
            summaries.push(summary(&settings, &records, joint, index));
        }
        Ok(Report { settings, summaries })
    }

    /// Writes `report.json`, `report.csv` and `report.html` into the folder.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn write(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let json = serde_json::to_string_pretty(self).unwrap_or_default() + "\n";
        let files = [("report.json", json), ("report.csv", self.csv()), ("report.html", self.html(folder))];
        let mut paths = Vec::new();
        for (name, text) in files {
            let path = folder.join(name);
            crate::files::write(&path, text.as_bytes())?;
            paths.push(path);
        }
        Ok(paths)
    }

    fn csv(&self) -> String {
        let mut out = String::from("profession,class,plain,balanced,plain_deviation_ratio,balanced_deviation_ratio\n");
        for summary in &self.summaries {
            for Row { name, counts: [plain, balanced], deviation_ratio: [before, after] } in &summary.professions {
                for (i, class) in summary.classes.iter().enumerate() {
                    let quote = |s: &str| format!("\"{}\"", s.replace('"', "\"\""));
                    let (a, b) = (plain[i], balanced[i]);
                    let _ = writeln!(out, "{},{},{a},{b},{before:.4},{after:.4}", quote(name), quote(class));
                }
            }
        }
        out
    }

    /// A short table for terminals.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for s in &self.summaries {
            let [(plain, p), (balanced, b)] = s.deviation_ratio;
            let _ = writeln!(
                out,
                "{}\n  deviation ratio  {plain:.3} [{:.3}, {:.3}] -> {balanced:.3} [{:.3}, {:.3}]\n  alignment        \
                 {:.2} -> {:.2}\n  shown as given   {:.1} %",
                s.classes.join(" | "),
                p[0],
                p[1],
                b[0],
                b[1],
                s.alignment[0],
                s.alignment[1],
                100.0 * s.obeyed
            );
        }
        out.trim_end().to_string()
    }

    fn html(&self, folder: &Path) -> String {
        let escape = |s: &str| s.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
        let mut out = String::from(
            "<!doctype html><meta charset=\"utf-8\"><title>Fairness</title><style>body{font:15px/1.5 sans-serif;\
             max-width:960px;margin:2em auto;color:#222}td,th{padding:2px 20px 2px 0;text-align:left}img{width:64px;\
             height:64px;margin:1px}svg{display:block;margin-top:1em;max-width:100%}\
             .plain{color:#c84c3c}.balanced{color:#2a6fbb}</style>\
             <h1>Fairness</h1>",
        );
        let _ = write!(
            out,
            "<p>Pictures by {}, judged by the CLIP of {}: {} of each profession, plain and balanced, {} {} steps at \
             guidance {}, concepts at weight {}. The deviation ratio is 0 if all classes are equally frequent and 1 if \
             one class has all pictures; brackets hold its 95 % interval.</p>",
            escape(&self.settings.model),
            escape(&self.settings.clip),
            self.settings.images,
            escape(&self.settings.sampler),
            self.settings.steps,
            self.settings.guidance,
            self.settings.weight
        );
        for summary in &self.summaries {
            let [plain, balanced] =
                summary.deviation_ratio.map(|(ratio, [low, high])| format!("{ratio:.3} [{low:.3}, {high:.3}]"));
            let _ = write!(
                out,
                "<h2>{}</h2><table><tr><th><th class=\"plain\">plain<th class=\"balanced\">balanced\
                 <tr><th>deviation ratio<td>{plain}<td>{balanced}<tr><th>alignment<td>{:.2}<td>{:.2}\
                 <tr><th>shown as given<td><td>{:.1} %</table>",
                escape(&summary.classes.join(" | ")),
                summary.alignment[0],
                summary.alignment[1],
                100.0 * summary.obeyed
            );
            let height = 22 * summary.professions.len();
            let _ = write!(out, "<svg width=\"900\" height=\"{height}\" font-size=\"13\" fill=\"#222\">");
            for (i, row) in summary.professions.iter().enumerate() {
                let y = 22 * i;
                let _ = write!(out, "<text x=\"0\" y=\"{}\">{}</text>", y + 14, escape(&row.name));
                for (j, ratio) in row.deviation_ratio.iter().enumerate() {
                    let (top, class) = (y + 2 + 9 * j, ["plain", "balanced"][j]);
                    let width = 640.0 * ratio;
                    let _ = write!(
                        out,
                        "<rect x=\"200\" y=\"{top}\" width=\"{width:.1}\" height=\"8\" \
                         fill=\"currentColor\" class=\"{class}\"/>\
                         <text x=\"{:.1}\" y=\"{}\" font-size=\"9\">{ratio:.2}</text>",
                        204.0 + width,
                        top + 8
                    );
                }
            }
            out.push_str("</svg>");
        }
        out.push_str("<h2>Plain, and balanced with the same seeds</h2><table>");
        for (p, (name, _)) in self.settings.prompts.iter().enumerate() {
            let mut cells = [String::new(), String::new()];
            for (cell, balanced) in cells.iter_mut().zip([false, true]) {
                for index in 0.. {
                    let path = folder.join("images").join(image_name(balanced, p, index));
                    let Ok(bytes) = std::fs::read(path) else { break };
                    let _ = write!(cell, "<img src=\"data:image/png;base64,{}\">", BASE64_STANDARD.encode(&bytes));
                }
            }
            if !cells[0].is_empty() {
                let _ = write!(out, "<tr><th>{}<td style=\"line-height:0\">{}<br>{}", escape(name), cells[0], cells[1]);
            }
        }
        out.push_str("</table>\n");
        out
    }
}

fn summary(
    settings: &Settings,
    records: &[Record],
    classes: Vec<String>,
    class: impl Fn(&[usize]) -> usize,
) -> Summary {
    let of = |balanced: bool| records.iter().filter(move |r| r.balanced == balanced);
    let answers = |balanced: bool| -> Vec<Vec<usize>> {
        let of_profession = |p| of(balanced).filter(move |r| r.profession == p).map(|r| class(&r.seen)).collect();
        (0..settings.prompts.len()).map(of_profession).collect()
    };
    let both = [answers(false), answers(true)];
    let n = classes.len();
    let alignment = [false, true].map(|b| of(b).map(|r| r.alignment).sum::<f64>() / of(b).count().max(1) as f64);
    let obeyed = of(true).filter(|r| class(&r.seen) == class(&r.given)).count() as f64 / of(true).count().max(1) as f64;
    let professions = settings
        .prompts
        .iter()
        .enumerate()
        .filter(|(p, _)| both.iter().any(|b| !b[*p].is_empty()))
        .map(|(p, (name, _))| {
            let counts = both.each_ref().map(|answers| count(answers[p].iter().copied(), n));
            Row { name: name.clone(), deviation_ratio: counts.each_ref().map(|c| deviation_ratio(c)), counts }
        })
        .collect();
    let deviation_ratio = both.map(|answers| {
        let measured: Vec<Vec<usize>> = answers.into_iter().filter(|a| !a.is_empty()).collect();
        mean_deviation_ratio(&measured, n)
    });
    Summary { classes, deviation_ratio, alignment, obeyed, professions }
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
    }
    Ok(())
}
