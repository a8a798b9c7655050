//! The command line: it parses arguments, calls the library and prints results. The exit code is 0 for success, 1 for a
//! failure, 2 for wrong usage and 130 for an interrupt.

mod adapters;
mod bench;
mod card;
mod concepts;
mod convert;
mod doctor;
mod eval;
mod files;
mod hashes;
mod hires;
mod info;
mod init_image;
mod model;
mod out;
mod parts;
mod probe;
mod progress;
mod prompts;
mod rerun;
mod sample;
mod sampler;
mod serve;
mod sign;
mod text;
mod train;

use crate::device::Place;
use crate::{Device, Error, ErrorKind, Result, Subject, cuda};
use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};
use std::time::Instant;

/// Text to image with Stable Diffusion: fast, fair and safe.
#[derive(Parser)]
#[command(name = "respodiff", version)]
struct Cli {
    /// Number of CPU threads [default: RAYON_NUM_THREADS, or as many as this process may run at once]
    #[arg(long, global = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Print only results, warnings and errors: no progress, no times, no tips
    #[arg(long, short, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Generate pictures from a prompt
    Sample(Box<sample::Args>),
    /// Generate a picture again from the record in its PNG file
    Rerun(rerun::Args),
    /// Serve pictures over HTTP, in OpenAI's dialect and that of A1111's front-ends
    Serve(serve::Args),
    /// Train a concept: the modules RAM and SAM at the UNet's bottleneck
    Train(Box<train::Args>),
    /// Measure fairness, safety, or the quality of pictures
    Eval(eval::Args),
    /// Find out how far a model's pictures are from showing groups of people equally, and print the commands that mend
    /// it
    Audit(Box<eval::audit::Args>),
    /// Show, calibrate, describe, convert, merge or import concept files
    Concept(concepts::Args),
    /// Write a checkpoint anew: as a diffusers folder or as one file, in another number format, with parts from
    /// elsewhere
    Convert(convert::Args),
    /// Run one component on tensors from a file, in the layout of diffusers (NCHW, fp32)
    Probe(probe::Args),
    /// Show a checkpoint's components, parameters and memory plan
    Info(info::Args),
    /// Report the capabilities of this machine and of this build
    Doctor(doctor::Args),
    /// Time every operation of a model's networks at its real shape
    Bench(bench::Args),
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page of the program or of one of its commands, in troff
    Man {
        /// The command, such as `sample` or `concept show` [default: the program]
        command: Vec<String>,
    },
}

impl Place {
    /// Opens the device, and says so if a GPU that is there is not used.
    fn open(self) -> Result<Device> {
        let wanted = self.device();
        // A user who has a GPU expects it to be used, so the use of the CPU is announced, except in a build without
        // kernels, which was made for the CPU.
        let usable = || cuda::cards().is_ok_and(|(_, cards)| cards.iter().any(cuda::Card::usable));
        if self == Place::Auto
            && wanted.as_ref().is_ok_and(Device::is_cpu)
            && !cuda::compiled::FAMILIES.is_empty()
            && usable()
            && let Err(problem) = Device::cuda(None)
        {
            warn(&format!("using the CPU instead of the GPU: {problem}"));
        }
        wanted
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let started = Instant::now();
    let Cli { threads, quiet, command } = Cli::parse();
    progress::set_quiet(quiet);
    // With less than this, not even an error could be reported, since the standard library aborts a process whose
    // allocations fail.
    const LEAST: usize = 16 << 20;
    if let Some(free) = crate::memory::free().filter(|free| *free < LEAST) {
        complain(
            "error",
            &format!("only {} MiB of memory are free; raise the limit (ulimit -v, or a container's)", free >> 20),
        );
        return ExitCode::FAILURE;
    }
    if let Some(threads) = threads {
        // No code has used rayon yet, so its pool can still be configured. If the threads cannot start, this reports
        // it, while rayon would panic later.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global();
        if let Err(problem) = pool {
            complain("error", &format!("cannot start {threads} threads: {problem}"));
            return ExitCode::FAILURE;
        }
    }
    let result = match command {
        Command::Sample(args) => sample::run(&args, started),
        Command::Rerun(args) => rerun::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Audit(args) => eval::audit::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Concept(args) => concepts::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "respodiff", &mut script);
            say(String::from_utf8_lossy(&script).trim_end());
            Ok(())
        }
        Command::Man { command } => man(&command).map(|page| say(page.trim_end())),
    };
    match result {
        Ok(()) => match UNPRINTED.get() {
            None => ExitCode::SUCCESS,
            Some(problem) => {
                complain("error", &format!("cannot print: {problem}"));
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            let kind = if error.kind() == ErrorKind::Cancelled { "interrupted" } else { "error" };
            complain(kind, &message(&error));
            ExitCode::from(exit_code(error.kind()))
        }
    }
}

/// The manual page of the command to which `names` lead, such as `concept` and `show`.
fn man(names: &[String]) -> Result<String> {
    let mut program = Cli::command().disable_help_subcommand(true);
    // Gives commands the names that their pages have, such as respodiff-sample.
    program.build();
    let mut command = &program;
    for name in names {
        command = command.find_subcommand(name).ok_or_else(|| {
            let known: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
            let advice = match known.is_empty() {
                true => "leave it out".into(),
                false => format!("name one of {}", known.join(", ")),
            };
            Error::invalid("command", format!("there is no command `{name}` here")).advise(advice)
        })?;
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page).map_err(Error::io("write", "the page"))?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

/// The exit code of a failure: 2 for values that can never work, 130 for an interrupt, as in shells, and otherwise 1.
fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Invalid => 2,
        ErrorKind::Cancelled => 130,
        _ => 1,
    }
}

/// The one-line message of an error, which calls the fields of requests and recipes by the names of their flags.
fn message(error: &Error) -> String {
    let Subject::Field(field) = error.subject() else {
        return error.to_string().replace("`vae_tile`", "--vae-tile");
    };
    let flag = match *field {
        "prompt" => "the prompt".into(),
        "command" => "man".into(),
        flag if flag.starts_with("--") => flag.into(),
        "sampler" => "--scheduler".into(),
        "concepts" => "--concept".into(),
        "adapters" => "--lora".into(),
        "init" | "target_guidance" | "rollout_guidance" | "rollout_steps" | "timestep_offset" | "recipe" => {
            format!("--recipe: {field}")
        }
        _ => format!("--{}", field.replace('_', "-")),
    };
    let advice = error.advice().map_or(String::new(), |advice| format!("; {advice}"));
    format!("{flag}: {}{advice}", error.problem())
}

/// The flag that Ctrl-C and SIGTERM raise; a second Ctrl-C ends the process at once.
fn interrupt_flag() -> &'static AtomicBool {
    static RAISED: AtomicBool = AtomicBool::new(false);
    static HANDLER: Once = Once::new();
    // If the handler is refused, a signal ends the run by the system's default action.
    HANDLER.call_once(|| {
        let _ = ctrlc::set_handler(|| {
            if RAISED.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        });
    });
    &RAISED
}

/// Prints a warning to stderr.
fn warn(text: &str) {
    complain("warning", text);
}

fn complain(kind: &str, text: &str) {
    note(&format!("{kind}: {}", text.replace('\n', " ")));
}

/// Prints a line to stderr.
fn note(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{}", printable(line));
}

/// Prints a line with times, memory or tips to stderr, unless the user asked for quiet.
fn tell(line: &str) {
    if !progress::is_quiet() {
        note(line);
    }
}

/// The text without characters that a terminal obeys: names in files of others may hold some.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// The first line that could not be printed.
static UNPRINTED: OnceLock<std::io::Error> = OnceLock::new();

/// Prints a line to stdout. If the reader has closed the pipe, this is no error; any other problem is reported as one
/// after all work is done.
fn say(line: &str) {
    use std::io::Write;
    if let Err(problem) = writeln!(std::io::stdout(), "{}", printable(line))
        && problem.kind() != std::io::ErrorKind::BrokenPipe
    {
        let _ = UNPRINTED.set(problem);
    }
}
