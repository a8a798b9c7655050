//! Plans of requests: what each picture of a request is made from.

use super::models::Served;
use super::problem;
use crate::Result;
use crate::engine::{Conditioning, Engine, EngineOptions, Prompt};
use crate::pipeline::{self, Planned, record};
use respodiff_serve::{self as http, Caller, Problem, Work};
use std::sync::Arc;

/// A picture that was planned, and who asked for it.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) caller: Caller,
    pub(super) planned: Planned,
    /// True if it counts in the policy's quotas.
    pub(super) in_stream: bool,
}

impl Asked {
    /// The picture with prompts that an engine can read. Encodings of the same model that was unloaded meanwhile are made
    /// anew.
    pub(super) fn planned_for(&self, engine: &Engine) -> Planned {
        let mut planned = self.planned.clone();
        let fits = |conditioning: &Conditioning| engine.has_encoded(conditioning);
        for image in &mut planned.request.images {
            if matches!(&image.prompt, Prompt::Encoded(conditioning) if !fits(conditioning)) {
                image.prompt = planned.info.prompt.as_str().into();
            }
            if matches!(&image.negative, Some(Prompt::Encoded(conditioning)) if !fits(conditioning)) {
                image.negative = planned.info.negative_prompt.clone().map(Prompt::from);
            }
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
        let mut record = record(&self.outline, &EngineOptions::from(&self.device));
        record.model_fingerprint = Some(self.fingerprint.clone());
        if let Some(hashes) = self.hashes() {
            hashes.record(&mut record);
        }
        let mut plan = pipeline::plan(request, &self.outline, &record, &*self.concepts())?;
        // If the model is not loaded, the batch will encode the prompts. It takes time, so it comes after all that can be
        // refused.
        if let Some(engine) = self.engine() {
            pipeline::encode(&engine, &mut plan.images)?;
        }
        let size = (plan.size.width, plan.size.height);
        // A client that balances its own pictures takes no part in the quotas.
        let in_stream = request.balance.is_empty();
        let work = |mut planned: Planned| {
            if let Some(policy) = self.policy() {
                let always = policy.always(planned.info.guidance);
                planned.concepts = always.chain(std::mem::take(&mut planned.concepts)).collect();
            }
            let (model, seed, steps) = (self.name.clone(), planned.info.seed, planned.calls);
            let image = Box::new(Asked { caller: caller.clone(), planned, in_stream });
            Work { model, size, seed, steps, image }
        };
        Ok(plan.images.into_iter().map(work).collect())
    }
}
