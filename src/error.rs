//! The one error type of the crate.
//!
//! Every message says what was wrong, where, and what to do about it, in one line, so that the CLI can print it as it is.

use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A request that can never work as it was put: a bad size, an unknown scheduler name, zero steps.
    #[error("{0}")]
    Usage(String),

    /// A checkpoint (or another input file) that is not what it should be: truncated, a tensor missing or of
    /// another shape, an unknown config value.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The offending file or folder.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },

    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "read", "write", "create", ...
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's own answer.
        source: std::io::Error,
    },

    /// A model id that could not be fetched.
    #[error("{0}")]
    Download(String),

    /// A computation produced NaN or infinity; no image is made of it.
    #[error("{0}")]
    NonFinite(String),

    /// The device asked for is not there.
    #[error("{0}")]
    Device(String),

    /// The caller's cancel flag was raised.
    #[error("interrupted: {0}")]
    Cancelled(String),
}

impl Error {
    /// A [`Error::Checkpoint`] about `path`.
    pub fn checkpoint(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Error::Checkpoint { path: path.as_ref().to_path_buf(), problem: problem.into() }
    }

    /// A [`Error::Usage`].
    pub fn usage(problem: impl Into<String>) -> Self {
        Error::Usage(problem.into())
    }

    /// Wraps an I/O error: `file.read().map_err(Error::io("read", path))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// The process exit code for this error: 2 for usage, 130 for an interrupt, 1 for every other failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Cancelled(_) => 130,
            _ => 1,
        }
    }
}
