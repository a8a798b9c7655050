//! Writing files whole or not at all.

use crate::{Error, Result};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes to a draft beside `path` and renames it: whoever reads the path finds the old file or the new one, even after
/// a power cut.
///
/// # Errors
/// [`Error::Io`]; the draft is removed.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    // Distinguishes threads; the process id distinguishes programs.
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let partial = path.with_file_name(format!(".respodiff-{}-{count}.partial", std::process::id()));
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&partial);
        Error::io("write", path)(error)
    })
}
