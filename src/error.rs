//! The one error type of the crate: data that a program can act on, and a line that a person can.

use std::borrow::Cow;
use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What failed: the kind tells callers what to do, the subject what it is about, and [`Display`] prints all of it as
/// one line, `subject: problem; advice`.
#[must_use]
pub struct Error(Box<Details>);

struct Details {
    kind: ErrorKind,
    subject: Subject,
    problem: Cow<'static, str>,
    advice: Option<Cow<'static, str>>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Failures that a caller may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A value that can never work as it was given: a size that is no multiple of 8, an unknown sampler, zero steps.
    Invalid,
    /// A file, folder, model or device that is not there.
    NotFound,
    /// A file that is not what it should be: truncated, malformed, a tensor missing or not finite.
    Damaged,
    /// Something whole and valid that this crate, build or device cannot do: an inpainting model, a newer file format.
    Unsupported,
    /// Two things that do not belong together: a concept and a model of another width, weights and a plan.
    Mismatch,
    /// More memory than there is. A smaller picture or batch may work.
    OutOfMemory,
    /// The operating system refused to read or write.
    Io,
    /// The model server is out of reach, refuses, or sends something else than it announced. It may work later.
    Network,
    /// A computation produced NaN or infinity. No picture is made of it.
    NonFinite,
    /// The device failed during its work. Its engine and sessions are of no use any more; open the device again.
    DeviceLost,
    /// The caller asked for the end.
    Cancelled,
    /// A fault of this crate; please report it.
    Internal,
}

/// The thing that an [`Error`] is about.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Subject {
    /// The run itself, or nothing in particular.
    Run,
    /// A file or folder.
    File(PathBuf),
    /// A value that the caller gave, by the name of its field, such as `guidance` of [`crate::Image`] or `lr_ram` of
    /// [`crate::Recipe`].
    Field(&'static str),
    /// A model id, such as `owner/name`.
    Model(String),
    /// The device that computes.
    Device,
}

impl From<&Path> for Subject {
    fn from(path: &Path) -> Self {
        Subject::File(path.to_path_buf())
    }
}

impl From<&PathBuf> for Subject {
    fn from(path: &PathBuf) -> Self {
        Subject::File(path.clone())
    }
}

impl From<PathBuf> for Subject {
    fn from(path: PathBuf) -> Self {
        Subject::File(path)
    }
}

impl Display for Subject {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Run | Subject::Device => Ok(()),
            Subject::File(path) => path.display().fmt(f),
            Subject::Field(name) => f.write_str(name),
            Subject::Model(id) => f.write_str(id),
        }
    }
}

impl Error {
    /// An error without advice.
    pub fn new(kind: ErrorKind, subject: impl Into<Subject>, problem: impl Into<Cow<'static, str>>) -> Self {
        Error(Box::new(Details { kind, subject: subject.into(), problem: problem.into(), advice: None, source: None }))
    }

    /// The same with what to do about it, an imperative: "give 1 to 256".
    pub fn advise(mut self, advice: impl Into<Cow<'static, str>>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// The same error about the field that a caller knows; errors about files and the like are left alone.
    #[cfg(feature = "pipeline")]
    pub(crate) fn of_field(mut self, field: &'static str) -> Self {
        if matches!(self.0.subject, Subject::Field(_)) {
            self.0.subject = Subject::Field(field);
        }
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The thing it is about.
    pub fn subject(&self) -> &Subject {
        &self.0.subject
    }

    /// What is wrong with the subject, without naming it.
    pub fn problem(&self) -> &str {
        &self.0.problem
    }

    /// What to do about it, if there is something to do.
    pub fn advice(&self) -> Option<&str> {
        self.0.advice.as_deref()
    }

    /// [`ErrorKind::Invalid`] about a value that the caller gave.
    pub(crate) fn invalid(field: &'static str, problem: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Invalid, Subject::Field(field), problem)
    }

    /// [`ErrorKind::NotFound`].
    pub(crate) fn not_found(subject: impl Into<Subject>, problem: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::NotFound, subject, problem)
    }

    /// [`ErrorKind::Damaged`] about a file.
    pub(crate) fn damaged(path: impl AsRef<Path>, problem: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Damaged, path.as_ref(), problem)
    }

    /// [`ErrorKind::Unsupported`].
    pub(crate) fn unsupported(subject: impl Into<Subject>, problem: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Unsupported, subject, problem)
    }

    /// [`ErrorKind::Mismatch`].
    pub(crate) fn mismatch(subject: impl Into<Subject>, problem: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Mismatch, subject, problem)
    }

    /// [`ErrorKind::OutOfMemory`].
    pub(crate) fn out_of_memory(problem: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::OutOfMemory, Subject::Device, problem)
    }

    /// [`ErrorKind::Network`] about a model.
    pub(crate) fn network(model: impl Into<String>, problem: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Network, Subject::Model(model.into()), problem)
    }

    /// [`ErrorKind::NonFinite`].
    pub(crate) fn non_finite(problem: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::NonFinite, Subject::Run, problem)
    }

    /// [`ErrorKind::DeviceLost`].
    pub(crate) fn device_lost(problem: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::DeviceLost, Subject::Device, problem)
    }

    /// [`ErrorKind::Cancelled`].
    pub(crate) fn cancelled(problem: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Cancelled, Subject::Run, problem)
    }

    /// [`ErrorKind::Internal`].
    pub(crate) fn internal(problem: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Internal, Subject::Run, problem).advise("this is a fault of respodiff; please report it")
    }

    /// Wraps an error of the operating system: `read(path).map_err(Error::io("read", path))`. A file that is not there
    /// is [`ErrorKind::NotFound`], every other refusal [`ErrorKind::Io`].
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| {
            let kind = match source.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Io,
            };
            let mut error = Self::new(kind, path, format!("cannot {action}: {source}"));
            error.0.source = Some(source.into());
            error
        }
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Details { subject, problem, advice, .. } = &*self.0;
        if !matches!(subject, Subject::Run | Subject::Device) {
            write!(f, "{subject}: ")?;
        }
        f.write_str(problem)?;
        advice.iter().try_for_each(|advice| write!(f, "; {advice}"))
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Details { kind, subject, problem, advice, source } = &*self.0;
        f.debug_struct("Error")
            .field("kind", kind)
            .field("subject", subject)
            .field("problem", problem)
            .field("advice", advice)
            .field("source", source)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}
