//! The flags that choose concepts, and `respodiff concept`.

use super::{check_writable, model, say, warn};
use crate::concept::{Concept, Form, Group, NumberFormat, assign, import};
use crate::engine::{Engine, read_config};
use crate::models::UNetConfig;
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Which concepts the images get.
#[derive(clap::Args)]
pub(super) struct Flags {
    /// Shift every image by this concept file; repeat to compose
    #[arg(long = "concept", value_name = "FILE[:WEIGHT]")]
    concepts: Vec<String>,
    /// Give each image one of these concepts, by exact quotas; repeat to cross groups
    #[arg(long, value_name = "A,B[=SHARE,SHARE]")]
    balance: Vec<String>,
    /// Draw for each image instead of exact quotas
    #[arg(long)]
    balance_random: bool,
    /// Weight of balanced concepts
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    balance_weight: f32,
    /// Leave a prompt alone that names an attribute of the group ("a female doctor")
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    respect_prompt: bool,
}

/// For each image its concepts and their weights.
pub(super) type Assignment = Vec<Vec<(Arc<Concept>, f32)>>;

impl Flags {
    /// Whether any concept is asked for.
    pub(super) fn any(&self) -> bool {
        !self.concepts.is_empty() || !self.balance.is_empty()
    }

    /// Reads the files and deals the concepts out.
    pub(super) fn assign(&self, engine: &Engine, prompt: &str, images: usize, seed: u64) -> Result<Assignment> {
        let mut all: Assignment = vec![Vec::new(); images];
        for text in &self.concepts {
            let (path, weight) = file_and_weight(text)?;
            let concept = load(&path, engine)?;
            all.iter_mut().for_each(|image| image.push((concept.clone(), weight)));
        }
        let mut groups = Vec::new();
        for text in &self.balance {
            let group = self::group(text, engine)?;
            match group.named_in(prompt) {
                Some(word) if self.respect_prompt => {
                    warn(&format!(
                        "the prompt says `{word}`, so --balance {text} leaves it alone; --respect-prompt false balances"
                    ));
                }
                _ => groups.push(group),
            }
        }
        for (image, row) in all.iter_mut().zip(assign(&groups, images, seed, self.balance_random)) {
            image.extend(row.iter().zip(&groups).map(|(&m, group)| (group.members[m].clone(), self.balance_weight)));
        }
        Ok(all)
    }
}

/// `A,B` or `A,B=0.6,0.4`.
pub(super) fn group(text: &str, engine: &Engine) -> Result<Group> {
    let (files, shares) = match text.rsplit_once('=') {
        Some((files, shares)) => {
            let parse = |s: &str| {
                s.trim()
                    .parse::<f64>()
                    .map_err(|_| Error::invalid("balance", format!("--balance {text}: `{s}` is no share")))
            };
            (files, Some(shares.split(',').map(parse).collect::<Result<Vec<f64>>>()?))
        }
        None => (text, None),
    };
    let members = files.split(',').map(|file| load(Path::new(file.trim()), engine)).collect::<Result<_>>()?;
    Group::new(members, shares)
}

/// `FILE` or `FILE:WEIGHT`; a file whose name has a colon is taken as it is.
fn file_and_weight(text: &str) -> Result<(PathBuf, f32)> {
    if let Some((file, weight)) = text.rsplit_once(':').filter(|_| !Path::new(text).exists()) {
        return match weight.parse::<f32>() {
            Ok(weight) if weight.is_finite() => Ok((file.into(), weight)),
            _ => Err(Error::invalid("concept", format!("`{text}`: `{weight}` is no weight")).advise("write FILE:0.8")),
        };
    }
    Ok((text.into(), 1.0))
}

/// Reads a concept and says if it was trained on another model.
fn load(path: &Path, engine: &Engine) -> Result<Arc<Concept>> {
    let concept = Concept::load(path)?;
    let base = &concept.metadata.fingerprint;
    if !base.is_empty() && *base != engine.fingerprint()? {
        warn(&format!(
            "{} was trained on {}, not on {}; look at the pictures before you rely on it",
            path.display(),
            concept.metadata.base_model,
            engine.name()
        ));
    }
    Ok(Arc::new(concept))
}

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// What concept files hold
    Show {
        /// Concept files
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Take a concept out of the official code's .pth or SDisc's matrix; nothing in the file is run
    Import {
        /// The file
        file: PathBuf,
        /// Checkpoint folder, single file or Hugging Face model id it was trained on [default: the demo]
        #[arg(long)]
        model: Option<String>,
        /// Which concept: "a woman"
        #[arg(long)]
        concept: String,
        /// Its column, if the name is not one of the file's
        #[arg(long)]
        column: Option<usize>,
        /// Concept file to write
        #[arg(long)]
        out: PathBuf,
    },
    /// Write a concept in another precision
    Convert {
        /// Concept file
        file: PathBuf,
        /// NumberFormat to write: f16 or f32
        #[arg(long)]
        dtype: NumberFormat,
        /// Concept file to write
        #[arg(long)]
        out: PathBuf,
    },
    /// Add concepts up to one
    Merge {
        /// Concept files and their weights
        #[arg(required = true, value_name = "FILE[:WEIGHT]")]
        files: Vec<String>,
        /// Concept file to write
        #[arg(long)]
        out: PathBuf,
    },
}

pub(super) fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Show { files } => files.iter().try_for_each(|file| show(file)),
        Command::Import { file, model, concept, column, out } => {
            check_writable(out)?;
            let source = model::source(model.as_deref())?;
            let config = read_config(&source, "unet", UNetConfig::parse)?;
            let channels = config.levels.last().map_or(0, |level| level.channels);
            let mut concept = import(file, concept, *column, channels)?;
            concept.metadata.base_model = source.name();
            concept.metadata.fingerprint = source.tensors("unet")?.fingerprint()?;
            concept.save(out)?;
            say(&out.display().to_string());
            Ok(())
        }
        Command::Convert { file, dtype, out } => {
            check_writable(out)?;
            Concept::load(file)?.save_as(out, *dtype)?;
            say(&out.display().to_string());
            Ok(())
        }
        Command::Merge { files, out } => {
            check_writable(out)?;
            let parts = files
                .iter()
                .map(|text| file_and_weight(text).and_then(|(path, weight)| Ok((Concept::load(path)?, weight))))
                .collect::<Result<Vec<_>>>()?;
            Concept::merge(&parts)?.save(out)?;
            say(&out.display().to_string());
            Ok(())
        }
    }
}

fn show(path: &Path) -> Result<()> {
    let Concept { metadata, ram, sam } = Concept::load(path)?;
    let shape = ram.shape();
    say(&path.display().to_string());
    let row = |name: &str, value: String| {
        if !value.is_empty() {
            say(&format!("  {name:<12} {value}"));
        }
    };
    row("concept", metadata.concept);
    row("kind", metadata.kind.name().into());
    row("neutral", metadata.neutral);
    let base = if metadata.fingerprint.is_empty() { String::new() } else { format!(" ({})", metadata.fingerprint) };
    row("base model", format!("{}{base}", metadata.base_model));
    row("bottleneck", format!("{} channels, {}x{}", shape.c, shape.h, shape.w));
    let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if ram.form() == Form::Constant {
        row("RAM", format!("norm {:.3}", norm(&ram.parameters)));
        if let Some(sam) = &sam {
            let dot: f64 = ram.parameters.iter().zip(&sam.parameters).map(|(a, b)| f64::from(a * b)).sum();
            let cosine = dot / (norm(&ram.parameters) * norm(&sam.parameters)).max(f64::MIN_POSITIVE);
            let sum: Vec<f32> = ram.parameters.iter().zip(&sam.parameters).map(|(a, b)| a + b).collect();
            row("SAM", format!("norm {:.3}, cosine with RAM {cosine:.3}", norm(&sam.parameters)));
            row("RAM + SAM", format!("norm {:.3}", norm(&sum)));
        }
    } else {
        row("network", format!("{:?}, {} parameters a module", ram.form(), ram.parameters.len()));
    }
    if metadata.iterations > 0 {
        row("iterations", metadata.iterations.to_string());
    }
    if let Some([resp, sem]) = metadata.losses {
        row("losses", format!("L_resp {resp:.3e}, L_sem {sem:.3e} over the last tenth"));
    }
    row("recipe", metadata.recipe.trim().replace('\n', ", "));
    for (name, value) in metadata.other {
        row(&name, value);
    }
    Ok(())
}
