//! Adapters: small files that change the weights of a checkpoint's UNet and text encoders. LoRA with convolutions
//! (LoCon), LoHa, LoKr, DoRA and full differences are read, as kohya's scripts, LyCORIS, PEFT and diffusers write them.
//!
//! An adapter is merged while weights are packed, in fp32: see [`Tensors::adapted`]. Weights in fp16 are rounded to
//! fp16 after that.

mod delta;
mod keys;
mod module;
mod network;
mod peft;

use super::single::describe;
use super::tensors::Tensors;
use crate::image::UsedAdapter;
use crate::{Error, Result};
use delta::{STRETCH, Term};
use module::{Module, Problem};
pub(crate) use network::Network;
use network::Target;
use peft::Peft;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The most folders below each other in which [`Adapter::find`] looks.
const MAX_DEPTH: usize = 8;
/// The endings of adapters' files that [`Adapter::find`] knows.
const ENDINGS: [&str; 4] = ["safetensors", "pt", "ckpt", "bin"];

/// An adapter's file: LoRA, LoCon, LoHa, LoKr, DoRA, or full differences. It is mapped, and read when it is merged.
pub struct Adapter {
    path: PathBuf,
    tensors: Tensors,
    modules: Vec<Module>,
    sha256: String,
    hash: String,
}

/// A description of an adapter's file.
#[derive(Clone, Debug, serde::Serialize)]
#[non_exhaustive]
pub struct AdapterInfo {
    /// The file's name without its ending.
    pub name: String,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// The digits by which A1111 and its successors know the file.
    pub hash: String,
    /// The number of layers that each kind of difference changes, such as 192 of `LoRA`; `DoRA` counts those with
    /// norms of their own, which are of another kind as well.
    pub kinds: BTreeMap<String, usize>,
    /// The number of layers in each network, by the network's folder in a checkpoint; "" if names do not tell.
    pub networks: BTreeMap<String, usize>,
    /// The smallest and the largest rank; `None` if there are none.
    pub ranks: Option<(usize, usize)>,
    /// The smallest and the largest factor of a difference, alpha / rank.
    pub scales: (f32, f32),
    /// The width of the text that the UNet reads for which it was made, if it changes cross attention: 768 for Stable
    /// Diffusion 1.x, 1024 for 2.x, 2048 for SDXL.
    pub text_width: Option<usize>,
    /// The metadata of the file's header.
    pub metadata: BTreeMap<String, String>,
}

/// Adapters and their weights at which a tensor is changed; empty for a tensor as its file has it. Two editions of one
/// tensor are equal if their numbers are.
pub type Edition = Vec<(Arc<str>, u32)>;

/// The changes of a tensor by adapters.
#[derive(Default)]
pub(super) struct Change {
    pub edition: Edition,
    terms: Vec<Term>,
}

impl Change {
    /// Adds the differences to the numbers from the one at `start` on of a matrix with rows of `width` numbers.
    pub fn add(&self, width: usize, start: usize, out: &mut [f32]) {
        let (mut at, mut rest) = (start, out);
        while !rest.is_empty() {
            let (row, column) = (at / width, at % width);
            let (out, after) = rest.split_at_mut(rest.len().min(width - column).min(STRETCH));
            let mut base = [0.0; STRETCH];
            let base = &mut base[..out.len()];
            base.copy_from_slice(out);
            self.terms.iter().for_each(|term| term.add(base, width, row, column, out));
            at += out.len();
            rest = after;
        }
    }
}

impl Adapter {
    /// Opens an adapter's file, and checks all of it that can be checked without a model.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] or [`crate::ErrorKind::Io`] if it cannot be read; [`crate::ErrorKind::Damaged`]
    /// if it is not whole, holds NaN or infinity, or parts that do not fit each other;
    /// [`crate::ErrorKind::Unsupported`] if it is something else, or holds tensors that no known kind of adapter has.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let tensors = Tensors::open_file(path)?;
        let mut groups: BTreeMap<&str, BTreeMap<&'static str, String>> = BTreeMap::new();
        let mut unknown = BTreeSet::new();
        let names: BTreeSet<&str> = tensors.entries().map(|(name, _)| name).collect();
        for &name in &names {
            match keys::split(name) {
                Some((module, part)) => {
                    if let Some(twice) = groups.entry(module).or_default().insert(part, name.into()) {
                        let problem = format!("tensors `{twice}` and `{name}` are the same part of a module");
                        return Err(Error::damaged(path, problem));
                    }
                }
                None => {
                    unknown.insert(name);
                }
            }
        }
        if groups.is_empty() {
            let problem = format!("not a LoRA or a similar adapter: {}", describe(&tensors));
            return Err(Error::unsupported(path, problem).advise("give an adapter's file"));
        }
        if !unknown.is_empty() {
            let problem = format!(
                "{} of its {} tensors are of no kind of adapter that is supported: {}",
                unknown.len(),
                names.len(),
                listed(unknown.iter().copied())
            );
            return Err(Error::unsupported(path, problem).advise("give a LoRA, LoCon, LoHa, LoKr or DoRA"));
        }
        let header = tensors.metadata();
        let peft = header.get(peft::KEY).map_or(Ok(Peft::default()), |text| Peft::parse(text, path))?;
        let mut modules = Vec::new();
        for (module, parts) in groups {
            modules.push(Module::new(module, parts, &tensors, &peft).map_err(|problem| {
                match problem {
                    Problem::Module(problem) => Error::damaged(path, format!("`{module}` {problem}"))
                        .advise("give a whole file, downloaded or saved again"),
                    Problem::File(error) => error,
                }
            })?);
        }
        let names: Vec<&str> = names.into_iter().filter(|name| !name.ends_with("alpha")).collect();
        let checked: Vec<Result<()>> =
            names.par_iter().map(|name| tensors.read(name, &[tensors.shape(name)?]).map(drop)).collect();
        checked.into_iter().collect::<Result<()>>()?;
        let sha256 = tensors.sha256().unwrap_or_default();
        let hash = match header.get("sshs_model_hash").filter(|hash| hash.bytes().all(|b| b.is_ascii_hexdigit())) {
            Some(hash) => hash.clone(),
            None => tensors.sha256_of_numbers(),
        };
        Ok(Adapter { path: path.into(), hash: hash.chars().take(12).collect(), tensors, modules, sha256 })
    }

    /// The files of adapters in a folder and in the folders inside of it, those of one folder in the order of their
    /// names.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] if the folder cannot be read.
    pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>> {
        fn search(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
            let entries = std::fs::read_dir(folder).map_err(Error::io("read", folder))?;
            let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
            paths.sort();
            for path in paths {
                if path.is_dir() {
                    // A folder inside that cannot be read hides no other.
                    let _ = (depth < MAX_DEPTH).then(|| search(&path, depth + 1, found));
                } else if path.extension().is_some_and(|end| ENDINGS.iter().any(|known| end == *known)) {
                    found.push(path);
                }
            }
            Ok(())
        }
        let mut files = Vec::new();
        search(folder, 0, &mut files)?;
        Ok(files)
    }

    /// The file of the adapter that is called `name` in A1111's prompts: `name.safetensors`, `name.pt` or the like in a
    /// folder or in the folders inside of it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] if there is none, with the names that there are; [`crate::ErrorKind::Io`] if the
    /// folder cannot be read.
    pub fn find(folder: impl AsRef<Path>, name: &str) -> Result<PathBuf> {
        let folder = folder.as_ref();
        let files = Adapter::files(folder)?;
        if let Some(path) = files.iter().find(|path| stem(path) == name) {
            return Ok(path.clone());
        }
        let names: BTreeSet<String> = files.iter().map(|path| stem(path)).collect();
        let known = match names.is_empty() {
            true => "it holds no adapters".into(),
            false => format!("it holds {}", listed(names.iter().map(String::as_str))),
        };
        Err(Error::not_found(folder, format!("no adapter called `{name}` is in this folder; {known}")))
    }

    /// The file's name without its ending.
    pub fn name(&self) -> String {
        stem(&self.path)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of the file, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The twelve digits by which A1111 and its successors know the file: those that kohya's scripts wrote into its
    /// header, or the first of a SHA-256 of all that follows the header.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The record in a picture that was made with it.
    pub fn record(&self, weight: f32) -> UsedAdapter {
        UsedAdapter {
            name: self.name(),
            weight,
            sha256: self.sha256.clone(),
            hash: self.hash.clone(),
            file: self.path.display().to_string(),
        }
    }

    /// A description.
    pub fn info(&self) -> AdapterInfo {
        let (mut kinds, mut networks) = (BTreeMap::new(), BTreeMap::new());
        for module in &self.modules {
            *kinds.entry(module.kind.name().to_string()).or_default() += 1;
            if module.is_dora() {
                *kinds.entry("DoRA".into()).or_default() += 1;
            }
            let network = match keys::place(&module.name) {
                ([network], _) => network,
                _ => "",
            };
            *networks.entry(network.to_string()).or_default() += 1;
        }
        let ranks = || self.modules.iter().filter_map(|module| module.rank);
        let scales = || self.modules.iter().map(|module| module.scale);
        AdapterInfo {
            name: self.name(),
            sha256: self.sha256.clone(),
            hash: self.hash.clone(),
            kinds,
            networks,
            ranks: ranks().min().zip(ranks().max()),
            scales: (scales().fold(f32::INFINITY, f32::min), scales().fold(f32::NEG_INFINITY, f32::max)),
            text_width: self.text_width(),
            metadata: self.tensors.metadata().into_iter().collect(),
        }
    }

    /// The width of the text that its UNet's cross attention reads.
    fn text_width(&self) -> Option<usize> {
        let reads_text = |name: &str| name.contains("attn2") && name.replace('_', ".").ends_with("to.k");
        self.modules.iter().find(|module| reads_text(&module.name)).and_then(|module| Some(module.shape?.1))
    }

    /// The differences of this adapter at a weight, added to `changes` by network and tensor.
    fn merge(&self, weight: f32, networks: &[Network], changes: &mut [HashMap<String, Change>]) -> Result<()> {
        self.check_family(networks)?;
        let mut strange = Vec::new();
        let mut misfits = Vec::new();
        // The module, the network's index, the tensor's name, its shape, and whether it is a bias.
        let mut wanted: Vec<(&Module, usize, String, Target, bool)> = Vec::new();
        for module in &self.modules {
            let (components, spelled) = keys::place(&module.name);
            let place = networks.iter().enumerate().find_map(|(i, network)| {
                Some((i, network.module(spelled).filter(|_| components.contains(&network.component))?))
            });
            let Some((i, name)) = place else {
                strange.push(module.name.as_str());
                continue;
            };
            let mut want = |tensor: String, is_bias: bool| match networks[i].target(&tensor) {
                None => strange.push(&module.name),
                Some(target) => {
                    match module.shape.filter(|shape| !is_bias && *shape != (target.outputs, target.width)) {
                        Some((outputs, width)) => misfits.push(format!(
                            "`{}` is for a matrix of {outputs} x {width} numbers, and the model's is {} x {}",
                            module.name, target.outputs, target.width
                        )),
                        None => wanted.push((module, i, tensor, target, is_bias)),
                    }
                }
            };
            if module.changes_weight() {
                want(format!("{name}.weight"), false);
            }
            if module.changes_bias() {
                want(format!("{name}.bias"), true);
            }
        }
        let fail = |problem: String| {
            Error::mismatch(&*self.path, problem).advise("give an adapter that was made for this model's family")
        };
        if !strange.is_empty() {
            let (count, all) = (strange.len(), self.modules.len());
            let listed = listed(strange.into_iter());
            return Err(fail(format!("{count} of its {all} modules are no part of this model: {listed}")));
        }
        if let Some(first) = misfits.first() {
            let others = misfits.len() - 1;
            let others = if others > 0 { format!(", and {others} more do not fit") } else { String::new() };
            return Err(fail(format!("{first}{others}")));
        }
        let mut seen = HashMap::new();
        for (module, i, tensor, ..) in &wanted {
            if let Some(other) = seen.insert((i, tensor), module) {
                let problem = format!("`{}` and `{}` are two spellings of one layer", other.name, module.name);
                return Err(Error::damaged(&self.path, problem).advise("give a file that names each layer once"));
            }
        }
        if weight == 0.0 {
            return Ok(());
        }
        let terms: Vec<Result<Term>> = wanted
            .par_iter()
            .map(|(module, i, tensor, target, is_bias)| match is_bias {
                true => module.bias_term(&self.tensors, weight, target.outputs),
                false => module.term(&self.tensors, weight, *target, || networks[*i].read(tensor)),
            })
            .collect();
        for ((_, i, tensor, ..), term) in wanted.into_iter().zip(terms) {
            let change = changes[i].entry(tensor).or_default();
            change.edition.push((Arc::from(self.sha256.as_str()), weight.to_bits()));
            change.terms.push(term?);
        }
        Ok(())
    }

    /// Checks that it was made for a UNet that reads text of the same width.
    fn check_family(&self, networks: &[Network]) -> Result<()> {
        let known = |width: usize| match width {
            768 => ", as in Stable Diffusion 1.x",
            1024 => ", as in Stable Diffusion 2.x",
            2048 => ", as in SDXL",
            _ => "",
        };
        let model = networks.iter().find_map(Network::text_width);
        match self.text_width().zip(model) {
            Some((own, model)) if own != model => {
                let problem = format!(
                    "made for a UNet that reads text of width {own}{}, and this model's reads {model}{}",
                    known(own),
                    known(model)
                );
                Err(Error::mismatch(&*self.path, problem).advise("give an adapter for this model's family"))
            }
            _ => Ok(()),
        }
    }
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Adapter({}, {} modules)", self.path.display(), self.modules.len())
    }
}

/// The tensors of a checkpoint's networks with adapters at weights added to them, by the networks' folders. All
/// networks that the adapters may change have to be there.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] for a weight that is not finite; [`crate::ErrorKind::Mismatch`] for an adapter that
/// holds modules which no network has, or of another shape; those of reading the adapters' files.
pub(crate) fn adapted(
    adapters: &[(Arc<Adapter>, f32)],
    networks: Vec<Network>,
) -> Result<BTreeMap<&'static str, Tensors>> {
    let mut changes: Vec<HashMap<String, Change>> = networks.iter().map(|_| HashMap::new()).collect();
    for (adapter, weight) in adapters {
        if !weight.is_finite() {
            let problem = format!("{weight} is no weight for `{}`", adapter.name());
            return Err(Error::invalid("adapters", problem).advise("give a finite number, such as 0.8"));
        }
        adapter.merge(*weight, &networks, &mut changes)?;
    }
    let each = networks.into_iter().zip(changes);
    Ok(each.map(|(network, changes)| (network.component, network.tensors.adapted(changes))).collect())
}

/// A file's name without its ending.
pub(crate) fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}

/// The first few of several names, and the number of others.
fn listed<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 4;
    let others = names.len().saturating_sub(SHOWN);
    let shown: Vec<&str> = names.take(SHOWN).collect();
    match others {
        0 => shown.join(", "),
        others => format!("{} and {others} more", shown.join(", ")),
    }
}
