//! Images that begin with a picture, against diffusers' pipelines, and the pictures' way in: files, resizing, masks.

mod support;

use respodiff::image::{Filter, Picture, Region};
use respodiff::{
    Device, Engine, ErrorKind, Image, Output, Prompt, Request, SessionOptions, Size, Source, Start, pictures::InitImage,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, from_str};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use support::{Case, cases, golden, relative_l2};

const SIZE: Size = Size::new(56, 40);

fn engine(checkpoint: &str) -> Engine {
    Engine::open(&Source::folder(golden().join("checkpoints").join(checkpoint)).unwrap(), Device::cpu()).unwrap()
}

fn generate(engine: &Engine, options: SessionOptions, request: &Request) -> respodiff::Result<Output> {
    engine.session(options)?.generate(request, &mut |_| ControlFlow::Continue(()))
}

/// A recorded picture, `[h, w, 3]`, or grey, `[h, w]`.
fn picture(case: &Case, name: &str) -> Arc<Picture> {
    let (shape, bytes) = (case.shape(name), case.bytes(name));
    let rgb = match shape.len() {
        2 => bytes.iter().flat_map(|&grey| [grey; 3]).collect(),
        _ => bytes,
    };
    Arc::new(Picture { width: shape[1] as u32, height: shape[0] as u32, rgb })
}

/// Puts other weights in place of a UNet's first convolution, whose number of input channels changes.
fn widen(unet: &Path, case: &Case) {
    let weights = unet.join("diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (shape, data) = (case.shape("conv_in.weight"), case.raw("conv_in.weight"));
    let views = file.tensors().into_iter().map(|(name, view)| match name.as_str() {
        "conv_in.weight" => (name, TensorView::new(Dtype::F16, shape.clone(), &data).unwrap()),
        _ => (name, view),
    });
    std::fs::write(&weights, safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()).unwrap();
    let config = unet.join("config.json");
    let mut fields: Value = from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    fields["in_channels"] = shape[1].into();
    std::fs::write(config, fields.to_string()).unwrap();
}

/// A copy of a recorded run's checkpoint, with its scheduler and, if it was recorded, its first convolution.
fn checkpoint(case: &Case) -> tempfile::TempDir {
    let meta = case.metadata();
    let folder = match meta["checkpoint"].as_str() {
        // Another VAE, with the other parts of sd1.
        "taesd" => support::copies(&["sd1", "taesd"]),
        name => support::copy(name),
    };
    let mut config: Value = from_str(&meta["scheduler_config"]).unwrap();
    config["_class_name"] = meta["scheduler"].clone().into();
    std::fs::write(folder.path().join("scheduler/scheduler_config.json"), config.to_string()).unwrap();
    if case.has("conv_in.weight") {
        widen(&folder.path().join("unet"), case);
    }
    folder
}

/// The error of a recorded run's latents on a device.
fn error(case: &Case, device: &Device) -> f64 {
    let meta = case.metadata();
    let field = |name: &str| -> Value { from_str(&meta[name]).unwrap() };
    let folder = checkpoint(case);
    let engine = Engine::open(&Source::folder(folder.path()).unwrap(), device).unwrap();
    assert_eq!(engine.reads_masks(), case.has("conv_in.weight"));
    let original = picture(case, "image");
    let strength = field("strength").as_f64().unwrap();
    let init = match case.has("mask") {
        true => InitImage::inpaint(original, picture(case, "mask"), strength),
        false => InitImage::new(original, strength),
    };
    let prompts: Vec<String> = serde_json::from_value(field("prompt")).unwrap();
    let negative: Option<Vec<String>> = serde_json::from_value(field("negative_prompt")).unwrap();
    let guidance = field("guidance_scale").as_f64().unwrap() as f32;
    let image = |(i, prompt): (usize, &String)| {
        let seed = field("seed").as_u64().unwrap() + i as u64;
        let mut image = Image::new(prompt.as_str()).seed(seed).guidance(guidance).start(Start::Image(init.clone()));
        image.negative = negative.as_ref().map(|texts| Prompt::from(texts[i].as_str()));
        image
    };
    let request = Request::new(prompts.iter().enumerate().map(image).collect());
    let request = request.steps(field("steps").as_u64().unwrap() as usize);
    let options = SessionOptions::new(SIZE).batch(prompts.len()).guided(guidance > 1.0);
    let output = generate(&engine, options, &request).unwrap();
    relative_l2(&output.latents, &case.floats("out.latents"))
}

#[test]
fn runs_match_diffusers() {
    for case in cases("init_", 20) {
        let error = error(&case, &Device::cpu());
        println!("{:28} {error:.1e}", case.name);
        assert!(error < 1e-4, "{}: latents are off by {error:.2e}", case.name);
    }
}

/// The same runs on the kernels, within what fp16 costs in whole runs of these checkpoints.
#[cfg(feature = "emulated")]
#[test]
fn runs_on_the_kernels_match_diffusers() {
    for name in ["init_sd1_euler_a", "init_sdxl_euler", "init_sd1_inpaint_lcm", "init_sd1_nine_euler_a", "init_taesd"] {
        let case = cases(name, 1).remove(0);
        let error = error(&case, &support::kernels());
        println!("{name:28} {error:.1e}");
        assert!(error < 2e-2, "{name}: latents are off by {error:.2e}");
    }
}

#[test]
fn resizing_and_grey_match_pillow() {
    let case = cases("resize", 1).remove(0);
    let image = picture(&case, "image");
    assert_eq!(image.lightness(), case.bytes("lightness"));
    for (width, height) in [(56, 40), (9, 30), (11, 5), (23, 6), (64, 17)] {
        let resized = image.resized(width, height, Filter::Lanczos);
        assert!(resized.rgb == case.bytes(&format!("{width}x{height}")), "{width}x{height}");
    }
}

/// A PNG file of these samples.
fn png(size: (u32, u32), color: png::ColorType, depth: png::BitDepth, samples: &[u8], exif: &[u8]) -> Vec<u8> {
    let mut info = png::Info::with_size(size.0, size.1);
    (info.color_type, info.bit_depth) = (color, depth);
    if color == png::ColorType::Indexed {
        info.palette = Some(vec![10, 20, 30, 200, 100, 50].into());
        info.trns = Some(vec![255, 0].into());
    }
    if !exif.is_empty() {
        info.exif_metadata = Some(exif.to_vec().into());
    }
    let mut bytes = Vec::new();
    let mut writer = png::Encoder::with_info(&mut bytes, info).unwrap().write_header().unwrap();
    writer.write_image_data(samples).unwrap();
    writer.finish().unwrap();
    bytes
}

#[test]
fn every_kind_of_png_is_read() {
    use png::BitDepth::*;
    use png::ColorType::*;
    let read = |color, depth, samples: &[u8], background| {
        Picture::decode(&png((2, 1), color, depth, samples, &[]), background, Path::new("x")).unwrap().rgb
    };
    assert_eq!(read(Rgb, Eight, &[1, 2, 3, 4, 5, 6], 255), [1, 2, 3, 4, 5, 6]);
    // The high byte of 16 bits.
    assert_eq!(read(Rgb, Sixteen, &[1, 99, 2, 99, 3, 99, 4, 99, 5, 99, 6, 99], 255), [1, 2, 3, 4, 5, 6]);
    assert_eq!(read(Grayscale, One, &[0b0100_0000], 255), [0, 0, 0, 255, 255, 255]);
    // Half of 100 over 255 is 177.5, and a fifth of 100 over 0 is 20.
    assert_eq!(read(GrayscaleAlpha, Eight, &[100, 128, 7, 0], 255), [177, 177, 177, 255, 255, 255]);
    assert_eq!(read(Rgba, Eight, &[100, 50, 0, 51, 9, 9, 9, 255], 0), [20, 10, 0, 9, 9, 9]);
    // A palette whose second colour is transparent.
    assert_eq!(read(Indexed, Eight, &[0, 1], 255), [10, 20, 30, 255, 255, 255]);
}

/// EXIF says which edge of the shown picture the stored first row and the stored first column are.
#[test]
fn pictures_are_turned_upright() {
    let (w, h) = (3usize, 2usize);
    let samples: Vec<u8> = (0..w * h).map(|i| 10 + i as u8).collect();
    let edges = [
        "top left",
        "top right",
        "bottom right",
        "bottom left",
        "left top",
        "right top",
        "right bottom",
        "left bottom",
    ];
    for (i, edges) in edges.iter().enumerate() {
        let orientation = i as u8 + 1;
        let little =
            [&b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0"[..], &[orientation, 0, 0, 0, 0, 0, 0, 0]].concat();
        let big = [&b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"[..], &[0, orientation, 0, 0, 0, 0, 0, 0]].concat();
        for exif in [little, big] {
            let file = png((w as u32, h as u32), png::ColorType::Grayscale, png::BitDepth::Eight, &samples, &exif);
            let shown = Picture::decode(&file, 255, Path::new("x")).unwrap();
            let (row, column) = edges.split_once(' ').unwrap();
            let along =
                |edge: &str, i: usize, len: usize| if ["top", "left"].contains(&edge) { i } else { len - 1 - i };
            for (i, &sample) in samples.iter().enumerate() {
                // Rows follow one another away from the edge of the first row.
                let (a, b) = (along(row, i / w, h), along(column, i % w, w));
                let (x, y) = if ["top", "bottom"].contains(&row) { (b, a) } else { (a, b) };
                let at = (y * shown.width as usize + x) * 3;
                assert_eq!(shown.rgb[at], sample, "orientation {orientation}, sample {i}");
            }
        }
    }
}

#[test]
fn what_is_no_picture_is_refused() {
    let whole = png((9, 7), png::ColorType::Rgb, png::BitDepth::Eight, &[77; 9 * 7 * 3], &[]);
    let mut absurd = whole.clone();
    // 100,000 columns and rows, with the checksum of such a header.
    absurd[16..24].copy_from_slice(&[0, 1, 0x86, 0xa0, 0, 1, 0x86, 0xa0]);
    let crc = crc32(&absurd[12..29]);
    absurd[29..33].copy_from_slice(&crc.to_be_bytes());
    for (bytes, word) in [
        (&b""[..], "empty"),
        (b"GIF89a", "GIF"),
        (b"BM....", "BMP"),
        (b"\0\0\0\x20ftypavif", "AVIF"),
        (b"hello", "not a PNG, JPEG or WebP"),
        (&whole[..60], "cannot be read"),
        (b"\xff\xd8\xff\xe0 and no more", "cut off"),
        (b"RIFF\x08\0\0\0WEBPVP8 ", "cannot be read"),
        (&absurd, "100000x100000 pixels"),
    ] {
        let error = Picture::decode(bytes, 255, Path::new("x.png")).unwrap_err();
        assert!(error.to_string().contains(word) && error.to_string().contains("x.png"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Damaged);
    }
}

/// The checksum of PNG's chunks.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

#[test]
fn regions_surround_the_mask() {
    let mask = |w: u32, h: u32, light: &[(u32, u32)]| {
        let mut mask = Picture { width: w, height: h, rgb: vec![127; (w * h * 3) as usize] };
        light.iter().for_each(|(x, y)| mask.rgb[((y * w + x) * 3) as usize..][..3].fill(128));
        mask
    };
    let region = |left, top, width, height| Some(Region { left, top, width, height });
    assert_eq!(Region::around(&mask(8, 8, &[]), 9, (8, 8)), None);
    // Two pixels three columns apart: 4x1, square 4x4, rows 8 to 12.
    let far = mask(100, 50, &[(20, 10), (23, 10)]);
    assert_eq!(Region::around(&far, 0, (64, 64)), region(20, 9, 4, 4));
    assert_eq!(Region::around(&far, 5, (64, 64)), region(15, 4, 14, 14));
    // Twice as wide as high.
    assert_eq!(Region::around(&far, 5, (64, 32)), region(11, 5, 22, 11));
    // The picture's edges: the region is shifted, and cut where it would be higher than the picture.
    assert_eq!(Region::around(&mask(100, 50, &[(0, 0), (9, 1)]), 0, (64, 64)), region(0, 0, 10, 10));
    assert_eq!(Region::around(&mask(100, 50, &[(20, 10), (99, 49)]), 0, (64, 64)), region(20, 0, 80, 50));
    // What is dark in the mask comes back as it was, and the rest from the painted region.
    let picture = mask(10, 8, &[(2, 3)]);
    let light = mask(10, 8, &[(4, 4), (5, 4)]);
    let mut light = light;
    light.rgb.iter_mut().for_each(|x| *x = if *x > 127 { 255 } else { 0 });
    let painted = Picture { width: 16, height: 16, rgb: vec![9; 16 * 16 * 3] };
    let region = Region::around(&light, 1, (16, 16)).unwrap();
    let whole = region.put_back(&painted, &picture, &light);
    for i in 0..80 {
        let expected = if light.rgb[3 * i] > 0 { 9 } else { picture.rgb[3 * i] };
        assert_eq!(whole.rgb[3 * i], expected, "pixel {i}");
    }
}

#[test]
fn impossible_beginnings_are_refused() {
    let engine = engine("sd1");
    let picture = Arc::new(Picture { width: 30, height: 20, rgb: vec![90; 30 * 20 * 3] });
    let encoded = engine.encode_picture(&picture, None, SIZE).unwrap();
    let other = Engine::open(&Source::folder(golden().join("checkpoints/sd1")).unwrap(), Device::cpu()).unwrap();
    let foreign = other.encode_picture(&picture, None, SIZE).unwrap();
    let larger = engine.encode_picture(&picture, None, Size::new(64, 40)).unwrap();
    let short = Arc::new(Picture { width: 30, height: 20, rgb: vec![90; 30] });
    let options = SessionOptions::new(SIZE);
    let go = |init: InitImage, options| {
        let image = Image::new("a doctor").guidance(1.0).start(Start::Image(init));
        generate(&engine, options, &Request::from(image).steps(4))
    };
    for (init, kind, word) in [
        (InitImage::new(picture.clone(), 1.01), ErrorKind::Invalid, "strength: 1.01"),
        (InitImage::new(picture.clone(), f64::NAN), ErrorKind::Invalid, "strength: NaN"),
        (InitImage::new(picture.clone(), 0.24), ErrorKind::Invalid, "none of 4 steps"),
        (InitImage::new(short.clone(), 0.5), ErrorKind::Invalid, "30x20 pixels"),
        (InitImage::inpaint(picture.clone(), short, 0.5), ErrorKind::Invalid, "mask: "),
        (InitImage::encoded(foreign, 0.5), ErrorKind::Mismatch, "another engine"),
        (InitImage::encoded(larger, 0.5), ErrorKind::Mismatch, "64x40"),
        (InitImage::new(picture.clone(), 0.5).noise([0.0; 3].into()), ErrorKind::Invalid, "3 numbers"),
    ] {
        let error = go(init, options).expect_err(word);
        assert!(error.kind() == kind && error.to_string().contains(word), "{error}");
    }
    // A picture that was encoded before is the picture, and the seed's noise may be given.
    let latents = |init| go(init, options).unwrap().latents;
    assert_eq!(latents(InitImage::encoded(encoded.clone(), 0.5)), latents(InitImage::new(picture, 0.5)));
    let mut drawn = vec![0.0; 4 * 5 * 7];
    let mut generator = respodiff::diffusion::noise::NormalGenerator::new(respodiff::samplers::Rng::TorchCpu, 0);
    (0..2).for_each(|_| generator.fill(&mut drawn));
    let given = InitImage::encoded(encoded.clone(), 0.5).noise(drawn.into());
    assert_eq!(latents(given), latents(InitImage::encoded(encoded.clone(), 0.5)));
    // Images that end at different steps cannot reuse each other's activations.
    let image = |strength| Image::new("a").start(Start::Image(InitImage::encoded(encoded.clone(), strength)));
    let error = generate(&engine, options.batch(2).reuse(2), &Request::new(vec![image(0.5), image(1.0)]).steps(4));
    assert!(error.is_err_and(|error| error.to_string().contains("reuse")));
}

/// An inpainting model without a picture paints on an empty canvas: as with a grey picture and a mask that is light
/// everywhere.
#[test]
fn inpainting_models_draw_from_noise() {
    let case = cases("init_sd1_nine", 2).remove(0);
    let folder = checkpoint(&case);
    let engine = Engine::open(&Source::folder(folder.path()).unwrap(), Device::cpu()).unwrap();
    let [grey, white] = [128, 255].map(|x| Arc::new(Picture { width: 8, height: 8, rgb: vec![x; 192] }));
    let image = |start| Image::new("a doctor").seed(5).start(start);
    let latents =
        |start| generate(&engine, SessionOptions::new(SIZE), &Request::from(image(start)).steps(3)).unwrap().latents;
    let plain = latents(Start::Noise);
    assert_eq!(plain, latents(Start::Image(InitImage::inpaint(grey.clone(), white, 1.0))));
    // Without a mask it paints everywhere, over the picture.
    assert_ne!(plain, latents(Start::Image(InitImage::new(grey, 0.7))));
}
