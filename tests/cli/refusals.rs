//! Arguments that cannot work are refused in one line, with an exit code, before anything is written.

use super::{files, respodiff, text};

#[test]
fn refuses_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    for (args, code, word) in [
        (&["sample", "x", "--width", "63"][..], 2, "64"),
        (&["sample", "x", "--steps", "0"], 2, "steps"),
        (&["sample", "x", "--threads", "0"], 2, "threads"),
        (&["sample", "x", "--batch", "0"], 2, "batch"),
        (&["sample", "x", "--batch", "0", "--images", "3"], 2, "batch"),
        (&["sample", "x", "--batch", "18446744073709551615"], 2, "18446744073709551615"),
        (&["sample", "x", "--images", "0"], 2, "images"),
        (&["sample", "x", "--scheduler", "nonsense"], 2, "DDIM"),
        (&["sample", "x", "--spacing", "nonsense"], 2, "karras"),
        (&["sample", "x", "--guidance", "NaN"], 2, "guidance"),
        (&["sample", "x", "--guidance-rescale", "2"], 2, "--guidance-rescale"),
        (&["sample", "x", "--guidance-interval", "5"], 2, "comma"),
        (&["sample", "x", "--sampler", "Euler", "--eta", "1"], 2, "--eta"),
        (&["sample", "x", "--sampler", "DDIM", "--step-noise", "fresh"], 2, "--step-noise"),
        (&["sample", "x", "--preset", "lightning-4"], 2, "SDXL"),
        (&["sample", "x", "--preset", "lcm", "--spacing", "karras"], 2, "--spacing"),
        (&["sample", "x", "--preset", "nonsense"], 2, "hyper-8"),
        (&["sample", "x", "--reuse", "0"], 2, "--reuse"),
        (&["sample", "x", "--gate", "0"], 2, "--gate"),
        (&["sample", "x", "--gate", "3", "--reuse", "2"], 2, "--gate"),
        (&["sample", "x", "--rng", "dice"], 2, "torch-cpu"),
        (&["sample", "x", "--device", "cuda"], 1, "CPU"),
        (&["sample", "x", "--out", "/dev/null/x.png"], 1, "/dev/null"),
        (&["sample", "x", "--out", "{seed}/{i}.png"], 2, "folder"),
        (&["sample", "x", "--out", "{seed.png"], 2, "not closed"),
        (&["sample", "x", "--balance", "woman,"], 2, "no concept"),
        (&["sample", "x", "--concept", "woman", "--concepts-until", "-5"], 2, "0 to 1000"),
        (&["concept", "calibrate", "--concepts", "woman,man", "--out", "c", "--timesteps", "5000"], 2, "--timesteps"),
        (&["concept", "calibrate", "--concepts", "woman,man", "--out", "c", "--weights=-1,inf"], 2, "--weights"),
        (&["concept", "merge", "woman:3e38", "woman:3e38", "--out", "c"], 2, "smaller weights"),
        (&["sample", "x", "--save-latents", "no/such/folder/l.st"], 1, "no/such/folder"),
        (&["sample", "x", "--save-latents", "."], 1, "directory"),
        (&["sample", "x", "--model", "./nowhere"], 2, "nowhere"),
        (&["sample", "x", "--latents", "missing.st"], 1, "missing.st"),
        (&["sample", "x", "--original-size", "512x512"], 2, "SDXL"),
        (&["sample", "x", "--original-size", "512"], 2, "whole numbers"),
        (&["sample", "x", "--crop", "1x2"], 2, "whole numbers"),
        (&["sample"], 2, "PROMPT"),
        (&["probe", "unet", "--inputs", "missing.st", "--output", "o.st"], 1, "missing.st"),
        (&["probe", "grad", "--inputs", "x", "--output", "y", "--precision", "int8"], 2, "--precision"),
        (&["probe", "scheduler", "--inputs", "x", "--output", "y", "--precision", "int8"], 2, "--precision"),
        (&["info", "--model", "./nowhere"], 2, "nowhere"),
        (&["train", "--out", "c.safetensors"], 2, "--target"),
        (&["train", "--avoid", "violence", "--out", "c.safetensors"], 2, "--neutral"),
        (&["train", "--target", "x", "--out", "no/such/folder/c"], 1, "no/such/folder"),
        (&["train", "--target", "x", "--out", "c", "--recipe", "nonsense"], 2, "official"),
        (&["train", "--target", "x", "--out", "c", "--batch", "0"], 2, "batch"),
        (&["train", "--target", "x", "--out", "c", "--lr-ram", "NaN"], 2, "--lr-ram"),
        (&["train", "--target", "x", "--out", "c", "--variant", "gan"], 2, "ram-only"),
    ] {
        let output = respodiff(folder.path(), args);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(error.contains(word) && !error.contains("panicked"), "{args:?}: {error}");
        assert!(files(folder.path()).is_empty(), "{args:?} left {:?}", files(folder.path()));
    }
}

/// A run never writes over what it reads.
#[test]
fn inputs_are_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let concept = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/concepts/man.safetensors");
    std::fs::copy(concept, folder.path().join("m.safetensors")).unwrap();
    std::fs::write(folder.path().join("p.json"), "a cook\n").unwrap();
    let before = ["m.safetensors", "p.json"].map(|name| std::fs::read(folder.path().join(name)).unwrap());
    for args in [
        &["sample", "--prompts", "p.json", "--concept", "woman", "--out", "p.png"][..],
        &["sample", "a cook", "--concept", "m.safetensors", "--save-latents", "./m.safetensors"],
        &["sample", "a cook", "--balance", "woman,m.safetensors", "--save-latents", "m.safetensors"],
        &["concept", "card", "m.safetensors", "--out", "m.safetensors"],
    ] {
        let output = respodiff(folder.path(), args);
        let error = text(&output.stderr);
        assert!(output.status.code() == Some(2) && error.contains("overwritten"), "{args:?}: {error}");
        assert_eq!(before, ["m.safetensors", "p.json"].map(|name| std::fs::read(folder.path().join(name)).unwrap()));
    }
}
