//! Every example runs to its end, in a folder of its own. `cargo test` and `cargo build --examples` build them.

use std::path::Path;
use std::process::Command;

fn run(name: &str, arguments: &[&str]) -> (String, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_respodiff")).with_file_name("examples").join(name);
    assert!(program.exists(), "{} is not there: run all tests, or `cargo build --examples`", program.display());
    let output = Command::new(program).args(arguments).current_dir(&folder).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{name}: {said}{}", String::from_utf8_lossy(&output.stderr));
    (said, folder)
}

fn is_picture(path: &Path) -> bool {
    std::fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"\x89PNG"))
}

#[test]
fn generate() {
    let (_, folder) = run("01-generate", &[]);
    assert!(is_picture(&folder.path().join("nurse.png")));
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints/sd1");
    let (said, _) = run("01-generate", &[golden.to_str().unwrap()]);
    assert!(said.starts_with("sd1 on "), "{said}");
}

#[test]
fn concept() {
    let (_, folder) = run("02-concept", &[]);
    assert!(["woman.png", "man.png"].iter().all(|name| is_picture(&folder.path().join(name))));
}

#[test]
fn train() {
    let (_, folder) = run("03-train", &["3"]);
    assert!(respodiff::Concept::load(folder.path().join("a-woman.safetensors")).is_ok());
}

#[test]
fn many_prompts() {
    run("04-many-prompts", &[]);
}

#[test]
fn progress_and_cancel() {
    let (said, _) = run("05-progress-and-cancel", &[]);
    assert!(said.contains("stopped after"), "{said}");
}

#[test]
fn kernel_of_ones_own() {
    run("06-kernel-of-ones-own", &[]);
}
