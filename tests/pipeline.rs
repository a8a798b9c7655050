//! Whole pipelines against diffusers' recorded ones, and the promise that a batch changes nothing.

mod support;

use respodiff::{Device, Engine, ErrorKind, Image, Output, Prompt, Request, SessionOptions, Size, Source, Start};
use serde_json::from_str;
use std::collections::HashMap;
use std::ops::ControlFlow;
use support::{cases, golden, relative_l2};

fn engine(name: &str) -> Engine {
    Engine::open(&Source::folder(golden().join("checkpoints").join(name)).unwrap(), Device::cpu()).unwrap()
}

fn generate(engine: &Engine, options: SessionOptions, request: &Request) -> Output {
    engine.session(options).unwrap().generate(request, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// The engine of a recorded run: its checkpoint, with the scheduler's settings in the file.
fn engine_of(meta: &HashMap<String, String>) -> Engine {
    let folder = support::copy(&meta["checkpoint"]);
    let mut config: serde_json::Value = serde_json::from_str(&meta["scheduler_config"]).unwrap();
    config["_class_name"] = meta["scheduler"].clone().into();
    std::fs::write(folder.path().join("scheduler/scheduler_config.json"), config.to_string()).unwrap();
    Engine::open(&Source::folder(folder.path()).unwrap(), Device::cpu()).unwrap()
}

#[test]
fn pipelines_match_diffusers() {
    // Guidance rescale is not offered.
    for case in cases("pipeline_", 17).into_iter().filter(|c| !c.name.ends_with("_rescale")) {
        let meta = case.metadata();
        let field = |name: &str| meta.get(name).map_or(serde_json::Value::Null, |text| from_str(text).unwrap());
        let prompts = |name: &str| match field(name) {
            serde_json::Value::Array(list) => list.iter().map(|p| p.as_str().map(str::to_string)).collect(),
            _ => vec![None],
        };
        // diffusers has rows before columns.
        let pair = |name: &str| field(name).as_array().map(|p| [1, 0].map(|i| p[i].as_u64().unwrap() as usize).into());
        let engine = engine_of(&meta);
        let [batch, _, height, width] = case.shape("out.image")[..] else { panic!("images are NCHW") };
        let guidance = field("guidance_scale").as_f64().unwrap() as f32;
        let (positive, negative) = (prompts("prompt"), prompts("negative_prompt"));
        let image = |i: usize| {
            let prompt = positive[i * positive.len() / batch].clone().unwrap();
            let seed = field("seed").as_u64().unwrap() + i as u64;
            let mut image = Image::new(prompt).seed(seed).guidance(guidance);
            image.negative = negative[i * negative.len() / batch].clone().map(Prompt::from);
            image
        };
        let request = Request::new((0..batch).map(image).collect())
            .steps(field("steps").as_u64().unwrap() as usize)
            .conditioned_on_size(pair("original_size"), pair("crops_coords_top_left").unwrap_or((0, 0)));
        let options = SessionOptions::new(Size::new(width, height)).batch(batch).guided(guidance > 1.0);
        let output = generate(&engine, options, &request);
        let error = relative_l2(&output.latents, &case.floats("out.latents"));
        println!("{:32} latents {error:.1e}", case.name);
        assert!(error < 1e-4, "{}: latents are off by {error:.2e}", case.name);
        for (i, (ours, theirs)) in
            output.pictures.iter().zip(case.floats("out.image").chunks(3 * height * width)).enumerate()
        {
            let truth = respodiff::Picture::from_chw(theirs, height, width).unwrap();
            let far = ours.rgb.iter().zip(&truth.rgb).filter(|(a, b)| a.abs_diff(**b) > 1).count();
            assert_eq!(far, 0, "{}: {far} bytes of image {i} differ by more than rounding", case.name);
        }
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    for name in ["sd1", "sdxl"] {
        let engine = engine(name);
        let options = SessionOptions::new(Size::new(40, 56)).batch(3);
        let unit = (0..4 * 5 * 7).map(|i| (i as f32 * 0.7).sin()).collect();
        // Everything that an image has for itself differs.
        let images = [
            Image::new("a doctor").seed(7),
            Image::new("a portrait of a chef").negative("a hat").seed(3).guidance(2.5),
            Image::new(engine.encode("a nurse").unwrap()).seed(7).guidance(1.0).start(Start::Latents(unit)),
        ];
        let request = |images: &[Image]| Request::new(images.to_vec()).steps(4).sampler("euler a".parse().unwrap());
        let batch = generate(&engine, options, &request(&images));
        let one = batch.latents.len() / 3;
        for i in 0..3 {
            let alone = options.batch(1).guided(images[i].guidance != Some(1.0));
            let alone = generate(&engine, alone, &request(&images[i..=i]));
            assert_eq!(alone.latents, batch.latents[i * one..][..one], "{name}, image {i}");
            assert_eq!(alone.pictures[0], batch.pictures[i]);
        }
    }
}

#[test]
fn impossible_requests_are_refused() {
    let engine = engine("sd1");
    let options = SessionOptions::new(Size::new(64, 64));
    for (bad, word) in [
        (options.size(Size::new(63, 64)), "width: 63"),
        (options.size(Size::new(64, 0)), "height: 0"),
        (options.size(Size::new(usize::MAX, 64)), "8192"),
        (options.batch(0), "batch: 0"),
    ] {
        let error = engine.session(bad).err().expect("refused");
        assert!(error.to_string().contains(word) && error.kind() == ErrorKind::Invalid, "{error}");
    }
    let error = engine.session(options.size(Size::new(8192, 8192)).batch(256)).err().expect("refused");
    assert!(error.to_string().contains("GiB") && error.kind() == ErrorKind::OutOfMemory, "{error}");
    let mut session = engine.session(options).unwrap();
    let mut go = |request: Request, flow: ControlFlow<()>| session.generate(&request, &mut |_| flow);
    let fine = || Image::new("a doctor");
    let next = ControlFlow::Continue(());
    let latents = Start::Latents(vec![0.0; 3].into());
    let other = Engine::clone(&crate::engine("sd2")).encode("a doctor").unwrap();
    for (request, kind) in [
        (Request::from(fine()).steps(0), ErrorKind::Invalid),
        (fine().guidance(f32::NAN).into(), ErrorKind::Invalid),
        (fine().start(latents).into(), ErrorKind::Invalid),
        (Request::from(fine()).conditioned_on_size(None, (0, 8)), ErrorKind::Invalid),
        (Request::new(vec![fine(), fine()]), ErrorKind::Invalid),
        (Request::new(vec![]), ErrorKind::Invalid),
        (Image::new(other).into(), ErrorKind::Mismatch),
        (Request::from(fine().guidance(3e38)).steps(2), ErrorKind::NonFinite),
    ] {
        let error = go(request, next).expect_err("refused");
        assert_eq!(error.kind(), kind, "{error}");
    }
    let sized = Request::from(fine()).conditioned_on_size(Some((64, 64)), (0, 0));
    assert!(go(sized, next).expect_err("refused").to_string().contains("SDXL"));
    let fine = Request::from(fine()).steps(2);
    assert_eq!(go(fine.clone(), ControlFlow::Break(())).expect_err("refused").kind(), ErrorKind::Cancelled);
    assert!(go(fine, next).is_ok());
}
