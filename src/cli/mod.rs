//! The command line: parses, calls the library, prints. Exit codes: 0, 1 failure, 2 usage, 130 interrupted.

mod files;
mod info;
mod probe;
mod sample;

use crate::{Error, Result};
use clap::{Parser, Subcommand, ValueEnum};
use std::process::ExitCode;

/// Text to image with Stable Diffusion: fast, fair and safe.
#[derive(Parser)]
#[command(name = "respodiff", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make pictures of a prompt
    Sample(Box<sample::Args>),
    /// Run one component on tensors from a file, in diffusers' order (NCHW, fp32)
    Probe(probe::Args),
    /// Show a checkpoint's components, parameters and memory plan
    Info(info::Args),
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Device {
    /// The GPU if there is one, else the CPU
    Auto,
    /// The CPU
    Cpu,
    /// An NVIDIA GPU
    Cuda,
}

impl Device {
    fn check(self) -> Result<()> {
        match self {
            Device::Auto | Device::Cpu => Ok(()),
            Device::Cuda => {
                Err(Error::Device("--device cuda: this build has no CUDA kernels yet; use --device cpu".into()))
            }
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Sample(args) => sample::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Info(args) => info::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain("error", &error.to_string());
            ExitCode::from(error.exit_code())
        }
    }
}

/// Warns on stderr.
fn warn(text: &str) {
    complain("warning", text);
}

fn complain(kind: &str, text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{kind}: {}", text.replace('\n', " "));
}

/// Prints a line to stdout; a reader that went away is no error.
fn say(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{line}");
}
