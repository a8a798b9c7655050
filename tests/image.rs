//! Pictures and the text in them.

use std::fs;

use respodiff::ErrorKind;
use respodiff::image::{
    GenerationInfo, JSON_KEYWORD, PARAMETERS_KEYWORD, Picture, UsedConcept, UsedPart, XMP, XMP_KEYWORD, read_png_text,
};

fn info() -> GenerationInfo {
    GenerationInfo {
        prompt: "a cat, a hat".to_string(),
        prompt_2: None,
        negative_prompt_2: None,
        prompt_syntax: None,
        clip_skip: None,
        embeddings: Vec::new(),
        negative_prompt: Some("blurry".to_string()),
        steps: 20,
        sampler: "DPM++ 2M".to_string(),
        spacing: "Karras".to_string(),
        guidance: 7.0,
        guidance_rescale: None,
        guidance_interval: None,
        tuning: respodiff::samplers::Tuning::default(),
        seed: u64::MAX,
        rng: "torch-cuda".to_string(),
        width: 768,
        height: 512,
        original_size: None,
        crop: None,
        model: "v1-5".to_string(),
        model_sha256: Some("6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa".to_string()),
        model_fingerprint: None,
        averages: false,
        parts: vec![],
        device: None,
        init_image: None,
        hires: None,
        given_latents: false,
        precision: None,
        tokenizer: None,
        vae_tile: None,
        reuse: None,
        gate: None,
        concepts: vec![],
        adapters: vec![],
        version: "0.1.0".to_string(),
    }
}

#[test]
fn values_become_bytes_as_in_diffusers() {
    // Two pixels side by side; numpy's `((x / 2 + 0.5).clip(0, 1) * 255).round()` by hand. 0 becomes 127.5, which
    // rounds to the even 128.
    let expected = [0, 128, 0, 255, 191, 255];
    let pixels = [-1.0, 0.0, -7.0, 1.0, 0.5, 9.0];
    let image = Picture::from_hwc(&pixels, 1, 2).unwrap();
    assert_eq!((image.width, image.height), (2, 1));
    assert_eq!(image.rgb, expected);
}

#[test]
fn nan_and_wrong_sizes_make_no_picture() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(Picture::from_hwc(&[0.0, bad, 0.0], 1, 1).is_err_and(|e| e.kind() == ErrorKind::NonFinite));
    }
    for (height, width) in [(1, 2), (0, 0), (usize::MAX, 2), (1 << 33, 1 << 33)] {
        assert!(
            Picture::from_hwc(&[0.0; 3], height, width).is_err_and(|e| e.kind() == ErrorKind::Invalid),
            "{height}x{width}"
        );
    }
}

#[test]
fn png_reads_back_pixels_and_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cat.png");
    let rgb: Vec<u8> = (0..5 * 3 * 3).map(|i| (i * 37 % 256) as u8).collect();
    let image = Picture { width: 5, height: 3, rgb };
    let texts = [("parameters", "caf\u{e9}\nSteps: 1"), ("respodiff", "{\"prompt\":\"\u{732b}\"}"), ("empty", "")];
    image.save_png(&path, &texts).unwrap();

    let mut reader = png::Decoder::new(std::io::BufReader::new(fs::File::open(&path).unwrap())).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let frame = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((frame.width, frame.height, frame.color_type), (5, 3, png::ColorType::Rgb));
    assert_eq!(pixels, image.rgb);
    let chunks = reader.info();
    assert_eq!(chunks.uncompressed_latin1_text[0].text, texts[0].1);
    assert_eq!(chunks.utf8_text[0].keyword, "respodiff");

    let mut read = read_png_text(&path).unwrap();
    read.sort();
    let all = texts.into_iter().chain([(XMP_KEYWORD, XMP)]);
    let mut expected: Vec<_> = all.map(|(keyword, text)| (keyword.to_string(), text.to_string())).collect();
    expected.sort();
    assert_eq!(read, expected);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no partial file stays");
}

#[test]
fn failed_writes_are_errors_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let image = Picture { width: 1, height: 1, rgb: vec![0; 3] };
    let missing = folder.path().join("missing").join("cat.png");
    assert!(image.save_png(&missing, &[]).is_err_and(|e| e.kind() == ErrorKind::NotFound));
    // A folder with the picture's name cannot be replaced.
    let taken = folder.path().join("taken");
    fs::create_dir_all(taken.join("inside")).unwrap();
    assert!(image.save_png(&taken, &[]).is_err_and(|e| e.kind() == ErrorKind::Io));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

    let long = "k".repeat(80);
    for (keyword, text) in [("", "x"), (long.as_str(), "x"), ("\u{732b}", "x"), ("a\0b", "x"), ("a", "x\0y")] {
        assert!(image.to_png(&[(keyword, text)]).is_err_and(|e| e.kind() == ErrorKind::Invalid), "{keyword:?}");
    }
    let short = Picture { width: 2, height: 2, rgb: vec![0; 3] };
    assert!(short.to_png(&[]).is_err_and(|e| e.kind() == ErrorKind::Invalid));
}

#[test]
fn damaged_png_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cat.png");
    assert!(read_png_text(&path).is_err_and(|e| e.kind() == ErrorKind::NotFound));
    let bytes = Picture { width: 1, height: 1, rgb: vec![0; 3] }.to_png(&[("parameters", "x")]).unwrap();
    for length in 0..bytes.len() {
        fs::write(&path, &bytes[..length]).unwrap();
        // The last twelve bytes are the empty end chunk.
        let read = read_png_text(&path);
        assert!(
            read.as_ref().is_err_and(|e| e.kind() == ErrorKind::Damaged),
            "{length} of {} bytes: {read:?}",
            bytes.len()
        );
    }
}

#[test]
fn parameters_are_those_of_a1111() {
    assert_eq!(
        info().parameters(),
        "a cat, a hat\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, \
         Seed: 18446744073709551615, Size: 768x512, Model hash: 6ce0161689, Model: v1-5, RNG: torch-cuda, \
         Version: respodiff 0.1.0"
    );
    let odd = GenerationInfo {
        negative_prompt: Some(String::new()),
        original_size: Some((1024, 768)),
        crop: Some((8, 0)),
        guidance: 7.5,
        model: "a: \"b\", caf\u{e9}".to_string(),
        model_sha256: None,
        model_fingerprint: Some("0a1b".to_string()),
        averages: true,
        parts: [("text_encoder", "clip.pt", None), ("vae", "better.safetensors", Some("735e4c3a447a3255"))]
            .map(|(component, file, sha256)| UsedPart {
                component: component.to_string(),
                file: file.to_string(),
                sha256: sha256.map(str::to_string),
            })
            .to_vec(),
        precision: Some("int8".to_string()),
        tokenizer: Some("slow".to_string()),
        vae_tile: Some(512),
        reuse: Some(3),
        gate: Some(10),
        concepts: [("a woman", 0.5, Some(400.0), "2c3d"), ("a cook", 1.0, None, "4e5f")]
            .map(|(name, weight, until, fingerprint)| UsedConcept {
                name: name.to_string(),
                weight,
                until,
                fingerprint: fingerprint.to_string(),
                file: "file".to_string(),
            })
            .to_vec(),
        ..info()
    };
    assert_eq!(
        odd.parameters(),
        "a cat, a hat\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, \
         Seed: 18446744073709551615, Size: 768x512, Original size: 1024x768, Crop: \"8,0\", \
         Model: \"a: \\\"b\\\", caf\u{e9}\", EMA: true, VAE hash: 735e4c3a44, VAE: better.safetensors, \
         Parts: \"text_encoder: clip.pt\", Model fingerprint: 0a1b, RNG: torch-cuda, Precision: int8, Tokenizer: slow, \
         VAE tile: 512, Reuse: 3, Gate: 10, Concepts: \"a woman:0.5, a cook:1\", Concepts until: \"400, 0\", \
         Concept hashes: \"a woman: 2c3d, a cook: 4e5f\", Version: respodiff 0.1.0"
    );
}

#[test]
fn json_reads_back_through_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cat.png");
    let info = GenerationInfo { prompt: "\u{732b}\nNegative prompt: Steps: 3".to_string(), ..info() };
    let (parameters, json) = (info.parameters(), info.json().unwrap());
    let image = Picture { width: 1, height: 1, rgb: vec![0; 3] };
    image.save_png(&path, &[(PARAMETERS_KEYWORD, &parameters), (JSON_KEYWORD, &json)]).unwrap();
    let texts = read_png_text(&path).unwrap();
    let text = |keyword: &str| &texts.iter().find(|text| text.0 == keyword).unwrap().1;
    assert_eq!(*text("parameters"), parameters);
    assert_eq!(serde_json::from_str::<GenerationInfo>(text("respodiff")).unwrap(), info);

    let unsayable = GenerationInfo { guidance: f32::NAN, ..info };
    assert!(unsayable.json().is_err_and(|e| e.kind() == ErrorKind::NonFinite));
}
