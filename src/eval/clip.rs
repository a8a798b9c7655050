//! CLIP (Radford et al., arXiv 2103.00020) as a judge: embeddings of pictures and texts.

use crate::backend::{Executor, Precision, Weights};
use crate::device::Device;
use crate::image::{Filter, Picture};
use crate::models::tokenizer::Tokenizer;
use crate::models::{ClipConfig, ClipVisionConfig, parse_clip_model, text_encoder, vision_encoder};
use crate::weights::Source;
use crate::{Error, Result};

/// Batch size of the vision encoder.
const BATCH: usize = 8;

/// A `CLIPModel` of transformers, ready to run on a device.
pub struct Clip {
    name: String,
    fingerprint: String,
    text: ClipConfig,
    device: Device,
    text_weights: Weights,
    tokenizer: Tokenizer,
    vision: ClipVisionConfig,
    executor: Box<dyn Executor>,
    preprocessor: Preprocessor,
}

/// The fields of `preprocessor_config.json` that are used.
#[derive(serde::Deserialize)]
struct Preprocessor {
    #[serde(default = "mean")]
    image_mean: [f32; 3],
    #[serde(default = "deviation")]
    image_std: [f32; 3],
}

fn mean() -> [f32; 3] {
    [0.481_454_66, 0.457_827_5, 0.408_210_73]
}

fn deviation() -> [f32; 3] {
    [0.268_629_54, 0.261_302_6, 0.275_777_1]
}

impl Clip {
    /// Loads the folder of a `CLIPModel` onto a device.
    ///
    /// # Errors
    /// About the first file that is missing, damaged or not supported; [`crate::ErrorKind::OutOfMemory`].
    pub fn load(source: &Source, device: &Device) -> Result<Self> {
        crate::memory::start_threads()?;
        let (text, vision) = parse_clip_model(&source.read_text("config.json")?, &source.path("config.json"))?;
        let path = source.path("preprocessor_config.json");
        let preprocessor = serde_json::from_str(&source.read_text("preprocessor_config.json")?)
            .map_err(|e| Error::damaged(path, format!("not what CLIP's processor reads: {e}")))?;
        let tensors = source.tensors("")?;
        let plan = device.plan(vision_encoder(&vision, BATCH), &[]);
        let weights = device.weights(plan.graph().weights(), &tensors, &[], Precision::Full)?;
        Ok(Clip {
            name: source.name(),
            fingerprint: tensors.fingerprint()?,
            text_weights: device.weights(text_encoder(&text, 1).weights(), &tensors, &[], Precision::Full)?,
            tokenizer: source.tokenizer("")?,
            executor: device.executor(plan, &weights)?,
            device: device.clone(),
            preprocessor,
            text,
            vision,
        })
    }

    /// Identifies the weights; see [`crate::Engine::fingerprint`].
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The folder's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number of an embedding's components.
    pub fn dimension(&self) -> usize {
        self.vision.projection_dim
    }

    /// Embeddings of texts, each of length 1. A text with more tokens than the text encoder reads is cut.
    ///
    /// # Errors
    /// Those of the tokenizer, [`crate::ErrorKind::NonFinite`], [`crate::ErrorKind::DeviceLost`].
    pub fn texts(&self, texts: &[String]) -> Result<Vec<Vec<f32>>> {
        let plan = self.device.plan(text_encoder(&self.text, 1), &[]);
        let mut executor = self.device.executor(plan, &self.text_weights)?;
        let mut ids = vec![0.0; self.text.max_position_embeddings];
        let embed = |text: &String| -> Result<Vec<f32>> {
            let encoded = self.tokenizer.encode(text)?;
            encoded.fill(&mut ids);
            executor.write("input_ids", &ids)?;
            executor.write("pooled_index", &[self.text.pooled_index(&encoded.ids) as f32])?;
            executor.step()?;
            self.normalised(&executor.read("text_embeds")?)
        };
        texts.iter().map(embed).collect()
    }

    /// Embeddings of pictures of any sizes, each of length 1. Their longer sides are cropped to squares.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a picture without pixels or with another number of bytes than its size asks
    /// for, [`crate::ErrorKind::NonFinite`], [`crate::ErrorKind::DeviceLost`].
    pub fn images(&mut self, images: &[Picture]) -> Result<Vec<Vec<f32>>> {
        let size = self.vision.image_size;
        let one = 3 * size * size;
        let mut embeds = Vec::with_capacity(images.len());
        let mut pixels = vec![0.0; BATCH * one];
        for Picture { width, height, rgb } in images {
            if rgb.is_empty() || rgb.len() as u128 != 3 * u128::from(*width) * u128::from(*height) {
                let problem = format!("a picture of {width}x{height} pixels holds {} bytes", rgb.len());
                return Err(Error::invalid("images", problem).advise("give pictures of three bytes per pixel"));
            }
        }
        for images in images.chunks(BATCH) {
            for (image, out) in images.iter().zip(pixels.chunks_exact_mut(one)) {
                patches(&fitted(image, size), size, self.vision.patch_size, &self.preprocessor, out);
            }
            self.executor.write("patches", &pixels)?;
            self.executor.step()?;
            let rows = self.executor.read("image_embeds")?;
            let rows = rows.chunks_exact(self.vision.projection_dim).take(images.len());
            embeds.extend(rows.map(|row| self.normalised(row)).collect::<Result<Vec<_>>>()?);
        }
        Ok(embeds)
    }

    /// An embedding at length 1. One that is not finite would be nearest to any class.
    fn normalised(&self, x: &[f32]) -> Result<Vec<f32>> {
        if !x.iter().all(|x| x.is_finite()) {
            return Err(Error::non_finite(format!("the CLIP of {} gave NaN or infinity", self.name)));
        }
        let norm = x.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        Ok(x.iter().map(|x| x / norm).collect())
    }
}

/// Cosine of the angle between two embeddings of length 1.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Resizes the shorter side to `size` and crops the centre, to `[size, size, 3]` bytes.
pub(super) fn fitted(image: &Picture, size: usize) -> Vec<u8> {
    let (w, h) = (image.width as usize, image.height as usize);
    let longer = |side: usize| size * side / w.min(h);
    let (new_w, new_h) = if w <= h { (size, longer(h)) } else { (longer(w), size) };
    let whole = image.resized(new_w as u32, new_h as u32, Filter::Bicubic);
    let (top, left) = ((new_h - size) / 2, (new_w - size) / 2);
    whole.cropped(left as u32, top as u32, size as u32, size as u32).rgb
}

/// Splits a picture into normalised patches, `[patches, 3, patch, patch]`.
fn patches(rgb: &[u8], size: usize, patch: usize, how: &Preprocessor, out: &mut [f32]) {
    let side = size / patch;
    for (i, out) in out.chunks_exact_mut(3 * patch * patch).enumerate() {
        for (j, out) in out.iter_mut().enumerate() {
            let (c, y, x) = (j / (patch * patch), i / side * patch + j / patch % patch, i % side * patch + j % patch);
            let value = f32::from(rgb[(y * size + x) * 3 + c]) / 255.0;
            *out = (value - how.image_mean[c]) / how.image_std[c];
        }
    }
}
