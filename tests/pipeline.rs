//! Whole pipelines compared with recorded ones of diffusers, and the promise that an image does not depend on its
//! batch.

mod support;

use respodiff::samplers::Tuning;
use respodiff::{
    Device, Engine, ErrorKind, Image, Output, Prompt, Recipe, Request, SamplerChoice, SessionOptions, Size, Source,
    Start, Task, Trainer,
};
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
    let folder = match meta["checkpoint"].as_str() {
        // Another UNet, or another VAE, with the other parts of sd1.
        name @ ("lcm" | "taesd") => support::copies(&["sd1", name]),
        name => support::copy(name),
    };
    let mut config: serde_json::Value = serde_json::from_str(&meta["scheduler_config"]).unwrap();
    config["_class_name"] = meta["scheduler"].clone().into();
    std::fs::write(folder.path().join("scheduler/scheduler_config.json"), config.to_string()).unwrap();
    Engine::open(&Source::folder(folder.path()).unwrap(), Device::cpu()).unwrap()
}

#[test]
fn pipelines_match_diffusers() {
    for case in cases("pipeline_", 24) {
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
            let rescale = field("guidance_rescale").as_f64().unwrap() as f32;
            let mut image = Image::new(prompt).seed(seed).guidance(guidance).guidance_rescale(rescale);
            image.negative = negative[i * negative.len() / batch].clone().map(Prompt::from);
            image
        };
        let tuning = Tuning { eta: field("eta").as_f64().filter(|eta| *eta != 0.0), ..Tuning::NONE };
        let request = Request::new((0..batch).map(image).collect())
            .steps(field("steps").as_u64().unwrap() as usize)
            .sampler(SamplerChoice { tuning, ..SamplerChoice::default() })
            .conditioned_on_size(pair("original_size"), pair("crops_coords_top_left").unwrap_or((0, 0)));
        let options = SessionOptions::new(Size::new(width, height)).batch(batch).guided(guidance > 1.0);
        assert_eq!(engine.reads_guidance(), meta["checkpoint"] == "lcm");
        let output = generate(&engine, options, &request);
        let error = relative_l2(&output.latents, &case.floats("out.latents"));
        println!("{:32} latents {error:.1e}", case.name);
        assert!(error < 1e-4, "{}: latents are off by {error:.2e}", case.name);
        for (i, (ours, theirs)) in
            output.pictures.iter().zip(case.floats("out.image").chunks(3 * height * width)).enumerate()
        {
            let truth = respodiff::Picture::from_hwc(&support::nchw_to_nhwc(theirs, 1, 3), height, width).unwrap();
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
        // All settings that an image has of its own differ.
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

/// A UNet that reads the guidance scale runs once per image, and gets each image's own scale.
#[test]
fn a_guidance_scale_that_the_unet_reads() {
    let folder = support::copies(&["sd1", "lcm"]);
    let engine = Engine::open(&Source::folder(folder.path()).unwrap(), Device::cpu()).unwrap();
    assert_eq!((engine.reads_guidance(), engine.default_guidance()), (true, 8.5));
    let options = SessionOptions::new(Size::new(40, 56)).batch(3);
    let images = [
        Image::new("a doctor").seed(7).guidance(8.5),
        Image::new("a doctor").seed(7).guidance(2.0).negative("a hat"),
        Image::new("a doctor").seed(7),
    ];
    let request = |images: &[Image]| Request::new(images.to_vec()).steps(2);
    let batch = generate(&engine, options, &request(&images));
    // One session for all, whose conditioning changes in nothing but the scale.
    let mut session = engine.session(options.batch(1)).unwrap();
    for (i, image) in images.iter().enumerate() {
        let alone =
            session.generate(&request(std::slice::from_ref(image)), &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(alone.pictures[0], batch.pictures[i], "image {i}");
    }
    assert_ne!(batch.pictures[0], batch.pictures[1]);
    assert_eq!(batch.pictures[0], batch.pictures[2]);
    // Guidance doubles nothing, so that it makes no difference to the memory.
    assert_eq!(engine.memory(options).unwrap().unet, engine.memory(options.guided(false)).unwrap().unet);
    let plain = generate(&engine, options.guided(false), &request(&images));
    assert_eq!(plain.pictures, batch.pictures);

    // This one has no middle block either.
    let error = engine.session(options.concepts(true)).err().expect("refused");
    assert!(error.to_string().contains("middle block") && error.kind() == ErrorKind::Unsupported, "{error}");
    let task = Task::toward("a woman", "a person");
    let recipe = Recipe::for_task(&task);
    let error = Trainer::new(&engine, task, recipe, 0, Size::new(64, 64)).err().expect("refused");
    assert!(error.to_string().contains("reads the guidance scale"), "{error}");
}

#[test]
fn impossible_requests_are_refused() {
    let engine = engine("sd1");
    let options = SessionOptions::new(Size::new(64, 64));
    for (bad, word) in [
        (options.size(Size::new(63, 64)), "width: 63"),
        (options.size(Size::new(64, 0)), "height: 0"),
        (options.size(Size::new(usize::MAX, 64)), "8192"),
        (options.batch(0), "batch of 0 images"),
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

/// Notes and fields that other programs leave in a checkpoint's files change no picture.
#[test]
fn notes_and_foreign_fields_do_no_harm() {
    let request = Request::from(Image::new("a doctor").seed(3)).steps(2);
    let picture = |folder: &std::path::Path| {
        let engine = Engine::open(&Source::folder(folder).unwrap(), Device::cpu()).unwrap();
        let size = SessionOptions::new(Size::new(64, 64));
        generate(&engine, size, &request.clone().sampler("DDIM".parse().unwrap())).latents
    };
    let plain = support::copy("sd1");
    let folder = support::copy("sd1");
    let edit = |name: &str, fields: &str| {
        let path = folder.path().join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, text.replacen('{', &format!("{{{fields},"), 1)).unwrap();
    };
    // DPMSolver's configuration as diffusers saves it, fields of other samplers, and notes.
    let scheduler = "\"lambda_min_clipped\": -Infinity, \"noise_sampler_seed\": null, \"tensor_format\": \"pt\", \
                     \"timestep_values\": null, \"my_note\": \"x\"";
    edit("scheduler/scheduler_config.json", scheduler);
    // Seven notes by diffusers' `EMAModel`.
    let ema = "\"decay\": 0.9999, \"inv_gamma\": 1.0, \"min_decay\": 0.0, \"optimization_step\": 12, \"power\": 0.66, \
               \"update_after_step\": 0, \"use_ema_warmup\": true";
    edit("unet/config.json", ema);
    assert_eq!(picture(folder.path()), picture(plain.path()));
}

/// A text encoder may have positions for more tokens than the tokenizer makes. As in diffusers, prompts have the
/// tokenizer's length.
#[test]
fn prompts_have_the_tokenizers_length() {
    let folder = support::copy("sd1");
    let config = folder.path().join("text_encoder/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut fields: serde_json::Value = from_str(&text).unwrap();
    let positions = fields["max_position_embeddings"].as_u64().unwrap() as usize;
    fields["max_position_embeddings"] = (positions + 50).into();
    std::fs::write(&config, fields.to_string()).unwrap();
    let file = folder.path().join("text_encoder/model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let longer = |name: &str, view: safetensors::tensor::TensorView| {
        let (mut shape, mut data) = (view.shape().to_vec(), view.data().to_vec());
        if name.ends_with("position_embedding.weight") {
            shape[0] += 50;
            data.resize(data.len() / positions * (positions + 50), 0x31);
        }
        (name.to_string(), view.dtype(), shape, data)
    };
    let parts: Vec<_> = tensors.tensors().into_iter().map(|(name, view)| longer(&name, view)).collect();
    let views = parts.iter().map(|(name, dtype, shape, data)| {
        (name.as_str(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    let latents = |engine: &Engine| {
        let request = Request::from(Image::new("a doctor").seed(3)).steps(2);
        generate(engine, SessionOptions::new(Size::new(64, 64)), &request).latents
    };
    let longer = Engine::open(&Source::folder(folder.path()).unwrap(), Device::cpu()).unwrap();
    assert_eq!(latents(&longer), latents(&engine("sd1")));
}
