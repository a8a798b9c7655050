//! `respodiff rerun`.

use super::{respodiff, text};
use std::path::Path;

#[test]
fn pictures_are_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let make = ["sample", "a doctor", "--steps", "2", "--seed", "4", "--batch", "2", "--balance", "woman,man"];
    let make = [&make[..], &["--concepts-until", "400", "--reuse", "2", "-o", "x.png", "-q"]].concat();
    let make = [&make[..], &["--height", "96", "--vae-tile", "64"]].concat();
    let output = respodiff(folder.path(), &make);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = respodiff(folder.path(), &["rerun", "x-1.png"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("the same picture"), "{}", text(&output.stderr));
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert_eq!(read("x-1.png"), read("x-1-again.png"));
    // The picture's record holds hashes of the model and of the concepts.
    let tags = respodiff::image::read_png_text(&folder.path().join("x-1.png")).unwrap();
    let info: serde_json::Value =
        serde_json::from_str(&tags.iter().find(|(k, _)| k == "respodiff").unwrap().1).unwrap();
    assert_eq!(info["model_sha256"].as_str().unwrap().len(), 64);
    assert!(info["model_fingerprint"].is_string() && info["concepts"][0]["fingerprint"].is_string(), "{info}");
    let parameters = &tags.iter().find(|(k, _)| k == "parameters").unwrap().1;
    for field in ["Model hash: ", "Model fingerprint: ", "Concepts until: 400", "VAE tile: 64", "Concept hashes: "] {
        assert!(parameters.contains(field), "{field} is not in {parameters}");
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints/sd1");
    let output = respodiff(folder.path(), &["rerun", "x-1.png", "--model", golden.to_str().unwrap()]);
    assert!(text(&output.stderr).contains("SHA-256"), "{}", text(&output.stderr));
    let output = respodiff(folder.path(), &["sample", "x", "--concept", "nobody"]);
    assert!(text(&output.stderr).contains("woman"), "{}", text(&output.stderr));
}

#[test]
fn a_picture_with_a_gate_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    for (name, gate) in [("whole.png", &[][..]), ("gated.png", &["--gate", "1"])] {
        let make = [&["sample", "a doctor", "--steps", "3", "--seed", "4", "-o", name, "-q"], gate].concat();
        let output = respodiff(folder.path(), &make);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    let output = respodiff(folder.path(), &["rerun", "gated.png"]);
    assert!(text(&output.stderr).contains("the same picture"), "{}", text(&output.stderr));
    let pixels = |name| respodiff::Picture::read(&folder.path().join(name), 0).unwrap();
    assert_ne!(pixels("whole.png"), pixels("gated.png"));
}

/// Every sampler with every spacing is found again, including those that have the same name in the record.
#[test]
fn every_sampler_is_found_in_the_record() {
    let folder = tempfile::tempdir().unwrap();
    let samplers =
        ["DDIM", "PNDM", "Euler", "Euler a", "DPM++ 2M", "UniPC", "LCM", "DPM2 a", "DPM++ 2M SDE", "Euler CFG++"];
    let spacings = ["leading", "trailing", "linspace", "karras", "exponential", "ays", "sgm-uniform"];
    for sampler in samplers {
        for spacing in std::iter::once(None).chain(spacings.map(Some)) {
            let mut args = vec!["sample", "a cook", "--steps", "2", "--sampler", sampler, "-q", "-o", "x.png"];
            // Every number that is recorded, where the sampler has it.
            if sampler == "DPM2 a" {
                args.extend(["--eta", "0.5", "--s-noise", "1.1", "--guidance-rescale", "0.5"]);
                args.extend(["--guidance-interval", "900,100"]);
            }
            if let Some(spacing) = spacing {
                args.extend(["--spacing", spacing]);
            }
            if !respodiff(folder.path(), &args).status.success() {
                assert!(spacing.is_some(), "{sampler} is refused");
                continue;
            }
            let output = respodiff(folder.path(), &["rerun", "x.png"]);
            assert!(
                text(&output.stderr).contains("the same picture"),
                "{sampler} {spacing:?}: {}",
                text(&output.stderr)
            );
        }
    }
}

/// A PNG with A1111's text alone gives the picture of these settings.
#[test]
fn texts_of_a1111_are_followed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let text_of = |settings: &str| format!("a cook\nNegative prompt: hat\n{settings}");
    let write = |settings: &str| {
        let picture = respodiff::Picture { width: 1, height: 1, rgb: vec![0; 3] };
        picture.save_png(&at("foreign.png"), &[("parameters", &text_of(settings))]).unwrap();
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model");
        respodiff(folder.path(), &["rerun", "foreign.png", "--model", demo.to_str().unwrap()])
    };
    let settings = "Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4, Seed: 7, Size: 64x64";
    let output = write(&format!("{settings}, Model hash: 1234567890, Model: mine, Clip skip: 2, Version: v1.9"));
    let error = text(&output.stderr);
    assert!(
        output.status.success() && error.contains("not honoured: Clip skip") && error.contains("`mine`"),
        "{error}"
    );
    let args = ["sample", "a cook", "-n", "hat", "--steps", "3", "--sampler", "DPM++ 2M Karras", "--guidance", "4"];
    let args =
        [&args[..], &["-s", "7", "--rng", "torch-cuda", "-W", "64", "-H", "64", "-o", "same.png", "-q"]].concat();
    assert!(respodiff(folder.path(), &args).status.success());
    let pixels = |name: &str| respodiff::Picture::read(&at(name), 255).unwrap();
    assert!(pixels("same.png") == pixels("foreign-again.png"));
    for (bad, word) in [
        ("Steps: 3, CFG scale: 4, Seed: 7, Size: 64x64", "no `Sampler`"),
        ("Steps: 3, Sampler: Euler, CFG scale: 4, Seed: 7, Size: 64", "`Size`"),
        ("Steps: x, Sampler: Euler, CFG scale: 4, Seed: 7, Size: 64x64", "`Steps`"),
        ("Steps: 3, Sampler: nonsense, CFG scale: 4, Seed: 7, Size: 64x64", "nonsense"),
        ("Steps: 3", "no `Size`"),
        ("hat: 3", "no record"),
    ] {
        let output = write(bad);
        let error = text(&output.stderr);
        assert!(!output.status.success() && error.contains(word) && !error.contains("panicked"), "{bad}: {error}");
    }
}

#[test]
fn checkpoints_are_found_and_other_formats_written() {
    let folder = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints/sd1");
    let golden = golden.to_str().unwrap();
    let make = ["sample", "a cat", "--model", golden, "--steps", "1", "-W", "64", "-H", "64", "-q", "-o", "x.png"];
    assert!(respodiff(folder.path(), &make).status.success());
    // The record has only the name of the checkpoint's folder, which is not found from another folder.
    let output = respodiff(folder.path(), &["rerun", "x.png"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("--model"), "{}", text(&output.stderr));
    for out in ["-", "new/", "."] {
        let output = respodiff(folder.path(), &["rerun", "x.png", "--model", golden, "-o", out]);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("--out"), "{}", text(&output.stderr));
    }
    let output = respodiff(folder.path(), &["rerun", "x.png", "--model", golden, "-o", "y.jpg"]);
    assert!(text(&output.stderr).contains("the same picture"), "{}", text(&output.stderr));
    assert!(std::fs::read(folder.path().join("y.jpg")).unwrap().starts_with(b"\xff\xd8\xff"));
    let output = respodiff(folder.path(), &["rerun", "x.png", "--model", golden, "--quiet"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
}
