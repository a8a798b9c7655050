//! Requests: the images of a batch, each with a prompt, seed, guidance scale and concepts of its own.

use super::init_image::InitImage;
use super::text::Conditioning;
use crate::concept::{Concept, Strength};
use crate::diffusion::noise::Rng;
use crate::diffusion::scheduler::SamplerChoice;
use crate::image::Picture;
use crate::models::prompt::PromptSyntax;
use std::sync::Arc;

/// The words of a prompt, and how they are read. Texts convert into it, in plain syntax.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[must_use]
pub struct PromptText {
    /// The words.
    pub text: String,
    /// SDXL alone: words for the second text encoder; the same by default, and if they are empty, as in diffusers.
    pub second: Option<String>,
    /// The language of both.
    pub syntax: PromptSyntax,
    /// The clip skip as A1111 counts it: how far from the end the hidden states of the text encoder are taken; 1 is the
    /// checkpoint's own way. diffusers counts from 0.
    pub clip_skip: usize,
}

impl PromptText {
    /// Words in plain syntax.
    pub fn new(text: impl Into<String>) -> Self {
        PromptText { text: text.into(), second: None, syntax: PromptSyntax::Plain, clip_skip: 1 }
    }

    /// The same with other words for SDXL's second text encoder.
    pub fn second(self, second: Option<String>) -> Self {
        PromptText { second, ..self }
    }

    /// The same in another syntax.
    pub fn syntax(self, syntax: PromptSyntax) -> Self {
        PromptText { syntax, ..self }
    }

    /// The same with a clip skip.
    pub fn clip_skip(self, clip_skip: usize) -> Self {
        PromptText { clip_skip, ..self }
    }
}

impl Default for PromptText {
    fn default() -> Self {
        PromptText::new("")
    }
}

impl<T: Into<String>> From<T> for PromptText {
    fn from(text: T) -> Self {
        PromptText::new(text)
    }
}

/// A prompt: words, or their encoding by [`crate::Engine::encode`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Prompt {
    /// Words, which are encoded when they are needed.
    Text(PromptText),
    /// Encoded words.
    Encoded(Conditioning),
}

impl Default for Prompt {
    fn default() -> Self {
        Prompt::Text(PromptText::default())
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Prompt::Text(text.into())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Prompt::Text(text.into())
    }
}

impl From<PromptText> for Prompt {
    fn from(text: PromptText) -> Self {
        Prompt::Text(text)
    }
}

impl From<Conditioning> for Prompt {
    fn from(conditioning: Conditioning) -> Self {
        Prompt::Encoded(conditioning)
    }
}

impl From<&Conditioning> for Prompt {
    fn from(conditioning: &Conditioning) -> Self {
        Prompt::Encoded(conditioning.clone())
    }
}

/// The latents before the first step.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Start {
    /// The seed's noise.
    #[default]
    Noise,
    /// This unit noise, `[c, height / 8, width / 8]`.
    Latents(Arc<[f32]>),
    /// A picture under noise.
    Image(InitImage),
}

/// One image of a [`Request`].
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
#[must_use]
pub struct Image {
    /// The words that say what to show.
    pub prompt: Prompt,
    /// The words that say what to avoid; used with guidance only. `None` is an empty prompt with the clip skip of
    /// [`Image::prompt`], or, if SDXL's
    /// `model_index.json` says `force_zeros_for_empty_prompt`, zeros in place of a prompt's states, as in diffusers.
    pub negative: Option<Prompt>,
    /// Seed of the noise, as in diffusers: the same seed makes the same picture in every batch.
    pub seed: u64,
    /// Guidance scale; [`crate::Engine::default_guidance`] by default. At 1 or less there is no guidance, as in
    /// diffusers, except with CFG++ ([`crate::Sampler::is_cfg_pp`]).
    pub guidance: Option<f32>,
    /// The share, from 0 to 1, by which the guided prediction's standard deviation is brought to that of the prediction
    /// for the prompt: section 3.4 of arXiv 2305.08891, and `guidance_rescale` in diffusers.
    pub guidance_rescale: f32,
    /// The timesteps between which there is guidance, in either order (arXiv 2404.07724); all by default. At the others
    /// the prediction for the prompt is taken alone. A step in which no image of the batch has guidance computes
    /// nothing else, so it takes half the time.
    pub guidance_interval: Option<(f32, f32)>,
    /// Concepts and their strengths, which add up.
    pub concepts: Vec<(Arc<Concept>, Strength)>,
    /// The latents before the first step.
    pub start: Start,
}

impl Image {
    /// An image of a prompt from seed 0.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Image { prompt: prompt.into(), ..Image::default() }
    }

    /// The same with a negative prompt.
    pub fn negative(self, prompt: impl Into<Prompt>) -> Self {
        Image { negative: Some(prompt.into()), ..self }
    }

    /// The same from another seed.
    pub fn seed(self, seed: u64) -> Self {
        Image { seed, ..self }
    }

    /// The same with a guidance scale.
    pub fn guidance(self, guidance: f32) -> Self {
        Image { guidance: Some(guidance), ..self }
    }

    /// The same with the standard deviation of guided predictions brought nearer to that without guidance.
    pub fn guidance_rescale(self, guidance_rescale: f32) -> Self {
        Image { guidance_rescale, ..self }
    }

    /// The same with guidance between two timesteps alone.
    pub fn guidance_interval(self, interval: (f32, f32)) -> Self {
        Image { guidance_interval: Some(interval), ..self }
    }

    /// The same with one concept more, of a weight or a [`Strength`], such as [`Concept::strength`].
    pub fn concept(mut self, concept: Arc<Concept>, strength: impl Into<Strength>) -> Self {
        self.concepts.push((concept, strength.into()));
        self
    }

    /// The same from other latents.
    pub fn start(self, start: Start) -> Self {
        Image { start, ..self }
    }
}

/// One call, for as many images as the session's batch has. They share size and sampler.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[must_use]
pub struct Request {
    /// The images.
    pub images: Vec<Image>,
    /// Sampling steps.
    pub steps: usize,
    /// Sampler and spacing; the checkpoint's own by default.
    pub sampler: SamplerChoice,
    /// The random number generator that the seeds are meant for.
    pub rng: Rng,
    /// SDXL alone: width and height of the original picture that the images are to look as if made from; by default
    /// their own size.
    pub original_size: Option<(usize, usize)>,
    /// SDXL alone: pixels cropped from the left and the top of that original picture.
    pub crop: (usize, usize),
}

impl Request {
    /// These images in 50 steps, diffusers' default.
    pub fn new(images: Vec<Image>) -> Self {
        Request {
            images,
            steps: 50,
            sampler: SamplerChoice::default(),
            rng: Rng::default(),
            original_size: None,
            crop: (0, 0),
        }
    }

    /// The same in `steps` steps.
    pub fn steps(self, steps: usize) -> Self {
        Request { steps, ..self }
    }

    /// The same with another sampler.
    pub fn sampler(self, sampler: SamplerChoice) -> Self {
        Request { sampler, ..self }
    }

    /// The same with seeds that are meant for another generator.
    pub fn rng(self, rng: Rng) -> Self {
        Request { rng, ..self }
    }

    /// The same with SDXL's size conditioning (arXiv 2307.01952, section 2.2).
    pub fn conditioned_on_size(self, original_size: Option<(usize, usize)>, crop: (usize, usize)) -> Self {
        Request { original_size, crop, ..self }
    }
}

impl From<Image> for Request {
    fn from(image: Image) -> Self {
        Request::new(vec![image])
    }
}

/// The progress of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// This many UNet calls of `total` are done.
    Step {
        /// Calls done.
        done: usize,
        /// Calls in all; some samplers make one more than the steps asked for.
        total: usize,
    },
    /// This many images of `total` are decoded.
    Decoded {
        /// Images done.
        done: usize,
        /// Images in all.
        total: usize,
    },
}

/// The result of a run.
#[derive(Clone)]
#[non_exhaustive]
pub struct Output {
    /// The pictures, in the order of the request's images.
    pub pictures: Vec<Picture>,
    /// The final latents, `[batch, c, height / 8, width / 8]`, as the UNet sees them (the VAE's scale not yet undone).
    pub latents: Vec<f32>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Output {{ pictures: {:?}, latents: [{} numbers] }}", self.pictures, self.latents.len())
    }
}
