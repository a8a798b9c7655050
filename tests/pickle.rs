//! Import of `torch.save` files made by torch (`tests/golden/pickles.py`).

mod support;

use respodiff::respodiff::{Concept, import};
use std::path::PathBuf;

const CHANNELS: usize = 128;

fn file(name: &str) -> PathBuf {
    support::golden().join("pickles").join(name)
}

fn read(name: &str, concept: &str, column: Option<usize>) -> Concept {
    import(&file(name), concept, column, CHANNELS).unwrap()
}

#[test]
fn layouts_agree() {
    let (plain, strided) = (read("official.pth", "a man", None), read("strided.pth", "a man", None));
    assert_eq!(plain.ram.parameters, strided.ram.parameters);
    assert_eq!(plain.sam.as_ref().unwrap().parameters, strided.sam.unwrap().parameters);
    assert_eq!(plain.ram.parameters, read("official.pth", "anything", Some(1)).ram.parameters);
    assert_ne!(plain.ram.parameters, read("official.pth", "a woman", None).ram.parameters);
    let first = read("official.pth", "a woman", None);
    assert_eq!((first.ram.shape().c, first.ram.shape().h, first.ram.shape().w), (CHANNELS, 2, 2));
    let sdisc = read("sdisc.pth", "female", None);
    assert!(sdisc.sam.is_none() && sdisc.ram.parameters.iter().all(|x| x.is_finite()));
}

#[test]
fn values_are_torchs() {
    // Column 0 of the matrix from its top: row 4 r + p is pixel p of channel r.
    let bytes = std::fs::read(file("expected.json")).unwrap();
    let expected: Vec<f32> = serde_json::from_slice(&bytes).unwrap();
    let ram = read("official.pth", "a woman", None).ram.parameters;
    for (i, truth) in expected.iter().enumerate() {
        let (channel, pixel) = (i / 4, i % 4);
        assert_eq!(ram[pixel * CHANNELS + channel], *truth, "{i}");
    }
}

#[test]
fn what_is_refused() {
    let refused = |name: &str, concept: &str, column, channels, words: &[&str]| {
        let error = import(&file(name), concept, column, channels).expect_err("refused").to_string();
        assert!(words.iter().all(|w| error.contains(w)) && !error.contains('\n'), "{error}");
    };
    refused("malicious.pth", "a woman", None, CHANNELS, &["system", "nothing was run"]);
    assert!(!std::path::Path::new("/tmp/respodiff-was-tricked").exists());
    refused("old.pth", "a woman", None, CHANNELS, &["zip", "save it anew"]);
    refused("official.pth", "a dog", None, CHANNELS, &["a dog", "--column"]);
    refused("official.pth", "a woman", Some(10), CHANNELS, &["10 columns"]);
    refused("official.pth", "a woman", None, 1280, &["another model"]);
    refused("missing.pth", "a woman", None, CHANNELS, &["missing.pth"]);
}

#[test]
fn damaged_files_are_errors() {
    let whole = std::fs::read(file("official.pth")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pth");
    for len in (0..whole.len()).step_by(whole.len() / 60) {
        std::fs::write(&path, &whole[..len]).unwrap();
        assert!(import(&path, "a woman", None, CHANNELS).is_err(), "{len}");
    }
    // Any byte of the pickle may be another: an error or other numbers, never a panic or a huge allocation.
    let start = whole.windows(8).position(|w| w == b"data.pkl").unwrap();
    for at in start..(start + 500).min(whole.len()) {
        for flip in [0x01, 0x40, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            std::fs::write(&path, &bytes).unwrap();
            let _ = import(&path, "a woman", None, CHANNELS);
        }
    }
}
