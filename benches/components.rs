//! Times on the CPU: the text encoders, a guided UNet step and the VAE decode, of the demo, and at the sizes of Stable
//! Diffusion 1.5 and SDXL on random weights; then training, in milliseconds of an iteration's parts, with its memory;
//! then loading a checkpoint, and exchanging an adapter.
//!
//! `cargo bench -- demo`, `cargo bench -- load`, `cargo bench -- adapters`, `cargo bench -- "sdxl training"`: networks
//! that a filter excludes are not built.

use criterion::{Criterion, criterion_group, criterion_main};
use half::f16;
use respodiff::Engine;
use respodiff::backend::{Executor, Precision};
use respodiff::bench::{SD15, SDXL, networks};
use respodiff::cpu::{CpuExecutor, CpuWeights, Fp32};
use respodiff::graph::{WeightKind, WeightSpec};
use respodiff::plan::Plan;
use respodiff::train::{Recipe, Task, Trainer};
use respodiff::weights::{Adapter, Source};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Times a guided step of one image (two CFG rows), its decode, and the encoding of both prompts.
fn measure(c: &mut Criterion, name: &str, source: &Source) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).measurement_time(Duration::from_secs(5)).warm_up_time(Duration::from_millis(500));
    for (component, graph) in networks(source, 1).expect("configurations") {
        if !wanted(&format!("{name}/{component}")) {
            continue;
        }
        let plan = Plan::new(graph, respodiff::engine::UNET_CONSTANTS, &Fp32);
        println!("{name} {component}: arena {:.1} MiB", plan.arena_bytes() as f64 / (1 << 20) as f64);
        let tensors = source.tensors(component).expect("weights");
        let weights = CpuWeights::load(plan.graph().weights(), &tensors, &[], Precision::Full).expect("weights");
        let plan = Arc::new(plan);
        let mut executor = CpuExecutor::new(plan.clone(), weights).expect("weights of this plan");
        if component == "unet" {
            let mut write = |name, number: &dyn Fn(f32) -> f32| {
                let length = plan.graph().shape(plan.graph().input(name)).len();
                let values: Vec<f32> = (0..length).map(|i| number(i as f32)).collect();
                executor.write(name, &values).expect("no index");
            };
            write("sample", &|i| (i * 0.7).sin());
            write("timestep", &|_| 500.0);
            write("encoder_hidden_states", &|i| i.cos());
        }
        executor.prologue().unwrap();
        group.bench_function(component, |b| b.iter(|| executor.step()));
    }
}

/// Runs a few iterations of a training, which the trainer times itself. The length of an iteration's rollout depends on
/// the recipe, so the report gives the time of one rollout step.
fn train(name: &str, source: &Source, batch: usize, rollouts: usize) {
    let task = Task::toward("a woman", "a person");
    let mut recipe = Recipe::for_task(&task);
    recipe.batch = batch;
    recipe.rollout_steps = 5;
    recipe.latents_per_rollout = 2;
    let engine = Engine::open(source, respodiff::Device::cpu()).expect("a checkpoint");
    let mut trainer = Trainer::new(&engine, task, recipe, 1, engine.default_size()).expect("a training");
    drop(engine);
    for _ in 0..2 * rollouts {
        trainer.iterate().expect("finite losses");
    }
    let each = |time: Duration, count: usize| 1e3 * time.as_secs_f64() / count as f64;
    let (times, iterations) = (&trainer.times, 2 * rollouts);
    println!(
        "{name} training, batch {batch}: a rollout step {:.1} ms; an iteration's target {:.1} ms, L_resp {:.1} ms, \
         L_sem {:.1} ms; {}",
        each(times.rollout, times.rollout_steps),
        each(times.target, iterations),
        each(times.predictions, iterations),
        each(times.backward, iterations),
        trainer.memory()
    );
}

/// Times the way from a checkpoint's files to packed weights, tokenizers included. Random weights are generated where
/// they are packed, so that no disk is measured.
fn load(c: &mut Criterion, name: &str, source: &Source) {
    let mut group = c.benchmark_group("load");
    group.sample_size(10).measurement_time(Duration::from_secs(5)).warm_up_time(Duration::from_millis(500));
    let open = || {
        let start = Instant::now();
        let engine = Engine::open(source, respodiff::Device::cpu()).expect("a checkpoint");
        let time = start.elapsed();
        // Only one network is in memory at a time. The time to free it does not count.
        drop(engine);
        time
    };
    group.bench_function(name, |b| b.iter_custom(|times| (0..times).map(|_| open()).sum()));
}

/// Times the way from an adapter's file (a LoRA of rank 16 for all linear layers of the transformers) to an engine with
/// the weights that it changes packed anew, and prints the size of both.
fn adapt(c: &mut Criterion, name: &str, source: &Source) {
    let mut file = Vec::new();
    for (component, graph) in networks(source, 1).expect("configurations") {
        let prefix = match component {
            "unet" => "lora_unet",
            "vae" => continue,
            _ => "lora_te",
        };
        let linear = |spec: &&WeightSpec| matches!(spec.kind, WeightKind::Matrix { kernel: 1, .. });
        for spec in graph.weights().iter().filter(linear) {
            for (tensor, &outputs) in spec.names.iter().zip(&spec.outputs) {
                if let Some(module) =
                    tensor.strip_suffix(".weight").filter(|n| n.contains("block") || n.contains("layers"))
                {
                    let module = format!("{prefix}_{}", module.replace('.', "_"));
                    file.push((format!("{module}.lora_up.weight"), vec![outputs, 16]));
                    file.push((format!("{module}.lora_down.weight"), vec![16, spec.width]));
                }
            }
        }
    }
    let halves = |len: usize| (0..len).flat_map(|i| f16::from_f32((i as f32).sin() / 64.0).to_le_bytes());
    let file = file.into_iter().map(|(name, shape)| (name, halves(shape.iter().product()).collect(), shape));
    let file: Vec<(String, Vec<u8>, Vec<usize>)> = file.collect();
    let views = file.iter().map(|(n, bytes, s)| (n, TensorView::new(Dtype::F16, s.clone(), bytes).expect("a tensor")));
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("lora.safetensors");
    std::fs::write(&path, safetensors::serialize(views, None).expect("a file")).expect("room on the disk");

    let engine = Engine::open(source, respodiff::Device::cpu()).expect("a checkpoint");
    let load = || Arc::new(Adapter::load(&path).expect("an adapter"));
    let (options, adapter) = (engine.options(), load());
    let adapted = engine.with_adapters(&[(adapter.clone(), 1.0)]).expect("an adapter of this model");
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    let [own, both] = [&engine, &adapted].map(|engine| mib(engine.memory(options).expect("sizes").weights));
    drop(adapted);
    println!("{name}: {} layers, {own:.0} MiB of weights, and {:.0} MiB that change", file.len() / 2, both - own);
    let mut group = c.benchmark_group("adapters");
    group.sample_size(10).measurement_time(Duration::from_secs(5)).warm_up_time(Duration::from_millis(500));
    group.bench_function(format!("{name} file"), |b| b.iter(load));
    group.bench_function(name, |b| {
        b.iter_custom(|times| {
            let adapt = || {
                let start = Instant::now();
                let adapted = engine.with_adapters(&[(adapter.clone(), 1.0)]).expect("an adapter of this model");
                let time = start.elapsed();
                drop(adapted);
                time
            };
            (0..times).map(|_| adapt()).sum()
        })
    });
}

/// True if the command line's filters include a name.
fn wanted(name: &str) -> bool {
    std::env::args().skip(1).filter(|a| !a.starts_with('-')).all(|filter| name.contains(&filter))
}

fn all(c: &mut Criterion) {
    for (name, source, batch, rollouts) in [("demo", Source::demo(), 8, 10), ("sd15", SD15, 1, 2), ("sdxl", SDXL, 1, 1)]
    {
        measure(c, name, &source);
        if wanted(&format!("{name} training")) {
            train(name, &source, batch, rollouts);
        }
    }
}

fn loads(c: &mut Criterion) {
    for (name, source) in [("demo", Source::demo()), ("sd15", SD15)] {
        if wanted(&format!("load/{name}")) {
            load(c, name, &source);
        }
        if wanted(&format!("adapters/{name}")) {
            adapt(c, name, &source);
        }
    }
}

criterion_group!(benches, all, loads);
criterion_main!(benches);
