//! Counts the instructions of the CPU executor's inner kernels with valgrind's callgrind and compares them with those
//! that `instructions.toml` has recorded. So a slower kernel is found even on a machine whose timings are too noisy.
//!
//! `NVCC= cargo bench --bench instructions` fails if a kernel takes over 3 % more than recorded.
//! Names after `--` choose kernels; `-- --record` writes the file. Every kernel is one operation of a small graph. It
//! runs in a process of its own under valgrind, on one thread, and is counted after it has run once.
//!
//! Counts depend on the compiler, which is recorded beside them, but hardly on the machine: valgrind presents a
//! processor with AVX2 and without AVX-512 wherever the real one has AVX2, and a program must take that path to be
//! counted. Instructions are not time: a count ignores caches and dependency chains, so improvements there are measured
//! with `components`.

use rayon::prelude::*;
use respodiff::backend::{Executor, Precision};
use respodiff::cpu::{CpuExecutor, CpuWeights, Fp32, isa};
use respodiff::graph::{Activation, ConvOptions, Extent, Graph, GraphBuilder, Keep, Shape, TensorId, View};
use respodiff::plan::Plan;
use respodiff::weights::Source;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::process::{Command, ExitCode};
use std::sync::Arc;

#[path = "../tests/support/mod.rs"]
mod support;

/// Relative change of a count, up or down, that is tolerated.
const TOLERANCE: f64 = 0.03;
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/instructions.toml");
const RECORD: &str = "cargo bench --bench instructions -- --record";

/// Content of the file.
#[derive(Default, Serialize, Deserialize)]
struct Recorded {
    /// The compiler of all counts.
    compiler: String,
    /// Instructions by kernel.
    counts: BTreeMap<String, u64>,
}

/// All kernels: their names, the formats of their weights in the checkpoint, and their graphs. If a graph has a
/// backward half, only that half is counted.
fn kernels() -> Vec<(&'static str, Dtype, Graph)> {
    let image = Shape::new(1, 16, 16, 64);
    let rows = |rows, width| Shape::new(1, 1, rows, width);
    let linear = |x, outputs, activation| {
        graph(x, |g, x| g.linear("a", x, outputs, ConvOptions { activation, ..ConvOptions::default() }))
    };
    let conv = |x, stride, resize| {
        graph(x, |g, x| g.conv("a", x, 64, ConvOptions { stride, resize, ..ConvOptions::conv3x3() }))
    };
    // Two heads of 40 channels and more keys than a block has; queries, keys and values are side by side.
    let attention = || {
        graph(rows(300, 240), |g, x| {
            let view = |offset| View { tensor: x, offset };
            g.attention("a", (view(0), view(80), view(160)), 2, 40, false)
        })
    };
    let group_norm = || graph(image, |g, x| g.group_norm("a", x, 32, 1e-5, true, None));
    let layer_norm = || graph(rows(96, 320), |g, x| g.layer_norm("a", x, 1e-5));
    let gradient = |graph: Graph| graph.with_gradient("y", "x", Keep::All);
    vec![
        // Nearly all instructions are the matrix kernel's.
        ("linear", Dtype::F32, linear(rows(96, 320), 320, Activation::None)),
        // Few inputs, so that the activation has weight in the count.
        ("geglu", Dtype::F32, linear(rows(96, 64), 512, Activation::Geglu)),
        // Few rows and columns, so that widening has weight in the count.
        ("fp16", Dtype::F16, linear(rows(12, 10240), 8, Activation::None)),
        ("convolution", Dtype::F32, conv(image, 2, None)),
        ("winograd", Dtype::F32, conv(image, 1, None)),
        ("winograd doubled", Dtype::F32, conv(image, 1, Some(Extent::square(32)))),
        ("attention", Dtype::F32, attention()),
        ("attention gradient", Dtype::F32, gradient(attention())),
        ("group norm", Dtype::F32, group_norm()),
        ("group norm gradient", Dtype::F32, gradient(group_norm())),
        ("layer norm", Dtype::F32, layer_norm()),
        ("layer norm gradient", Dtype::F32, gradient(layer_norm())),
    ]
}

/// A graph of one operation from the input `x` to the output `y`.
fn graph(shape: Shape, operation: impl FnOnce(&mut GraphBuilder, TensorId) -> TensorId) -> Graph {
    let mut g = GraphBuilder::new();
    let x = g.input("x", shape);
    let y = operation(&mut g, x);
    g.output("y", y);
    g.finish()
}

/// The part of the program that runs under valgrind.
fn run(wanted: &str) {
    assert_eq!(format!("{:?}", isa()), "Avx2", "counts are those of AVX2, which this machine lacks");
    // This thread is the only one of the pool, as valgrind turns counting on and off per thread.
    rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global().expect("the first pool");
    let (_, format, graph) = kernels().into_iter().find(|(name, ..)| *name == wanted).expect("a kernel's name");
    let (folder, _) = support::weights(&graph, format);
    let tensors = Source::folder(folder.path()).expect("a checkpoint").tensors("unet").expect("its weights");
    let plan = Arc::new(Plan::new(graph, &[], &Fp32));
    let weights =
        CpuWeights::load(plan.graph().weights(), &tensors, &[], Precision::Full).expect("weights of this graph");
    let mut executor = CpuExecutor::new(plan.clone(), weights).expect("memory");
    for (name, seed) in [("x", 1), ("d.y", 2)] {
        if let Some(input) = plan.graph().find_input(name) {
            let values = support::narrow(&support::random(plan.graph().shape(input).len(), seed));
            executor.write(name, &values).expect("no index");
        }
    }
    // The first run allocates scratch memory.
    executor.step().unwrap();
    executor.backward().unwrap();
    executor.step().unwrap();
    counted(&mut executor, plan.backward().next().is_some());
}

/// The only part that is counted. Valgrind finds it by its name.
#[inline(never)]
fn counted(executor: &mut CpuExecutor, reverse: bool) {
    let outcome = if reverse { executor.backward() } else { executor.step() };
    outcome.expect("the CPU does not fail");
}

/// Runs a kernel under valgrind, which prints at its end how many instructions it collected.
fn count(kernel: &str) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*instructions::counted*"])
        .arg(std::env::current_exe().expect("this program's path"))
        .args(["--run", kernel])
        .output()
        .unwrap_or_else(|problem| panic!("valgrind, which counts instructions, does not start: {problem}"));
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok());
    match collected {
        Some(count) if count > 0 && output.status.success() => count,
        _ => panic!("{kernel} was not counted:\n{said}"),
    }
}

/// The compiler's name and version.
fn compiler() -> String {
    let output = Command::new("rustc").arg("--version").output().expect("rustc, as it built this program");
    String::from_utf8_lossy(&output.stdout).trim().into()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, kernel] = &arguments[..]
        && flag == "--run"
    {
        run(kernel);
        return ExitCode::SUCCESS;
    }
    let record = arguments.iter().any(|argument| argument == "--record");
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let text = std::fs::read_to_string(FILE).expect("benches/instructions.toml");
    let recorded: Recorded = toml::from_str(&text).expect("what --record writes");
    let mut now = Recorded { compiler: compiler(), counts: BTreeMap::new() };
    let names: Vec<&str> = kernels().into_iter().map(|(name, ..)| name).filter(|name| record || wanted(name)).collect();
    let counts: Vec<u64> = names.par_iter().map(|name| count(name)).collect();
    let mut failed = false;
    for (name, count) in names.into_iter().zip(counts) {
        let change = recorded.counts.get(name).map(|&before| count as f64 / before as f64 - 1.0);
        now.counts.insert(name.into(), count);
        let verdict = match change {
            None => "not recorded",
            Some(change) if change > TOLERANCE => "more than recorded",
            Some(change) if change < -TOLERANCE => {
                "less than recorded: record the new count, so that later increases are found"
            }
            Some(_) => "",
        };
        failed |= change.is_none_or(|change| change > TOLERANCE);
        let percent = change.map_or(String::new(), |change| format!("{:+.1} %", 100.0 * change));
        println!("{name:<20} {count:>10} {percent:>8} {verdict}");
    }
    if record {
        let text = toml::to_string(&now).expect("numbers and names");
        std::fs::write(FILE, format!("# Written by `{RECORD}`.\n{text}")).expect("benches/instructions.toml");
    } else if failed {
        eprintln!("Kernels take more instructions than recorded, or have no record. If this is intended: {RECORD}");
        if now.compiler != recorded.compiler {
            eprintln!("They were recorded with {}, and this is {}.", recorded.compiler, now.compiler);
        }
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
