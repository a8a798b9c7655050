//! The concepts that clients may ask for, by name: a folder's files, which may come and change while the server runs.

use super::super::warn;
use crate::concept::{Concept, Shelf};
use crate::graph::Shape;
use crate::{Error, Result, Subject};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// Concepts by name.
#[derive(Clone, Default)]
pub(super) struct Concepts(pub(super) BTreeMap<String, Arc<Concept>>);

impl Concepts {
    /// Those of the demo.
    pub(super) fn of_demo() -> Result<Self> {
        let read = |(name, _): &(&str, _)| Ok((name.to_string(), Arc::new(Concept::open(name)?)));
        respodiff_demo::CONCEPTS.iter().map(read).collect::<Result<_>>().map(Concepts)
    }

    /// Those that fit a model with such a bottleneck.
    pub(super) fn fitting(&self, shape: Shape) -> Self {
        let fits = |(_, concept): &(&String, &Arc<Concept>)| concept.modules(shape).is_ok();
        Concepts(self.0.iter().filter(fits).map(|(name, concept)| (name.clone(), concept.clone())).collect())
    }
}

impl Shelf for Concepts {
    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn find(&self, name: &str) -> Result<Arc<Concept>> {
        self.0.get(name).cloned().ok_or_else(|| {
            let near = |a: &&String| strsim::jaro_winkler(a, name);
            let nearest = self.0.keys().max_by(|a, b| near(a).total_cmp(&near(b)));
            let advice = nearest.map_or("this server has none".into(), |nearest| format!("the nearest is `{nearest}`"));
            Error::not_found(Subject::Field("concepts"), format!("there is no concept `{name}` here")).advise(advice)
        })
    }
}

/// A folder of concept files, as it was when it was looked at last.
pub(super) struct Folder {
    path: PathBuf,
    /// Time of change and size of each file.
    seen: BTreeMap<PathBuf, (Option<SystemTime>, u64)>,
    pub(super) concepts: Concepts,
}

impl Folder {
    /// Reads all files of a folder.
    ///
    /// # Errors
    /// About the first file that is not a concept.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut folder = Folder { path: path.to_path_buf(), seen: BTreeMap::new(), concepts: Concepts::default() };
        match folder.look()?.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(folder),
        }
    }

    /// Reads the files that have come or changed since the last look, and forgets those that have gone; tells if
    /// anything is different. A damaged file is a warning, and the concept stays as it was.
    pub(super) fn look_again(&mut self) -> bool {
        let before = self.seen.clone();
        match self.look() {
            Ok(errors) => errors.iter().for_each(|error| warn(&format!("{error}; what was there before is kept"))),
            // It may be back at the next look.
            Err(_) => return false,
        }
        self.seen != before
    }

    /// The errors of files that cannot be read.
    fn look(&mut self) -> Result<Vec<Error>> {
        let mut there = BTreeMap::new();
        for entry in std::fs::read_dir(&self.path).map_err(Error::io("read", &self.path))? {
            let path = entry.map_err(Error::io("read", &self.path))?.path();
            if path.extension().is_some_and(|extension| extension == "safetensors")
                && let Ok(metadata) = path.metadata()
            {
                there.insert(path, (metadata.modified().ok(), metadata.len()));
            }
        }
        let name = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut errors = Vec::new();
        for (path, version) in &there {
            if self.seen.get(path) != Some(version) {
                match Concept::load(path) {
                    Ok(concept) => {
                        self.concepts.0.insert(name(path), Arc::new(concept));
                    }
                    Err(error) => errors.push(error),
                }
            }
        }
        for gone in self.seen.keys().filter(|path| !there.contains_key(*path)) {
            self.concepts.0.remove(&name(gone));
        }
        self.seen = there;
        Ok(errors)
    }
}
