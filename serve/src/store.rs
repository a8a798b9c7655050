//! Where jobs are kept.

use crate::backend::Problem;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

/// A place where jobs are kept. A job has parts: its request, its pictures by their numbers, and its end.
pub trait Store: Send + Sync + 'static {
    /// Ids of the jobs, the oldest first.
    ///
    /// # Errors
    /// The system's.
    fn jobs(&self) -> Result<Vec<String>, Problem>;

    /// Keeps a part. When this returns, it is there even after a power cut, if anything is that is kept here.
    ///
    /// # Errors
    /// The system's.
    fn write(&self, job: &str, part: &str, bytes: &[u8]) -> Result<(), Problem>;

    /// A part, if it is there.
    ///
    /// # Errors
    /// The system's.
    fn read(&self, job: &str, part: &str) -> Result<Option<Vec<u8>>, Problem>;

    /// Forgets a job. One that is not there is no error.
    ///
    /// # Errors
    /// The system's.
    fn remove(&self, job: &str) -> Result<(), Problem>;
}

/// Jobs that end with the process.
#[derive(Default)]
pub struct Memory(Mutex<BTreeMap<String, BTreeMap<String, Vec<u8>>>>);

impl Memory {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, BTreeMap<String, Vec<u8>>>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Store for Memory {
    fn jobs(&self) -> Result<Vec<String>, Problem> {
        Ok(self.lock().keys().cloned().collect())
    }

    fn write(&self, job: &str, part: &str, bytes: &[u8]) -> Result<(), Problem> {
        self.lock().entry(job.into()).or_default().insert(part.into(), bytes.into());
        Ok(())
    }

    fn read(&self, job: &str, part: &str) -> Result<Option<Vec<u8>>, Problem> {
        Ok(self.lock().get(job).and_then(|parts| parts.get(part)).cloned())
    }

    fn remove(&self, job: &str) -> Result<(), Problem> {
        self.lock().remove(job);
        Ok(())
    }
}
