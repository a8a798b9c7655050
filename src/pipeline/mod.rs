//! Whole requests: from fields, as clients of the server and of the bindings to C and Python send them, to pictures
//! with the files that hold them.

#[cfg(feature = "download")]
mod open;
mod plan;

pub(crate) use plan::{Planned, encode, in_fields, plan};

use crate::backend::Precision;
use crate::concept::{Shelf, Used};
use crate::diffusion::scheduler::Sampler;
use crate::engine::{Engine, EngineOptions, Event, Outline, RunningBatch, SessionOptions, Size};
use crate::image::{GenerationInfo, Picture, UsedPart};
use crate::models::tokenizer::TokenizerRules;
use crate::weights::{Source, Tensors};
use crate::{Error, ErrorKind, Result};
use plan::{Plan, refused};
use respodiff_fields::{Fields, Request as Asked};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// An engine that answers whole requests. It may be shared between threads: calls at the same time run side by side,
/// each with memory of its own.
///
/// ```
/// use respodiff::{ConceptFiles, Device, Pipeline, Source};
/// use std::ops::ControlFlow;
///
/// # fn main() -> respodiff::Result<()> {
/// let pipeline = Pipeline::open(&Source::demo(), Device::cpu(), 4)?;
/// let request = br#"{"prompt": "a photo of a nurse", "n": 2, "seed": 7, "num_inference_steps": 2,
///     "balance": ["woman", "man"]}"#;
/// let made = pipeline.generate(&Pipeline::parse(request)?, &ConceptFiles, &mut |_, _| ControlFlow::Continue(()))?;
/// let file = made.pictures[1].png()?;
/// # assert!(file.starts_with(b"\x89PNG"));
/// # Ok(())
/// # }
/// ```
pub struct Pipeline {
    engine: Engine,
    /// What the records of all pictures have in common, but for the hashes.
    record: GenerationInfo,
    max_batch: usize,
    /// The batch of the last call, for the next one of its size.
    idle: Mutex<Option<RunningBatch>>,
    hashes: Arc<OnceLock<Option<Hashes>>>,
}

/// The weights as records name them.
#[derive(Clone)]
pub(crate) struct Hashes {
    /// SHA-256 of the UNet's files, if there are any.
    pub sha256: Option<String>,
    pub fingerprint: String,
    /// The parts that are not the checkpoint's own.
    pub parts: Vec<UsedPart>,
}

impl Hashes {
    /// The hashes of a checkpoint, with a function that hashes files.
    ///
    /// # Errors
    /// Those of reading the weights.
    pub fn of(model: &Outline, sha256: impl Fn(&Tensors) -> Option<String>) -> Result<Self> {
        let source = model.source();
        let part = |(component, path): (&str, &Path)| {
            let sha256 = sha256(&source.tensors(component)?);
            Ok(UsedPart { component: component.into(), file: path.display().to_string(), sha256 })
        };
        Ok(Hashes {
            sha256: sha256(&source.tensors("unet")?),
            fingerprint: model.fingerprint()?,
            parts: source.parts().map(part).collect::<Result<_>>()?,
        })
    }

    /// Puts them into a record.
    pub fn record(&self, info: &mut GenerationInfo) {
        info.model_sha256.clone_from(&self.sha256);
        info.model_fingerprint = Some(self.fingerprint.clone());
        info.parts.clone_from(&self.parts);
    }
}

/// A picture and the record of how it was made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Made {
    /// The picture.
    pub picture: Picture,
    /// How it was made.
    pub info: GenerationInfo,
}

impl Made {
    /// A picture of these pixels, `height * width * 3` bytes, with its record.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the sizes do not agree.
    pub fn new(width: u32, height: u32, rgb: Vec<u8>, info: GenerationInfo) -> Result<Self> {
        let wanted = u128::from(width) * u128::from(height) * 3;
        if wanted == 0 || wanted != rgb.len() as u128 {
            let problem = format!("{} bytes are not an RGB picture of {width}x{height} pixels", rgb.len());
            return Err(Error::invalid("rgb", problem));
        }
        Ok(Made { picture: Picture { width, height, rgb }, info })
    }

    /// The PNG file that `respodiff sample` writes of this picture, byte for byte.
    ///
    /// # Errors
    /// Those of [`Picture::to_png`].
    pub fn png(&self) -> Result<Vec<u8>> {
        self.picture.to_recorded_png(&self.info)
    }

    /// Writes [`Made::png`] to `path`, whole or not at all.
    ///
    /// # Errors
    /// Those of [`Made::png`], and [`ErrorKind::Io`].
    pub fn save(&self, path: &std::path::Path) -> Result<()> {
        crate::files::write(path, &self.png()?)
    }
}

/// The answer to a request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Answer {
    /// The pictures, prompt by prompt.
    pub pictures: Vec<Made>,
    /// What the caller may want to know, although it is no error: words of a prompt that were too many, a prompt that
    /// was not balanced, a concept of another model.
    pub warnings: Vec<String>,
}

impl Pipeline {
    /// Loads a checkpoint onto a device. Up to `max_batch` pictures of a request are made at once.
    ///
    /// # Errors
    /// Those of [`Engine::open`], and [`ErrorKind::Invalid`] for a batch of 0 or more than 256.
    pub fn open(source: &Source, options: impl Into<EngineOptions>, max_batch: usize) -> Result<Self> {
        let options = options.into();
        let engine = Engine::open(source, options.clone())?;
        if let Err(error) = engine.outline().check_size(engine.options().batch(max_batch)) {
            return Err(error.of_field("max_batch"));
        }
        let record = record(engine.outline(), &options);
        Ok(Pipeline { engine, record, max_batch, idle: Mutex::default(), hashes: Arc::default() })
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The checkpoint's name and defaults, the device, and what requests may name.
    pub fn info(&self) -> Value {
        let Size { width, height } = self.engine.default_size();
        let shape = self.engine.bottleneck(self.engine.options());
        #[cfg(feature = "demo")]
        let concepts: Vec<&str> = respodiff_demo::CONCEPTS.iter().map(|(name, _)| *name).collect();
        #[cfg(not(feature = "demo"))]
        let concepts: Vec<&str> = Vec::new();
        json!({
            "version": env!("CARGO_PKG_VERSION"), "model": self.engine.name(), "device": self.engine.device().name(),
            "width": width, "height": height, "guidance_scale": self.engine.default_guidance(),
            "max_batch": self.max_batch, "bottleneck": [shape.c, shape.h, shape.w],
            "samplers": Sampler::ALL.iter().map(|sampler| sampler.a1111_name()).collect::<Vec<_>>(),
            "concepts": concepts,
        })
    }

    /// Reads a request: a JSON object with the fields of the server's `POST /v1/images/generations` that say what to
    /// draw.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] about a field that is not what it should be, or is not known.
    pub fn parse(json: &[u8]) -> Result<Asked> {
        let parsed = || {
            let mut fields = Fields::parse(json)?;
            let asked = Asked::take(&mut fields)?;
            fields.finish().map(|()| asked)
        };
        parsed().map_err(refused)
    }

    /// Makes the pictures of a request. `progress` is told between steps how many calls of the UNet are done and how
    /// many there are, of all pictures together, and may end the run. Errors name fields as JSON does.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a request that cannot be served, [`ErrorKind::NotFound`] and others for concepts,
    /// [`ErrorKind::Cancelled`] when `progress` breaks, [`ErrorKind::NonFinite`] when the network leaves the range of
    /// numbers, [`ErrorKind::OutOfMemory`] and [`ErrorKind::DeviceLost`].
    pub fn generate(
        &self,
        asked: &Asked,
        shelf: &dyn Shelf,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Answer> {
        self.answer(asked, shelf, progress).map_err(in_fields)
    }

    fn answer(
        &self,
        asked: &Asked,
        shelf: &dyn Shelf,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Answer> {
        crate::memory::start_threads()?;
        let Plan { mut images, size, mut warnings } = plan(asked, self.engine.outline(), &self.record, shelf)?;
        warnings.extend(self.foreign(&images)?);
        warnings.extend(encode(&self.engine, &mut images)?);
        self.begin_to_hash();
        let options = self
            .engine
            .options()
            .size(size)
            .batch(images.len().min(self.max_batch))
            .guided(images.iter().any(|image| image.request.sampler.guides(image.info.guidance)))
            .concepts(images.iter().any(|image| !image.concepts.is_empty()));
        let mut batch = self.batch(options)?;
        let outcome = run(&mut batch, images, progress);
        if outcome.as_ref().err().is_none_or(|error| error.kind() != ErrorKind::DeviceLost) {
            *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(batch);
        }
        let mut pictures = outcome?;
        // A file that could not be read on the other thread gives its error here.
        let of = || Hashes::of(self.engine.outline(), Tensors::sha256);
        let hashes = match self.hashes.get_or_init(|| of().ok()) {
            Some(hashes) => hashes,
            None => &of()?,
        };
        pictures.iter_mut().for_each(|made| hashes.record(&mut made.info));
        Ok(Answer { pictures, warnings })
    }

    /// Warnings about concepts that were trained on another model.
    fn foreign(&self, images: &[Planned]) -> Result<Vec<String>> {
        let used = images.iter().flat_map(|image| &image.concepts);
        let origin = |used: &Used| (used.file.clone(), used.concept.metadata.clone());
        let known: BTreeMap<String, _> =
            used.map(origin).filter(|(_, origin)| !origin.fingerprint.is_empty()).collect();
        if known.is_empty() {
            return Ok(Vec::new());
        }
        let (own, model) = (self.engine.fingerprint()?, self.engine.name());
        let foreign = known.into_iter().filter(|(_, origin)| origin.fingerprint != own);
        Ok(foreign
            .map(|(file, origin)| format!("{file} was trained on {}, not on {model}", origin.base_model))
            .collect())
    }

    /// Hashes the weights while pictures are made, since all weights have to be read for it.
    fn begin_to_hash(&self) {
        if self.hashes.get().is_none() {
            let (engine, hashes) = (self.engine.clone(), self.hashes.clone());
            let work = move || {
                hashes.get_or_init(|| Hashes::of(engine.outline(), Tensors::sha256).ok());
            };
            // Without a thread, they are computed when they are needed.
            let _ = std::thread::Builder::new().name("respodiff-hashes".into()).spawn(work);
        }
    }

    /// A batch for pictures of these options: the last one, if it can serve them.
    fn batch(&self, options: SessionOptions) -> Result<RunningBatch> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let serves = |batch: &RunningBatch| {
            let SessionOptions { size, batch, guided, concepts, .. } = batch.options();
            size == options.size && batch >= options.batch && guided >= options.guided && concepts >= options.concepts
        };
        match idle.filter(serves) {
            Some(batch) => Ok(batch),
            None => self.engine.running_batch(options),
        }
    }
}

/// Makes the pictures of the images, as many at once as the batch holds. The batch is empty afterwards.
fn run(
    batch: &mut RunningBatch,
    images: Vec<Planned>,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Vec<Made>> {
    let total = images.iter().map(|image| image.calls).sum();
    let mut done = 0;
    let mut made: Vec<Option<Made>> = images.iter().map(|_| None).collect();
    let mut waiting = images.into_iter().map(Planned::finish).enumerate();
    let mut inside = HashMap::new();
    let mut advance = |batch: &mut RunningBatch, inside: &mut HashMap<_, (usize, GenerationInfo)>| -> Result<bool> {
        while batch.free() > 0
            && let Some((i, (request, info))) = waiting.next()
        {
            inside.insert(batch.join(&request)?, (i, info));
        }
        let stop = progress(done, total).is_break();
        if inside.is_empty() {
            return Ok(false);
        }
        if stop {
            return Err(Error::cancelled(format!("stopped after {done} of {total} steps")));
        }
        for (id, event) in batch.step()? {
            done += 1;
            match event {
                Event::Step { .. } => {}
                Event::Failed(error) => return Err(error),
                Event::Finished(picture) => {
                    if let Some((i, info)) = inside.remove(&id) {
                        made[i] = Some(Made { picture, info });
                    }
                }
            }
        }
        Ok(true)
    };
    let outcome = loop {
        match advance(batch, &mut inside) {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    inside.into_keys().for_each(|id| _ = batch.cancel(id));
    outcome?;
    made.into_iter().map(|made| made.ok_or_else(|| Error::internal("a run without a picture"))).collect()
}

/// What the records of all pictures of an engine have in common, but for the hashes.
pub(crate) fn record(model: &Outline, options: &EngineOptions) -> GenerationInfo {
    let EngineOptions { device, precision, tokenizer, adapters, .. } = options;
    GenerationInfo {
        model: model.name(),
        averages: model.source().is_averaged(),
        device: Some(device.name()),
        precision: told::<Precision>(*precision),
        tokenizer: told::<TokenizerRules>(*tokenizer),
        adapters: adapters.iter().map(|(adapter, weight)| adapter.record(*weight)).collect(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..GenerationInfo::default()
    }
}

/// The name of a choice in files and reports; `None` for the default.
pub(crate) fn told<T: Default + PartialEq + ToString>(choice: T) -> Option<String> {
    (choice != T::default()).then(|| choice.to_string())
}
