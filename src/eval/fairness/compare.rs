//! The comparison of two runs.

use super::super::statistics::counted;
use super::deviation::{Measure, mean_deviation_ratio, paired_p};
use super::report::{Classes, read, shown};
use super::run::{Record, Settings};
use crate::{Error, Result};
use serde::Serialize;
use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

/// The differences between two runs for one group, as one judge sees them, over the professions that both have.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Comparison {
    /// The judge's name.
    pub judge: String,
    /// The classes.
    pub classes: Vec<String>,
    /// The number of professions that both runs have.
    pub professions: usize,
    /// Plain pictures of both runs.
    pub plain: Difference,
    /// Balanced pictures of both runs.
    pub balanced: Difference,
}

/// One kind of pictures of two runs.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Difference {
    /// Mean deviation ratio of the first run and of the second.
    pub deviation_ratio: [Measure; 2],
    /// Mean of [`Record::alignment`] of the first run and of the second.
    pub alignment: [f64; 2],
    /// The number of pairs of pictures of the same prompt and seed.
    pub pairs: usize,
    /// The p of [`paired_p`] over these pairs; `None` without pairs.
    pub p: Option<f64>,
}

/// Compares two runs, whose folders are given, for every judge and group of classes that both have.
///
/// # Errors
/// [`crate::ErrorKind::Mismatch`] if they have no judge, group or profession in common or want other shares, and those
/// of [`super::Report::read`].
pub fn compare(folders: [&Path; 2]) -> Result<Vec<Comparison>> {
    let runs = [read(folders[0])?, read(folders[1])?];
    let [(a, _), (b, _)] = &runs;
    let common: Vec<[usize; 2]> = (a.prompts.iter().enumerate())
        .filter_map(|(i, (name, _))| Some([i, b.prompts.iter().position(|(other, _)| other == name)?]))
        .collect();
    let mut comparisons = Vec::new();
    for (i, judge) in a.judges.iter().enumerate() {
        let Some(j) = b.judges.iter().position(|other| other.fingerprint == judge.fingerprint) else { continue };
        for classes in Classes::all(a) {
            let Some(others) = Classes::all(b).into_iter().find(|other| other.names == classes.names) else { continue };
            if others.shares.iter().zip(&classes.shares).any(|(a, b)| (a - b).abs() > 1e-9) {
                let problem =
                    format!("wants other shares of {} than {}", classes.names.join(", "), folders[0].display());
                return Err(Error::mismatch(folders[1], problem).advise("compare runs that want the same"));
            }
            let sides = [(&runs[0], i, &classes), (&runs[1], j, &others)];
            comparisons.push(Comparison {
                judge: judge.name.clone(),
                professions: common.len(),
                plain: difference(sides, &common, false),
                balanced: difference(sides, &common, true),
                classes: classes.names,
            });
        }
    }
    if comparisons.is_empty() || common.is_empty() {
        let problem = format!("has no judge, group or profession in common with {}", folders[0].display());
        return Err(Error::mismatch(folders[1], problem));
    }
    Ok(comparisons)
}

/// One run, the index of the judge in it, and the classes.
type Side<'a> = (&'a (Settings, Vec<Record>), usize, &'a Classes);

fn difference(sides: [Side; 2], common: &[[usize; 2]], balanced: bool) -> Difference {
    let shares = &sides[0].2.shares;
    let mut counts = [0; 2].map(|_| vec![vec![0; shares.len()]; common.len()]);
    /// Place of the profession, and the class.
    type Seen = (usize, usize);
    let mut pictures: HashMap<(&str, u64), [Option<Seen>; 2]> = HashMap::new();
    let mut alignment = [0.0; 2];
    for (side, ((settings, records), judge, classes)) in sides.into_iter().enumerate() {
        let mut number = 0;
        for record in records.iter().filter(|record| record.balanced == balanced) {
            let Some(place) = common.iter().position(|both| both[side] == record.profession) else { continue };
            let class = classes.of(&record.seen(judge));
            counts[side][place][class] += 1;
            alignment[side] += f64::from(record.alignment[judge]);
            number += 1;
            let prompt = &settings.prompts[record.profession].1[record.prompt];
            pictures.entry((prompt, record.seed)).or_default()[side] = Some((place, class));
        }
        alignment[side] /= f64::from(number.max(1));
    }
    let mut paired = vec![Vec::new(); common.len()];
    for pair in pictures.values() {
        if let [Some((place, first)), Some((_, second))] = pair {
            paired[*place].push([*first, *second]);
        }
    }
    // A map's order changes from run to run, and the test draws in the order of the pairs.
    paired.iter_mut().for_each(|pairs| pairs.sort_unstable());
    paired.retain(|pairs| !pairs.is_empty());
    let pairs = paired.iter().map(Vec::len).sum();
    let measured = counts.map(|side| side.into_iter().filter(|n| n.iter().sum::<usize>() > 0).collect::<Vec<_>>());
    Difference {
        deviation_ratio: measured.map(|side| mean_deviation_ratio(&side, shares)),
        alignment,
        pairs,
        p: (pairs > 0).then(|| paired_p(&paired, shares)),
    }
}

/// Short tables for terminals.
pub fn text(comparisons: &[Comparison]) -> String {
    let mut out = String::new();
    for Comparison { judge, classes, professions, plain, balanced } in comparisons {
        let _ = writeln!(out, "{}, by {judge}, {}", classes.join(" | "), counted(*professions, "profession"));
        for (name, Difference { deviation_ratio, alignment: [a, b], pairs, p }) in
            [("plain", plain), ("balanced", balanced)]
        {
            let [first, second] = deviation_ratio.map(shown);
            let p = p.map_or("no pairs".into(), |p| format!("p {p:.4} over {pairs} pairs"));
            let _ = writeln!(out, "  {name:9} {first} -> {second}, {p}; alignment {a:.2} -> {b:.2}");
        }
    }
    out.trim_end().to_string()
}
