//! Steps whose UNet takes activations from an earlier step, inner ones or the outputs of cross attention, against hooks
//! in diffusers that do the same.

mod support;

use respodiff::bench::{Case, SD15, SDXL};
use respodiff::concept::{Concept, Form, Metadata, Module};
use respodiff::cpu::Fp32;
use respodiff::engine::UNET_CONSTANTS;
use respodiff::graph::{Graph, Node};
use respodiff::models::{UNetConfig, UNetInput, unet, unet_with_gate, unet_with_reuse};
use respodiff::plan::Plan;
use respodiff::{Device, Engine, ErrorKind, Image, Output, Request, SessionOptions, Size, Source};
use serde_json::from_str;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use support::{cases, golden, relative_l2};

fn engine(checkpoint: &str) -> Engine {
    Engine::open(&Source::folder(golden().join("checkpoints").join(checkpoint)).unwrap(), Device::cpu()).unwrap()
}

fn generate(engine: &Engine, options: SessionOptions, request: &Request) -> Output {
    engine.session(options).unwrap().generate(request, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn concept(engine: &Engine, options: SessionOptions, numbers: &[f32]) -> Arc<Concept> {
    let shape = engine.bottleneck(options);
    let parameters = support::nchw_to_nhwc(numbers, 1, shape.c);
    let ram = Module::with_parameters(Form::Constant, shape, parameters).unwrap();
    Arc::new(Concept::new(Metadata::new("a"), ram, None))
}

#[test]
fn reusing_steps_match_diffusers() {
    for case in cases("reuse_", 3).into_iter().chain(cases("tgate_", 4)) {
        let meta = case.metadata();
        let number = |name: &str| -> usize { from_str(&meta[name]).unwrap() };
        let engine = engine(&meta["checkpoint"]);
        let prompts: Vec<String> = from_str(&meta["prompt"]).unwrap();
        let options = SessionOptions::new(Size::new(number("width"), number("height")))
            .batch(prompts.len())
            .concepts(case.has("ram"));
        let options = match case.name.starts_with("reuse_") {
            true => options.reuse(number("interval")),
            false => options.gate(Some(number("gate"))),
        };
        let image = |(i, prompt): (usize, &String)| {
            let image = Image::new(prompt.as_str()).seed((number("seed") + i) as u64);
            let image = image.guidance(meta["guidance_scale"].parse().unwrap());
            match case.has("ram") {
                true => image.concept(concept(&engine, options, &case.floats("ram")), 1.0),
                false => image,
            }
        };
        let request = Request::new(prompts.iter().enumerate().map(image).collect())
            .steps(number("steps"))
            .sampler(meta["scheduler"].parse().unwrap());
        let error = relative_l2(&generate(&engine, options, &request).latents, &case.floats("out.latents"));
        println!("{}: latents {error:.1e}", case.name);
        assert!(error < 1e-4, "{}: latents are off by {error:.2e}", case.name);
    }
}

/// The kernels reuse what the CPU reuses, with the kernels of compute capability 9.0 too, whose products leave moments
/// for norms and contain scales of norms.
#[cfg(feature = "emulated")]
#[test]
fn the_kernels_reuse_the_same_activations() {
    use respodiff::cuda::{Emulated, Limits};
    let demo = |device: Device| Engine::open(&Source::folder(support::root().join("demo/model")).unwrap(), device);
    let image = |seed| Image::new("a photo of a nurse").seed(seed).guidance(2.0);
    let plain = SessionOptions::new(Size::new(64, 64)).batch(2);
    for options in [plain.reuse(3), plain.reuse(3).concepts(true), plain.gate(Some(3)).concepts(true)] {
        let shifted = options.concepts;
        let latents = |device: Device| {
            let engine = demo(device).unwrap();
            let numbers: Vec<f32> = (0..engine.bottleneck(options).len()).map(|i| (i as f32 * 0.61).sin()).collect();
            let concept = concept(&engine, options, &numbers);
            let images = [1, 2].map(|seed| match shifted {
                true => image(seed).concept(concept.clone(), 0.5),
                false => image(seed),
            });
            let request = Request::new(images.to_vec()).steps(8).sampler("ddim".parse().unwrap());
            generate(&engine, options, &request).latents
        };
        let truth = latents(Device::cpu());
        for limits in [Limits::A100, Limits::H100] {
            let error = relative_l2(&latents(Device::kernels(Emulated::new(limits, Emulated::QUICK))), &truth);
            let SessionOptions { gate, .. } = options;
            println!("shifted {shifted}, gate {gate:?}, {}: latents {error:.1e}", limits.capability);
            // As in `emulated.rs`.
            assert!(error < 1e-2, "shifted {shifted}, gate {gate:?}, {}: off by {error:.2e}", limits.capability);
        }
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch_and_every_step_may_be_whole() {
    let engine = engine("sd1");
    let options = SessionOptions::new(Size::new(40, 56));
    let images = [
        Image::new("a doctor").seed(3).guidance_interval((700.0, 400.0)),
        Image::new("a cat").seed(4).negative("a hat"),
    ];
    let request = |images: &[Image]| Request::new(images.to_vec()).steps(6).sampler("euler a".parse().unwrap());
    let both = generate(&engine, options.batch(2).reuse(2), &request(&images));
    for (i, image) in images.iter().enumerate() {
        let alone = generate(&engine, options.reuse(2), &request(std::slice::from_ref(image)));
        assert_eq!(alone.pictures[0], both.pictures[i]);
    }
    let plain = generate(&engine, options.batch(2), &request(&images));
    assert_ne!(plain.latents, both.latents);
    // The second of two plans is one that could reuse activations but has no step to do so.
    let mut session = engine.session(options.batch(2).reuse(7)).unwrap();
    let first = session.generate(&request(&images), &mut |_| ControlFlow::Continue(())).unwrap();
    let second = session.generate(&request(&images).steps(1), &mut |_| ControlFlow::Continue(())).unwrap();
    let once = generate(&engine, options.batch(2), &request(&images).steps(1));
    assert_ne!(plain.latents, first.latents);
    assert_eq!(once.latents, second.latents);
}

#[test]
fn a_gate_does_not_depend_on_the_batch_and_may_never_come() {
    let engine = engine("sd1");
    let options = SessionOptions::new(Size::new(40, 56));
    let numbers: Vec<f32> = (0..engine.bottleneck(options).len()).map(|i| (i as f32 * 0.37).sin()).collect();
    let ram = concept(&engine, options, &numbers);
    // The first is not guided in its first step; after the gate none is.
    let images = [
        Image::new("a doctor").seed(3).guidance_interval((700.0, 400.0)),
        Image::new("a cat").seed(4).negative("a hat").concept(ram, 0.8),
    ];
    let request = |images: &[Image]| Request::new(images.to_vec()).steps(6).sampler("euler a".parse().unwrap());
    let options = options.concepts(true);
    let gated = options.gate(Some(3));
    let both = generate(&engine, gated.batch(2), &request(&images));
    for (i, image) in images.iter().enumerate() {
        let alone = generate(&engine, gated, &request(std::slice::from_ref(image)));
        assert_eq!(alone.pictures[0], both.pictures[i]);
    }
    let plain = generate(&engine, options.batch(2), &request(&images));
    assert_ne!(plain.latents, both.latents);
    let never = generate(&engine, options.batch(2).gate(Some(6)), &request(&images));
    assert!(relative_l2(&never.latents, &plain.latents) < 1e-5);
    // A second request finds nothing of the first.
    let mut session = engine.session(gated.batch(2)).unwrap();
    let mut go = || session.generate(&request(&images), &mut |_| ControlFlow::Continue(())).unwrap().latents;
    assert!(go() == both.latents && go() == both.latents);
}

/// The multiplications of steps of Stable Diffusion 1.5 and SDXL as shares of those of a whole guided step, which
/// `docs/faster.md` quotes.
#[test]
fn steps_multiply_less() {
    for (source, latents, shares) in [(SD15, 64, ["0.22", "0.69", "0.48"]), (SDXL, 128, ["0.04", "0.68", "0.46"])] {
        let config = source.read_text("unet/config.json").unwrap();
        let config = UNetConfig::parse(&config, Path::new("config.json")).unwrap();
        let input = |rows, shifted| UNetInput { rows, h: latents, w: latents, tokens: 77, shifted };
        let plan = |graph: Graph| Plan::new(graph, UNET_CONSTANTS, &Fp32);
        fn flops<'a>(plan: &'a Plan, nodes: impl Iterator<Item = (&'a Node, (usize, usize))>) -> f64 {
            nodes.map(|(node, _)| Case::of(plan.graph(), node).flops()).sum()
        }
        let whole = plan(unet(&config, input(2, 0)));
        let whole = flops(&whole, whole.step());
        let [inner, with_concepts] = [0, 1].map(|shifted| plan(unet_with_reuse(&config, input(2, shifted))));
        let (guided, gated) =
            (plan(unet_with_gate(&config, input(2, 0), true)), plan(unet_with_gate(&config, input(1, 0), false)));
        assert_eq!(flops(&guided, guided.step()), whole);
        assert_eq!(flops(&gated, gated.step()), whole / 2.0);
        let reusing = [&inner, &with_concepts, &gated].map(|plan| flops(plan, plan.reusing_step()) / whole);
        assert_eq!(reusing.map(|share| format!("{share:.2}")), shares, "latents of {latents}");
    }
}

#[test]
fn impossible_reuse_is_refused() {
    let engine = engine("sd1");
    let options = SessionOptions::new(Size::new(64, 64));
    let error = engine.session(options.reuse(0)).err().expect("refused");
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("reuse"), "{error}");
    let error = engine.running_batch(options.batch(2).reuse(2)).err().expect("refused");
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("reuse"), "{error}");
    for options in [options.gate(Some(0)), options.gate(Some(3)).reuse(2)] {
        let error = engine.session(options).err().expect("refused");
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("gate"), "{error}");
    }
    let error = engine.running_batch(options.batch(2).gate(Some(2))).err().expect("refused");
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("gate"), "{error}");
    // The average of one image's predictions would be taken of another's, which has one prediction alone.
    let images = [2.0, 1.0].map(|guidance| Image::new("a cat").guidance(guidance));
    let mut session = engine.session(options.batch(2).gate(Some(2))).unwrap();
    let request = Request::new(images.to_vec()).steps(4);
    let error = session.generate(&request, &mut |_| ControlFlow::Continue(())).expect_err("refused");
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("guidance"), "{error}");
}
