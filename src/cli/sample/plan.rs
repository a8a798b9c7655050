//! The pictures of a run before any is made: their prompts, seeds, and batches.

use super::Args;
use crate::cli::prompts::{self, Item};
use crate::engine::{Conditioning, Engine, PromptText};
use crate::pipeline::of_negative;
use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;

/// The largest number of images of a run.
pub(super) const MAX_IMAGES: usize = 1_000_000;

impl Args {
    /// The prompts, and the number of images of each.
    pub(super) fn items(&self) -> Result<(Vec<Item>, usize)> {
        let items = match (&self.prompts, self.prompt.as_ref().or(self.prompt_flag.as_ref())) {
            (Some(file), _) => prompts::read(file)?,
            (None, Some(prompt)) => vec![Item::new(prompt)],
            (None, None) => return Err(Error::invalid("prompt", "there is none").advise("give one")),
        };
        let each = match (self.images, &self.prompts) {
            (Some(images), _) => images as usize,
            (None, Some(_)) => 1,
            (None, None) if self.batch > MAX_IMAGES => {
                let problem = format!("a batch of {} images is not possible", self.batch);
                return Err(Error::invalid("batch", problem).advise("give 1 to 256"));
            }
            // A batch of 0 is refused later, with a message of its own.
            (None, None) => self.batch.max(1),
        };
        Ok((items, each))
    }
}

/// One image of a run.
pub(super) struct Planned<'a> {
    pub(super) item: &'a Item,
    pub(super) seed: u64,
}

/// The images of a run, prompt by prompt. Seeds count up from image to image across prompts, except that the images of
/// a prompt with a seed of its own count from that seed.
pub(super) fn plan(items: &[Item], each: usize, base: u64) -> Result<Vec<Planned<'_>>> {
    let total = items.len().saturating_mul(each);
    if total > MAX_IMAGES {
        let problem = format!("{} prompts with {each} images each are more than {MAX_IMAGES} pictures", items.len());
        return Err(Error::invalid("images", problem).advise("give fewer"));
    }
    let planned = |i: usize| -> Result<Planned> {
        let (item, image) = (&items[i / each], i % each);
        let seed = item.seed.map_or(base.checked_add(i as u64), |seed| seed.checked_add(image as u64));
        let too_large =
            || Error::invalid("seed", "the last picture's seed would be too large").advise("give a smaller one");
        Ok(Planned { item, seed: seed.ok_or_else(too_large)? })
    };
    (0..total).map(planned).collect()
}

/// The batches of a run: neighbours whose prompts have as many chunks, `batch` at most.
pub(super) fn batches(images: usize, batch: usize, chunks: impl Fn(usize) -> usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    for i in 0..images {
        match batches.last_mut() {
            Some(last) if last.len() < batch && chunks(last.start) == chunks(i) => last.end = i + 1,
            _ => batches.push(i..i + 1),
        }
    }
    batches
}

/// Each item's prompt and negative prompt, encoded once for all of its images.
pub(super) fn encode(
    engine: &Engine,
    args: &Args,
    items: &[Item],
) -> Result<Vec<(Conditioning, Option<Conditioning>)>> {
    let mut known: HashMap<PromptText, Conditioning> = HashMap::new();
    let mut encode = |what: &str, text: PromptText| -> Result<Conditioning> {
        if let Some(encoded) = known.get(&text) {
            return Ok(encoded.clone());
        }
        let encoded = engine.encode(text.clone())?;
        args.text.warn(what, &text, &encoded);
        known.insert(text, encoded.clone());
        Ok(encoded)
    };
    let pair = |item: &Item| {
        let negative = item.negative_prompt.as_deref().or(args.negative_prompt.as_deref());
        let negative = args.text.negative(negative, item.negative_prompt_2.as_deref());
        let negative = negative.map(|text| encode("negative prompt", text).map_err(of_negative)).transpose()?;
        Ok((encode("prompt", args.text.prompt(&item.prompt, item.prompt_2.as_deref()))?, negative))
    };
    items.iter().map(pair).collect()
}
