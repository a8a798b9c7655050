//! Pictures: the conversion of network output to 8-bit RGB, resizing, PNG files, and the text in them that tells how a
//! picture was made.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::diffusion::scheduler::Tuning;
use crate::{Error, Result};

#[cfg(feature = "pictures")]
pub mod exif;
mod parameters;
#[cfg(feature = "pictures")]
mod read;
mod region;
mod resize;
mod sign;

pub use parameters::Parameters;
#[cfg(feature = "pictures")]
pub use read::stored;
pub use region::{LIGHT, Region};
pub use resize::Filter;
#[cfg(feature = "c2pa")]
pub use sign::Signer;
#[cfg(feature = "cli")]
pub(crate) use sign::unsigned;

/// PNG keyword of [`GenerationInfo::parameters`], which the A1111 web UI and its successors read.
pub const PARAMETERS_KEYWORD: &str = "parameters";
/// PNG keyword of [`GenerationInfo::json`].
pub const JSON_KEYWORD: &str = "respodiff";

/// PNG keyword of `XMP` (XMP specification part 3, section 1.1.5).
pub const XMP_KEYWORD: &str = "XML:com.adobe.xmp";
/// The XMP packet that is in the file of every generated picture. It says, in IPTC's words, that the picture is media
/// made by a trained algorithm, as programs look for it that label such pictures. It is the same in every file, so
/// files of equal pictures and parameters stay equal. The byte order mark in it also makes it an `iTXt` chunk in a PNG,
/// as XMP must be.
pub const XMP: &str = concat!(
    "<?xpacket begin=\"\u{feff}\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>",
    "<x:xmpmeta xmlns:x=\"adobe:ns:meta/\"><rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">",
    "<rdf:Description rdf:about=\"\" xmlns:xmp=\"http://ns.adobe.com/xap/1.0/\"",
    " xmlns:Iptc4xmpExt=\"http://iptc.org/std/Iptc4xmpExt/2008-02-29/\" xmp:CreatorTool=\"respodiff\"",
    " Iptc4xmpExt:DigitalSourceType=\"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia\"/>",
    "</rdf:RDF></x:xmpmeta><?xpacket end=\"r\"?>",
);

/// `XMP` as the content of an APP1 segment of a JPEG file (XMP specification part 3, section 1.1.3).
#[cfg(feature = "eval")]
pub(crate) fn xmp_segment() -> Vec<u8> {
    [b"http://ns.adobe.com/xap/1.0/\0", XMP.as_bytes()].concat()
}

/// An 8-bit RGB picture.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `height * width * 3` bytes: rows from the top, pixels from the left, red, green, blue.
    pub rgb: Vec<u8>,
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture {{ {}x{} }}", self.width, self.height)
    }
}

impl Picture {
    /// The lightness of each pixel, from 0 to 255: ITU-R 601-2, rounded as Pillow's `convert("L")` does.
    pub fn lightness(&self) -> Vec<u8> {
        let of =
            |&[r, g, b]: &[u8; 3]| (u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000) >> 16;
        self.rgb.as_chunks::<3>().0.iter().map(|pixel| of(pixel) as u8).collect()
    }

    /// Converts the image that a VAE decodes, `[height, width, 3]`, with values from -1 (black) to 1 (white). Values
    /// outside are clamped.
    ///
    /// Rounds as diffusers' `VaeImageProcessor` does: `(x / 2 + 0.5) * 255` in f32, halves to even.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`] if a value is NaN or infinite; [`crate::ErrorKind::Invalid`] if the sizes do not
    /// agree.
    pub fn from_hwc(values: &[f32], height: usize, width: usize) -> Result<Self> {
        let sizes = (u32::try_from(width), u32::try_from(height));
        let (Ok(columns @ 1..), Ok(rows @ 1..)) = sizes else {
            return Err(Error::invalid("size", format!("a picture of {width}x{height} pixels cannot be made")));
        };
        if width.checked_mul(height).and_then(|plane| plane.checked_mul(3)) != Some(values.len()) {
            return Err(Error::invalid(
                "rgb",
                format!("{} values are not an RGB picture of {width}x{height} pixels", values.len()),
            ));
        }
        if let Some(bad) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::non_finite(format!("the decoded image holds {bad}, so no picture is made of it"))
                .advise("try another seed, less guidance or f32"));
        }
        let byte = |value: &f32| ((value * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
        Ok(Picture { width: columns, height: rows, rgb: values.iter().map(byte).collect() })
    }

    /// Encodes a generated picture as PNG, with the mark that it is one (`XMP`). Each `(keyword, text)` becomes a
    /// `tEXt` chunk if the text is Latin-1, else an `iTXt` chunk.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if `rgb` does not match the size, a keyword is not 1 to 79 Latin-1 characters, or
    /// a text holds U+0000.
    pub fn to_png(&self, metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
        self.png(&[metadata, &[(XMP_KEYWORD, XMP)]].concat())
    }

    /// [`Picture::to_png`] without the mark, for plots.
    pub(crate) fn png(&self, metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
        let refused =
            |error: png::EncodingError| Error::invalid("rgb", format!("cannot encode the picture as PNG: {error}"));
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        // Thirty times as fast as the default, for files within 5 % of its size either way.
        encoder.set_compression(png::Compression::Fast);
        for &(keyword, text) in metadata {
            if keyword.contains('\0') || text.contains('\0') {
                return Err(Error::invalid(
                    "metadata",
                    format!("PNG text {keyword:?} cannot hold the character U+0000"),
                ));
            }
            let is_latin1 = text.chars().all(|c| u32::from(c) <= 0xFF);
            let (keyword, text) = (keyword.to_string(), text.to_string());
            let added = match is_latin1 {
                true => encoder.add_text_chunk(keyword, text),
                false => encoder.add_itxt_chunk(keyword, text),
            };
            added.map_err(refused)?;
        }
        let mut writer = encoder.write_header().map_err(refused)?;
        writer.write_image_data(&self.rgb).map_err(refused)?;
        writer.finish().map_err(refused)?;
        Ok(bytes)
    }

    /// [`Picture::to_png`] with the record of how the picture was made, for other programs and for this one.
    ///
    /// # Errors
    /// Those of [`Picture::to_png`] and [`GenerationInfo::json`].
    pub fn to_recorded_png(&self, info: &GenerationInfo) -> Result<Vec<u8>> {
        self.to_png(&[(PARAMETERS_KEYWORD, &info.parameters()), (JSON_KEYWORD, &info.json()?)])
    }

    /// Writes [`Picture::to_png`] to `path`, replacing a file there. The file appears whole or not at all: it is
    /// written beside `path` and then renamed.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] if the folder cannot be written; those of [`Picture::to_png`].
    pub fn save_png(&self, path: &Path, metadata: &[(&str, &str)]) -> Result<()> {
        crate::files::write(path, &self.to_png(metadata)?)
    }
}

/// The text chunks of a PNG file as `(keyword, text)`: `tEXt`, `zTXt` and `iTXt`, those after the pixels included.
///
/// # Errors
/// [`crate::ErrorKind::Io`] if the file cannot be read, [`crate::ErrorKind::Damaged`] if it is not a whole PNG file.
pub fn read_png_text(path: &Path) -> Result<Vec<(String, String)>> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let damaged = |error: png::DecodingError| png_error(path, error);
    let mut reader = png::Decoder::new(BufReader::new(file)).read_info().map_err(damaged)?;
    reader.finish().map_err(damaged)?;
    let info = reader.info();
    let latin1 = info.uncompressed_latin1_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.text.clone()));
    let mut texts: Vec<(String, String)> = latin1.collect();
    // Decompression is limited to 2 MiB by `decompress_text`, which `get_text` alone is not.
    for chunk in &info.compressed_latin1_text {
        let mut chunk = chunk.clone();
        chunk.decompress_text().map_err(damaged)?;
        texts.push((chunk.keyword.clone(), chunk.get_text().map_err(damaged)?));
    }
    for chunk in &info.utf8_text {
        let mut chunk = chunk.clone();
        chunk.decompress_text().map_err(damaged)?;
        texts.push((chunk.keyword.clone(), chunk.get_text().map_err(damaged)?));
    }
    Ok(texts)
}

/// A decoder's error about a file.
fn png_error(path: &Path, error: png::DecodingError) -> Error {
    match error {
        png::DecodingError::IoError(error) if error.kind() != std::io::ErrorKind::UnexpectedEof => {
            Error::io("read", path)(error)
        }
        error => Error::damaged(path, format!("not a whole PNG file ({error})")).advise("give another file"),
    }
}

/// The record of how a picture was made, for the file that holds the picture.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GenerationInfo {
    /// The prompt.
    pub prompt: String,
    /// The negative prompt, if one was given.
    pub negative_prompt: Option<String>,
    /// The prompt of SDXL's second text encoder, if it had one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_2: Option<String>,
    /// The negative prompt of SDXL's second text encoder, if it had one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_prompt_2: Option<String>,
    /// The syntax of the prompts, such as `a1111`, unless it was plain text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_syntax: Option<String>,
    /// Clip skip as A1111 counts it, unless it was 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_skip: Option<usize>,
    /// Embeddings (textual inversion) that the prompts use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub embeddings: Vec<UsedEmbedding>,
    /// Denoising steps.
    pub steps: usize,
    /// Name of the sampler, such as `DPM++ 2M`.
    pub sampler: String,
    /// The sampler's spacing of noise levels, by A1111's name, such as `Karras`; `Automatic` is leading, or none.
    pub spacing: String,
    /// Classifier-free guidance scale.
    pub guidance: f32,
    /// [`crate::Image::guidance_rescale`], if it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance_rescale: Option<f32>,
    /// [`crate::Image::guidance_interval`], if it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance_interval: Option<(f32, f32)>,
    /// The sampler's numbers that were given.
    #[serde(flatten)]
    pub tuning: Tuning,
    /// Seed of the noise.
    pub seed: u64,
    /// The generator that drew the noise, such as `torch-cuda`.
    pub rng: String,
    /// Columns of pixels.
    pub width: u32,
    /// Rows of pixels.
    pub height: u32,
    /// SDXL's original width and height, if they were given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_size: Option<(usize, usize)>,
    /// SDXL's crop from the left and the top, if it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crop: Option<(usize, usize)>,
    /// Name of the checkpoint.
    pub model: String,
    /// [`crate::Engine::sha256`], if it is known.
    pub model_sha256: Option<String>,
    /// [`crate::Engine::fingerprint`]: the same for every format and precision of the same weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_fingerprint: Option<String>,
    /// True if the UNet's weights are moving averages (EMA).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub averages: bool,
    /// Parts of the checkpoint that were from elsewhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<UsedPart>,
    /// The device that computed the picture, such as `CPU (Avx2)`: other devices round differently.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The picture that it begins with, unless it begins with noise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_image: Option<UsedPicture>,
    /// The second pass at a larger size, if there was one; [`GenerationInfo::width`] is that of the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hires: Option<UsedHires>,
    /// True if the run did not start from the seed's noise, so that these values alone do not reproduce the picture.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub given_latents: bool,
    /// Number format of the UNet's linear layers, such as `int8`, unless it was the device's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// The recipe for tokens, such as `slow`, unless it was the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Side in pixels of the tiles in which the VAE worked, unless it worked on whole pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae_tile: Option<usize>,
    /// Every how many steps the whole UNet was computed, unless it was computed in every step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reuse: Option<usize>,
    /// The steps after which there was no guidance and cross attention was reused, if there were such steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<usize>,
    /// Concepts that shifted the bottleneck.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub concepts: Vec<UsedConcept>,
    /// Adapters that changed the weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<UsedAdapter>,
    /// Version of this program, such as `0.1.0`.
    pub version: String,
}

/// A part of a checkpoint from elsewhere, in a [`GenerationInfo`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsedPart {
    /// The component, such as `vae`.
    pub component: String,
    /// The file or folder as it was given.
    pub file: String,
    /// SHA-256 of its weights' files.
    pub sha256: Option<String>,
}

/// A file in a [`GenerationInfo`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsedFile {
    /// The file as it was given.
    pub file: String,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
}

/// A picture to begin with in a [`GenerationInfo`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsedPicture {
    /// The picture.
    pub picture: UsedFile,
    /// The share of the steps that were taken.
    pub strength: f64,
    /// The mask, whose light parts were made anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<UsedFile>,
    /// The pixels around the mask that were painted with it, if only a part of the picture was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub padding: Option<u32>,
}

/// A second pass at a larger size in a [`GenerationInfo`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsedHires {
    /// The factor of width and height.
    pub factor: f64,
    /// The share of the steps that were taken.
    pub strength: f64,
    /// The steps.
    pub steps: usize,
}

/// An embedding in a [`GenerationInfo`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsedEmbedding {
    /// The word that stands for it in prompts.
    pub name: String,
    /// SHA-256 of its file.
    pub sha256: String,
    /// The file as it was given.
    pub file: String,
}

/// A concept in a [`GenerationInfo`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsedConcept {
    /// The concept's own name, such as "a woman".
    pub name: String,
    /// Its weight.
    pub weight: f32,
    /// The timestep below which it acted no more, unless it acted in every step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<f32>,
    /// [`crate::Concept::fingerprint`].
    pub fingerprint: String,
    /// The concept's file as it was given, or its name among the demo's concepts.
    pub file: String,
}

/// An adapter in a [`GenerationInfo`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsedAdapter {
    /// The name of its file without the ending.
    pub name: String,
    /// Its weight.
    pub weight: f32,
    /// SHA-256 of the file.
    pub sha256: String,
    /// [`crate::adapters::Adapter::hash`], by which A1111 knows the file.
    pub hash: String,
    /// The file as it was given.
    pub file: String,
}

impl GenerationInfo {
    /// The text that the A1111 web UI writes under `parameters` (its `processing.create_infotext`).
    ///
    /// The text is ambiguous if a prompt itself holds such lines; [`GenerationInfo::json`] never is.
    pub fn parameters(&self) -> String {
        let size = format!("{}x{}", self.width, self.height);
        let version = format!("respodiff {}", self.version);
        // A1111 tells models apart by the first ten digits of this hash.
        let hash = self.model_sha256.as_ref().map(|hash| hash.chars().take(10).collect::<String>());
        fn joined<T>(used: &[T], text: impl Fn(&T) -> String) -> Option<String> {
            let texts: Vec<String> = used.iter().map(text).collect();
            Some(texts.join(", ")).filter(|all| !all.is_empty())
        }
        let each = |text: fn(&UsedConcept) -> String| joined(&self.concepts, text);
        // A1111 leaves out of a name what separates names.
        let name = |used: &UsedAdapter| used.name.replace([':', ','], "");
        let vae = self.parts.iter().find(|part| part.component == "vae");
        let others: Vec<String> = self
            .parts
            .iter()
            .filter(|p| p.component != "vae")
            .map(|p| format!("{}: {}", p.component, p.file))
            .collect();
        let number = |value: Option<f64>| value.map(|value| value.to_string());
        let tuning = serde_json::to_value(self.tuning).unwrap_or_default();
        let chosen = |field: &str| tuning[field].as_str().map(str::to_string);
        // A1111 tells embeddings apart by the first twelve digits of this hash.
        let short = |used: &UsedEmbedding| format!("{}: {}", used.name, used.sha256.get(..12).unwrap_or_default());
        let embeddings: Vec<String> = self.embeddings.iter().map(short).collect();
        let ends = self.concepts.iter().any(|used| used.until.is_some());
        let (init, hires) = (self.init_image.as_ref(), self.hires.as_ref());
        let strength = hires.map(|hires| hires.strength).or(init.map(|init| init.strength));
        let short = |file: &UsedFile| file.sha256.chars().take(10).collect::<String>();
        let mask = init.and_then(|init| init.mask.as_ref());
        let padding = init.and_then(|init| init.padding);
        let fields = [
            ("Steps", Some(self.steps.to_string())),
            ("Sampler", Some(self.sampler.clone())),
            ("Schedule type", Some(self.spacing.clone())),
            ("CFG scale", Some(self.guidance.to_string())),
            ("CFG rescale", self.guidance_rescale.map(|share| share.to_string())),
            ("CFG interval", self.guidance_interval.map(|(from, until)| format!("{from}-{until}"))),
            ("Eta", number(self.tuning.eta)),
            ("Sigma churn", number(self.tuning.s_churn)),
            ("Sigma tmin", number(self.tuning.s_tmin)),
            ("Sigma tmax", number(self.tuning.s_tmax)),
            ("Sigma noise", number(self.tuning.s_noise)),
            ("Step noise", chosen("step_noise")),
            ("Prediction", chosen("prediction")),
            ("Seed", Some(self.seed.to_string())),
            ("Size", Some(size)),
            ("Original size", self.original_size.map(|(width, height)| format!("{width}x{height}"))),
            ("Crop", self.crop.map(|(left, top)| format!("{left},{top}"))),
            ("Model hash", hash),
            ("Model", Some(self.model.clone())),
            ("EMA", self.averages.then(|| "true".into())),
            ("VAE hash", vae.and_then(|vae| Some(vae.sha256.as_ref()?.chars().take(10).collect()))),
            ("VAE", vae.map(|vae| vae.file.clone())),
            ("Parts", Some(others.join(", ")).filter(|others| !others.is_empty())),
            ("Model fingerprint", self.model_fingerprint.clone()),
            // A1111 has one strength, which is that of the second pass if there is one.
            ("Denoising strength", strength.map(|strength| strength.to_string())),
            ("Init image strength", init.filter(|_| hires.is_some()).map(|init| init.strength.to_string())),
            ("Hires upscale", hires.map(|hires| hires.factor.to_string())),
            ("Hires steps", hires.map(|hires| hires.steps.to_string())),
            ("Hires upscaler", hires.map(|_| "Lanczos".to_string())),
            ("Init image hash", init.map(|init| short(&init.picture))),
            ("Mask hash", mask.map(short)),
            ("Inpaint area", padding.map(|_| "Only masked".to_string())),
            ("Masked area padding", padding.map(|padding| padding.to_string())),
            ("Clip skip", self.clip_skip.map(|skip| skip.to_string())),
            ("Prompt syntax", self.prompt_syntax.clone()),
            ("Prompt 2", self.prompt_2.clone()),
            ("Negative prompt 2", self.negative_prompt_2.clone()),
            ("TI hashes", Some(embeddings.join(", ")).filter(|all| !all.is_empty())),
            ("RNG", Some(self.rng.clone())),
            ("Precision", self.precision.clone()),
            ("Tokenizer", self.tokenizer.clone()),
            ("VAE tile", self.vae_tile.map(|pixels| pixels.to_string())),
            ("Reuse", self.reuse.map(|reuse| reuse.to_string())),
            ("Gate", self.gate.map(|gate| gate.to_string())),
            ("Concepts", each(|used| format!("{}:{}", used.name, used.weight))),
            ("Concepts until", each(|used| used.until.unwrap_or(0.0).to_string()).filter(|_| ends)),
            ("Loras", joined(&self.adapters, |used| format!("{}:{}", name(used), used.weight))),
            ("Lora hashes", joined(&self.adapters, |used| format!("{}: {}", name(used), used.hash))),
            // As A1111 writes "Lora hashes".
            ("Concept hashes", each(|used| format!("{}: {}", used.name, used.fingerprint))),
            ("Version", Some(version)),
        ];
        let fields: Vec<String> =
            fields.into_iter().filter_map(|(key, value)| Some(format!("{key}: {}", quote(value?)))).collect();
        let negative = match self.negative_prompt.as_deref() {
            None | Some("") => String::new(),
            Some(text) => format!("\nNegative prompt: {text}"),
        };
        format!("{}{negative}\n{}", self.prompt, fields.join(", ")).trim().to_string()
    }

    /// All fields as one JSON object, which reads back as an equal `GenerationInfo`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`] if the guidance scale is not finite, which JSON cannot express.
    pub fn json(&self) -> Result<String> {
        if !self.guidance.is_finite() {
            return Err(Error::non_finite(format!("a guidance scale of {} cannot be recorded", self.guidance)));
        }
        serde_json::to_string(self)
            .map_err(|error| Error::invalid("metadata", format!("cannot record the parameters: {error}")))
    }
}

/// A1111's `infotext_utils.quote`: a JSON string if a reader would otherwise split the value.
fn quote(value: String) -> String {
    match value.contains([',', '\n', ':']) {
        true => serde_json::Value::String(value).to_string(),
        false => value,
    }
}
