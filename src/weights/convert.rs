//! Writing a checkpoint anew: as a diffusers folder, or as one file in the original layout.

use super::single::{Family, OpenClip, original};
use super::{Format, SingleFile, Source, Stored, Tensors};
use crate::files::Draft;
use crate::graph::{Extent, WeightSpec};
use crate::models::{
    ClipConfig, UNetConfig, UNetInput, VaeConfig, VaeKind, text_encoder, unet, vae_decoder, vae_encoder,
};
use crate::{Error, Result};
use half::{bf16, f16};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Numbers that are converted at a time.
const CHUNK: usize = 1 << 20;

/// A tensor to be written, with the name and shape that it gets: one tensor, or several that become one by their rows.
struct Item<'a> {
    name: String,
    shape: Vec<usize>,
    parts: Vec<Stored<'a>>,
}

/// The parsed configurations of a checkpoint, by which its networks are known.
struct Networks {
    unet: UNetConfig,
    vae: VaeConfig,
    /// Of the components `text_encoder` and `text_encoder_2`.
    text: Vec<ClipConfig>,
}

/// A component's name, the tensors that its network reads, and their specification.
type Component = (&'static str, Tensors, Vec<WeightSpec>);

impl Source {
    /// Writes the checkpoint to `destination`: to a file in the original layout if the name ends in `.safetensors`,
    /// else to a folder as diffusers writes it. Numbers keep their format, unless `format` names another one, but 8-bit
    /// numbers become fp16, or with a scale fp32. The result appears whole or not at all.
    ///
    /// Returns what a file in the original layout does not say, for the user to know.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if something is at `destination` already, other than an empty folder;
    /// [`crate::ErrorKind::Unsupported`] for networks that the original layout cannot describe, or numbers beyond the
    /// format; those of reading the checkpoint; [`crate::ErrorKind::Io`].
    pub fn convert(&self, destination: &Path, format: Option<Format>) -> Result<Vec<String>> {
        let draft = Draft::new(destination)?;
        let networks = Networks::read(self)?;
        let components = networks.components(self)?;
        if destination.extension().is_none_or(|extension| extension != "safetensors") {
            self.write_folder(draft.path(), &networks, &components, format)?;
            draft.keep()?;
            return Ok(Vec::new());
        }
        let inside = draft.path().join("model.safetensors");
        self.write_single(&inside, &networks, &components, format)?;
        let notes = self.unsaid(&inside, &networks)?;
        draft.keep_file(&inside)?;
        Ok(notes)
    }

    fn write_folder(
        &self,
        folder: &Path,
        networks: &Networks,
        components: &[Component],
        format: Option<Format>,
    ) -> Result<()> {
        let write = |relative: &str, bytes: &[u8]| {
            let path = folder.join(relative);
            let parent = path.parent().unwrap_or(folder);
            std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
            std::fs::write(&path, bytes).map_err(Error::io("write", &path))
        };
        for (component, tensors, specs) in components {
            let file = format!("{component}/config.json");
            write(&file, &self.read(&file)?)?;
            let names = specs.iter().flat_map(|spec| &spec.names);
            let items = names.map(|name| {
                let (stored, shape) = tensors.named(name)?;
                Ok(Item { name: name.clone(), shape, parts: vec![stored] })
            });
            let items = items.collect::<Result<Vec<_>>>()?;
            let stem = if component.starts_with("text") { "model" } else { "diffusion_pytorch_model" };
            let path = folder.join(component).join(format!("{stem}.safetensors"));
            write_tensors(&path, items, format, &BTreeMap::from([("format", "pt")]))?;
        }
        let scheduler = "scheduler/scheduler_config.json";
        write(scheduler, &self.read(scheduler)?)?;
        let mut index = json!({});
        if self.has("model_index.json") {
            index = crate::json::parse(&self.read_text("model_index.json")?, &self.path("model_index.json"))?;
        }
        let class: Value = crate::json::parse(&self.read_text(scheduler)?, &self.path(scheduler))?;
        let xl = components.len() > 3;
        let own = if xl { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" };
        let mut written = json!({
            "_class_name": index["_class_name"].as_str().unwrap_or(own),
            "_diffusers_version": "0.35.2",
            "scheduler": ["diffusers", class["_class_name"].as_str().unwrap_or("PNDMScheduler")],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", networks.vae.kind.class()],
            "feature_extractor": [null, null],
            "image_encoder": [null, null],
        });
        if xl {
            written["force_zeros_for_empty_prompt"] = (index["force_zeros_for_empty_prompt"] != false).into();
        } else {
            written["safety_checker"] = json!([null, null]);
            written["requires_safety_checker"] = false.into();
        }
        for (component, ..) in components.iter().filter(|(component, ..)| component.starts_with("text")) {
            let file = format!("{component}/config.json");
            let config: Value = crate::json::parse(&self.read_text(&file)?, &self.path(&file))?;
            let class = config["architectures"][0].as_str().unwrap_or("CLIPTextModel").to_string();
            written[*component] = json!(["transformers", class]);
            let tokenizer = component.replace("text_encoder", "tokenizer");
            written[&tokenizer] = json!(["transformers", "CLIPTokenizer"]);
            for (name, bytes) in self.tokenizer_files(&tokenizer)? {
                write(&format!("{tokenizer}/{name}"), &bytes)?;
            }
        }
        write("model_index.json", format!("{written:#}\n").as_bytes())
    }

    fn write_single(
        &self,
        path: &Path,
        networks: &Networks,
        components: &[Component],
        format: Option<Format>,
    ) -> Result<()> {
        let family = self.family()?;
        let VaeKind::Kl(vae) = &networks.vae.kind else {
            let problem = "a file in the original layout cannot have TAESD as its VAE";
            return Err(Error::unsupported(self.path("vae/config.json"), problem)
                .advise("convert the checkpoint with its own VAE, or to a folder"));
        };
        let unnamed = |name: &str| {
            let problem = format!("the original layout has no name for its tensor `{name}`");
            Error::unsupported(self.path("unet/config.json"), problem).advise("convert it to a folder")
        };
        let mut items: BTreeMap<String, Item> = BTreeMap::new();
        for (component, tensors, specs) in components {
            let prefix = match (*component, family) {
                ("unet", _) => "model.diffusion_model.",
                ("vae", _) => "first_stage_model.",
                ("text_encoder_2", _) => "conditioner.embedders.1.model.",
                (_, Family::Xl) => "conditioner.embedders.0.transformer.",
                (_, Family::Sd1) => "cond_stage_model.transformer.",
                (_, Family::Sd2) => "cond_stage_model.model.",
            };
            for name in specs.iter().flat_map(|spec| &spec.names) {
                let (stored, mut shape) = tensors.named(name)?;
                let form = match *component {
                    "unet" => original::unet(name, &networks.unet).map(OpenClip::Whole),
                    "vae" => original::vae(name, vae).map(|(name, is_convolution)| {
                        if is_convolution {
                            shape.extend([1, 1].iter().take(4 - shape.len()));
                        }
                        OpenClip::Whole(name)
                    }),
                    _ if prefix.ends_with("transformer.") => Some(OpenClip::Whole(name.clone())),
                    _ => original::open_clip(name),
                };
                let (name, stored) = match form.ok_or_else(|| unnamed(name))? {
                    OpenClip::Whole(name) => (name, stored),
                    OpenClip::Transposed(name) => {
                        shape.reverse();
                        (name, stored.exchanged())
                    }
                    // The three follow one another in the network's list of weights.
                    OpenClip::Third(name) => (name, stored),
                };
                let name = format!("{prefix}{name}");
                match items.get_mut(&name) {
                    Some(item) => {
                        item.shape[0] += shape[0];
                        item.parts.push(stored);
                    }
                    None => drop(items.insert(name.clone(), Item { name, shape, parts: vec![stored] })),
                }
            }
        }
        let scheduler: Value = crate::json::parse(
            &self.read_text("scheduler/scheduler_config.json")?,
            &self.path("scheduler/scheduler_config.json"),
        )?;
        let velocity = scheduler["prediction_type"] == "v_prediction";
        let mut mark = |name: &str| {
            let shape = vec![0];
            items.insert(name.into(), Item { name: name.into(), shape, parts: Vec::new() });
        };
        if velocity && family == Family::Xl {
            mark("v_pred");
        }
        if scheduler["rescale_betas_zero_snr"] == true {
            mark("ztsnr");
        }
        let architecture = match (family, velocity) {
            (Family::Sd1, _) => "stable-diffusion-v1",
            (Family::Sd2, true) => "stable-diffusion-v2-768-v",
            (Family::Sd2, false) => "stable-diffusion-v2-512",
            (Family::Xl, _) => "stable-diffusion-xl-v1-base",
        };
        let notes = BTreeMap::from([
            ("format", "pt"),
            ("modelspec.architecture", architecture),
            ("modelspec.prediction_type", if velocity { "v" } else { "epsilon" }),
        ]);
        write_tensors(path, items.into_values().collect(), format, &notes)
    }

    /// Reads the written file as every reader of the original layout must, from its tensors alone.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if that gives other networks.
    fn unsaid(&self, written: &Path, networks: &Networks) -> Result<Vec<String>> {
        let refused = |problem: String| {
            let path = self.path("unet/config.json");
            Error::unsupported(path, format!("the original layout cannot describe it: {problem}"))
                .advise("convert it to a folder")
        };
        let single = SingleFile::open(written, false).map_err(|error| refused(error.problem().to_string()))?;
        let single = Source::Single(std::sync::Arc::new(single));
        let mut read = Networks::read(&single).map_err(|error| refused(error.problem().to_string()))?;
        let mut notes = Vec::new();
        if read.unet.sample_size != networks.unet.sample_size {
            let side = |size: Option<(usize, usize)>| size.map_or(64, |(h, _)| h) * networks.vae.scale();
            let (own, other) = (side(networks.unet.sample_size), side(read.unet.sample_size));
            notes.push(format!("the size that it was trained on, {own} pixels: readers take {other}"));
            read.unet.sample_size = networks.unet.sample_size;
        }
        for (what, same) in [
            ("UNet", read.unet == networks.unet),
            ("VAE", read.vae == networks.vae),
            ("text encoder", read.text == networks.text),
        ] {
            if !same {
                let problem = format!("the configuration of its {what} is not that of known checkpoints");
                return Err(refused(problem));
            }
        }
        let file = "scheduler/scheduler_config.json";
        let class = |source: &Source| -> Result<Value> {
            let config: Value = crate::json::parse(&source.read_text(file)?, &source.path(file))?;
            Ok(json!([config["_class_name"], config["timestep_spacing"]]))
        };
        let (own, other) = (class(self)?, class(&single)?);
        if own[0] != other[0] || (!own[1].is_null() && own[1] != other[1]) {
            let name = |value: &Value| value[0].as_str().unwrap_or("none").to_string();
            notes.push(format!("its scheduler, {}: readers take {}", name(&own), name(&other)));
        }
        Ok(notes)
    }
}

impl Networks {
    fn read(source: &Source) -> Result<Self> {
        let text = |component: &str| {
            let file = format!("{component}/config.json");
            Ok::<_, Error>((source.read_text(&file)?, source.path(&file)))
        };
        let encoders = ["text_encoder", "text_encoder_2"];
        let encoders =
            encoders.iter().enumerate().filter(|(i, name)| *i == 0 || source.has(&format!("{name}/config.json")));
        let (unet, vae) = (text("unet")?, text("vae")?);
        Ok(Networks {
            unet: UNetConfig::parse(&unet.0, &unet.1)?,
            vae: VaeConfig::parse(&vae.0, &vae.1)?,
            text: encoders
                .map(|(_, name)| text(name).and_then(|(text, path)| ClipConfig::parse(&text, &path)))
                .collect::<Result<_>>()?,
        })
    }

    /// All components, with everything that their networks read.
    fn components(&self, source: &Source) -> Result<Vec<Component>> {
        let vae = &self.vae;
        let mut vae_specs = vae_decoder(vae, 1, Extent::square(1)).weights().to_vec();
        vae_specs.extend(vae_encoder(vae, 1, Extent::square(vae.scale())).weights().iter().cloned());
        let unet = unet(&self.unet, UNetInput::default()).weights().to_vec();
        let mut components = vec![("unet", source.tensors("unet")?, unet), ("vae", source.tensors("vae")?, vae_specs)];
        for (name, config) in ["text_encoder", "text_encoder_2"].into_iter().zip(&self.text) {
            components.push((name, source.tensors(name)?, text_encoder(config, 1).weights().to_vec()));
        }
        // Checks names, shapes and number formats.
        for (_, tensors, specs) in &components {
            specs.iter().try_for_each(|spec| tensors.stored(spec).map(drop))?;
        }
        Ok(components)
    }
}

/// The format in which a tensor is written if none is asked for, in which its numbers stay the same.
fn kept(parts: &[Stored]) -> Format {
    match parts {
        [] => Format::F16,
        parts if parts.iter().all(Stored::fits_half) => Format::F16,
        [first, ..] if parts.iter().all(|part| part.format == first.format && part.scale == 1.0) => first.format,
        _ => Format::F32,
    }
}

/// The name of a format in the header. Numbers of eight bits are never written.
fn dtype(format: Format) -> &'static str {
    match format {
        Format::BF16 => "BF16",
        Format::F32 => "F32",
        Format::F64 => "F64",
        Format::F16 | Format::F8E4M3 | Format::F8E5M2 => "F16",
    }
}

/// Writes a safetensors file, tensor by tensor.
fn write_tensors(path: &Path, items: Vec<Item>, format: Option<Format>, notes: &BTreeMap<&str, &str>) -> Result<()> {
    let mut items: Vec<(Format, Item)> =
        items.into_iter().map(|item| (format.unwrap_or_else(|| kept(&item.parts)), item)).collect();
    // Wide numbers first, so that all are aligned.
    items.sort_by(|(a, left), (b, right)| b.bytes().cmp(&a.bytes()).then_with(|| left.name.cmp(&right.name)));
    let mut header = serde_json::Map::from_iter([("__metadata__".to_string(), json!(notes))]);
    let mut end = 0;
    for (format, item) in &items {
        let start = end;
        end += item.shape.iter().product::<usize>() * format.bytes();
        let entry = json!({"dtype": dtype(*format), "shape": item.shape, "data_offsets": [start, end]});
        header.insert(item.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    let failed = |problem| Error::io("write", path)(problem);
    let mut file = BufWriter::new(File::create(path).map_err(Error::io("create", path))?);
    file.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| file.write_all(&header)).map_err(failed)?;
    for (format, item) in &items {
        for part in &item.parts {
            write_numbers(&mut file, part, *format).map_err(|problem| match problem {
                Problem::Io(problem) => failed(problem),
                Problem::Numbers(error) => error,
            })?;
        }
    }
    let file = file.into_inner().map_err(|problem| failed(problem.into_error()))?;
    file.sync_all().map_err(failed)
}

enum Problem {
    Io(std::io::Error),
    Numbers(Error),
}

fn write_numbers(file: &mut impl Write, stored: &Stored, format: Format) -> std::result::Result<(), Problem> {
    stored.check_finite().map_err(Problem::Numbers)?;
    if format == stored.format && !stored.transposed && stored.scale == 1.0 {
        return file.write_all(&stored.bytes()).map_err(Problem::Io);
    }
    let mut numbers = vec![0.0f32; CHUNK.min(stored.len())];
    for start in (0..stored.len()).step_by(CHUNK) {
        let numbers = &mut numbers[..CHUNK.min(stored.len() - start)];
        stored.numbers(start, numbers);
        let bytes: Vec<u8> = match format {
            Format::BF16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            Format::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Format::F64 => numbers.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect(),
            Format::F16 | Format::F8E4M3 | Format::F8E5M2 => {
                numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()
            }
        };
        let beyond = match format {
            Format::F16 => numbers.iter().find(|&&x| f16::from_f32(x).is_infinite()),
            Format::BF16 => numbers.iter().find(|&&x| bf16::from_f32(x).is_infinite()),
            _ => None,
        };
        if let Some(x) = beyond {
            let problem = format!("tensor `{}` holds {x}, beyond the largest number of {}", stored.name, dtype(format));
            return Err(Problem::Numbers(Error::unsupported(stored.path, problem).advise("take fp32")));
        }
        file.write_all(&bytes).map_err(Problem::Io)?;
    }
    Ok(())
}
