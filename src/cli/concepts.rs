//! The flags that choose concepts, and `respodiff concept`.

use super::card::card;
use super::eval::calibrate;
use super::{model, say, warn};
use crate::Result;
use crate::concept::{
    Assignment, Concept, Form, Group, Module, NumberFormat, Shelf, Strength, Used, group, import, members,
    name_and_weight, shared_out, used,
};
use crate::engine::{Engine, read_config};
use crate::files::check_writable;
use crate::models::UNetConfig;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The choice of concepts for the images.
#[derive(clap::Args)]
pub(super) struct Flags {
    /// Apply this concept to every image: a file, or the name of one of the demo's concepts (woman, man, asian, black,
    /// white); repeat to compose
    #[arg(long = "concept", value_name = "FILE[:WEIGHT]")]
    concepts: Vec<String>,
    /// Give each image one of these concepts, by exact quotas; repeat to cross groups
    #[arg(long, value_name = "A,B[=SHARE,SHARE]")]
    balance: Vec<String>,
    /// Draw at random for each image instead of using exact quotas
    #[arg(long)]
    balance_random: bool,
    /// Weight of balanced concepts [default: a concept's own by `concept calibrate`, or 1]
    #[arg(long, allow_negative_numbers = true)]
    balance_weight: Option<f32>,
    #[command(flatten)]
    until: Until,
    /// Do not balance a prompt that itself names an attribute of the group ("a female doctor")
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    respect_prompt: bool,
}

/// The steps in which concepts act.
#[derive(Default, clap::Args)]
pub(super) struct Until {
    /// Apply concepts only while the timestep (1000 is noise, 0 the picture) is at least this: 500 keeps more of the
    /// prompt's details, and allows for larger weights [default: a concept's own by `concept calibrate`, or 0]
    #[arg(long, value_name = "TIMESTEP", value_parser = timestep, allow_negative_numbers = true)]
    concepts_until: Option<f32>,
}

fn timestep(text: &str) -> std::result::Result<f32, String> {
    let timestep = text.parse().ok().filter(|timestep| (0.0..=1000.0).contains(timestep));
    timestep.ok_or_else(|| "give 0 to 1000".into())
}

impl Until {
    /// The strength of a concept: as the flags say, and where they are silent, as it was calibrated.
    pub(super) fn strength(&self, concept: &Concept, weight: Option<f32>, guidance: f32) -> Strength {
        let own = concept.strength(guidance);
        Strength::from(weight.unwrap_or(own.weight)).until(self.concepts_until.unwrap_or(own.until))
    }

    /// The concepts of `NAME` and `NAME:WEIGHT`, for pictures at a guidance scale.
    pub(super) fn used(&self, texts: &[String], guidance: f32, shelf: &dyn Shelf) -> Result<Vec<Used>> {
        used(texts, shelf, |concept, weight| self.strength(concept, weight, guidance))
    }
}

impl Flags {
    /// True if any concept is asked for.
    pub(super) fn any(&self) -> bool {
        !self.concepts.is_empty() || !self.balance.is_empty()
    }

    /// The concepts' files, as they are named.
    pub(super) fn files(&self) -> Result<Vec<PathBuf>> {
        let alone = self.concepts.iter().map(|text| Ok(file_and_weight(text)?.0.into()));
        let balanced = self.balance.iter().flat_map(|text| members(text)).map(|file| Ok(file.into()));
        alone.chain(balanced).collect()
    }

    /// Reads the files and assigns the concepts to the images of a prompt, which have a guidance scale in common.
    pub(super) fn assign(
        &self,
        engine: &Engine,
        prompt: &str,
        guidance: f32,
        images: usize,
        seed: u64,
    ) -> Result<Assignment> {
        let shelf = Files(engine);
        let all = self.until.used(&self.concepts, guidance, &shelf)?;
        let mut groups = Vec::new();
        for text in &self.balance {
            let named = group(text, &shelf)?;
            match named.0.named_in(prompt) {
                Some(word) if self.respect_prompt => {
                    warn(&format!(
                        "the prompt says `{word}`, so --balance {text} is skipped; --respect-prompt false applies it"
                    ));
                }
                _ => groups.push(named),
            }
        }
        Ok(shared_out(&all, &groups, (images, seed, self.balance_random), |concept| {
            self.until.strength(concept, self.balance_weight, guidance)
        }))
    }
}

/// Files, and the demo's concepts by their names, for pictures of an engine.
pub(super) struct Files<'a>(pub(super) &'a Engine);

impl Shelf for Files<'_> {
    fn has(&self, name: &str) -> bool {
        Path::new(name).exists()
    }

    fn find(&self, name: &str) -> Result<Arc<Concept>> {
        load(Path::new(name), self.0)
    }
}

/// The groups of an evaluation's `--concepts`.
pub(super) fn groups(texts: &[String], engine: &Engine) -> Result<Vec<Group>> {
    let group = |text: &String| Ok(group(text, &Files(engine)).map_err(|error| error.of_field("--concepts"))?.0);
    texts.iter().map(group).collect()
}

/// The file of `FILE` or `FILE:WEIGHT`, and its weight.
fn file_and_weight(text: &str) -> Result<(&str, Option<f32>)> {
    name_and_weight(text, |name| Path::new(name).exists())
}

/// Reads a concept, and warns if it was trained on other weights.
fn load(path: &Path, engine: &Engine) -> Result<Arc<Concept>> {
    let concept = Concept::open(path)?;
    let adapters: Vec<_> = engine.adapters().iter().map(|(adapter, weight)| adapter.record(*weight)).collect();
    if let Some(other) = concept.metadata.other_weights(&engine.fingerprint()?, &engine.name(), &adapters) {
        warn(&format!("{} {other}; look at the pictures before you rely on it", path.display()));
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
    /// Show the content of concept files
    Show {
        /// Concept files
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Print JSON: a list with one object per file
        #[arg(long)]
        json: bool,
    },
    /// Find the weight and the steps in which concepts balance best while pictures still show what the prompt says, by
    /// making and judging pictures; writes the concepts with what was found, which `sample` and `eval` then use
    Calibrate(Box<calibrate::Args>),
    /// Write a model card in Markdown: training, measured effects, limits
    Card {
        /// Concept file
        file: PathBuf,
        /// Folder of `eval fairness` with this concept, whose results the card states; repeat for more
        #[arg(long = "report", value_name = "FOLDER")]
        reports: Vec<PathBuf>,
        /// File to write [default: print it]
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Import a concept from a .pth file of the official code or from SDisc's matrix; no code in the file is run
    Import {
        /// The file
        file: PathBuf,
        /// Checkpoint folder, single file or Hugging Face model id on which it was trained [default: the demo]
        #[arg(long)]
        model: Option<String>,
        /// Name of the concept, such as "a woman"
        #[arg(long)]
        concept: String,
        /// Column of the concept, if its name is not one of those known for the file
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
        /// Number format to write: f16 or f32
        #[arg(long)]
        dtype: NumberFormat,
        /// Concept file to write
        #[arg(long)]
        out: PathBuf,
    },
    /// Add concepts up to one, each multiplied by its weight, 1 by default; what `calibrate` found for them is left out
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
        Command::Show { files, json: false } => files.iter().try_for_each(|file| show(file)),
        Command::Show { files, json: true } => {
            let all = files.iter().map(|file| summary(file)).collect::<Result<Vec<_>>>()?;
            say(&format!("{:#}", serde_json::Value::Array(all)));
            Ok(())
        }
        Command::Calibrate(args) => calibrate::run(args),
        Command::Card { file, reports, out } => {
            let text = card(file, reports)?;
            match out {
                Some(path) => {
                    crate::files::check_not_input(path, &[file])?;
                    crate::files::write(path, text.as_bytes())?;
                    say(&path.display().to_string());
                }
                None => say(text.trim_end()),
            }
            Ok(())
        }
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
            Concept::open(file)?.save_as(out, *dtype)?;
            say(&out.display().to_string());
            Ok(())
        }
        Command::Merge { files, out } => {
            check_writable(out)?;
            let parts = files
                .iter()
                .map(|text| file_and_weight(text).and_then(|(file, w)| Ok((Concept::open(file)?, w.unwrap_or(1.0)))))
                .collect::<Result<Vec<_>>>()?;
            Concept::merge(&parts)?.save(out)?;
            say(&out.display().to_string());
            Ok(())
        }
    }
}

/// A concept's fields as JSON.
fn summary(path: &Path) -> Result<serde_json::Value> {
    let concept = Concept::open(path)?;
    let (metadata, shape) = (&concept.metadata, concept.shape());
    let norm = |module: &Module| module.parameters.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    Ok(serde_json::json!({
        "file": path.display().to_string(), "concept": metadata.concept, "kind": metadata.kind.name(),
        "neutral": metadata.neutral, "base_model": metadata.base_model, "base_fingerprint": metadata.fingerprint,
        "adapters": metadata.adapters,
        "fingerprint": concept.fingerprint(), "form": format!("{:?}", concept.ram.form()).to_lowercase(),
        "bottleneck": [shape.c, shape.h, shape.w],
        "ram_norm": norm(&concept.ram), "sam_norm": concept.sam.as_ref().map(norm),
        "iterations": metadata.iterations, "losses": metadata.losses, "calibration": metadata.calibration,
        "recipe": metadata.recipe, "other": metadata.other,
    }))
}

fn show(path: &Path) -> Result<()> {
    let Concept { metadata, ram, sam } = Concept::open(path)?;
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
    for used in &metadata.adapters {
        row("changed by", format!("{}:{} ({})", used.name, used.weight, used.hash));
    }
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
        row("network", format!("{:?}, {} parameters per module", ram.form(), ram.parameters.len()));
    }
    if metadata.iterations > 0 {
        row("iterations", metadata.iterations.to_string());
    }
    if let Some([resp, sem]) = metadata.losses {
        row("losses", format!("L_resp {resp:.3e}, L_sem {sem:.3e} over the last tenth"));
    }
    if let Some(c) = metadata.calibration {
        let [plain, balanced] = c.deviation_ratio;
        let names = c.groups.iter().map(|group| group.join(", ")).collect::<Vec<_>>().join(" x ");
        row("calibrated", format!("weight {} at guidance {}", c.strength, c.guidance));
        row("", format!("deviation ratio {plain:.3} -> {balanced:.3}, {names}, {} pictures each", c.pictures));
        row("", format!("alignment {:.2} -> {:.2}", c.alignment[0], c.alignment[1]));
    }
    row("recipe", metadata.recipe.trim().replace('\n', ", "));
    for (name, value) in metadata.other {
        row(&name, value);
    }
    Ok(())
}
