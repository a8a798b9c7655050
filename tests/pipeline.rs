//! Whole pipelines against diffusers' recorded ones, and the promise that a batch changes nothing.

mod support;

use respodiff::Device;
use respodiff::engine::{Engine, Output, Request, SessionOptions};
use respodiff::weights::Source;
use serde_json::from_str;
use std::collections::HashMap;
use std::ops::ControlFlow;
use support::{cases, golden, relative_l2};

fn engine(name: &str) -> Engine {
    Engine::open(&Source::folder(golden().join("checkpoints").join(name)).unwrap(), &Device::Cpu).unwrap()
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
    Engine::open(&Source::folder(folder.path()).unwrap(), &Device::Cpu).unwrap()
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
        let calls = positive.len();
        let mut latents = Vec::new();
        let mut images = Vec::new();
        for call in 0..calls {
            let request = Request {
                prompt: positive[call].clone().unwrap(),
                negative_prompt: negative[call % negative.len()].clone(),
                steps: field("steps").as_u64().unwrap() as usize,
                guidance,
                seed: field("seed").as_u64().unwrap() + call as u64,
                original_size: pair("original_size"),
                crop: pair("crops_coords_top_left").unwrap_or((0, 0)),
                ..Default::default()
            };
            let options =
                SessionOptions { width, height, batch: batch / calls, guided: guidance > 1.0, concepts: false };
            let output = generate(&engine, options, &request);
            latents.extend(output.latents);
            images.extend(output.images);
        }
        let error = relative_l2(&latents, &case.floats("out.latents"));
        println!("{:32} latents {error:.1e}", case.name);
        assert!(error < 1e-4, "{}: latents are off by {error:.2e}", case.name);
        for (i, (ours, theirs)) in images.iter().zip(case.floats("out.image").chunks(3 * height * width)).enumerate() {
            let truth = respodiff::Image::from_chw(theirs, height, width).unwrap();
            let far = ours.rgb.iter().zip(&truth.rgb).filter(|(a, b)| a.abs_diff(**b) > 1).count();
            assert_eq!(far, 0, "{}: {far} bytes of image {i} differ by more than rounding", case.name);
        }
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    for name in ["sd1", "sdxl"] {
        let engine = engine(name);
        let options = SessionOptions { width: 40, height: 56, batch: 3, guided: true, concepts: false };
        let request = |seed| Request {
            prompt: "a doctor".into(),
            steps: 4,
            seed,
            sampler: "euler a".parse().unwrap(),
            ..Default::default()
        };
        let batch = generate(&engine, options, &request(7));
        let one = batch.latents.len() / 3;
        for i in 0..3 {
            let alone = generate(&engine, SessionOptions { batch: 1, ..options }, &request(7 + i as u64));
            assert_eq!(alone.latents, batch.latents[i * one..][..one], "{name}, image {i}");
            assert_eq!(alone.images[0], batch.images[i]);
        }
    }
}

#[test]
fn impossible_requests_are_refused() {
    let engine = engine("sd1");
    let options = SessionOptions { width: 64, height: 64, batch: 1, guided: true, concepts: false };
    for (bad, word) in [
        (SessionOptions { width: 63, ..options }, "width 63"),
        (SessionOptions { height: 0, ..options }, "height 0"),
        (SessionOptions { width: usize::MAX, ..options }, "8192"),
        (SessionOptions { batch: 0, ..options }, "batch 0"),
        (SessionOptions { width: 8192, height: 8192, batch: 256, guided: true, concepts: false }, "GiB"),
    ] {
        let error = engine.session(bad).err().expect("refused");
        assert!(error.to_string().contains(word) && error.kind() == ErrorKind::Invalid, "{error}");
    }
    let mut session = engine.session(options).unwrap();
    let mut go = |request: Request, flow: ControlFlow<()>| session.generate(&request, &mut |_| flow);
    let fine = Request { prompt: "a doctor".into(), steps: 2, ..Default::default() };
    let next = ControlFlow::Continue(());
    assert_eq!(go(Request { steps: 0, ..fine.clone() }, next).expect_err("refused").kind(), ErrorKind::Invalid);
    assert_eq!(
        go(Request { guidance: f32::NAN, ..fine.clone() }, next).expect_err("refused").kind(),
        ErrorKind::Invalid
    );
    assert_eq!(
        go(Request { latents: Some(vec![0.0; 3]), ..fine.clone() }, next).expect_err("refused").kind(),
        ErrorKind::Invalid
    );
    let sized = Request { original_size: Some((64, 64)), ..fine.clone() };
    assert!(go(sized, next).expect_err("refused").to_string().contains("SDXL"));
    assert_eq!(go(Request { crop: (0, 8), ..fine.clone() }, next).expect_err("refused").kind(), ErrorKind::Invalid);
    let huge = go(Request { guidance: 3e38, ..fine.clone() }, next).expect_err("refused");
    assert!(huge.kind() == ErrorKind::NonFinite, "{huge}");
    assert_eq!(go(fine.clone(), ControlFlow::Break(())).expect_err("refused").kind(), ErrorKind::Cancelled);
    assert!(go(fine, next).is_ok());
}
