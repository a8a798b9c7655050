//! `respodiff bench`.

mod serve;

use super::{Place, model, say, warn};
use crate::backend::Precision;
use crate::bench::{Case, Peaks, SD15, SDXL, Table, measure, networks, peaks, training};
use crate::cuda::{Limits, Lowered, lowered, names};
use crate::engine::UNET_CONSTANTS;
use crate::files::check_writable;
use crate::graph::Graph;
use crate::pipeline::told;
use crate::weights::Source;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// sd15, sdxl, demo, or any checkpoint; weights are random, so only the checkpoint's configuration is needed
    #[arg(long, default_value = "sd15")]
    model: String,
    /// Images per batch; guidance doubles them in the UNet
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    batch: u16,
    /// Only operations whose line contains this text ("attention", "conv3x3", "2x64x64"), or those of the network of
    /// that name
    #[arg(long)]
    filter: Option<String>,
    /// Time the networks of training instead: the UNet's up half from the bottleneck, and the gradient back to it
    #[arg(long)]
    training: bool,
    /// Measure nothing; print the kernels that each operation gets on this card, which need not be present
    #[arg(long, value_enum, value_name = "CARD", conflicts_with_all = ["runs", "json", "compare", "device"])]
    plans: Option<Card>,
    /// Passes over each network [default: 20 on a GPU, 3 elsewhere]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    runs: Option<u16>,
    /// Also write the numbers to this file, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Compare with the --json file of an earlier run: each network, each family of operations, and the operations that
    /// lost the most time
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Device to compute on
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
    /// Number format of the networks' linear layers
    #[arg(long, default_value_t = Precision::Full, value_name = "full|bf16|int8")]
    precision: Precision,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Put a server under load: what it adds to a call of the library, its throughput, and its times at rates up to
    /// overload
    Serve(serve::Args),
}

/// One card for each of [`Limits::CARDS`], in their order.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Card {
    A100,
    #[value(name = "rtx-3090")]
    Rtx3090,
    #[value(name = "rtx-4090")]
    Rtx4090,
    H100,
    B200,
    #[value(name = "rtx-5090")]
    Rtx5090,
}

impl Card {
    fn limits(self) -> Limits {
        Limits::CARDS[self as usize]
    }
}

/// Prints a line for each operation: how often it occurs, its kernels with their grids and, on a card of compute
/// capability 9.0, the reason if it has none of that card's own kernels.
fn print_plans(network: &str, graph: &Graph, limits: Limits, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let (mut lines, mut launches) = (BTreeMap::<_, usize>::new(), [0; 2]);
    for Lowered { node, launches: of_node, in_prologue, reason } in lowered(graph, UNET_CONSTANTS, limits)? {
        let case = Case::of(graph, &node).to_string();
        if wanted(&case) {
            launches[usize::from(in_prologue)] += of_node.len();
            *lines.entry((case, names(&of_node), reason)).or_default() += 1;
        }
    }
    if lines.is_empty() {
        return Ok(());
    }
    say("");
    say(&format!("{network:44} {:>5}  kernels and their grids", "count"));
    for ((case, kernels, reason), count) in lines {
        let reason = reason.map_or(String::new(), |reason| format!("  ({reason})"));
        say(&format!("{case:44} {count:>5}  {kernels}{reason}"));
    }
    let [step, once] = launches;
    let once = if once > 0 { format!(", and {once} once per prompt") } else { String::new() };
    let plural = if step == 1 { "" } else { "es" };
    say(&format!("{:44} {step} launch{plural}{once}", "in all"));
    Ok(())
}

pub(super) fn run(args: &Args) -> Result<()> {
    if let Some(Command::Serve(args)) = &args.command {
        return serve::run(args);
    }
    if let Some(file) = &args.json {
        check_writable(file)?;
    }
    let source = match args.model.as_str() {
        "sd15" => SD15,
        "sdxl" => SDXL,
        "demo" => Source::demo(),
        other => model::source(Some(other))?,
    };
    let networks = match args.training {
        true => vec![training(&source, args.batch as usize)?],
        false => networks(&source, args.batch as usize)?,
    };
    let wanted =
        |network: &str, line: &str| args.filter.as_deref().is_none_or(|text| line.contains(text) || network == text);
    if let Some(card) = args.plans {
        for (network, graph) in &networks {
            print_plans(network, graph, card.limits(), |line| wanted(network, line))?;
        }
        return Ok(());
    }
    let device = args.device.open()?;
    let usual = match args.device {
        Place::Auto | Place::Cuda(_) if !device.is_cpu() => 20,
        _ => 3,
    };
    let runs = args.runs.map_or(usual, usize::from);
    let earlier = args.compare.as_deref().map(|file| Earlier::read(file, &device.name(), args)).transpose()?;
    let mut peaks = peaks(&device)?;
    say(&format!("device  {}", device.name()));
    let (flops, bytes) = rates(&peaks);
    say(&format!(
        "best    {flops} TFLOP/s in matrix products, {bytes} GB/s in copies, {:.2} us per launch in a step",
        peaks.launch * 1e6
    ));
    let mut tables = Vec::new();
    for (network, graph) in networks {
        let wanted = |case: &Case| wanted(network, &case.to_string());
        let table = measure(&device, network, graph, args.precision, runs, wanted)?;
        if !table.rows.is_empty() {
            let measured = rates(&peaks);
            peaks = peaks.with(&table);
            print(&table, &peaks);
            if rates(&peaks) != measured {
                // An operation was faster than the matrix products and copies that were measured: Winograd's algorithm
                // makes fewer multiplications than are counted, and small tensors stay in the caches.
                let (flops, bytes) = rates(&peaks);
                say(&format!("{:44} {flops} TFLOP/s, {bytes} GB/s, with this network's operations", "best"));
            }
            if let Some(earlier) = &earlier {
                earlier.print(&table);
            }
            tables.push(table);
            if let Some(file) = &args.json {
                // The file is written after every network, so that little is lost if the run is stopped.
                let report = serde_json::json!({
                    "version": env!("CARGO_PKG_VERSION"), "device": device.name(), "model": args.model,
                    "batch": args.batch, "precision": told(args.precision),
                    "runs": runs, "peaks": peaks, "networks": tables,
                });
                crate::files::write(file, format!("{report:#}\n").as_bytes())?;
            }
        }
    }
    if tables.is_empty() {
        let filter = args.filter.as_deref().unwrap_or_default();
        return Err(Error::invalid("filter", format!("no operation of {} has `{filter}` in its line", args.model))
            .advise("leave it out to see all of them"));
    }
    if let Some(file) = &args.json {
        say(&file.display().to_string());
    }
    Ok(())
}

/// The best rates, in TFLOP/s and GB/s.
fn rates(peaks: &Peaks) -> (String, String) {
    (format!("{:.3}", peaks.flops / 1e12), format!("{:.1}", peaks.bytes / 1e9))
}

fn print(table: &Table, peaks: &Peaks) {
    say("");
    say(&format!(
        "{:44} {:>5} {:>9} {:>9} {:>9} {:>9} {:>8} {:>7} {:>6}",
        table.network, "count", "min us", "median us", "p90 us", "warm us", "TFLOP/s", "GB/s", "% best"
    ));
    for row in &table.rows {
        let rate = |work: f64, unit: f64, digits: usize| match work > 0.0 {
            true => format!("{:.digits$}", work / row.seconds / unit),
            false => "-".into(),
        };
        say(&format!(
            "{:44} {:>5} {:>9.1} {:>9.1} {:>9.1} {:>9} {:>8} {:>7} {:>6.1}",
            row.label,
            row.count,
            row.least * 1e6,
            row.seconds * 1e6,
            row.p90 * 1e6,
            row.warm.map_or("-".into(), |seconds| format!("{:.1}", seconds * 1e6)),
            rate(row.flops, 1e12, 2),
            rate(row.bytes, 1e9, 1),
            100.0 * row.of_bound(peaks)
        ));
    }
    let (total, step) = (table.total() * 1e3, table.step * 1e3);
    say(&format!("{:44} {total:.3} ms one by one, {step:.3} ms per step in one piece", "in all"));
}

/// Medians of an earlier run, in seconds.
struct Earlier {
    /// The time of an operation, by network and label.
    operations: BTreeMap<(String, String), f64>,
    /// The time of a step in one piece, by network.
    steps: BTreeMap<String, f64>,
}

/// The number of operations to print, of those that lost the most time.
const WORST: usize = 5;

impl Earlier {
    /// Reads a report, and warns if the device, the model, the precision or the batch of this run is another.
    fn read(path: &Path, device: &str, args: &Args) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let all: Report = serde_json::from_str(&text).map_err(|problem| {
            Error::damaged(path, format!("not a report of bench: {problem}")).advise("give a file that --json wrote")
        })?;
        let precision = told(args.precision);
        for (what, before, now) in [
            ("the device", Some(all.device.as_str()), Some(device)),
            ("the model", Some(all.model.as_str()), Some(args.model.as_str())),
            ("the precision", all.precision.as_deref(), precision.as_deref()),
        ] {
            if before != now {
                let [before, now] = [before, now].map(|value| value.unwrap_or("full"));
                warn(&format!("{what} of {} is {before}, and that of this run is {now}", path.display()));
            }
        }
        if all.batch != args.batch {
            warn(&format!("{} has a batch of {}, and this run has one of {}", path.display(), all.batch, args.batch));
        }
        let mut earlier = Earlier { operations: BTreeMap::new(), steps: BTreeMap::new() };
        for Network { network, rows, step } in all.networks {
            earlier.steps.insert(network.clone(), step);
            earlier.operations.extend(rows.into_iter().map(|row| ((network.clone(), row.label), row.seconds)));
        }
        Ok(earlier)
    }

    /// Prints the times of a network beside those of the earlier run: of its step, of each family of operations, and of
    /// the operations that lost the most time.
    fn print(&self, table: &Table) {
        say("");
        let title = format!("{} beside the earlier run", table.network);
        say(&format!("{title:44} {:>10} {:>10} {:>7}", "before ms", "now ms", "ratio"));
        let line = |name: &str, before: f64, now: f64| {
            say(&format!("{name:44} {:>10.3} {:>10.3} {:>7.3}", 1e3 * before, 1e3 * now, now / before));
        };
        if let Some(&step) = self.steps.get(&table.network) {
            line("a step in one piece", step, table.step);
        }
        let mut families: BTreeMap<&str, [f64; 2]> = BTreeMap::new();
        let mut operations = Vec::new();
        for row in &table.rows {
            let before = self.operations.get(&(table.network.clone(), row.label.clone()));
            if let Some(&before) = before.filter(|&&before| before > 0.0) {
                let [before, now] = [before, row.seconds].map(|seconds| seconds * row.count as f64);
                let sums = families.entry(row.case.family()).or_default();
                *sums = [sums[0] + before, sums[1] + now];
                operations.push((row.label.as_str(), before, now));
            }
        }
        let mut families: Vec<_> = families.into_iter().collect();
        families.sort_by(|(_, a), (_, b)| b[1].total_cmp(&a[1]));
        families.iter().for_each(|(family, [before, now])| line(&format!("all {family}"), *before, *now));
        operations.retain(|(_, before, now)| now > before);
        operations.sort_by(|(_, a, b), (_, c, d)| (d - c).total_cmp(&(b - a)));
        operations.iter().take(WORST).for_each(|(label, before, now)| line(label, *before, *now));
    }
}

/// The fields of a report that [`Earlier`] reads.
#[derive(serde::Deserialize)]
struct Report {
    device: String,
    model: String,
    batch: u16,
    precision: Option<String>,
    networks: Vec<Network>,
}

#[derive(serde::Deserialize)]
struct Network {
    network: String,
    rows: Vec<Operation>,
    step: f64,
}

#[derive(serde::Deserialize)]
struct Operation {
    label: String,
    seconds: f64,
}
