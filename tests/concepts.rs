//! Concepts in a session, and the files of concepts.

mod support;

use respodiff::concept::{Concept, Form, Kind, Metadata, Module, NumberFormat, Strength};
use respodiff::graph::Shape;
use respodiff::weights::Source;
use respodiff::{Device, Engine, Image, Output, Request, SessionOptions, Size};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

fn concept(form: Form, shape: Shape, seed: u32) -> Arc<Concept> {
    let metadata = Metadata::new(format!("number {seed}"));
    Arc::new(Concept::new(metadata, support::module(form, shape, seed), Some(support::module(form, shape, seed + 1))))
}

fn generate(engine: &Engine, options: SessionOptions, request: &Request) -> Output {
    engine.session(options).unwrap().generate(request, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn each_image_has_its_own_concepts() {
    for checkpoint in ["sd1", "sdxl"] {
        each_image_of(checkpoint);
    }
}

fn each_image_of(checkpoint: &str) {
    let source = Source::folder(support::golden().join("checkpoints").join(checkpoint)).unwrap();
    let engine = Engine::open(&source, Device::cpu()).unwrap();
    let options = SessionOptions::new(Size::new(40, 56)).batch(3).concepts(true);
    let shape = engine.bottleneck(options);
    let (a, b) = (concept(Form::Constant, shape, 1), concept(Form::Constant, shape, 2));
    let network = concept(Form::Conv, shape, 3);
    let lists = vec![vec![(a.clone(), 0.5), (b.clone(), -1.0)], vec![], vec![(b.clone(), 0.7), (network.clone(), 1.0)]];
    type List = Vec<(Arc<Concept>, f32)>;
    let request = |seed: u64, lists: Vec<List>| {
        let image = |(i, list): (usize, List)| {
            list.into_iter().fold(Image::new("a cat").seed(seed + i as u64), |image, (c, w)| image.concept(c, w))
        };
        Request::new(lists.into_iter().enumerate().map(image).collect()).steps(3)
    };
    let together = generate(&engine, options, &request(5, lists.clone()));
    let one = together.latents.len() / 3;
    let single = options.batch(1);
    let plain = single.concepts(false);
    for (i, list) in lists.iter().enumerate() {
        let seed = 5 + i as u64;
        let alone = generate(&engine, single, &request(seed, vec![list.clone()]));
        assert_eq!(alone.latents, together.latents[i * one..][..one], "image {i}");
        let without = generate(&engine, plain, &request(seed, vec![vec![]]));
        assert_eq!(alone.latents == without.latents, list.is_empty(), "image {i}");
        // Weights of zero change nothing, bit for bit.
        let zero = list.iter().map(|(c, _)| (c.clone(), 0.0)).collect();
        assert_eq!(generate(&engine, single, &request(seed, vec![zero])).latents, without.latents);
    }
    let mut session = engine.session(single).unwrap();
    // Until a timestep that is above all is never; until one below all is always. A network stops as a constant does.
    for list in [vec![(a.clone(), 1.0)], vec![(network.clone(), 0.5), (b.clone(), 1.0)]] {
        let latents = |list: List, until: f32| {
            let add = |image: Image, (c, w): (_, f32)| image.concept(c, Strength::from(w).until(until));
            let image = list.into_iter().fold(Image::new("a cat").seed(5), add);
            generate(&engine, single, &Request::from(image).steps(3)).latents
        };
        let [never, first, always] = [1000.0, 500.0, 0.0].map(|until| latents(list.clone(), until));
        assert_eq!(never, latents(vec![], 0.0));
        assert_eq!(always, latents(list.clone(), 0.5));
        assert!(first != never && first != always);
    }
    let mut refused = |concepts: Vec<List>, word: &str| {
        let error = session.generate(&request(0, concepts), &mut |_| ControlFlow::Continue(())).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    refused(vec![vec![], vec![]], "2 images");
    let mut cut = Concept::clone(&a);
    cut.ram.parameters.pop();
    refused(vec![vec![(Arc::new(cut), 1.0)]], "too few");
    let mut mixed = Concept::clone(&a);
    mixed.sam = Some(support::module(Form::Constant, Shape { c: 5, ..shape }, 4));
    refused(vec![vec![(Arc::new(mixed), 1.0)]], "a bottleneck of 5 channels");
    refused(vec![vec![(a, f32::NAN)]], "NaN");
    let other = concept(Form::Constant, Shape { c: 7, ..shape }, 4);
    refused(vec![vec![(other, 1.0)]], "trained on another model, is for a bottleneck of 7 channels");
}

/// One UNet call with every row shifted, compared with PyTorch in float64. The test of whole pipelines shows that only
/// the conditional rows are shifted.
#[test]
fn a_shifted_call_predicts_what_pytorch_does() {
    use respodiff::models::{UNetConfig, UNetInput, unet};
    for case in support::cases("gradient_", 4) {
        let name = case.name.split('_').nth(1).unwrap();
        let source = Source::folder(support::golden().join("checkpoints").join(name)).unwrap();
        let config =
            UNetConfig::parse(&source.read_text("unet/config.json").unwrap(), Path::new("config.json")).unwrap();
        let [n, c, h, w] = case.shape("latents")[..] else { panic!("NCHW") };
        let graph = unet(&config, UNetInput { rows: n, h, w, tokens: 77, shifted: n });
        let shape = graph.shape(graph.input("shift"));
        let ram = support::nchw_to_nhwc(&case.floats("ram"), 1, shape.c);
        let mut inputs = std::collections::HashMap::from([
            ("sample", support::nchw_to_nhwc(&case.floats("latents"), n, c)),
            ("timestep", vec![case.floats("timestep")[0]; n]),
            ("encoder_hidden_states", case.floats("neutral_embeds").repeat(n)),
            ("shift", ram.repeat(n)),
        ]);
        for extra in ["text_embeds", "time_ids"].into_iter().filter(|e| case.has(e)) {
            inputs.insert(extra, case.floats(extra));
        }
        let outputs = support::run(&Device::cpu(), graph, &source.tensors("unet").unwrap(), &inputs);
        // L_resp is the mean squared difference between this prediction and the target. PyTorch computed the true one
        // in float64.
        let target = support::nchw_to_nhwc(&case.floats("target"), n, c);
        let loss = outputs["sample"].iter().zip(&target).map(|(a, b)| ((a - b) as f64).powi(2)).sum::<f64>()
            / target.len() as f64;
        let truth = case.floats("out.loss_resp")[0] as f64;
        assert!((loss - truth).abs() < 1e-5 * truth, "{}: {loss} for {truth}", case.name);
    }
}

/// Pipelines whose middle block has a hook in diffusers (`tests/golden/concepts.py`), and their first UNet calls alone.
#[test]
fn pipelines_with_concepts_match_diffusers() {
    for case in support::cases("concepts_", 3) {
        pipeline_with_concepts(&case);
    }
}

fn pipeline_with_concepts(case: &support::Case) {
    use respodiff::diffusion::scheduler::SchedulerConfig;
    use respodiff::models::{UNetConfig, UNetInput, unet};
    let meta = case.metadata();
    let source = Source::folder(support::golden().join("checkpoints").join(&meta["checkpoint"])).unwrap();
    let scheduler = SchedulerConfig::parse(&meta["scheduler_config"], "recorded").unwrap();
    let engine = Engine::open(&source, Device::cpu()).unwrap().with_scheduler(scheduler);
    let size = |name: &str| meta[name].parse().unwrap();
    let options = SessionOptions::new(Size::new(size("width"), size("height"))).batch(2).concepts(true);
    let folder = tempfile::tempdir().unwrap();
    let load = |name: &str| {
        let part = |part: &str| {
            let tensor = format!("{part}.{name}");
            let numbers = case.floats(&tensor);
            (part.to_string(), Dtype::F32, case.shape(&tensor), bytemuck::cast_slice(&numbers).to_vec())
        };
        let path = folder.path().join(name);
        std::fs::write(&path, file(&[part("ram"), part("sam")], &[])).unwrap();
        Arc::new(Concept::load(path).unwrap())
    };
    let images: Vec<Vec<(String, f32)>> = serde_json::from_str(&meta["images"]).unwrap();
    let until: Vec<f32> = serde_json::from_str(&meta["until"]).unwrap();
    let concepts: Vec<Vec<_>> =
        images.iter().map(|image| image.iter().map(|(name, weight)| (load(name), *weight)).collect()).collect();
    let prompts: Vec<String> = serde_json::from_str(&meta["prompt"]).unwrap();
    let seed: u64 = meta["seed"].parse().unwrap();
    let image = |(i, list): (usize, &Vec<_>)| {
        let mut image = Image::new(prompts[0].as_str()).seed(seed + i as u64);
        image.guidance = Some(meta["guidance_scale"].parse().unwrap());
        let strength = |weight| Strength::from(weight).until(until[i]);
        image.concepts = list.iter().map(|(concept, weight)| (Arc::clone(concept), strength(*weight))).collect();
        image
    };
    let request = Request::new(concepts.iter().enumerate().map(image).collect())
        .steps(size("steps"))
        .sampler(meta["scheduler"].parse().unwrap());
    let error = support::relative_l2(&generate(&engine, options, &request).latents, &case.floats("out.latents"));
    println!("{}: latents {error:.1e}", case.name);
    assert!(error < 1e-4, "{}: latents are off by {error:.2e}", case.name);

    let config = UNetConfig::parse(&source.read_text("unet/config.json").unwrap(), Path::new("config.json")).unwrap();
    let [n, c, h, w] = case.shape("sample")[..] else { panic!("NCHW") };
    let tokens = case.shape("encoder_hidden_states")[1];
    let graph = unet(&config, UNetInput { rows: n, h, w, tokens, shifted: images.len() });
    let shape = engine.bottleneck(options);
    let mut shift = vec![0.0; images.len() * shape.len()];
    for (list, shift) in concepts.iter().zip(shift.chunks_exact_mut(shape.len())) {
        for (concept, weight) in list {
            concept.modules(shape).unwrap().iter().for_each(|module| module.add_to(&[], *weight, shift));
        }
    }
    let mut inputs = std::collections::HashMap::from([
        ("sample", support::nchw_to_nhwc(&case.floats("sample"), n, c)),
        ("timestep", vec![case.floats("timestep")[0]; n]),
        ("encoder_hidden_states", case.floats("encoder_hidden_states")),
        ("shift", shift),
    ]);
    for extra in ["text_embeds", "time_ids"].into_iter().filter(|e| case.has(e)) {
        inputs.insert(extra, case.floats(extra));
    }
    let ours = support::nhwc_to_nchw(
        &support::run(&Device::cpu(), graph, &source.tensors("unet").unwrap(), &inputs)["sample"],
        n,
        c,
    );
    let error = support::relative_l2(&ours, &case.floats("out.sample"));
    assert!(error < 1e-4, "{}: the UNet is off by {error:.2e}", case.name);
}

/// A safetensors file.
fn file(tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)], metadata: &[(&str, &str)]) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor")));
    let metadata = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    safetensors::serialize(views, Some(metadata)).unwrap()
}

#[test]
fn files_of_other_programs() {
    let tensor = |name: &str, shape: &[usize], numbers: &[f32]| {
        (name.to_string(), Dtype::F32, shape.to_vec(), bytemuck::cast_slice(numbers).to_vec())
    };
    let parse = |tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)], metadata: &[(&str, &str)]| {
        Concept::parse(&file(tensors, metadata), Path::new("folder/smile.safetensors"))
    };
    let numbers = [0.5f32, -1.0, 2.0, 0.25, 8.0, -0.125];
    let ram = || tensor("ram", &[3, 1, 2], &numbers);
    // Tensors alone are enough: [c, h, w] in fp16 or fp32. Such a concept is named after the file.
    let plain = parse(&[ram()], &[]).unwrap();
    assert_eq!((plain.metadata.concept.as_str(), plain.sam.is_none()), ("smile", true));
    assert_eq!(plain.ram.parameters, [0.5, 2.0, 8.0, -1.0, 0.25, -0.125]);
    let halves: Vec<u8> = numbers.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    let half = parse(&[("ram".into(), Dtype::F16, vec![3, 1, 2], halves)], &[]).unwrap();
    assert_eq!(half.ram.parameters, plain.ram.parameters);

    let refused = |tensors: &[_], metadata: &[(&str, &str)], word: &str| {
        let error = parse(tensors, metadata).expect_err(word).to_string();
        let whole = error.contains(word) && error.contains("smile.safetensors") && !error.contains('\n');
        assert!(whole, "`{word}` is not in: {error}");
    };
    let mut nan = numbers;
    nan[4] = f32::NAN;
    let mut infinite = numbers;
    infinite[0] = f32::INFINITY;
    refused(&[tensor("sam", &[3, 1, 2], &numbers)], &[], "no tensor `ram`");
    refused(&[tensor("ram", &[3, 2], &numbers)], &[], "[3, 2]");
    refused(&[tensor("ram", &[1, 3, 1, 2], &numbers)], &[], "[1, 3, 1, 2]");
    refused(&[tensor("ram", &[3, 0, 2], &[])], &[], "[3, 0, 2]");
    refused(&[ram(), tensor("sam", &[3, 2, 1], &numbers)], &[], "differ in shape");
    refused(&[tensor("ram", &[3, 1, 2], &nan)], &[], "NaN");
    refused(&[ram(), tensor("sam", &[3, 1, 2], &infinite)], &[], "inf");
    refused(&[("ram".into(), Dtype::I64, vec![1, 1, 1], vec![0; 8])], &[], "I64");
    refused(&[ram()], &[("format", "2")], "update respodiff");
    refused(&[ram()], &[("kind", "evil")], "evil");
    refused(&[ram()], &[("form", "spiral")], "spiral");
    refused(&[tensor("ram", &[6], &numbers)], &[("form", "mlp"), ("bottleneck", "[3,1,2]")], "6 numbers");
    refused(&[tensor("ram", &[6], &numbers)], &[("form", "mlp"), ("bottleneck", "[3,1")], "bottleneck");
}

#[test]
fn files_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.safetensors");
    for form in [Form::Constant, Form::Mlp, Form::Conv] {
        let shape = Shape::new(1, 2, 3, 5);
        let mut metadata = Metadata::new("violence, \"quoted\"");
        metadata.kind = Kind::Safe;
        metadata.neutral = "a scene".into();
        metadata.base_model = "m".into();
        metadata.fingerprint = "f00d".into();
        metadata.recipe = "lambda = 1.0\n".into();
        metadata.iterations = 7;
        metadata.losses = Some([0.25, 0.125]);
        metadata.other = [("author".to_string(), "someone".to_string())].into();
        let saved = Concept::new(
            metadata,
            support::module(form, shape, 1),
            (form != Form::Mlp).then(|| support::module(form, shape, 2)),
        );
        saved.save(&path).unwrap();
        let read = Concept::load(&path).unwrap();
        assert_eq!(read.metadata, saved.metadata);
        assert_eq!((read.ram.form(), read.ram.shape()), (form, shape));
        assert_eq!(read.ram.parameters, saved.ram.parameters);
        assert_eq!(read.sam.map(|s| s.parameters), saved.sam.as_ref().map(|s| s.parameters.clone()));
        // In fp16, every number becomes the nearest half, in half the bytes, and saving it again changes nothing.
        saved.save_as(&path, NumberFormat::F16).unwrap();
        let half = Concept::load(&path).unwrap();
        assert_eq!(half.metadata, saved.metadata);
        let nearest = |m: &Module| m.parameters.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect::<Vec<_>>();
        assert_eq!(half.ram.parameters, nearest(&saved.ram));
        assert_eq!(half.sam.as_ref().map(|s| s.parameters.clone()), saved.sam.as_ref().map(nearest));
        half.save_as(&path, NumberFormat::F16).unwrap();
        assert_eq!(Concept::load(&path).unwrap().ram.parameters, half.ram.parameters);
        let bytes = std::fs::read(&path).unwrap();
        let numbers = saved.ram.parameters.len() + saved.sam.as_ref().map_or(0, |s| s.parameters.len());
        assert_eq!(
            SafeTensors::deserialize(&bytes).unwrap().iter().map(|(_, t)| t.data().len()).sum::<usize>(),
            2 * numbers
        );
        let mut large = saved.clone();
        large.ram.parameters[0] = 7e4;
        assert!(large.save_as(&path, NumberFormat::F16).unwrap_err().to_string().contains("65504"));
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        saved.save(&path).unwrap();
        // A file that is cut anywhere is refused by name.
        let whole = std::fs::read(&path).unwrap();
        for len in (0..whole.len()).step_by(23) {
            let error = Concept::parse(&whole[..len], &path).unwrap_err().to_string();
            assert!(error.contains("c.safetensors") && !error.contains('\n'), "{error}");
        }
    }
}

#[test]
fn other_sizes() {
    // A ramp stays a ramp: bilinear with half-pixel centres, away from the clamped edges.
    let shape = Shape::new(1, 4, 4, 2);
    let ramp: Vec<f32> = (0..16).flat_map(|i| [(i % 4) as f32, (i / 4) as f32]).collect();
    let ram = Module::with_parameters(Form::Constant, shape, ramp.clone()).unwrap();
    let concept = Concept::new(Metadata::default(), ram, None);
    assert_eq!(concept.modules(shape).unwrap()[0].parameters, ramp);
    let large = concept.modules(Shape::new(1, 8, 6, 2)).unwrap().remove(0).parameters;
    for (y, x) in (0..8).flat_map(|y| (0..6).map(move |x| (y, x))) {
        let (down, across) = ((y as f32 + 0.5) * 0.5 - 0.5, (x as f32 + 0.5) * 4.0 / 6.0 - 0.5);
        let at = (y * 6 + x) * 2;
        assert!(
            (large[at] - across.clamp(0.0, 3.0)).abs() < 1e-6 && (large[at + 1] - down.clamp(0.0, 3.0)).abs() < 1e-6
        );
    }
    let merged = Concept::merge(&[(concept.clone(), 2.0), (concept.clone(), -0.5)]).unwrap();
    assert!(merged.ram.parameters.iter().zip(&ramp).all(|(m, r)| (m - 1.5 * r).abs() < 1e-6));
}

#[test]
fn trainings_resume_to_the_same_result() {
    use respodiff::{Recipe, Task, Trainer};
    let engine = Engine::open(&Source::demo(), Device::cpu()).unwrap();
    let task = Task::toward("a woman", "a person");
    let mut recipe = Recipe::for_task(&task);
    recipe.batch = 2;
    recipe.rollout_steps = 6;
    recipe.latents_per_rollout = 2;
    let trainer = |seed| Trainer::new(&engine, task.clone(), recipe.clone(), seed, Size::new(64, 64)).unwrap();
    let mut whole = trainer(3);
    for _ in 0..8 {
        whole.iterate().unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let mut first = trainer(3);
    for _ in 0..4 {
        first.iterate().unwrap();
    }
    assert!(first.between_rollouts());
    first.save(&path).unwrap();
    let mut second = trainer(3);
    second.resume(&path).unwrap();
    for _ in 0..4 {
        second.iterate().unwrap();
    }
    assert_eq!(second.concept().ram.parameters, whole.concept().ram.parameters);
    assert_eq!(second.concept().sam.unwrap().parameters, whole.concept().sam.unwrap().parameters);
    assert_eq!(second.history(), whole.history());
    // Files are equal byte for byte, whatever the order of a hash map.
    let written = |trainer: &Trainer, name: &str| {
        let path = folder.path().join(name);
        trainer.save(&path).unwrap();
        let mut concept = trainer.concept();
        concept.metadata.other = (0..20).map(|i| (format!("note{i}"), "x".into())).collect();
        concept.save(path.with_extension("concept")).unwrap();
        [std::fs::read(&path).unwrap(), std::fs::read(path.with_extension("concept")).unwrap()]
    };
    assert_eq!(written(&whole, "whole"), written(&second, "second"));
    let read = Concept::load(folder.path().join("whole.concept")).unwrap();
    assert_eq!(read.metadata.other.len(), 20);
    assert_eq!(read.ram.parameters, whole.concept().ram.parameters);
    // Another training's checkpoint, and a cut one, are refused.
    assert!(trainer(4).resume(&path).unwrap_err().to_string().contains("another training"));
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(trainer(3).resume(&path).unwrap_err().to_string().contains("not a whole"));
}
