//! Plans of requests: what each picture of a request is made from.

use super::super::concepts::{Assignment, NamedGroup, Until, Used, group, shared_out, used};
use super::super::random_seed;
use super::models::Served;
use super::problem;
use crate::Result;
use crate::diffusion::scheduler::{SamplerChoice, Spacing};
use crate::engine::{Conditioning, Engine, Image, Prompt, Request};
use crate::image::GenerationInfo;
use respodiff_serve::{self as http, Caller, Problem, Work};
use std::sync::Arc;

/// A picture that was planned.
#[derive(Clone)]
pub(super) struct Planned {
    pub(super) caller: Caller,
    pub(super) request: Request,
    pub(super) info: GenerationInfo,
    /// True if it counts in the policy's quotas.
    pub(super) in_stream: bool,
}

/// A prompt that is encoded, if the engine is there to do so; otherwise the batch will encode it.
fn prompt(engine: Option<&Engine>, text: &str) -> Result<Prompt> {
    Ok(match engine {
        Some(engine) => Prompt::Encoded(engine.encode(text)?),
        None => Prompt::Text(text.into()),
    })
}

impl Planned {
    /// The request with prompts that an engine can read. Encodings of the same model that was unloaded meanwhile are
    /// made anew.
    pub(super) fn request_to(&self, engine: &Engine) -> Request {
        let mut request = self.request.clone();
        let fits = |conditioning: &Conditioning| engine.has_encoded(conditioning);
        for image in &mut request.images {
            if matches!(&image.prompt, Prompt::Encoded(conditioning) if !fits(conditioning)) {
                image.prompt = Prompt::Text(self.info.prompt.clone());
            }
            if matches!(&image.negative, Some(Prompt::Encoded(conditioning)) if !fits(conditioning)) {
                image.negative = self.info.negative_prompt.clone().map(Prompt::Text);
            }
        }
        request
    }
}

impl Served {
    /// Checks a request, and plans its pictures. The model's weights need not be there.
    pub(super) fn plan(self: &Arc<Self>, request: &http::Request) -> std::result::Result<Vec<Work>, Problem> {
        let outline = &self.outline;
        for (field, text) in [("prompt", Some(&request.prompt)), ("negative_prompt", request.negative_prompt.as_ref())]
        {
            if text.is_some_and(|text| text.contains('\0')) {
                return Err(Problem::invalid(field, "the text holds a NUL character"));
            }
        }
        let guidance = request.guidance.unwrap_or(outline.default_guidance());
        if !guidance.is_finite() {
            return Err(Problem::invalid("guidance_scale", format!("{guidance} is not finite; 7.5 is usual")));
        }
        self.pictures(request, guidance).map_err(|error| problem(&error))
    }

    fn pictures(self: &Arc<Self>, request: &http::Request, guidance: f32) -> Result<Vec<Work>> {
        let outline = &self.outline;
        let default = outline.default_size();
        let size = request.size.unwrap_or((default.width, default.height));
        outline.check_size(self.options(size))?;
        let choice: SamplerChoice = request.sampler.as_deref().map_or(Ok(SamplerChoice::default()), str::parse)?;
        let asked = request.steps.unwrap_or(50);
        let schedule = outline.schedule(choice, asked)?;
        let seed = request.seed.unwrap_or_else(random_seed);
        let concepts = self.assign(request, seed, guidance)?;
        // Encoding takes time, so it comes after all that can be refused.
        let engine = self.engine();
        let positive = prompt(engine.as_ref(), &request.prompt)?;
        let negative = request.negative_prompt.as_deref().map(|text| prompt(engine.as_ref(), text)).transpose()?;
        let hashes = self.hashes();
        // A client that balances its own pictures takes no part in the quotas.
        let in_stream = request.balance.is_empty();
        let work = |(i, concepts): (usize, Vec<Used>)| {
            let seed = seed.wrapping_add(i as u64);
            let info = GenerationInfo {
                prompt: request.prompt.clone(),
                negative_prompt: request.negative_prompt.clone(),
                steps: asked,
                sampler: schedule.sampler.a1111_name().into(),
                spacing: schedule.spacing.map_or("Automatic", Spacing::a1111_name).into(),
                guidance,
                seed,
                rng: crate::Rng::default().name().into(),
                width: size.0 as u32,
                height: size.1 as u32,
                original_size: None,
                crop: None,
                model: self.name.clone(),
                model_sha256: hashes.and_then(|hashes| hashes.sha256.clone()),
                model_fingerprint: Some(self.fingerprint.clone()),
                averages: outline.source().is_averaged(),
                parts: hashes.map_or_else(Vec::new, |hashes| hashes.parts.clone()),
                device: Some(self.device.name()),
                given_latents: false,
                precision: None,
                tokenizer: None,
                reuse: None,
                concepts: concepts.iter().map(Used::record).collect(),
                version: env!("CARGO_PKG_VERSION").into(),
            };
            let mut image = Image::new(positive.clone()).seed(seed).guidance(guidance);
            image.negative.clone_from(&negative);
            image.concepts = concepts.into_iter().map(|used| (used.concept, used.strength)).collect();
            let caller = request.caller.clone();
            let request = Request::from(image).steps(asked).sampler(choice);
            let (model, steps) = (self.name.clone(), schedule.steps.len());
            Work { model, size, seed, steps, image: Box::new(Planned { caller, request, info, in_stream }) }
        };
        Ok(concepts.into_iter().enumerate().map(work).collect())
    }

    /// The concepts of each image.
    fn assign(&self, request: &http::Request, seed: u64, guidance: f32) -> Result<Assignment> {
        let concepts = self.concepts();
        let mut all: Vec<Used> = self.policy().iter().flat_map(|policy| policy.always(guidance)).collect();
        all.extend(used(&request.concepts, &Until::default(), guidance, &*concepts)?);
        let groups = request.balance.iter().map(|text| group(text, &*concepts)).collect::<Result<Vec<NamedGroup>>>();
        let mut groups = groups.map_err(|error| error.of_field("balance"))?;
        // A prompt that names an attribute of the group itself is left alone.
        groups.retain(|(group, _)| group.named_in(&request.prompt).is_none());
        Ok(shared_out(&all, &groups, (request.n, seed, false), |concept| concept.strength(guidance)))
    }
}
