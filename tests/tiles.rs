//! The VAE in strips of a picture: the same numbers as of the whole picture, in less memory.

mod support;

use respodiff::backend::{Parts, Piece, Precision};
#[cfg(feature = "emulated")]
use respodiff::cuda::{Emulated, Limits};
#[cfg(feature = "emulated")]
use respodiff::graph::{ConvOptions, GraphBuilder, Shape};
use respodiff::graph::{Divisible, Graph};
use respodiff::models::{VaeConfig, divisible_decoder, divisible_encoder};
use respodiff::pictures::InitImage;
use respodiff::weights::Tensors;
use respodiff::{
    Device, Engine, EngineOptions, ErrorKind, Image, Picture, Request, SessionOptions, Size, Source, Start,
};
use std::ops::ControlFlow;
use std::sync::Arc;
use support::{golden, random, relative_l2};

fn source(checkpoint: &str) -> Source {
    Source::folder(golden().join("checkpoints").join(checkpoint)).unwrap()
}

fn vae(source: &Source) -> VaeConfig {
    VaeConfig::parse(&source.read_text("vae/config.json").unwrap(), &source.path("vae/config.json")).unwrap()
}

/// The result of a network for an image of `units` units in strips of `strip` units, and the number of pieces that it
/// came in.
fn run(
    device: &Device,
    tensors: &Tensors,
    network: &Divisible<impl Fn(usize) -> Graph>,
    (units, strip): (usize, usize),
) -> (Vec<f32>, usize) {
    let graph = (network.graph)(units);
    let weights = device.weights(graph.weights(), tensors, &[], Precision::Full).unwrap();
    let plans = Parts::new(network, units, strip, |graph| device.plan(graph, &[]));
    let mut parts = plans.ready(|plan| device.executor(plan, &weights)).unwrap();
    // Rows differ in scale and mean, so that moments of a strip are not those of the image.
    let shape = graph.shape(graph.input(network.input));
    let numbers = random(shape.len(), 5).into_iter().enumerate().map(|(i, x)| {
        let row = (i / shape.c / shape.w) as f32 / shape.h as f32;
        x as f32 * (0.2 + row) + (6.0 * row).sin()
    });
    parts.input().write(network.input, &numbers.collect::<Vec<f32>>()).unwrap();
    let (mut result, mut pieces) = (vec![f32::NAN; parts.shape().len()], 0);
    let run = parts.run(&mut |executor, Piece { numbers, place }| {
        let part = executor.read_part(network.output, numbers)?;
        result[place..][..part.len()].copy_from_slice(&part);
        pieces += 1;
        Ok(())
    });
    run.unwrap();
    (result, pieces)
}

/// Strips of any size, those that do not divide the image and those with halos larger than themselves too.
#[test]
fn strips_make_the_whole_picture() {
    for checkpoint in ["sd1", "taesd"] {
        check_strips(&source(checkpoint));
    }
}

fn check_strips(source: &Source) {
    let cpu = Device::cpu();
    let (config, tensors) = (vae(source), source.tensors("vae").unwrap());
    let (decoder, encoder) = (divisible_decoder(&config, 7), divisible_encoder(&config, 7));
    let decoded = run(&cpu, &tensors, &decoder, (23, 23));
    let encoded = run(&cpu, &tensors, &encoder, (23, 23));
    assert_eq!((decoded.1, encoded.1), (1, 1));
    for strip in [1, 2, 5, 8, 22] {
        let (image, pieces) = run(&cpu, &tensors, &decoder, (23, strip));
        let (moments, _) = run(&cpu, &tensors, &encoder, (23, strip));
        let errors = [relative_l2(&image, &decoded.0), relative_l2(&moments, &encoded.0)];
        println!("strips of {strip}: image {:.1e}, moments {:.1e}", errors[0], errors[1]);
        assert_eq!(pieces, 23usize.div_ceil(strip));
        // Moments in fp32 that were merged in another order: an fp32 rounding (6e-8) of each of up to 30 norms.
        assert!(errors.iter().all(|error| *error < 3e-6), "strips of {strip}: off by {errors:?}");
    }
}

/// The kernels too, at fp16's precision.
#[cfg(feature = "emulated")]
#[test]
fn the_kernels_make_the_whole_picture_of_strips() {
    let (source, device) = (source("sd1"), support::kernels());
    let tensors = source.tensors("vae").unwrap();
    let config = vae(&source);
    let off = |network: &Divisible<_>| {
        let whole = run(&Device::cpu(), &tensors, network, (12, 12)).0;
        relative_l2(&run(&device, &tensors, network, (12, 5)).0, &whole)
    };
    // As in `emulated.rs`.
    let error = off(&divisible_decoder(&config, 2));
    assert!(error < 1e-2, "the image is off by {error:.1e}");
}

/// The kernels of compute capability 9.0, whose products leave moments for the norms of whole images, which are of no
/// use here; and two parts of which both run in strips.
#[cfg(feature = "emulated")]
#[test]
fn products_that_leave_moments_work_in_strips() {
    let graph = |h| {
        let mut g = GraphBuilder::new();
        let x = g.input("image", Shape::new(1, h, 64, 192));
        let x = g.conv("first", x, 160, ConvOptions::conv3x3());
        let y = g.group_norm("norm1", x, 32, 1e-5, true, None);
        let y = g.conv("second", y, 160, ConvOptions { residual: Some(x), ..ConvOptions::conv3x3() });
        let y = g.group_norm("norm2", y, 32, 1e-5, true, None);
        let y = g.conv("last", y, 8, ConvOptions::conv3x3());
        g.output("result", y);
        g.finish()
    };
    let cut = graph(1).nodes()[0].output;
    let network = Divisible { graph, cut: Some(cut), input: "image", output: "result" };
    let tensors = Tensors::random();
    let (whole, _) = run(&Device::cpu(), &tensors, &network, (8, 8));
    for (device, most) in [(Device::cpu(), 1e-5), (Device::kernels(Emulated::new(Limits::H100, Emulated::QUICK)), 2e-3)]
    {
        let (result, pieces) = run(&device, &tensors, &network, (8, 3));
        let error = relative_l2(&result, &whole);
        println!("{}: {error:.1e}", device.name());
        assert!(pieces == 3 && error < most, "{}: off by {error:.1e}", device.name());
    }
}

/// A picture that begins with another: both are encoded and decoded in strips.
#[test]
fn pictures_are_the_same_in_tiles() {
    let (source, size) = (source("sd1"), Size::new(72, 200));
    let rgb = random(size.width * size.height * 3, 3).iter().map(|x| (128.0 + 40.0 * x) as u8).collect();
    let picture = Arc::new(Picture { width: size.width as u32, height: size.height as u32, rgb });
    let make = |options: EngineOptions| {
        let engine = Engine::open(&source, options).unwrap();
        let image = Image::new("a doctor").seed(3).start(Start::Image(InitImage::new(picture.clone(), 0.5)));
        let request = Request::from(image).steps(4).sampler("ddim".parse().unwrap());
        let options = SessionOptions::new(size);
        let output = engine.session(options).unwrap().generate(&request, &mut |_| ControlFlow::Continue(())).unwrap();
        (output, engine.memory(options).unwrap().vae)
    };
    let options = EngineOptions::new(Device::cpu());
    let (whole, _) = make(options.clone());
    let (tiled, _) = make(options.clone().vae_tile(64));
    let error = relative_l2(&tiled.latents, &whole.latents);
    assert!(error < 1e-5, "latents are off by {error:.1e}");
    let pairs = tiled.pictures[0].rgb.iter().zip(&whole.pictures[0].rgb);
    assert!(pairs.clone().all(|(a, b)| a.abs_diff(*b) <= 1));
    let other = pairs.filter(|(a, b)| a != b).count();
    assert!(other * 1000 <= whole.pictures[0].rgb.len(), "{other} bytes differ by one");
    // A picture that is no larger than a tile is decoded as a whole, to the last bit.
    assert_eq!(make(options.vae_tile(128)).0.pictures, whole.pictures);
}

/// SD's VAE at 2048x2048, whose low resolutions are not divided.
#[test]
fn strips_take_less_memory() {
    let config = r#"{"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4,
        "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "norm_num_groups": 32,
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]}"#;
    let config = VaeConfig::parse(config, "config.json".as_ref()).unwrap();
    let cpu = Device::cpu();
    let bytes = |strip: usize| {
        let decoder = Parts::new(&divisible_decoder(&config, 256), 256, strip, |graph| cpu.plan(graph, &[]));
        let encoder = Parts::new(&divisible_encoder(&config, 256), 256, strip, |graph| cpu.plan(graph, &[]));
        [decoder.arena_bytes(), encoder.arena_bytes()]
    };
    let (whole, tiled) = (bytes(256), bytes(16));
    println!("decoder and encoder: {whole:?} bytes whole, {tiled:?} in strips of 128 rows");
    assert!(tiled[0] * 3 < whole[0] && tiled[1] * 5 < whole[1] * 2, "{tiled:?} of {whole:?}");
}

#[test]
fn impossible_tiles_are_refused() {
    for pixels in [0, 63, 8193] {
        let options = EngineOptions::new(Device::cpu()).vae_tile(pixels);
        let error = Engine::open(&source("sd1"), options).err().expect("refused");
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("tiles"), "{error}");
    }
}
