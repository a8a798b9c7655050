//! `--lora` in `sample`, `rerun`, `train`, `probe` and `info`.

use super::{respodiff, tensors, text};
use crate::support;
use std::path::Path;

fn golden(name: &str) -> String {
    support::golden().join(name).display().to_string()
}

fn parameters(picture: &Path) -> String {
    let tags = respodiff::image::read_png_text(picture).unwrap();
    tags.into_iter().find(|(key, _)| key == "parameters").unwrap().1
}

#[test]
fn pictures_with_adapters_are_made_again() {
    let (folder, model) = (tempfile::tempdir().unwrap(), golden("checkpoints/sd1"));
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(path("loras/in")).unwrap();
    std::fs::copy(golden("adapters/sd1_kohya.safetensors"), path("loras/in/style, 1.safetensors")).unwrap();
    std::fs::copy(golden("adapters/sd1_loha.safetensors"), path("more.safetensors")).unwrap();
    let base = ["sample", "a cat", "--steps", "2", "--seed", "4", "--model", &model, "-q", "-o"];
    let make = |out: &str, more: &[&str]| {
        let output = respodiff(folder.path(), &[&base[..], &[out], more].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        std::fs::read(path(out)).unwrap()
    };
    let plain = make("plain.png", &[]);
    let loras = ["--lora-folder", "loras", "--lora", "style, 1:0.5", "--lora", "more.safetensors:-0.25"];
    make("x.png", &loras);
    let written = parameters(&path("x.png"));
    let hash = |name: &str| respodiff::weights::Adapter::load(path(name)).unwrap().hash().to_string();
    let hashes = format!(
        "Lora hashes: \"style 1: {}, more: {}\"",
        hash("loras/in/style, 1.safetensors"),
        hash("more.safetensors")
    );
    assert!(written.contains(&hashes), "{hashes} is not in {written}");
    assert!(written.contains("Loras: \"style 1:0.5, more:-0.25\""), "{written}");
    assert!(!parameters(&path("plain.png")).contains("Lora"));

    let again = respodiff(folder.path(), &["rerun", "x.png", "--model", &model]);
    assert!(text(&again.stderr).contains("the same picture, to the last bit"), "{}", text(&again.stderr));
    assert_eq!(std::fs::read(path("x.png")).unwrap(), std::fs::read(path("x-again.png")).unwrap());
    // At weight 0 the pixels are those without an adapter.
    make("zero.png", &["--lora", "more.safetensors:0"]);
    let pixels = |bytes: &[u8]| {
        let start = bytes.windows(4).position(|chunk| chunk == b"IDAT").unwrap();
        bytes[start..].to_vec()
    };
    assert_eq!(pixels(&std::fs::read(path("zero.png")).unwrap()), pixels(&plain));
    assert_ne!(pixels(&std::fs::read(path("x.png")).unwrap()), pixels(&plain));

    std::fs::copy(golden("adapters/sd1_kohya.safetensors"), path("more.safetensors")).unwrap();
    let again = respodiff(folder.path(), &["rerun", "x.png", "--model", &model]);
    assert!(text(&again.stderr).contains("holds another adapter than the picture's `more`"), "{}", text(&again.stderr));
    std::fs::remove_file(path("more.safetensors")).unwrap();
    let again = respodiff(folder.path(), &["rerun", "x.png", "--model", &model]);
    assert!(text(&again.stderr).contains("that the picture was made with is not here"), "{}", text(&again.stderr));
    // An adapter is not overwritten by a picture of its name.
    std::fs::copy(golden("adapters/sd1_loha.safetensors"), path("a.png")).unwrap();
    let output = respodiff(folder.path(), &[&base[..], &["a.png", "--lora", "a.png"]].concat());
    assert!(text(&output.stderr).contains("would be overwritten"), "{}", text(&output.stderr));
}

/// A tag in a prompt does what the flag does.
#[test]
fn prompts_name_adapters() {
    let (folder, model, loras) = (tempfile::tempdir().unwrap(), golden("checkpoints/sd1"), golden("adapters"));
    let base = ["--steps", "2", "--seed", "4", "--model", &model, "-q", "--prompt-syntax", "a1111"];
    let base = [&base[..], &["--lora-folder", &loras]].concat();
    let run = |first: &[&str], more: &[&str]| respodiff(folder.path(), &[&["sample"], first, &base[..], more].concat());
    let picture = |name: &str, first: &[&str], more: &[&str]| {
        let output = run(&[first, &["-o", name]].concat(), more);
        assert!(output.status.success(), "{}", text(&output.stderr));
        std::fs::read(folder.path().join(name)).unwrap()
    };
    let flags = ["--lora", "sd1_kohya:0.5", "--lora", "sd1_loha"];
    let by_flags = picture("a.png", &["a (cat:1.2)"], &flags);
    let by_tags = picture("b.png", &["a (cat:1.2) <lora:sd1_kohya:0.5><lora:sd1_loha>"], &[]);
    assert!(
        by_flags == by_tags,
        "{}\n{}",
        parameters(&folder.path().join("a.png")),
        parameters(&folder.path().join("b.png"))
    );
    assert_ne!(by_flags, picture("c.png", &["a (cat:1.2) <lora:sd1_loha>"], &[]));
    let again = respodiff(folder.path(), &["rerun", "b.png", "--model", &model]);
    assert!(text(&again.stderr).contains("the same picture, to the last bit"), "{}", text(&again.stderr));
    std::fs::write(folder.path().join("p.txt"), "a cat <lora:sd1_kohya>\na dog\n").unwrap();
    for (prompt, words) in [
        (&["a cat <lora:none>"][..], "no adapter called `none` is in this folder"),
        (&["--prompts", "p.txt"], "prompts ask for different LoRAs"),
        (&["a cat <lora:sd1_kohya:much>"], "no number as its weight"),
    ] {
        let output = run(prompt, &[]);
        let error = text(&output.stderr);
        assert!(!output.status.success() && error.contains(words), "{prompt:?}: {error}");
    }
}

#[test]
fn adapters_that_cannot_be_used() {
    let (folder, model) = (tempfile::tempdir().unwrap(), golden("checkpoints/sd1"));
    let lora = golden("adapters/sd1_kohya.safetensors");
    for (value, code, words) in [
        (format!("{lora}:nan"), 2, "--lora: "),
        (format!("{lora}:high"), 2, "`high` is not a finite weight"),
        (format!("{lora}:1e30"), 2, "--lora: with them, tensor"),
        (r"C:\loras\none.safetensors".into(), 1, r"C:\loras\none.safetensors: cannot open"),
        (r"C:\loras\none.safetensors:0.8".into(), 1, r"C:\loras\none.safetensors: cannot open"),
        ("none.safetensors:0.8".into(), 1, "none.safetensors: cannot open"),
        (golden("adapters/sdxl_lokr.safetensors"), 1, "made for a UNet that reads text of width"),
        (golden("checkpoints/sd1"), 1, "checkpoints/sd1: "),
        (golden("adapters/sd1_kohya.safetensors").replace(".safetensors", ""), 1, "cannot open"),
    ] {
        let args = ["sample", "a cat", "--model", &model, "--steps", "1", "--lora", &value];
        let output = respodiff(folder.path(), &args);
        let error = text(&output.stderr);
        assert!(error.contains(words) && output.status.code() == Some(code), "{value}: {error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{value}");
    }
    let args = ["sample", "a cat", "--model", &model, "--lora", "none:1", "--lora-folder", &golden("adapters")];
    let error = text(&respodiff(folder.path(), &args).stderr);
    assert!(error.contains("no adapter called `none` is in this folder; it holds sd1_"), "{error}");
}

#[test]
fn adapters_are_described_and_probed() {
    let folder = tempfile::tempdir().unwrap();
    let lora = golden("adapters/sd1_dora_outputs.safetensors");
    let output = respodiff(folder.path(), &["info", "--lora", &lora]);
    let told = text(&output.stdout);
    for line in ["layers     15 DoRA, 15 LoRA", "networks   3 text_encoder, 12 unet", "rank       2", "scale      0.5"]
    {
        assert!(told.contains(line), "no `{line}` in {told}{}", text(&output.stderr));
    }
    let output = respodiff(folder.path(), &["info", "--lora", &lora, "--json"]);
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&told["kinds"]["DoRA"], &told["text_width"]), (&15.into(), &32.into()), "{told}");

    let model = golden("checkpoints/sd1");
    let probe = |out: &str, more: &[&str]| {
        let args = ["probe", "text", "--model", &model, "--prompt", "a cat", "--output", out];
        let output = respodiff(folder.path(), &[&args[..], more].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        tensors(&folder.path().join(out)).remove("last_hidden_state").unwrap().1
    };
    let (plain, changed) = (probe("a.st", &[]), probe("b.st", &["--lora", &lora]));
    assert!(support::relative_l2(&changed, &plain) > 0.01);
    let args = ["probe", "vae-decode", "--inputs", "a.st", "--output", "c.st", "--model", &model, "--lora", &lora];
    let error = text(&respodiff(folder.path(), &args).stderr);
    assert!(error.contains("--lora: adapters are for networks that they change"), "{error}");
}

/// A concept is trained on the weights that adapters change, its file says so, and other weights give a warning.
#[test]
fn concepts_know_the_adapters_that_they_were_trained_with() {
    let (folder, model) = (tempfile::tempdir().unwrap(), golden("checkpoints/sd1"));
    let loras = ["--lora", &format!("{}:0.5", golden("adapters/sd1_kohya.safetensors"))];
    let run = |args: &[&str]| {
        let output = respodiff(folder.path(), &[args, &["--model", &model]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stderr).to_string()
    };
    let train = ["train", "--target", "a woman", "--iterations", "2", "--batch", "1", "--sheet", "2", "--out"];
    run(&[&train[..], &["with.safetensors"], &loras].concat());
    run(&[&train[..], &["without.safetensors"]].concat());
    let load = |name: &str| respodiff::Concept::load(folder.path().join(name)).unwrap();
    let (with, without) = (load("with.safetensors"), load("without.safetensors"));
    assert_ne!(with.fingerprint(), without.fingerprint());
    assert!(without.metadata.adapters.is_empty());
    assert_eq!(with.metadata.adapters[0].weight, 0.5);
    let shown = respodiff(folder.path(), &["concept", "show", "with.safetensors"]);
    assert!(text(&shown.stdout).contains("sd1_kohya:0.5"), "{}", text(&shown.stdout));

    let sample = ["sample", "a person", "--steps", "1", "-o", "x.png", "--concept"];
    assert!(!run(&[&sample[..], &["without.safetensors"]].concat()).contains("was trained on"));
    assert!(!run(&[&sample[..], &["with.safetensors"], &loras].concat()).contains("was trained on"));
    let warned = run(&[&sample[..], &["with.safetensors"]].concat());
    assert!(warned.contains("with sd1_kohya:0.5, not on "), "{warned}");
    let warned = run(&[&sample[..], &["without.safetensors"], &loras].concat());
    assert!(warned.contains("not on ") && warned.contains("with sd1_kohya:0.5; look"), "{warned}");
}
