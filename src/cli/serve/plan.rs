//! Plans of requests: what each picture of a request is made from.

use super::models::Served;
use super::{loras, problem};
use crate::Result;
use crate::engine::{Engine, Image, Prompt};
use crate::pipeline::{self, AdapterSet, Offer, Planned, record};
use respodiff_serve::{self as http, Caller, Kind, Problem, Work};
use std::sync::Arc;

/// A picture that was planned, and who asked for it.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) caller: Caller,
    pub(super) planned: Planned,
    /// Its images with prompts that are not encoded yet.
    texts: Vec<Image>,
    /// True if it counts in the policy's quotas.
    pub(super) in_stream: bool,
}

impl Asked {
    /// The picture of a work, which this engine planned.
    pub(super) fn of(work: &Work) -> std::result::Result<&Self, Problem> {
        let planned = work.image.downcast_ref();
        planned.ok_or_else(|| Problem::new(Kind::Internal, "another engine planned this picture"))
    }

    /// The picture with prompts that an engine can read. Encodings of another engine are made anew: the model may have
    /// been unloaded meanwhile, or have got the picture's adapters.
    pub(super) fn planned_for(&self, engine: &Engine) -> Planned {
        let mut planned = self.planned.clone();
        let fits = |prompt: &Prompt| !matches!(prompt, Prompt::Encoded(encoded) if !engine.has_encoded(encoded));
        let fit = |image: &Image| fits(&image.prompt) && image.negative.iter().all(fits);
        if !planned.request.images.iter().all(fit) {
            planned.request.images = self.texts.clone();
        }
        planned
    }
}

impl Served {
    /// Checks a request, and plans its pictures. The model's weights need not be there.
    pub(super) fn plan(
        self: &Arc<Self>,
        request: &http::Request,
        caller: &Caller,
    ) -> std::result::Result<Vec<Work>, Problem> {
        self.pictures(request, caller).map_err(|error| problem(&error))
    }

    fn pictures(self: &Arc<Self>, request: &http::Request, caller: &Caller) -> Result<Vec<Work>> {
        let mut record = record(&self.outline, &self.engine_options());
        record.model_fingerprint = Some(self.fingerprint.clone());
        if let Some(hashes) = self.hashes() {
            hashes.record(&mut record);
        }
        let concepts = self.concepts();
        let offer = Offer {
            outline: &self.outline,
            texts: &self.texts,
            embeddings: &self.offered.embeddings,
            record: &record,
            concepts: &*concepts,
            adapter: &|name| loras::find(self.offered.loras.as_deref(), name),
        };
        let mut images = pipeline::plan(request, &offer)?.images;
        let texts: Vec<_> = images.iter().map(|image| image.request.images.clone()).collect();
        // Weights that are not loaded encode the prompts when the batch is. It takes time, so it comes after all that
        // can be refused.
        let mut sets: Vec<AdapterSet> = images.iter().map(|image| image.key.adapters.clone()).collect();
        sets.dedup();
        for set in sets {
            if let Some(engine) = self.engine_with(&set) {
                pipeline::encode(&engine, images.iter_mut().filter(|image| image.key.adapters == set))?;
            }
        }
        // A client that balances its own pictures takes no part in the quotas.
        let in_stream = request.balance.is_empty();
        let work = |(mut planned, texts): (Planned, Vec<Image>)| {
            if let Some(policy) = self.policy() {
                let always = policy.always(planned.info.guidance);
                planned.concepts = always.chain(std::mem::take(&mut planned.concepts)).collect();
            }
            let size = (planned.key.size.width, planned.key.size.height);
            let (model, seed, steps) = (self.name.clone(), planned.info.seed, planned.calls);
            let image = Box::new(Asked { caller: caller.clone(), planned, texts, in_stream });
            Work { model, size, seed, steps, image }
        };
        Ok(images.into_iter().zip(texts).map(work).collect())
    }
}
