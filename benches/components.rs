//! Text encoder, UNet step and VAE decode: of the demo, and at Stable Diffusion 1.5's size on random weights.
//!
//! Then training: milliseconds of an iteration's parts, and memory.
//!
//! `cargo bench -- demo` or `cargo bench -- sd15`; the latter makes its weights in a temporary folder first (2 GB).
//! `cargo bench -- "demo training"` and `cargo bench -- "sd15 training"` for training alone.

use criterion::{Criterion, criterion_group, criterion_main};
use respodiff::graph::{Graph, WeightKind};
use respodiff::models::{ClipConfig, UNetConfig, VaeConfig, text_encoder, unet, vae_decoder};
use respodiff::plan::Plan;
use respodiff::respodiff::{Kind, Recipe, Task, Trainer, Variant};
use respodiff::{Engine, cpu, weights::Source};
use safetensors::{Dtype, tensor::TensorView};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const SD15_TEXT: &str = r#"{"architectures": ["CLIPTextModel"], "vocab_size": 49408, "hidden_size": 768,
  "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
  "hidden_act": "quick_gelu"}"#;
const SD15_UNET: &str = r#"{"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768,
  "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#;
const SD15_VAE: &str = r#"{"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512],
  "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
  "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
  "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]}"#;

/// fp16 numbers of small size for every weight of the graph, where the loader looks for them.
fn random_weights(folder: &Path, component: &str, config: &str, graph: &Graph) {
    let mut state = 1u32;
    let mut tensors = Vec::new();
    for spec in graph.weights() {
        for (name, &outputs) in spec.names.iter().zip(&spec.outputs) {
            let shape = match spec.kind {
                WeightKind::Vector => vec![outputs],
                WeightKind::Table => vec![outputs, spec.width],
                WeightKind::Matrix { kernel, inputs, .. } | WeightKind::Mirrored { kernel, inputs, .. } => {
                    vec![outputs, inputs, kernel, kernel]
                }
            };
            let scale = 1.0 / (spec.width as f32).sqrt();
            let bytes: Vec<u8> = (0..shape.iter().product::<usize>())
                .flat_map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    half::f16::from_f32(((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale).to_le_bytes()
                })
                .collect();
            tensors.push((name.clone(), shape, bytes));
        }
    }
    let views = tensors.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::F16, s.clone(), b).expect("fits")));
    let stem = if component == "text_encoder" { "model" } else { "diffusion_pytorch_model" };
    let folder = folder.join(component);
    std::fs::create_dir_all(&folder).expect("a temporary folder");
    std::fs::write(folder.join("config.json"), config).expect("room");
    let bytes = safetensors::serialize(views, None).expect("serialises");
    std::fs::write(folder.join(format!("{stem}.safetensors")), bytes).expect("room");
}

fn configs(source: &Source) -> (ClipConfig, UNetConfig, VaeConfig) {
    let read = |component: &str| {
        let file = format!("{component}/config.json");
        (source.read_text(&file).expect("config"), source.path(&file))
    };
    let ((text, a), (unet, b), (vae, c)) = (read("text_encoder"), read("unet"), read("vae"));
    let parsed = (ClipConfig::parse(&text, &a), UNetConfig::parse(&unet, &b), VaeConfig::parse(&vae, &c));
    (parsed.0.expect("text"), parsed.1.expect("unet"), parsed.2.expect("vae"))
}

/// A guided step of one image (UNet batch 2), its decode, and both prompts' encoding.
fn measure(c: &mut Criterion, name: &str, source: &Source) {
    let (text, unet_config, vae) = configs(source);
    let (h, w) = unet_config.sample_size.expect("a size");
    let mut group = c.benchmark_group(name);
    group.sample_size(10).measurement_time(Duration::from_secs(5)).warm_up_time(Duration::from_millis(500));
    let networks = [
        ("text_encoder", "text, 2 prompts", text_encoder(&text, 2)),
        ("unet", "unet, guided step", unet(&unet_config, 2, h, w, text.max_position_embeddings, 0)),
        ("vae", "vae decode", vae_decoder(&vae, 1, h, w)),
    ];
    for (component, label, graph) in networks {
        let plan = Plan::new(graph, &["encoder_hidden_states"], &cpu::Fp32);
        println!("{name} {component}: arena {:.1} MiB", plan.arena_bytes() as f64 / (1 << 20) as f64);
        let tensors = source.tensors(component).expect("weights");
        let weights = cpu::Weights::load(plan.graph().weights(), &tensors).expect("weights");
        let mut executor = cpu::Executor::new(Arc::new(plan), weights);
        if component == "unet" {
            executor.input_mut("sample").iter_mut().enumerate().for_each(|(i, x)| *x = (i as f32 * 0.7).sin());
            executor.input_mut("timestep").fill(500.0);
            executor.input_mut("encoder_hidden_states").iter_mut().enumerate().for_each(|(i, x)| *x = (i as f32).cos());
        }
        executor.prologue();
        group.bench_function(label, |b| b.iter(|| executor.step()));
    }
}

/// A few iterations of a training, timed by the trainer itself. The rollout of an iteration depends on the recipe, so what
/// is told of it is one step.
fn train(name: &str, source: &Source, batch: usize, rollouts: usize) {
    let recipe = Recipe {
        batch,
        rollout_steps: 5,
        latents_per_rollout: 2,
        ..Recipe::default_for(Kind::Fair, "a woman", Variant::Constant)
    };
    let task = Task { kind: Kind::Fair, concept: "a woman".into(), neutral: "a person".into() };
    let engine = Engine::open(source, &respodiff::Device::Cpu).expect("a checkpoint");
    let mut trainer = Trainer::new(&engine, task, recipe, 1, engine.default_size()).expect("a training");
    for _ in 0..2 * rollouts {
        trainer.iterate().expect("finite losses");
    }
    let each = |time: Duration, count: usize| 1e3 * time.as_secs_f64() / count as f64;
    let (times, iterations) = (&trainer.times, 2 * rollouts);
    println!(
        "{name} training, batch {batch}: a rollout step {:.1} ms; an iteration's target {:.1} ms, L_resp {:.1} ms, L_sem {:.1} ms; {}",
        each(times.rollout, times.rollout_steps),
        each(times.target, iterations),
        each(times.predictions, iterations),
        each(times.backward, iterations),
        trainer.memory()
    );
}

/// Whether the command line's filter leaves a name in.
fn wanted(name: &str) -> bool {
    std::env::args().skip(1).filter(|a| !a.starts_with('-')).all(|filter| name.contains(&filter))
}

fn demo(c: &mut Criterion) {
    measure(c, "demo", &Source::demo());
    if wanted("demo training") {
        train("demo", &Source::demo(), 8, 10);
    }
}

fn sd15(c: &mut Criterion) {
    // Two gigabytes are not written for a filter that leaves this out.
    if std::env::args().any(|a| a == "demo") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    for file in ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"] {
        copy(&format!("tokenizer/{file}"), folder.path());
    }
    copy("scheduler/scheduler_config.json", folder.path());
    let path = Path::new("config.json");
    let text = ClipConfig::parse(SD15_TEXT, path).expect("config");
    random_weights(folder.path(), "text_encoder", SD15_TEXT, &text_encoder(&text, 1));
    let unet_config = UNetConfig::parse(SD15_UNET, path).expect("config");
    random_weights(folder.path(), "unet", SD15_UNET, &unet(&unet_config, 1, 8, 8, 77, 0));
    let vae = VaeConfig::parse(SD15_VAE, path).expect("config");
    random_weights(folder.path(), "vae", SD15_VAE, &vae_decoder(&vae, 1, 8, 8));
    let source = Source::folder(folder.path()).expect("a checkpoint");
    measure(c, "sd15", &source);
    if wanted("sd15 training") {
        train("sd15", &source, 1, 1);
    }
}

/// A file of the demo's for a checkpoint that has none of its own.
fn copy(file: &str, folder: &Path) {
    let path = folder.join(file);
    std::fs::create_dir_all(path.parent().expect("a component")).expect("room");
    std::fs::write(path, Source::demo().read_text(file).expect("the demo's")).expect("room");
}

criterion_group!(benches, demo, sd15);
criterion_main!(benches);
