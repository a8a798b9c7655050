//! The journal of a run: its folder holds the settings, and one line of JSON for each record. A run that is killed goes
//! on from its last whole record, and the parts of a run can be merged.

use crate::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::hash::Hash;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The file of a run's settings.
pub(super) const SETTINGS: &str = "settings.json";

/// The settings of a run, of which all records of a folder have the same.
pub(super) trait Settings: Serialize + DeserializeOwned {
    /// True if the records of both runs may be mixed, whatever batch or shard makes them.
    fn same_run(&self, other: &Self) -> bool;
}

/// The records of a folder, and the file that takes further ones.
pub(super) struct Journal<R> {
    folder: PathBuf,
    records: Vec<R>,
    file: File,
    _lock: File,
}

impl<R: Serialize + DeserializeOwned> Journal<R> {
    /// Begins a journal in a folder, or continues that of the same settings. No other process can open it meanwhile.
    pub(super) fn open<S: Settings>(folder: &Path, settings: &S) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let lock = crate::files::lock(folder)?;
        let path = folder.join(SETTINGS);
        if !path.exists() {
            write_settings(folder, settings)?;
        } else if !read_settings::<S>(folder)?.same_run(settings) {
            return Err(
                Error::mismatch(folder, "holds a run of other settings").advise("give another folder, or delete it")
            );
        }
        let records = read_records(folder)?;
        // The records are written again, without a last line that was cut off.
        let path = folder.join("records.jsonl");
        let lines: String = records.iter().map(line).collect();
        crate::files::write(&path, lines.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(Error::io("write", &path))?;
        Ok(Journal { folder: folder.to_path_buf(), records, file, _lock: lock })
    }

    /// The folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The records so far.
    pub(super) fn records(&self) -> &[R] {
        &self.records
    }

    /// Adds a record at the end.
    pub(super) fn push(&mut self, record: R) -> Result<()> {
        self.file.write_all(line(&record).as_bytes()).map_err(Error::io("write", &self.folder))?;
        self.records.push(record);
        Ok(())
    }
}

fn line(record: &impl Serialize) -> String {
    serde_json::to_string(record).unwrap_or_default() + "\n"
}

/// Writes the settings of a folder.
pub(super) fn write_settings(folder: &Path, settings: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(settings).unwrap_or_default();
    crate::files::write(&folder.join(SETTINGS), text.as_bytes())
}

/// Reads the settings of a folder.
pub(super) fn read_settings<S: DeserializeOwned>(folder: &Path) -> Result<S> {
    let path = folder.join(SETTINGS);
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    serde_json::from_str(&text).map_err(|e| match e.classify() {
        serde_json::error::Category::Data => {
            Error::mismatch(&path, "holds the settings of a run of another kind or version")
        }
        _ => Error::damaged(&path, format!("not a run's settings: {e}")),
    })
}

/// Reads the records of a folder. A last line without its end is left out; a damaged line is an error.
pub(super) fn read_records<R: DeserializeOwned>(folder: &Path) -> Result<Vec<R>> {
    let path = folder.join("records.jsonl");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line)
            .map_err(|e| Error::damaged(&path, format!("line {} is damaged ({e})", i + 1)).advise("delete that line"))
    };
    whole.lines().enumerate().map(parse).collect()
}

/// Creates the folder of a merged run, which must not hold a run yet.
pub(super) fn begin_merged(out: &Path) -> Result<()> {
    if out.join(SETTINGS).exists() {
        return Err(Error::mismatch(out, "holds a run already").advise("give another folder, or delete it"));
    }
    std::fs::create_dir_all(out).map_err(Error::io("create", out))
}

/// Merges the settings and records of the parts of a run, in `folders`, into the folder `out`. Records of the same key
/// are one.
pub(super) fn merge<S: Settings, R: Serialize + DeserializeOwned, K: Hash + Eq>(
    folders: &[PathBuf],
    out: &Path,
    key: impl Fn(&R) -> K,
) -> Result<()> {
    let Some(first) = folders.first() else {
        return Err(Error::invalid("folders", "nothing to merge").advise("give folders of evaluations"));
    };
    let settings: S = read_settings(first)?;
    let mut seen = HashSet::new();
    let mut lines = String::new();
    for folder in folders {
        if !read_settings::<S>(folder)?.same_run(&settings) {
            return Err(Error::mismatch(folder, format!("holds another run than {}", first.display())));
        }
        for record in read_records(folder)? {
            if seen.insert(key(&record)) {
                lines += &line(&record);
            }
        }
    }
    // Nothing is created before all parts have been read.
    begin_merged(out)?;
    write_settings(out, &settings)?;
    crate::files::write(&out.join("records.jsonl"), lines.as_bytes())
}
