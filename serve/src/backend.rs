//! What the server needs of an engine: plans of requests, and a running batch of images.

use respodiff_fields::{Request, Wrong};
use serde::Serialize;
use std::any::Any;
use std::sync::Arc;

/// Who asks, for records and for the quotas of tenants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// Id of the request, which its answer carries as `x-request-id`.
    pub id: Arc<str>,
    /// Name of the key that it brought, if the key has one.
    pub tenant: Option<Arc<str>>,
}

/// One picture to be made. Only the engine that planned it looks inside.
pub struct Work {
    /// Id of the model.
    pub model: String,
    /// Width and height in pixels.
    pub size: (usize, usize),
    /// Seed of the picture.
    pub seed: u64,
    /// Calls of the UNet.
    pub steps: usize,
    /// Everything else.
    pub image: Box<dyn Any + Send>,
}

/// A model that can be asked for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Model {
    /// Its id.
    pub id: String,
    /// Width and height of its pictures by default.
    pub size: (usize, usize),
    /// Names of the samplers.
    pub samplers: Vec<String>,
    /// Names of the concepts that it may be asked for.
    pub concepts: Vec<String>,
    /// Names of the LoRAs that it may be asked for, of which some may be for other models.
    pub loras: Vec<String>,
    /// Learnt words that its prompts may use.
    pub embeddings: Vec<String>,
    /// SHA-256 of its weights, if it is known.
    pub sha256: Option<String>,
    /// True if its weights are in memory; others are loaded when they are asked for.
    pub loaded: bool,
}

/// The memory and steps that a request would take.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Bytes of memory of the model and of a batch of this size, if the model is loaded.
    pub memory_bytes: Option<usize>,
    /// Calls of the UNet, of all pictures.
    pub steps: usize,
}

/// An engine.
pub trait Backend: Send + Sync + 'static {
    /// The models, the default one first.
    fn models(&self) -> Vec<Model>;

    /// Checks a request, and plans its pictures.
    ///
    /// # Errors
    /// What is wrong with which field.
    fn plan(&self, request: &Request, caller: &Caller) -> Result<Vec<Work>, Problem>;

    /// The memory and steps of a request, which is checked but not run.
    ///
    /// # Errors
    /// As for [`Backend::plan`].
    fn estimate(&self, request: &Request) -> Result<Estimate, Problem>;

    /// Makes a batch for pictures like this one. It is called on the thread that runs the batch.
    ///
    /// # Errors
    /// A lack of memory, mostly.
    fn open(&self, work: &Work) -> Result<Box<dyn Batch>, Problem>;
}

/// A batch that images join and leave between steps.
pub trait Batch: Send {
    /// True if an image is one of those for which the batch was made: of its model and size, and of all else that its
    /// images must have in common. It is called often, and must not take long.
    fn fits(&self, work: &Work) -> bool;

    /// The number of images that may join.
    fn free(&self) -> usize;

    /// Lets an image join, and names it.
    ///
    /// # Errors
    /// What is wrong with it.
    fn join(&mut self, work: &Work) -> Result<u64, Problem>;

    /// Takes a step of every image, and tells what became of each.
    ///
    /// # Errors
    /// A fault after which the batch is of no use.
    fn step(&mut self) -> Result<Vec<(u64, Event)>, Problem>;

    /// Takes an image out; its place is free at once.
    fn cancel(&mut self, image: u64);

    /// A PNG of an image as it is at the moment, roughly.
    ///
    /// # Errors
    /// A fault after which the batch is of no use.
    fn preview(&mut self, image: u64) -> Result<Option<Vec<u8>>, Problem>;
}

/// The outcome of a step for one image.
#[derive(Clone, Debug)]
pub enum Event {
    /// It has taken this many steps of `total`.
    Step {
        /// Steps done.
        done: usize,
        /// Steps in all.
        total: usize,
    },
    /// It is done.
    Finished(Picture),
    /// It cannot be made.
    Failed(Problem),
}

/// A finished picture.
#[derive(Clone, Debug)]
pub struct Picture {
    /// The file.
    pub png: Vec<u8>,
    /// Its seed.
    pub seed: u64,
    /// The parameters from which it was made, as the file records them.
    pub parameters: serde_json::Value,
}

/// The kinds of problems, by what a client can do about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request can never work: 400.
    Invalid,
    /// No or a wrong key: 401.
    Unauthorized,
    /// Something that is named is not there: 404.
    NotFound,
    /// The client or a deadline ended it: 408.
    Cancelled,
    /// The body is too large: 413.
    TooLarge,
    /// The request is valid and does not fit this server: 422.
    Impossible,
    /// An `Idempotency-Key` came with another request before: 409.
    Conflict,
    /// The queue is full: 429.
    Busy,
    /// A fault of the server: 500.
    Internal,
    /// The server is about to end: 503.
    Unavailable,
}

/// A problem, with what to do about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Its kind.
    pub kind: Kind,
    /// The field of the request that it is about.
    pub field: Option<String>,
    /// What is wrong.
    pub message: String,
    /// Seconds after which to try again, if that helps.
    pub retry_after: Option<u64>,
}

impl Problem {
    /// A problem without a field.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Problem { kind, field: None, message: message.into(), retry_after: None }
    }

    /// A value that can never work.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Problem { field: Some(field.into()), ..Problem::new(Kind::Invalid, message) }
    }
}

impl From<Wrong> for Problem {
    fn from(wrong: Wrong) -> Self {
        Problem { field: wrong.field.map(Into::into), ..Problem::new(Kind::Invalid, wrong.problem) }
    }
}
