//! Single-file checkpoints: one file of safetensors or of `torch.save` with all weights under the names of the original
//! code (CompVis', Stability AI's, OpenCLIP's), and no configurations.

mod configs;
mod names;
pub(super) mod original;
mod prediction;

use super::tensors::{Part, Tensors};
use crate::graph::{Extent, Graph};
use crate::models::tokenizer::Tokenizer;
use crate::models::{ClipConfig, UNetConfig, UNetInput, VaeConfig, text_encoder, unet, vae_decoder, vae_encoder};
use crate::{Error, Result};
pub(super) use configs::Family;
pub(super) use names::text_model;
pub(super) use original::OpenClip;
use prediction::Prediction;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
/// A tensor that every checkpoint has.
const FIRST: &str = "model.diffusion_model.input_blocks.0.0.weight";

/// Text encoders: the component, its prefix (in 1.x and 2.x, or in Stability AI's later code), and true if it is
/// OpenCLIP's.
const TOWERS: [(&str, &str, bool); 5] = [
    ("text_encoder", "cond_stage_model.transformer.", false),
    ("text_encoder", "cond_stage_model.model.", true),
    ("text_encoder", "conditioner.embedders.0.transformer.", false),
    ("text_encoder", "conditioner.embedders.0.model.", true),
    ("text_encoder_2", "conditioner.embedders.1.model.", true),
];

/// Layers of OpenCLIP-H that Stable Diffusion 2.x computes: it reads the output of the last but one of the 24.
const OPEN_CLIP_H_LAYERS: usize = 23;

/// A checkpoint of Stable Diffusion 1.x, 2.x or SDXL in the original layout, which presents itself as the diffusers
/// folder of the same model: names, shapes, configurations, tokenizers.
///
/// Networks are recognised from their tensors. Properties that the tensors do not show are assumed to be those of all
/// known checkpoints: 8 attention heads in 1.x, heads of 64 channels in 2.x, SDXL and text encoders; norms of 32
/// groups; the scaling factor of the VAE and the scheduler of each family's first release; CLIP's vocabulary.
/// `prediction.rs` decides whether the UNet predicts epsilon or v.
pub struct SingleFile {
    path: PathBuf,
    /// True if the UNet's weights are moving averages.
    averages: bool,
    /// Tensors by component.
    tensors: BTreeMap<&'static str, Tensors>,
    /// The content of the files that the same model's folder would have, by relative path.
    files: BTreeMap<String, String>,
    /// The padding token of each tokenizer.
    padding: BTreeMap<String, &'static str>,
}

impl fmt::Debug for SingleFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SingleFile({})", self.path.display())
    }
}

/// Prefixes of a VAE's tensors.
const VAES: [&str; 2] = [VAE, ""];

impl SingleFile {
    /// A checkpoint, of which the file must hold at least the UNet. If `averages` is true, the UNet is that of the
    /// moving averages (EMA) that some trainers save beside the weights.
    pub(super) fn open(path: &Path, averages: bool) -> Result<Self> {
        let refuse = |problem: &'static str| Error::unsupported(path, problem);
        let all = Tensors::open_file(path)?;
        let has = |prefix: &str| starts(&all, prefix);
        let root = [UNET, ""].into_iter().find(|root| {
            let has = |name: &str| all.has(&format!("{root}{name}"));
            // Of the original layout, or of diffusers'.
            has("input_blocks.0.0.weight") || (has("conv_in.weight") && has("down_blocks.0.resnets.0.conv1.weight"))
        });
        let Some(root) = root else {
            return Err(Error::unsupported(path, format!("not a Stable Diffusion checkpoint: {}", describe(&all))));
        };
        if all.has("edm_mean") || all.has("edm_vpred.sigma_max") {
            return Err(refuse("made for EDM sampling (Playground 2.5, CosXL), which is not supported"));
        }
        let original = if averages { names::averages(&all, root)? } else { under(&all, root)? };
        let unet_tensors = names::unet(&original)?;
        let family = Family::of(&unet_tensors)?;
        if family == Family::Xl && has("conditioner.embedders.0.model.") {
            return Err(refuse("this is SDXL's refiner, which is not supported").advise("give the base model"));
        }
        if family == Family::Xl && !has("conditioner.") && has("cond_stage_model.") {
            return Err(refuse("this UNet reads image embeddings (unCLIP), which is not supported"));
        }
        let mut file = SingleFile { averages, ..Self::empty(path) };
        let mut pooled = None;
        for (component, prefix, open) in TOWERS {
            if has(prefix) {
                pooled = pooled.or(file.add_text(&under(&all, prefix)?, component, open, family)?);
            }
        }
        if has(VAE) {
            file.add_vae(&under(&all, VAE)?, family)?;
        }
        let beside = std::fs::read_to_string(path.with_extension("yaml")).ok();
        let prediction = Prediction::of(&all, &unet_tensors, family, beside.as_deref())?;
        let config = family.unet(&unet_tensors, prediction, pooled)?.to_string();
        let parsed = UNetConfig::parse(&config, path)?;
        check(path, &unet_tensors, &[unet(&parsed, UNetInput::default())])?;
        file.files.insert("unet/config.json".into(), config);
        let scheduler = family.scheduler(prediction, all.has("ztsnr"));
        file.files.insert("scheduler/scheduler_config.json".into(), scheduler.to_string());
        file.files.insert("model_index.json".into(), family.index().to_string());
        file.tensors.insert("unet", unet_tensors);
        Ok(file)
    }

    /// The `component`, a VAE or a text encoder, for a model of this family: of a checkpoint, or of a file that holds
    /// nothing else, in the original layout or in that of diffusers.
    pub(super) fn part(path: &Path, component: &'static str, family: Family) -> Result<Self> {
        let all = Tensors::open_file(path)?;
        let mut file = Self::empty(path);
        let missing = |what: &str| Error::unsupported(path, format!("holds no {what}: {}", describe(&all)));
        if component == "vae" {
            if let Some(taesd) = taesd(path, &all)? {
                file.add_taesd(taesd)?;
                return Ok(file);
            }
            let is_root = |root: &&str| all.has(&format!("{root}decoder.conv_in.weight"));
            let root = VAES.into_iter().find(is_root).ok_or_else(|| missing("VAE"))?;
            file.add_vae(&under(&all, root)?, family)?;
            return Ok(file);
        }
        let towers = TOWERS.iter().filter(|(name, ..)| *name == component);
        let alone = (component, "", family == Family::Sd2 || component == "text_encoder_2");
        let (_, root, open) = towers
            .chain([&alone])
            .find(|(_, root, _)| {
                let embeddings = [
                    "token_embedding.weight",
                    "embeddings.token_embedding.weight",
                    "text_model.embeddings.token_embedding.weight",
                ];
                embeddings.iter().any(|name| all.has(&format!("{root}{name}")))
            })
            .ok_or_else(|| missing("text encoder of this kind"))?;
        file.add_text(&under(&all, root)?, component, *open, family)?;
        Ok(file)
    }

    fn empty(path: &Path) -> Self {
        SingleFile {
            path: path.to_path_buf(),
            averages: false,
            tensors: BTreeMap::new(),
            files: BTreeMap::new(),
            padding: BTreeMap::new(),
        }
    }

    /// Adds a text encoder, OpenCLIP's if `open` is true, and returns the width of its projection.
    fn add_text(
        &mut self,
        original: &Tensors,
        component: &'static str,
        open: bool,
        family: Family,
    ) -> Result<Option<usize>> {
        let path = &self.path;
        // A file may hold OpenCLIP's encoder under transformers' names, as diffusers saves that of 2.x.
        let open = open || family == Family::Sd2;
        let tower = match (starts(original, "transformer.resblocks."), component) {
            (false, _) => names::clip(original, component == "text_encoder_2")?,
            (true, "text_encoder") => names::open_clip(original, OPEN_CLIP_H_LAYERS, false)?,
            (true, _) => names::open_clip(original, usize::MAX, true)?,
        };
        let config = configs::text(&tower, if open { "gelu" } else { "quick_gelu" })?.to_string();
        let parsed = ClipConfig::parse(&config, path)?;
        if family == Family::Sd2 && parsed.layers.count > OPEN_CLIP_H_LAYERS {
            let problem = format!(
                "has a text encoder of {} layers, where 2.x reads the first {OPEN_CLIP_H_LAYERS}",
                parsed.layers.count
            );
            return Err(Error::unsupported(path, problem).advise("give the file with the last layer left out"));
        }
        check(path, &tower, &[text_encoder(&parsed, 1)])?;
        self.files.insert(format!("{component}/config.json"), config);
        // OpenCLIP pads with token 0.
        self.padding.insert(component.replace("text_encoder", "tokenizer"), if open { "!" } else { "<|endoftext|>" });
        match self.tensors.insert(component, tower) {
            Some(_) => Err(Error::damaged(path, format!("holds more than one {component}"))),
            None => Ok(parsed.projection_dim),
        }
    }

    fn add_vae(&mut self, original: &Tensors, family: Family) -> Result<()> {
        let path = &self.path;
        let vae = names::vae(original)?;
        let config = family.vae(&vae)?.to_string();
        let parsed = VaeConfig::parse(&config, path)?;
        let encoder = vae_encoder(&parsed, 1, Extent::square(parsed.scale()));
        check(path, &vae, &[encoder, vae_decoder(&parsed, 1, Extent::square(1))])?;
        self.files.insert("vae/config.json".into(), config);
        self.tensors.insert("vae", vae);
        Ok(())
    }

    fn add_taesd(&mut self, tensors: Tensors) -> Result<()> {
        let path = &self.path;
        let config = configs::taesd(&tensors)?.to_string();
        let parsed = VaeConfig::parse(&config, path)?;
        let mut networks = vec![vae_decoder(&parsed, 1, Extent::square(1))];
        if starts(&tensors, "encoder.") {
            networks.push(vae_encoder(&parsed, 1, Extent::square(parsed.scale())));
        }
        check(path, &tensors, &networks)?;
        self.files.insert("vae/config.json".into(), config);
        self.tensors.insert("vae", tensors);
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_averaged(&self) -> bool {
        self.averages
    }

    pub(super) fn has(&self, relative: &str) -> bool {
        self.files.contains_key(relative)
    }

    pub(super) fn read(&self, relative: &str) -> Result<Vec<u8>> {
        let component = relative.split('/').next().unwrap_or(relative);
        self.files.get(relative).map(|text| text.clone().into_bytes()).ok_or_else(|| self.missing(component))
    }

    /// The padding token of a component's tokenizer, which has CLIP's vocabulary.
    pub(super) fn padding(&self, component: &str) -> Option<&'static str> {
        self.padding.get(component).copied()
    }

    pub(super) fn tokenizer(&self, component: &str) -> Result<Tokenizer> {
        Tokenizer::clip(self.padding(component).ok_or_else(|| self.missing(component))?)
    }

    pub(super) fn tensors(&self, component: &str) -> Result<Tensors> {
        self.tensors.get(component).cloned().ok_or_else(|| self.missing(component))
    }

    fn missing(&self, component: &str) -> Error {
        let there: Vec<&str> = self.tensors.keys().copied().collect();
        Error::not_found(&self.path, format!("holds no {component}, only {}", there.join(", ")))
            .advise(format!("give a checkpoint with all parts, or a {component} from elsewhere beside it"))
    }
}

/// The tensors whose names begin with a prefix, under the rest of these names.
fn under(all: &Tensors, prefix: &str) -> Result<Tensors> {
    all.renamed(|name| name.strip_prefix(prefix).map(|name| (name.to_string(), Part::Whole)).into_iter().collect())
}

fn starts(all: &Tensors, prefix: &str) -> bool {
    all.entries().any(|(name, _)| name.starts_with(prefix))
}

/// TAESD's tensors under diffusers' names, if the file at `path` holds them: the whole VAE in diffusers' layout, or the
/// decoder in that of its authors, with the encoder from a file beside it whose name says `encoder` where this one's
/// says `decoder`, if there is such a file.
///
/// # Errors
/// [`crate::ErrorKind::Unsupported`] for an encoder alone.
fn taesd(path: &Path, all: &Tensors) -> Result<Option<Tensors>> {
    if all.has("decoder.layers.0.weight") {
        return Ok(Some(all.clone()));
    }
    if all.has("0.weight") && all.has("1.conv.0.weight") {
        return Err(Error::unsupported(path, "it is the encoder of TAESD alone")
            .advise("give its decoder, beside which the encoder is found"));
    }
    if !(all.has("1.weight") && all.has("3.conv.0.weight")) {
        return Ok(None);
    }
    let decoder = names::taesd(all, "decoder")?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let encoder = path.with_file_name(name.replace("decoder", "encoder"));
    Ok(Some(match name.contains("decoder") && encoder.is_file() {
        true => decoder.and(names::taesd(&Tensors::open_file(&encoder)?, "encoder")?),
        false => decoder,
    }))
}

/// Checks that the networks read every tensor and find every tensor that they read. Otherwise the file has another
/// architecture, or is damaged.
fn check(path: &Path, tensors: &Tensors, networks: &[Graph]) -> Result<()> {
    let wanted: HashSet<&str> =
        networks.iter().flat_map(|g| g.weights()).flat_map(|w| &w.names).map(String::as_str).collect();
    let there: HashSet<&str> = tensors.entries().map(|(name, _)| name).collect();
    let problem = if let Some(name) = wanted.difference(&there).min() {
        format!(
            "the tensor that diffusers calls `{name}` is missing; the file is incomplete or its architecture unknown"
        )
    } else if let Some(name) = there.difference(&wanted).min() {
        format!("no part of Stable Diffusion 1.x, 2.x or SDXL is called `{name}`; the architecture is not supported")
    } else {
        return Ok(());
    };
    Err(Error::unsupported(path, problem))
}

/// Prefixes of tensor names in diffusers' UNet, VAE and text encoders.
const COMPONENTS: [&str; 4] = ["down_blocks.", "encoder.down_blocks.", "text_model.", "encoder.layers."];

/// Names the kind of a file that is not of the kind that was expected.
pub(super) fn describe(all: &Tensors) -> String {
    let any = |parts: &[&str]| all.entries().any(|(name, _)| parts.iter().any(|part| name.contains(part)));
    let has = |name: &str| all.has(name);
    if has("ram") || has("sam") {
        "it is a concept; give it with --concept".into()
    } else if any(&["lora_", "lora.", "hada_w", "lokr_w"]) {
        "it is a LoRA or a similar adapter; give a checkpoint, and this as an adapter of it".into()
    } else if any(&["control_model.", "controlnet_", "input_hint_block."]) {
        "it is a ControlNet".into()
    } else if any(&["emb_params"]) || has("clip_l") || has("clip_g") {
        "it is an embedding (textual inversion)".into()
    } else if all.entries().any(|(name, _)| COMPONENTS.iter().any(|start| name.starts_with(start))) {
        "it is one component in diffusers' layout; give a checkpoint, and this beside it".into()
    } else if any(&["decoder.up.0.block."]) && !any(&[UNET]) {
        "it is a VAE alone; give a checkpoint, and this beside it".into()
    } else if has("decoder.layers.0.weight") || has("3.conv.0.weight") {
        "it is TAESD, which is a VAE; give a checkpoint, and this beside it".into()
    } else if has(FIRST) {
        "it is a whole checkpoint".into()
    } else if any(&[UNET, "double_blocks.", "joint_blocks."]) {
        "its network is not that of Stable Diffusion 1.x, 2.x or SDXL".into()
    } else {
        let first = all.entries().map(|(name, _)| name).min().unwrap_or("nothing");
        format!("it holds `{first}`, but nothing under {UNET}")
    }
}
