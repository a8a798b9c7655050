//! Running batches: images of one size join and leave between steps.

use super::rows::{AHEAD, Rows, Settings};
use super::{Engine, Plans, Request, SessionOptions};
use crate::image::Picture;
use crate::{Error, ErrorKind, Result};

/// Names an image of a [`RunningBatch`]. No two images of a batch ever have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageId(u64);

/// The outcome of a step for one image.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// It has taken this many UNet calls of `total`.
    Step {
        /// Calls done.
        done: usize,
        /// Calls in all; some samplers make one more than the steps asked for.
        total: usize,
    },
    /// It is done, and its row is free.
    Finished(Picture),
    /// It has left the range of numbers, and its row is free.
    Failed(Error),
}

/// A batch that runs all the time. Images of one size join it between steps, each with its own prompt, seed, guidance
/// scale, concepts, sampler and number of steps, and leave it when they are done. Everything is planned and allocated
/// for batches of 1, 2, 4 and so on up to [`SessionOptions::batch`] when the batch is made, and a step is as fast as
/// the smallest of these that holds the images of the moment.
///
/// A picture is the same to the last bit whether it was alone, joined others, or was joined.
///
/// ```no_run
/// # fn main() -> respodiff::Result<()> {
/// use respodiff::{Device, Engine, Event, Image, Request, Source};
///
/// let engine = Engine::open(&Source::demo(), Device::auto())?;
/// let mut batch = engine.running_batch(engine.options().batch(4))?;
/// batch.join(&Request::from(Image::new("a photo of a nurse")).steps(20))?;
/// batch.step()?;
/// batch.join(&Request::from(Image::new("a photo of a cook")).steps(8))?;
/// while !batch.is_empty() {
///     for (id, event) in batch.step()? {
///         if let Event::Finished(picture) = event {
///             println!("{id:?}: {} bytes", picture.to_png(&[])?.len());
///         }
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct RunningBatch {
    rows: Rows,
    /// The image in each slot.
    ids: Vec<Option<ImageId>>,
    next: u64,
    /// Steps since the device was waited for.
    ahead: usize,
}

impl RunningBatch {
    pub(super) fn new(engine: Engine, options: SessionOptions, plans: Plans) -> Result<Self> {
        let ids = vec![None; options.batch];
        Ok(RunningBatch { rows: Rows::new(engine, options, plans)?, ids, next: 0, ahead: 0 })
    }

    /// The engine that it is of.
    pub fn engine(&self) -> &Engine {
        self.rows.engine()
    }

    /// The options that it was made with.
    pub fn options(&self) -> SessionOptions {
        self.rows.options()
    }

    /// Goes over to another engine of the same checkpoint, which [`super::Engine::with_adapters`] made. Nothing is
    /// planned or allocated anew.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] while images are in work, [`ErrorKind::Mismatch`] for an engine of another checkpoint or
    /// device.
    pub fn switch(&mut self, engine: &Engine) -> Result<()> {
        if !self.is_empty() {
            let problem = "images are in work with the adapters so far";
            return Err(Error::invalid("adapters", problem).advise("wait until they are done"));
        }
        self.rows.switch(engine)
    }

    /// The number of images that may join.
    pub fn free(&self) -> usize {
        self.ids.iter().filter(|id| id.is_none()).count()
    }

    /// True if no image is in work.
    pub fn is_empty(&self) -> bool {
        self.free() == self.ids.len()
    }

    /// Lets the image of a request join. It takes its first step in the next call of [`RunningBatch::step`].
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a request that cannot be served, has not one image, or finds no free row;
    /// [`ErrorKind::Mismatch`] for a concept or an encoded prompt of another model, [`ErrorKind::DeviceLost`].
    pub fn join(&mut self, request: &Request) -> Result<ImageId> {
        let [image] = &request.images[..] else {
            let problem = format!("{} images join at once", request.images.len());
            return Err(Error::invalid("images", problem).advise("let each join by a request of its own"));
        };
        let settings = Settings::new(self.rows.engine(), self.rows.options(), request)?;
        let Some(slot) = self.rows.free() else {
            let problem = format!("all {} rows are taken", self.ids.len());
            return Err(Error::invalid("images", problem).advise("wait until an image is done, or make a larger batch"));
        };
        self.rows.join(slot, image, &settings)?;
        let id = ImageId(self.next);
        self.next += 1;
        self.ids[slot] = Some(id);
        Ok(id)
    }

    /// Takes an image out, and tells if it was there. Its row is free at once.
    pub fn cancel(&mut self, id: ImageId) -> bool {
        let slot = self.ids.iter().position(|other| *other == Some(id));
        slot.into_iter().for_each(|slot| self.leave(slot));
        slot.is_some()
    }

    fn leave(&mut self, slot: usize) {
        self.rows.leave(slot);
        self.ids[slot] = None;
    }

    /// Takes a step of every image: one call of the UNet. Those that have taken their last are decoded. Returns what
    /// became of each image.
    ///
    /// # Errors
    /// [`ErrorKind::DeviceLost`], after which the batch is of no use.
    pub fn step(&mut self) -> Result<Vec<(ImageId, Event)>> {
        let active = self.rows.active();
        if active.is_empty() {
            return Ok(Vec::new());
        }
        self.rows.step()?;
        self.ahead += 1;
        let ends = |slot: usize| {
            let (done, total) = self.rows.progress(slot);
            done == total
        };
        let waits = self.ahead >= AHEAD || active.iter().any(|&slot| ends(slot));
        if waits {
            self.ahead = 0;
        }
        let mut events = Vec::new();
        for slot in active {
            let Some(id) = self.ids[slot] else { continue };
            let (done, total) = self.rows.progress(slot);
            let outcome = match waits {
                true => self.rows.check_latents(slot).and_then(|()| match done == total {
                    true => self.rows.picture(slot).map(Event::Finished),
                    false => Ok(Event::Step { done, total }),
                }),
                false => Ok(Event::Step { done, total }),
            };
            let event = match outcome {
                Err(error) if error.kind() == ErrorKind::NonFinite => Event::Failed(error),
                other => other?,
            };
            if !matches!(event, Event::Step { .. }) {
                self.leave(slot);
            }
            events.push((id, event));
        }
        Ok(events)
    }

    /// A rough picture of an image as it is at the moment; `None` if the image is not there. It is decoded by
    /// [`crate::EngineOptions::preview_vae`], or else takes milliseconds, since it is a linear function of the latents.
    /// The function is fitted to the VAE, for which the first preview of an engine waits.
    ///
    /// # Errors
    /// [`ErrorKind::NonFinite`], [`ErrorKind::DeviceLost`].
    pub fn preview(&mut self, id: ImageId) -> Result<Option<Picture>> {
        let slot = self.ids.iter().position(|other| *other == Some(id));
        slot.map(|slot| self.rows.preview(slot)).transpose()
    }

    /// An image as it is at the moment, decoded; `None` if it is not there.
    ///
    /// # Errors
    /// [`ErrorKind::NonFinite`], [`ErrorKind::DeviceLost`].
    pub fn picture(&mut self, id: ImageId) -> Result<Option<Picture>> {
        let slot = self.ids.iter().position(|other| *other == Some(id));
        slot.map(|slot| self.rows.picture(slot)).transpose()
    }

    /// An image's latents of the moment, `[c, height / 8, width / 8]`, for previews; `None` if it is not there.
    ///
    /// # Errors
    /// [`ErrorKind::DeviceLost`].
    pub fn latents(&mut self, id: ImageId) -> Result<Option<Vec<f32>>> {
        let slot = self.ids.iter().position(|other| *other == Some(id));
        slot.map(|slot| self.rows.latents(slot)).transpose()
    }
}
