//! `info`, `doctor`, `concept show`, completions and manual pages.

use super::{respodiff, text};
use crate::support;

#[test]
fn info_tells_components_and_memory() {
    let folder = tempfile::tempdir().unwrap();
    let [model, taesd] = ["sdxl", "taesd"].map(|name| support::golden().join("checkpoints").join(name));
    for (args, words) in [
        (&["info"][..], ["text_encoder ", "unet", "vae", "MiB"]),
        (&["info", "--model", model.to_str().unwrap()], ["text_encoder_2", "unet", "AutoencoderKL", "128x128"]),
        (&["info", "--model", taesd.to_str().unwrap()], ["vae ", "AutoencoderTiny (TAESD)", "512x512", "MiB"]),
    ] {
        let output = respodiff(folder.path(), args);
        let report = text(&output.stdout);
        assert!(output.status.success() && words.iter().all(|w| report.contains(w)), "{report}");
    }
}

#[test]
fn reports_are_json() {
    let folder = tempfile::tempdir().unwrap();
    let json = |args: &[&str]| -> serde_json::Value {
        let output = respodiff(folder.path(), args);
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|problem| panic!("{problem}: {}", text(&output.stdout)))
    };
    let info = json(&["info", "--json"]);
    assert_eq!((&info["scheduler"], &info["prediction"]), (&"PNDMScheduler".into(), &"epsilon".into()), "{info}");
    assert!(info["components"].as_array().unwrap().len() == 3 && info["fingerprint"].is_string(), "{info}");
    let concepts = json(&["concept", "show", "woman", "man", "--json"]);
    assert_eq!(concepts[1]["concept"], "a man");
    let report =
        json(&["train", "--target", "a woman", "--iterations", "2", "--sheet", "0", "--out", "w.st", "--json", "-q"]);
    assert_eq!((&report["iterations"], &report["concept"]), (&2.into(), &"w.st".into()), "{report}");
}

#[test]
fn completions_and_manual_pages_are_printed() {
    let folder = tempfile::tempdir().unwrap();
    let said = |args: &[&str]| text(&respodiff(folder.path(), args).stdout);
    assert!(said(&["completions", "bash"]).contains("complete -F _respodiff"));
    for (shell, word) in
        [("zsh", "#compdef respodiff"), ("fish", "complete -c respodiff"), ("powershell", "'respodiff'")]
    {
        assert!(said(&["completions", shell]).contains(word), "{shell}");
    }
    for (command, title, flag) in [
        (&["man"][..], ".TH respodiff 1", "threads"),
        (&["man", "sample"], ".TH respodiff-sample 1", "negative"),
        (&["man", "concept", "show"], ".TH respodiff-concept-show 1", "json"),
    ] {
        let page = said(command);
        assert!(page.contains(title) && page.contains(flag), "{command:?}: {page}");
    }
    let output = respodiff(folder.path(), &["man", "paint"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("sample"), "{}", text(&output.stderr));
}

/// Quiet commands print only results.
#[test]
fn quiet_leaves_stderr_empty() {
    let folder = tempfile::tempdir().unwrap();
    for args in [
        &["sample", "a cook", "--steps", "1", "--concept", "woman:0.5", "-o", "x.png"][..],
        &["rerun", "x.png"],
        &["train", "--target", "a woman", "--iterations", "1", "--sheet", "0", "--out", "w.st"],
        &["concept", "show", "woman"],
        &["info", "--device", "cpu"],
    ] {
        let output = respodiff(folder.path(), &[args, &["--quiet"]].concat());
        let said = text(&output.stderr);
        // Warnings of a training about its losses are printed nevertheless.
        let rest = said.lines().filter(|line| !line.starts_with("warning: ")).count();
        assert!(output.status.success() && rest == 0 && !output.stdout.is_empty(), "{args:?}: {said}");
    }
}
