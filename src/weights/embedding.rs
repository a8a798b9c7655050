//! Textual inversion (arXiv 2208.01618): vectors that were learnt for a word, in the files of several programs.

use super::Tensors;
use super::pickle::{self, Tensor};
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// The largest size of a file in bytes. The largest embeddings of SDXL have half a megabyte.
const MAX_BYTES: u64 = 64 << 20;
/// The largest number of vectors, which is that of the words of a chunk.
const MAX_VECTORS: usize = 75;
/// Names of tensors that are no words of the user's.
const NO_WORDS: [&str; 2] = ["emb_params", "*"];

/// A learnt word: a number of vectors for each text encoder of a kind of model, which stand in for token embeddings.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    path: PathBuf,
    names: Vec<String>,
    count: usize,
    /// For each text encoder the width of a vector, and the vectors, `[count, width]`.
    tables: Vec<(usize, Vec<f32>)>,
    sha256: String,
}

impl Embedding {
    /// Reads a file of the A1111 web UI (`string_to_param`, `emb_params`), of diffusers (`<token>`), or for SDXL with
    /// `clip_l` and `clip_g`: safetensors, or a pickle by `torch.save`, which is not run. The names are the file's
    /// without its extension and, in a file of diffusers, the token.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if the file holds anything else, [`crate::ErrorKind::Damaged`] if it is not
    /// whole or holds NaN or infinity, [`crate::ErrorKind::NotFound`] and [`crate::ErrorKind::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let size = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if !size.is_file() || size.len() > MAX_BYTES {
            return Err(Error::unsupported(path, "not a textual inversion, which is a file of less than 64 MiB")
                .advise("a LoRA or a checkpoint is another kind of file"));
        }
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let sha256 = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let all = match path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("safetensors")) {
            true => safetensors(path)?,
            false => pickle::tensors(path)?,
        };
        let named = |name: &str| all.iter().find(|tensor| tensor.name == name);
        let (chosen, word): (Vec<&Tensor>, Option<&str>) = match (named("clip_l"), named("clip_g"), &all[..]) {
            (Some(first), Some(second), _) => (vec![first, second], None),
            (None, None, [only]) => (vec![only], Some(only.name.rsplit('/').next().unwrap_or_default())),
            _ => {
                let names: Vec<&str> = all.iter().map(|tensor| tensor.name.as_str()).take(4).collect();
                let problem = format!("not a textual inversion: it has {} tensors: {}", all.len(), names.join(", "));
                return Err(Error::unsupported(path, problem).advise(
                    "a textual inversion has one tensor, or clip_l and clip_g; a LoRA is another kind of file",
                ));
            }
        };
        let table = |tensor: &Tensor| match tensor.shape[..] {
            [width] if width > 0 => Ok((1, width)),
            [count @ 1..=MAX_VECTORS, width] if width > 0 => Ok((count, width)),
            _ => Err(Error::unsupported(
                path,
                format!("tensor `{}` has shape {:?}, and not 1 to 75 vectors", tensor.name, tensor.shape),
            )),
        };
        let shapes = chosen.iter().map(|tensor| table(tensor)).collect::<Result<Vec<_>>>()?;
        let count = shapes[0].0;
        if shapes.iter().any(|shape| shape.0 != count) {
            return Err(Error::damaged(path, "clip_l and clip_g have different numbers of vectors"));
        }
        if chosen.iter().any(|tensor| tensor.values.iter().any(|x| !x.is_finite())) {
            return Err(Error::damaged(path, "holds NaN or infinity").advise("get the file again"));
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let word = word.filter(|word| !word.trim().is_empty() && !NO_WORDS.contains(word) && *word != stem);
        let tables = shapes.iter().zip(chosen).map(|((_, width), tensor)| (*width, tensor.values.clone())).collect();
        let names = std::iter::once(stem.clone()).chain(word.map(str::to_string)).collect();
        Ok(Embedding { path: path.to_path_buf(), names, count, tables, sha256 })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The words that stand for it in a prompt, in any case of their letters.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The number of vectors, each of which takes the place of a token.
    pub fn vectors(&self) -> usize {
        self.count
    }

    /// SHA-256 of the file, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The vectors for each text encoder, of which those of a model have these widths.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] for a model of another kind.
    pub(crate) fn tables(&self, widths: &[usize]) -> Result<impl Iterator<Item = &[f32]>> {
        let own: Vec<usize> = self.tables.iter().map(|(width, _)| *width).collect();
        if own != widths {
            let list = |widths: &[usize]| widths.iter().map(usize::to_string).collect::<Vec<_>>().join(" and ");
            let (own, widths) = (list(&own), list(widths));
            let problem = format!("its vectors have width {own}, and the text encoders of this model read {widths}");
            return Err(Error::mismatch(self.path.as_path(), problem)
                .advise("give an embedding that was made for this kind of model"));
        }
        Ok(self.tables.iter().map(|(_, vectors)| &vectors[..]))
    }
}

fn safetensors(path: &Path) -> Result<Vec<Tensor>> {
    let tensors = Tensors::open_file(path)?;
    let mut entries: Vec<(&str, &[usize])> = tensors.entries().collect();
    entries.sort_unstable();
    let read = |(name, shape): (&str, &[usize])| {
        Ok(Tensor { name: name.into(), shape: shape.to_vec(), values: tensors.read(name, &[shape])? })
    };
    entries.into_iter().map(read).collect()
}
