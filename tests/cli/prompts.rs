//! Prompts from a file and on the command line.

use super::{respodiff, text};

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
