//! Checkpoints with parts from elsewhere, and `respodiff convert`.

use super::{files, respodiff, support, text};

/// A picture of a checkpoint with another VAE says so, and is made again from its record.
#[test]
fn parts_are_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let golden = |path: &str| support::golden().join("checkpoints").join(path).to_str().unwrap().to_string();
    let run = |args: &[&str]| {
        let output = respodiff(folder.path(), args);
        (output.status.success(), text(&output.stderr))
    };
    let (model, vae) = (golden("sd1"), golden("sdxl/vae"));
    std::fs::create_dir(folder.path().join("other")).unwrap();
    for name in ["config.json", "diffusion_pytorch_model.safetensors"] {
        std::fs::copy(format!("{vae}/{name}"), folder.path().join("other").join(name)).unwrap();
    }
    let make = ["sample", "a cat", "--model", &model, "--steps", "2", "--seed", "1", "-q", "-o"];
    let (made, problem) = run(&[&make[..], &["plain.png"]].concat());
    assert!(made, "{problem}");
    let (made, problem) = run(&[&make[..], &["x.png", "--vae", "other"]].concat());
    assert!(made, "{problem}");
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert_ne!(read("plain.png"), read("x.png"));
    let tags = respodiff::image::read_png_text(&folder.path().join("x.png")).unwrap();
    let tag = |keyword: &str| &tags.iter().find(|(k, _)| k == keyword).unwrap().1;
    let info: serde_json::Value = serde_json::from_str(tag("respodiff")).unwrap();
    let part = &info["parts"][0];
    assert_eq!((part["component"].as_str(), part["file"].as_str()), (Some("vae"), Some("other")), "{info}");
    let hash = part["sha256"].as_str().unwrap();
    assert!(tag("parameters").contains(&format!("VAE hash: {}, VAE: other", &hash[..10])), "{}", tag("parameters"));
    let (_, told) = run(&["rerun", "x.png", "--model", &model]);
    assert!(told.contains("the same picture"), "{told}");
    std::fs::copy(
        support::golden().join("checkpoints/sd1/vae/diffusion_pytorch_model.safetensors"),
        folder.path().join("other/diffusion_pytorch_model.safetensors"),
    )
    .unwrap();
    let (made, problem) = run(&["rerun", "x.png", "--model", &model]);
    assert!(!made && problem.contains("other weights than the picture's vae"), "{problem}");
}

/// Moving averages beside the UNet are taken if asked for, and the record says so.
#[test]
fn averages_are_recorded() {
    let folder = support::copy("sd1");
    let unet = |name: &str| folder.path().join(name);
    std::fs::rename(unet("unet"), unet("unet_ema")).unwrap();
    std::fs::create_dir(unet("unet")).unwrap();
    std::fs::copy(unet("unet_ema/config.json"), unet("unet/config.json")).unwrap();
    let run = |args: &[&str]| text(&respodiff(folder.path(), args).stderr);
    let make = ["sample", "a cat", "--model", ".", "--steps", "2", "--seed", "1", "-q", "-o", "x.png"];
    assert!(run(&make).contains("no diffusion_pytorch_model.safetensors"));
    assert_eq!(run(&[&make[..], &["--ema"]].concat()), "");
    let tags = respodiff::image::read_png_text(&folder.path().join("x.png")).unwrap();
    assert!(tags.iter().any(|(_, value)| value.contains("EMA: true")), "{tags:?}");
    let told = run(&["rerun", "x.png", "--model", "."]);
    assert!(told.contains("the same picture"), "{told}");
}

/// UNets whose pictures cannot be made here, or not by themselves, are still described.
#[test]
fn unusual_networks_are_described() {
    let folder = tempfile::tempdir().unwrap();
    for (name, words) in [
        ("small", "for inpainting, distilled, without a middle block"),
        ("ssd", "SDXL, distilled"),
        ("lcm", "without a middle block, reads the guidance scale"),
    ] {
        let model = support::golden().join("checkpoints").join(name);
        let output = respodiff(folder.path(), &["info", "--model", model.to_str().unwrap()]);
        let told = text(&output.stdout);
        assert!(told.contains(words) && told.contains("weights"), "{told}");
    }
}

#[test]
fn checkpoints_are_written_anew() {
    let folder = tempfile::tempdir().unwrap();
    let model = support::golden().join("checkpoints/sd2");
    let convert = |args: &[&str]| {
        let output = respodiff(folder.path(), &[&["convert", model.to_str().unwrap()], args].concat());
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    assert_eq!(convert(&["out", "--dtype", "fp32"]), (Some(0), "out\n".into(), String::new()));
    for (args, code, words) in [
        (&["out"][..], 2, "is there already"),
        (&["x", "--dtype", "fp8"], 2, "--dtype: `fp8` is no number format; give fp16, bf16 or fp32"),
        (&["x.safetensors"], 1, "convert it to a folder"),
        (&["x", "--ema"], 1, "no moving averages"),
        (&["x", "--vae", "nowhere"], 1, "nowhere: cannot open"),
    ] {
        let (status, _, problem) = convert(args);
        assert!(status == Some(code) && problem.contains(words) && problem.lines().count() == 1, "{problem}");
    }
    assert_eq!(files(folder.path()), ["out"]);
}
