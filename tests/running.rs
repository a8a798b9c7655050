//! Running batches: images that join and leave become the pictures that they are alone, bit for bit.

mod support;

use respodiff::concept::{Concept, Form, Metadata, Strength};
use respodiff::diffusion::noise::Rng;
use respodiff::graph::Extent;
use respodiff::models::{VaeConfig, vae_decoder};
use respodiff::pictures::InitImage;
use respodiff::weights::Source;
use respodiff::{
    Device, Engine, EngineOptions, ErrorKind, Event, Image, ImageId, Picture, Request, RunningBatch, Sampler,
    SamplerChoice, SessionOptions, Size, Start,
};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

fn engine(checkpoint: &str, device: &Device) -> Engine {
    Engine::open(&Source::folder(support::golden().join("checkpoints").join(checkpoint)).unwrap(), device).unwrap()
}

/// The devices that run here, and if they can evaluate concepts that are networks.
fn devices() -> Vec<(Device, bool)> {
    vec![
        (Device::cpu(), true),
        #[cfg(feature = "emulated")]
        (
            Device::kernels(respodiff::cuda::Emulated::new(
                respodiff::cuda::Limits::A100,
                respodiff::cuda::Emulated::QUICK,
            )),
            false,
        ),
    ]
}

const OPTIONS: SessionOptions = SessionOptions::new(Size::new(40, 56)).concepts(true);

/// Requests that have as little as possible in common: every sampler, and everything that an image may have.
fn requests(engine: &Engine, networks: bool, xl: bool) -> Vec<Request> {
    let shape = engine.bottleneck(OPTIONS);
    let concept = |form, seed| Arc::new(Concept::new(Metadata::new("a"), support::module(form, shape, seed), None));
    let [_, c, h, w] = engine.latent_shape(OPTIONS);
    let latents: Arc<[f32]> = (0..c * h * w).map(|i| (i as f32 * 0.37).sin()).collect();
    let pixels = |scale: usize| (0..30 * 20 * 3).map(|i| (i * scale % 251) as u8).collect();
    let [picture, mask] = [7, 1].map(|scale| Arc::new(Picture { width: 30, height: 20, rgb: pixels(scale) }));
    let image = |i: usize, sampler: Sampler| {
        let image = Image::new(["a doctor", "a cat", "a portrait of a chef"][i % 3]).seed(7 * i as u64);
        let image = if i % 2 == 1 { image.negative("a hat") } else { image };
        let image = image.guidance([2.0, 1.0, 1.5][i % 3]).guidance_rescale([0.0, 0.7][i / 2 % 2]);
        let image = if i % 5 == 2 { image.guidance_interval((900.0, 300.0)) } else { image };
        let image = match i % 4 {
            1 => image.concept(concept(Form::Constant, 3), 0.7),
            2 => image
                .concept(concept(Form::Constant, 4), Strength::from(0.5).until(600.0))
                .concept(concept(if networks { Form::Conv } else { Form::Constant }, 5), 0.4),
            _ => image,
        };
        let begin = |init| image.clone().start(Start::Image(init));
        let image = match i {
            3 => image.start(Start::Latents(latents.clone())),
            1 => begin(InitImage::new(picture.clone(), 0.7)),
            4 => begin(InitImage::inpaint(picture.clone(), mask.clone(), 1.0).noise(latents.clone())),
            5 => begin(InitImage::inpaint(picture.clone(), mask.clone(), 0.8)),
            _ => image,
        };
        let choice = SamplerChoice { sampler: Some(sampler), ..SamplerChoice::default() };
        let request = Request::from(image).steps(2 + i % 4).sampler(choice).rng(Rng::ALL[i % 2]);
        if xl && i % 3 == 1 { request.conditioned_on_size(Some((64, 48)), (8, 0)) } else { request }
    };
    Sampler::ALL.into_iter().enumerate().map(|(i, sampler)| image(i, sampler)).collect()
}

fn alone(engine: &Engine, request: &Request) -> Picture {
    let guided = request.images[0].guidance != Some(1.0) || request.sampler.sampler.is_some_and(Sampler::is_cfg_pp);
    let options = OPTIONS.guided(guided).concepts(!request.images[0].concepts.is_empty());
    let mut output = engine.session(options).unwrap().generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
    output.pictures.remove(0)
}

/// Steps once, and takes what is finished.
fn step(batch: &mut RunningBatch, finished: &mut HashMap<ImageId, Picture>) {
    for (id, event) in batch.step().unwrap() {
        match event {
            Event::Step { done, total } => assert!(done < total),
            Event::Finished(picture) => assert!(finished.insert(id, picture).is_none()),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn pictures_do_not_depend_on_who_joins() {
    for (device, networks) in devices() {
        // The emulator is slow, and SDXL differs in its inputs alone.
        for checkpoint in if networks { &["sd1", "sdxl"][..] } else { &["sd1"] } {
            let engine = engine(checkpoint, &device);
            let requests = requests(&engine, networks, *checkpoint == "sdxl");
            let truths: Vec<Picture> = requests.iter().map(|request| alone(&engine, request)).collect();
            // Images join one after the other, as soon as there is a row and at most one before each step, in batches
            // of two sizes.
            for (capacity, order) in if networks { &[(3, false), (8, true)][..] } else { &[(4, false)] } {
                let mut batch = engine.running_batch(OPTIONS.batch(*capacity)).unwrap();
                let mut waiting: Vec<usize> = (0..requests.len()).collect();
                if *order {
                    waiting.reverse();
                }
                let (mut ids, mut finished) = (HashMap::new(), HashMap::new());
                while !waiting.is_empty() || !batch.is_empty() {
                    if batch.free() > 0 && !waiting.is_empty() {
                        let i = waiting.remove(0);
                        ids.insert(batch.join(&requests[i]).unwrap(), i);
                    }
                    step(&mut batch, &mut finished);
                }
                assert_eq!(finished.len(), requests.len());
                for (id, picture) in finished {
                    let i = ids[&id];
                    let place = format!("{checkpoint} on {}, {capacity} rows, image {i}", device.name());
                    assert!(picture == truths[i], "{place} is another picture than alone");
                }
            }
        }
    }
}

#[test]
fn cancelled_and_failed_images_leave_the_others_alone() {
    for (device, networks) in devices() {
        let engine = engine("sd1", &device);
        let requests = requests(&engine, networks, false);
        let mut batch = engine.running_batch(OPTIONS.batch(3)).unwrap();
        assert!(batch.is_empty() && batch.step().unwrap().is_empty());
        let kept = batch.join(&requests[3]).unwrap();
        let cancelled = batch.join(&requests[1]).unwrap();
        let mut latents = vec![0.5; 4 * 7 * 5];
        latents[60] = f32::NAN;
        let broken = Image::new("a doctor").guidance(1.5).start(Start::Latents(latents.into()));
        let broken = batch.join(&Request::from(broken).steps(9)).unwrap();
        assert_eq!(batch.free(), 0);
        let refused = batch.join(&requests[0]).unwrap_err();
        assert!(refused.kind() == ErrorKind::Invalid && refused.to_string().contains("3 rows"), "{refused}");
        let (mut finished, mut failed) = (None, None);
        let mut steps = 0;
        while !batch.is_empty() {
            for (id, event) in batch.step().unwrap() {
                assert!(id != cancelled || steps == 0);
                match event {
                    Event::Finished(picture) => finished = Some((id, picture)),
                    Event::Failed(error) => failed = Some((id, error)),
                    _ => (),
                }
            }
            steps += 1;
            if steps == 1 {
                assert_eq!(batch.latents(cancelled).unwrap().unwrap().len(), 4 * 7 * 5);
                assert!(batch.cancel(cancelled) && !batch.cancel(cancelled) && batch.free() == 1);
                assert!(batch.latents(cancelled).unwrap().is_none());
            }
        }
        let (id, picture) = finished.unwrap();
        assert!(id == kept && picture == alone(&engine, &requests[3]), "{}", device.name());
        let (id, error) = failed.unwrap();
        assert!(id == broken && error.kind() == ErrorKind::NonFinite);
        assert!(error.to_string().contains("step 1 of 10 gave NaN"), "{error}");
        for (request, word) in [
            (Request::new(vec![]), "0 images"),
            (Request::from(Image::new("a").guidance(f32::NAN)), "NaN"),
            (Request::from(Image::new("a")).steps(0), "0 steps"),
            (Request::from(Image::new("a").start(Start::Latents([0.0].into()))), "1 numbers"),
        ] {
            let error = batch.join(&request).unwrap_err();
            assert!(error.to_string().contains(word) && batch.is_empty(), "{error}");
        }
    }
}

/// Previews show what the VAE decodes at the same moment. Of 24 of the demo's pictures, a linear function that was
/// fitted to these pictures explains .65 of the variance, and one that is fitted to noise .48 to .54 (with numpy). Of
/// the six here it is .36.
#[test]
fn previews_show_what_the_vae_decodes() {
    let engine = Engine::open(&Source::demo(), Device::cpu()).unwrap();
    let mut batch = engine.running_batch(engine.options().size(Size::new(72, 64)).batch(2)).unwrap();
    let (mut previews, mut truths) = (Vec::new(), Vec::new());
    for (seed, prompt) in ["a photo of a doctor", "a photo of a cook", "a photo of a nurse"].iter().enumerate() {
        for sampler in ["Euler", "DDIM"] {
            let image = Image::new(*prompt).seed(seed as u64);
            let id = batch.join(&Request::from(image).steps(20).sampler(sampler.parse().unwrap())).unwrap();
            (0..19).for_each(|_| assert_eq!(batch.step().unwrap().len(), 1));
            let (preview, picture) = (batch.preview(id).unwrap().unwrap(), batch.picture(id).unwrap().unwrap());
            assert_eq!((preview.width, preview.height), (72, 64));
            previews.extend(preview.rgb.iter().map(|pixel| f64::from(*pixel)));
            truths.extend(picture.rgb.iter().map(|pixel| f64::from(*pixel)));
            batch.cancel(id);
            assert!(batch.preview(id).unwrap().is_none());
        }
    }
    let mean = truths.iter().sum::<f64>() / truths.len() as f64;
    let all: f64 = truths.iter().map(|truth| (truth - mean).powi(2)).sum();
    let left: f64 = truths.iter().zip(&previews).map(|(truth, preview)| (truth - preview).powi(2)).sum();
    let explained = 1.0 - left / all;
    assert!(explained > 0.3, "{explained:.3} of the variance");
}

/// Previews by a VAE of their own are what it decodes of the latents at unit variance, and its memory is known before.
#[test]
fn previews_by_a_small_vae() {
    let checkpoints = support::golden().join("checkpoints");
    let [source, small] = ["sd1", "taesd"].map(|name| Source::folder(checkpoints.join(name)).unwrap());
    let options = EngineOptions::new(Device::cpu());
    let plain = Engine::open(&source, options.clone()).unwrap();
    let engine = Engine::open(&source, options.preview_vae(checkpoints.join("taesd"))).unwrap();
    let session = SessionOptions::new(Size::new(56, 40)).batch(2);
    let [memory, without] = [&engine, &plain].map(|engine| engine.memory(session).unwrap());
    assert!(memory.preview > 0 && without.preview == 0);
    assert!(memory.weights > without.weights && memory.session() == without.session() + memory.preview);

    let text = small.read_text("vae/config.json").unwrap();
    let config = VaeConfig::parse(&text, std::path::Path::new("config.json")).unwrap();
    let mut batch = engine.running_batch(session).unwrap();
    let id = batch.join(&Request::from(Image::new("a cook").seed(4)).steps(4)).unwrap();
    for step in 0..3 {
        batch.step().unwrap();
        let latents = batch.latents(id).unwrap().unwrap();
        let deviation = (latents.iter().map(|x| x * x).sum::<f32>() / latents.len() as f32).sqrt().max(1.0);
        let unit: Vec<f32> = support::nchw_to_nhwc(&latents, 1, 4).iter().map(|x| x / deviation).collect();
        let graph = vae_decoder(&config, 1, Extent { h: 5, w: 7 });
        let inputs = HashMap::from([("latents", unit)]);
        let image = &support::run(&Device::cpu(), graph, &small.tensors("vae").unwrap(), &inputs)["image"];
        let (preview, truth) = (batch.preview(id).unwrap().unwrap(), Picture::from_hwc(image, 40, 56).unwrap());
        assert_eq!((preview.width, preview.height), (56, 40));
        let far = preview.rgb.iter().zip(&truth.rgb).filter(|(a, b)| a.abs_diff(**b) > 1).count();
        assert_eq!(far, 0, "step {step}");
        assert!(preview.rgb.iter().any(|pixel| *pixel != preview.rgb[0]));
    }
    // The picture itself is the checkpoint's VAE's.
    let ours = batch.picture(id).unwrap();
    let mut batch = plain.running_batch(session).unwrap();
    let id = batch.join(&Request::from(Image::new("a cook").seed(4)).steps(4)).unwrap();
    (0..3).for_each(|_| drop(batch.step().unwrap()));
    assert_eq!(ours, batch.picture(id).unwrap());
}
