//! `respodiff eval`.

mod fairness;

use crate::Result;
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
        Command::Merge { folders, out } => fairness::merge(folders, out),
    }
}
