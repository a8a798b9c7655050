//! Policies of a server: concepts that every picture gets, and quotas over the stream of pictures.
//!
//! ```toml
//! [[always]]
//! concept = "violence"      # a safety concept, with `weight = 1.5` or its own
//!
//! [[quota]]
//! concepts = ["woman", "man"]
//! shares = [0.5, 0.5]       # even by default
//! ```

use super::super::concepts::Used;
use crate::concept::{Concept, Group};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most combinations of the quotas' concepts.
const MOST_COMBINATIONS: usize = 1 << 16;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    always: Vec<Always>,
    #[serde(default)]
    quota: Vec<Quota>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Always {
    concept: String,
    weight: Option<f32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Quota {
    concepts: Vec<String>,
    shares: Option<Vec<f64>>,
}

/// The pictures that each combination of concepts has had, by the groups that were free: those of which the prompt
/// names no attribute.
#[derive(Default, Serialize, Deserialize)]
struct Counts(BTreeMap<String, Vec<u64>>);

/// A policy for one model.
pub(super) struct Policy {
    always: Vec<(String, Arc<Concept>, Option<f32>)>,
    /// Groups, and the names of their concepts.
    quotas: Vec<(Group, Vec<String>)>,
    counts: Counts,
    /// The file of the counts.
    state: PathBuf,
}

impl Policy {
    /// Reads a policy, and the counts of earlier runs from the file beside it whose name ends in `.counts`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] for a file that is no policy, [`crate::ErrorKind::NotFound`] for concepts that the
    /// server does not have, [`crate::ErrorKind::Io`].
    pub(super) fn read(path: &Path, concepts: &BTreeMap<String, Arc<Concept>>) -> Result<Self> {
        let damaged = |problem: String| Error::damaged(path, problem).advise("write [[always]] and [[quota]] tables");
        let document: Document = toml::from_str(&crate::files::read_text(path)?)
            .map_err(|problem| damaged(problem.message().replace('\n', " ")))?;
        let find = |name: &String| {
            concepts.get(name).cloned().ok_or_else(|| {
                let known: Vec<&str> = concepts.keys().map(String::as_str).collect();
                Error::not_found(path, format!("names the concept `{name}`, which this server does not have"))
                    .advise(format!("name one of {}", known.join(", ")))
            })
        };
        let mut always = Vec::new();
        for Always { concept: name, weight } in document.always {
            if weight.is_some_and(|weight| !weight.is_finite()) {
                return Err(damaged(format!("the weight of `{name}` is not finite")));
            }
            always.push((name.clone(), find(&name)?, weight));
        }
        let mut quotas = Vec::new();
        for Quota { concepts: names, shares } in document.quota {
            let members = names.iter().map(&find).collect::<Result<_>>()?;
            quotas.push((Group::new(members, shares).map_err(|error| damaged(error.to_string()))?, names));
        }
        let combinations = quotas.iter().try_fold(1usize, |all, (group, _)| all.checked_mul(group.members.len()));
        if combinations.is_none_or(|combinations| combinations > MOST_COMBINATIONS) {
            return Err(damaged("the quotas have too many combinations".into()));
        }
        let mut name = path.as_os_str().to_owned();
        name.push(".counts");
        let state = PathBuf::from(name);
        let counts = match state.exists() {
            false => Counts::default(),
            true => serde_json::from_str(&crate::files::read_text(&state)?).map_err(|problem| {
                Error::damaged(&state, format!("not the counts of a policy: {problem}"))
                    .advise("delete it to begin with no pictures counted")
            })?,
        };
        let policy = Policy { always, quotas, counts, state };
        policy.save()?;
        Ok(policy)
    }

    /// The concepts that every picture gets.
    pub(super) fn always(&self, guidance: f32) -> impl Iterator<Item = Used> {
        self.always.iter().map(move |(name, concept, weight)| {
            let mut strength = concept.strength(guidance);
            strength.weight = weight.unwrap_or(strength.weight);
            Used { concept: concept.clone(), strength, file: name.clone() }
        })
    }

    /// The concepts of the stream's next picture: one of each group of which its prompt names no attribute. They are
    /// counted, and the counts are on the disk before this returns.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] if the counts cannot be written.
    pub(super) fn next(&mut self, prompt: &str, guidance: f32) -> Result<Vec<Used>> {
        let free: Vec<usize> =
            (0..self.quotas.len()).filter(|&g| self.quotas[g].0.named_in(prompt).is_none()).collect();
        if free.is_empty() {
            return Ok(Vec::new());
        }
        let groups: Vec<&(Group, Vec<String>)> = free.iter().map(|&g| &self.quotas[g]).collect();
        // A change of the policy begins anew.
        let key = groups.iter().map(|(group, names)| format!("{}={:?}", names.join(","), group.shares));
        let key = key.collect::<Vec<_>>().join(" x ");
        let shares = combined(&groups.iter().map(|(group, _)| group.shares.clone()).collect::<Vec<_>>());
        let counts = self.counts.0.entry(key).or_insert_with(|| vec![0; shares.len()]);
        counts.resize(shares.len(), 0);
        let mut combination = owed(counts, &shares);
        counts[combination] += 1;
        let mut used = Vec::new();
        for (group, names) in groups.into_iter().rev() {
            let member = combination % names.len();
            combination /= names.len();
            let concept = group.members[member].clone();
            let strength = concept.strength(guidance);
            used.push(Used { concept, strength, file: names[member].clone() });
        }
        used.reverse();
        self.save()?;
        Ok(used)
    }

    fn save(&self) -> Result<()> {
        if self.quotas.is_empty() {
            return Ok(());
        }
        let text = serde_json::to_string_pretty(&self.counts).unwrap_or_default() + "\n";
        crate::files::write(&self.state, text.as_bytes())
    }
}

/// The shares of all combinations, the last group's members changing first.
fn combined(groups: &[Vec<f64>]) -> Vec<f64> {
    groups.iter().fold(vec![1.0], |all, group| {
        let total: f64 = group.iter().sum();
        all.iter().flat_map(|a| group.iter().map(move |share| a * share / total)).collect()
    })
}

/// The combination to which the stream owes most: the one furthest behind its share once this picture is counted. For
/// shares that are multiples of 1/N, the choice has a period of N, so any N pictures in a row have exactly these
/// shares.
fn owed(counts: &[u64], shares: &[f64]) -> usize {
    let total = counts.iter().sum::<u64>() + 1;
    let behind = |i: usize| shares[i] * total as f64 - counts[i] as f64;
    // Of equals, the first: a difference of rounding is none.
    (1..shares.len()).fold(0, |best, i| if behind(i) > behind(best) + 1e-9 { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_window_has_the_shares() {
        for groups in [
            vec![vec![1.0, 1.0]],
            vec![vec![0.6, 0.4]],
            vec![vec![1.0, 1.0], vec![1.0, 1.0, 1.0]],
            vec![vec![1.0, 1.0], vec![0.5, 0.5]],
            vec![vec![0.7, 0.2, 0.1], vec![0.75, 0.25]],
            vec![vec![1.0, 0.0]],
        ] {
            let shares = combined(&groups);
            let period = (1..=1000usize)
                .find(|&n| shares.iter().all(|s| (s * n as f64 - (s * n as f64).round()).abs() < 1e-9))
                .unwrap();
            let mut counts = vec![0; shares.len()];
            let mut stream = Vec::new();
            for _ in 0..5 * period {
                let next = owed(&counts, &shares);
                counts[next] += 1;
                stream.push(next);
            }
            for window in stream.windows(period) {
                for (member, share) in shares.iter().enumerate() {
                    let found = window.iter().filter(|&&m| m == member).count() as f64;
                    assert!((found - share * period as f64).abs() < 1e-6, "{groups:?}: {window:?}");
                }
            }
        }
    }
}
