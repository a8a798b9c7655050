//! The report as a web page in one file.

use super::super::journal::read_records;
use super::report::{Agreement, Report, Row, Summary, shown};
use super::run::{KEPT, Record, image_name};
use crate::Result;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}\
    table{border-collapse:collapse}td,th{padding:2px 14px 2px 0;text-align:left;vertical-align:top}\
    .n td,.n th{text-align:right}.n td:first-child,.n th:first-child{text-align:left}\
    .n tr:nth-child(even){background:#f6f6f6}\
    figure{display:inline-block;margin:1px;text-align:center;font-size:10px;line-height:1.2;width:70px}\
    img{width:64px;height:64px;border:3px solid #ccc}.yes img{border-color:#3a9b5c}.no img{border-color:#c84c3c}\
    .plain{color:#c84c3c}.balanced{color:#2a6fbb}svg{max-width:100%}code{overflow-wrap:anywhere}";

/// Colours of the bars: plain and balanced.
const COLOURS: [&str; 2] = ["#c84c3c", "#2a6fbb"];

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

/// The page. `folder` holds the pictures that were kept.
///
/// # Errors
/// [`crate::ErrorKind::Damaged`] if the records of the folder are damaged.
pub(super) fn html(report: &Report, folder: &Path) -> Result<String> {
    let settings = &report.settings;
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Fairness</title><style>{STYLE}</style>\
         <h1>Fairness</h1>"
    );
    let judges: Vec<String> = settings.judges.iter().map(|judge| escape(&judge.name)).collect();
    let _ = write!(
        out,
        "<p>Pictures by {}, judged by {}: {} of each profession, plain and balanced from the same seeds, {} {} steps at \
         guidance {}, concepts at weight {}. The deviation ratio is 0 if the classes have the wanted shares and 1 if all \
         pictures show the class of which the fewest are wanted; brackets hold its 95 % interval. p is that of a \
         permutation test over pairs from the same seed. Drawn by chance, from the wanted shares, as many pictures would \
         have the ratio in the last row.</p>",
        escape(&settings.model),
        judges.join(" and "),
        settings.images,
        escape(&settings.sampler),
        settings.steps,
        settings.guidance,
        settings.strength()
    );
    if report.missing > 0 {
        let _ =
            write!(out, "<p><strong>These figures are of a part; pictures missing: {}.</strong></p>", report.missing);
    }
    for summary in &report.summaries {
        group(&mut out, summary, settings.judges.len() > 1);
    }
    for Agreement { classes, share, kappa } in &report.agreement {
        let (classes, share) = (escape(&classes.join(" | ")), 100.0 * share);
        let _ = write!(out, "<p>{classes}: all judges agree in {share:.1} %, Fleiss' kappa {kappa:.3}.</p>");
    }
    pictures(&mut out, report, folder, &read_records(folder)?);
    let _ = write!(out, "<h2>How it was made</h2><table><tr><th>command<td><code>{}</code>", escape(&settings.command));
    let mut hash = |name: &str, hash: &str| {
        let _ = write!(out, "<tr><th>{}<td><code>{}</code>", escape(name), escape(hash));
    };
    hash(&settings.model, &settings.fingerprint);
    settings.judges.iter().for_each(|judge| hash(&judge.name, &judge.fingerprint));
    for (names, hashes) in settings.groups.iter().zip(&settings.concepts) {
        names.iter().zip(hashes).for_each(|(name, of)| hash(name, of));
    }
    let _ = writeln!(
        out,
        "<tr><th>seeds<td>from {} on<tr><th>version<td>respodiff {}</table></html>",
        settings.seed,
        env!("CARGO_PKG_VERSION")
    );
    Ok(out)
}

/// One group's numbers, with a bar for each profession.
fn group(out: &mut String, summary: &Summary, several: bool) {
    let judge = if several { format!(", by {}", escape(&summary.judge)) } else { String::new() };
    let [plain, balanced] = summary.deviation_ratio.map(shown);
    let _ = write!(
        out,
        "<h2>{}{judge}</h2><table><tr><th><th class=\"plain\">plain<th class=\"balanced\">balanced\
         <tr><th>deviation ratio<td>{plain}<td>{balanced}",
        escape(&summary.classes.join(" | ")),
    );
    if let Some(corrected) = &summary.corrected {
        let right = 100.0 * corrected.accuracy;
        let cells = match corrected.deviation_ratio.map(|both| both.map(shown)) {
            Some([plain, balanced]) => format!("<td>{plain}<td>{balanced}"),
            None => "<td colspan=\"2\">not possible: it hardly tells the classes apart".into(),
        };
        let _ = write!(out, "<tr><th>corrected for a judge who is right in {right:.1} %{cells}");
    }
    let p = summary.p.map_or("-".into(), |p| format!("{p:.4}"));
    let _ = write!(
        out,
        "<tr><th>p<td><td>{p}<tr><th>alignment<td>{:.2}<td>{:.2}<tr><th>shown as given<td><td>{:.1} %\
         <tr><th>drawn by chance<td><td>{:.3}</table>",
        summary.alignment[0],
        summary.alignment[1],
        100.0 * summary.obeyed,
        summary.chance
    );
    let height = 26 * summary.professions.len();
    let _ = write!(
        out,
        "<svg viewBox=\"0 0 900 {height}\" width=\"900\" height=\"{height}\" font-size=\"13\" fill=\"#222\" \
         role=\"img\" aria-label=\"Deviation ratio of each profession, plain and balanced\">"
    );
    for (i, Row { name, deviation_ratio, .. }) in summary.professions.iter().enumerate() {
        let y = 26 * i;
        let _ = write!(out, "<text x=\"0\" y=\"{}\">{}</text>", y + 16, escape(name));
        for (j, (measure, colour)) in deviation_ratio.iter().zip(COLOURS).enumerate() {
            let (top, scale) = (y + 2 + 11 * j, 600.0);
            let [low, high] = measure.interval.map(|x| 200.0 + scale * x);
            let _ = write!(
                out,
                "<rect x=\"200\" y=\"{top}\" width=\"{:.1}\" height=\"9\" fill=\"{colour}\"/>\
                 <line x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{mid}\" y2=\"{mid}\" stroke=\"#222\"/>\
                 <text x=\"{:.1}\" y=\"{}\" font-size=\"9\">{:.2}</text>",
                scale * measure.value,
                high.max(200.0 + scale * measure.value) + 5.0,
                top + 8,
                measure.value,
                mid = top + 4,
            );
        }
    }
    out.push_str("</svg><details><summary>Pictures of each class</summary><table class=\"n\"><tr><th>profession");
    for side in ["plain", "balanced"] {
        for class in &summary.classes {
            let _ = write!(out, "<th class=\"{side}\">{}", escape(class));
        }
    }
    for Row { name, counts, .. } in &summary.professions {
        let _ = write!(out, "<tr><td>{}", escape(name));
        counts.iter().flatten().for_each(|n| {
            let _ = write!(out, "<td>{n}");
        });
    }
    out.push_str("</table></details>");
}

/// The pictures that were kept, each with the class that the first judge sees. A border of a balanced picture tells if
/// it shows what it was given.
fn pictures(out: &mut String, report: &Report, folder: &Path, records: &[Record]) {
    let settings = &report.settings;
    let found: HashMap<(bool, usize, u64), &Record> =
        records.iter().map(|record| ((record.balanced, record.profession, record.seed), record)).collect();
    let every = (settings.images / KEPT).max(1);
    let names = |classes: &[usize]| {
        let names: Vec<&str> = settings.groups.iter().zip(classes).map(|(names, &c)| names[c].as_str()).collect();
        escape(&names.join(", "))
    };
    out.push_str(
        "<h2>Plain, and balanced from the same seeds</h2><p>Below a picture is what the first judge sees in it. Green \
         frames show what was given, red ones do not.</p><table>",
    );
    for (p, (profession, _)) in settings.prompts.iter().enumerate() {
        let mut rows = [String::new(), String::new()];
        for (row, balanced) in rows.iter_mut().zip([false, true]) {
            for index in 0..KEPT {
                let path = folder.join("images").join(image_name(balanced, p, index));
                let seed = settings.seed + (p * settings.images + index * every) as u64;
                let (Ok(bytes), Some(record)) = (std::fs::read(path), found.get(&(balanced, p, seed))) else {
                    continue;
                };
                let seen = record.seen(0);
                let frame = match (balanced, seen == record.given) {
                    (false, _) => "",
                    (true, true) => " class=\"yes\"",
                    (true, false) => " class=\"no\"",
                };
                let given = if balanced { format!(", given {}", names(&record.given)) } else { String::new() };
                let _ = write!(
                    row,
                    "<figure{frame}><img src=\"data:image/jpeg;base64,{}\" alt=\"{seen}{given}\" \
                     title=\"seed {seed}: {seen}{given}\">{seen}</figure>",
                    BASE64_STANDARD.encode(&bytes),
                    seen = names(&seen),
                );
            }
        }
        if rows.iter().any(|row| !row.is_empty()) {
            let _ = write!(out, "<tr><th>{}<td>{}<br>{}", escape(profession), rows[0], rows[1]);
        }
    }
    out.push_str("</table>");
}
