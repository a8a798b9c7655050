//! Losses, gradients and short trainings compared with PyTorch autograd in float64 (`tests/golden/gradients.py`).

mod support;

use respodiff::backend::Precision;
use respodiff::bench::{SDXL, networks};
use respodiff::concept::{Form, Module};
use respodiff::engine::UNET_CONSTANTS;
use respodiff::graph::{Keep, Shape};
use respodiff::models::{UNetConfig, UNetInput, unet, unet_halves};
use respodiff::train::{Adam, Halves, Objective};
use respodiff::weights::{Source, Tensors};
use respodiff::{Device, Size};
use support::{Case, cases, nchw_to_nhwc, nhwc_to_nchw, relative_l2};

/// The largest relative error of fp32. Ours is off from float64 by up to 7e-5, and PyTorch's own fp32 by up to 4e-5.
/// With smaller bottlenecks, whose norms are over a few numbers, both lose another digit.
const TOLERANCE: f64 = 1e-4;

fn source(case: &Case) -> Source {
    let name = case.name.split('_').nth(1).expect("kind_checkpoint");
    Source::folder(support::golden().join("checkpoints").join(name)).expect("golden checkpoint")
}

fn config(source: &Source) -> UNetConfig {
    UNetConfig::parse(&source.read_text("unet/config.json").unwrap(), &source.path("unet/config.json")).unwrap()
}

/// Passes a case's latents through the down half of the UNet; `suffix` selects the step of a training.
fn descend(case: &Case, halves: &mut Halves, suffix: &str) {
    let name = |n: &str| format!("{n}{suffix}");
    let shape = case.shape(&name("latents"));
    let states = case.floats(&name("neutral_embeds")).repeat(shape[0]);
    let extra = |n: &str| if case.has(&name(n)) { case.floats(&name(n)) } else { vec![] };
    let (embeds, ids) = (extra("text_embeds"), extra("time_ids"));
    halves.condition(&[("encoder_hidden_states", states), ("text_embeds", embeds), ("time_ids", ids)]).unwrap();
    let latents = nchw_to_nhwc(&case.floats(&name("latents")), shape[0], shape[1]);
    halves.descend(&latents, case.floats(&name("timestep"))[0]).unwrap();
}

fn halves(device: &Device, case: &Case, suffix: &str, keep: Keep) -> Halves {
    let source = source(case);
    let shape = case.shape(&format!("latents{suffix}"));
    let tokens = case.shape(&format!("neutral_embeds{suffix}"))[1];
    let input = UNetInput { rows: shape[0], h: shape[2], w: shape[3], tokens, shifted: 0 };
    Halves::new(device, &config(&source), &source.tensors("unet").unwrap(), &[], input, Some(keep)).unwrap()
}

fn constant(case: &Case, name: &str, shape: Shape) -> Module {
    Module::with_parameters(Form::Constant, shape, nchw_to_nhwc(&case.floats(name), 1, shape.c)).expect("its size")
}

/// Losses and gradients of a case: those of `L_resp` with respect to RAM, and of `lambda L_sem` with respect to SAM.
fn slopes(device: &Device, case: &Case, keep: Keep) -> ([f64; 2], [Vec<f32>; 2]) {
    let mut halves = halves(device, case, "", keep);
    descend(case, &mut halves, "");
    let shape = halves.mid_shape();
    let module = |name: &str| constant(case, name, shape);
    let (ram, sam) = (module("ram"), module("sam"));
    let target = nchw_to_nhwc(&case.floats("target"), case.shape("target")[0], 4);
    let lambda: f64 = case.metadata()["lambda"].parse().unwrap();

    let mut objective = Objective::new(&mut halves);
    let resp = objective.match_score(&[&ram], &target, 1.0).unwrap();
    let neutral = objective.predict(&[]).unwrap();
    let sem = objective.match_score(&[&ram, &sam], &neutral, lambda).unwrap();
    let gradients = [ram.gradient(objective.mid(), &resp.by_shift), sam.gradient(objective.mid(), &sem.by_shift)];
    ([resp.loss, sem.loss], gradients.map(|g| nhwc_to_nchw(&g, 1, shape.c)))
}

#[test]
fn gradients_of_both_losses() {
    for case in &cases("gradient_", 4) {
        let (losses, gradients) = slopes(&Device::cpu(), case, Keep::All);
        assert!(
            (losses, gradients.clone()) == slopes(&Device::cpu(), case, Keep::Sums),
            "{}: recomputed activations change the result",
            case.name
        );
        for (name, ours) in ["resp", "sem"].into_iter().zip(losses) {
            let truth = case.floats(&format!("out.loss_{name}"))[0] as f64;
            assert!((ours - truth).abs() < TOLERANCE * truth, "{}: loss_{name} {ours} for {truth}", case.name);
        }
        for (name, ours) in ["ram", "sam"].into_iter().zip(gradients) {
            let error = relative_l2(&ours, &case.floats(&format!("out.grad_{name}")));
            println!("{:20} grad_{name} {error:.1e}", case.name);
            assert!(error < TOLERANCE, "{}: grad_{name} is off by {error:.2e}", case.name);
        }
    }
}

/// Gradients in fp16. The backward pass through so many norms magnifies a rounding up to a thousandfold (see
/// [`TOLERANCE`]). From fp16's 5e-4, this leaves errors of a few hundredths, in PyTorch as well. A gradient may be off
/// by at most twice the worst error of PyTorch in nine nearby calls. The geometric mean of the ratios to PyTorch's
/// median errors may be at most 1.25. A loss is a square, so its relative error may be twice the 1e-2 that is promised
/// for a UNet call.
#[cfg(feature = "emulated")]
#[test]
fn gradients_on_the_kernels() {
    let mut logarithms = Vec::new();
    for (case, keep) in cases("gradient_", 4).iter().zip([Keep::All, Keep::Sums].into_iter().cycle()) {
        let (losses, gradients) = slopes(&support::kernels(), case, keep);
        for (name, ours) in ["resp", "sem"].into_iter().zip(losses) {
            let truth = case.floats(&format!("out.loss_{name}"))[0] as f64;
            println!("{:20} loss_{name} {:.1e}", case.name, ours / truth - 1.0);
            assert!((ours - truth).abs() < 2e-2 * truth, "{}: loss_{name} {ours} for {truth}", case.name);
        }
        for (name, ours) in ["ram", "sam"].into_iter().zip(gradients) {
            let error = relative_l2(&ours, &case.floats(&format!("out.grad_{name}")));
            let (median, worst) = support::half_errors(case, &format!("grad_{name}"));
            println!("{:20} grad_{name} {error:.1e}, PyTorch {median:.1e}, {worst:.1e}", case.name);
            assert!(error < 2.0 * worst, "{}: grad_{name} is off by {error:.2e}, PyTorch by {worst:.2e}", case.name);
            logarithms.push((error / median).ln());
        }
    }
    let mean = (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp();
    assert!(mean <= 1.25, "errors are {mean:.2} of PyTorch's in fp16");
}

#[test]
fn trajectories_of_adam() {
    for case in cases("training_", 4) {
        let mut halves = halves(&Device::cpu(), &case, ".0", Keep::All);
        let metadata = case.metadata();
        let lambda: f64 = metadata["lambda"].parse().unwrap();
        let rates: std::collections::HashMap<String, f64> = serde_json::from_str(&metadata["rates"]).unwrap();
        let shape = halves.mid_shape();
        let (mut ram, mut sam) = (constant(&case, "ram", shape), constant(&case, "sam", shape));
        let len = ram.parameters.len();
        let (mut adam_ram, mut adam_sam) = (Adam::new(len), Adam::new(len));
        for step in 0..metadata["steps"].parse::<usize>().unwrap() {
            descend(&case, &mut halves, &format!(".{step}"));
            let target = case.floats(&format!("target.{step}"));
            let target = nchw_to_nhwc(&target, case.shape("target.0")[0], 4);
            let mut objective = Objective::new(&mut halves);
            let resp = objective.match_score(&[&ram], &target, 1.0).unwrap();
            let ram_gradient = ram.gradient(objective.mid(), &resp.by_shift);
            adam_ram.step(&mut ram.parameters, &ram_gradient, rates["ram"]);
            let neutral = objective.predict(&[]).unwrap();
            let sem = objective.match_score(&[&ram, &sam], &neutral, lambda).unwrap();
            let sam_gradient = sam.gradient(objective.mid(), &sem.by_shift);
            adam_sam.step(&mut sam.parameters, &sam_gradient, rates["sam"]);
            let losses = case.floats(&format!("out.losses.{step}"));
            for (ours, truth) in [resp.loss, sem.loss].into_iter().zip(losses) {
                assert!((ours - truth as f64).abs() < 1e-3 * truth as f64, "{} step {step}: {ours} {truth}", case.name);
            }
        }
        for (name, ours) in [("ram", &ram), ("sam", &sam)] {
            // Errors are relative to the distance that the module moved.
            let moved = |to: &[f32]| -> Vec<f32> { to.iter().zip(case.floats(name)).map(|(a, b)| a - b).collect() };
            let ours = nhwc_to_nchw(&ours.parameters, 1, shape.c);
            let error = relative_l2(&moved(&ours), &moved(&case.floats(&format!("out.{name}"))));
            println!("{:20} {name} {error:.1e}", case.name);
            assert!(error < 1e-3, "{}: {name} is off by {error:.2e}", case.name);
        }
    }
}

/// Whole trainings: noise, rollouts, targets, both losses and both steps of Adam.
#[test]
fn trainers_do_what_the_paper_says() {
    use respodiff::{Engine, Recipe, Task, Trainer};
    for case in cases("trainer_", 3) {
        let metadata = case.metadata();
        let given: serde_json::Value = serde_json::from_str(&metadata["recipe"]).unwrap();
        let number = |name: &str| given[name].as_f64().unwrap_or_else(|| panic!("{name}"));
        let (concept, neutral) = (given["concept"].as_str().unwrap(), metadata["neutral"].as_str());
        let task = match given["kind"] == "fair" {
            true => Task::toward(concept, neutral),
            false => Task::away_from(concept, neutral),
        };
        let mut recipe = Recipe::for_task(&task);
        recipe.batch = number("batch") as usize;
        recipe.lr_ram = number("lr_ram");
        recipe.lr_sam = number("lr_sam");
        recipe.lambda = number("lambda");
        recipe.rollout_steps = number("rollout_steps") as usize;
        recipe.latents_per_rollout = number("latents_per_rollout") as usize;
        recipe.target_guidance = number("target_guidance") as f32;
        recipe.timestep_offset = number("timestep_offset") as f32;
        recipe.init = number("init") as f32;
        let folder = support::golden().join("checkpoints").join(&metadata["checkpoint"]);
        let engine = Engine::open(&Source::folder(folder).unwrap(), Device::cpu()).unwrap();
        let size = Size::new(metadata["width"].parse().unwrap(), metadata["height"].parse().unwrap());
        let mut trainer = Trainer::new(&engine, task, recipe, metadata["seed"].parse().unwrap(), size).unwrap();
        for (i, truth) in case.floats("out.losses").chunks(2).enumerate() {
            let losses = trainer.iterate().unwrap();
            for (ours, truth) in [losses.resp, losses.sem].into_iter().zip(truth) {
                let error = (ours / *truth as f64 - 1.0).abs();
                assert!(error < 1e-3, "{} iteration {i}: loss {ours} for {truth}", case.name);
            }
        }
        let concept = trainer.concept();
        for (name, ours) in [("ram", &concept.ram), ("sam", concept.sam.as_ref().unwrap())] {
            let moved = |to: &[f32]| -> Vec<f32> { to.iter().zip(case.floats(name)).map(|(a, b)| a - b).collect() };
            let ours = nhwc_to_nchw(&ours.parameters, 1, ours.shape().c);
            let error = relative_l2(&moved(&ours), &moved(&case.floats(&format!("out.{name}"))));
            println!("{:20} {name} {error:.1e}", case.name);
            assert!(error < 1e-3, "{}: {name} moved elsewhere by {error:.2e}", case.name);
        }
    }
}

/// SDXL at 1024x1024, batch 1: recomputing activations saves most of their memory, and in fp16 a GPU with 24 GB has
/// room for the whole training even if all activations are kept.
#[test]
fn memory_plans_of_sdxl() {
    let source = SDXL;
    let places = [
        Device::cpu(),
        #[cfg(feature = "emulated")]
        support::kernels(),
    ];
    for device in places {
        let none = device.weights(&[], &Tensors::random(), &[], Precision::Full).unwrap();
        let input = |rows, shifted| UNetInput { rows, h: 128, w: 128, tokens: 77, shifted };
        let of = |rows, keep| Halves::memory(&device, &config(&source), &none, input(rows, 0), keep);
        let (all, sums) = (of(1, Some(Keep::All)), of(1, Some(Keep::Sums)));
        println!("{}: {all:?}, {sums:?}", device.name());
        assert_eq!(all.weights, sums.weights);
        assert!(2 * sums.activations < all.activations, "{sums:?} of {all:?}");
        if !device.is_cpu() {
            let encoders = networks(&source, 1).unwrap().into_iter().filter(|(name, _)| *name != "unet");
            let beside: usize = encoders.map(|(_, graph)| 2 * graph.parameters()).sum();
            let pair = device.plan(unet(&config(&source), input(2, 1)), UNET_CONSTANTS).arena_bytes();
            println!("rollouts in {pair} bytes, in halves {}", of(2, None).activations);
            assert!(pair < of(2, None).activations);
            let bytes = all.weights + all.activations + pair + beside;
            assert!(bytes < 20_000_000_000, "{bytes} bytes leave too little of 24 GB");
            println!("{:.1} GB in all", bytes as f64 / 1e9);
        }
    }
}

/// The halves of a UNet share all weights with the whole network, except those that the backward half reads in another
/// arrangement.
#[test]
fn halves_share_weights() {
    let source = Source::folder(support::golden().join("checkpoints/sd1")).unwrap();
    let config = config(&source);
    let places = [
        Device::cpu(),
        #[cfg(feature = "emulated")]
        support::kernels(),
    ];
    for device in places {
        let input = UNetInput { tokens: 77, ..UNetInput::default() };
        let whole = unet(&config, input);
        let weights = device.weights(whole.weights(), &source.tensors("unet").unwrap(), &[], Precision::Full).unwrap();
        let added = |gradient| Halves::memory(&device, &config, &weights, input, gradient).weights;
        assert_eq!(added(None), 0);
        let both = added(Some(Keep::All));
        assert!(0 < both && both < weights.bytes(), "{both} bytes beside {}", weights.bytes());
        let halves = unet_halves(&config, input).1;
        let again =
            device.weights(halves.weights(), &source.tensors("unet").unwrap(), &[&weights], Precision::Full).unwrap();
        assert!(device.is_cpu() || again.bytes() == 0);
    }
}
