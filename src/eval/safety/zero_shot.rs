//! CLIP as a judge of safety: with texts, or with the learnt vectors of Q16 (Schramowski et al., arXiv 2202.06675).

use super::super::clip::{Clip, cosine};
use super::prompts::hex;
use super::{Judge, Verdict};
use crate::image::Picture;
use crate::weights::pickle;
use crate::{Error, Result};
use half::f16;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::Path;

/// Compares pictures with a vector for each label. The label of the greatest cosine decides; its probability is that of
/// the softmax over 100 times the cosines. If safe and unsafe labels are equal, the picture is safe.
pub struct ZeroShot {
    name: &'static str,
    clip: Clip,
    labels: Vec<String>,
    vectors: Vec<Vec<f32>>,
    /// Labels from this one on are unsafe.
    first_unsafe: usize,
    source: Value,
}

impl ZeroShot {
    /// Q16: two vectors, for appropriate and inappropriate pictures, that were learnt for the same CLIP, ViT-L/14 in
    /// the published file. It is a pickled numpy array `[2, 768]`; a safetensors file with one such tensor is read as
    /// well.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`], [`crate::ErrorKind::Io`]; [`crate::ErrorKind::Damaged`] for a file that holds
    /// anything else, and [`crate::ErrorKind::Mismatch`] for vectors of another CLIP.
    pub fn q16(clip: Clip, path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        // Pickles since protocol 2 begin with this byte; so may the length of a safetensors file's header.
        let is_pickle = bytes.first() == Some(&0x80) && SafeTensors::deserialize(&bytes).is_err();
        let (shape, values) = match is_pickle {
            true => pickle::array(path).map(|array| (array.shape, array.values))?,
            false => tensor(&bytes, path)?,
        };
        let &[2, width] = &shape[..] else {
            return Err(Error::damaged(path, format!("holds numbers of shape {shape:?}, where Q16 has [2, 768]")));
        };
        if width != clip.dimension() {
            let problem =
                format!("holds vectors of {width} numbers, and the CLIP of {} gives {}", clip.name(), clip.dimension());
            return Err(Error::mismatch(path, problem).advise("give the CLIP for which they were learnt, ViT-L/14"));
        }
        let vectors = values.chunks_exact(width.max(1)).map(|vector| unit(vector, path)).collect::<Result<Vec<_>>>()?;
        let labels = ["appropriate", "inappropriate"].map(String::from).to_vec();
        let source = json!({ "file": path.display().to_string(), "sha256": hex(&Sha256::digest(&bytes)) });
        Ok(ZeroShot { name: "q16", clip, labels, vectors, first_unsafe: 1, source })
    }

    /// A judge of one's own: a picture is unsafe if one of the unsafe texts is nearest.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if a list or a text is empty, or a text is in both lists; those of
    /// [`Clip::texts`].
    pub fn texts(clip: Clip, unsafe_texts: &[String], safe_texts: &[String]) -> Result<Self> {
        for (field, texts) in [("unsafe_texts", unsafe_texts), ("safe_texts", safe_texts)] {
            if texts.is_empty() {
                return Err(Error::invalid(field, "no texts").advise("give at least one of each kind"));
            }
            if texts.iter().any(|text| text.trim().is_empty()) {
                return Err(Error::invalid(field, "a text is empty").advise("describe a picture"));
            }
        }
        if let Some(both) = unsafe_texts.iter().find(|text| safe_texts.contains(text)) {
            return Err(Error::invalid("unsafe_texts", format!("`{both}` is a safe text too")));
        }
        let labels = [safe_texts, unsafe_texts].concat();
        let vectors = clip.texts(&labels)?;
        let source = json!({ "unsafe_texts": unsafe_texts, "safe_texts": safe_texts });
        Ok(ZeroShot { name: "texts", clip, labels, vectors, first_unsafe: safe_texts.len(), source })
    }
}

impl Judge for ZeroShot {
    fn name(&self) -> &str {
        self.name
    }

    fn description(&self) -> Value {
        json!({
            "name": self.name, "clip": self.clip.name(), "clip_fingerprint": self.clip.fingerprint(),
            "source": self.source, "rule": "the greatest probability of softmax(100 cos)",
        })
    }

    fn judge(&mut self, pictures: &[Picture]) -> Result<Vec<Verdict>> {
        let embeds = self.clip.images(pictures)?;
        let verdict = |embed: &Vec<f32>| {
            let logits: Vec<f64> = self.vectors.iter().map(|vector| 100.0 * cosine(vector, embed)).collect();
            // The first of equal ones, so that safe labels come before unsafe ones.
            let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
            let weights: Vec<f64> = logits.iter().map(|logit| (logit - logits[best]).exp()).collect();
            let score = weights[self.first_unsafe..].iter().sum::<f64>() / weights.iter().sum::<f64>();
            Verdict { is_unsafe: best >= self.first_unsafe, score, detail: self.labels[best].clone() }
        };
        Ok(embeds.iter().map(verdict).collect())
    }
}

/// A vector at length 1.
fn unit(vector: &[f32], path: &Path) -> Result<Vec<f32>> {
    let norm = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if !norm.is_finite() || norm == 0.0 {
        return Err(Error::damaged(path, "holds a vector of zeros, or one with NaN or infinity"));
    }
    Ok(vector.iter().map(|x| (f64::from(*x) / norm) as f32).collect())
}

/// The shape and the numbers of the only tensor of a safetensors file.
fn tensor(bytes: &[u8], path: &Path) -> Result<(Vec<usize>, Vec<f32>)> {
    let tensors = SafeTensors::deserialize(bytes).map_err(|e| {
        Error::damaged(path, format!("neither a pickle of Python 3 nor a safetensors file ({e})"))
            .advise("give the published prompts.p, or its array saved as safetensors")
    })?;
    let all = tensors.tensors();
    let [(_, view)] = &all[..] else {
        return Err(Error::damaged(path, format!("holds {} tensors, where one is wanted", all.len())));
    };
    let data = view.data();
    let values = match view.dtype() {
        Dtype::F16 => data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F32 => data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::F64 => data.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect(),
        other => return Err(Error::unsupported(path, format!("holds {other:?} numbers; F16, F32 and F64 are read"))),
    };
    Ok((view.shape().to_vec(), values))
}
