//! Jobs in a folder: one folder for each, one file for each part.

use super::problem;
use crate::{Error, Result};
use respodiff_serve::{Problem, Store};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The folder, which no other server can open meanwhile.
pub(super) struct Folder {
    folder: PathBuf,
    _lock: File,
}

impl Folder {
    /// Opens the folder, or makes it.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        Ok(Folder { folder: folder.to_path_buf(), _lock: crate::files::lock(folder)? })
    }

    fn part(&self, job: &str, part: &str) -> PathBuf {
        self.folder.join(job).join(format!("{part}.json"))
    }
}

impl Store for Folder {
    fn jobs(&self) -> std::result::Result<Vec<String>, Problem> {
        let names = || -> std::io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in fs::read_dir(&self.folder)? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                if name.starts_with("job-") {
                    names.push(name);
                }
            }
            names.sort();
            Ok(names)
        };
        names().map_err(|error| problem(&Error::io("read", &self.folder)(error)))
    }

    fn write(&self, job: &str, part: &str, bytes: &[u8]) -> std::result::Result<(), Problem> {
        let path = self.part(job, part);
        let folder = self.folder.join(job);
        let write = || {
            fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
            crate::files::write(&path, bytes)
        };
        write().map_err(|error| problem(&error))
    }

    fn read(&self, job: &str, part: &str) -> std::result::Result<Option<Vec<u8>>, Problem> {
        let path = self.part(job, part);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(problem(&Error::io("read", path)(error))),
        }
    }

    fn remove(&self, job: &str) -> std::result::Result<(), Problem> {
        let folder = self.folder.join(job);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(problem(&Error::io("remove", folder)(error))),
            _ => Ok(()),
        }
    }
}
