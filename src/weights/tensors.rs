//! The safetensors files of one component, mapped into memory and never read whole.

use super::{Source, inside};
use crate::graph::{WeightKind, WeightSpec};
use crate::{Error, Result};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Named tensors of a component.
pub struct Tensors {
    files: Vec<(PathBuf, Bytes)>,
    index: HashMap<String, Entry>,
    /// No files: every weight is made up.
    random: bool,
}

/// A file's content: mapped, or compiled in.
enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }
}

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes within the file.
    range: std::ops::Range<usize>,
}

/// What VAEs saved before diffusers 0.18 call their attention layers.
const LEGACY: [(&str, &str); 4] =
    [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];

impl Tensors {
    /// Stands for any component: every weight is random, of a size that keeps activations near 1. For measuring.
    pub fn random() -> Self {
        Tensors { files: Vec::new(), index: HashMap::new(), random: true }
    }

    /// Finds and maps the weights of `component`: full precision before fp16, whole before sharded.
    pub(super) fn open(source: &Source, component: &str) -> Result<Self> {
        let stem = if component.is_empty() || component.starts_with("text_encoder") {
            "model"
        } else {
            "diffusion_pytorch_model"
        };
        for variant in ["", ".fp16"] {
            let whole = inside(component, &format!("{stem}{variant}.safetensors"));
            if source.has(&whole) {
                return Self::map(source, &[whole]);
            }
            // diffusers writes the variant at either place.
            for index in [
                inside(component, &format!("{stem}.safetensors.index{variant}.json")),
                inside(component, &format!("{stem}{variant}.safetensors.index.json")),
            ] {
                if source.has(&index) {
                    return Self::map(source, &shards(source, component, &index)?);
                }
            }
        }
        let remedy = if source.has(&inside(component, &format!("{stem}.bin"))) {
            "only a pickled .bin is here, which can run code when read; save the model again with safe_serialization=True"
        } else {
            "the checkpoint is incomplete; download it again"
        };
        Err(Error::checkpoint(
            source.path(component),
            format!("no {stem}.safetensors, fp16 variant or shard index here; {remedy}"),
        ))
    }

    fn map(source: &Source, names: &[String]) -> Result<Self> {
        let mut tensors = Tensors { random: false, ..Self::random() };
        for name in names {
            let path = source.path(name);
            let bytes = match source {
                Source::Embedded(files) => {
                    Bytes::Static(files.iter().find(|(n, _)| n == name).map_or(&[][..], |(_, bytes)| bytes))
                }
                Source::Folder(_) => Bytes::Mapped(map_file(&path)?),
            };
            tensors.add(path, bytes)?;
        }
        Ok(tensors)
    }

    fn add(&mut self, path: PathBuf, bytes: Bytes) -> Result<()> {
        let damaged = |e: safetensors::SafeTensorError| {
            Error::checkpoint(&path, format!("not a whole safetensors file ({e}); delete it and download it again"))
        };
        let data = bytes.as_ref();
        let (header, metadata) = SafeTensors::read_metadata(data).map_err(damaged)?;
        let start = header + 8;
        for (name, info) in metadata.tensors() {
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            let entry = Entry { file: self.files.len(), dtype: info.dtype, shape: info.shape.clone(), range };
            if entry.range.end > data.len() || entry.range.start > entry.range.end {
                let problem = format!("tensor `{name}` ends beyond the file; delete the file and download it again");
                return Err(Error::checkpoint(&path, problem));
            }
            if self.index.insert(name.clone(), entry).is_some() {
                return Err(Error::checkpoint(&path, format!("tensor `{name}` is in two files of the component")));
            }
        }
        self.files.push((path, bytes));
        Ok(())
    }

    /// The files, for messages and reports.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// Names and shapes of all tensors.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.index.iter().map(|(name, e)| (name.as_str(), e.shape.as_slice()))
    }

    /// Which model these weights are, whatever file format and precision they are stored in: a SHA-256 of all names and
    /// shapes, and of the short tensors (biases, norms) rounded to fp16. Fine-tuning moves those as well.
    ///
    /// # Errors
    /// As [`Tensors::read`].
    pub fn fingerprint(&self) -> Result<String> {
        const SHORT: usize = 8192;
        let mut names: Vec<&String> = self.index.keys().collect();
        names.sort();
        let mut hash = Sha256::new();
        for name in names {
            let shape = &self.index[name].shape;
            hash.update(format!("{name} {shape:?}\n"));
            if shape.iter().product::<usize>() <= SHORT {
                let values: Vec<u16> =
                    self.read(name, &[shape])?.iter().map(|&x| f16::from_f32(x).to_bits().to_le()).collect();
                hash.update(bytemuck::cast_slice::<u16, u8>(&values));
            }
        }
        Ok(hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect())
    }

    /// The tensors of a weight in fp32, one after the other as it lists them.
    ///
    /// # Errors
    /// As [`Tensors::read`].
    pub fn read_weight(&self, spec: &WeightSpec) -> Result<Vec<f32>> {
        if self.random {
            return Ok(random(spec));
        }
        let mut all = Vec::new();
        for (name, &outputs) in spec.names.iter().zip(&spec.outputs) {
            let part = match spec.kind {
                WeightKind::Vector => self.read(name, &[&[outputs]])?,
                WeightKind::Table => self.read(name, &[&[outputs, spec.width]])?,
                // A 1x1 convolution and a linear layer are the same matrix.
                WeightKind::Matrix { kernel: 1, inputs, .. } | WeightKind::Mirrored { kernel: 1, inputs, .. } => {
                    // And so are patches of three channels, taken as they lie.
                    let side = (inputs / 3).isqrt();
                    let patches = [outputs, 3, side, side];
                    let patches: &[usize] = if 3 * side * side == inputs { &patches } else { &[outputs, inputs] };
                    self.read(name, &[&[outputs, inputs], &[outputs, inputs, 1, 1], patches])?
                }
                WeightKind::Matrix { kernel, inputs, .. } | WeightKind::Mirrored { kernel, inputs, .. } => {
                    self.read(name, &[&[outputs, inputs, kernel, kernel]])?
                }
            };
            if spec.names.len() == 1 {
                all = part;
            } else {
                all.extend_from_slice(&part);
            }
        }
        Ok(all)
    }

    /// The tensor in fp32, row-major, whose shape must be one of `shapes`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is missing, has another shape or number format, or holds NaN or infinity.
    pub fn read(&self, name: &str, shapes: &[&[usize]]) -> Result<Vec<f32>> {
        let legacy = || {
            let (new, old) = LEGACY.iter().find(|(new, _)| name.contains(new))?;
            self.index.get(&name.replace(new, old))
        };
        let Some(entry) = self.index.get(name).or_else(legacy) else {
            let path = self.files.first().map(|(p, _)| p.clone()).unwrap_or_default();
            let problem =
                format!("tensor `{name}` is missing; config.json does not fit this file, or it is incomplete");
            return Err(Error::checkpoint(path, problem));
        };
        let (path, bytes) = &self.files[entry.file];
        if !shapes.contains(&entry.shape.as_slice()) {
            let problem = format!(
                "tensor `{name}` has shape {:?} where config.json asks for {:?}; they belong to different models",
                entry.shape, shapes[0]
            );
            return Err(Error::checkpoint(path, problem));
        }
        let data = &bytes.as_ref()[entry.range.clone()];
        let values = match entry.dtype {
            Dtype::F16 => convert(data, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => convert(data, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F32 => convert(data, f32::from_le_bytes),
            Dtype::F64 => convert(data, |b| f64::from_le_bytes(b) as f32),
            other => {
                let problem = format!("tensor `{name}` holds {other:?} numbers; F16, BF16, F32 and F64 are read");
                return Err(Error::checkpoint(path, problem));
            }
        };
        if let Some(bad) = values.par_iter().position_first(|x| !x.is_finite()) {
            let problem = format!("tensor `{name}` holds {} at position {bad}; the file is damaged", values[bad]);
            return Err(Error::checkpoint(path, problem));
        }
        Ok(values)
    }
}

/// Uniform numbers around 0, and around 1 for what a norm multiplies by.
fn random(spec: &WeightSpec) -> Vec<f32> {
    let mut state = spec.len() as u32;
    let (center, scale) = match spec.kind {
        WeightKind::Vector => (f32::from(u8::from(spec.names[0].ends_with(".weight"))), 0.1),
        _ => (0.0, (3.0 / spec.width as f32).sqrt()),
    };
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        center + ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
    };
    (0..spec.len()).map(|_| next()).collect()
}

/// Numbers of `N` bytes each; the data may be unaligned.
fn convert<const N: usize>(data: &[u8], number: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
    let mut out = vec![0.0; data.len() / N];
    const CHUNK: usize = 1 << 16;
    out.par_chunks_mut(CHUNK).zip(data.par_chunks(CHUNK * N)).for_each(|(out, data)| {
        for (o, b) in out.iter_mut().zip(data.chunks_exact(N)) {
            let mut bytes = [0; N];
            bytes.copy_from_slice(b);
            *o = number(bytes);
        }
    });
    out
}

fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: the map is only read. Should another process shorten the file meanwhile, the system ends this process,
    // as it does to every user of mapped files.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

/// The shard files an index names.
fn shards(source: &Source, component: &str, index: &str) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let path = source.path(index);
    let parsed: Index = serde_json::from_str(&source.read_text(index)?)
        .map_err(|e| Error::checkpoint(&path, format!("not a shard index: {e}; download it again")))?;
    let mut names: Vec<String> = parsed.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    for name in &mut names {
        if name.contains(['/', '\\']) || name.starts_with('.') {
            return Err(Error::checkpoint(&path, format!("`{name}` is not the name of a shard beside the index")));
        }
        *name = inside(component, name);
        if !source.has(name) {
            let problem = format!("the shard `{name}` it names is missing; download the checkpoint again");
            return Err(Error::checkpoint(&path, problem));
        }
    }
    Ok(names)
}
