//! Concept files: one safetensors file per concept.
//!
//! A file holds the tensors `ram` and `sam`, each `[c, h, w]` in fp16 or fp32, and describes them in its metadata, one
//! string per field. For the networks of the ablation, the tensors are the parameters, `[p]`. Fields that this version
//! does not know are kept.

use super::{Calibration, Form, Module, Strength};
use crate::graph::Shape;
use crate::image::UsedAdapter;
use crate::layout::{nchw_to_nhwc, nhwc_to_nchw};
use crate::{Error, Result, Subject};
use half::f16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Version of the file format.
const FORMAT: u32 = 1;
/// The largest height, width and number of channels of a bottleneck. A file with more counts as damaged.
const MAX_SIDE: usize = 4096;

/// The direction in which a concept moves a picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Kind {
    /// Moves toward an attribute ("a woman").
    #[default]
    Fair,
    /// Moves away from something ("violence").
    Safe,
}

impl Kind {
    /// The name in files and reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Fair => "fair",
            Kind::Safe => "safe",
        }
    }
}

/// Number format of a concept file. Training and sampling compute in fp32 in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NumberFormat {
    /// Half precision: half the size. Numbers change by at most 2^-11 of themselves, those below 2^-14 by at most
    /// 2^-25.
    F16,
    /// Single precision: the numbers as they were trained.
    F32,
}

impl std::str::FromStr for NumberFormat {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "f16" => Ok(NumberFormat::F16),
            "f32" => Ok(NumberFormat::F32),
            _ => Err(Error::invalid("precision", format!("unknown precision `{name}`")).advise("give f16 or f32")),
        }
    }
}

/// The origin of a concept.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
#[must_use]
pub struct Metadata {
    /// The concept's name: the prompt that it was trained for.
    pub concept: String,
    /// The direction in which it moves a picture.
    pub kind: Kind,
    /// The prompt that it was trained on, such as "a person".
    pub neutral: String,
    /// Name of the checkpoint that it was trained on.
    pub base_model: String,
    /// That checkpoint's [`crate::Engine::fingerprint`]; empty if unknown.
    pub fingerprint: String,
    /// The adapters that changed that checkpoint while it was trained.
    pub adapters: Vec<UsedAdapter>,
    /// The recipe of its training, as TOML.
    pub recipe: String,
    /// Iterations of its training; 0 if unknown.
    pub iterations: u64,
    /// Means of `L_resp` and `L_sem` over the last tenth of its training.
    pub losses: Option<[f64; 2]>,
    /// The strength to use it with, if that was measured.
    pub calibration: Option<Calibration>,
    /// Fields that other programs or later versions wrote.
    pub other: BTreeMap<String, String>,
}

impl Metadata {
    /// The metadata of a concept of that name and of unknown origin.
    pub fn new(concept: impl Into<String>) -> Self {
        Metadata { concept: concept.into(), ..Default::default() }
    }

    /// A sentence about the weights that it was trained on, if they are known and are not those of a run: those of a
    /// checkpoint of this fingerprint and name, changed by these adapters.
    pub(crate) fn other_weights(&self, fingerprint: &str, model: &str, adapters: &[UsedAdapter]) -> Option<String> {
        let with = |model: &str, adapters: &[UsedAdapter]| match adapters {
            [] => model.to_string(),
            all => {
                let named: Vec<String> = all.iter().map(|used| format!("{}:{}", used.name, used.weight)).collect();
                format!("{model} with {}", named.join(" and "))
            }
        };
        let changes = |adapters: &[UsedAdapter]| -> BTreeSet<(String, u32)> {
            adapters.iter().map(|used| (used.sha256.clone(), used.weight.to_bits())).collect()
        };
        let same = self.fingerprint == fingerprint && changes(&self.adapters) == changes(adapters);
        (!self.fingerprint.is_empty() && !same).then(|| {
            format!("was trained on {}, not on {}", with(&self.base_model, &self.adapters), with(model, adapters))
        })
    }
}

/// A learnt concept: RAM, which moves toward it, and SAM, which moves back toward the neutral prompt's meaning.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Concept {
    /// Its name and origin.
    pub metadata: Metadata,
    /// The responsible-concept alignment module (RAM), which moves toward the concept.
    pub ram: Module,
    /// The semantic alignment module (SAM); absent if RAM was trained alone.
    pub sam: Option<Module>,
}

impl Concept {
    /// A concept of modules that were trained together.
    pub fn new(metadata: Metadata, ram: Module, sam: Option<Module>) -> Self {
        Concept { metadata, ram, sam }
    }

    /// The strength to use it with at a guidance scale: the calibrated one, or a weight of 1 in every step.
    pub fn strength(&self, guidance: f32) -> Strength {
        self.metadata.calibration.as_ref().map_or(Strength::default(), |calibration| calibration.at(guidance))
    }

    /// Shape of the bottleneck that it was trained at; `n` is 1.
    pub fn shape(&self) -> Shape {
        self.ram.shape()
    }

    /// RAM and SAM for a bottleneck of `shape`, to which both are added.
    ///
    /// A constant that was learnt at another size is resampled, bilinearly with half-pixel centres, so that the numbers
    /// for a place in the picture stay at that place. Networks are the same at every size.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] if the channels differ: the concept is for another model.
    /// [`crate::ErrorKind::Invalid`] if a module holds too few or too many numbers.
    pub fn modules(&self, shape: Shape) -> Result<Vec<Module>> {
        let modules = || [Some(&self.ram), self.sam.as_ref()].into_iter().flatten();
        if let Some(other) = modules().find(|module| module.shape().c != shape.c) {
            return Err(Error::mismatch(
                Subject::Field("concepts"),
                format!(
                    "the concept `{}`, trained on {}, is for a bottleneck of {} channels, and this model has {}",
                    self.metadata.concept,
                    if self.metadata.base_model.is_empty() { "another model" } else { &self.metadata.base_model },
                    other.shape().c,
                    shape.c,
                ),
            ));
        }
        let broken = || {
            let problem = format!("the concept `{}` holds too few or too many numbers", self.metadata.concept);
            Error::invalid("concepts", problem)
        };
        modules().map(|module| module.at_size(shape).ok_or_else(broken)).collect()
    }

    /// An identifier of the modules: the first 16 bytes of the SHA-256 of their numbers in fp32, RAM before SAM, in
    /// hexadecimal.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for module in [Some(&self.ram), self.sam.as_ref()].into_iter().flatten() {
            hash.update(bytemuck::cast_slice::<f32, u8>(&module.parameters));
        }
        hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads a concept file.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] or [`crate::ErrorKind::Io`] if it cannot be read, [`crate::ErrorKind::Damaged`]
    /// if it is damaged or not a concept file, [`crate::ErrorKind::Unsupported`] if a newer version wrote it.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        Self::parse(&bytes, path)
    }

    /// Reads a concept from the bytes of a file. `path` names it in errors.
    ///
    /// # Errors
    /// Those of [`Concept::load`], except of reading.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let damaged = |e: safetensors::SafeTensorError| {
            Error::damaged(path, format!("not a whole safetensors file ({e})")).advise("get or train the concept again")
        };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(damaged)?;
        let mut fields: BTreeMap<String, String> =
            header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        let mut take = |name: &str| fields.remove(name).unwrap_or_default();
        let bad = |problem: String| Error::damaged(path, problem);
        let unknown = |problem: String, advice: &'static str| Error::unsupported(path, problem).advise(advice);

        let format = take("format");
        if !format.is_empty() && format.parse::<u32>().is_ok_and(|f| f > FORMAT) {
            let problem = format!("its concept format {format} is newer than this version's {FORMAT}");
            return Err(Error::unsupported(path, problem).advise("update respodiff"));
        }
        let form = match take("form").as_str() {
            "" | "constant" => Form::Constant,
            "mlp" => Form::Mlp,
            "conv" => Form::Conv,
            other => return Err(unknown(format!("unknown form `{other}`"), "use constant, mlp or conv")),
        };
        let kind = match take("kind").as_str() {
            "" | "fair" => Kind::Fair,
            "safe" => Kind::Safe,
            other => return Err(unknown(format!("unknown kind `{other}`"), "use fair or safe")),
        };
        let shape = take("bottleneck");
        let shape: Option<[usize; 3]> = match shape.is_empty() {
            true => None,
            false => Some(
                serde_json::from_str(&shape).map_err(|e| bad(format!("`bottleneck` {shape} is not [c, h, w]: {e}")))?,
            ),
        };
        let mut metadata = Metadata {
            concept: take("concept"),
            kind,
            neutral: take("neutral"),
            base_model: take("base_model"),
            fingerprint: take("fingerprint"),
            adapters: match take("adapters").as_str() {
                "" => Vec::new(),
                text => serde_json::from_str(text).map_err(|e| bad(format!("`adapters` cannot be read: {e}")))?,
            },
            recipe: take("recipe"),
            iterations: take("iterations").parse().unwrap_or_default(),
            losses: serde_json::from_str(&take("losses")).ok(),
            calibration: match take("calibration").as_str() {
                "" => None,
                text => Some(calibration(text).map_err(|problem| bad(format!("`calibration` {problem}")))?),
            },
            other: fields,
        };
        if metadata.concept.is_empty() {
            metadata.concept = path.file_stem().map_or_else(|| "concept".into(), |s| s.to_string_lossy().into_owned());
        }
        let module = |name: &str| -> Result<Option<Module>> {
            let Ok(view) = tensors.tensor(name) else { return Ok(None) };
            let [c, h, w] = match (form, view.shape(), shape) {
                (Form::Constant, &[c, h, w], _) => [c, h, w],
                (Form::Mlp | Form::Conv, [_], Some(shape)) => shape,
                _ => return Err(bad(format!("tensor `{name}` has shape {:?} in place of [c, h, w]", view.shape()))),
            };
            if [c, h, w].iter().any(|&d| d == 0 || d > MAX_SIDE) {
                return Err(bad(format!(
                    "tensor `{name}` has shape [{c}, {h}, {w}], of which each must be 1 to {MAX_SIDE}"
                )));
            }
            let values = numbers(&view).map_err(|problem| bad(format!("tensor `{name}` {problem}")))?;
            let shape = Shape::new(1, h, w, c);
            let parameters = match form {
                Form::Constant => {
                    let mut nhwc = vec![0.0; values.len()];
                    nchw_to_nhwc(&values, c, h * w, &mut nhwc);
                    nhwc
                }
                _ => values,
            };
            let count = parameters.len();
            Module::with_parameters(form, shape, parameters)
                .ok_or_else(|| bad(format!("tensor `{name}` holds {count} numbers, not what its form has")))
                .map(Some)
        };
        let Some(ram) = module("ram")? else {
            return Err(bad("has no tensor `ram`, as every concept file does".into()).advise("give a concept file"));
        };
        let sam = module("sam")?;
        if sam.as_ref().is_some_and(|sam| sam.shape() != ram.shape()) {
            return Err(bad("`ram` and `sam` differ in shape".into()));
        }
        Ok(Concept { metadata, ram, sam })
    }

    /// The bytes of the concept's file.
    fn bytes(&self, format: NumberFormat) -> Result<Vec<u8>> {
        let shape = self.shape();
        let encode = |values: &[f32]| -> Vec<u8> {
            match format {
                NumberFormat::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                NumberFormat::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            }
        };
        let tensor = |module: &Module| -> (Vec<usize>, Vec<u8>) {
            if module.form() != Form::Constant {
                return (vec![module.parameters.len()], encode(&module.parameters));
            }
            let mut nchw = vec![0.0; module.parameters.len()];
            nhwc_to_nchw(&module.parameters, shape.c, shape.tokens(), &mut nchw);
            (vec![shape.c, shape.h, shape.w], encode(&nchw))
        };
        let dtype = match format {
            NumberFormat::F16 => Dtype::F16,
            NumberFormat::F32 => Dtype::F32,
        };
        let tensors = [("ram", Some(&self.ram)), ("sam", self.sam.as_ref())]
            .map(|(name, module)| module.map(|module| (name, tensor(module))));
        let views = tensors
            .iter()
            .flatten()
            .map(|(name, (shape, bytes))| TensorView::new(dtype, shape.clone(), bytes).map(|view| (*name, view)))
            .collect::<std::result::Result<Vec<_>, _>>();
        let m = &self.metadata;
        let form = match self.ram.form() {
            Form::Constant => "constant",
            Form::Mlp => "mlp",
            Form::Conv => "conv",
        };
        let losses = m.losses.map_or_else(String::new, |[resp, sem]| format!("[{resp:e},{sem:e}]"));
        let fields = [
            ("format", FORMAT.to_string()),
            ("form", form.into()),
            ("concept", m.concept.clone()),
            ("kind", m.kind.name().into()),
            ("neutral", m.neutral.clone()),
            ("base_model", m.base_model.clone()),
            ("fingerprint", m.fingerprint.clone()),
            ("bottleneck", format!("[{},{},{}]", shape.c, shape.h, shape.w)),
            ("recipe", m.recipe.clone()),
            ("iterations", m.iterations.to_string()),
            ("losses", losses),
        ];
        let fields = fields.map(|(k, v)| (k.to_string(), v));
        let calibration = m.calibration.as_ref().and_then(|c| serde_json::to_string(c).ok());
        let calibration = calibration.map(|text| ("calibration".to_string(), text));
        let adapters = (!m.adapters.is_empty()).then(|| serde_json::to_string(&m.adapters).ok()).flatten();
        let adapters = adapters.map(|text| ("adapters".to_string(), text));
        let all = m.other.clone().into_iter().chain(fields).chain(calibration).chain(adapters).collect();
        views
            .and_then(|views| crate::files::safetensors(views, &all))
            .map_err(|e| Error::internal(format!("the concept `{}` cannot be written: {e}", m.concept)))
    }

    /// Writes the file in fp32, whole or not at all.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_as(path, NumberFormat::F32)
    }

    /// Writes the file in a chosen number format, whole or not at all.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`], [`crate::ErrorKind::Invalid`] if a number is beyond fp16's 65504.
    pub fn save_as(&self, path: impl AsRef<Path>, format: NumberFormat) -> Result<()> {
        let mut values = [Some(&self.ram), self.sam.as_ref()].into_iter().flatten().flat_map(|m| &m.parameters);
        if format == NumberFormat::F16 && values.any(|x| !f16::from_f32(*x).is_finite()) {
            let name = &self.metadata.concept;
            return Err(Error::invalid("precision", format!("the concept `{name}` holds numbers beyond fp16's 65504"))
                .advise("keep it in f32"));
        }
        crate::files::write(path.as_ref(), &self.bytes(format)?)
    }

    /// One concept that is the sum of several, each multiplied by its weight. Its name lists the parts, and its base
    /// model and neutral prompt are those of the first.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if there is none or one is a network, [`crate::ErrorKind::Mismatch`] if they
    /// differ in channels.
    pub fn merge(parts: &[(Concept, f32)]) -> Result<Concept> {
        let Some((first, _)) = parts.first() else {
            return Err(Error::invalid("concepts", "nothing to merge").advise("give concept files"));
        };
        let shape = first.shape();
        let mut ram = vec![0.0f32; shape.len()];
        let mut sam = vec![0.0f32; shape.len()];
        for (concept, weight) in parts {
            if concept.ram.form() != Form::Constant {
                return Err(Error::invalid(
                    "concepts",
                    format!("the concept `{}` is a network, which cannot be merged", concept.metadata.concept),
                )
                .advise("give several concepts to the picture instead"));
            }
            let modules = concept.modules(shape)?;
            for (sum, module) in [&mut ram, &mut sam].into_iter().zip(&modules) {
                sum.iter_mut().zip(&module.parameters).for_each(|(s, p)| *s += weight * p);
            }
        }
        if !ram.iter().chain(&sam).all(|x| x.is_finite()) {
            let problem = "the weighted sum leaves the range of numbers";
            return Err(Error::invalid("concepts", problem).advise("give smaller weights"));
        }
        let name: Vec<String> = parts.iter().map(|(c, w)| format!("{}:{w}", c.metadata.concept)).collect();
        let constant = |parameters| Module::with_parameters(Form::Constant, shape, parameters).expect("its own size");
        let metadata = Metadata {
            concept: name.join(" + "),
            iterations: 0,
            recipe: String::new(),
            losses: None,
            calibration: None,
            ..first.metadata.clone()
        };
        let has_sam = parts.iter().any(|(c, _)| c.sam.is_some());
        Ok(Concept { metadata, ram: constant(ram), sam: has_sam.then(|| constant(sam)) })
    }
}

/// A file's calibration, or a description of what is wrong with it.
fn calibration(text: &str) -> std::result::Result<Calibration, String> {
    let calibration: Calibration = serde_json::from_str(text).map_err(|e| format!("cannot be read: {e}"))?;
    match calibration.strength.problem() {
        Some((problem, _)) => Err(format!("is not possible: {problem}")),
        None if !(calibration.guidance.is_finite()) => Err("has a guidance that is not finite".into()),
        None => Ok(calibration),
    }
}

/// A tensor's numbers in fp32, or a description of what is wrong with it.
fn numbers(view: &TensorView) -> std::result::Result<Vec<f32>, String> {
    let data = view.data();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F16 => data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F32 => data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        other => return Err(format!("holds {other:?} numbers in place of F16 or F32")),
    };
    match values.iter().find(|x| !x.is_finite()) {
        Some(bad) => Err(format!("holds {bad}, as after a training that diverged")),
        None => Ok(values),
    }
}
