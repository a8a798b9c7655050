//! Prompts from a file and on the command line.

use super::{respodiff, text};
use crate::support;

#[test]
fn prompts_from_a_file_are_mixed_in_batches() {
    let folder = tempfile::tempdir().unwrap();
    let lines =
        "a cook\n\n{\"prompt\": \"a nurse\", \"seed\": 9, \"guidance\": 2, \"negative_prompt\": \"a hat\"}\na cook\n";
    std::fs::write(folder.path().join("prompts.txt"), lines).unwrap();
    let base = ["--steps", "2", "--seed", "5", "--quiet"];
    let all = ["sample", "--prompts", "prompts.txt", "--batch", "2", "--out", "{i}.png"];
    let output = respodiff(folder.path(), &[&all[..], &base].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let alone = |args: &[&str]| {
        let output = respodiff(folder.path(), &[&["sample"], args, &["--steps", "2", "--quiet", "-o", "-"]].concat());
        output.stdout
    };
    let picture = |i: usize| std::fs::read(folder.path().join(format!("{i}.png"))).unwrap();
    assert_eq!(picture(0), alone(&["a cook", "--seed", "5"]));
    assert_eq!(picture(1), alone(&["a nurse", "--seed", "9", "--cfg-scale", "2", "-n", "a hat"]));
    assert_eq!(picture(2), alone(&["a cook", "--seed", "7"]));
    // A mark at the beginning, which some editors write, is no part of the prompt.
    std::fs::write(folder.path().join("prompts.txt"), "\u{feff}{\"prompt\": \"a cook\"}").unwrap();
    assert!(respodiff(folder.path(), &[&all[..], &base].concat()).status.success());
    assert_eq!(picture(0), alone(&["a cook", "--seed", "5"]));
    for (lines, word) in [
        ("{\"prompt\": 3}", "line 1"),
        ("a\n{\"prompt\": \"b\\u0000\"}", "prompt 2"),
        ("[{\"prompt\": \"b\"}]", "array"),
    ] {
        std::fs::write(folder.path().join("prompts.txt"), lines).unwrap();
        let output = respodiff(folder.path(), &all);
        assert!(text(&output.stderr).contains(word), "{}", text(&output.stderr));
    }
}

/// Prompts and numbers that begin with a dash, and flags under the names that other programs give them.
#[test]
fn prompts_and_flags_are_as_people_write_them() {
    let folder = tempfile::tempdir().unwrap();
    assert!(respodiff(folder.path(), &["sample", "--prompt=-1 cook", "--seed", "-1", "--steps", "1"]).status.success());
    let printed = |args: &[&str]| {
        let output = respodiff(folder.path(), &[&["sample", "--steps", "2", "-q", "-o", "-"][..], args].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        output.stdout
    };
    let short = ["-p", "-cook", "-n", "-hat", "-s", "4", "-W", "72", "-H", "64", "--cfg-scale", "3"];
    let long = ["--negative-prompt=-hat", "--seed", "4", "--width", "72", "--height", "64", "--guidance", "3"];
    let sampler = |flag| [flag, "Euler a"];
    assert_eq!(
        printed(&[&short[..], &sampler("--sampler")].concat()),
        printed(&[&long[..], &sampler("--scheduler"), &["--", "-cook"]].concat())
    );
    // The seed -1, which is random as in other programs, makes another picture each time.
    assert_ne!(printed(&["a cook", "-s", "-1"]), printed(&["a cook", "-s", "-1"]));
    // For a prompt that looks like a flag, the error says how to pass it.
    let output = respodiff(folder.path(), &["sample", "-- cook"]);
    assert!(text(&output.stderr).contains("'-- -- cook'"), "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(2));
    let output = respodiff(folder.path(), &["sample", "a cook", "--prompt", "a nurse"]);
    assert_eq!(output.status.code(), Some(2));
}

/// Prompts of several lengths in one run: every picture is the one that it would be alone, and is made again from its
/// record.
#[test]
fn prompts_of_any_length_are_mixed_and_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let long = "(a doctor:1.2), ".repeat(30).trim_end().to_string();
    let lines = format!("a cook\na nurse\n{long}\n{{\"prompt\": \"a cook\", \"negative_prompt\": \"{long}\"}}\n");
    std::fs::write(folder.path().join("prompts.txt"), lines).unwrap();
    let base = ["--steps", "2", "--quiet", "--prompt-syntax", "a1111", "--clip-skip", "2"];
    let all = ["sample", "--prompts", "prompts.txt", "--seed", "5", "--batch", "4", "--out", "{i}.png"];
    let output = respodiff(folder.path(), &[&all[..], &base].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let picture = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    for (i, args) in [vec!["a cook"], vec!["a nurse"], vec![&long], vec!["a cook", "-n", &long]].iter().enumerate() {
        let seed = (5 + i).to_string();
        let args = [&["sample", "--seed", &seed, "-o", "-"], &args[..], &base].concat();
        assert_eq!(picture(&format!("{i}.png")), respodiff(folder.path(), &args).stdout, "{i}");
        let output = respodiff(folder.path(), &["rerun", &format!("{i}.png"), "-o", "again.png"]);
        assert!(text(&output.stderr).contains("the same picture"), "{}", text(&output.stderr));
        assert_eq!(picture(&format!("{i}.png")), picture("again.png"));
    }
    let tags = respodiff::image::read_png_text(&folder.path().join("2.png")).unwrap();
    let parameters = &tags.iter().find(|(k, _)| k == "parameters").unwrap().1;
    assert!(parameters.contains("Clip skip: 2, Prompt syntax: a1111"), "{parameters}");
}

/// A plain prompt that was probably meant otherwise is read as it is, with a warning that says what to do.
#[test]
fn plain_prompts_warn() {
    let folder = tempfile::tempdir().unwrap();
    for (prompt, word) in
        [("a (red:1.3) hat", "looks weighted"), (&*"a doctor, ".repeat(40), "these words are not used: a doctor, a")]
    {
        let output = respodiff(folder.path(), &["sample", prompt, "--steps", "1", "-q", "-o", "x.png"]);
        let told = text(&output.stderr);
        assert!(output.status.success() && told.contains(word) && told.contains("--prompt-syntax a1111"), "{told}");
    }
    for (args, word) in [
        (["a AND b", "--prompt-syntax", "a1111"], "the prompt: `AND`"),
        (["a <lora:x:1>", "--prompt-syntax", "a1111"], "--lora-folder"),
        (["a", "--prompt-2", "b"], "--prompt-2: "),
        (["a", "--clip-skip", "99"], "--clip-skip: 99"),
        (["a", "--prompt-syntax", "x"], "--prompt-syntax"),
        (["a", "--embedding", "nothing.pt"], "nothing.pt"),
        (["a", "--embedding", "."], "no embeddings"),
    ] {
        let output = respodiff(folder.path(), &[&["sample", "--steps", "1"], &args[..]].concat());
        assert!(!output.status.success() && text(&output.stderr).contains(word), "{}", text(&output.stderr));
    }
}

/// Learnt words and SDXL's two prompts are in the record, from which the picture is made again.
#[test]
fn learnt_words_and_two_prompts_are_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let golden = |name: &str| support::golden().join(name).display().to_string();
    std::fs::create_dir(folder.path().join("learnt")).unwrap();
    for file in ["a1111-toy.pt", "learned_embeds.bin"] {
        std::fs::copy(golden(&format!("embeddings/{file}")), folder.path().join("learnt").join(file)).unwrap();
    }
    let (sd1, sdxl) = (golden("checkpoints/sd1"), golden("checkpoints/sdxl"));
    let base = ["sample", "--steps", "2", "-s", "3", "-W", "64", "-H", "64", "-q", "-o", "x.png"];
    let made = |args: &[&str]| {
        let output = respodiff(folder.path(), &[&base[..], args].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        let tags = respodiff::image::read_png_text(&folder.path().join("x.png")).unwrap();
        (
            std::fs::read(folder.path().join("x.png")).unwrap(),
            tags.iter().find(|(k, _)| k == "parameters").unwrap().1.clone(),
        )
    };
    let again = |model: &str| {
        let output = respodiff(folder.path(), &["rerun", "x.png", "-o", "again.png", "--model", model]);
        text(&output.stderr)
    };
    let (learnt, parameters) = made(&["a boat by A1111-TOY", "--model", &sd1, "--embedding", "learnt"]);
    assert!(parameters.contains("TI hashes: \"a1111-toy: "), "{parameters}");
    assert!(!parameters.contains("learned_embeds"), "{parameters}");
    assert!(again(&sd1).contains("the same picture"), "{}", again(&sd1));
    std::fs::write(
        folder.path().join("learnt/a1111-toy.pt"),
        std::fs::read(golden("embeddings/learned_embeds.bin")).unwrap(),
    )
    .unwrap();
    assert!(again(&sd1).contains("another embedding"), "{}", again(&sd1));
    let (other, _) = made(&["a boat by a1111-toy", "--model", &sd1]);
    assert_ne!(learnt, other);
    let two = ["a boat", "--model", &sdxl, "--prompt-2", "a castle", "--negative-prompt-2", "bad", "--clip-skip", "2"];
    let (two, parameters) = made(&two);
    assert!(parameters.contains("Prompt 2: a castle, Negative prompt 2: bad"), "{parameters}");
    assert!(again(&sdxl).contains("the same picture"), "{}", again(&sdxl));
    assert_ne!(two, made(&["a boat", "--model", &sdxl, "--clip-skip", "2"]).0);
}
