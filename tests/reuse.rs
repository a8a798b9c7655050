//! Steps whose UNet takes activations from an earlier step, against hooks in diffusers that do the same.

mod support;

use respodiff::concept::{Concept, Form, Metadata, Module};
use respodiff::{Device, Engine, ErrorKind, Image, Output, Request, SessionOptions, Size, Source};
use serde_json::from_str;
use std::ops::ControlFlow;
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
    for case in cases("reuse_", 3) {
        let meta = case.metadata();
        let number = |name: &str| -> usize { from_str(&meta[name]).unwrap() };
        let engine = engine(&meta["checkpoint"]);
        let prompts: Vec<String> = from_str(&meta["prompt"]).unwrap();
        let options = SessionOptions::new(Size::new(number("width"), number("height")))
            .batch(prompts.len())
            .concepts(case.has("ram"))
            .reuse(number("interval"));
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
    for shifted in [false, true] {
        let options = SessionOptions::new(Size::new(64, 64)).batch(2).concepts(shifted).reuse(3);
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
            println!("shifted {shifted}, {}: latents {error:.1e}", limits.capability);
            // As in `emulated.rs`.
            assert!(error < 1e-2, "shifted {shifted}, {}: latents are off by {error:.2e}", limits.capability);
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
fn impossible_reuse_is_refused() {
    let engine = engine("sd1");
    let options = SessionOptions::new(Size::new(64, 64));
    let error = engine.session(options.reuse(0)).err().expect("refused");
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("reuse"), "{error}");
    let error = engine.running_batch(options.batch(2).reuse(2)).err().expect("refused");
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("reuse"), "{error}");
}
