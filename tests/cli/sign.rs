//! Signed marks, read by the C2PA's own library.

use super::{respodiff, text};
use c2pa::{Context, Reader, ValidationState};
use std::io::Cursor;
use std::path::{Path, PathBuf};

fn certificate(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/c2pa").join(name)
}

/// Flags with a chain of certificates and a key.
fn signed_by(chain: &str, key: &str) -> Vec<String> {
    let path = |name: &str| certificate(name).display().to_string();
    vec!["--sign".into(), path(chain), "--sign-key".into(), path(key)]
}

fn sample(folder: &Path, out: &str, more: &[String]) -> std::process::Output {
    let args = ["sample", "a doctor", "--steps", "1", "--seed", "4", "-q", "-o", out];
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    respodiff(folder, &[&args[..], &more].concat())
}

fn read(bytes: &[u8], media_type: &str) -> c2pa::Result<Reader> {
    Reader::from_context(Context::new()).with_stream(media_type, Cursor::new(bytes.to_vec()))
}

#[test]
fn pictures_are_signed_in_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let signers = [signed_by("chain.pem", "key.pem"), signed_by("ed25519.pem", "ed25519-key.pem")];
    for (i, (file, media_type)) in
        [("x.png", "image/png"), ("x.jpg", "image/jpeg"), ("x.webp", "image/webp")].into_iter().enumerate()
    {
        let output = sample(folder.path(), file, &signers[i % 2]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let mut bytes = std::fs::read(folder.path().join(file)).unwrap();
        let reader = read(&bytes, media_type).unwrap();
        // The root of the tests is on no list, and nothing else is wrong.
        assert_eq!(reader.validation_state(), ValidationState::Valid, "{file}: {reader}");
        let json = reader.json();
        for words in ["trainedAlgorithmicMedia", "c2pa.created", "respodiff", "respodiff tests"] {
            assert!(json.contains(words), "{words} is not in {json}");
        }
        // A changed pixel is found out.
        let last = bytes.len() - 40;
        bytes[last] ^= 1;
        let state = read(&bytes, media_type).map(|reader| reader.validation_state());
        assert!(!state.is_ok_and(|state| state == ValidationState::Valid), "{file}");
    }
}

/// The picture and its record stay as they are.
#[test]
fn signed_pictures_are_made_again() {
    let folder = tempfile::tempdir().unwrap();
    assert!(sample(folder.path(), "plain.png", &[]).status.success());
    let output = sample(folder.path(), "signed.png", &signed_by("chain.pem", "key.pem"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let [plain, signed] =
        ["plain.png", "signed.png"].map(|name| respodiff::Picture::read(&folder.path().join(name), 255));
    assert_eq!(plain.unwrap().rgb, signed.unwrap().rgb);
    let output = respodiff(folder.path(), &["rerun", "signed.png"]);
    assert!(text(&output.stderr).contains("the same picture"), "{}", text(&output.stderr));
    let [plain, again] = ["plain.png", "signed-again.png"].map(|name| std::fs::read(folder.path().join(name)).unwrap());
    assert_eq!(plain, again);
}

/// Certificates and keys that cannot sign are refused before anything is made.
#[test]
fn what_cannot_sign_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("empty.pem"), "").unwrap();
    for (chain, key, part) in [
        ("chain.pem", "other-key.pem", "chain.pem"),
        ("chain.pem", "ed25519-key.pem", "chain.pem"),
        ("web.pem", "key.pem", "web.pem"),
        ("key.pem", "key.pem", "key.pem"),
        ("chain.pem", "README.md", "README.md"),
        ("missing.pem", "key.pem", "missing.pem"),
    ] {
        let output = sample(folder.path(), "x.png", &signed_by(chain, key));
        let message = text(&output.stderr);
        assert!(!output.status.success() && message.contains(part), "{chain}, {key}: {message}");
        assert!(message.lines().count() == 1 && !folder.path().join("x.png").exists(), "{chain}, {key}: {message}");
    }
    let output = sample(folder.path(), "x.png", &["--sign".into(), "chain.pem".into()]);
    assert!(text(&output.stderr).contains("--sign-key"), "{}", text(&output.stderr));
}
