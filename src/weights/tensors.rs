//! The files of one component, of safetensors or of `torch.save`, mapped into memory and never read whole.

use super::adapter::{Change, Edition};
use super::single::text_model;
use super::stored::{Data, Format, Stored};
use super::{Source, foreign, inside, pickle};
use crate::graph::{WeightKind, WeightSpec};
use crate::{Error, Result};
use half::f16;
use memmap2::Mmap;
use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Named tensors of a component.
#[derive(Clone)]
pub struct Tensors {
    files: Vec<(PathBuf, Bytes)>,
    index: HashMap<String, Entry>,
    /// True if there are no files, and every weight is random.
    random: bool,
    /// The differences that adapters add to tensors of these names.
    changes: Arc<HashMap<String, Change>>,
}

/// A file's content: mapped, or compiled in.
#[derive(Clone)]
enum Bytes {
    Mapped(Arc<Mmap>),
    Static(&'static [u8]),
    Owned(Arc<[u8]>),
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

#[derive(Clone)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Range of bytes in the file.
    range: std::ops::Range<usize>,
    /// True if the file holds the matrix with rows and columns exchanged.
    transposed: bool,
    /// Multiplies every number.
    scale: f32,
}

impl Entry {
    /// A tensor of a component's first file.
    fn new(dtype: Dtype, shape: Vec<usize>, range: std::ops::Range<usize>, transposed: bool) -> Self {
        Entry { file: 0, dtype, shape, range, transposed, scale: 1.0 }
    }
}

/// The part of a tensor of the original layout that is a tensor of the diffusers layout.
#[derive(Clone, Copy)]
pub(super) enum Part {
    Whole,
    /// One of three equal groups of rows.
    Third(usize),
    /// The matrix with rows and columns exchanged.
    Transposed,
    /// The matrix of a 1x1 convolution.
    Matrix,
}

impl Part {
    /// This part of `whole`, or `None` if a tensor of that shape has no such part.
    fn of(self, whole: &Entry) -> Option<Entry> {
        let mut entry = whole.clone();
        match (self, whole.shape.as_slice()) {
            (Part::Whole, _) => {}
            (Part::Third(i), [rows, ..]) if rows % 3 == 0 && !whole.transposed => {
                let bytes = whole.range.len() / 3;
                let start = whole.range.start + i * bytes;
                entry.range = start..start + bytes;
                entry.shape[0] = rows / 3;
            }
            (Part::Transposed, [_, _]) => {
                entry.shape.reverse();
                entry.transposed = !whole.transposed;
            }
            (Part::Matrix, [_, _] | [_, _, 1] | [_, _, 1, 1]) => entry.shape.truncate(2),
            (Part::Matrix, [_]) => {}
            _ => return None,
        }
        Some(entry)
    }
}

/// Ends of the names of tensors that lie beside an 8-bit matrix, in files of ComfyUI and of others, and true for those
/// that multiply the matrix.
const SCALES: [(&str, bool); 4] =
    [(".scale_weight", true), (".weight_scale", true), (".scale_input", false), (".input_scale", false)];

/// The names of attention layers in VAEs that were saved before diffusers 0.18.
pub(super) const LEGACY: [(&str, &str); 4] =
    [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];

impl Tensors {
    /// Stands for any component: every weight is random, of a magnitude that keeps activations near 1. For benchmarks.
    pub fn random() -> Self {
        Tensors { files: Vec::new(), index: HashMap::new(), random: true, changes: Arc::default() }
    }

    /// Finds and maps the weights of `component` in the folder `place`. Full precision is preferred to fp16, one file
    /// to shards, and safetensors to files of `torch.save`.
    pub(super) fn open(source: &Source, place: &str, component: &str) -> Result<Self> {
        if component.starts_with("text_encoder") {
            let tensors = Self::find_files(source, place, "model")?;
            return tensors.renamed(|name| vec![(text_model(name).unwrap_or_else(|| name.into()), Part::Whole)]);
        }
        Self::find_files(source, place, if component.is_empty() { "model" } else { "diffusion_pytorch_model" })
    }

    fn find_files(source: &Source, place: &str, stem: &str) -> Result<Self> {
        let pickled = if stem == "model" { "pytorch_model" } else { stem };
        for (stem, ending) in [(stem, "safetensors"), (pickled, "bin")] {
            for variant in ["", ".fp16", ".bf16"] {
                let whole = inside(place, &format!("{stem}{variant}.{ending}"));
                if source.has(&whole) {
                    return Self::map(source, &[whole]);
                }
                // diffusers writes the variant in either place.
                for index in [
                    inside(place, &format!("{stem}.{ending}.index{variant}.json")),
                    inside(place, &format!("{stem}{variant}.{ending}.index.json")),
                ] {
                    if source.has(&index) {
                        return Self::map(source, &shards(source, place, &index)?);
                    }
                }
            }
        }
        let problem = format!("no {stem}.safetensors, {pickled}.bin, fp16 variant or shard index here");
        Err(Error::damaged(source.path(place), problem).advise("give a whole checkpoint"))
    }

    /// Opens a file that is not part of a component's folder.
    pub(crate) fn open_file(path: &Path) -> Result<Self> {
        let mut tensors = Self::none();
        tensors.add(path.to_path_buf(), Bytes::Mapped(map_file(path)?.into()))?;
        tensors.scaled()
    }

    fn none() -> Self {
        Tensors { random: false, ..Self::random() }
    }

    fn map(source: &Source, names: &[String]) -> Result<Self> {
        let mut tensors = Self::none();
        for name in names {
            let path = source.path(name);
            let bytes = match source {
                Source::Embedded(files) => {
                    Bytes::Static(files.iter().find(|(n, _)| n == name).map_or(&[][..], |(_, bytes)| bytes))
                }
                _ => Bytes::Mapped(map_file(&path)?.into()),
            };
            tensors.add(path, bytes)?;
        }
        tensors.scaled()
    }

    fn add(&mut self, path: PathBuf, bytes: Bytes) -> Result<()> {
        let entries = match pickle::is_pickled(bytes.as_ref()) {
            true => pickled(bytes.as_ref(), &path)?,
            false => safetensors(bytes.as_ref(), &path)?,
        };
        let file = self.files.len();
        for (name, entry) in entries {
            if self.index.get(&name).is_some_and(|other| other.file != file) {
                return Err(Error::damaged(&path, format!("tensor `{name}` is in two files of the component")));
            }
            self.index.insert(name, Entry { file, ..entry });
        }
        self.files.push((path, bytes));
        Ok(())
    }

    /// The same tensors, with each scale of an 8-bit matrix, which lies beside it as a tensor of one number, made a
    /// property of the matrix. The scales of activations, which only 8-bit arithmetic reads, and the mark of such files
    /// are dropped.
    fn scaled(mut self) -> Result<Self> {
        let is_small = |entry: &Entry| matches!(entry.dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2);
        let is_known =
            |name: &&String| name.ends_with("scaled_fp8") || SCALES.iter().any(|(end, _)| name.ends_with(end));
        let mut names: Vec<String> = self.index.keys().filter(is_known).cloned().collect();
        names.sort_unstable();
        for name in names {
            if name.rsplit('.').next() == Some("scaled_fp8") {
                self.index.remove(&name);
            }
            let Some((matrix, is_weight)) = SCALES.iter().find_map(|(end, is_weight)| {
                let matrix = format!("{}.weight", name.strip_suffix(end)?);
                self.index.get(&matrix).is_some_and(is_small).then_some((matrix, *is_weight))
            }) else {
                continue;
            };
            if is_weight {
                let scale = self.find(&name, &[&[], &[1]])?.read()?[0];
                self.index.entry(matrix).and_modify(|entry| entry.scale = scale);
            }
            self.index.remove(&name);
        }
        Ok(self)
    }

    /// The files, for messages and reports.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// Names and shapes of all tensors.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.index.iter().map(|(name, e)| (name.as_str(), e.shape.as_slice()))
    }

    /// The same with changes by adapters, in place of those there are.
    pub(super) fn adapted(&self, changes: HashMap<String, Change>) -> Self {
        Tensors { changes: changes.into(), ..self.clone() }
    }

    /// The adapters and weights at which a weight is changed, those of the norm included that may be folded into it.
    pub fn edition(&self, spec: &WeightSpec) -> Edition {
        let names = spec.names.iter().chain(spec.norm.iter().flatten());
        names.filter_map(|name| self.changes.get(name)).flat_map(|change| change.edition.clone()).collect()
    }

    /// The adapters and weights at which any tensor is changed.
    pub(crate) fn editions(&self) -> Edition {
        let mut all: Edition = self.changes.values().flat_map(|change| change.edition.clone()).collect();
        all.sort();
        all.dedup();
        all
    }

    /// A single file's path.
    pub(super) fn path(&self) -> &Path {
        self.files.first().map_or(Path::new(""), |(path, _)| path)
    }

    /// The same tensors and one more, which is in no file.
    pub(crate) fn with(mut self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes: Arc<[u8]> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (file, range) = (self.files.len(), 0..bytes.len());
        self.index.insert(name.into(), Entry { file, ..Entry::new(Dtype::F32, shape.to_vec(), range, false) });
        self.files.push((name.into(), Bytes::Owned(bytes)));
        self
    }

    /// These tensors and those of other files, none of which has a name of these.
    pub(super) fn and(mut self, others: Tensors) -> Self {
        let files = self.files.len();
        let moved = |(name, entry): (String, Entry)| (name, Entry { file: files + entry.file, ..entry });
        self.index.extend(others.index.into_iter().map(moved));
        self.files.extend(others.files);
        self
    }

    /// The metadata in a single file's header.
    pub(super) fn metadata(&self) -> HashMap<String, String> {
        let header = self.files.first().and_then(|(_, bytes)| SafeTensors::read_metadata(bytes.as_ref()).ok());
        header.and_then(|(_, header)| header.metadata().clone()).unwrap_or_default()
    }

    /// The same files with other tensor names: for each tensor, `rename` gives the names under which it, or a part of
    /// it, is listed.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if two tensors get one name.
    pub(super) fn renamed(&self, rename: impl Fn(&str) -> Vec<(String, Part)>) -> Result<Self> {
        let mut tensors = Tensors { files: self.files.clone(), ..Self::none() };
        // Tensors are taken in the order of their names, so that of several problems the same one is reported every
        // time.
        let mut index: Vec<(&String, &Entry)> = self.index.iter().collect();
        index.sort_unstable_by_key(|(name, _)| *name);
        for (old, entry) in index {
            for (name, part) in rename(old) {
                let Some(entry) = part.of(entry) else { continue };
                let bytes = |entry: &Entry| &self.files[entry.file].1.as_ref()[entry.range.clone()];
                match tensors.index.get(&name) {
                    // Two spellings of one tensor do no harm if their bytes agree.
                    Some(other) if bytes(other) == bytes(&entry) => {}
                    Some(_) => {
                        let problem =
                            format!("tensor `{old}` is there a second time under another name, with other numbers");
                        return Err(Error::damaged(&self.files[0].0, problem));
                    }
                    None => {
                        tensors.index.insert(name, entry);
                    }
                }
            }
        }
        Ok(tensors)
    }

    /// True if there is such a tensor.
    pub(super) fn has(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// A tensor's shape.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if there is none.
    pub(super) fn shape(&self, name: &str) -> Result<&[usize]> {
        self.entry(name).map(|entry| entry.shape.as_slice())
    }

    /// Identifies the model that these weights are of, whatever their file format and precision: a SHA-256 of all names
    /// and shapes, and of the short tensors (biases, norms) rounded to fp16. Fine-tuning changes short tensors too.
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

    /// SHA-256 of the bytes of all files in the order of their names, in hexadecimal; `None` if there are no files.
    pub fn sha256(&self) -> Option<String> {
        let mut files: Vec<_> = self.files.iter().collect();
        files.sort_by_key(|(path, _)| path);
        let mut hash = Sha256::new();
        files.iter().for_each(|(_, bytes)| hash.update(bytes.as_ref()));
        (!files.is_empty()).then(|| hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// SHA-256 of everything behind the header of a single file of safetensors, or of all of another one, in
    /// hexadecimal.
    pub(super) fn sha256_of_numbers(&self) -> String {
        let bytes = self.files.first().map_or(&[][..], |(_, bytes)| bytes.as_ref());
        let header = match bytes.first_chunk::<8>() {
            Some(length) if !pickle::is_pickled(bytes) => (u64::from_le_bytes(*length) as usize).saturating_add(8),
            _ => 0,
        };
        let hash = Sha256::digest(bytes.get(header..).unwrap_or_default());
        hash.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The tensors of a weight as they lie in their files, in the order of the weight's names, with the changes by
    /// adapters. Everything except the numbers is checked.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if one is missing, [`crate::ErrorKind::Mismatch`] if one has another shape,
    /// [`crate::ErrorKind::Unsupported`] if one has another number format.
    pub fn stored<'a>(&'a self, spec: &'a WeightSpec) -> Result<Vec<Stored<'a>>> {
        let named = spec.names.iter().zip(&spec.outputs);
        let find = |(name, &outputs): (&'a String, &usize)| match spec.kind {
            _ if self.random => Ok(random(spec, name, outputs)),
            WeightKind::Vector => self.find(name, &[&[outputs]]),
            WeightKind::Table => self.find(name, &[&[outputs, spec.width]]),
            // A 1x1 convolution and a linear layer are the same matrix.
            WeightKind::Matrix { kernel: 1, inputs, .. } | WeightKind::Mirrored { kernel: 1, inputs, .. } => {
                // So is a convolution over patches of three channels, if each patch is taken as one row of numbers.
                let side = (inputs / 3).isqrt();
                let patches = [outputs, 3, side, side];
                let patches: &[usize] = if 3 * side * side == inputs { &patches } else { &[outputs, inputs] };
                self.find(name, &[&[outputs, inputs], &[outputs, inputs, 1, 1], patches])
            }
            WeightKind::Matrix { kernel, inputs, .. } | WeightKind::Mirrored { kernel, inputs, .. } => {
                self.find(name, &[&[outputs, inputs, kernel, kernel]])
            }
        };
        let change = |stored: Stored<'a>| match self.changes.get(stored.name) {
            Some(change) => stored.adapted(change),
            None => stored,
        };
        named.map(|part| find(part).map(change)).collect()
    }

    /// Asks the system to begin reading tensors from the disk, because they will be needed soon. Returns once the reads
    /// are under way, which on a slow disk takes nearly as long as reading them.
    pub fn read_ahead(&self, stored: &[Stored]) {
        // On other systems there is no such call.
        #[cfg(unix)]
        self.mapped(stored, |map, offset, len| {
            let _ = map.advise_range(memmap2::Advice::WillNeed, offset, len);
        });
    }

    /// Gives the pages of tensors back to the system once they have been read, since they count as this process's
    /// memory. If tensors are read again, they come from the system's cache or from the disk.
    pub fn done_with(&self, stored: &[Stored]) {
        #[cfg(unix)]
        self.mapped(stored, |map, offset, len| {
            // SAFETY: the map is of a file and never written, so later reads give the same bytes.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, len) };
        });
    }

    /// Calls `tell` with the mapped file of each tensor, and the tensor's offset and length there.
    #[cfg(unix)]
    fn mapped(&self, stored: &[Stored], tell: impl Fn(&Mmap, usize, usize)) {
        for tensor in stored {
            let Some(bytes) = tensor.in_file() else { continue };
            for (_, file) in &self.files {
                if let Bytes::Mapped(map) = file
                    && map.as_ptr_range().contains(&bytes.as_ptr())
                {
                    tell(map, bytes.as_ptr() as usize - map.as_ptr() as usize, bytes.len());
                }
            }
        }
    }

    /// The tensors of a weight in fp32, one after the other in the order of the weight's names, with the changes by
    /// adapters.
    ///
    /// # Errors
    /// As [`Tensors::read`].
    pub fn read_weight(&self, spec: &WeightSpec) -> Result<Vec<f32>> {
        let parts = self.stored(spec)?.iter().map(Stored::read).collect::<Result<Vec<_>>>()?;
        Ok(parts.concat())
    }

    /// The tensor in fp32, row-major and as its file has it, whose shape must be one of `shapes`.
    ///
    /// # Errors
    /// Those of [`Tensors::stored`], and [`crate::ErrorKind::Damaged`] if it holds NaN or infinity.
    pub fn read(&self, name: &str, shapes: &[&[usize]]) -> Result<Vec<f32>> {
        self.find(name, shapes)?.read()
    }

    /// A tensor as it lies in its file, and its shape.
    ///
    /// # Errors
    /// As [`Tensors::stored`].
    pub(super) fn named<'a>(&'a self, name: &'a str) -> Result<(Stored<'a>, Vec<usize>)> {
        let shape = self.shape(name)?;
        Ok((self.find(name, &[shape])?, shape.to_vec()))
    }

    /// The number of a tensor that holds one, which may be an integer.
    ///
    /// # Errors
    /// As [`Tensors::read`].
    pub(super) fn scalar(&self, name: &str) -> Result<f32> {
        let entry = self.entry(name)?;
        let bytes = &self.files[entry.file].1.as_ref()[entry.range.clone()];
        match (entry.dtype, bytes) {
            (Dtype::I64, &[a, b, c, d, e, f, g, h]) => Ok(i64::from_le_bytes([a, b, c, d, e, f, g, h]) as f32),
            (Dtype::I32, &[a, b, c, d]) => Ok(i32::from_le_bytes([a, b, c, d]) as f32),
            _ => Ok(self.read(name, &[&[], &[1], &[1, 1], &[1, 1, 1, 1]])?[0]),
        }
    }

    /// The tensor as its file has it, whose shape must be one of `shapes`.
    fn find<'a>(&'a self, name: &'a str, shapes: &[&[usize]]) -> Result<Stored<'a>> {
        let entry = self.entry(name)?;
        let (path, bytes) = &self.files[entry.file];
        if !shapes.contains(&entry.shape.as_slice()) {
            let problem = format!(
                "tensor `{name}` has shape {:?}, but the model's configuration asks for {:?}",
                entry.shape, shapes[0]
            );
            return Err(Error::mismatch(path, problem).advise("give the configuration that belongs to the weights"));
        }
        let format = match entry.dtype {
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::BF16,
            Dtype::F32 => Format::F32,
            Dtype::F64 => Format::F64,
            Dtype::F8_E4M3 => Format::F8E4M3,
            Dtype::F8_E5M2 => Format::F8E5M2,
            other => {
                return Err(Error::unsupported(path, format!("tensor `{name}` holds {other:?} numbers"))
                    .advise("convert it to F16, BF16, F32, F64, F8_E4M3 or F8_E5M2"));
            }
        };
        let outputs = entry.shape.first().copied().unwrap_or(1);
        Ok(Stored {
            name,
            path,
            format,
            transposed: entry.transposed,
            scale: entry.scale,
            outputs,
            width: entry.shape.iter().skip(1).product(),
            data: Data::File(&bytes.as_ref()[entry.range.clone()]),
        })
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let legacy = || {
            let (new, old) = LEGACY.iter().find(|(new, _)| name.contains(new))?;
            self.index.get(&name.replace(new, old))
        };
        self.index.get(name).or_else(legacy).ok_or_else(|| {
            let path = self.files.first().map(|(p, _)| p.clone()).unwrap_or_default();
            let problem = "is missing; the file is incomplete, or the configuration is that of another model";
            Error::damaged(path, format!("tensor `{name}` {problem}"))
        })
    }
}

/// Uniform random numbers around 0, or around 1 for the scale of a norm.
fn random<'a>(spec: &WeightSpec, name: &'a str, outputs: usize) -> Stored<'a> {
    let (center, scale) = match spec.kind {
        WeightKind::Vector => (f32::from(u8::from(name.ends_with(".weight"))), 0.1),
        _ => (0.0, (3.0 / spec.width as f32).sqrt()),
    };
    let seed = name.bytes().fold(0u32, |seed, byte| seed.wrapping_mul(0x0100_0193) ^ u32::from(byte));
    let data = Data::Random { seed, center, scale };
    Stored {
        name,
        path: "<random>".as_ref(),
        format: Format::F32,
        transposed: false,
        scale: 1.0,
        outputs,
        width: spec.width,
        data,
    }
}

/// The tensors of a safetensors file with these bytes.
fn safetensors(bytes: &[u8], path: &Path) -> Result<Vec<(String, Entry)>> {
    let again = "give a whole one, downloaded or saved again";
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| {
        foreign::named(bytes, path)
            .unwrap_or_else(|| Error::damaged(path, format!("not a whole safetensors file ({e})")).advise(again))
    })?;
    let start = header + 8;
    let entry = |(name, info): (String, &TensorInfo)| {
        let range = start + info.data_offsets.0..start + info.data_offsets.1;
        if range.end > bytes.len() || range.start > range.end {
            return Err(Error::damaged(path, format!("tensor `{name}` ends beyond the file")).advise(again));
        }
        Ok((name, Entry::new(info.dtype, info.shape.clone(), range, false)))
    };
    metadata.tensors().into_iter().map(entry).collect()
}

/// The tensors of a file of `torch.save` with these bytes.
fn pickled(bytes: &[u8], path: &Path) -> Result<Vec<(String, Entry)>> {
    let entry = |placed: pickle::Placed| {
        let pickle::Placed { name, dtype, shape, transposed, range } = placed;
        (name, Entry::new(dtype, shape, range, transposed))
    };
    Ok(pickle::placed(bytes, path)?.into_iter().map(entry).collect())
}

pub(super) fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
        return Err(Error::unsupported(path, "a folder, where a file is expected").advise("give a file"));
    }
    // SAFETY: the map is only read. Should another process shorten the file meanwhile, the system ends this process,
    // as it does to every user of mapped files.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

/// The shard files that an index names.
fn shards(source: &Source, place: &str, index: &str) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let path = source.path(index);
    let parsed: Index = crate::json::parse(&source.read_text(index)?, &path)?;
    let mut names: Vec<String> = parsed.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    for name in &mut names {
        if name.contains(['/', '\\']) || name.starts_with('.') {
            return Err(Error::damaged(&path, format!("`{name}` is not the name of a shard beside the index")));
        }
        *name = inside(place, name);
        if !source.has(name) {
            return Err(Error::not_found(&path, format!("the shard `{name}` that it names is missing"))
                .advise("download the checkpoint again"));
        }
    }
    Ok(names)
}
