//! From the fields of a request to images, each with the record that its file will hold.

use super::adapters::AdapterSet;
use super::prompts::{of_negative, record_reading, take_tags, used_embeddings, words};
use crate::concept::{Shelf, Used, group, shared_out, used};
use crate::diffusion::noise::Rng;
use crate::diffusion::scheduler::{SamplerChoice, Spacing};
use crate::engine::{
    Engine, Image, Outline, Prompt, PromptText, Reading, Request, SessionOptions, Size, Texts, common_chunks, encoded,
};
use crate::image::GenerationInfo;
use crate::models::prompt::{LoraTag, PromptSyntax};
use crate::weights::{Adapter, Embedding};
use crate::{Error, Result, Subject};
use respodiff_fields::{Request as Asked, Wrong};
use std::borrow::Cow;
use std::sync::Arc;

/// Sampling steps by default, as in diffusers.
const STEPS: usize = 50;
/// Most pictures of a request.
const MOST_PICTURES: usize = 10_000;
/// Characters of lost words that a warning shows.
const SHOWN: usize = 1000;

/// A checkpoint as requests are planned for it, and what they may name.
pub(crate) struct Offer<'a> {
    pub outline: &'a Outline,
    /// The tokenizers, which know the embeddings.
    pub texts: &'a Texts,
    pub embeddings: &'a [Arc<Embedding>],
    /// The part of a picture's record that is the same for all pictures of the model.
    pub record: &'a GenerationInfo,
    pub concepts: &'a dyn Shelf,
    /// Opens an adapter by its name.
    pub adapter: &'a dyn Fn(&str) -> Result<Arc<Adapter>>,
}

/// The settings that all pictures of one batch share. With another key a picture would be another one, since the UNet's
/// sums depend on the length of prompts, and the weights on the adapters.
#[derive(Clone, PartialEq)]
pub(crate) struct BatchKey {
    pub size: Size,
    /// [`SessionOptions::chunks`].
    pub chunks: usize,
    /// The adapters beside those that the engine has anyway.
    pub adapters: AdapterSet,
}

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
    pub key: BatchKey,
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

/// The images of a request.
pub(crate) struct Plan {
    pub images: Vec<Planned>,
    /// Things that are no error but that the caller may want to know.
    pub warnings: Vec<String>,
}

/// Checks a request and plans its images. Errors name fields as the request does.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] for a field that cannot be served, and those of finding concepts and adapters.
pub(crate) fn plan(asked: &Asked, offer: &Offer) -> Result<Plan> {
    checked(asked, offer).map_err(in_fields)
}

fn checked(asked: &Asked, offer: &Offer) -> Result<Plan> {
    let Offer { outline, record, .. } = offer;
    check_texts(asked)?;
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
    let guided = schedule.sampler.guides(guidance) && !outline.reads_guidance();
    let texts = AllTexts::read(asked, guided, offer)?;
    let (concepts, mut warnings) = concepts(asked, (first, guidance), offer.concepts)?;
    warnings.extend(texts.warnings);
    let image = |(i, concepts): (usize, Vec<Used>)| {
        let seed = first + i as u64;
        let words = &texts.prompts[i / asked.n];
        let mut info = GenerationInfo {
            prompt: words.prompt.text.clone(),
            negative_prompt: asked.negative_prompt.clone(),
            prompt_2: asked.prompt_2.clone(),
            negative_prompt_2: asked.negative_prompt_2.clone(),
            embeddings: used_embeddings(offer.embeddings, &words.embeddings.iter().map(String::as_str).collect()),
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
            ..(*record).clone()
        };
        record_reading(&mut info, words.prompt.syntax, words.prompt.clip_skip);
        info.adapters.extend(words.adapters.0.iter().map(|(adapter, weight)| adapter.record(*weight)));
        let mut image = Image::new(words.prompt.clone()).seed(seed).guidance(guidance).guidance_rescale(rescale);
        image.negative = texts.negative.clone().map(Prompt::from);
        let request = Request::from(image).steps(steps).sampler(choice);
        let key = BatchKey { size, chunks: words.chunks, adapters: words.adapters.clone() };
        Planned { request, info, concepts, calls: schedule.steps.len(), key }
    };
    Ok(Plan { images: concepts.into_iter().enumerate().map(image).collect(), warnings })
}

fn check_texts(asked: &Asked) -> Result<()> {
    let prompts = asked.prompts.iter().map(|text| ("prompt", text));
    let others = [
        ("negative_prompt", &asked.negative_prompt),
        ("prompt_2", &asked.prompt_2),
        ("negative_prompt_2", &asked.negative_prompt_2),
    ];
    let others = others.into_iter().filter_map(|(field, text)| Some((field, text.as_ref()?)));
    match prompts.chain(others).find(|(_, text)| text.contains('\0')) {
        None => Ok(()),
        Some((field, _)) => Err(Error::invalid(field, "the text holds a NUL character").advise("take it out")),
    }
}

/// A prompt of a request as it is read.
struct Words {
    /// Without tags of adapters.
    prompt: PromptText,
    adapters: AdapterSet,
    /// Names of the embeddings of this prompt and of the negative prompt.
    embeddings: Vec<String>,
    /// [`SessionOptions::chunks`] of its images.
    chunks: usize,
}

/// All prompts of a request.
struct AllTexts {
    prompts: Vec<Words>,
    negative: Option<PromptText>,
    warnings: Vec<String>,
}

impl AllTexts {
    fn read(asked: &Asked, guided: bool, offer: &Offer) -> Result<Self> {
        let syntax: PromptSyntax = asked.prompt_syntax.as_deref().map_or(Ok(PromptSyntax::default()), str::parse)?;
        let clip_skip = asked.clip_skip.unwrap_or(1);
        let named = |name: &str, weight, adapters: &mut AdapterSet| adapters.push((offer.adapter)(name)?, weight);
        let mut of_all = AdapterSet::default();
        asked.loras.iter().try_for_each(|(name, weight)| named(name, *weight, &mut of_all))?;
        let mut warnings = Vec::new();
        let mut read = |what: &str, prompt: &PromptText| -> Result<Reading> {
            let reading = offer.texts.measure(prompt).map_err(in_prompt)?;
            if syntax.is_suspect(&prompt.text) {
                let remedy = "prompt_syntax a1111 or comfy reads its signs";
                warnings.push(format!("the {what} looks weighted, but is read as plain text; {remedy}"));
            }
            if !reading.lost.is_empty() {
                let lost: String = reading.lost.chars().take(SHOWN).collect();
                let remedy = "prompt_syntax a1111 or comfy uses all words";
                warnings.push(format!("the {what} is too long; {remedy}, but these are not used: {lost}"));
            }
            Ok(reading)
        };
        let negative = (asked.negative_prompt.as_deref(), asked.negative_prompt_2.as_deref());
        let negative = words(negative, syntax, clip_skip);
        let of_none = Reading { chunks: 1, ..Reading::default() };
        let beside = negative.as_ref().map_or(Ok(of_none), |negative| read("negative prompt", negative));
        let beside = beside.map_err(of_negative)?;
        let prompt = |text: &String| -> Result<Words> {
            let (text, tags) = take_tags(text, syntax)?;
            let mut adapters = of_all.clone();
            for LoraTag { name, weight } in tags {
                named(&name, weight, &mut adapters).map_err(|error| error.of_field("prompt"))?;
            }
            let prompt = PromptText::new(text).second(asked.prompt_2.clone()).syntax(syntax).clip_skip(clip_skip);
            let reading = read("prompt", &prompt)?;
            let chunks = if guided { common_chunks(reading.chunks, beside.chunks)? } else { reading.chunks };
            let embeddings = reading.embeddings.union(&beside.embeddings).cloned().collect();
            Ok(Words { prompt, adapters, embeddings, chunks })
        };
        let prompts = asked.prompts.iter().map(prompt).collect::<Result<_>>()?;
        warnings.dedup();
        Ok(AllTexts { prompts, negative, warnings })
    }
}

/// The error about a prompt that is read, whose remedy is always in the prompt itself.
fn in_prompt(error: Error) -> Error {
    match error.subject() {
        Subject::Field("lora_folder") => error.of_field("prompt"),
        Subject::Field("embedding") => {
            let renamed = Error::invalid("prompt", error.problem().to_string());
            match error.advice() {
                Some(advice) => renamed.advise(advice.to_string()),
                None => renamed,
            }
        }
        _ => error,
    }
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

/// Encodes the images' prompts, each text once.
///
/// # Errors
/// Those of [`Engine::encode`].
pub(crate) fn encode<'a>(engine: &Engine, planned: impl Iterator<Item = &'a mut Planned>) -> Result<()> {
    let mut images: Vec<&mut Image> = planned.flat_map(|planned| &mut planned.request.images).collect();
    let texts: Vec<Image> = images.iter().map(|image| (**image).clone()).collect();
    images.iter_mut().zip(encoded(engine, &texts)?).for_each(|(image, encoded)| **image = encoded);
    Ok(())
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
