//! Signals, closed pipes, full disks, and progress without a terminal.

use super::{files, respodiff, text};
use std::path::Path;
use std::process::Command;

#[cfg(unix)]
#[test]
fn interrupted_runs_leave_nothing_half_done() {
    use std::time::Duration;
    for (signal, code) in [("-INT", Some(130)), ("-TERM", Some(130)), ("-KILL", None)] {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_respodiff"))
            .args(["sample", "a cook", "--steps", "900", "--batch", "16", "--out", "x.png"])
            .current_dir(folder.path())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(700));
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let status = child.wait().unwrap();
        assert_eq!(status.code(), code, "{signal}");
        let mut error = String::new();
        std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut error).unwrap();
        assert!(code.is_none() || error.contains("interrupted: stopped after"), "{error}");
        assert!(files(folder.path()).is_empty(), "{signal} left {:?}", files(folder.path()));
    }
}

/// Batches that were finished before the interrupt are kept, and the manifest lists them.
#[cfg(unix)]
#[test]
fn interrupted_runs_keep_what_they_saved() {
    use std::io::BufRead;
    let folder = tempfile::tempdir().unwrap();
    let concept = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/concepts/man.safetensors");
    let mut child = Command::new(env!("CARGO_BIN_EXE_respodiff"))
        .args(["sample", "a cook", "--steps", "40", "--images", "500", "--out", "x.png", "--concept"])
        .arg(concept)
        .current_dir(folder.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let mut lines = lines.map(|line| line.unwrap());
    assert_eq!(lines.next().as_deref(), Some("x-0.png"));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let printed = 1 + lines.filter(|line| line.ends_with(".png")).count();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(
        text(&output.stderr).contains(&format!("{printed} of 500 pictures were saved")),
        "{}",
        text(&output.stderr)
    );
    let manifest: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(folder.path().join("x-0.json")).unwrap()).unwrap();
    assert_eq!((manifest.len(), files(folder.path()).len()), (printed, printed + 1));
}

/// An interrupt ends a command in every one of its runs, and the same command goes on afterwards.
#[cfg(unix)]
#[test]
fn interrupted_calibrations_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let args =
        ["concept", "calibrate", "--concepts", "woman,man", "--out", "c", "--professions", "doctor", "--steps", "6"];
    let more = ["--weights", "0.5,1", "--timesteps", "500", "--images-per-prompt", "8", "--batch", "4"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_respodiff"))
        .args(args)
        .args(more)
        .current_dir(folder.path())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let second = folder.path().join("c/weight-0.5-until-500/records.jsonl");
    while !second.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let error = text(&output.stderr);
    assert!(output.status.code() == Some(130) && error.contains("run the same command again"), "{error}");
    let output = respodiff(folder.path(), &[&args[..], &more, &["--alignment-loss", "100"]].concat());
    let error = text(&output.stderr);
    assert!(output.status.success() || error.contains("balances better"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_closed_pipe_is_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_respodiff"))
        .arg("info")
        .current_dir(folder.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && !text(&output.stderr).contains("panicked"), "{}", text(&output.stderr));
}

/// A report that cannot be written to a full disk is a failure.
#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_printed_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
    let output = command.args(["doctor", "--json"]).stdout(full).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("error: cannot print: ") && said.lines().count() == 1, "{said}");
}

/// If stderr is not a terminal, as in a container or a log, a line reports the progress every few seconds. PNDM makes
/// one step more than requested, and the decoding of each picture counts as one step.
#[test]
fn progress_is_reported_without_a_terminal() {
    use std::io::BufRead;
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_respodiff"))
        .args(["sample", "a cook", "--device", "cpu", "--sampler", "PNDM", "--steps", "900", "--batch", "16"])
        .current_dir(folder.path())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(line.starts_with("sampling ") && line.contains("/917 steps, ") && line.contains(" it/s, "), "{line}");
}
