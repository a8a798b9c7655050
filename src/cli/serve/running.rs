//! The running batch, with the records of its pictures.

use super::audit::{Audit, Outcome};
use super::models::{Served, locked};
use super::plan::Asked;
use super::problem;
use crate::cli::sign::Signing;
use crate::engine::{Event, ImageId, RunningBatch};
use crate::image::GenerationInfo;
use crate::pipeline::BatchKey;
use crate::{ErrorKind, Result};
use respodiff_serve::{self as http, Batch, Problem, Work};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// A picture in work.
struct InWork {
    id: ImageId,
    info: GenerationInfo,
    /// Its name in the audit log.
    begun: Option<String>,
}

/// Where pictures go besides their clients, and what they are given on the way.
#[derive(Clone)]
pub(super) struct Output {
    pub(super) audit: Option<Arc<Mutex<Audit>>>,
    pub(super) signing: Arc<Signing>,
}

pub(super) struct Running {
    served: Arc<Served>,
    /// The key of its pictures.
    key: BatchKey,
    batch: RunningBatch,
    images: HashMap<u64, InWork>,
    next: u64,
    output: Output,
}

impl Running {
    pub(super) fn new(served: Arc<Served>, key: BatchKey, batch: RunningBatch, output: Output) -> Self {
        Running { served, key, batch, images: HashMap::new(), next: 0, output }
    }

    /// Lets a picture join. The stream is that of the pictures which are begun, in the order in which they are. The log
    /// tells first that a picture is begun, and then it is counted; a kill in between is made up for at the next start.
    fn begin(&mut self, asked: &Asked) -> Result<InWork> {
        let mut planned = asked.planned_for(self.batch.engine());
        let mut policy = self.served.policy().filter(|_| asked.in_stream);
        let mut turns = Vec::new();
        if let Some(policy) = &policy {
            let tenant = asked.caller.tenant.as_deref();
            let (used, chosen) = policy.next(&planned.info.prompt, planned.info.guidance, tenant);
            turns = chosen;
            planned.concepts.extend(used);
        }
        let (request, info) = planned.finish();
        let id = self.batch.join(&request)?;
        let mut record = || {
            let begun = match &self.output.audit {
                Some(audit) => Some(locked(audit).begun(&asked.caller, &info, &turns)?),
                None => None,
            };
            policy.as_mut().map_or(Ok(()), |policy| policy.count(&turns)).map(|()| begun)
        };
        match record() {
            Ok(begun) => Ok(InWork { id, info, begun }),
            Err(error) => {
                self.batch.cancel(id);
                Err(error)
            }
        }
    }

    /// Tells the audit log how a picture has ended.
    fn ended(&self, image: &InWork, outcome: Outcome, file: Option<&[u8]>) -> Result<()> {
        match (&self.output.audit, &image.begun) {
            (Some(audit), Some(begun)) => locked(audit).ended(begun.clone(), outcome, file),
            _ => Ok(()),
        }
    }

    /// The file of a finished picture. It goes to its client only after the log has its hash, which is that of the file
    /// before it is signed, since no two signatures are equal.
    fn finished(&self, image: &InWork, picture: &crate::Picture) -> Result<http::Picture> {
        let png = picture.to_recorded_png(&image.info)?;
        self.ended(image, Outcome::Finished, Some(&png))?;
        let parameters = serde_json::to_value(&image.info).unwrap_or_default();
        let png = self.output.signing.sign(png, "image/png")?;
        Ok(http::Picture { png, seed: image.info.seed, parameters })
    }
}

impl Batch for Running {
    fn fits(&self, work: &Work) -> bool {
        work.model == self.served.name && Asked::of(work).is_ok_and(|asked| asked.planned.key == self.key)
    }

    fn free(&self) -> usize {
        self.batch.free()
    }

    fn join(&mut self, work: &Work) -> std::result::Result<u64, Problem> {
        let image = self.begin(Asked::of(work)?).map_err(|error| problem(&error))?;
        self.next += 1;
        self.images.insert(self.next, image);
        Ok(self.next)
    }

    fn step(&mut self) -> std::result::Result<Vec<(u64, http::Event)>, Problem> {
        let mut events = Vec::new();
        for (id, event) in self.batch.step().map_err(|error| problem(&error))? {
            let Some(number) = self.images.iter().find(|(_, image)| image.id == id).map(|(number, _)| *number) else {
                continue;
            };
            if let Event::Step { done, total } = event {
                events.push((number, http::Event::Step { done, total }));
                continue;
            }
            let Some(image) = self.images.remove(&number) else { continue };
            let outcome = match event {
                Event::Finished(picture) => self.finished(&image, &picture),
                Event::Failed(error) => self.ended(&image, Outcome::Failed, None).and(Err(error)),
                Event::Step { .. } => continue,
            };
            let failed = |error| http::Event::Failed(problem(&error));
            events.push((number, outcome.map_or_else(failed, http::Event::Finished)));
        }
        Ok(events)
    }

    fn cancel(&mut self, image: u64) {
        if let Some(image) = self.images.remove(&image) {
            self.batch.cancel(image.id);
            // There is nobody left to tell that this failed; the log then lacks the picture's end, as after a kill.
            let _ = self.ended(&image, Outcome::Cancelled, None);
        }
    }

    fn preview(&mut self, image: u64) -> std::result::Result<Option<Vec<u8>>, Problem> {
        let Some(InWork { id, .. }) = self.images.get(&image) else { return Ok(None) };
        let preview = match self.batch.preview(*id) {
            Err(error) if error.kind() == ErrorKind::NonFinite => None,
            preview => preview.map_err(|error| problem(&error))?,
        };
        preview.map(|picture| picture.to_png(&[])).transpose().map_err(|error| problem(&error))
    }
}

impl Drop for Running {
    /// Pictures of a batch that is lost have failed.
    fn drop(&mut self) {
        for image in self.images.values() {
            let _ = self.ended(image, Outcome::Failed, None);
        }
    }
}
