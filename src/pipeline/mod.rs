//! Whole requests: from fields, as clients of the server and of the bindings to C and Python send them, to pictures
//! with the files that hold them.

mod adapters;
#[cfg(feature = "download")]
mod open;
mod plan;
mod prompts;

pub(crate) use adapters::{AdapterSet, open_adapter};
pub(crate) use plan::{BatchKey, Offer, Planned, encode, in_fields, plan};
pub(crate) use prompts::{of_negative, open_embeddings, record_reading, take_tags, used_embeddings, words};

use crate::backend::Precision;
use crate::concept::{Shelf, Used};
use crate::diffusion::scheduler::Sampler;
use crate::engine::{Engine, EngineOptions, Event, Outline, RunningBatch, SessionOptions, Size, Texts};
use crate::image::{GenerationInfo, Picture, UsedPart};
use crate::models::tokenizer::TokenizerRules;
use crate::weights::{Embedding, Source, Tensors};
use crate::{Error, ErrorKind, Result};
use plan::{Plan, refused};
use respodiff_fields::{Fields, Request as Asked};
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// An engine that answers whole requests. It may be shared between threads: calls at the same time run side by side,
/// each with memory of its own.
///
/// ```
/// use respodiff::concepts::Files;
/// use respodiff::{Device, Pipeline, Source};
/// use std::ops::ControlFlow;
///
/// # fn main() -> respodiff::Result<()> {
/// let pipeline = Pipeline::open(&Source::demo(), Device::cpu(), 4)?;
/// let request = br#"{"prompt": "a photo of a nurse", "n": 2, "seed": 7, "num_inference_steps": 2,
///     "balance": ["woman", "man"]}"#;
/// let made = pipeline.generate(&Pipeline::parse(request)?, &Files, &mut |_, _| ControlFlow::Continue(()))?;
/// let file = made.pictures[1].png()?;
/// # assert!(file.starts_with(b"\x89PNG"));
/// # Ok(())
/// # }
/// ```
pub struct Pipeline {
    engine: Engine,
    texts: Texts,
    embeddings: Vec<Arc<Embedding>>,
    /// The folder in which requests find adapters by name.
    lora_folder: Option<PathBuf>,
    /// The part of every picture's record that is the same for all, without the hashes.
    record: GenerationInfo,
    max_batch: usize,
    /// The batch of the last call with its adapters, for the next one of its size.
    idle: Mutex<Option<(AdapterSet, RunningBatch)>>,
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
    /// Things that are no error but that the caller may want to know: words of a prompt that were too many, a prompt
    /// that was not balanced, a concept of another model.
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
        let (texts, embeddings) = (engine.texts(), options.embeddings);
        let (idle, hashes) = (Mutex::default(), Arc::default());
        Ok(Pipeline { engine, texts, embeddings, lora_folder: None, record, max_batch, idle, hashes })
    }

    /// The same, with a folder in which requests find adapters by name, those in folders inside of it included. Files
    /// are found without it.
    pub fn lora_folder(self, folder: Option<PathBuf>) -> Self {
        Pipeline { lora_folder: folder, ..self }
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
        let offer = Offer {
            outline: self.engine.outline(),
            texts: &self.texts,
            embeddings: &self.embeddings,
            record: &self.record,
            concepts: shelf,
            adapter: &|name| open_adapter(self.lora_folder.as_deref(), name),
        };
        let Plan { images, mut warnings, .. } = plan(asked, &offer)?;
        warnings.extend(self.foreign(&images)?);
        self.begin_to_hash();
        let total = images.iter().map(|image| image.calls).sum();
        let mut made: Vec<Option<Made>> = images.iter().map(|_| None).collect();
        let mut done = 0;
        for mut group in by_key(images) {
            let key = group[0].1.key.clone();
            let options = self
                .engine
                .options()
                .size(key.size)
                .batch(group.len().min(self.max_batch))
                .chunks(key.chunks)
                .guided(group.iter().any(|(_, image)| image.request.sampler.guides(image.info.guidance)))
                .concepts(group.iter().any(|(_, image)| !image.concepts.is_empty()));
            let mut batch = self.batch(options, &key.adapters)?;
            let outcome = encode(batch.engine(), group.iter_mut().map(|(_, image)| image)).and_then(|()| {
                let before = done;
                run(&mut batch, group, &mut |steps| {
                    done = before + steps;
                    progress(done, total)
                })
            });
            if outcome.as_ref().err().is_none_or(|error| error.kind() != ErrorKind::DeviceLost) {
                *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some((key.adapters, batch));
            }
            outcome?.into_iter().for_each(|(i, picture)| made[i] = Some(picture));
        }
        // A file that could not be read on the other thread gives its error here.
        let of = || Hashes::of(self.engine.outline(), Tensors::sha256);
        let hashes = match self.hashes.get_or_init(|| of().ok()) {
            Some(hashes) => hashes,
            None => &of()?,
        };
        made.iter_mut().flatten().for_each(|made| hashes.record(&mut made.info));
        let pictures = made.into_iter().map(|made| made.ok_or_else(|| Error::internal("a run without a picture")));
        Ok(Answer { pictures: pictures.collect::<Result<_>>()?, warnings })
    }

    /// Warnings about concepts that were trained on other weights.
    fn foreign(&self, images: &[Planned]) -> Result<Vec<String>> {
        if images.iter().all(|image| image.concepts.is_empty()) {
            return Ok(Vec::new());
        }
        let (own, model) = (self.engine.fingerprint()?, self.engine.name());
        let warnings = images.iter().flat_map(|image| {
            let other = |used: &Used| {
                let other = used.concept.metadata.other_weights(&own, &model, &image.info.adapters)?;
                Some(format!("{} {other}", used.file))
            };
            image.concepts.iter().filter_map(other)
        });
        Ok(warnings.collect::<BTreeSet<_>>().into_iter().collect())
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

    /// A batch for pictures of these options and adapters: the last one, if it can serve them.
    fn batch(&self, options: SessionOptions, adapters: &AdapterSet) -> Result<RunningBatch> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let serves = |batch: &RunningBatch| {
            let SessionOptions { size, batch, guided, concepts, chunks, .. } = batch.options();
            size == options.size
                && chunks == options.chunks
                && batch >= options.batch
                && guided >= options.guided
                && concepts >= options.concepts
        };
        let engine = || match adapters.is_empty() {
            true => Ok(self.engine.clone()),
            false => self.engine.with_adapters(&[self.engine.adapters(), &adapters.0].concat()),
        };
        match idle {
            Some((of, batch)) if serves(&batch) && of == *adapters => Ok(batch),
            Some((_, mut batch)) if serves(&batch) => {
                batch.switch(&engine()?)?;
                Ok(batch)
            }
            other => {
                // Its memory is freed before that of the next is taken.
                drop(other);
                engine()?.running_batch(options)
            }
        }
    }
}

/// The images with their numbers, in groups that are made in one batch each.
fn by_key(images: Vec<Planned>) -> Vec<Vec<(usize, Planned)>> {
    let mut groups: Vec<Vec<(usize, Planned)>> = Vec::new();
    for (i, image) in images.into_iter().enumerate() {
        match groups.iter_mut().find(|group| group[0].1.key == image.key) {
            Some(group) => group.push((i, image)),
            None => groups.push(vec![(i, image)]),
        }
    }
    groups
}

/// Makes the pictures of images, which keep their numbers, as many at once as the batch holds. `progress` is told how
/// many steps are done, and may end the run. The batch is empty afterwards.
fn run(
    batch: &mut RunningBatch,
    images: Vec<(usize, Planned)>,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<(usize, Made)>> {
    let total: usize = images.iter().map(|(_, image)| image.calls).sum();
    let mut done = 0;
    let mut made = Vec::new();
    let mut waiting = images.into_iter().map(|(i, image)| (i, image.finish()));
    let mut inside = HashMap::new();
    let mut advance = |batch: &mut RunningBatch, inside: &mut HashMap<_, (usize, GenerationInfo)>| -> Result<bool> {
        while batch.free() > 0
            && let Some((i, (request, info))) = waiting.next()
        {
            inside.insert(batch.join(&request)?, (i, info));
        }
        let stop = progress(done).is_break();
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
                        made.push((i, Made { picture, info }));
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
    outcome.map(|()| made)
}

/// The part of a picture's record that is the same for all pictures of an engine, without the hashes.
pub(crate) fn record(model: &Outline, options: &EngineOptions) -> GenerationInfo {
    let EngineOptions { device, precision, tokenizer, adapters, vae_tile, .. } = options;
    GenerationInfo {
        model: model.name(),
        averages: model.source().is_averaged(),
        device: Some(device.name()),
        precision: told::<Precision>(*precision),
        tokenizer: told::<TokenizerRules>(*tokenizer),
        vae_tile: *vae_tile,
        adapters: adapters.iter().map(|(adapter, weight)| adapter.record(*weight)).collect(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..GenerationInfo::default()
    }
}

/// The name of a choice in files and reports; `None` for the default.
pub(crate) fn told<T: Default + PartialEq + ToString>(choice: T) -> Option<String> {
    (choice != T::default()).then(|| choice.to_string())
}
