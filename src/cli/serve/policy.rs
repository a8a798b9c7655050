//! Policies of a server: concepts that every picture gets, and quotas over the stream of pictures.
//!
//! ```toml
//! audit_prompts = false     # the audit log holds hashes of prompts alone
//!
//! [[always]]
//! concept = "violence"      # a safety concept, with `weight = 1.5` or its own
//!
//! [[quota]]
//! concepts = ["woman", "man"]
//! shares = [0.5, 0.5]       # even by default
//! scope = "tenant"          # the pictures of each tenant alone, in place of "all"
//! ```

use super::quotas::{Counts, Shares, Stream, Turn};
use super::shelf::Concepts;
use crate::concept::{Concept, Group, Shelf, Used};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most combinations of the quotas' concepts.
const MOST_COMBINATIONS: usize = 1 << 16;

/// A policy as it is written.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    /// False to leave prompts out of the audit log, but for their hashes.
    #[serde(default = "yes")]
    pub(super) audit_prompts: bool,
    #[serde(default)]
    always: Vec<Always>,
    #[serde(default)]
    pub(super) quota: Vec<Quota>,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Always {
    concept: String,
    weight: Option<f32>,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Quota {
    pub(super) concepts: Vec<String>,
    pub(super) shares: Option<Vec<f64>>,
    #[serde(default)]
    pub(super) scope: Scope,
}

/// The pictures over which a quota runs.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Scope {
    /// Those of everybody.
    #[default]
    All,
    /// Those of each tenant alone.
    Tenant,
}

/// A policy for one model.
pub(super) struct Policy {
    pub(super) document: Document,
    always: Vec<Arc<Concept>>,
    quotas: Vec<Group>,
    counts: Counts,
    /// The policy's file, and that of the counts.
    path: PathBuf,
    state: PathBuf,
}

impl Policy {
    /// Reads a policy, and the counts of earlier runs from the file beside it whose name ends in `.counts`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] for a file that is no policy, [`crate::ErrorKind::NotFound`] for concepts that the
    /// server does not have, [`crate::ErrorKind::Io`].
    pub(super) fn read(path: &Path, concepts: &Concepts) -> Result<Self> {
        let document: Document = toml::from_str(&crate::files::read_text(path)?)
            .map_err(|problem| damaged(path, problem.message().replace('\n', " ")))?;
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
        let (always, quotas) = (Vec::new(), Vec::new());
        let mut policy = Policy { document, always, quotas, counts, path: path.to_path_buf(), state };
        policy.take(concepts)?;
        policy.save()?;
        Ok(policy)
    }

    /// Takes the concepts that the policy names.
    ///
    /// # Errors
    /// If one is not there, or if a group is not possible. The policy then stays as it was.
    pub(super) fn take(&mut self, concepts: &Concepts) -> Result<()> {
        let find = |name: &String| {
            concepts.find(name).map_err(|_| {
                let known: Vec<&str> = concepts.0.keys().map(String::as_str).collect();
                let problem = format!("names the concept `{name}`, which this server does not have");
                Error::not_found(&self.path, problem).advise(format!("name one of {}", known.join(", ")))
            })
        };
        let mut always = Vec::new();
        for Always { concept, weight } in &self.document.always {
            if weight.is_some_and(|weight| !weight.is_finite()) {
                return Err(damaged(&self.path, format!("the weight of `{concept}` is not finite")));
            }
            always.push(find(concept)?);
        }
        let mut quotas = Vec::new();
        for Quota { concepts: names, shares, .. } in &self.document.quota {
            let members = names.iter().map(&find).collect::<Result<_>>()?;
            let group = Group::new(members, shares.clone());
            quotas.push(group.map_err(|error| damaged(&self.path, error.to_string()))?);
        }
        let combinations = quotas.iter().try_fold(1usize, |all, group| all.checked_mul(group.members.len()));
        if combinations.is_none_or(|combinations| combinations > MOST_COMBINATIONS) {
            return Err(damaged(&self.path, "the quotas have too many combinations".into()));
        }
        (self.always, self.quotas) = (always, quotas);
        Ok(())
    }

    /// True if a quota runs over the pictures of each tenant.
    pub(super) fn tells_tenants_apart(&self) -> bool {
        self.document.quota.iter().any(|quota| quota.scope == Scope::Tenant)
    }

    /// The concepts that every picture gets.
    pub(super) fn always(&self, guidance: f32) -> impl Iterator<Item = Used> {
        self.document.always.iter().zip(&self.always).map(move |(Always { concept: name, weight }, concept)| {
            let mut strength = concept.strength(guidance);
            strength.weight = weight.unwrap_or(strength.weight);
            Used { concept: concept.clone(), strength, file: name.clone() }
        })
    }

    /// The concepts of the stream's next picture: one of each group of which its prompt names no attribute. The turns
    /// say how they were chosen, and are to be [counted](Policy::count) when the picture is begun.
    pub(super) fn next(&self, prompt: &str, guidance: f32, tenant: Option<&str>) -> (Vec<Used>, Vec<Turn>) {
        let (mut used, mut turns) = (Vec::new(), Vec::new());
        for scope in [Scope::All, Scope::Tenant] {
            let is_free =
                |&i: &usize| self.document.quota[i].scope == scope && self.quotas[i].named_in(prompt).is_none();
            let free: Vec<usize> = (0..self.quotas.len()).filter(is_free).collect();
            if free.is_empty() {
                continue;
            }
            let groups = free.iter().map(|&i| Shares {
                concepts: self.document.quota[i].concepts.clone(),
                shares: self.quotas[i].shares.clone(),
            });
            let tenant = tenant.filter(|_| scope == Scope::Tenant).map(String::from);
            let turn = self.counts.next(Stream { tenant, groups: groups.collect() });
            for (&i, member) in free.iter().zip(turn.members()) {
                let concept = self.quotas[i].members[member].clone();
                let strength = concept.strength(guidance);
                used.push(Used { concept, strength, file: self.document.quota[i].concepts[member].clone() });
            }
            turns.push(turn);
        }
        (used, turns)
    }

    /// Counts a picture. The counts are on the disk when this returns.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] if the counts cannot be written.
    pub(super) fn count(&mut self, turns: &[Turn]) -> Result<()> {
        turns.iter().for_each(|turn| self.counts.add(turn));
        if turns.is_empty() { Ok(()) } else { self.save() }
    }

    /// Counts a picture that was begun, as the audit log tells, and not counted: the process was killed in between.
    ///
    /// # Errors
    /// Those of [`Policy::count`].
    pub(super) fn make_up(&mut self, turns: &[Turn]) -> Result<()> {
        let missing: Vec<Turn> = turns.iter().filter(|turn| self.counts.lacks(turn)).cloned().collect();
        self.count(&missing)
    }

    fn save(&self) -> Result<()> {
        if self.quotas.is_empty() {
            return Ok(());
        }
        let text = serde_json::to_string_pretty(&self.counts).unwrap_or_default() + "\n";
        crate::files::write(&self.state, text.as_bytes())
    }
}

fn damaged(path: &Path, problem: String) -> Error {
    Error::damaged(path, problem).advise("write [[always]] and [[quota]] tables")
}
