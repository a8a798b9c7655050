//! From the fields of a request to images, each with the record that its file will hold.

use crate::concept::{Shelf, Used, group, shared_out, used};
use crate::diffusion::noise::Rng;
use crate::diffusion::scheduler::{SamplerChoice, Spacing};
use crate::engine::{Engine, Image, Outline, Prompt, Request, SessionOptions, Size, encoded};
use crate::image::GenerationInfo;
use crate::{Error, Result, Subject};
use respodiff_fields::{Request as Asked, Wrong};
use std::borrow::Cow;

/// Sampling steps by default, as in diffusers.
const STEPS: usize = 50;
/// Most pictures of a request.
const MOST_PICTURES: usize = 10_000;

/// One image of a request.
#[derive(Clone)]
pub(crate) struct Planned {
    /// A request for this image alone, without its concepts.
    pub request: Request,
    /// The record of its picture, without its concepts.
    pub info: GenerationInfo,
    /// Its concepts.
    pub concepts: Vec<Used>,
    /// Its calls of the UNet.
    pub calls: usize,
}

impl Planned {
    /// The request and the record, with the concepts in both.
    pub fn finish(mut self) -> (Request, GenerationInfo) {
        self.info.concepts.extend(self.concepts.iter().map(Used::record));
        let concepts = self.concepts.into_iter().map(|used| (used.concept, used.strength));
        self.request.images.iter_mut().for_each(|image| image.concepts.extend(concepts.clone()));
        (self.request, self.info)
    }
}

/// The images of a request, which have a size in common.
pub(crate) struct Plan {
    pub images: Vec<Planned>,
    pub size: Size,
    /// What the caller may want to know, although it is no error.
    pub warnings: Vec<String>,
}

/// Checks a request and plans its images. `record` holds what the records of all pictures of the checkpoint have in
/// common. Errors name fields as the request does.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] for a field that cannot be served, and those of `shelf` for concepts.
pub(crate) fn plan(asked: &Asked, outline: &Outline, record: &GenerationInfo, shelf: &dyn Shelf) -> Result<Plan> {
    checked(asked, outline, record, shelf).map_err(in_fields)
}

fn checked(asked: &Asked, outline: &Outline, record: &GenerationInfo, shelf: &dyn Shelf) -> Result<Plan> {
    let prompts = asked.prompts.iter().map(|text| ("prompt", text));
    for (field, text) in prompts.chain(asked.negative_prompt.iter().map(|text| ("negative_prompt", text))) {
        if text.contains('\0') {
            return Err(Error::invalid(field, "the text holds a NUL character"));
        }
    }
    let count = asked.n.checked_mul(asked.prompts.len()).filter(|count| (1..=MOST_PICTURES).contains(count));
    let Some(count) = count else {
        let problem = format!("{} pictures of each of {} prompts are not possible", asked.n, asked.prompts.len());
        return Err(Error::invalid("n", problem).advise(format!("make 1 to {MOST_PICTURES} in one request")));
    };
    let default = outline.default_size();
    let size = Size::new(asked.width.unwrap_or(default.width), asked.height.unwrap_or(default.height));
    outline.check_size(SessionOptions::new(size))?;
    let mut choice: SamplerChoice = asked.sampler.as_deref().map_or(Ok(SamplerChoice::default()), str::parse)?;
    choice.tuning.eta = asked.eta;
    let steps = asked.steps.unwrap_or(STEPS);
    let schedule = outline.schedule(choice, steps)?;
    let guidance = asked.guidance.unwrap_or(schedule.sampler.default_guidance(outline.default_guidance()));
    if !guidance.is_finite() {
        return Err(Error::invalid("guidance", format!("{guidance} is not finite")).advise("7.5 is usual"));
    }
    let rescale = asked.guidance_rescale.unwrap_or(0.0);
    if !(0.0..=1.0).contains(&rescale) {
        let problem = format!("{rescale} is not possible");
        return Err(Error::invalid("guidance_rescale", problem).advise("give 0 to 1; 0.7 is usual"));
    }
    let first = asked.seed.unwrap_or_else(crate::draws::random_seed);
    if first.checked_add(count as u64 - 1).is_none() {
        return Err(Error::invalid("seed", "the last picture's seed would be too large").advise("give a smaller one"));
    }
    let prompt = |i: usize| asked.prompts[i / asked.n].as_str();
    let (concepts, warnings) = concepts(asked, (first, guidance), shelf)?;
    let image = |(i, concepts): (usize, Vec<Used>)| {
        let seed = first + i as u64;
        let info = GenerationInfo {
            prompt: prompt(i).into(),
            negative_prompt: asked.negative_prompt.clone(),
            steps,
            sampler: schedule.sampler.a1111_name().into(),
            spacing: schedule.spacing.map_or("Automatic", Spacing::a1111_name).into(),
            guidance,
            guidance_rescale: Some(rescale).filter(|share| *share != 0.0),
            tuning: schedule.tuning,
            seed,
            rng: Rng::default().name().into(),
            width: size.width as u32,
            height: size.height as u32,
            ..record.clone()
        };
        let mut image = Image::new(prompt(i)).seed(seed).guidance(guidance).guidance_rescale(rescale);
        image.negative = asked.negative_prompt.as_deref().map(Prompt::from);
        let request = Request::from(image).steps(steps).sampler(choice);
        Planned { request, info, concepts, calls: schedule.steps.len() }
    };
    Ok(Plan { images: concepts.into_iter().enumerate().map(image).collect(), size, warnings })
}

/// The concepts of each image, and warnings. A prompt that names an attribute of a group is left alone by that group;
/// images whose prompts leave the same groups free share the quotas.
fn concepts(asked: &Asked, (seed, guidance): (u64, f32), shelf: &dyn Shelf) -> Result<(Vec<Vec<Used>>, Vec<String>)> {
    let all = used(&asked.concepts, shelf, |concept, weight| {
        let own = concept.strength(guidance);
        crate::Strength { weight: weight.unwrap_or(own.weight), ..own }
    })?;
    let groups = asked.balance.iter().map(|text| group(text, shelf)).collect::<Result<Vec<_>>>();
    let groups = groups.map_err(|error| error.of_field("balance"))?;
    let mut warnings = Vec::new();
    // For each combination of free groups, the images with it.
    let mut shares: Vec<(Vec<usize>, Vec<usize>)> = Vec::new();
    for (p, prompt) in asked.prompts.iter().enumerate() {
        let mut free = Vec::new();
        for (g, (group, _)) in groups.iter().enumerate() {
            match group.named_in(prompt) {
                None => free.push(g),
                Some(word) => {
                    let balance = &asked.balance[g];
                    warnings.push(format!("the prompt says `{word}`, so it is not balanced by {balance}: {prompt}"));
                }
            }
        }
        let images = p * asked.n..(p + 1) * asked.n;
        match shares.iter_mut().find(|(other, _)| *other == free) {
            Some((_, others)) => others.extend(images),
            None => shares.push((free, images.collect())),
        }
    }
    let mut concepts = vec![Vec::new(); asked.n * asked.prompts.len()];
    for (free, images) in shares {
        let groups: Vec<_> = free.into_iter().map(|g| groups[g].clone()).collect();
        let seed = seed + images[0] as u64;
        let shared = shared_out(&all, &groups, (images.len(), seed, false), |concept| concept.strength(guidance));
        images.into_iter().zip(shared).for_each(|(i, shared)| concepts[i] = shared);
    }
    warnings.dedup();
    Ok((concepts, warnings))
}

/// Encodes the images' prompts, each text once, and tells which words were too many.
///
/// # Errors
/// Those of [`Engine::encode`].
pub(crate) fn encode(engine: &Engine, planned: &mut [Planned]) -> Result<Vec<String>> {
    let images: Vec<Image> = planned.iter().flat_map(|planned| planned.request.images.iter().cloned()).collect();
    let mut warnings = Vec::new();
    for (planned, image) in planned.iter_mut().zip(encoded(engine, &images)?) {
        for prompt in [Some(&image.prompt), image.negative.as_ref()].into_iter().flatten() {
            if let Prompt::Encoded(encoding) = prompt
                && !encoding.truncated().is_empty()
            {
                let words: String = encoding.truncated().chars().take(1000).collect();
                warnings.push(format!("the prompt is too long; these words are not used: {words}"));
            }
        }
        planned.request.images = vec![image];
    }
    warnings.dedup();
    Ok(warnings)
}

/// The error with the field by its name in requests.
pub(crate) fn in_fields(error: Error) -> Error {
    let field = match error.subject() {
        Subject::Field("steps") => "num_inference_steps",
        Subject::Field("guidance") => "guidance_scale",
        Subject::Field("width" | "height") => "size",
        Subject::Field("spacing") => "sampler",
        _ => return error,
    };
    error.of_field(field)
}

/// The error about a field that is wrong.
pub(super) fn refused(wrong: Wrong) -> Error {
    match wrong.field {
        Some(Cow::Borrowed(field)) => Error::invalid(field, wrong.problem),
        // A field that is not known has no place in the program.
        Some(Cow::Owned(_)) | None => Error::new(crate::ErrorKind::Invalid, Subject::Run, wrong.to_string()),
    }
}
