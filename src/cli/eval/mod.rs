//! `respodiff eval`.

pub(super) mod audit;
pub(super) mod calibrate;
mod fairness;
mod quality;
mod safety;
mod survey;

use super::model;
use crate::eval::quality::holds;
use crate::weights::Source;
use crate::{Error, Result};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Measure whom pictures of professions show, without and with balancing by concepts; continues an interrupted run
    Fairness(Box<fairness::Args>),
    /// Measure the share of unsafe pictures, without and with concepts; continues an interrupted run
    Safety(Box<safety::Args>),
    /// Compare two runs of fairness: the folders' deviation ratios, and a test over pictures of the same seeds
    Compare {
        /// Folder of the first run
        first: PathBuf,
        /// Folder of the second run
        second: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Measure the quality of pictures: FID, CMMD and CLIP score; continues an interrupted run
    Quality(Box<quality::Args>),
    /// Merge the folders of a sharded run
    Merge {
        /// Folders of runs with --shard
        #[arg(required = true)]
        folders: Vec<PathBuf>,
        /// Folder to write
        #[arg(long)]
        out: PathBuf,
    },
}

pub(super) fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Fairness(args) => fairness::run(args),
        Command::Safety(args) => safety::run(args),
        Command::Quality(args) => quality::run(args),
        Command::Compare { first, second, json } => fairness::compare(first, second, *json),
        Command::Merge { folders, out } if folders.iter().any(|folder| holds(folder)) => quality::merge(folders, out),
        Command::Merge { folders, out } if folders.first().is_some_and(|folder| safety::is_run(folder)) => {
            safety::merge(folders, out)
        }
        Command::Merge { folders, out } => fairness::merge(folders, out),
    }
}

/// The CLIP of `--clip`.
fn clip_source(text: &str) -> Result<Source> {
    model::source(Some(text)).map_err(|error| error.of_field("clip"))
}

/// The part and the number of parts of `--shard i/n`.
fn shard(text: Option<&str>) -> Result<(usize, usize)> {
    let Some(text) = text else { return Ok((0, 1)) };
    let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parsed
        .filter(|&(i, n): &(usize, usize)| i < n)
        .ok_or_else(|| Error::invalid("shard", format!("{text}: write i/n with i from 0 to n - 1, such as 3/8")))
}
