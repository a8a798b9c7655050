//! The hashes of a checkpoint that pictures record. A large file's SHA-256 is remembered from run to run, by path, size
//! and time of change: for SD 1.5 it takes longer than a GPU takes for everything up to the first picture.

use crate::Result;
use crate::engine::Outline;
use crate::pipeline::Hashes;
use crate::weights::Tensors;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A file's size, and its time of change in nanoseconds since 1970.
#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Version {
    bytes: u64,
    changed: u128,
}

/// The remembered hash of a checkpoint's files.
#[derive(Serialize, Deserialize)]
struct Entry {
    files: Vec<(PathBuf, Version)>,
    sha256: String,
}

/// Remembered checkpoints; beyond this number the list begins anew.
const MOST: usize = 1000;
/// Bytes of a list; longer ones are not read.
const MOST_BYTES: u64 = 16 << 20;
/// A file that changed less than this before it was hashed may change again within the same tick of its file system's
/// clock, so its hash is not remembered.
const SETTLED: Duration = Duration::from_secs(3);

/// The hashes of a checkpoint.
///
/// # Errors
/// Those of reading the weights. The list of remembered hashes is only a help: if it cannot be read or written, the
/// files are hashed.
pub(super) fn of(model: &Outline) -> Result<Hashes> {
    Hashes::of(model, sha256)
}

/// SHA-256 of the files of some weights, remembered or computed.
pub(super) fn sha256(tensors: &Tensors) -> Option<String> {
    let files = tensors.files().map(version).collect::<Option<Vec<_>>>();
    let (Some(list), Some(files)) = (list(), files.filter(|files| !files.is_empty())) else {
        return tensors.sha256();
    };
    let mut known = read(&list).unwrap_or_default();
    let key = files[0].0.clone();
    let is_hash = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if let Some(entry) = known.get(&key).filter(|entry| entry.files == files && is_hash(&entry.sha256)) {
        return Some(entry.sha256.clone());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let sha256 = tensors.sha256();
    let settled = files.iter().all(|(_, version)| version.changed < now.saturating_sub(SETTLED).as_nanos());
    if let Some(sha256) = sha256.clone().filter(|_| settled) {
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(key, Entry { files, sha256 });
        let text = serde_json::to_string(&known).unwrap_or_default();
        let folder = list.parent().unwrap_or(Path::new(""));
        let _ = std::fs::create_dir_all(folder).is_ok() && crate::files::write(&list, text.as_bytes()).is_ok();
    }
    sha256
}

/// The remembered hashes of a list that is a file of sane size.
fn read(list: &Path) -> Option<BTreeMap<PathBuf, Entry>> {
    let metadata = list.metadata().ok().filter(|metadata| metadata.is_file() && metadata.len() < MOST_BYTES)?;
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    std::fs::File::open(list).ok()?.take(MOST_BYTES).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The file of remembered hashes, in the user's folder for caches; `None` if the user has none.
fn list() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let caches = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(caches.join("respodiff").join("hashes.json"))
}

/// A file's own path, behind all links, and its version.
fn version(path: &Path) -> Option<(PathBuf, Version)> {
    let path = path.canonicalize().ok()?;
    let metadata = path.metadata().ok()?;
    let changed = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos();
    Some((path, Version { bytes: metadata.len(), changed }))
}
