//! The adapters that clients may ask for: the files of a folder, by their names without the ending.

use super::models::locked;
use crate::weights::{Adapter, stem};
use crate::{Error, ErrorKind, Result, Subject};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

/// Time of change and size of a file.
type Version = (Option<SystemTime>, u64);

/// The folder. Its files may come and change while the server runs.
pub(super) struct Loras {
    folder: PathBuf,
    /// The adapters that were asked for, which are mapped and not read into memory.
    opened: Mutex<BTreeMap<PathBuf, (Version, Arc<Adapter>)>>,
}

impl Loras {
    /// # Errors
    /// [`ErrorKind::Io`] if the folder cannot be read.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        Adapter::files(folder)?;
        Ok(Loras { folder: folder.to_path_buf(), opened: Mutex::default() })
    }

    /// The names of the adapters, with their files.
    pub(super) fn names(&self) -> BTreeMap<String, PathBuf> {
        let files = Adapter::files(&self.folder).unwrap_or_default();
        // Of two files of one name the first is meant.
        files.into_iter().rev().map(|file| (stem(&file), file)).collect()
    }

    /// The adapter of a name. A name with the separator of a path is that of no file in the folder.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], and those of [`Adapter::load`].
    pub(super) fn find(&self, name: &str) -> Result<Arc<Adapter>> {
        let names = self.names();
        let Some(file) = names.get(name) else {
            let near = |known: &&String| strsim::jaro_winkler(known, name);
            let nearest = names.keys().max_by(|a, b| near(a).total_cmp(&near(b)));
            let advice = nearest.map_or("this server has none".into(), |nearest| format!("the nearest is `{nearest}`"));
            return Err(none(name).advise(advice));
        };
        let metadata = file.metadata().map_err(Error::io("read", file))?;
        let version = (metadata.modified().ok(), metadata.len());
        if let Some((_, adapter)) = locked(&self.opened).get(file).filter(|(known, _)| *known == version) {
            return Ok(adapter.clone());
        }
        let adapter = Arc::new(Adapter::load(file)?);
        locked(&self.opened).insert(file.clone(), (version, adapter.clone()));
        Ok(adapter)
    }
}

/// The error about a name that nothing has.
fn none(name: &str) -> Error {
    let name: String = name.chars().take(80).collect();
    Error::not_found(Subject::Field("loras"), format!("there is no LoRA `{name}` here"))
}

/// Finds an adapter in the folder of a server, if it has one.
pub(super) fn find(loras: Option<&Loras>, name: &str) -> Result<Arc<Adapter>> {
    let found = match loras {
        Some(loras) => loras.find(name),
        None => Err(none(name).advise("this server has none; its --lora-folder names a folder of them")),
    };
    found.map_err(of_loras)
}

/// The error about adapters, of which clients know the field and not the files.
pub(super) fn of_loras(error: Error) -> Error {
    match (error.subject(), error.kind()) {
        (Subject::File(path), ErrorKind::Mismatch | ErrorKind::Damaged | ErrorKind::Unsupported) => {
            let problem = format!("`{}`: {}", stem(path), error.problem());
            let named = Error::new(error.kind(), Subject::Field("loras"), problem);
            match error.advice() {
                Some(advice) => named.advise(advice.to_string()),
                None => named,
            }
        }
        _ => error.of_field("loras"),
    }
}
